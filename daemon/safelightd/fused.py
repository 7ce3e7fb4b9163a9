"""The daemon's part of kept results: one job's are written while they are made, and read by the jobs after it.

A cache, and never a reason for a job to fail: what cannot be written is not kept, what cannot be read is removed and
the job is planned anew without it; both are said in the log. Where what lies: `safelight.fused`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from safelight import durable, fused, prepared
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.jobspec import JobSpec
from safelight.models import Models
from safelight.plan import Plan
from safelight.prepared import StoredFile
from safelightd import storedfolder
from safelightd.logs import Log
from safelightd.shards import Entry, Shard, split
from safelightd.weights import BadModelFolder, Stored, stored_tensors

log = Log("safelight.fused")


class Damaged(Exception):
    """A kept result could not be read, and is gone. Plan anew, without any."""


@dataclass(frozen=True)
class Results:
    """The kept results as one job sees them."""

    config: Config
    table: Models
    plan: Plan
    loras: fused.Loras
    gpu: str
    """The card's name, "" where there is none."""

    @property
    def set_name(self) -> str:
        digest = fused.digest(self.loras, self.plan.dtype, self.gpu or "cpu")
        return fused.set_name(self.plan.model, self.plan.precision, digest)

    @property
    def folder(self) -> Path:
        """Of this job's set."""
        return fused.set_folder(self.config.paths.models, self.set_name)

    def note_use(self) -> None:
        """Remember that these LoRAs were used, and when."""
        if not (self.loras and self.config.settings.worker.fused_gib and self.plan.is_quantised):
            return
        try:
            fused.note_use(self.config.paths.models, self.set_name)
        except OSError as error:
            log.warning("fused.not_noted", folder=self.folder, error=error)

    @contextmanager
    def reading(self, component: str, weights: str) -> Iterator[dict[str, Stored]]:
        """Have a component's stored tensors, which no process removes until the block ends.

        Raises:
            Damaged: they are gone, or not what was written.
        """
        found = self.folder / component
        with ExitStack() as leaving:
            try:
                leaving.enter_context(_shared(found))
                stored = stored_tensors(found, weights)
            except (BadModelFolder, OSError, ValueError, KeyError) as error:
                raise _given_up(found, error) from error
            try:
                yield stored
            except (BadModelFolder, OSError) as error:
                is_own = isinstance(error, BadModelFolder) or error.errno == errno.EIO or _is_damaged(found)
                if not is_own:
                    raise  # of something else that the block does
                leaving.close()
                raise _given_up(found, error) from error

    @contextmanager
    def keeping(self, component: str, published: Path, config: Path, stem: str) -> Iterator[Keeper]:
        """Have what keeps a component that is being made; it is whole on disk, or not there, when the block ends.

        Args:
            published: where the weights come from that LoRAs are added to.
            config: the component's config.json.
            stem: what its files of weights are called.
        """
        with ExitStack() as leaving:
            keeper = Keeper(self, component, published, config, stem)
            leaving.callback(keeper.close)
            yield keeper
            keeper.finish()  # synced while the block went on: a slow disk does not hold up the GPU

    def check_disk(self, needed_bytes: int) -> None:
        """Raise SafelightError where so much does not fit any more: others write to the disk meanwhile."""
        _, reserve = fused.limits(self.config)
        free = fused.free_bytes(self.config.paths.models)
        if free - needed_bytes < reserve:
            raise SafelightError(f"{free / 2**30:.1f} GiB are free, of which {reserve / 2**30:.1f} stay free")

    def make_room(self, component: str, needed_bytes: int) -> None:
        """Remove what is of no use, then the least recently used sets, until this one fits.

        Args:
            needed_bytes: of the component; its model's other transformers are of the same size.

        Raises:
            SafelightError: it does not fit all the same.
        """
        tidy(self.config, self.table, but=self.folder)
        folder = self.config.paths.models
        limit, reserve = fused.limits(self.config)
        experts = sum(name.startswith("transformer") for name in self.table[self.plan.model].blocks)
        own = [at for at in self.folder.glob("*") if at.name.partition(".")[0] != component]
        here = sum(map(fused.held_bytes, own))
        wanted = needed_bytes * experts
        whole = fused.usable(folder, self.table, prepared.versions())
        others = [at for at in fused.sets(folder) if at != self.folder]
        held = {at: fused.held_bytes(at) for at in others}
        for at in [*others, None]:
            free = fused.free_bytes(folder) - reserve
            if sum(held.values()) + wanted <= limit and wanted - here <= free:
                return
            if at and held[at] and not fused.is_resting(at, self.table, whole) and _set_removed(at, "room for another"):
                held[at] = 0
        raise SafelightError(
            f"{wanted / 2**30:.1f} GiB do not fit [worker] fused_gib = {limit / 2**30:g} and the free disk, beside "
            f"{sum(held.values()) / 2**30:.1f} GiB that were used within the hour"
        )


def results(spec: JobSpec, plan: Plan, config: Config, table: Models, gpu: str) -> Results:
    """Return the kept results as a planned job sees them."""
    return Results(config, table, plan, fused.loras_of(spec.loras), gpu)


def tidy(config: Config, table: Models, but: Path | None = None) -> None:
    """Remove what an interrupted process left, what is of no use any more, and what is above the limit.

    Args:
        but: a set that is left alone but for leftovers and folders of no use.
    """
    folder, versions = config.paths.models, prepared.versions()
    limit, _ = fused.limits(config)
    try:
        for left in fused.leftovers(folder):
            _removed(left, "a process that wrote or removed it was ended")
        for found in fused.folders(folder):
            with suppress(OSError):  # the published weights are away just now: nothing speaks against it
                if reason := fused.trouble(found, table, versions):
                    _removed(found, reason)
        fused.forget_unused(folder)
        held = {at: fused.held_bytes(at) for at in fused.sets(folder)}
        for at, size in [*held.items()]:
            if sum(held.values()) <= limit:
                return
            if at != but and size and _set_removed(at, f"[worker] fused_gib = {limit / 2**30:g}"):
                held[at] = 0
    except OSError as error:
        log.warning("fused.not_tidied", folder=folder / fused.FOLDER, error=error)


def _set_removed(at: Path, reason: str) -> bool:
    return _removed(at, reason, fused.remove_set)


def _removed(at: Path, reason: str, remove: Callable[[Path], bool] = fused.remove) -> bool:
    """Remove a folder of a set, and say why; False where it is in use or cannot be removed."""
    try:
        gone = remove(at)
    except OSError as error:
        log.warning("fused.not_removed", folder=at, error=error)
        return False
    if gone:
        log.info("fused.removed", folder=at, reason=reason)
    return gone


def _is_damaged(found: Path) -> bool:
    try:
        return fused.shallow_damage(found, fused.read(found)) is not None
    except prepared.DamagedFolder:
        return True


def _given_up(found: Path, error: Exception) -> Damaged:
    if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.ENOENT):
        log.warning("fused.not_read", folder=found, error=error)  # no fault of the folder's
        return Damaged(f"{found}: {error}")
    log.warning("fused.damaged", folder=found, error=error, remedy="it is removed, and made anew by a later job")
    if found.is_dir():
        _removed(found, "damaged")
    return Damaged(f"{found}: {error}")


@contextmanager
def _shared(found: Path) -> Iterator[None]:
    """Have a folder that nobody removes meanwhile; several processes may.

    Raises:
        FileNotFoundError: it was removed just now.
    """
    descriptor = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # who has it alone is about to finish, or to remove it: no long wait
        if os.fstat(descriptor).st_ino != found.stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(found))
        yield
    finally:
        os.close(descriptor)


class Keeper:
    """Writes a component that is being put together: block by block, each as soon as it is whole.

    Files are synced and hashed by a thread of its own while the next are made. The first thing that goes wrong ends
    it, is said, and leaves nothing.
    """

    def __init__(self, own: Results, component: str, published: Path, config: Path, stem: str) -> None:
        self._own = own
        self._component = component
        self._published = published
        self._config = config
        self._stem = stem
        self._target = own.folder / component
        self._unfinished = storedfolder.unfinished(self._target)
        self._claim = ExitStack()
        self._quantised = 0
        self._source: prepared.Source | None = None
        self._shards: dict[str, Sequence[Entry]] = {}
        self._shard_of: dict[str, str] = {}
        self._begun: dict[str, Shard] = {}
        self._done: list[Future[StoredFile]] = []
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, entries: Sequence[Entry], quantised: int) -> None:
        """Say what will be written, in its order, and of how many quantised weights that is."""
        self._quantised = quantised
        with self._unless_it_fails():
            self._own.make_room(self._component, sum(entry.nbytes for entry in entries))
            if self._target.exists():
                return  # another process has made it meanwhile
            self._source = prepared.source(self._published)
            self._claim.enter_context(storedfolder.emptied(self._unfinished, "keeping"))
            if self._target.exists():
                raise SafelightError("another process has made it")
            self._thread = self._claim.enter_context(ThreadPoolExecutor(1, "keeper"))
            shards = split(([entry] for entry in entries), storedfolder.SHARD_BYTES)
            self._shards = dict(zip(storedfolder.names(self._stem, len(shards)), shards, strict=True))
            self._shard_of = {entry.name: name for name, own in self._shards.items() for entry in own}

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some of them; nothing where it has failed."""
        if self._thread is None:
            return
        with self._unless_it_fails():
            for name, tensor in tensors.items():
                file = self._shard_of[name]
                if file not in self._begun:
                    self._own.check_disk(sum(entry.nbytes for entry in self._shards[file]))
                    self._begun[file] = Shard(self._unfinished / file, self._shards[file])
                self._begun[file].write(name, tensor)
                if self._begun[file].is_whole:
                    self._done.append(self._thread.submit(_finished, self._begun[file]))

    def finish(self) -> None:
        """Give the folder its name."""
        if self._thread is None:
            return
        with self._unless_it_fails():
            own, plan = self._own, self._own.plan
            files = [done.result() for done in self._done]
            files += storedfolder.write_index(self._unfinished, self._stem, self._shards)
            files.append(storedfolder.write_small(self._unfinished / "config.json", self._config.read_bytes()))
            assert self._source is not None
            if prepared.source(self._published) != self._source:
                raise SafelightError(f"{self._published} has changed meanwhile")
            manifest = fused.Manifest(
                key=plan.model,
                precision=plan.precision,
                component=self._component,
                dtype=plan.dtype,
                source=self._source,
                files=tuple(files),
                quantised=self._quantised,
                versions=prepared.versions(),
                digest=self._target.parts[-2],
                loras=own.loras,
                made_on=own.gpu or "cpu",
            )
            durable.write(self._unfinished / prepared.MANIFEST, manifest.model_dump_json(indent=1).encode())
            storedfolder.put_in_place(self._unfinished, self._target)
            log.info("fused.kept", folder=self._target, bytes=manifest.size_bytes)
        self.close()

    def close(self) -> None:
        """Leave nothing but what is finished."""
        self._thread = None
        for done in self._done:
            done.cancel()
        self._claim.close()
        for shard in self._begun.values():
            shard.close()
        self._begun.clear()

    @contextmanager
    def _unless_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafelightError) as error:
            log.warning("fused.not_kept", folder=self._target, reason=error)
            self.close()


def _finished(shard: Shard) -> StoredFile:
    with shard:
        return StoredFile(name=shard.file.name, size_bytes=shard.nbytes, sha256=shard.finish())
