"""`safelight models prepare`: components stored in the precision they run in, tensor by tensor.

RAM holds one tensor at a time, of the published weights and of the result. A folder is written under another name,
synced, and renamed when it is whole: what has the right name can be used, and what was interrupted is removed by the
next run. Knows the format of the files; what is in them is `safelightd.precision`'s.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from pydantic import BaseModel, ConfigDict

from safelight import config as settings
from safelight import durable, models, prepared
from safelight.config import Config
from safelight.errors import Fault, InvalidJob, SafelightError
from safelight.machine import GIB
from safelight.models import ModelFacts
from safelight.plan import Precision
from safelight.prepared import Manifest, StoredFile
from safelightd import logs, precision, storedfolder
from safelightd.outline import DTYPE, Piece, Work, outline, published
from safelightd.shards import Shard, split
from safelightd.weights import Reader

PROGRESS_S = 2.0

Say = Callable[[str], None]


def _go_on() -> None: ...


class Interrupt:
    """Ctrl-C, heard between two weights: an exception that comes up inside of torch's C++ may end the process there."""

    def __init__(self) -> None:
        self._asked = False

    def heard(self, _signum: int, _frame: FrameType | None) -> None:
        """Remember the first; the second ends whatever runs.

        Raises:
            KeyboardInterrupt: it is the second.
        """
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def ask(self) -> None:
        """Raise KeyboardInterrupt where it was heard."""
        if self._asked:
            raise KeyboardInterrupt


class Request(BaseModel):
    """What `safelightd prepare` asks of the process that has torch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    precision: Precision
    components: tuple[str, ...]
    models_folder: Path
    force: bool


def prepare(
    config: Config, facts: ModelFacts, held: Precision, components: Sequence[str], *, force: bool, say: Say,
    ask: Callable[[], None] = _go_on,
) -> list[str]:  # fmt: skip
    """Prepare components of a model; return KEY/PRECISION/COMPONENT of each that is ready now.

    Args:
        components: none for those that a job's time goes into: the transformers; in bf16 every one with repeated
            blocks that is not published in it.
        force: make anew what is ready, or was made from other files.
        say: gets a line now and then.
        ask: is called before each weight, and may raise.

    Raises:
        InvalidJob: a component has no repeated blocks, or its layers cannot be held so.
        BadModelFolder: the published weights are missing or damaged.
        SafelightError: this machine cannot, the disk is too small, or the source has changed.
    """
    device = torch.device(config.settings.worker.device)
    if reason := precision.unusable(held, device):
        raise SafelightError(reason)
    names = _chosen(facts, held, components)
    there = published(facts, config.paths.models)
    works = [outline(facts, held, name, *there[name], config.paths.models) for name in names]
    needed = [work for work in works if _is_needed(work, force=force, say=say)]
    _check_disk(needed, config, say)
    for work in needed:
        _make(work, device, say, ask)
    return [work.name for work in works if prepared.read(work.target)]


def _chosen(facts: ModelFacts, held: Precision, components: Sequence[str]) -> list[str]:
    """Return the components to prepare.

    Raises:
        InvalidJob: one was named that cannot be; all such are listed.
    """
    faults = [
        Fault(facts.key, f"component {name} has no repeated blocks", f"Use {', '.join(facts.blocks)}.")
        for name in components
        if name not in facts.blocks
    ]
    if faults:
        raise InvalidJob(faults)
    if components:
        return list(dict.fromkeys(components))
    return [name for name in facts.blocks if held == "bf16" or name.startswith("transformer")]


def _is_needed(work: Work, *, force: bool, say: Say) -> bool:
    """Whether a component is still to be prepared; says why where it is not.

    Raises:
        SafelightError: it was prepared from other files than are there now.
    """
    if work.precision == "bf16" and all(piece.stored.dtype == piece.dtype for piece in work.pieces):
        say(f"{work.key} {work.component} is published in bf16: nothing to do")
        return False
    if force:
        return True
    try:
        ready = prepared.read(work.target)
    except prepared.DamagedFolder:
        return True
    if ready is None:
        return True
    if not prepared.is_current(ready, Path(work.source.folder)):
        raise SafelightError(
            f"{work.name}: the weights in {work.source.folder} have changed since it was made. "
            "Make it anew with --force."
        )
    say(f"{work.name} is ready, {_size(ready.size_bytes)}: nothing to do")
    return False


def _check_disk(works: Sequence[Work], config: Config, say: Say) -> None:
    """Say what is about to be written, and raise SafelightError where the disk has no room for it."""
    folder = config.paths.models
    kept = int(config.settings.policy.min_free_disk_gib * GIB)
    needed = sum(work.size_bytes for work in works)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    for work in works:
        quantised = sum(piece.quantised for piece in work.pieces)
        what = f"{quantised} weights in {work.precision}" if quantised else f"{len(work.pieces)} tensors"
        say(f"{work.name}: {what}, {_size(work.size_bytes)}")
    if works:
        say(f"needs {_size(needed)} of disk, {_size(free)} are free in {folder}")
    if works and needed + kept > free:
        raise SafelightError(
            f"{folder}: {_size(needed)} are needed and {_size(free)} are free, of which [policy] min_free_disk_gib "
            f"keeps {_size(kept)}. Free some space, or set [paths] models to a larger disk."
        )


def _make(work: Work, device: torch.device, say: Say, ask: Callable[[], None]) -> None:
    """Write one folder and give it its name."""
    unfinished = storedfolder.unfinished(work.target)
    try:
        with storedfolder.emptied(unfinished, "preparing"):
            files = _write_shards(work, unfinished, device, say, ask)
            files.append(storedfolder.write_small(unfinished / work.config.name, work.config.read_bytes()))
            manifest = Manifest(
                key=work.key,
                precision=work.precision,
                component=work.component,
                dtype=str(DTYPE).removeprefix("torch."),
                source=work.source,
                files=tuple(files),
                quantised=sum(piece.quantised for piece in work.pieces),
                versions=prepared.versions(),
            )
            durable.write(unfinished / prepared.MANIFEST, manifest.model_dump_json(indent=1).encode())
            storedfolder.put_in_place(unfinished, work.target)
    except OSError as error:
        raise SafelightError(f"{work.name}: {error}. Nothing of it is left; run it again.") from error
    except torch.OutOfMemoryError as error:
        raise SafelightError(
            f"{work.name}: the GPU has no room for one weight beside what it is doing. Pause the worker (safelight "
            "pause), or close other GPU programs."
        ) from error
    say(f"{work.name} is ready, {_size(manifest.size_bytes)}")


def _write_shards(
    work: Work, folder: Path, device: torch.device, say: Say, ask: Callable[[], None]
) -> list[StoredFile]:
    """Write the weights, and the index where they are several files."""
    shards = split((piece.entries for piece in work.pieces), storedfolder.SHARD_BYTES)
    names = storedfolder.names(work.stem, len(shards))
    tell = _progress(work, say)
    pieces = iter(work.pieces)
    files = []
    with Reader(device) as reader:
        for name, entries in zip(names, shards, strict=True):
            with Shard(folder / name, entries) as shard:
                left = len(entries)
                while left:
                    ask()
                    piece = next(pieces)
                    for entry, tensor in zip(piece.entries, _made(piece, work.precision, reader), strict=True):
                        shard.write(entry.name, tensor)
                        tell(entry.nbytes)
                    left -= len(piece.entries)
                files.append(StoredFile(name=name, size_bytes=shard.nbytes, sha256=shard.finish()))
    return [*files, *storedfolder.write_index(folder, work.stem, dict(zip(names, shards, strict=True)))]


def _made(piece: Piece, held: Precision, reader: Reader) -> list[torch.Tensor]:
    """Return the tensors of a piece, in the order of its entries."""
    device = reader.device if piece.quantised else torch.device("cpu")
    tensor = torch.empty(piece.stored.shape, dtype=piece.dtype, device=device)
    reader.read([(piece.stored, tensor)])
    reader.finish()
    if not piece.quantised:
        return [tensor]
    quantiser = precision.format_of(held)
    assert quantiser is not None
    made = list(quantiser.quantise(tensor).values())
    return [part.reshape(entry.shape) for part, entry in zip(made, piece.entries, strict=True)]


def _progress(work: Work, say: Say) -> Callable[[int], None]:
    """Return what is told of every tensor's bytes and says a line now and then."""
    begun = last = time.monotonic()
    done = 0

    def tell(nbytes: int) -> None:
        nonlocal last, done
        done += nbytes
        now = time.monotonic()
        if now - last < PROGRESS_S or done >= work.size_bytes:
            return
        last = now
        left_s = (work.size_bytes - done) / done * (now - begun)
        say(f"{work.name}: {_size(done)} of {_size(work.size_bytes)}, {left_s:.0f} s left")

    return tell


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.1f} MiB"


def main() -> int:
    """Prepare what the command line's JSON asks for; the exit code is the class of what went wrong."""
    logs.set_up()
    interrupt = Interrupt()
    signal.signal(signal.SIGINT, interrupt.heard)
    request = Request.model_validate_json(sys.argv[1])
    try:
        read = settings.load()
        config = replace(read, paths=replace(read.paths, models=request.models_folder))
        facts = models.load(config)[request.key]
        ready = prepare(
            config,
            facts,
            request.precision,
            request.components,
            force=request.force,
            say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201 - progress, for a person
            ask=interrupt.ask,
        )
    except SafelightError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the answer to the person who asked
        return error.exit_code
    except OSError as error:
        print(f"{request.key} cannot be prepared: {error}", file=sys.stderr)  # noqa: T201 - the same
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n".join(ready))  # noqa: T201 - what a script may read
    return 0


if __name__ == "__main__":
    sys.exit(main())
