"""The systemd units: rendered from the shipped templates, installed for one person or for the machine, and removed.

Knows systemctl, systemd-sysusers and systemd-tmpfiles as programs to run. Does not import the daemon and does not know
what it does; what each setting of a unit is for stands in the templates.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from safelight import config as settings
from safelight import durable, registered
from safelight.config import Config, PathsSection, Settings
from safelight.errors import BadConfig, SafelightError
from safelight.paths import SYSTEM_CONFIG, SYSTEM_RUNTIME, Paths

Kind = Literal["user", "system"]

SYSTEM_FOLDERS = {name: settings.SYSTEM_STATE / name for name in ("inbox", "outbox", "state", "models")}
"""[paths] of a system installation, as systemd/system/tmpfiles.conf makes them."""

HIDDEN = tuple(Path(folder) for folder in ("/home", "/root", "/run/user", "/tmp", "/var/tmp"))  # noqa: S108 - named, not used
"""What ProtectHome= and PrivateTmp= of the system units hide."""

_PLACES = {"sysusers.conf": "etc/sysusers.d/safelight.conf", "tmpfiles.conf": "etc/tmpfiles.d/safelight.conf"}
_RULE = "etc/polkit-1/rules.d/50-safelight.rules"
"""Where polkit reads it; only root may write there, and often only polkit's own account may look."""

_SYSTEM_UNITS = "etc/systemd/system"
_GPU = re.compile(r"[0-9A-Za-z:_.-]{1,120}")
_PLACEHOLDER = re.compile(r"@(safelightd|environment|state|inbox|outbox|models|registered|families|gpu|person)@")
_WORKER = re.compile(r"^Wants=(safelight-worker@\S+)$", re.MULTILINE)
_PLAIN_WORD = re.compile(r"[\w./:=,+@-]+", re.ASCII)


def render(kind: Kind, *, program: Path, config: Config, gpu: str) -> dict[str, str]:
    """Return the files of one set, by name: units, and for the system its account and folders.

    `program` is the absolute path of `safelightd`, `gpu` the index or UUID of the GPU that the worker takes. With a
    server of one's own in [queue] url there is no unit for ours; with one behind TCP the units keep their network.

    Raises:
        BadConfig: a path or the GPU cannot be written into a unit.
    """
    if not _GPU.fullmatch(gpu):
        raise BadConfig(f"GPU {gpu!r}: not an index or a UUID. `nvidia-smi -L` lists both.")
    if set(str(program)) & set("\"'\\"):  # string_is_safe() of systemd, also when they are escaped
        raise BadConfig(f"{program}: systemd runs no program with a quote or a backslash in its path. Move it.")
    local = config.url.startswith("unix://")
    values = {
        "safelightd": _word(str(program)),
        "environment": " ".join(_word(f"{name}={value}") for name, value in _environment(config).items()),
        "families": "AF_UNIX" if local else "AF_UNIX AF_INET AF_INET6",
        "gpu": gpu,
        "person": json.dumps("safelight" if kind == "system" else pwd.getpwuid(os.getuid()).pw_name),
        **{name: _word(str(getattr(config.paths, name))) for name in SYSTEM_FOLDERS},
        # PathChanged= takes the rest of its line: nothing in it is quoted, and % alone means something
        "registered": str(config.paths.models / registered.FOLDER).replace("%", "%%"),
    }
    unwanted = () if local else ("PrivateNetwork=", "IPAddressDeny=")
    texts = {}
    for template in _templates(kind):
        if template.name == "safelight-redis.service":
            if config.embedded:
                texts[template.name] = _fill(template.read_text(), values)
            continue
        lines = template.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(unwanted)]
        if not config.embedded:
            kept = [line for line in kept if "safelight-redis.service" not in line]
        texts[template.name] = _fill("".join(kept), values)
    return texts


def install(*, system: bool, gpu: str | None, dry_run: bool, config: Config, root: Path = Path("/")) -> list[str]:
    """Put the units in place, enable and start them; return what was done, a line each.

    Writes only what differs, so a second call changes nothing. A system installation has settings and folders of its
    own: `config` is the user's and is not read then. `gpu` is an index or UUID; None is [worker] gpu. With `root` the
    files go below that folder and nothing starts. Where systemd does not run, a line says what is left to do.

    Raises:
        BadConfig: the daemon is not installed, the units could not reach a path, or the caller is not root.
        SafelightError: systemd refused.
    """
    kind: Kind = "system" if system else "user"
    program = daemon_program()
    if system:
        config = system_config(root)
        programs = [program, Path(sys.executable).resolve()] if root == Path("/") else []
        _refuse_hidden([*programs, *(getattr(config.paths, name) for name in SYSTEM_FOLDERS)])
        _refuse_without_root(root, dry_run=dry_run)
    gpu = gpu or config.settings.worker.gpu
    machine = _Machine.of(kind, root)
    texts = render(kind, program=program, config=config, gpu=gpu)
    wanted = {machine.place(name): text for name, text in texts.items()}
    stale = [machine.place(template.name) for template in _templates(kind) if template.name not in texts]
    source = machine.below(config.source.absolute())
    sample = system_settings() if system else settings.shipped("safelight.toml").read_text()
    commands = machine.commands_to_leave_gpu(gpu) + machine.commands_to_start()
    if dry_run:
        lines = [f"would write {path}:\n{text}" for path, text in wanted.items()]
        lines += [] if source.exists() else [f"would write {source} (every setting, at its default)"]
        return lines + [f"would run: {' '.join(command)}" for command in commands]
    lines = [] if source.exists() else [_write(source, sample)]
    was_there = any(path.exists() for path in wanted)
    written = [_write_unit(path, text) for path, text in wanted.items()]
    lines += written + [_remove(path) for path in stale if path.exists()]
    lines += machine.run(commands)
    if was_there and machine.is_up and any(line.startswith("wrote") for line in written):
        lines.append(
            f"Services that run keep their old unit until: {machine.systemctl} restart safelight.target "
            "(a running job is put back and goes on)."
        )
    return lines + machine.advice()


def uninstall(*, system: bool, dry_run: bool, root: Path = Path("/")) -> list[str]:
    """Stop, disable and remove the units; return what was done, a line each. Settings and data stay.

    Raises:
        BadConfig: the caller is not root.
        SafelightError: systemd refused.
    """
    kind: Kind = "system" if system else "user"
    machine = _Machine.of(kind, root)
    present = [path for path in (machine.place(template.name) for template in _templates(kind)) if path.exists()]
    if not present:
        return [f"No {kind} units of safelight are installed."]
    if system:
        _refuse_without_root(root, dry_run=dry_run)
    if dry_run:
        lines = [f"would run: {' '.join(command)}" for command in machine.commands_to_stop()]
        return lines + [f"would remove {path}" for path in present]
    lines = machine.run(machine.commands_to_stop())
    lines += [_remove(path) for path in present]
    if machine.is_up:
        lines += machine.run([[*machine.systemctl_words, "daemon-reload"]])
    return [*lines, "Kept: settings, jobs, models and outputs" + (", and the account safelight." if system else ".")]


def daemon_program() -> Path:
    """Return the `safelightd` that belongs to this installation.

    Raises:
        BadConfig: only the client is installed.
    """
    beside = Path(sys.executable).with_name("safelightd")
    found = beside if beside.is_file() else shutil.which("safelightd")
    if not found or find_spec("torch") is None:
        raise BadConfig("The daemon is not installed here: pip install 'safelight[daemon]'.")
    return Path(found).absolute()


def system_settings() -> str:
    """Return the text of a new /etc/safelight/safelight.toml: the sample, with the folders of the system."""
    text = settings.shipped("safelight.toml").read_text()
    for name, folder in SYSTEM_FOLDERS.items():
        text = re.sub(rf'^# {name} = ".*"$', f'{name} = "{folder}"', text, flags=re.MULTILINE)
    return text


def system_config(root: Path = Path("/")) -> Config:
    """Return the settings that the system's services read, or would read once installed.

    Raises:
        BadConfig: the file is there and wrong.
    """
    source = root / SYSTEM_CONFIG.relative_to("/")
    if not source.is_file():
        written = Settings(paths=PathsSection(**{name: str(folder) for name, folder in SYSTEM_FOLDERS.items()}))
        return Config(written, SYSTEM_CONFIG, Paths(**SYSTEM_FOLDERS, runtime=SYSTEM_RUNTIME))
    state = settings.SYSTEM_STATE
    env = {"STATE_DIRECTORY": state, "XDG_DATA_HOME": state.parent, "RUNTIME_DIRECTORY": SYSTEM_RUNTIME}
    loaded = settings.load({name: str(folder) for name, folder in env.items()}, source)
    return replace(loaded, source=SYSTEM_CONFIG)


def hidden_from_system_units(paths: Iterable[Path]) -> list[Path]:
    """Return those of `paths` that a system unit could not see."""
    return [path for path in paths if any(path.is_relative_to(folder) for folder in HIDDEN)]


def _refuse_hidden(paths: Iterable[Path]) -> None:
    if hidden := hidden_from_system_units(paths):
        raise BadConfig(
            "\n".join(
                f"{path}: a system service sees no home folder and no /tmp. Install safelight for everybody, as in "
                f"/opt/safelight, keep the folders of {SYSTEM_CONFIG} elsewhere, or install the user service."
                for path in hidden
            )
        )


def _refuse_without_root(root: Path, *, dry_run: bool) -> None:
    if root == Path("/") and os.geteuid() != 0 and not dry_run:
        raise BadConfig("The system's services need root: call it with sudo, or use --user.")


def _templates(kind: Kind) -> list[Path]:
    return sorted((settings.shipped("systemd") / kind).iterdir())


def _environment(config: Config) -> dict[str, Path]:
    """Return what makes the services find what this client finds.

    A shell may have XDG variables that systemd's services lack. What the settings file names needs no variable.
    """
    env = {"SAFELIGHT_CONFIG": config.source.absolute()}
    if not config.settings.paths.state:
        env["XDG_STATE_HOME"] = config.paths.state.parent
    if not config.settings.paths.models:
        env["XDG_DATA_HOME"] = config.paths.models.parent.parent
    return env


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _word(text: str) -> str:
    """Return one word of a unit's setting (systemd.syntax(7), systemd.unit(5) for `%`).

    Raises:
        BadConfig: no unit can say it.
    """
    if _PLAIN_WORD.fullmatch(text):
        return text
    if not text.isprintable():
        raise BadConfig(f"{text!r}: a systemd unit cannot name this path. Rename it without control characters.")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _write(path: Path, text: str) -> str:
    if path.is_file() and path.read_text() == text:
        return f"unchanged {path}"
    durable.write(path, text.encode())
    return f"wrote {path}"


def _write_unit(path: Path, text: str) -> str:
    line = _write(path, text)
    path.chmod(0o644)  # whatever the umask: systemd complains of units that only root may read
    return line


def _remove(path: Path) -> str:
    path.unlink()
    return f"removed {path}"


@dataclass(frozen=True)
class _Machine:
    """Where the files of one set go, and the service manager that reads them."""

    kind: Kind
    root: Path
    units: Path
    is_up: bool
    """Whether that manager runs and can be asked."""

    @classmethod
    def of(cls, kind: Kind, root: Path) -> _Machine:
        here = root == Path("/")
        if kind == "system":
            return cls(kind, root, root / _SYSTEM_UNITS, here and Path("/run/systemd/system").is_dir())  # sd_booted(3)
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config").absolute()
        return cls(kind, root, root / (home / "systemd/user").relative_to("/"), here and _user_manager().exists())

    def below(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def place(self, name: str) -> Path:
        if name == "polkit.rules":
            return self.root / _RULE if self.kind == "system" else self.units.parents[1] / "safelight" / name
        return self.root / _PLACES[name] if name in _PLACES else self.units / name

    @property
    def systemctl_words(self) -> list[str]:
        return ["systemctl", "--user"] if self.kind == "user" else ["systemctl"]

    @property
    def systemctl(self) -> str:
        return " ".join(self.systemctl_words)

    def commands_to_start(self) -> list[list[str]]:
        commands = []
        if self.kind == "system":
            commands = [
                ["systemd-sysusers", f"--root={self.root}", "safelight.conf"],
                ["systemd-tmpfiles", f"--root={self.root}", "--create", "safelight.conf"],
            ]
        if self.is_up:
            commands.append([*self.systemctl_words, "daemon-reload"])
            # READY may take minutes: --no-block leaves that to `systemctl status`.
            commands.append([*self.systemctl_words, "enable", "--now", "--no-block", "safelight.target"])
        elif self.kind == "system":
            commands.append(["systemctl", f"--root={self.root}", "enable", "safelight.target"])
        return commands

    def commands_to_leave_gpu(self, gpu: str) -> list[list[str]]:
        """Return what stops the worker of the GPU that was installed before: no unit names it any more."""
        target = self.place("safelight.target")
        before = _WORKER.search(target.read_text()) if self.is_up and target.is_file() else None
        if before is None or before[1] == f"safelight-worker@{gpu}.service":
            return []
        return [[*self.systemctl_words, "stop", before[1]]]

    def commands_to_stop(self) -> list[list[str]]:
        names = ["safelight.target", "safelight-worker@.service"]  # a template's name means all its instances
        if not self.is_up:
            return [["systemctl", f"--root={self.root}", "disable", *names]] if self.kind == "system" else []
        # Stopping the target returns before its services have stopped, so they are named.
        services = ["safelight-worker@*.service", "safelight-inbox.service", "safelight-redis.service"]
        services += ["safelight-digests.path", "safelight-digests.service"]
        return [
            [*self.systemctl_words, "disable", *names],
            [*self.systemctl_words, "stop", "safelight.target", *services],
        ]

    def run(self, commands: Iterable[Sequence[str]]) -> list[str]:
        """Run each command; return a line each, also for one that is not installed here.

        Raises:
            SafelightError: a command failed.
        """
        lines = []
        for command in commands:
            shown = " ".join(command)
            if not shutil.which(command[0]):
                lines.append(f"{command[0]} is not installed here. Left to do: {shown}")
                continue
            env = {"XDG_RUNTIME_DIR": str(_user_runtime())} if self.kind == "user" else {}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
            if done.returncode:
                raise SafelightError(f"{shown}: {done.stderr.strip() or f'ended with status {done.returncode}'}")
            lines.append(f"ran {shown}")
        return lines

    def advice(self) -> list[str]:
        if self.root != Path("/") and self.kind == "system":
            return []
        lines = []
        if self.is_up:
            lines.append(f"See: {self.systemctl} status 'safelight*'")
        else:
            reload = f"{self.systemctl} daemon-reload && {self.systemctl} enable --now safelight.target"
            lines.append(f"systemd does not run here, so nothing was started. Where it does: {reload}")
            lines.append("Without systemd: safelight up.")
        if self.kind == "system":
            return [*lines, "Let somebody use it: usermod -aG safelight NAME"]
        name = pwd.getpwuid(os.getuid()).pw_name
        if not (self.root / "var/lib/systemd/linger" / name).exists():
            lines.append(f"The services stop when you log out. To keep them: loginctl enable-linger {name}")
        if not os.access(self.root / _RULE, os.F_OK):
            lines.append(
                "A job cannot keep the machine awake while you are logged out: sleep then puts it back into the queue. "
                f"To allow it: sudo install -m 644 {shlex.quote(str(self.place('polkit.rules')))} /{_RULE}"
            )
        return lines


def _user_runtime() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")


def _user_manager() -> Path:
    """Return the socket on which systemd's manager of this user listens."""
    return _user_runtime() / "systemd/private"
