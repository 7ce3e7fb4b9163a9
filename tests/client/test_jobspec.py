"""What a job may say: every default filled in, nothing corrected, every fault told with its remedy."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import models
from safelight.errors import Fault
from safelight.jobspec import FIELDS, SEED_MAX, JobSpec, check, is_folder_name

TABLE = models.load()
DIGEST = "0" * 64
KEYS = TABLE.keys()


def checked(**written: object) -> JobSpec | list[Fault]:
    return check(written, TABLE, "n.txt:1", image_model="flux-schnell", video_model="wan-ti2v-5b")


def spec(**written: object) -> JobSpec:
    result = checked(**{"prompt": "a red fox", "seed": 1, **written})
    assert isinstance(result, JobSpec), result
    return result


def faults(**written: object) -> list[str]:
    result = checked(**{"prompt": "a red fox", "seed": 1, **written})
    assert isinstance(result, list), result
    return [f"{fault.problem}. {fault.remedy}".strip() for fault in result]


@pytest.mark.parametrize("key", KEYS)
def test_defaults_are_the_models_own(key: str) -> None:
    facts = TABLE[key]
    picture = {"image": DIGEST} if facts.image == "required" else {}
    made = spec(model=key, prompt="a red circle", **picture)

    wanted = facts.defaults.model_dump()
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert (made.kind, made.max_sequence_length) == (facts.kind, facts.max_sequence_length)
    assert made.output_format == {"image": "png", "video": "mp4"}[facts.kind]


def test_without_guidance_no_second_scale_is_written_that_nothing_heeds() -> None:
    assert spec(model="wan-t2v-a14b", guidance_scale=1).guidance_scale_2 == 1
    assert spec(model="wan-t2v-a14b", guidance_scale=1, guidance_scale_2=1).guidance_scale_2 == 1
    assert spec(model="wan-t2v-a14b", guidance_scale=1.5).guidance_scale_2 == 3
    assert spec(model="wan-ti2v-5b", guidance_scale=1).guidance_scale_2 is None


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ({}, "flux-schnell"),
        ({"kind": "video"}, "wan-ti2v-5b"),
        ({"image": DIGEST}, "wan-ti2v-5b"),
        ({"model": "flux-dev"}, "flux-dev"),
    ],
)
def test_job_without_a_model_gets_the_one_of_its_kind(written: dict[str, object], model: str) -> None:
    assert spec(**written).model == model


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ({"width": 1030}, "width 1030 is not a multiple of 16. Use 1024 or 1040."),
        ({"width": 4096}, "width 4096 is outside 256 to 2048 of flux-schnell. Use 2048."),
        ({"width": 2048, "height": 2048}, "2048x2048 is more than the 2,359,296 pixels of"),
        ({"width": -16}, "width -16 is outside 256 to 2048 of flux-schnell. Use 256."),
        ({"width": "wide"}, "width 'wide' is not a whole number. Write it in digits."),
        ({"flow_shift": "much"}, "flow_shift 'much' is not a number. Write it in digits."),
        ({"width": True}, "width True is not a whole number. Write it in digits."),
        ({"num_inference_steps": 50}, "num_inference_steps 50 is outside 1 to 8. Use 8."),
        ({"guidance_scale": 3.5}, "guidance_scale would be ignored: flux-schnell is distilled"),
        ({"negative_prompt": "blur"}, "negative_prompt would be ignored by flux-schnell. Leave it out."),
        ({"num_frames": 81}, "num_frames means nothing to flux-schnell, which makes images. Leave it out."),
        ({"model": "flux-dev", "negative_prompt": "x"}, "negative_prompt would be ignored by flux-dev without true"),
        ({"model": "flux-dev", "true_cfg_scale": 4}, "true_cfg_scale would be ignored without a negative_prompt. Add"),
        ({"model": "wan-ti2v-5b", "num_frames": 80}, "num_frames 80 is not 4n + 1. Use 81."),
        ({"model": "wan-ti2v-5b", "height": 720}, "height 720 is not a multiple of 32. Use 704."),
        ({"model": "wan-ti2v-5b", "height": 500, "width": 832}, "height 500 is not a multiple of 32. Use 480 or 512."),
        ({"model": "wan-ti2v-5b", "last_image": DIGEST}, "last_image would be ignored by wan-ti2v-5b."),
        ({"model": "wan-ti2v-5b", "guidance_scale_2": 3}, "guidance_scale_2 would be ignored: wan-ti2v-5b"),
        ({"model": "wan-t2v-a14b", "guidance_scale": 1, "guidance_scale_2": 7}, "guidance_scale_2 would be ignored at "
         "guidance_scale 1, where a step is one forward. Leave it out, or raise guidance_scale."),
        ({"model": "wan-t2v-a14b", "guidance_scale": 1, "negative_prompt": "blur"}, "negative_prompt would be ignored "
         "at guidance_scale 1. Raise guidance_scale, or leave it out."),
        ({"model": "wan-ti2v-5b", "guidance_scale": 0.5}, "guidance_scale 0.5 is outside 1.0 to 30.0. Use 1.0."),
        ({"model": "wan-i2v-a14b"}, "wan-i2v-a14b animates a picture and none was given. Add image: NAME."),
        ({"model": "wan-t2v-a14b", "image": DIGEST}, "image would be ignored by wan-t2v-a14b. Leave it out, or"),
        ({"strength": 0.5}, "strength would be ignored without an image. Add image: NAME, or leave it out."),
        ({"image": DIGEST, "model": "flux-dev", "strength": 0}, "strength 0 is not above 0 and at most 1. Use 0.6."),
        ({"image": DIGEST, "strength": 1.5}, "strength 1.5 is not above 0 and at most 1. Use 1."),
        ({"model": "wan-ti2v-5b", "image": DIGEST, "strength": 0.5}, "strength would be ignored by wan-ti2v-5b, which"),
        ({"model": "flux-dev", "last_image": DIGEST}, "last_image would be ignored by flux-dev."),
        ({"model": "wan-ti2v-5b", "output_format": "jpg"}, "output_format 'jpg' is none for videos: mp4, gif, webp, "
         "png are. Use mp4."),
        ({"output_format": "gif"}, "output_format 'gif' is none for images: png, jpg, webp are. Use png."),
        ({"interpolate": 2}, "interpolate means nothing to flux-schnell, which makes images. Leave it out."),
        ({"model": "wan-ti2v-5b", "interpolate": 3}, "interpolate 3 is not 2 or 4. Use one of them, or leave it out."),
        ({"model": "wan-ti2v-5b", "interpolate": 1}, "interpolate 1 is not 2 or 4. Use one of them, or leave it out."),
        ({"model": "wan-ti2v-5b", "interpolate": "twice"}, "interpolate 'twice' is not 2 or 4."),
        ({"model": "wan-ti2v-5b", "interpolate": 4, "fps": 40}, "fps 40 interpolated by 4 is 160 frames a second. At "
         "most 120: use fps 30, or leave interpolate out."),
        ({"model": "wan-ti2v-5b", "output_format": "gif"}, "a gif cannot show 24 frames a second: its frames last "
         "whole hundredths of one. Use fps 25, or another output_format."),
        ({"model": "wan-t2v-a14b", "output_format": "gif", "interpolate": 4}, "a gif cannot show 64 frames a second: "
         "its frames last whole hundredths of one. Use fps 5, or another output_format."),
        ({"model": "wan-ti2v-5b", "output_format": "gif", "fps": 100}, "a gif cannot show 100 frames a second: its "
         "frames last whole hundredths of one. Use fps 50, or another output_format."),
        ({"model": "flux-schnel"}, "model 'flux-schnel' is not known. Known: flux-schnell, "),
        ({"kind": "video", "model": "flux-dev"}, "kind 'video' does not fit model flux-dev. flux-dev makes images."),
        ({"vae_tiling": True}, "vae_tiling True is not auto, off, strips or on."),
        ({"model": "wan-i2v-a14b", "image": DIGEST, "vae_tiling": "strips"},
         "vae_tiling strips is not offered for wan-i2v-a14b. Use auto, off or on."),
        ({"precision": "fp4"}, "precision 'fp4' is not auto or one of bf16, fp16, fp8, fp8-dynamic,"),
        ({"step": 4}, "unknown key 'step'."),
        ({"prompt": "  "}, "the prompt is empty. Write what the picture should show."),
        ({"prompt": "a\0b"}, "prompt has a NUL character. Remove it."),
        ({"prompt": "half a pair \ud83d"}, "prompt 'half a pair \\ud83d' is not text."),
        ({"tags": ["\ud83d"]}, "tags ['\\ud83d'] is not words separated by commas."),
        ({"prompt": "x" * 20_001}, "prompt has 20001 characters. At most 20000."),
        ({"width": "x" * 100}, f"width '{'x' * 76}... is not a whole number. Write it in digits."),
        ({"width": "9" * 400}, f"width {'9' * 400} is not a multiple of 16. Use 2048."),
        ({"model": "wan-ti2v-5b", "num_frames": "9" * 400}, f"num_frames {'9' * 400} is not 4n + 1. Use 121."),
        ({"seed": SEED_MAX + 1}, f"seed {SEED_MAX + 1} is outside 0 to {SEED_MAX}. Use {SEED_MAX}."),
        ({"seed": None}, "it has no seed. Write one."),
        ({"batch": "../x"}, "batch '../x' cannot be a folder name. Use letters, digits, spaces, . _ and -."),
        ({"not_before": "soon"}, "not_before 'soon' is not a date and time such as 2026-11-23T06:00."),
    ],
)  # fmt: skip
def test_what_a_model_would_refuse_or_ignore_is_a_fault(written: dict[str, object], fault: str) -> None:
    found = faults(**written)

    assert any(each.startswith(fault) for each in found), found


@pytest.mark.parametrize("output_format", ["mp4", "gif", "webp", "png"])
@pytest.mark.parametrize(("interpolate", "frames", "fps"), [(None, 81, 25), (2, 161, 50), ("2", 161, 50)])
def test_clip_says_what_its_file_will_be(output_format: str, interpolate: object, frames: int, fps: int) -> None:
    clip = {"model": "wan-ti2v-5b", "num_frames": 81, "fps": 25, "output_format": output_format}

    made = spec(**clip, interpolate=interpolate)

    assert (made.num_frames, made.fps) == (81, 25)
    assert (made.clip_frames, made.clip_fps) == (frames, fps)


def test_picture_has_no_frames() -> None:
    assert (spec().clip_frames, spec().clip_fps) == (None, None)


@pytest.mark.parametrize(("interpolate", "times"), [(None, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("fps", range(1, 121))
def test_gif_is_taken_at_rates_it_keeps_and_the_remedy_for_others_is_one(
    fps: int, interpolate: int | None, times: int
) -> None:
    clip = {"model": "wan-ti2v-5b", "output_format": "gif", "interpolate": interpolate}
    shown = fps * times

    if shown <= 50 and 100 % shown == 0:
        assert spec(**clip, fps=fps).clip_fps == shown
    elif shown <= 120:
        (fault,) = faults(**clip, fps=fps)
        nearest = int(fault.split("Use fps ")[1].split(",")[0])
        assert spec(**clip, fps=nearest).clip_fps == nearest * times


def test_all_faults_of_a_job_are_told_at_once() -> None:
    assert len(faults(width=1, height=2, num_inference_steps=0, guidance_scale=1, fps=3, colour="red")) == 6


def test_values_may_be_text_as_in_a_cell_or_an_option() -> None:
    made = spec(width="512", model="flux-dev", guidance_scale="2.5", tags="a, b,", seed="7")

    assert (made.width, made.guidance_scale, made.tags, made.seed) == (512, 2.5, ("a", "b"), 7)


def test_moment_without_a_zone_is_local_wall_clock() -> None:
    made = spec(not_before="2026-11-23T06:00")

    assert made.not_before is not None
    assert datetime.fromisoformat(made.not_before) == datetime(2026, 11, 23, 6).astimezone()


@pytest.mark.parametrize("name", ["a", "night of foxes", "ä-1_2.3", "x" * 120])
def test_plain_name_can_be_a_folder(name: str) -> None:
    assert is_folder_name(name)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".a", "-a", "a/b", "a\n", "a ", "a\0", "\x7f", "x" * 121, "ä" * 61, "\udcff", "\u202e"]
)
def test_name_that_leads_elsewhere_or_hides_cannot_be_a_folder(name: str) -> None:
    assert not is_folder_name(name)


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None), max_size=30),
    st.sampled_from(
        ["auto", "on", "1024", "1e9", "video", "image", "png", "mp4", "2026-11-23T06:00", "0001-01-01", DIGEST]
    ),
    st.sampled_from([*KEYS]),
    st.integers(0, 128).map(lambda n: n * 16),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
WRITTEN = st.dictionaries(st.sampled_from([*FIELDS]) | st.text(max_size=5), VALUES, max_size=8)
LIKELY = st.fixed_dictionaries(
    {"prompt": st.just("a fox"), "seed": st.integers(0, SEED_MAX), "model": st.sampled_from(KEYS)}
)


@given(WRITTEN | st.builds(lambda likely, rest: {**likely, **rest}, LIKELY, WRITTEN))
def test_any_mapping_is_a_spec_that_survives_json_or_readable_faults(written: dict[str, Any]) -> None:
    result = check(written, TABLE, "n.txt:1", image_model="flux-schnell", video_model="wan-ti2v-5b")

    if isinstance(result, JobSpec):
        assert JobSpec.model_validate(json.loads(result.model_dump_json())) == result
    else:
        assert result
        assert all(fault.where == "n.txt:1" and fault.problem and len(str(fault)) < 2_000 for fault in result)
        assert "\n".join(map(str, result)).encode()


def test_spec_of_version_1_loads_for_ever() -> None:
    text = (Path(__file__).parents[1] / "data" / "v1_jobspec.json").read_text(encoding="utf-8")
    loaded = JobSpec.model_validate(json.loads(text), strict=False)

    assert json.loads(loaded.model_dump_json()).items() >= json.loads(text).items()
    assert (loaded.model, loaded.seed, loaded.tags) == ("wan-i2v-a14b", SEED_MAX, ("waves", "night"))
    assert loaded.axes == {"num_inference_steps": 40, "guidance_scale": 3.5, "prompt": "{red|blue} waves roll in"}


def test_spec_with_a_field_from_the_future_is_not_read_as_if_it_were_understood() -> None:
    with pytest.raises(ValueError, match="from_the_future"):
        JobSpec.model_validate({**spec().model_dump(), "from_the_future": 1})


@pytest.mark.parametrize(
    ("written", "model", "strength"),
    [
        ({"image": DIGEST}, "wan-ti2v-5b", None),
        ({"image": DIGEST, "strength": 0.3}, "flux-schnell", 0.3),
        ({"image": DIGEST, "kind": "image"}, "flux-schnell", 0.6),
        ({"image": DIGEST, "model": "flux-dev"}, "flux-dev", 0.6),
        ({}, "flux-schnell", None),
    ],
)
def test_a_picture_is_animated_or_started_from(written: dict[str, object], model: str, strength: float | None) -> None:
    made = spec(**written)

    assert (made.model, made.strength) == (model, strength)


@pytest.mark.parametrize(
    ("steps", "strength", "run"), [(4, None, 4), (4, 0.5, 2), (4, 0.01, 1), (28, 0.6, 17), (8, 1, 8)]
)
def test_strength_says_how_many_steps_are_run(steps: int, strength: float | None, run: int) -> None:
    """As FluxImg2ImgPipeline.get_timesteps counts them."""
    more = {"image": DIGEST, "strength": strength} if strength else {}

    assert spec(model="flux-dev", num_inference_steps=steps, **more).steps_run == run
