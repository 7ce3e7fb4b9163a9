"""What other programs, and safelight itself, find inside a finished file."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from safelight import embedded, prepared
from safelight.config import Config
from safelight.jobspec import PROMPT_CHARACTERS_MAX, JobSpec
from safelightd import metadata, outputs
from tests.conftest import Installation
from tests.integration import making

PROMPTS = [
    "a red fox",
    "un renard é",
    "赤い狐 🦊",
    'two lines\nNegative prompt: not one\nSteps: 99, "quoted", {a|b} <lora:x:1>',
    "tab\tbell\x07 return\r end",
]


@pytest.fixture
def config(installation: Installation) -> Config:
    return installation.config


def _write(spec: JobSpec, config: Config) -> Path:
    frames = making.moving(spec) if spec.kind == "video" else [making.noise(spec)]
    return outputs.write(spec, making.PLAN, frames, config)


def _without_metadata(config: Config) -> Config:
    output = config.settings.output.model_copy(update={"metadata": False})
    return replace(config, settings=config.settings.model_copy(update={"output": output}))


def _png_chunks(file: Path) -> list[tuple[bytes, bytes]]:
    content, chunks, at = file.read_bytes(), [], 8
    while at < len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        chunks.append((name, content[at + 8 : at + 8 + length]))
        at += length + 12
    return chunks


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("output_format", ["png", "jpg", "webp", "mp4"])
def test_file_says_how_to_make_it_again(prompt: str, output_format: str, config: Config) -> None:
    fields = {"prompt": prompt, "negative_prompt": "blur", "tags": ("a", "b"), "axes": {"steps": 4, "s": 0.5}}
    make = making.clip_spec if output_format == "mp4" else making.image_spec
    spec = make(output_format=output_format, **fields)

    found = embedded.read(_write(spec, config))

    assert found.spec == spec
    assert found.plan == making.PLAN
    assert found.id == spec.id
    assert found.versions == metadata.versions()
    assert set(found.versions) == {"safelight", *prepared.LIBRARIES}


def test_png_has_the_text_that_other_programs_read(config: Config) -> None:
    spec = making.image_spec(negative_prompt="blur", guidance_scale=3.5, model="flux-dev", num_inference_steps=28)

    with Image.open(_write(spec, config)) as picture:
        text = picture.info["parameters"]

    prompt, negative, last = text.split("\n")
    assert prompt == "a red fox"
    assert negative == "Negative prompt: blur"
    assert last == (
        "Steps: 28, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, "
        "Size: 64x48, Model: flux-dev, Version: safelight 0.1.0"
    )


def test_last_line_is_read_back_by_the_pattern_of_a1111() -> None:
    """Its infotext_utils.parse_generation_parameters takes the last line for settings if three pairs match."""
    pairs = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    spec = making.image_spec(model="my: flux, mine", true_cfg_scale=4.0, negative_prompt="x")

    found = dict(pairs.findall(metadata.parameters(spec).split("\n")[-1]))

    assert found["Steps"] == "4"
    assert found["CFG scale"] == "4"
    assert found["Size"] == "64x48"
    assert json.loads(found["Model"]) == "my: flux, mine"


def test_no_negative_line_without_a_negative_prompt() -> None:
    assert "Negative" not in metadata.parameters(making.image_spec())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_png_chunks_have_names_nobody_takes_for_comfyui(prompt: str, config: Config) -> None:
    chunks = _png_chunks(_write(making.image_spec(prompt=prompt), config))

    texts = {body.split(b"\0")[0]: name for name, body in chunks if name in (b"tEXt", b"iTXt", b"zTXt")}
    assert texts[b"safelight"] == b"iTXt"
    assert texts[b"parameters"] == (b"tEXt" if prompt.isascii() or "é" in prompt else b"iTXt")
    assert set(texts) == {b"safelight", b"parameters"}


@pytest.mark.parametrize("output_format", ["jpg", "webp"])
def test_exif_comment_is_the_unicode_of_a1111(output_format: str, config: Config) -> None:
    spec = making.image_spec(output_format=output_format, prompt="赤い狐 🦊")

    with Image.open(_write(spec, config)) as picture:
        block = picture.getexif()
        comment = block.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]

    assert block[ExifTags.Base.Software] == "safelight 0.1.0"
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == metadata.parameters(spec)


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp", "mp4"])
def test_switched_off_metadata_leaves_no_word_of_the_prompt(output_format: str, config: Config) -> None:
    make = making.clip_spec if output_format == "mp4" else making.image_spec
    spec = make(output_format=output_format, prompt="unmistakable", batch="elsewhere")

    content = _write(spec, _without_metadata(config)).read_bytes()

    for word in ("unmistakable", "elsewhere", "safelight", "Steps", spec.id):
        assert word.encode() not in content
        assert word.encode("utf-16-be") not in content


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp", "mp4"])
def test_same_job_gives_the_same_bytes(output_format: str, config: Config) -> None:
    make = making.clip_spec if output_format == "mp4" else making.image_spec
    spec = make(output_format=output_format)

    first, second = (_write(spec, config).read_bytes() for _ in range(2))

    assert first == second


@pytest.mark.parametrize("output_format", ["png", "webp", "mp4"])
def test_longest_legal_prompts_are_kept_whole(output_format: str, config: Config) -> None:
    long = "\x01" * PROMPT_CHARACTERS_MAX
    make = making.clip_spec if output_format == "mp4" else making.image_spec
    spec = make(output_format=output_format, prompt=long, prompt_2=long, negative_prompt=long, template=long)

    assert embedded.read(_write(spec, config)).spec == spec


def test_jpeg_keeps_the_record_before_the_comment_when_both_do_not_fit(config: Config) -> None:
    """A JPEG holds 64 KB: the text for other programs goes first."""
    spec = making.image_spec(output_format="jpg", prompt="fox " * 5_000, negative_prompt="dog " * 2_000)

    file = _write(spec, config)

    assert embedded.read(file).spec == spec
    with Image.open(file) as picture:
        assert ExifTags.Base.UserComment not in picture.getexif().get_ifd(ExifTags.IFD.Exif)


def test_jpeg_of_a_prompt_too_long_for_any_jpeg_is_written_without(config: Config) -> None:
    spec = making.image_spec(output_format="jpg", prompt="狐" * PROMPT_CHARACTERS_MAX, prompt_2="狐" * 10_000)

    file = _write(spec, config)

    with Image.open(file) as picture:
        assert not picture.getexif()
