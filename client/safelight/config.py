"""The settings: read once, frozen, passed in. Flag over file over default; config/safelight.toml lists them all."""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from safelight import paths as _paths
from safelight.errors import BadConfig
from safelight.plan import Attention

SYSTEM_STATE = Path("/var/lib/safelight")
"""StateDirectory= of the system units."""

_WINDOW = re.compile(r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")


def _window(value: str) -> str:
    if value and not _WINDOW.match(value):
        raise ValueError('write it as "23:00-07:00", or "" for none')
    if value and value[:5] == value[6:]:
        raise ValueError('it begins when it ends and would never open; "" opens it at every hour')
    return value


def _command(value: str) -> str:
    try:
        shlex.split(value)
    except ValueError as error:
        raise ValueError(f"it cannot be split into words: {str(error).lower()}") from error
    return value


def _place(value: str) -> str:
    if "\0" in value:
        raise ValueError("it has a NUL character, which no name can have")
    try:
        Path(value).expanduser()
    except RuntimeError as error:  # ~someone, who is not a user here
        raise ValueError("it has no home folder; write the folder itself") from error
    return value


def _gib(value: object) -> object:
    is_size = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not is_size and value != "auto":
        raise ValueError('write a number of GiB, or "auto"')
    return value


def _limit(value: object) -> object:
    is_size = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not is_size and value != "off":
        raise ValueError('write a number, or "off"')
    return value


Gib = Annotated[float | Literal["auto"], BeforeValidator(_gib)]
Place = Annotated[str, AfterValidator(_place)]
Limit = Annotated[float | Literal["off"], BeforeValidator(_limit)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PathsSection(_Section):
    inbox: str = Field(default="~/safelight/inbox", min_length=1)
    outbox: str = Field(default="~/safelight/outbox", min_length=1)
    state: str = ""
    models: str = ""


class QueueSection(_Section):
    url: str = ""
    keep_days: int = Field(default=14, ge=1)


class DeadlineSection(_Section):
    """Seconds without progress after which the worker kills the engine, by phase."""

    load: float = Field(default=900, gt=0)
    encode: float = Field(default=600, gt=0)
    denoise: float = Field(default=1800, gt=0)
    decode: float = Field(default=1800, gt=0)
    publish: float = Field(default=600, gt=0)


class WorkerSection(_Section):
    device: Literal["cuda", "cpu"] = "cuda"
    gpu: str = "0"
    vram_gib: Gib = "auto"
    ram_gib: Gib = "auto"
    host_cache_gib: Gib = "auto"
    attention: Literal["auto"] | Attention = "auto"
    embeddings_gib: float = Field(default=2, ge=0)
    fused_gib: float = Field(default=0, ge=0)
    checkpoint_s: float = Field(default=60, ge=0)
    release: Literal["warm", "process"] = "warm"
    idle_exit_s: float = Field(default=600, ge=0)
    deadline_s: DeadlineSection = DeadlineSection()


class DefaultsSection(_Section):
    """The models of a job that names none."""

    image_model: str = "flux-schnell"
    video_model: str = "wan-ti2v-5b"


class InboxSection(_Section):
    settle_s: float = Field(default=1.0, ge=0)
    unseen_s: float = Field(default=30.0, ge=0)
    partner_s: float = Field(default=60.0, ge=0)
    max_jobs_per_file: int = Field(default=10_000, ge=1)


class PolicySection(_Section):
    on_battery: Literal["pause", "run"] = "pause"
    window: Annotated[str, AfterValidator(_window)] = ""
    min_free_disk_gib: float = Field(default=2, ge=0)
    thermal_ceiling_c: Limit = "off"
    gpu_busy_gib: Limit = "off"


class RetentionSection(_Section):
    """How long what has ended is kept; 0 = for ever."""

    outputs_days: float = Field(default=0, ge=0)
    uncollected: Literal["keep", "remove"] = "keep"
    ledger_days: float = Field(default=0, ge=0)


class NotifySection(_Section):
    """How a person is told that the line is empty, a hold lasts, no job gets through, or one was set aside."""

    command: Annotated[str, AfterValidator(_command)] = ""
    desktop: bool = False
    hold_minutes: float = Field(default=10, gt=0)


class OutputSection(_Section):
    metadata: bool = True
    poster: bool = True


class WanCliSection(_Section):
    """Wan's own program, for jobs with `backend: wan-cli`."""

    checkout: Place = ""
    python: Place = ""

    @model_validator(mode="after")
    def _check(self) -> WanCliSection:
        if self.python and not self.checkout:
            raise ValueError("python is of no use without checkout, the folder of Wan-Video/Wan2.2")
        return self


class Settings(_Section):
    """The settings file as written; every default is here and nowhere else."""

    paths: PathsSection = PathsSection()
    queue: QueueSection = QueueSection()
    worker: WorkerSection = WorkerSection()
    defaults: DefaultsSection = DefaultsSection()
    inbox: InboxSection = InboxSection()
    policy: PolicySection = PolicySection()
    output: OutputSection = OutputSection()
    notify: NotifySection = NotifySection()
    retention: RetentionSection = RetentionSection()
    wan_cli: WanCliSection = WanCliSection()
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """One installation: its settings, the file they came from (which may not exist) and its folders."""

    settings: Settings
    source: Path
    paths: _paths.Paths

    @cached_property
    def url(self) -> str:
        """The queue server's URL; the embedded server's socket when none is configured."""
        return self.settings.queue.url or f"unix://{self.paths.socket}"

    @property
    def embedded(self) -> bool:
        return not self.settings.queue.url

    @property
    def without_a_gpu(self) -> str:
        """What a person does on a machine that has none: never the CPU by itself."""
        return (
            f'On a machine without a GPU: write [worker] device = "cpu" into {self.source} and start the daemon again.'
        )

    @property
    def wan_checkout(self) -> Path:
        """The folder of Wan's own program, where the settings name one."""
        return self.beside_settings(self.settings.wan_cli.checkout)

    @property
    def wan_python(self) -> Path:
        """The Python that runs it: the one named, else that of an environment in its folder."""
        written = self.settings.wan_cli.python
        return self.beside_settings(written) if written else self.wan_checkout / ".venv" / "bin" / "python"

    def beside_settings(self, written: str) -> Path:
        """Return a path of the settings: `~` expanded, a relative one taken from the file's folder."""
        return (self.source.parent / Path(written).expanduser()).absolute()

    def with_gpu(self, gpu: str) -> Config:
        """Return the same for another GPU (index or UUID): a machine has one settings file and a worker a GPU."""
        worker = self.settings.worker.model_copy(update={"gpu": gpu})
        return replace(self, settings=self.settings.model_copy(update={"worker": worker}))


def load(env: Mapping[str, str] | None = None, file: Path | None = None) -> Config:
    """Return the settings of the installation that `env` points at.

    The file is `file`, else SAFELIGHT_CONFIG, else `safelight.toml` in the configuration folder. A file that was
    named must exist; the default one need not.

    Raises:
        BadConfig: the file cannot be read or says something illegal; every fault is listed.
    """
    env = os.environ if env is None else env
    named = file or (Path(env["SAFELIGHT_CONFIG"]).expanduser() if env.get("SAFELIGHT_CONFIG") else None)
    source = named or _paths.config_home(env) / "safelight.toml"
    settings = _read(source, otherwise="leave --config out" if file else "unset SAFELIGHT_CONFIG" if named else "")
    state = _folder(settings.paths.state, source) or _paths.state_home(env)
    folders = _paths.Paths(
        inbox=_folder(settings.paths.inbox, source) or Path(),
        outbox=_folder(settings.paths.outbox, source) or Path(),
        state=state,
        models=_folder(settings.paths.models, source) or _paths.data_home(env) / "models",
        runtime=_paths.runtime_home(env, state),
    )
    return Config(settings=settings, source=source, paths=folders)


def for_client(
    env: Mapping[str, str] | None = None,
    file: Path | None = None,
    *,
    system_config: Path = _paths.SYSTEM_CONFIG,
    system_runtime: Path = _paths.SYSTEM_RUNTIME,
    system_state: Path = SYSTEM_STATE,
) -> Config:
    """Return the settings of the daemon that a person's commands are meant for.

    A file that was named (`file`, or SAFELIGHT_CONFIG) decides. Else it is the user's own daemon where that listens
    or names a server; else the system's, where that listens; else the user's, which is then the one to start.

    Raises:
        BadConfig: the settings are wrong, or the system's cannot be read.
    """
    env = os.environ if env is None else env
    own = load(env, file)
    if file or env.get("SAFELIGHT_CONFIG") or not own.embedded or _listens(own.paths.socket):
        return own
    system_env = {
        **env,
        "CONFIGURATION_DIRECTORY": str(system_config.parent),
        "STATE_DIRECTORY": str(system_state),
        "XDG_DATA_HOME": str(system_state.parent),
        "RUNTIME_DIRECTORY": str(system_runtime),
    }
    if not _listens(system_runtime / "redis" / "redis.sock"):
        return own
    return load(system_env)


def _listens(path: Path) -> bool:
    """Whether a server listens on a unix socket: the file alone outlives a server that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True


def _folder(written: str, source: Path) -> Path | None:
    """Expand `~` and take a relative path as relative to the settings file, so that a folder can be moved whole."""
    if "\0" in written:
        raise BadConfig(f"{source}: {written!r} has a NUL character, which no folder's name can have. Remove it.")
    try:
        return (source.parent / Path(written).expanduser()).absolute() if written else None
    except RuntimeError as error:  # ~someone, who is not a user here
        raise BadConfig(f"{source}: {written} has no home folder. Write the folder itself.") from error


def _read(source: Path, *, otherwise: str) -> Settings:
    """Return what a file says.

    Args:
        otherwise: what a person does who has named a file that is not there; "" where nobody has, and it need not be.

    Raises:
        BadConfig: it cannot be read, or says something illegal.
    """
    try:
        raw = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if otherwise:
            raise BadConfig(f"{source}: there is no such settings file. Write it, or {otherwise}.") from None
        return Settings()
    except UnicodeDecodeError as error:
        raise BadConfig(f"{source}: byte {error.start} is not UTF-8. Save it as UTF-8.") from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{source}: {error}.") from error
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise BadConfig("\n".join(f"{source}: {_explain(fault)}" for fault in error.errors())) from error


def _explain(fault: Mapping[str, Any]) -> str:
    """Return pydantic's fault as a sentence a person can act on, with the nearest known key."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{where} = {fault['input']!r}: {fault['msg'].removeprefix('Value error, ')}."
    known = known_keys()
    if "." not in where:
        known = sorted({name.partition(".")[0] for name in known})
    near = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
    key = where.rsplit(".", 1)[-1]
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == key]
    return f"{where}: no such setting. " + (f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}.")


def known_keys() -> list[str]:
    """Return every setting as `section.key`."""

    def walk(model: type[BaseModel], prefix: str) -> list[str]:
        keys: list[str] = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                keys += walk(inner, f"{prefix}{name}.")
            else:
                keys.append(prefix + name)
        return keys

    return walk(Settings, "")


def shipped(name: str) -> Path:
    """Return the path of a file or folder that comes with safelight: from the wheel, or from the checkout.

    `loras`, `models.toml`, `safelight.toml`, `samples`, `systemd`.
    """
    in_wheel = Path(__file__).parent / "shipped" / name
    if in_wheel.exists():
        return in_wheel
    checkout = Path(__file__).parents[2]
    return checkout / name if name == "systemd" else checkout / "config" / name
