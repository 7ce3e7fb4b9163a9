"""What systemd itself says of the rendered units, and the rules that were learnt by booting them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from safelight import config as settings
from safelight import service
from safelight.config import Config, QueueSection
from safelight.errors import BadConfig
from safelight.service import Kind

from .conftest import GPU, KINDS, config_of, written

DAEMONS = ("safelight-redis.service", "safelight-inbox.service", "safelight-worker@.service")

EXPOSURE_MAX = {
    ("system", "safelight-redis.service"): 0.4,
    ("system", "safelight-inbox.service"): 0.4,
    ("system", "safelight-worker@.service"): 1.2,
    ("system", "safelight-digests.service"): 0.4,
    ("user", "safelight-redis.service"): 6.1,
    ("user", "safelight-inbox.service"): 6.1,
    ("user", "safelight-worker@.service"): 6.3,
    ("user", "safelight-digests.service"): 6.1,
}
"""Measured with `systemd-analyze security --offline=true` of systemd 252, 2026-11-22: 0 is best. safelight-gpu.service
loads kernel modules as root and is not in it."""

FATAL_FOR_USERS = (
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectKernelModules=",
    "ProtectKernelLogs=",
    "ProtectClock=",
    "PrivateDevices=",
    "User=",
    "Group=",
)
"""With these a user's manager of systemd 252 starts nothing: 218/CAPABILITIES, 216/GROUP."""

needs_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed: the units were not verified"
)


def analyze(kind: Kind, *words: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", f"--{kind}", "--no-pager", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(runtime), "HOME": str(runtime), "LC_ALL": "C.UTF-8"},
    )


def rendered(kind: Kind, config: Config) -> dict[str, str]:
    return service.render(kind, program=Path("/bin/true"), config=config_of(kind, config), gpu=GPU)


def values(text: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


@needs_analyze
@pytest.mark.parametrize("kind", KINDS)
def test_systemd_accepts_every_unit_without_a_word(kind: Kind, config: Config, tmp_path: Path) -> None:
    units = written(kind, config, tmp_path / kind, Path("/bin/true"))

    said = analyze(kind, "verify", *map(str, units), runtime=tmp_path)

    assert (said.returncode, said.stderr) == (0, "")


@needs_analyze
def test_a_misspelt_setting_would_be_noticed(config: Config, tmp_path: Path) -> None:
    """The test above can fail: systemd only warns of unknown keys."""
    units = written("user", config, tmp_path / "user", Path("/bin/true"))
    worker = next(unit for unit in units if "worker" in unit.name)
    worker.write_text(worker.read_text().replace("KillMode=", "KilMode="))

    said = analyze("user", "verify", *map(str, units), runtime=tmp_path)

    assert "Unknown key" in said.stderr


@needs_analyze
@pytest.mark.parametrize("kind", KINDS)
def test_a_path_with_every_odd_character_is_the_program_that_runs(kind: Kind, config: Config, tmp_path: Path) -> None:
    """systemd-analyze looks for the file behind ExecStart=, so it reads the quoting back."""
    odd = tmp_path / "a b%i @gpu@ $HOME; -+ ünï"
    odd.mkdir()
    (odd / "safelightd").symlink_to("/bin/true")
    units = written(kind, config, tmp_path / kind, odd / "safelightd")

    said = analyze(kind, "verify", *map(str, units), runtime=tmp_path)

    assert (said.returncode, said.stderr) == (0, "")


@needs_analyze
@pytest.mark.parametrize("kind", KINDS)
def test_exposure_is_no_higher_than_measured(kind: Kind, config: Config, tmp_path: Path) -> None:
    for unit in written(kind, config, tmp_path / kind, Path("/bin/true")):
        if (kind, unit.name) not in EXPOSURE_MAX:
            continue
        said = analyze(kind, "security", "--offline=true", str(unit), runtime=tmp_path)
        exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said.stdout)

        assert exposure, said.stderr
        assert float(exposure[1]) <= EXPOSURE_MAX[kind, unit.name], f"{unit.name}: {exposure[1]}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_for_polkit_allows_what_a_job_inhibits_and_nothing_else(kind: Kind, config: Config) -> None:
    rule = rendered(kind, config)["polkit.rules"]

    actions = re.findall(r'"(org\.[a-z0-9.-]+)"', rule)

    assert actions == [
        "org.freedesktop.login1.inhibit-block-sleep",
        "org.freedesktop.login1.inhibit-block-idle",
        "org.freedesktop.login1.inhibit-handle-lid-switch",
    ]
    assert rule.count("Result.YES") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_placeholder_is_filled(kind: Kind, config: Config) -> None:
    for name, text in rendered(kind, config).items():
        assert not re.findall(r"@[a-z_]+@", text), name


@pytest.mark.parametrize("kind", KINDS)
def test_daemons_restart_unless_restarting_cannot_help(kind: Kind, config: Config) -> None:
    units = rendered(kind, config)

    for name in DAEMONS:
        expected = {
            "Type": ["notify"],
            "Restart": ["always"],
            "RestartPreventExitStatus": ["2 3"],
            "StartLimitIntervalSec": ["0"],
            "KillMode": ["mixed"],
            "OOMPolicy": ["continue"],
        }
        assert {key: values(units[name], key) for key in expected} == expected, name


@pytest.mark.parametrize("kind", KINDS)
def test_digests_are_made_after_everybody_else_and_hold_up_no_start(kind: Kind, config: Config) -> None:
    """The target, and with it the boot, waits for a oneshot service; a start limit would end the path's watch."""
    units = rendered(kind, config)
    expected = {
        "Type": ["exec"],
        "Restart": ["no"],
        "StartLimitIntervalSec": ["0"],
        "Nice": ["19"],
        "IOSchedulingClass": ["idle"],
        "PartOf": ["safelight.target"],
        "RestrictAddressFamilies": ["AF_UNIX"],
        "PrivateNetwork": ["yes"] if kind == "system" else [],
    }

    wants = " ".join(values(units["safelight.target"], "Wants")).split()
    assert {"safelight-digests.path", "safelight-digests.service"} <= set(wants)
    assert {key: values(units["safelight-digests.service"], key) for key in expected} == expected


def test_the_folder_that_is_watched_is_named_as_a_path_unit_reads_it(config: Config) -> None:
    """PathChanged= knows no quotes, and % alone means something to it."""
    odd = replace(config, paths=replace(config.paths, models=Path("/data/a b%i")))

    text = service.render("user", program=Path("/bin/true"), config=odd, gpu=GPU)["safelight-digests.path"]

    assert values(text, "PathChanged") == ["/data/a b%%i/registered"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_dies_with_another(kind: Kind, config: Config) -> None:
    """A restart of the queue server must not kill a clip of 40 minutes."""
    for name, text in rendered(kind, config).items():
        assert not re.search(r"^(Requires|Requisite|BindsTo|RequiresMountsFor)=", text, re.MULTILINE), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_daemon_has_a_runtime_folder_of_its_own_below_safelight(kind: Kind, config: Config) -> None:
    """Of two units that share one, the first to stop deletes the other's socket."""
    units = rendered(kind, config)

    folders = [folder for name in DAEMONS for folder in values(units[name], "RuntimeDirectory")]

    assert folders == ["safelight/redis", "safelight/inbox", "safelight/worker-%i"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_reaches_the_worker_with_its_dashes(kind: Kind, config: Config) -> None:
    units = rendered(kind, config)

    assert f"safelight-worker@{GPU}.service" in values(units["safelight.target"], "Wants")
    assert values(units["safelight-worker@.service"], "ExecStart") == ["/bin/true worker --gpu %i"]
    assert "%I" not in "".join(line for line in units["safelight-worker@.service"].splitlines() if line[:1] != "#")


@pytest.mark.parametrize("gpu", ["0/1", "", "a b", "0\nUser=root", "../x"])
def test_a_gpu_that_cannot_be_an_instance_name_is_refused(gpu: str, config: Config) -> None:
    with pytest.raises(BadConfig, match="not an index or a UUID"):
        service.render("user", program=Path("/bin/true"), config=config, gpu=gpu)


@pytest.mark.parametrize("folder", ["a\nUser=root", 'a"b', "a'b", "a\\b"])
def test_a_program_that_systemd_would_not_run_is_refused(folder: str, config: Config) -> None:
    with pytest.raises(BadConfig, match=r"Rename it|Move it"):
        service.render("user", program=Path("/") / folder / "safelightd", config=config, gpu="0")


def test_the_user_set_has_nothing_that_a_users_manager_refuses(config: Config) -> None:
    for name, text in rendered("user", config).items():
        assert not [line for line in text.splitlines() if line.startswith(FATAL_FOR_USERS)], name


def test_the_user_set_names_its_folders_instead_of_leaving_them_to_systemd(config: Config) -> None:
    """StateDirectory= of a user unit is ~/.config for systemd 252 and ~/.local/state for 257."""
    for name in DAEMONS:
        text = rendered("user", config)[name]

        assert not values(text, "StateDirectory") + values(text, "LogsDirectory")
        assert f"XDG_STATE_HOME={config.paths.state.parent}" in " ".join(values(text, "Environment")).split()


def test_one_grant_covers_the_inbox_with_its_claims(config: Config) -> None:
    """Two grants are two mounts, and rename(2) between them fails."""
    inbox = service.system_config(Path("/nowhere")).paths
    granted = " ".join(values(rendered("system", config)["safelight-inbox.service"], "ReadWritePaths")).split()

    below = [path for path in granted if Path(path.lstrip("-")).is_relative_to(inbox.inbox)]

    assert below == [f"-{inbox.inbox}"]
    assert all(path.is_relative_to(inbox.inbox) for path in (inbox.claimed, inbox.accepted, inbox.rejected))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_reaches_the_network(kind: Kind, config: Config) -> None:
    units = rendered(kind, config)

    for name in DAEMONS:
        assert values(units[name], "RestrictAddressFamilies") == ["AF_UNIX"], name
        assert values(units[name], "PrivateNetwork") == (["yes"] if kind == "system" else []), name
    assert "HF_HUB_OFFLINE=1" in units["safelight-worker@.service"]


@pytest.mark.parametrize(
    ("url", "families"),
    [("rediss://queue.example:6380/0", "AF_UNIX AF_INET AF_INET6"), ("unix:///run/valkey/valkey.sock", "AF_UNIX")],
)
def test_a_server_of_ones_own_replaces_ours(url: str, families: str, home: Path) -> None:
    own = service.system_config(Path("/nowhere"))
    own = replace(own, settings=own.settings.model_copy(update={"queue": QueueSection(url=url)}))

    units = service.render("system", program=Path("/bin/true"), config=own, gpu=GPU)

    assert "safelight-redis.service" not in units
    assert not [name for name, text in units.items() if "safelight-redis.service" in text]
    for name in DAEMONS[1:]:
        assert values(units[name], "RestrictAddressFamilies") == [families]
        assert values(units[name], "PrivateNetwork") == (["yes"] if families == "AF_UNIX" else [])


def test_variables_of_the_shell_reach_the_services(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/data/state")
    monkeypatch.setenv("XDG_DATA_HOME", "/data/share")
    file = tmp_path / "here.toml"
    file.write_text('[paths]\nmodels = "/data/models"\n')

    text = service.render("user", program=Path("/bin/true"), config=settings.load(file=file), gpu="0")

    environment = " ".join(values(text["safelight-worker@.service"], "Environment")).split()
    assert {f"SAFELIGHT_CONFIG={file}", "XDG_STATE_HOME=/data/state"} <= set(environment)
    assert not [word for word in environment if word.startswith("XDG_DATA_HOME")]
