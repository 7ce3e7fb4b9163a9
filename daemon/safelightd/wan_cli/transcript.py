"""What Wan's own program says, read as it comes: how far it is, and its last words. Pure.

It logs to stdout and draws tqdm's bars on stderr, each over the one before by a carriage return. Of loading, encoding
and decoding it tells the beginning alone.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal, get_args

Stage = Literal["load", "encode", "denoise", "decode"]
STAGES: tuple[Stage, ...] = get_args(Stage)

SAID_LINES = 40
"""So many lines are kept for its last words: a traceback has about as many."""

PENDING_BYTES_MAX = 1 << 16
WORDS_CHARACTERS_MAX = 400

_LINE_END = re.compile(rb"[\r\n]")
_BAR = re.compile(r"\d{1,3}%\|[^|]*\|\s*(\d{1,9})/(\d{1,9})\s*\[[\d:]+<[\d:?]+,\s*[\d.?]+\s*(?:s/it|it/s)[^\]]*\]")
_LOGGED = re.compile(r"\[\d{4}-\d\d-\d\d [^\]]*\] [A-Z]+: ")
_CREATING = re.compile(_LOGGED.pattern + r"Creating \w+ pipeline")
_GENERATING = re.compile(_LOGGED.pattern + r"Generating video")
_ERROR = re.compile(r"([A-Za-z_][\w.]*(Error|Exception|Interrupt)\b|\S+: error: )")
_UNSAVED = re.compile(r"\b\w+ failed, error: .*")


class Transcript:
    """Takes the program's output in whatever pieces it comes."""

    def __init__(self, steps: int) -> None:
        self.stage: Stage = "load"
        self.step = 0
        """Steps of denoising that are done."""
        self.said: deque[str] = deque(maxlen=SAID_LINES)
        """The last lines that are no bars."""
        self._steps = steps
        self._pending = b""

    def feed(self, piece: bytes) -> None:
        """Take what came next; it may end within a line, and within a character."""
        *lines, pending = _LINE_END.split(self._pending + piece)
        self._pending = pending[-PENDING_BYTES_MAX:]
        for line in lines:
            self._take(line.decode(errors="replace"))
        self._look_at_bars(self._pending.decode(errors="replace"))  # the bar of now is followed by nothing yet

    def close(self) -> None:
        """Take what was left as the last line."""
        self.feed(b"\n")

    def is_past(self, stage: Stage) -> bool:
        return STAGES.index(self.stage) > STAGES.index(stage)

    @property
    def unlogged(self) -> list[str]:
        """The last lines that are not of its log: there it repeats the prompt."""
        return [line for line in self.said if not _LOGGED.match(line)]

    @property
    def words(self) -> str:
        """What it said of its end: an error where it named one."""
        errors = [line for line in self.unlogged if _ERROR.match(line)]
        unsaved = [found[0] for line in self.said if (found := _UNSAVED.search(line))]
        lasts = [lines[-1][:WORDS_CHARACTERS_MAX].rstrip(".") for lines in (errors, unsaved, self.unlogged) if lines]
        return next(filter(None, lasts), "it said nothing of it")

    def _take(self, line: str) -> None:
        rest = self._look_at_bars(line).strip()
        if not rest:
            return
        if _CREATING.match(rest):
            self.said.clear()  # a prompt of several lines is among what came before
        self.said.append(rest)
        if self.stage == "load" and _GENERATING.match(rest):
            self.stage = "encode"

    def _look_at_bars(self, line: str) -> str:
        """Note the step of the last bar in a line, and return what follows it. While it loads, it draws others."""
        end = 0
        for bar in _BAR.finditer(line):
            end = bar.end()
            step, steps = int(bar[1]), int(bar[2])
            if self.stage == "load" or steps != self._steps:
                continue
            self.step = max(self.step, min(step, steps))
            self.stage = "decode" if self.step == steps else max(self.stage, "denoise", key=STAGES.index)
        return line[end:]
