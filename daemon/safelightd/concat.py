"""Clips joined into one: nothing is encoded again, and the file is whole or absent. Knows no jobs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safelight import durable
from safelight.errors import Fault, InvalidJob, SafelightError
from safelight.rename import rename_new
from safelightd import video


@dataclass(frozen=True)
class Joined:
    """What was written."""

    num_frames: int
    seconds: float


def concat(clips: Sequence[Path], target: Path, *, force: bool = False) -> Joined:
    """Write the clips one after the other to `target` and return its length; it was decoded again and is synced.

    Args:
        force: replace what `target` is now.

    Raises:
        InvalidJob: `target` exists, or a clip is no MP4 or of another size, rate or encoding than the first: each one
            is named, and nothing is written.
        OSError: the disk is full or refuses.
        SafelightError: what was written is not what was to be.
    """
    if os.path.lexists(target) and (not force or target.is_dir()):
        raise _taken(target)
    wanted = _joined(clips)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        video.join(clips, unfinished)
        _check(unfinished, wanted)
        durable.sync_file(unfinished)
        if force:
            unfinished.replace(target)
        else:
            rename_new(unfinished, target)
    except FileExistsError:
        raise _taken(target) from None
    finally:
        unfinished.unlink(missing_ok=True)
    durable.sync_folder(target.parent)
    return Joined(wanted.num_frames, wanted.num_frames / wanted.fps)


def _taken(target: Path) -> InvalidJob:
    remedy = "Name a file." if target.is_dir() else "Write --force to replace it, or name another."
    return InvalidJob([Fault(str(target), "is there already", remedy)])


def _joined(clips: Sequence[Path]) -> video.Timing:
    """Return what the clips are together.

    Raises:
        InvalidJob: they do not fit together.
    """
    faults: list[Fault] = []
    kinds: list[tuple[Path, video.Timing, bytes]] = []
    for clip in clips:
        try:
            kinds.append((clip, video.timing(clip), video.encoding(clip)))
        except FileNotFoundError:
            faults.append(Fault(str(clip), "is not there any more", "Put it back where it was."))
        except ValueError as error:
            faults.append(Fault(str(clip), f"is no MP4 that can be joined: {error}", "Render it as mp4."))
    for clip, found, encoding in kinds[1:]:
        first, like, its_encoding = kinds[0]
        if (found.width, found.height, found.fps) != (like.width, like.height, like.fps):
            said = f"is {_shown(found)}, and the first clip, {first.name}, is {_shown(like)}"
            faults.append(Fault(str(clip), said, "Render it again like the first, or in another batch."))
        elif encoding != its_encoding:
            said = f"was encoded in another way than the first clip, {first.name}"
            faults.append(Fault(str(clip), said, "Render both with one version of safelight."))
    if faults:
        raise InvalidJob(faults)
    like = kinds[0][1]
    return video.Timing(like.width, like.height, sum(found.num_frames for _, found, _ in kinds), like.fps)


def _shown(clip: video.Timing) -> str:
    return f"{clip.width}x{clip.height} at {clip.fps:g} frames a second"


def _check(path: Path, wanted: video.Timing) -> None:
    """Raise SafelightError unless the file decodes to the frames of all clips."""
    try:
        found = video.timing(path)
    except ValueError as error:
        raise SafelightError(f"The joined clip is not whole: {error}. Join fewer to find the one at fault.") from error
    count = sum(1 for _ in video.read_frames(path))
    if found != wanted or count != wanted.num_frames:
        raise SafelightError(
            f"The joined clip is {_shown(found)} with {count} frames, not {_shown(wanted)} with {wanted.num_frames}. "
            "Join fewer clips to find the one that does not fit."
        )
