"""Whether a file is whole: by the kernel's word, else by its close, else because it has not changed for long."""

from __future__ import annotations

from collections.abc import Callable

from safelight import inbox
from safelight.drops import Entry, Patience
from safelight.inbox import Identity, Reading
from safelight.paths import Paths
from safelightd.closes import UNSEEN, Closes, Glimpse


class Writers:
    """Who still writes the files of one inbox.

    Args:
        closes: what the watch has seen of the inbox.
        leases: False on a network file system, where the kernel knows only this machine's writers.
    """

    def __init__(self, paths: Paths, patience: Patience, closes: Closes, *, leases: bool) -> None:
        self._paths = paths
        self._patience = patience
        self._closes = closes
        self._leases = leases

    def read(self, entry: Entry, now: float) -> Reading | None:
        """Return what is in a file of the inbox; None while it is not whole, see safelight.inbox.read."""
        return inbox.read(self._paths.inbox, entry, self._still(entry, now, self._glimpse(entry)), leases=self._leases)

    def read_claimed(self, entry: Entry, now: float) -> Reading | None:
        """The same for a claimed file, which nobody watches."""
        return inbox.read(self._paths.claimed, entry, self._still(entry, now, UNSEEN), leases=self._leases)

    def is_whole(self, entry: Entry, now: float) -> bool:
        """Whether nobody writes a file of the inbox any more.

        Raises:
            OSError: it cannot be read.
        """
        is_still = self._still(entry, now, self._glimpse(entry))
        return inbox.is_whole(self._paths.inbox, entry, is_still, leases=self._leases)

    def _glimpse(self, entry: Entry) -> Glimpse:
        return self._closes.glimpse(entry.path)

    def _still(self, entry: Entry, now: float, glimpse: Glimpse) -> Callable[[Identity], bool]:
        return lambda identity: entry.since + self._patience.still_s(glimpse.seen(identity)) <= now
