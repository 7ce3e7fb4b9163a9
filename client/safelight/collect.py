"""Copies finished pictures and clips to a folder of yours. Doing it again copies what is new, and harms nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Literal

from safelight import content, durable
from safelight.errors import SafelightError
from safelight.paths import Paths
from safelight.receipt import Output, Poster, Receipt
from safelight.rename import rename_new

Outcome = Literal["copied", "moved", "already there", "missing", "changed"]
"""`missing`: not in the outbox any more. `changed`: not the file that was published, so it was left alone."""


@dataclass(frozen=True)
class Copied:
    """What became of one output."""

    id: str
    source: Path
    target: Path | None
    """Where it lies now; None when it is missing or changed."""
    outcome: Outcome


def collect(receipts: Iterable[Receipt], outbox: Path, target: Path, *, move: bool = False) -> list[Copied]:
    """Copy the outputs of finished jobs, each beside its receipt, to `target/<batch>/`, and say what became of each.

    Every copy is compared with the digest in the receipt before it gets its name. What is there already is left; a
    different file of that name is never overwritten, the copy gets "-2". A poster comes along where its name is free.
    With `move` the outbox loses each file once it lies in `target`.

    Raises:
        OSError: `target` is full or cannot be written; no half file is left under a final name.
    """
    return [
        _collect_one(receipt.id, output, outbox, target, move=move)
        for receipt in receipts
        for output in receipt.outputs
    ]


def note(copied: Sequence[Copied], paths: Paths, now: datetime) -> None:
    """Write down which jobs a person has the outputs of; durable when this returns. Retention goes by it.

    A job counts when each of its outputs lies in a file of its own outside our names for it: what was "collected" into
    the outbox itself is still the only copy.

    Raises:
        OSError: the state folder cannot be written, as on another host than the daemon's.
    """
    by_job: dict[str, list[Copied]] = {}
    for one in copied:
        by_job.setdefault(one.id, []).append(one)
    durable.write_all(
        (paths.collected / f"{job}.json", _note(job, outputs, now))
        for job, outputs in by_job.items()
        if all(_is_a_copy(one) for one in outputs)
    )


def _is_a_copy(one: Copied) -> bool:
    if one.target is None or not one.target.exists():
        return False
    return not (one.source.exists() and one.source.samefile(one.target))


def _note(job: str, outputs: Sequence[Copied], now: datetime) -> bytes:
    to = [str(one.target) for one in outputs]
    written = {"v": 1, "id": job, "collected_at": now.isoformat(timespec="seconds"), "to": to}
    return json.dumps(written, ensure_ascii=False).encode(errors="surrogateescape") + b"\n"


def taken_to(job: str, paths: Paths) -> list[str]:
    """Return where a person has taken a job's outputs, in their order; [] where nothing says so."""
    try:
        written = json.loads((paths.collected / f"{job}.json").read_bytes().decode(errors="surrogateescape"))
        return [str(place) for place in written["to"]]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # a note of convenience: whoever cannot read it knows nothing of it


def whereabouts(job: str, outputs: Sequence[str], paths: Paths) -> list[str]:
    """Return where the outputs of a job lie: in the outbox, or where a person has taken them since.

    Text, because a listing asks it of 100,000 jobs.
    """
    inside = [f"{paths.outbox}/{path}" for path in outputs]
    if all(map(os.path.lexists, inside)):
        return inside
    taken = taken_to(job, paths)
    return taken if len(taken) == len(outputs) else inside


def _collect_one(job: str, output: Output, outbox: Path, target: Path, *, move: bool) -> Copied:
    inside = PurePosixPath(output.path)
    if inside.is_absolute() or ".." in inside.parts:
        raise SafelightError(f"{job}: its receipt names {output.path}, which is not inside the outbox.")
    source = outbox / inside
    folder = target / inside.parent.name
    if source.exists():
        folder.mkdir(parents=True, exist_ok=True)
    place, outcome = folder, None
    while outcome is None:
        place, there = next(
            (name, seen)
            for name in _names(folder / inside.name)
            for seen in [os.path.lexists(name)]  # before it is looked at: what comes later was not
            if _is_ours(name, output, source)
        )
        with suppress(FileExistsError):  # somebody took the name in between: look again
            outcome = _bring(source, place, output.sha256, there=there)
    if outcome in ("missing", "changed"):
        return Copied(job, source, None, outcome)
    if output.poster:
        _bring_poster(source, place, output.poster, move=move)
    if move:
        content.remove_copied(source, place)
        content.remove_copied(source.with_suffix(".json"), place.with_suffix(".json"))
        outcome = "moved" if outcome == "copied" else outcome
    return Copied(job, source, place, outcome)


def _names(first: Path) -> Iterator[Path]:
    yield first
    number = 2
    while True:
        yield first.with_stem(f"{first.stem}-{number}")
        number += 1


def _is_ours(place: Path, output: Output, source: Path) -> bool:
    """Whether the output may lie at `place`: nothing else is there, nor another's receipt."""
    if os.path.lexists(place) and not _is_same(place, output):
        return False
    beside, sidecar = place.with_suffix(".json"), source.with_suffix(".json")
    if not os.path.lexists(beside):
        return True
    if not sidecar.is_file():
        return place.exists()  # moved before, with its receipt
    return beside.is_file() and beside.read_bytes() == sidecar.read_bytes()


def _is_same(file: Path, output: Output | Poster) -> bool:
    """A link to it is as good."""
    return file.exists() and content.is_there_as(file.resolve(), output.sha256, output.bytes)


def _bring(source: Path, place: Path, sha256: str, *, there: bool) -> Outcome:
    """Copy an output and its receipt to `place`, as far as they are not there; `there` says it of the output.

    Raises:
        FileExistsError: somebody else's file has come to `place` since.
    """
    if not there and not source.exists():
        return "missing"
    if not there and not _copy(source, place, sha256):
        return "changed"
    sidecar, beside = source.with_suffix(".json"), place.with_suffix(".json")
    if sidecar.is_file() and not beside.exists():
        _copy(sidecar, beside)
    durable.sync_folder(place.parent)
    return "already there" if there else "copied"


def _copy(source: Path, place: Path, sha256: str | None = None) -> bool:
    """Copy whole or not at all; False when the copy has another digest than `sha256`."""
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        content.copy(source, unfinished)
        if sha256 is not None and content.digest(unfinished) != sha256:
            return False
        rename_new(unfinished, place)
    finally:
        content.remove(unfinished)
    return True


def _bring_poster(clip: Path, place: Path, poster: Poster, *, move: bool) -> None:
    """Copy a poster beside the clip's copy; it is no result, so that none is missed and none gets another name."""
    source, beside = (file.with_name(f"{file.stem}{PurePosixPath(poster.path).suffix}") for file in (clip, place))
    if not source.is_file():
        return
    if not os.path.lexists(beside):
        with suppress(FileExistsError):
            _copy(source, beside, poster.sha256)
    if move and _is_same(beside, poster):
        content.remove_copied(source, beside)
