"""Input pictures: what a name may reach, what counts as a picture, and how it is kept."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from safelight import pictures
from safelight.errors import InvalidJob
from safelight.inputs import PIXELS_MAX, SIZE_BYTES_MAX, resolve, store
from safelight.sizes import Size


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

    digest = store(tmp_path / "fox", tmp_path / "state" / "inputs").digest

    assert digest == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "state" / "inputs" / digest).read_bytes() == content
    assert os.listdir(tmp_path / "state" / "inputs") == [digest]


def test_same_picture_is_kept_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture())

    first = store(tmp_path / "a.png", tmp_path / "inputs")
    written = (tmp_path / "inputs" / first.digest).stat()

    assert store(tmp_path / "b.png", tmp_path / "inputs") == first
    assert (tmp_path / "inputs" / first.digest).stat().st_ino == written.st_ino


def test_kept_picture_outlives_its_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    digest = store(tmp_path / "a.png", tmp_path / "inputs").digest
    (tmp_path / "a.png").write_bytes(b"changed")

    assert (tmp_path / "inputs" / digest).read_bytes() == picture()


@pytest.mark.parametrize(("orientation", "size"), [(1, (8, 6)), (3, (8, 6)), (5, (6, 8)), (6, (6, 8)), (8, (6, 8))])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_its_size_is_that_of_the_picture_as_it_was_held(
    tmp_path: Path, kind: str, orientation: int, size: tuple[int, int]
) -> None:
    (tmp_path / "fox").write_bytes(turned(orientation, kind))

    for _ in ("new", "there already"):
        assert store(tmp_path / "fox", tmp_path / "inputs").size == Size(*size)
    assert pictures.rgb(Image.open(tmp_path / "fox")).size == size


def turned(orientation: int, kind: str = "JPEG", size: tuple[int, int] = (8, 6)) -> bytes:
    """A picture that says how the camera was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(Image.new("RGB", size, "red"), kind, exif=exif)


# Pixels


def saved(made: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    content = io.BytesIO()
    made.save(content, kind, **how)
    return content.getvalue()


def greys(mode: str) -> Image.Image:
    """Every value of 16 bit once."""
    if mode == "I":
        return greys("I;16").convert("I")
    order: Literal["big", "little"] = "big" if mode.endswith("B") else "little"
    return Image.frombytes(mode, (256, 256), b"".join(value.to_bytes(2, order) for value in range(1 << 16)))


@pytest.mark.parametrize("mode", pictures.GREY_16)
def test_grey_of_16_bit_is_read_in_its_own_range(mode: str) -> None:
    read = pictures.rgb(greys(mode))

    assert read.mode == "RGB"
    for channel in read.split():
        assert list(channel.tobytes()) == [round(value / 257) for value in range(1 << 16)]


def test_a_png_of_16_bit_grey_is_taken_and_read_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "depth.png").write_bytes(saved(greys("I;16")))

    kept = store(tmp_path / "depth.png", tmp_path / "inputs")

    with Image.open(tmp_path / "inputs" / kept.digest) as depth:
        assert list(pictures.rgb(depth).getchannel("G").tobytes()) == [round(value / 257) for value in range(1 << 16)]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(depth: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one pixel, of a kind that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0))
    more = b"".join(chunk(name, body) for name, body in chunks)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + more + pixels + chunk(b"IEND", b"")


FAITHFUL = {
    "1": (saved(Image.new("1", (1, 1), 1)), (255, 255, 255)),
    "grey": (saved(Image.new("L", (1, 1), 7)), (7, 7, 7)),
    "grey of 2 bit": (png(2, 0, b"\x80"), (170, 170, 170)),
    "grey of 16 bit": (png(16, 0, b"\x80\x00"), (128, 128, 128)),
    "grey, opaque": (saved(Image.new("LA", (1, 1), (7, 255))), (7, 7, 7)),
    "grey of 16 bit, opaque": (png(16, 4, b"\x80\x00\xff\xff"), (128, 128, 128)),
    "palette": (saved(Image.new("RGB", (1, 1), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE)), (1, 2, 3)),
    "palette with an unused hole": (png(8, 3, b"\0", (b"PLTE", b"\1\2\3\4\5\6"), (b"tRNS", b"\xff\0")), (1, 2, 3)),
    "palette with an unused veil": (png(8, 3, b"\0", (b"PLTE", b"\1\2\3\4\5\6"), (b"tRNS", b"\xff\7")), (1, 2, 3)),
    "RGB of 16 bit": (png(16, 2, b"\1\xff\2\xff\3\xff"), (1, 2, 3)),
    "RGB, opaque": (saved(Image.new("RGBA", (1, 1), (1, 2, 3, 255))), (1, 2, 3)),
    "RGB of 16 bit, opaque": (png(16, 6, b"\1\0\2\0\3\0\xff\xff"), (1, 2, 3)),
    "WebP, opaque": (saved(Image.new("RGBA", (1, 1), "red"), "WEBP", lossless=True), (255, 0, 0)),
    "CMYK": (saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"), (0, 0, 0)),
}
TRANSPARENT = {
    "RGB": saved(Image.new("RGBA", (2, 1), (1, 2, 3, 254))),
    "grey": saved(Image.new("LA", (2, 1), (7, 0))),
    "RGB of 16 bit": png(16, 6, b"\1\0\2\0\3\0\0\xff"),
    "grey of 16 bit": png(16, 4, b"\x80\x00\x80\x00"),
    "palette with a hole": png(8, 3, b"\1", (b"PLTE", b"\1\2\3\4\5\6"), (b"tRNS", b"\xff\0")),
    "palette with a veil": png(8, 3, b"\1", (b"PLTE", b"\1\2\3\4\5\6"), (b"tRNS", b"\xff\7")),
    "colour of RGB": saved(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)),
    "colour of grey": saved(Image.new("L", (2, 1), 7), transparency=7),
    "colour of grey of 16 bit": png(16, 0, b"\x80\0", (b"tRNS", b"\x80\0")),
    "WebP": saved(Image.new("RGBA", (2, 1), (1, 2, 3, 100)), "WEBP"),
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_every_kind_of_pixel_that_shows_all_there_is_is_taken_and_read_as_it_looks(tmp_path: Path, name: str) -> None:
    content, colour = FAITHFUL[name]
    (tmp_path / "fox").write_bytes(content)

    kept = store(tmp_path / "fox", tmp_path / "inputs")

    with Image.open(tmp_path / "inputs" / kept.digest) as fox:
        assert pictures.rgb(fox).getpixel((0, 0)) == colour


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("before", [False, True], ids=["new", "kept by an earlier version"])
def test_what_something_would_show_through_is_refused(tmp_path: Path, name: str, *, before: bool) -> None:
    (tmp_path / "fox.png").write_bytes(TRANSPARENT[name])
    (tmp_path / "inputs").mkdir()
    if before:
        (tmp_path / "inputs" / hashlib.sha256(TRANSPARENT[name]).hexdigest()).write_bytes(TRANSPARENT[name])

    with pytest.raises(InvalidJob) as caught:
        store(tmp_path / "fox.png", tmp_path / "inputs")

    assert str(caught.value.faults[0]) == (
        "fox.png: it has transparency, and nothing says what is behind it. "
        "Save it without transparency, on the background that is meant."
    )
    assert len(os.listdir(tmp_path / "inputs")) == before


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_an_earlier_version_kept_is_read_all_the_same(name: str) -> None:
    with Image.open(io.BytesIO(TRANSPARENT[name])) as kept:
        assert pictures.rgb(kept).mode == "RGB"


@pytest.mark.parametrize("mode", ["F", "LAB", "HSV", "YCbCr"])
def test_pixels_of_any_other_kind_are_refused(mode: str) -> None:
    assert pictures.refusal(Image.new(mode, (2, 1))) == (
        f"its pixels are of a kind that is not read ({mode})",
        "Save it as RGB of 8 bit.",
    )


def animation() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return content.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims a size."""
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


WHOLE = {kind: picture(kind, (40, 30)) for kind in ("PNG", "JPEG", "WEBP")} | {
    "turned": turned(6, size=(40, 30)),
    "palette": TRANSPARENT["palette with a veil"],
    "grey of 16 bit": saved(greys("I;16").resize((40, 30))),
}


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
        digest = store(tmp_path / "fox", tmp_path / "inputs").digest
    except InvalidJob:
        assert not (tmp_path / "inputs").exists()
    else:
        assert (tmp_path / "inputs" / digest).read_bytes() == content
        shutil.rmtree(tmp_path / "inputs")
