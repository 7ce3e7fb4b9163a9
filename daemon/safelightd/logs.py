"""Logging: a dotted event and its facts, to stderr; with journald's priority prefix under systemd."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Lines(logging.Formatter):
    """`<6>job.finished id=... seconds=41.2` under journald, which has the time; with the time elsewhere."""

    def __init__(self, *, journald: bool) -> None:
        super().__init__("%(message)s" if journald else "%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._journald:
            return text
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in text.splitlines())


class Log:
    """Writes events: `log.info("job.finished", id=..., seconds=41.2)`. Never give it a prompt above debug."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **facts: Any) -> None:
        self._logger.debug("%s", _line(event, facts))

    def info(self, event: str, **facts: Any) -> None:
        self._logger.info("%s", _line(event, facts))

    def warning(self, event: str, **facts: Any) -> None:
        self._logger.warning("%s", _line(event, facts))

    def error(self, event: str, **facts: Any) -> None:
        self._logger.error("%s", _line(event, facts))

    def exception(self, event: str, **facts: Any) -> None:
        """An event with the traceback of the exception being handled."""
        self._logger.exception("%s", _line(event, facts))  # noqa: LOG004 - called inside the caller's handler


def _line(event: str, facts: dict[str, Any]) -> str:
    shown = (f"{name}={_fact(value)}" for name, value in facts.items() if value is not None)
    return " ".join([event, *shown])


def _fact(value: Any) -> str:
    text = f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return repr(text) if " " in text or not text.isprintable() or not text else text


def _is_journal() -> bool:
    """Whether stderr is what systemd connected to the journal: a terminal that is itself a service hands down
    JOURNAL_STREAM, too (systemd.exec(5))."""
    stat = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def set_up(*, verbose: bool = False) -> None:
    """Send all loggers to stderr; libraries speak from warning up."""
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(_Lines(journald=_is_journal()))
    root = logging.getLogger()
    root.handlers[:] = [to_stderr]
    root.setLevel(logging.WARNING)
    logging.getLogger("safelight").setLevel(logging.DEBUG if verbose else logging.INFO)
