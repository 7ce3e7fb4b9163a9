"""Reading the record of a job out of any file: ours, damaged, hostile, or something else altogether."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight import embedded
from safelight.embedded import Embedded
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelightd import metadata, video
from tests.integration import making

KINDS = ["png", "jpg", "webp", "mp4", "gif"]

PIXELS = making.gradient(making.image_spec(), 20, 230)


def _bytes_of(spec: JobSpec, folder: Path) -> bytes:
    """Return a small real file with the record of `spec`, as the daemon writes it."""
    if spec.kind == "video":
        file = folder / "made"
        write = {"mp4": video.write_mp4, "gif": video.write_gif}[spec.output_format]
        comment = metadata.record(spec, making.PLAN)
        write(file, making.moving(spec, 2), fps=25, width=spec.width, height=spec.height, comment=comment)
        return file.read_bytes()
    stream = io.BytesIO()
    picture = Image.fromarray(PIXELS)
    if spec.output_format == "png":
        picture.save(stream, "PNG", pnginfo=metadata.png(spec, making.PLAN))
    else:
        picture.save(stream, {"jpg": "JPEG", "webp": "WEBP"}[spec.output_format], exif=metadata.exif(spec, making.PLAN))
    return stream.getvalue()


def _spec(kind: str) -> JobSpec:
    make = making.clip_spec if kind in ("mp4", "gif") else making.image_spec
    return make(output_format=kind)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One real file of each kind."""
    return {kind: _bytes_of(_spec(kind), tmp_path_factory.mktemp("made")) for kind in KINDS}


def _read_or_refuse(file: Path) -> Embedded | None:
    """Return the record, or None where the file was refused with a message that names it; anything else is a bug."""
    try:
        return embedded.read(file)
    except InvalidJob as error:
        refusal = str(error)
    assert refusal.startswith(f"{file}: ")
    assert len(refusal) < 1000
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_record_is_read_whatever_the_file_is_called(kind: str, made: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "renamed by someone"
    file.write_bytes(made[kind])

    found = embedded.read(file)

    assert (found.spec, found.plan, found.id) == (_spec(kind), making.PLAN, _spec(kind).id)


@given(prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_any_prompt_comes_back(kind: str, prompt: str, tmp_path: Path) -> None:
    spec = making.image_spec(output_format=kind, prompt=prompt, negative_prompt=prompt[::-1])
    file = tmp_path / "a"
    file.write_bytes(_bytes_of(spec, tmp_path))

    assert embedded.read(file).spec == spec


def test_receipt_is_read_like_the_file_it_lies_beside(tmp_path: Path) -> None:
    receipt = making.receipt(making.image_spec(), ())
    file = tmp_path / "a.json"
    file.write_text(receipt.model_dump_json(indent=2, exclude_none=True))

    found = embedded.read(file)

    assert (found.spec, found.plan, found.versions) == (receipt.spec, receipt.plan, receipt.versions)


@pytest.mark.parametrize("kind", KINDS)
def test_file_without_a_record_answers_with_the_receipt_beside_it(kind: str, tmp_path: Path) -> None:
    """Metadata was switched off, or another program saved the file again."""
    spec = _spec(kind)
    file = tmp_path / f"a.{kind}"
    if spec.kind == "video":
        write = {"mp4": video.write_mp4, "gif": video.write_gif}[kind]
        write(file, making.moving(spec, 2), fps=25, width=spec.width, height=spec.height)
    else:
        Image.fromarray(PIXELS).save(file)
    with pytest.raises(InvalidJob, match=r"holds no record of safelight.*Give the \.json beside it"):
        embedded.read(file)
    file.with_suffix(".json").write_text(making.receipt(spec, ()).model_dump_json())

    assert embedded.read(file).spec == spec


def test_record_moved_behind_the_pixels_is_found(tmp_path: Path) -> None:
    """Where some programs put text chunks when they save a PNG again."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    plain, end = stream.getvalue()[:-12], stream.getvalue()[-12:]
    record = metadata.record(making.image_spec(), making.PLAN).encode()
    file = tmp_path / "a.png"
    file.write_bytes(plain + _png_chunk(b"iTXt", b"safelight\0\0\0\0\0" + record) + end)

    assert embedded.read(file).spec == making.image_spec()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither PNG, JPEG, WebP, GIF, MP4 nor a receipt"),
        (b"a prompt", "neither PNG"),
        (b"{", "its record is not a job"),
        (b"{}", "spec: Field required"),
        (b'{"spec": {"prompt": 7}}', r"and \d+ more"),
        (b'{"v": 2, "spec": {}}', "written by another version of safelight.*Update safelight"),
        (b"[" * 100_000, "neither PNG"),
        (b'{"a":' + b"[" * 100_000, "its record is not a job"),
        (b'{"a": "' + b"x" * 2**21, "larger than 1 MiB"),
        (b"\xff\xfe{\0}\0", "neither PNG"),
        (b'{"v": 1, "spec": \xff}', "its record is not a job"),
    ],
    ids=range(11),
)
def test_file_that_is_no_record_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)

    with pytest.raises(InvalidJob, match=message):
        embedded.read(file)


def test_missing_file_folder_and_pipe_are_refused_at_once(tmp_path: Path) -> None:
    """A named pipe would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", ".", "pipe"):
        with pytest.raises(InvalidJob, match="there is no such file"):
            embedded.read(tmp_path / name)


def _mp4_with(text: bytes) -> bytes:
    return _boxes(b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data", content=bytes(8) + text)


def _boxes(*names: bytes, content: bytes) -> bytes:
    """Return the file type and nested boxes; `meta` has four bytes more."""
    for name in reversed(names):
        content = (b"\0\0\0\0" if name == b"meta" else b"") + content
        content = struct.pack(">I4s", len(content) + 8, name) + content
    return struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + content


def test_boxes_made_by_hand_are_read(tmp_path: Path) -> None:
    """The hostile ones below differ from this in one thing."""
    file = tmp_path / "a.mp4"
    file.write_bytes(_mp4_with(metadata.record(making.clip_spec(), making.PLAN).encode()))

    assert embedded.read(file).spec == making.clip_spec()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_mp4_with(b"a holiday"), "holds no record"),
        (_mp4_with(b"{" + b" " * 2**21), "larger than 1 MiB"),
        (_boxes(b"moov", b"udta", content=b"\0" * 4), "holds no record"),
        (_boxes(b"moov", content=struct.pack(">I4s", 4, b"udta")), "does not fit"),
        (_boxes(b"moov", content=struct.pack(">I4s", 2**31, b"udta")), "does not fit"),
        (_boxes(b"moov", content=struct.pack(">I4sQ", 1, b"udta", 2**63)), "does not fit"),
        (_boxes(b"moov", content=struct.pack(">I4sQ", 1, b"udta", 8)), "does not fit"),
        (_boxes(b"moov", content=struct.pack(">I4s", 1, b"udta")), "cannot be read"),
        (_boxes(content=struct.pack(">I4s", 0, b"moov")), "holds no record"),
        (_boxes(content=struct.pack(">I4s", 8, b"free") * 20_000), "too many boxes"),
        (_boxes(b"moov", b"udta", b"meta", content=b"")[:-4], "does not fit"),
    ],
    ids=range(11),
)
def test_hostile_boxes_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(content)

    with pytest.raises(InvalidJob, match=message):
        embedded.read(file)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
    ("width", "height", "text", "message"),
    [
        (2**30, 2**30, b"", "cannot be read"),
        (20_000, 20_000, b"", "cannot be read"),
        (8, 8, zlib.compress(b"x" * 2**26), "cannot be read"),
    ],
    ids=["a million megapixels", "400 megapixels", "64 MiB in 64 KiB"],
)
def test_picture_that_would_fill_memory_is_refused(
    width: int, height: int, text: bytes, message: str, tmp_path: Path
) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = tmp_path / "a.png"
    chunks = _png_chunk(b"IHDR", header) + _png_chunk(b"zTXt", b"safelight\0\0" + text) + _png_chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)

    with pytest.raises(InvalidJob, match=message):
        embedded.read(file)


def test_picture_file_far_larger_than_any_of_ours_is_refused_unread(made: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(made["png"])
    os.truncate(file, 2**40)

    with pytest.raises(InvalidJob, match="larger than 64 MiB"):
        embedded.read(file)


def test_clip_of_any_size_is_read_without_reading_it(made: dict[str, bytes], tmp_path: Path) -> None:
    """Only the index is looked at: a box of a terabyte costs one seek."""
    file = tmp_path / "a.mp4"
    file.write_bytes(made["mp4"] + struct.pack(">I4sQ", 1, b"free", 2**40 - len(made["mp4"])))
    os.truncate(file, 2**40)

    assert embedded.read(file).spec == making.clip_spec()


def test_long_webp_is_read_without_reading_it(made: dict[str, bytes], tmp_path: Path) -> None:
    file = tmp_path / "a.webp"
    at = made["webp"].index(b"EXIF")
    with file.open("wb") as stream:
        stream.write(made["webp"][:at] + struct.pack("<4sI", b"ANMF", 2**31))
        stream.seek(2**31, 1)
        stream.write(made["webp"][at:])

    assert embedded.read(file).id


def _gif_with(*blocks: bytes) -> bytes:
    """Return a GIF of no frames: a screen of 8 x 8, and then the blocks."""
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"".join(blocks)


RECORD = metadata.record(making.clip_spec(), making.PLAN).encode()
COMMENT = b"!\xfe" + b"".join(
    bytes([len(RECORD[at : at + 200])]) + RECORD[at : at + 200] for at in range(0, len(RECORD), 200)
)


@pytest.mark.parametrize(
    "blocks",
    [
        [COMMENT, b"\0;"],
        [b"!\xfe\x09a holiday\0", COMMENT, b"\0;"],
        [COMMENT, b"\0!\xfe\x09a holiday\0;"],
        [b",", bytes(9), b"\x08\x02ab\0", COMMENT, b"\0;"],
        [b",", bytes(8), b"\x80", bytes(6), b"\x08\x02ab\0", COMMENT, b"\0;"],
    ],
    ids=["alone", "after another comment", "before one", "after a frame", "after a frame with its palette"],
)
def test_comment_of_a_gif_made_by_hand_is_read(blocks: list[bytes], tmp_path: Path) -> None:
    file = tmp_path / "a.gif"
    file.write_bytes(_gif_with(*blocks))

    assert embedded.read(file).spec == making.clip_spec()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_gif_with(b";"), "holds no record"),
        (_gif_with(b"!\xfe\x09a holiday\0;"), "holds no record"),
        (_gif_with(b"!\xfe" + (b"\xff" + b"{" * 255) * 5_000 + b"\0;"), "larger than 1 MiB"),
        (_gif_with(COMMENT), "cannot be read"),
        (_gif_with(b"\0"), "do not follow each other"),
        (_gif_with(b""), "do not follow each other"),
        (_gif_with(b",", bytes(8)), "cannot be read"),
        (b"GIF89a", "cannot be read"),
    ],
    ids=range(8),
)
def test_hostile_blocks_of_a_gif_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gif"
    file.write_bytes(content)

    with pytest.raises(InvalidJob, match=message):
        embedded.read(file)


def test_folder_of_frames_is_read_from_its_first_or_from_the_receipt_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = making.clip_spec(output_format="png")
    folder = tmp_path / "0001_a-red-fox_s7"
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "0001.png", pnginfo=metadata.png(spec, making.PLAN))

    assert embedded.read(folder).spec == spec

    Image.fromarray(PIXELS).save(folder / "0001.png")
    with pytest.raises(InvalidJob, match=r"0001_a-red-fox_s7: holds no record"):
        embedded.read(folder)
    folder.with_suffix(".json").write_text(making.receipt(spec, ()).model_dump_json())
    assert embedded.read(folder).spec == spec
    monkeypatch.chdir(folder)
    assert embedded.read(Path()).spec == spec


HEADS = [
    b"GIF89a\x08\0\x08\0\0\0\0",
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe1",
    b"RIFF\x40\0\0\0WEBPVP8X",
    b"\0\0\0\x10ftypisom",
    b'{"v": 1',
]


@given(head=st.sampled_from(HEADS), rest=st.binary(max_size=400))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_are_refused_and_nothing_else(head: bytes, rest: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(head + rest)

    assert _read_or_refuse(file) is None


Damage = Callable[[bytes, int, int], bytes]
DAMAGES: dict[str, Damage] = {
    "cut": lambda content, at, _: content[:at],
    "flip": lambda content, at, value: content[:at] + bytes([content[at] ^ (value or 1)]) + content[at + 1 :],
    "lost": lambda content, at, value: content[:at] + content[at + 1 + value :],
    "size": lambda content, at, value: content[:at] + struct.pack(">I", value << 24 | value) + content[at + 4 :],
}


@given(
    kind=st.sampled_from(KINDS), how=st.sampled_from(sorted(DAMAGES)), where=st.floats(0, 1), value=st.integers(0, 255)
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_file_is_read_or_refused_and_nothing_else(
    kind: str, how: str, where: float, value: int, made: dict[str, bytes], tmp_path: Path
) -> None:
    content = made[kind]
    file = tmp_path / "x"
    file.write_bytes(DAMAGES[how](content, min(int(where * len(content)), len(content) - 1), value))

    found = _read_or_refuse(file)

    assert found is None or isinstance(found.spec, JobSpec)


@pytest.mark.parametrize("kind", KINDS)
def test_file_cut_before_its_record_is_refused_at_every_length(
    kind: str, made: dict[str, bytes], tmp_path: Path
) -> None:
    """Up to the end of the record there is nothing to read; behind it only pixels are missing."""
    content = made[kind]
    end = content.index(b"}}", content.index(b'"plan"'))
    file = tmp_path / "x"
    for length in range(0, end, 11):
        file.write_bytes(content[:length])
        assert _read_or_refuse(file) is None, length


def test_values_of_the_record_are_checked_by_type(tmp_path: Path) -> None:
    record = json.loads(metadata.record(making.image_spec(), making.PLAN))
    file = tmp_path / "a.json"
    for field, value in [
        ("width", "64"),
        ("width", 1e400),
        ("seed", None),
        ("tags", "x"),
        ("unknown", 1),
        ("index", 0),
    ]:
        wrong = {**record, "spec": {**record["spec"], field: value}}
        file.write_text(json.dumps(wrong))
        with pytest.raises(InvalidJob, match=f"spec.{field}"):
            embedded.read(file)
