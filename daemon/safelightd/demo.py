"""`safelight demo`: prompt files become pictures and clips before your eyes, through the whole daemon.

Real server, inbox, worker, engine and diffusers components; only the models are small: demo-flux draws shapes and
demo-wan moves them, as they are told.
Everything lives in one folder that can be deleted; nothing of an installation is touched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from safelight import config as settings
from safelight import durable, queueserver
from safelight.config import Config
from safelight.errors import BadArgument, QueueUnreachable, SafelightError
from safelight.ids import submission_id
from safelight.jobqueue import JobQueue, Row
from safelight.ledger import Ledger
from safelightd import contact_sheet
from safelightd.contact_sheet import Entry
from safelightd.supervisor import Supervisor

MARK = "# Written by `safelight demo`"
"""What the settings of a demo begin with: a folder with other settings is left alone."""

SETTINGS = f"""\
{MARK}: small models on the CPU. Delete this folder when you have seen it.
[paths]
inbox = "inbox"
outbox = "outbox"
state = "state"
models = "models"
[worker]
device = "cpu"
[defaults]
image_model = "demo-flux"
video_model = "demo-wan"
[policy]
min_free_disk_gib = 0
"""

JOBS = 10
"""What the files below come to."""

PROMPTS = {
    "night.txt": "# one job a line\na red circle left of a blue square on a white background\n"
    "a {yellow|pink} star on a black background\n"
    '--prompt "a large green triangle above a small orange circle" --n_iter 2\n'
    "a large blue star <lora:outlines>\n",
    "portrait.md": "---\nnum_inference_steps: 8\ntrue_cfg_scale: 2\n"
    "negative_prompt: a red circle\n---\na circle on a gray background\n",
    "clips.yaml": "defaults:\n  kind: video\njobs:\n"
    "  - prompt: a large green square moving right on a black background\n"
    "  - prompt: a pink circle growing on a gray background\n",
    "high/first.txt": "# the folder says that it is rendered first\na big purple square in the middle\n",
}
SHEET = "contact-sheet.png"


def run(folder: Path, console: Console | None = None) -> int:
    """Show everything in `folder`; returns 0 when every job was done and verified.

    Raises:
        BadArgument: the folder holds something else, or cannot be written.
        KeyboardInterrupt: a signal asked it to end; its processes have ended.
        SafelightError: a job did not end well, with its reason.
    """
    console = console or Console(highlight=False)
    folder = folder.absolute()
    runtime = tempfile.mkdtemp(prefix="safelight-demo-")  # a unix socket's path must be short
    os.environ["XDG_RUNTIME_DIR"] = runtime
    try:
        config = prepare(folder)
        console.print(f"[bold]safelight demo[/] in {folder}")
        show = _Show(config, console, since=submission_id(datetime.now().astimezone()))
        started = time.monotonic()
        drop(config, console)
        with (folder / "daemon.log").open("wb") as log:
            status = Supervisor(config, stderr=log).run(until=show.ended, poll_s=0.2)
        if not show.all_done:
            if status == 0 and not show.bad:
                console.print(f"Stopped. The same command begins anew; {folder} can be deleted.", soft_wrap=True)
                raise KeyboardInterrupt
            reason = "; ".join(show.bad) or f"stopped with status {status}"
            raise SafelightError(f"The demo did not finish: {reason}. {folder / 'daemon.log'} says more.")
        _summary(config, console, show.since, time.monotonic() - started)
        console.print(str(_contact_sheet(config, folder / SHEET, show.since)), soft_wrap=True)
    finally:
        shutil.rmtree(runtime, ignore_errors=True)
    return 0


def prepare(folder: Path) -> Config:
    """Return the demo's settings, which are written into a folder that is new or empty, and kept where they are there.

    Raises:
        BadArgument: the folder holds something else, or cannot be written.
    """
    file = folder / "safelight.toml"
    remedy = "Name a new folder: safelight demo --to FOLDER."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            durable.write(file, SETTINGS.encode())
        elif not (file.is_file() and file.read_bytes().startswith(MARK.encode())):
            raise BadArgument(f"{folder}: there is something in it that is not of an earlier demo. {remedy}")
    except OSError as error:
        raise BadArgument(f"{folder}: the demo cannot be put there ({error.strerror}). {remedy}") from error
    return settings.load(file=file)


def drop(config: Config, console: Console) -> None:
    """Do what a person does in the evening: put prompt files, and a picture beside its text, into the inbox."""
    from PIL import Image, ImageDraw

    inbox = config.paths.inbox
    for name, text in PROMPTS.items():
        (inbox / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox / name).write_text(text, encoding="utf-8")
        console.print(f"  inbox/{name}")
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).regular_polygon((76, 76, 38), 3, fill=(220, 40, 40))
    picture.save(inbox / "triangle.png")
    (inbox / "triangle.txt").write_text("a red triangle moving left on a white background\n", encoding="utf-8")
    console.print("  inbox/triangle.png + triangle.txt (animate this picture)")


class _Show:
    """Prints a line when a job starts and when it ends; of an earlier demo in the same folder it says nothing."""

    def __init__(self, config: Config, console: Console, since: str) -> None:
        self.since = since
        self._config = config
        self._console = console
        self._queue: JobQueue | None = None
        self._seen: dict[str, str] = {}
        self.bad: list[str] = []
        self.all_done = False

    def ended(self) -> bool:
        try:
            self._queue = self._queue or JobQueue(queueserver.connect(self._config.url, timeout_s=2.0, retries=0))
            queue = self._queue
            rows = list(queue.rows([job for job in (*queue.ended_ids(), *queue.running()) if job > self.since]))
        except (QueueUnreachable, *queueserver.AWAY):
            self._queue = None
            return False
        for row in rows:
            if self._seen.get(row.id) != row.state:
                self._line(row)
                self._seen[row.id] = row.state
        notes = self._config.paths.rejected.rglob("*.error.txt")
        refused = [file for file in notes if file.name > self.since]
        self.bad = [f"{row.id}: {row.error}" for row in rows if row.state not in ("running", "done")]
        self.bad += [file.read_text(encoding="utf-8") for file in refused]
        self.all_done = sum(row.state == "done" for row in rows) == JOBS
        return self.all_done or bool(self.bad)

    def _line(self, row: Row) -> None:
        colour = {"running": "cyan", "done": "green"}.get(row.state, "red")
        self._console.print(f"  [{colour}]{row.state:>7}[/] {row.model:<18} {row.prompt}")


def _summary(config: Config, console: Console, since: str, seconds: float) -> None:
    ledger = Ledger(config.paths)
    table = Table(Column("output", overflow="fold"), "size", "seconds")
    for job in sorted(job for job in ledger.ended() if job > since):
        receipt = ledger.receipt(job)
        if receipt is None:
            continue
        spent = sum(phase.seconds for phase in receipt.phases.values())
        for output in receipt.outputs:
            size = f"{output.width}x{output.height}" + (f"x{output.num_frames}" if output.num_frames else "")
            table.add_row(output.path, size, f"{spent:.1f}")
    console.print(table)
    console.print(f"{JOBS} jobs verified and published in {seconds:.0f} s. Outputs and their receipts:")
    console.print(str(config.paths.outbox), soft_wrap=True)
    console.print("All of them on one sheet:")


def _contact_sheet(config: Config, file: Path, since: str) -> Path:
    """Write the pictures, and of each clip the one beside it, with their prompts; return the file."""
    ledger = Ledger(config.paths)
    entries = []
    for job in sorted(job for job in ledger.ended() if job > since):
        receipt = ledger.receipt(job)
        if receipt is None:
            continue
        asked = " ".join([receipt.spec.prompt, *(lora.tag for lora in receipt.spec.loras)])
        entries += [Entry(config.paths.outbox / (output.poster or output).path, asked) for output in receipt.outputs]
    contact_sheet.write(file, entries)
    return file
