"""Input pictures: what a name may reach, what counts as a picture, and how it is kept."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safelight.errors import InvalidJob
from safelight.inputs import PIXELS_MAX, SIZE_BYTES_MAX, resolve, store


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(content, kind)
    return content.getvalue()


def problem_of(call: pytest.ExceptionInfo[InvalidJob]) -> str:
    (fault,) = call.value.faults
    assert fault.remedy
    return f"{fault.where}: {fault.problem}"


# Names


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A batch's folder, with things in it and around it."""
    folder = tmp_path / "batch"
    (folder / "sub" / "deep").mkdir(parents=True)
    for file in (
        folder / "fox.png",
        folder / "sub" / "deep" / "fox 2.png",
        folder / "..fox.png",
        tmp_path / "secret.png",
    ):
        file.write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to("fox.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.mark.parametrize("name", ["fox.png", "./fox.png", "sub/deep/fox 2.png", "sub//deep/./fox 2.png", "..fox.png"])
def test_plain_file_below_the_folder_is_found(base: Path, name: str) -> None:
    found = resolve(name, base)

    assert found.read_bytes() == picture()
    assert found.is_relative_to(base)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone.png", "no such file or directory"),
        ("fox.png/x", "not a directory"),
        ("sub", "it is no plain file"),
        ("pipe.png", "it is no plain file"),
        ("link.png", "a link leads there, and none is followed"),
        ("inner.png", "a link leads there, and none is followed"),
        ("out/secret.png", "a link leads there, and none is followed"),
        ("loop/x", "a link leads there, and none is followed"),
        ("../secret.png", "it leads out of the folder of the job file"),
        ("sub/../../secret.png", "it leads out of the folder of the job file"),
        ("sub/../fox.png", "it leads out of the folder of the job file"),
        ("/etc/passwd", "it leads out of the folder of the job file"),
        ("~/fox.png", "it leads out of the folder of the job file"),
        ("~root/fox.png", "it leads out of the folder of the job file"),
        ("https://example.org/fox.png", "it is an address, and nothing is fetched"),
        ("file:fox.png", "it is an address, and nothing is fetched"),
        ("data:image/png;base64,AAAA", "it is an address, and nothing is fetched"),
        ("%2e%2e/secret.png", "it has % codes, and none is decoded"),
        ("sub%2Ffox.png", "it has % codes, and none is decoded"),
        ("fox.png\0.txt", "that is no name of a file"),
        ("\udcff.png", "that is no name of a file"),
        ("", "that is no name of a file"),
        (".", "that is no name of a file"),
        ("x" * 300, "file name too long"),
    ],
)
def test_name_that_leads_elsewhere_is_refused(base: Path, name: str, problem: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        resolve(name, base)

    assert problem_of(caught).endswith(f": {problem}")


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="no such file"):
        resolve("fox.png", tmp_path / "gone")


@given(
    st.text(max_size=20)
    | st.lists(
        st.sampled_from(["..", ".", "~", "/", "", "sub", "deep", "out", "link.png", "fox.png", "loop", "%2e", "\0"]),
        max_size=6,
    ).map("/".join)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_is_a_plain_file_below_the_folder_or_refused(base: Path, name: str) -> None:
    try:
        found = resolve(name, base)
    except InvalidJob:
        return

    assert found.resolve() == found
    assert found.is_relative_to(base)
    assert found.is_file()


def test_resolving_leaves_no_descriptor_open(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in ("fox.png", "sub/deep/fox 2.png", "link.png", "gone.png", "sub/gone/x", "pipe.png"):
        with pytest.raises(InvalidJob) if "fox" not in name else warnings.catch_warnings():
            resolve(name, base)

    assert len(os.listdir("/proc/self/fd")) == before


# Pictures


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_picture_is_kept_under_its_sha256(tmp_path: Path, kind: str, mode: str) -> None:
    content = picture(kind, mode=mode)
    (tmp_path / "fox").write_bytes(content)

    digest = store(tmp_path / "fox", tmp_path / "state" / "inputs")

    assert digest == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "state" / "inputs" / digest).read_bytes() == content
    assert os.listdir(tmp_path / "state" / "inputs") == [digest]


def test_same_picture_is_kept_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture())

    first = store(tmp_path / "a.png", tmp_path / "inputs")
    written = (tmp_path / "inputs" / first).stat()

    assert store(tmp_path / "b.png", tmp_path / "inputs") == first
    assert (tmp_path / "inputs" / first).stat().st_ino == written.st_ino


def test_kept_picture_outlives_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    digest = store(tmp_path / "a.png", tmp_path / "inputs")
    (tmp_path / "a.png").write_bytes(b"changed")

    assert (tmp_path / "inputs" / digest).read_bytes() == picture()


def animation() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims a size."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is no PNG, JPEG or WebP picture"),
        (b"a red fox", "it is no PNG, JPEG or WebP picture"),
        (picture("GIF", mode="P"), "it is no PNG, JPEG or WebP picture"),
        (picture("BMP"), "it is no PNG, JPEG or WebP picture"),
        (picture("PNG", (300, 300))[:-200], "it is damaged"),
        (picture("JPEG", (300, 300))[:-200], "it is damaged"),
        (picture("WEBP", (300, 300))[:-200], "it is "),
        (animation(), "it is an animation"),
        (bomb(8001, 8000), f"8001x8000 is more than {PIXELS_MAX:,} pixels"),
        (bomb(50_000, 50_000), f"what it claims is more than {PIXELS_MAX:,} pixels"),
        (bomb(2**31 - 1, 2**31 - 1), f"what it claims is more than {PIXELS_MAX:,} pixels"),
        (bomb(100, 100), "it is damaged"),
    ],
)
def test_what_is_no_sound_picture_is_refused_and_not_kept(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "fox.png").write_bytes(content)

    with pytest.raises(InvalidJob) as caught:
        store(tmp_path / "fox.png", tmp_path / "inputs")

    assert problem_of(caught).startswith(f"fox.png: {problem}")
    assert not (tmp_path / "inputs").exists()


def test_picture_larger_than_the_limit_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    with (tmp_path / "fox.png").open("wb") as file:
        file.write(picture())
        file.truncate(SIZE_BYTES_MAX * 1000)

    with pytest.raises(InvalidJob, match="it is larger than 64 MiB"):
        store(tmp_path / "fox.png", tmp_path / "inputs")


@pytest.mark.parametrize("name", ["gone.png", "link.png", "pipe.png", "folder.png"])
def test_source_that_is_no_plain_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "fox.png").write_bytes(picture())
    (tmp_path / "link.png").symlink_to("fox.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")

    with pytest.raises(InvalidJob):
        store(tmp_path / name, tmp_path / "inputs")


WHOLE = {kind: picture(kind, (40, 30)) for kind in ("PNG", "JPEG", "WEBP")}


@given(st.sampled_from(sorted(WHOLE)), st.data())
@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Pillow warns about odd EXIF and the like before it decides: what counts here is that nothing else comes out.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_picture_is_kept_or_refused_and_nothing_else(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    (tmp_path / "fox").write_bytes(content)

    try:
        digest = store(tmp_path / "fox", tmp_path / "inputs")
    except InvalidJob:
        assert not (tmp_path / "inputs").exists()
    else:
        assert (tmp_path / "inputs" / digest).read_bytes() == content
        shutil.rmtree(tmp_path / "inputs")
