"""From frames to finished files in the outbox: whole or absent, never lost, never twice, whatever dies when.

    outbox/.unfinished/<id>/output.<ext>           written, synced, then verified (safelightd.verify)
    outbox/<date>/<batch>/0001_<slug>_s<seed>.<ext>
    outbox/<date>/<batch>/0001_<slug>_s<seed>.jpg  of an MP4 its poster
    outbox/<date>/<batch>/0001_<slug>_s<seed>.json the receipt, for people and `safelight rerun`
    outbox/latest                                  the newest <date>

Publishing is a redo log. `Ledger.intend` writes the whole receipt, final names included: from there on the job is
finished. All that follows only renames, can be done again from any point (`finish`), and ends with `Ledger.fulfil`.
A clip as png is a folder of frames without <ext>, renamed as a whole. What goes into files, safelightd.formats says.
Knows no models and no queue.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight import content, durable
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.ids import is_id
from safelight.jobspec import JobSpec, is_folder_name
from safelight.ledger import Ledger
from safelight.paths import Paths
from safelight.plan import Plan
from safelight.receipt import Output, Poster, Receipt
from safelight.rename import rename_new
from safelightd import formats, places, verify

SLUG_CHARACTERS_MAX = 40

_DATE = re.compile(r"\d{4}-\d\d-\d\d")

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
_NO_SYMLINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What exFAT, vfat and some network file systems answer to symlink(2)."""


class OutboxUnwritable(OSError):
    """The outbox is not a folder that the daemon may write. The machine's fault: no job should be burnt by it."""


class OutputLost(SafelightError):
    """A rendered file that was about to be published is neither in the outbox nor where it waited."""


def write(
    spec: JobSpec,
    plan: Plan,
    frames: Iterable[NDArray[Any]],
    config: Config,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write the frames of a job to its unfinished file, as they come, and return its path; it is synced.

    Whatever goes wrong, Cancelled included, nothing of it is left. An earlier attempt's file is replaced.

    Args:
        frames: what `verify.frame` takes: one for an image, `num_frames` for a clip.
        check: called now and then once all have come, where frames are put between them; it may raise Cancelled.

    Raises:
        Refused: a frame is broken, or there are too few or too many.
        OutboxUnwritable: it is read-only, somebody else's, or no folder.
        OSError: the disk is full.
    """
    folder = make_room(spec, config.paths)
    with _removed_on_failure(folder), explained(config.paths):
        return formats.write(folder, _counted(frames, spec), spec, plan, config.settings.output, check)


def make_room(spec: JobSpec, paths: Paths) -> Path:
    """Return the folder of a job's unfinished files, made anew and empty.

    Raises:
        OutboxUnwritable, OSError: as `write`.
    """
    _refuse_unsafe(spec)
    if _is_intended(spec.id, paths):
        raise SafelightError(f"{spec.id} has been rendered before and waits to be published: finish() does that.")
    folder = paths.unfinished / spec.id
    with explained(paths):
        if places.is_missed(paths.outbox_seen, paths.outbox):
            raise FileNotFoundError(errno.ENOENT, "it is empty: is its disk mounted?", str(paths.outbox))
        _remove(folder)
        folder.mkdir(parents=True)
    return folder


def publish(
    receipt_of: Callable[[tuple[Output, ...]], Receipt], file: Path, spec: JobSpec, ledger: Ledger, paths: Paths
) -> Receipt:
    """Give the verified `file` of `write` its final name beside its receipt, and return that; the ledger has it.

    Args:
        receipt_of: makes the receipt, state `done`, from its outputs; called once.

    Raises:
        OutboxUnwritable, OSError: as `write`, and for the ledger. Unless the job was finished already (then `finish`
            goes on), nothing of it is left.
    """
    folder = paths.unfinished / spec.id
    with _removed_on_failure(folder, unless=lambda: _is_intended(spec.id, paths)):
        with explained(paths):
            output = _described(file, spec, _free_name(spec, paths))
        receipt = receipt_of((output,))
        with explained(paths):
            _make_folders(paths.outbox / output.path, paths)
            for names in (folder, paths.unfinished, paths.outbox):
                durable.sync_folder(names)
        ledger.intend(receipt)
    return _complete(receipt, ledger, paths)


def finish(job: str, ledger: Ledger, paths: Paths) -> Receipt | None:
    """Complete what an attempt began to publish before it died, and return its receipt; None where none had.

    Raises:
        OutputLost: the rendered file is gone.
        OutboxUnwritable, OSError: as `publish`; nothing is lost.
    """
    receipt = ledger.intended(job)
    return None if receipt is None else _complete(receipt, ledger, paths)


def discard(job: str, paths: Paths) -> None:
    """Remove the unfinished files of a job. One that waits to be published is finished: it is left for `finish`."""
    if is_id(job) and not _is_intended(job, paths):
        _remove(paths.unfinished / job)


def _refuse_unsafe(spec: JobSpec) -> None:
    """Both become folders, and a spec may have come through the queue, past the checks of submission."""
    if not is_id(spec.id):
        raise SafelightError(f"{spec.id!r} is not the id of a job: only letters, digits and - are.")
    if not is_folder_name(spec.batch):
        raise SafelightError(f"{spec.id}: batch {spec.batch!r} cannot be a folder name.")


def _is_intended(job: str, paths: Paths) -> bool:
    return (paths.publishing / f"{job}.json").exists()


def _counted(frames: Iterable[NDArray[Any]], spec: JobSpec) -> Iterator[NDArray[np.uint8]]:
    wanted = spec.num_frames or 1
    count = 0
    for values in frames:
        count += 1
        if count > wanted:
            raise verify.Refused(f"There are more than the {wanted} frames that were asked for.")
        yield verify.frame(values, spec)
    if count < wanted:
        raise verify.Refused(f"There are {count} frames, {wanted} were asked for.")


def _described(file: Path, spec: JobSpec, path: str) -> Output:
    """Return what the receipt says of the unfinished `file`, whose name in the outbox will be `path`."""
    poster = formats.poster_beside(file)
    output = Output(
        path=file.name,
        sha256=content.digest(file),
        bytes=content.size_bytes(file),
        width=spec.width,
        height=spec.height,
        num_frames=spec.clip_frames,
        fps=spec.clip_fps,
        interpolated_by=formats.interpolated_by(spec),
        poster=Poster(path=poster.name, sha256=content.digest(poster), bytes=poster.stat().st_size)
        if formats.has_poster(spec) and poster.exists()
        else None,
    )
    return formats.renamed(output, path)


def _free_name(spec: JobSpec, paths: Paths) -> str:
    """Return a path below the outbox that no output, poster or receipt has: the date is that of the submission."""
    ends = {formats.suffix(spec), ".json"} | ({".jpg"} if formats.has_poster(spec) else set())
    date = datetime.fromisoformat(spec.submitted_at).astimezone().date().isoformat()
    stem = f"{date}/{spec.batch}/{spec.index:04d}_{slug(spec.prompt)}_s{spec.seed}"
    number = 1
    while True:
        name = f"{stem}{'' if number == 1 else f'-{number}'}"
        if not any(os.path.lexists(paths.outbox / f"{name}{end}") for end in ends):
            return f"{name}{formats.suffix(spec)}"
        number += 1


def slug(prompt: str) -> str:
    """Return the prompt as part of a file's name: at most 40 of a-z, 0-9 and -; "untitled" when nothing is left."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return words[:SLUG_CHARACTERS_MAX].rstrip("-") or "untitled"


def _complete(receipt: Receipt, ledger: Ledger, paths: Paths) -> Receipt:
    """Do what is left of publishing an intended receipt; every step finds out whether it was done before."""
    while not _place(receipt, paths):
        (output,) = receipt.outputs
        renamed = formats.renamed(output, _free_name(receipt.spec, paths))
        receipt = receipt.model_copy(update={"outputs": (renamed,)})
        ledger.intend(receipt)
    with explained(paths):
        _point_latest(receipt, paths)
        _remove(paths.unfinished / receipt.id)
    ledger.fulfil(receipt.id)
    return receipt


def _place(receipt: Receipt, paths: Paths) -> bool:
    """Move output, poster and then receipt to their final names; False when one was taken, and none lies there."""
    (output,) = receipt.outputs
    final = paths.outbox / output.path
    waiting = paths.unfinished / receipt.id / f"output{final.suffix}"
    placed: list[tuple[Path, Path]] = []
    with explained(paths):
        _make_folders(final, paths)
        try:
            _place_file(waiting, final, output)
            placed.append((waiting, final))
            if output.poster:
                poster = (formats.poster_beside(waiting), formats.poster_beside(final))
                with suppress(OutputLost):  # a clip without its poster is whole
                    _place_file(*poster, output.poster)
                    placed.append(poster)
            _place_sidecar(waiting.with_name("sidecar.json"), final.with_suffix(".json"), receipt)
        except FileExistsError:
            for source, target in reversed(placed):
                rename_new(target, source)
            return False
        durable.sync_folder(final.parent)
        return True


def _place_file(waiting: Path, final: Path, output: Output | Poster) -> None:
    """While the waiting file is there, a file under the final name is somebody else's, even with the same bytes."""
    if not waiting.exists():
        if not final.exists() or content.digest(final) != output.sha256:
            raise OutputLost(
                f"{final}: was rendered, but is not there as it was, nor in {waiting.parent}. If you have the file, "
                f"put it back; else delete the note of it in state/publishing and the job runs again."
            )
    elif final.exists() and waiting.samefile(final):
        waiting.unlink()  # a crash between the two halves of rename_new
    else:
        rename_new(waiting, final)


def _place_sidecar(waiting: Path, final: Path, receipt: Receipt) -> None:
    text = receipt.model_dump_json(exclude_none=True, indent=2).encode() + b"\n"
    if not final.is_file() or final.read_bytes() != text:
        durable.write(waiting, text)
        rename_new(waiting, final)


def _point_latest(receipt: Receipt, paths: Paths) -> None:
    """Let `latest` name the newest date; what a person put there instead stays."""
    link = paths.outbox / "latest"
    date = Path(receipt.outputs[0].path).parts[0]
    if os.path.lexists(link):
        target = str(link.readlink()) if link.is_symlink() else ""
        if not _DATE.fullmatch(target) or (target >= date and link.exists()):
            return
    staged = paths.unfinished / receipt.id / "latest"
    staged.parent.mkdir(parents=True, exist_ok=True)
    staged.unlink(missing_ok=True)
    try:
        staged.symlink_to(date)
    except OSError as error:
        if error.errno in _NO_SYMLINKS:
            return  # a convenience that this file system cannot have
        raise
    staged.replace(link)


def _make_folders(file: Path, paths: Paths) -> None:
    """Make the date and batch folder of a final name, durably."""
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.sync_folder(file.parent.parent)
    durable.sync_folder(paths.outbox)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _removed_on_failure(folder: Path, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not unless():
            shutil.rmtree(folder, ignore_errors=True)  # what broke first is what to report
        raise


@contextmanager
def explained(paths: Paths) -> Iterator[None]:
    """Say which folder cannot be written and what to do, where the system's words are only "Permission denied".

    Raises:
        OutboxUnwritable: it is about what lies below or above the outbox, or the system does not say; else what was
            raised.
    """
    try:
        yield
    except OSError as error:
        is_explained = isinstance(error, OutboxUnwritable)
        if error.errno not in _UNWRITABLE or is_explained or not _is_on_the_way(error.filename, paths.outbox):
            raise
        place = error.filename or paths.outbox
        raise OutboxUnwritable(
            error.errno,
            f"outputs cannot be written below {paths.outbox} ({error.strerror}). Make it a folder that the daemon may "
            "write, or set [paths] outbox to one",
            str(place),
        ) from error


def _is_on_the_way(named: object, outbox: Path) -> bool:
    if not isinstance(named, str | os.PathLike):
        return True
    return Path(named).is_relative_to(outbox) or outbox.is_relative_to(named)
