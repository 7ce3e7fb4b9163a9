"""What the pixels of an input picture mean, to those who take it and to those who read it: upright, and in RGB.

Knows no files but the pictures that Pillow has open.
"""

from __future__ import annotations

from PIL import Image, ImageOps

from safelight.sizes import Size

GREY_16 = ("I;16", "I;16B", "I")
"""16 bit of grey: of the formats that are taken PNG alone has it, and which of the modes it gets is Pillow's choice."""

FAITHFUL = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
"""What Pillow's own `convert` makes RGB of without losing what is seen, as long as nothing shows through."""


def refusal(picture: Image.Image) -> tuple[str, str] | None:
    """Return why a picture cannot be drawn as it is meant, and the remedy; None where it can."""
    if picture.mode not in (*FAITHFUL, *GREY_16):
        return f"its pixels are of a kind that is not read ({picture.mode})", "Save it as RGB of 8 bit."
    if _shows_through(picture):
        problem = "it has transparency, and nothing says what is behind it"
        return problem, "Save it without transparency, on the background that is meant."
    return None


def _shows_through(picture: Image.Image) -> bool:
    """Whether a pixel is less than opaque, or a colour is said to be transparent.

    That one is in the file's own depth, which Pillow does not keep: nobody can tell which pixels have it.
    """
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if "A" in picture.getbands():
        return picture.getchannel("A").histogram()[255] < picture.width * picture.height
    return "transparency" in picture.info


def size(picture: Image.Image) -> Size:
    """Return the size of a picture as it is seen, and turn it so in place: another copy may be 256 MB."""
    ImageOps.exif_transpose(picture, in_place=True)
    return Size(*picture.size)


def rgb(picture: Image.Image) -> Image.Image:
    """Return a picture as it is seen, in RGB of 8 bit; what was kept before `refusal` was asked is read as well."""
    upright = ImageOps.exif_transpose(picture)  # as the phone was held
    if upright.mode in GREY_16:
        # to the nearest of 8 bit: white is 65,535 and 255; `convert` cuts off what is above 255
        upright = upright.convert("I").point([(value + 128) // 257 for value in range(1 << 16)], "L")
    upright.info.pop("transparency", None)  # else Pillow warns of what it has to leave out
    return upright.convert("RGB")
