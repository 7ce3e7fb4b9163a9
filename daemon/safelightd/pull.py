"""`safelight models pull`: a model or a ControlNet from the hub, whole or not at all.

Files arrive in a hidden folder beside the final one, each as NAME.part until every byte of it was read back and its
digest is the hub's. The folder gets its name when all are there; whatever interrupts a pull leaves it for the next.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from safelight import durable, pulled, registered
from safelight.config import Config
from safelight.errors import BadConfig, Fault, InvalidJob, SafelightError
from safelight.machine import GIB
from safelight.prepared import StoredFile
from safelight.published import Published
from safelight.pulled import Manifest, Wanted, WantedFile
from safelight.rename import rename_new
from safelightd import hub
from safelightd.choosing import needed
from safelightd.claim import claimed
from safelightd.hub import Hub, Listing, Unreachable

PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Between tries when nothing arrives; after the last the pull ends, and another goes on where it was."""

Say = Callable[[str], None]
Ask = Callable[[], bool]
Tell = Callable[[str, int, int], None]
"""Is told of a file, the bytes that are here and those that there will be."""


def pull(
    config: Config,
    what: Published,
    *,
    force: bool,
    say: Say,
    ask: Ask,
    tell: Tell,
    pauses_s: Sequence[float] = PAUSES_S,
    endpoint: str | None = None,
) -> Path | None:
    """Fetch a model or a ControlNet; return its folder, or None where the person said no.

    Args:
        force: read what is there, and fetch again what is damaged or of another commit.
        say: gets what is about to be done, and what was.
        ask: whether to go on, once that was said.

    Raises:
        BadConfig: it cannot be fetched as the settings have it, or its authors' leave is missing.
        Unreachable: the hub does not answer any more; what has arrived is kept.
        SafelightError: the disk is too small, a file is wrong, or another process is pulling it.
    """
    facts, folder = what.facts, what.folder
    if facts.tiny or not what.repository or not (what.controlnet or facts.files.patterns):
        raise BadConfig(f"{what.name} is not on the hub: " + _why_not(what))
    is_registered = not what.controlnet and registered.file_of(config.paths.models, facts.key).is_file()
    if is_registered and facts.path and not folder.exists():
        raise BadConfig(
            f"{facts.key} is registered and gone: {folder}. Mount its disk, or forget it first: safelight models rm "
            f"{facts.key}."
        )
    if not force and _is_here(what, say):
        return folder
    site = Hub(what, endpoint)
    listing = site.listing()
    wanted = _wanted(what, listing, site)
    if force and _is_as_wanted(what, wanted, say):
        return folder
    _announce(what, wanted, listing, config, say)
    if not ask():
        return None
    place = pulled.hidden(folder)
    with claimed(place, "pulling"):
        if not force and _is_here(what, say):  # another pull ended while the person was asked
            shutil.rmtree(place)
            return folder
        _set_aside(what, place)
        _settle(place, wanted)
        tell_all = _counted(place, wanted, tell)
        stored = [
            _fetch(site, wanted.commit, file, place, tell_all, pauses_s, say)
            for file in sorted(wanted.files, key=lambda file: file.size_bytes)
        ]
        manifest = Manifest(
            key=what.controlnet or facts.key,
            repository=what.repository,
            commit=wanted.commit,
            licence=what.licence,
            files=tuple(sorted(stored, key=lambda file: file.name)),
        )
        _put_in_place(place, folder, manifest)
    say(f"{what.name} is ready, {_size(manifest.size_bytes)}: {folder}")
    return folder


def _why_not(what: Published) -> str:
    if what.facts.tiny:
        return "it is built on first use. There is nothing to pull."
    needs = "repository =" if what.controlnet else "repository = and files.patterns"
    return f"[{what.table}] needs {needs}. Or put its folder in place by hand."


def _is_here(what: Published, say: Say) -> bool:
    """Whether it needs no pull; says so.

    Raises:
        SafelightError: it is there and not whole, or something else has its name.
    """
    folder = what.folder
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / what.index).is_file() and not (folder / pulled.MANIFEST).is_file():
        kind = "ControlNet" if what.controlnet else "model"
        raise SafelightError(f"{folder}: something that is no {kind} is in the way. Move it away.")
    if wrong := pulled.mismatch(folder):
        raise SafelightError(f"{folder}: {wrong}. {pulled.remedy(what)}")
    by_hand = "" if (folder / pulled.MANIFEST).is_file() else ", put there by hand"
    if by_hand and (lacking := what.lacking()):
        raise SafelightError(f"{folder}: was put there by hand and lacks {', '.join(lacking)}. Move it away.")
    say(f"{what.name} is there{by_hand}: nothing to do")
    return True


def _is_as_wanted(what: Published, wanted: Wanted, say: Say) -> bool:
    """Whether every byte of what was pulled is right already; says what is not.

    Raises:
        SafelightError: what is there was not pulled.
    """
    folder = what.folder
    if not os.path.lexists(folder):
        return False
    if not (folder / pulled.MANIFEST).is_file():
        raise SafelightError(f"{folder}: was not pulled, and is left alone. Move it away.")
    say(f"reading {folder}")
    wrong = pulled.damage(what)
    for line in wrong:
        say(line.partition(f" {pulled.remedy(what)}")[0])
    manifest = None if wrong else pulled.read(folder)
    if manifest is None or (manifest.repository, manifest.commit) != (wanted.repository, wanted.commit):
        return False
    say(f"{what.name} is there, every byte of it: nothing to do")
    return True


def _wanted(what: Published, listing: Listing, site: Hub) -> Wanted:
    files = needed(what, listing.files, lambda file: site.read(listing.commit, file))
    site.check_access(listing.commit, max(files, key=lambda file: file.size_bytes))
    return Wanted(repository=what.repository, commit=listing.commit, files=tuple(files))


def _announce(what: Published, wanted: Wanted, listing: Listing, config: Config, say: Say) -> None:
    """Say what is about to be fetched, and raise SafelightError where the disk has no room for it."""
    folder = what.folder
    place = folder if (folder / pulled.MANIFEST).is_file() else pulled.hidden(folder)
    here = sum(pulled.size_here(place, file) for file in wanted.files)
    left = wanted.size_bytes - here
    kept = int(config.settings.policy.min_free_disk_gib * GIB)
    existing = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    pinned = "pinned in the settings" if what.revision else "main"
    say(f"{what.repository} at {wanted.commit[:12]} ({pinned}) -> {folder}")
    say(f"licence: {what.licence}{', gated: your token may read it' if listing.gated else ''}")
    arrived = f", of which {_size(here)} are here already" if here else ""
    say(f"size: {_size(wanted.size_bytes)} in {len(wanted.files)} files{arrived}; {_size(free)} of disk are free")
    if left + kept > free:
        raise SafelightError(
            f"{existing}: {_size(left)} are needed and {_size(free)} are free, of which [policy] min_free_disk_gib "
            f"keeps {_size(kept)}. Free some space, or set [paths] models to a larger disk."
        )


def _set_aside(what: Published, place: Path) -> None:
    """Take what is not right any more out of its place: what is right of it is kept."""
    folder = what.folder
    if not (folder / pulled.MANIFEST).is_file():
        return
    # The index goes first: without it nothing is one. The manifest goes last: it says that the rest is to go.
    order = (what.index, "", pulled.MANIFEST)
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: order.index(file.name if file.name in order else "")):
        target = place / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(folder)


def _settle(place: Path, wanted: Wanted) -> None:
    """Leave of an earlier pull what belongs to this one, and write down what this one fetches."""
    before = pulled.read_wanted(place)
    digests = {file.name: file.digest for file in before.files} if before else {}
    kept = {file.name for file in wanted.files if digests.get(file.name, file.digest) == file.digest}
    for left in [file for file in place.rglob("*") if not file.is_dir() or file.is_symlink()]:
        if str(left.relative_to(place)).removesuffix(pulled.PART) not in kept:
            left.unlink()
    durable.write(place / pulled.WANTED, wanted.model_dump_json(indent=1).encode())


def _fetch(
    site: Hub, commit: str, file: WantedFile, place: Path, tell: Tell, pauses_s: Sequence[float], say: Say
) -> StoredFile:
    """Have one file whole and right.

    Raises:
        SafelightError: what the hub sends is not what it lists.
    """
    target = place / file.name
    part = target.with_name(target.name + pulled.PART)
    if target.is_file():
        if stored := _checked(target, file):
            return stored
        say(f"{file.name}: is damaged, and is fetched again")
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.is_file()
    _receive(site, commit, file, part, tell, pauses_s)
    stored = _checked(part, file)
    if stored is None and resumed:
        say(f"{file.name}: the part that was here is damaged, and is fetched again")
        part.unlink()
        _receive(site, commit, file, part, tell, pauses_s)
        stored = _checked(part, file)
    if stored is None:
        part.unlink()
        raise SafelightError(
            f"{file.name}: its bytes are not those that the hub lists, and are removed. Run it again; where it is so "
            "again, something between here and the hub changes them, or this machine's memory or disk does."
        )
    durable.sync_file(part)
    part.rename(target)
    durable.sync_folder(target.parent)
    return stored


def _receive(site: Hub, commit: str, file: WantedFile, part: Path, tell: Tell, pauses_s: Sequence[float]) -> None:
    """Append to a part until it has the size of the file, over as many connections as that takes."""
    pauses = iter(pauses_s)
    while (here := part.stat().st_size if part.is_file() else 0) < file.size_bytes or not part.is_file():
        reason = "it sends fewer bytes than it lists"
        try:
            with part.open("r+b" if part.is_file() else "wb") as stream, site.body(commit, file, here) as body:
                stream.truncate(body.start)
                stream.seek(body.start)
                for chunk in body.chunks:
                    stream.write(chunk[: file.size_bytes - stream.tell()])
                    tell(file.name, stream.tell(), file.size_bytes)
                    if stream.tell() == file.size_bytes:
                        break
        except Unreachable as error:
            reason = str(error)
        if part.stat().st_size > here:
            pauses = iter(pauses_s)
        if part.stat().st_size >= file.size_bytes:
            return
        pause_s = next(pauses, None)
        if pause_s is None:
            raise Unreachable(f"{file.name}: {reason} What has arrived is kept; run it again.")
        time.sleep(pause_s)


def _checked(path: Path, file: WantedFile) -> StoredFile | None:
    """Return a file with its digest, every byte of it read; None where it is not what the hub lists."""
    sha256, blob = hashlib.sha256(), hub.blob(file.size_bytes)
    with path.open("rb") as stream:
        if os.fstat(stream.fileno()).st_size != file.size_bytes:
            return None
        while chunk := stream.read(hub.CHUNK_BYTES):
            sha256.update(chunk)
            if file.digest.startswith("blob:"):
                blob.update(chunk)
    found = f"blob:{blob.hexdigest()}" if file.digest.startswith("blob:") else f"sha256:{sha256.hexdigest()}"
    if found != file.digest:
        return None
    return StoredFile(name=file.name, size_bytes=file.size_bytes, sha256=sha256.hexdigest())


def _put_in_place(place: Path, folder: Path, manifest: Manifest) -> None:
    """Give a whole folder its name.

    Raises:
        SafelightError: something has taken it meanwhile.
    """
    durable.write(place / pulled.MANIFEST, manifest.model_dump_json(indent=1).encode())
    (place / pulled.WANTED).unlink()
    durable.sync_folder(place)
    try:
        rename_new(place, folder)
    except FileExistsError as error:
        raise SafelightError(f"{folder}: something has taken its name. Move it away and run it again.") from error
    durable.sync_folder(folder.parent)


def _counted(place: Path, wanted: Wanted, tell: Tell) -> Tell:
    """Return what is told of one file and tells of all of them."""
    here = {file.name: pulled.size_here(place, file) for file in wanted.files}

    def told(name: str, arrived: int, _of: int) -> None:
        here[name] = arrived
        tell(name, sum(here.values()), wanted.size_bytes)

    return told


def _size(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:.1f} MiB"


class Progress:
    """How far a pull is: one line that changes on a terminal, else a line now and then."""

    def __init__(self, write: Callable[[str], None], *, terminal: bool) -> None:
        self._write = write
        self._terminal = terminal
        self._every_s = 0.5 if terminal else 30.0
        self._seen: list[tuple[float, int]] = []
        self._open = False

    def tell(self, name: str, arrived: int, of: int) -> None:
        """Show what has arrived, the rate of the last minute, and how long the rest takes."""
        now = time.monotonic()
        if self._seen and now - self._seen[-1][0] < self._every_s:
            return
        self._seen = [*(point for point in self._seen if now - point[0] < 60), (now, arrived)]
        begun, then = self._seen[0]
        rate = (arrived - then) / (now - begun) if now > begun else 0.0
        left = f", {_size(rate)}/s, {_left(of - arrived, rate)} left" if rate > 0 else ""
        line = f"{_size(arrived)} of {_size(of)}{left}: {name}"
        self._write(f"\r\x1b[K{line[:100]}" if self._terminal else f"{line}\n")
        self._open = self._terminal

    def say(self, line: str) -> None:
        """Write a line of its own."""
        self.end()
        self._write(f"{line}\n")

    def end(self) -> None:
        """Leave the line that changes as it is."""
        self._write("\n" * self._open)
        self._open = False


def _left(size_bytes: int, rate: float) -> str:
    seconds = round(size_bytes / rate)
    return f"{seconds} s" if seconds < 90 else f"{seconds // 60} min"


def run(config: Config, what: Published, *, yes: bool, force: bool) -> int:
    """Pull for the person at the terminal, or for a script with `yes`; return the exit code."""
    progress = Progress(_write, terminal=sys.stderr.isatty())
    try:
        folder = pull(config, what, force=force, say=progress.say, ask=lambda: yes or _asked(what), tell=progress.tell)
    except KeyboardInterrupt:
        progress.say(f"Stopped. What has arrived is kept; it goes on with: {what.command}")
        return 130
    except OSError as error:
        progress.end()
        raise SafelightError(
            f"{error.filename or what.folder}: {error.strerror}. What has arrived is "
            "kept. Make it writable, with room for all of it, and run it again."
        ) from error
    except SafelightError:
        progress.end()
        raise
    if folder is None:
        progress.say("Nothing was fetched.")
        return 1
    print(folder)  # noqa: T201 - what a script may read
    return 0


def _asked(what: Published) -> bool:
    """Whether the person wants it.

    Raises:
        InvalidJob: there is nobody to ask. A script that fetches tens of GB must have meant it.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidJob(
            [Fault(what.command, "asks before it fetches, and there is no terminal to ask at", "Add --yes.")]
        )
    _write("Fetch it? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
