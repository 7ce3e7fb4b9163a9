"""`safelightd digests`: reads the files of registered models that have no digests yet, after everybody else, and ends.

What it was at when it is stopped or killed is read again; what it has read before is not. Knows no weight and no job.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from functools import partial
from pathlib import Path

from safelight import durable, registered
from safelight.config import Config
from safelight.digesting import Reading
from safelight.errors import SafelightError
from safelight.registered import Digested, Registration
from safelightd import linux
from safelightd.claim import AlreadyClaimed, claimed
from safelightd.logs import Log

TELL_S = 0.5
"""Between two writings of how far it is."""

log = Log("safelight.digests")


class _Stopped(Exception):
    """A signal came."""


class _Forgotten(Exception):
    """The model that is being read is not registered any more."""


def serve(config: Config) -> int:
    """Make the digests that registered models lack.

    Returns:
        0 when none is lacking, a signal came or another process is at it; 1 when a file could not be read.

    Raises:
        SafelightError: what was found out cannot be written down.
    """
    linux.be_idle()
    try:
        with claimed(config.paths.state / "digesting", "making digests"):
            return _Digesting(config).run()
    except AlreadyClaimed as other:
        log.info("digests.elsewhere", reason=str(other))
        return 0
    except OSError as error:
        raise _unwritable(error, config.paths.models) from error


def _unwritable(error: OSError, folder: Path) -> SafelightError:
    place = error.filename or folder
    return SafelightError(f"{place}: {error.strerror}. Make it writable for the daemon's user, or give its disk room.")


class _Digesting:
    """One run: what it met, and whether it is to end."""

    def __init__(self, config: Config) -> None:
        self._models = config.paths.models
        self._folder = self._models / registered.FOLDER
        self._place = config.paths.digests
        self._faults: dict[str, str] = {}
        self._told_at = 0.0
        self._stopping = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            durable.sweep(self._folder)
            seen = None
            while seen != (stamp := registered.stamp(self._models)):  # as long as a round made or met something new
                seen = stamp
                self._round()
        except _Stopped:
            log.info("digests.stopped")
            return 0
        finally:
            self._save(Reading(faults=self._faults))
        return 1 if self._faults else 0

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True

    def _round(self) -> None:
        """Read every file that lacks a digest once."""
        self._faults = {}
        for registration in registered.read_all(self._models)[0]:
            try:
                at = registered.digested(self._models, registration)
            except OSError as error:  # `models list` says so
                log.warning("digests.gone", key=registration.key, place=error.filename, problem=error.strerror)
                continue
            try:
                self._read(registration, at)
            except _Forgotten:
                log.info("digests.forgotten", key=registration.key)

    def _read(self, registration: Registration, at: Digested) -> None:
        """Read what a model lacks."""
        if at.lacking and not os.access(self._folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._folder))
        done, files = at.done_bytes, 0
        for file in at.lacking:
            try:
                found = registered.digest(file, partial(self._tell, registration, file, done, at.total_bytes))
            except OSError as error:
                self._faults[str(file)] = f"{file}: cannot be read ({error.strerror})"
                log.warning("digests.unread", key=registration.key, file=file, problem=error.strerror)
                continue
            if not registered.remember(self._models, registration, file, found):
                raise _Forgotten
            done += found.size_bytes
            files += 1
        if files:
            log.info("digests.made", key=registration.key, files=files, bytes=done - at.done_bytes)

    def _tell(self, registration: Registration, file: Path, before: int, total: int, nbytes: int) -> None:
        """Say how far it is, now and then.

        Raises:
            _Stopped, _Forgotten: reading on is of no use.
        """
        if self._stopping:
            raise _Stopped
        now = time.monotonic()
        if now - self._told_at < TELL_S:
            return
        self._told_at = now
        if registered.read(self._models, registration.key) != registration:
            raise _Forgotten
        at = {"done_bytes": before + nbytes, "total_bytes": total}
        self._save(Reading(key=registration.key, file=str(file), **at, faults=self._faults))

    def _save(self, reading: Reading) -> None:
        """Replace what is told; nothing stays where there is nothing to tell. Whole, but not synced: it is progress."""
        unfinished = self._place.with_name(f".{self._place.name}.part")
        try:
            if reading == Reading():
                self._place.unlink(missing_ok=True)
                return
            unfinished.write_text(reading.model_dump_json())
            unfinished.replace(self._place)
        except OSError as error:
            raise _unwritable(error, self._place) from error
