"""What a soak asks for: prompts with an expected end, the files and commands that bring them, and cancellations."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.scratch import Scratch
from safelight.jobspec import PRIORITIES

PRIORITY_SHARES = (0.15, 0.6, 0.15, 0.1)
"""Of high, normal, low and night."""

SHEET_JOBS_MAX = 4
ADD_SHARE = 0.25
"""Of the sheets that come by `safelight add`; the rest are dropped into the inbox."""

BROKEN_EVERY = 12
"""One sheet in so many is followed by a file that no daemon can read, which must be refused with a reason."""

SLOW = "--model tiny-flux-dev --steps 30"
CLIP = "--model tiny-wan-ti2v --frames 5 --steps 2"


@dataclass
class Wish:
    """One job that is asked for, how it must end, and what became known of it."""

    number: int
    word: str
    priority: str
    cancel: bool = False
    options: str = ""
    job: str = ""
    """Its id, once the queue or the client has named it."""
    cancelling: bool = False
    answer: str = ""
    """What `safelight cancel` said of it."""

    @property
    def prompt(self) -> str:
        return f"{self.word} {self.number:05d} a red fox"

    def ends(self) -> frozenset[str]:
        """Return the states in which this job may end."""
        if self.answer == "cancelled":
            return frozenset({"cancelled"})
        meant = {"faulty": "failed", "poison": "quarantined", "hang": "quarantined"}.get(self.word, "done")
        return frozenset({meant, "cancelled"}) if self.answer == "running: asked to stop" else frozenset({meant})


@dataclass
class Sheet:
    """Jobs that come together: one file, or one `safelight add`."""

    number: int
    priority: str
    wishes: list[Wish] = field(default_factory=list)
    by_add: bool = False

    @property
    def name(self) -> str:
        return f"sheet-{self.number:04d}.txt"

    @property
    def is_broken(self) -> bool:
        return not self.wishes

    def text(self) -> str:
        if self.is_broken:
            return '--prompt "a red fox" --steps many\n'
        return "".join(f'--prompt "{wish.prompt}" {wish.options}\n' for wish in self.wishes)


def sheets(jobs: int, rng: random.Random, *, with_clips: bool, with_hangs: bool, harmful_until: int) -> list[Sheet]:
    """Return the sheets of a soak, in the order in which they come.

    Args:
        with_clips: some pictures are clips instead.
        with_hangs: some jobs hang until their deadline.
        harmful_until: jobs from here on spare the engine.
    """
    words = _words(jobs, rng, harmful_until, with_hangs=with_hangs)
    found: list[Sheet] = []
    number = 0
    while number < jobs:
        taken = words[number : number + rng.randint(1, SHEET_JOBS_MAX)]
        priority = rng.choices(PRIORITIES, PRIORITY_SHARES)[0]
        if {"poison", "hang"} & set(taken):
            priority = "normal"  # at night it would come when the engine is to be spared
        sheet = Sheet(len(found), priority, by_add=rng.random() < ADD_SHARE)
        for word in taken:
            sheet.wishes.append(_wish(number, word, priority, rng, with_clips=with_clips and not sheet.by_add))
            number += 1
        if sheet.by_add and len({wish.options for wish in sheet.wishes}) > 1:
            sheet.by_add = False  # a command's options are all its prompts'
        found.append(sheet)
        if len(found) % BROKEN_EVERY == BROKEN_EVERY - 1:
            found.append(Sheet(len(found), "normal"))
    return found


def _words(jobs: int, rng: random.Random, harmful_until: int, *, with_hangs: bool) -> list[str]:
    """Return what each job does; the first few hold one of each kind, so that a short soak has them too."""
    words = rng.choices(("ok", "slow", "faulty"), (0.82, 0.12, 0.06), k=jobs)
    harmful = ["poison"] * max(1, jobs // 50) + ["hang"] * (with_hangs * (jobs // 200))
    places = rng.sample(range(harmful_until), len(harmful) + 2)
    for place, word in zip(places, [*harmful, "slow", "faulty"], strict=True):
        words[place] = word
    return words


def _wish(number: int, word: str, priority: str, rng: random.Random, *, with_clips: bool) -> Wish:
    options = SLOW if word == "slow" else ""
    if word == "ok" and with_clips and rng.random() < 0.1:
        options = CLIP
    return Wish(number, word, priority, cancel=word in ("ok", "slow") and rng.random() < 0.12, options=options)


def drop(sheet: Sheet, inbox: Path) -> bool:
    """Put a sheet's file into the inbox as an editor saves it; False while the disk is full."""
    folder = inbox if sheet.priority == "normal" else inbox / sheet.priority
    part = folder / f".{sheet.name}.writing"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(sheet.text(), encoding="utf-8")
        part.rename(folder / sheet.name)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        part.unlink(missing_ok=True)
        return False
    return True


def add_words(sheet: Sheet) -> list[str]:
    """Return the client's words that queue a sheet."""
    return [
        "add",
        *(wish.prompt for wish in sheet.wishes),
        "--priority",
        sheet.priority,
        *sheet.wishes[0].options.split(),
    ]


@dataclass(frozen=True)
class Said:
    """How a client command ended."""

    status: int
    out: str
    err: str


class Commands:
    """Client commands that run beside the soak; each tells its caller when it has ended."""

    def __init__(self, place: Scratch) -> None:
        self._place = place
        self._running: list[tuple[subprocess.Popen[str], Callable[[Said], None]]] = []
        self.statuses: dict[str, int] = {}
        """How often which command ended how, as "add 0"."""

    def start(self, words: list[str], then: Callable[[Said], None]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "safelight.cli", *words],
            env=self._place.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

        def ended(said: Said) -> None:
            key = f"{words[0]} {said.status}"
            self.statuses[key] = self.statuses.get(key, 0) + 1
            then(said)

        self._running.append((process, ended))

    def tend(self) -> None:
        """Tell the callers of those that have ended."""
        for entry in list(self._running):
            process, ended = entry
            if process.poll() is not None:
                out, err = process.communicate()
                self._running.remove(entry)
                ended(Said(process.returncode, out, err))

    @property
    def busy(self) -> int:
        return len(self._running)
