"""What is written into pictures and clips: the job's record for `safelight rerun`, and the text other programs read.

Only what the bytes depend on goes in (spec, plan, versions), never a time or a measurement: the same job gives the
same file. Where the record lies in each format, safelight.embedded says; it is what reads it. No chunk is called
`prompt` or `workflow`: readers would take the file for ComfyUI's.
"""

from __future__ import annotations

import json
from functools import cache

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from safelight import __version__, prepared
from safelight.embedded import MAKER, PNG_KEY, Embedded
from safelight.jobspec import JobSpec
from safelight.plan import Plan

EXIF_BYTES_MAX = 65_533
"""A JPEG segment's length is 16 bits and counts itself."""


@cache
def versions() -> dict[str, str]:
    """Return the versions that decide a job's bytes, besides the driver's; nothing is imported to find them."""
    return {"safelight": __version__, **prepared.versions()}


def record(spec: JobSpec, plan: Plan) -> str:
    """Return the record as JSON on one line; `safelight.embedded` reads it back."""
    return Embedded(spec=spec, plan=plan, versions=versions()).model_dump_json(exclude_none=True)


def parameters(spec: JobSpec) -> str:
    """Return an image job as AUTOMATIC1111's `parameters`, which Civitai, Forge and many viewers read.

    The prompt, the negative prompt where there is one, and a last line of "Key: value" pairs. Sampler and schedule
    are the words those programs have for FLUX's scheduler (FlowMatchEulerDiscreteScheduler).
    """
    settings: dict[str, str | int | float | None] = {
        "Steps": spec.num_inference_steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": spec.true_cfg_scale or 1,
        "Distilled CFG Scale": spec.guidance_scale,
        "Seed": spec.seed,
        "Size": f"{spec.width}x{spec.height}",
        "Model": spec.model,
        "Denoising strength": spec.strength,
        "Version": f"safelight {__version__}",
    }
    lines = [" ".join([spec.prompt, *(lora.tag for lora in spec.loras)])]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def png(spec: JobSpec, plan: Plan) -> PngInfo:
    """Return the chunks of a PNG: `parameters` (tEXt, or iTXt where Latin-1 cannot hold it) and the record.

    Of a frame of a clip the record alone.
    """
    chunks = PngInfo()
    if spec.kind == "image":
        chunks.add_text("parameters", parameters(spec))
    chunks.add_itxt(PNG_KEY, record(spec, plan))
    return chunks


def exif(spec: JobSpec, plan: Plan) -> bytes:
    """Return the Exif of a JPEG or WebP: `parameters` as UserComment, the record as MakerNote.

    A JPEG, as is the poster of an MP4, holds 64 KB of it. Of prompts too long for both, the record alone goes in; of
    one too long even for that, nothing: the sidecar has it all. Of clips the record alone, too: A1111 makes none.
    """
    # A1111 and its readers (piexif) take a UNICODE comment for big-endian UTF-16; the whole block is big-endian so
    # that those who follow the Exif standard agree with them.
    comment = b"UNICODE\x00" + parameters(spec).encode("utf-16-be")
    note = MAKER + record(spec, plan).encode()
    makernote, usercomment = ExifTags.Base.MakerNote.value, ExifTags.Base.UserComment.value
    both = {makernote: note, usercomment: comment}
    for tags in [{makernote: note}] if spec.kind == "video" else [both, {makernote: note}]:
        block = _exif_block(tags)
        if spec.output_format not in ("jpg", "mp4") or len(block) <= EXIF_BYTES_MAX:
            return block
    return b""


def _exif_block(tags: dict[int, bytes]) -> bytes:
    block = Image.Exif()
    block.endian = ">"
    block[ExifTags.Base.Software.value] = f"safelight {__version__}"
    block[ExifTags.IFD.Exif.value] = tags
    return block.tobytes()


def _quoted(value: str | float) -> str:
    """A1111's own rule (infotext_utils.quote): JSON quotes where a comma, a colon or a line would end the value."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
