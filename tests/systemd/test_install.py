"""Installing and uninstalling into a folder of its own, with systemd's real tools."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from pathlib import Path

import pytest

from safelight import config as settings
from safelight import service
from safelight.config import Config
from safelight.errors import BadConfig

from .conftest import GPU

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("systemd-sysusers") or not shutil.which("systemd-tmpfiles"),
    reason="needs root, systemd-sysusers and systemd-tmpfiles to give folders to an account",
)

USER_UNITS = [
    "safelight-digests.path",
    "safelight-digests.service",
    "safelight-inbox.service",
    "safelight-redis.service",
    "safelight-worker@.service",
    "safelight.target",
]


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Return every file below a folder with the time it was written and its text."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_text())
        for path in folder.rglob("*")
        if path.is_file()
    }


def install(config: Config, root: Path, *, system: bool = False, dry_run: bool = False, gpu: str = GPU) -> str:
    return "\n".join(service.install(system=system, gpu=gpu, dry_run=dry_run, config=config, root=root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def test_a_person_gets_six_units_and_a_settings_file(config: Config, home: Path, root: Path) -> None:
    install(config, root)

    units = root / home.relative_to("/") / ".config/systemd/user"
    source = root / config.source.relative_to("/")
    assert sorted(path.name for path in units.iterdir()) == USER_UNITS
    assert settings.load(file=source).settings == config.settings


def test_where_systemd_does_not_run_files_are_written_and_the_rest_is_said(
    config: Config, home: Path, tmp_path: Path
) -> None:
    """A container: no manager listens below XDG_RUNTIME_DIR."""
    lines = install(config, Path("/"))

    assert (home / ".config/systemd/user/safelight.target").is_file()
    assert "systemd does not run here" in lines
    assert "systemctl --user daemon-reload && systemctl --user enable --now safelight.target" in lines


def test_installing_twice_changes_nothing(config: Config, root: Path) -> None:
    install(config, root)
    before = tree(root)

    lines = install(config, root)

    assert tree(root) == before
    assert "wrote" not in lines


def test_installing_again_writes_only_what_differs_and_no_settings(config: Config, home: Path, root: Path) -> None:
    install(config, root)
    source = root / config.source.relative_to("/")
    source.write_text("[inbox]\nsettle_s = 3.0\n")

    lines = install(config, root, gpu="1").splitlines()

    wrote = [Path(line.removeprefix("wrote ")).name for line in lines if line.startswith("wrote")]
    assert wrote == ["safelight.target"]
    assert source.read_text() == "[inbox]\nsettle_s = 3.0\n"


def test_the_gpu_of_the_settings_is_taken_when_none_is_named(home: Path, tmp_path: Path, root: Path) -> None:
    file = tmp_path / "here.toml"
    file.write_text('[worker]\ngpu = "3"\n')

    service.install(system=False, gpu=None, dry_run=False, config=settings.load(file=file), root=root)

    target = root / home.relative_to("/") / ".config/systemd/user/safelight.target"
    assert "Wants=safelight-worker@3.service" in target.read_text()


def test_a_server_of_ones_own_takes_our_unit_away(config: Config, home: Path, tmp_path: Path, root: Path) -> None:
    install(config, root)
    file = tmp_path / "here.toml"
    file.write_text('[queue]\nurl = "unix:///run/valkey/valkey.sock"\n')

    install(settings.load(file=file), root)

    units = root / home.relative_to("/") / ".config/systemd/user"
    assert sorted(path.name for path in units.iterdir()) == [name for name in USER_UNITS if "redis" not in name]


@pytest.mark.parametrize("system", [False, True])
def test_a_dry_run_says_everything_and_does_nothing(config: Config, root: Path, system: bool) -> None:
    lines = install(config, root, system=system, dry_run=True)

    assert list(root.iterdir()) == []
    assert "would write" in lines
    assert "ExecStart=" in lines
    assert ("would run: systemd-sysusers" in lines) == system


def test_lingering_is_asked_for_until_it_is_on(config: Config, root: Path) -> None:
    person = pwd.getpwuid(os.getuid()).pw_name

    assert f"loginctl enable-linger {person}" in install(config, root)

    linger = root / "var/lib/systemd/linger"
    linger.mkdir(parents=True)
    (linger / person).touch()
    assert "enable-linger" not in install(config, root)


def test_a_person_is_offered_the_rule_that_lets_a_job_keep_the_machine_awake(
    config: Config, home: Path, root: Path
) -> None:
    """Only root may put it in place."""
    lines = install(config, root)

    rule = root / home.relative_to("/") / ".config/safelight/polkit.rules"
    assert f"sudo install -m 644 {rule} /etc/polkit-1/rules.d/50-safelight.rules" in lines
    person = pwd.getpwuid(os.getuid()).pw_name
    assert f'subject.user == "{person}"' in rule.read_text()

    placed = root / "etc/polkit-1/rules.d/50-safelight.rules"
    placed.parent.mkdir(parents=True)
    placed.write_text(rule.read_text())

    assert "sudo install" not in install(config, root)


@needs_root
def test_a_system_installation_may_keep_the_machine_awake(config: Config, root: Path) -> None:
    lines = install(config, root, system=True)

    rule = (root / "etc/polkit-1/rules.d/50-safelight.rules").read_text()
    assert 'subject.user == "safelight"' in rule
    assert "sudo install" not in lines


def test_uninstalling_keeps_settings_and_data(config: Config, home: Path, root: Path) -> None:
    install(config, root)
    receipt = root / config.paths.receipts.relative_to("/") / "night.json"
    receipt.parent.mkdir(parents=True)
    receipt.write_text("{}")

    lines = service.uninstall(system=False, dry_run=False, root=root)

    left = sorted(str(path.relative_to(root / home.relative_to("/"))) for path in root.rglob("*") if path.is_file())
    assert left == [".config/safelight/safelight.toml", ".local/state/safelight/receipts/night.json"]
    assert lines[-1].startswith("Kept: settings, jobs")


def test_uninstalling_what_is_not_installed_says_so(home: Path, root: Path) -> None:
    assert service.uninstall(system=False, dry_run=False, root=root) == ["No user units of safelight are installed."]


def test_a_dry_run_of_uninstalling_removes_nothing(config: Config, root: Path) -> None:
    install(config, root)
    before = tree(root)

    lines = service.uninstall(system=False, dry_run=True, root=root)

    assert tree(root) == before
    removed = sorted(Path(line).name for line in lines if line.startswith("would remove"))
    assert removed == sorted([*USER_UNITS, "polkit.rules"])


@needs_root
def test_a_system_installation_has_an_account_and_folders_for_its_group(config: Config, root: Path) -> None:
    lines = install(config, root, system=True)

    account = next(line for line in (root / "etc/passwd").read_text().splitlines() if line.startswith("safelight:"))
    uid, gid = map(int, account.split(":")[2:4])
    modes = {}
    for name in ("", *service.SYSTEM_FOLDERS, "state/redis"):
        there = (root / "var/lib/safelight" / name).stat()
        assert (there.st_uid, there.st_gid) == (uid, gid), name
        modes[name] = oct(there.st_mode & 0o7777)
    shared = dict.fromkeys(service.SYSTEM_FOLDERS, "0o2770")
    assert modes == {"": "0o750", **shared, "state/redis": "0o700"}
    source = (root / "etc/safelight/safelight.toml").stat()
    assert (oct(source.st_mode & 0o7777), source.st_uid, source.st_gid) == ("0o640", 0, gid)
    assert "usermod" not in lines  # somebody who packs an image has nobody to add yet


@needs_root
def test_what_a_member_drops_is_the_groups_whatever_the_umask(config: Config, root: Path) -> None:
    install(config, root, system=True)
    inbox = root / "var/lib/safelight/inbox"

    before = os.umask(0o077)
    try:
        (inbox / "night").mkdir()
        (inbox / "night/cat.txt").write_text("a cat")
    finally:
        os.umask(before)

    assert (inbox / "night").stat().st_mode & 0o7777 == 0o2770
    assert (inbox / "night/cat.txt").stat().st_mode & 0o777 == 0o660
    assert (inbox / "night/cat.txt").stat().st_gid == inbox.stat().st_gid


@needs_root
@pytest.mark.skipif(not shutil.which("systemctl"), reason="systemctl is not installed")
def test_a_system_installation_is_enabled_and_uninstalled_again(config: Config, root: Path) -> None:
    install(config, root, system=True)
    wanted = root / "etc/systemd/system/multi-user.target.wants/safelight.target"
    assert wanted.is_symlink()

    service.uninstall(system=True, dry_run=False, root=root)

    assert not wanted.is_symlink()
    left = [path.relative_to(root) for path in root.rglob("*safelight*") if not path.is_dir()]
    assert left == [Path("etc/safelight/safelight.toml")]
    assert (root / "var/lib/safelight/inbox").is_dir()


def test_new_system_settings_load_as_the_units_were_rendered_for(root: Path) -> None:
    expected = service.system_config(root)
    source = root / "etc/safelight/safelight.toml"
    source.parent.mkdir(parents=True)
    source.write_text(service.system_settings())

    assert service.system_config(root) == expected


def test_system_settings_decide_over_the_callers_own(config: Config, root: Path) -> None:
    source = root / "etc/safelight/safelight.toml"
    source.parent.mkdir(parents=True)
    source.write_text(service.system_settings().replace("/var/lib/safelight/outbox", "/srv/pictures"))

    lines = install(config, root, system=True, dry_run=True)

    assert "-/srv/pictures" in lines
    assert str(config.paths.outbox) not in lines


def test_a_folder_that_system_units_cannot_see_is_refused_by_name(config: Config, root: Path) -> None:
    source = root / "etc/safelight/safelight.toml"
    source.parent.mkdir(parents=True)
    text = service.system_settings()
    source.write_text(text.replace("/var/lib/safelight/outbox", "/home/ann/pictures"))

    with pytest.raises(BadConfig, match="/home/ann/pictures: a system service sees no home folder"):
        install(config, root, system=True)

    assert not (root / "etc/systemd").exists()


def test_homes_and_temporary_folders_are_hidden_and_others_are_not() -> None:
    hidden = [Path("/home/ann/venv/bin/safelightd"), Path("/root/x"), Path("/tmp/x"), Path("/run/user/1000/x")]
    seen = [Path("/opt/safelight/bin/safelightd"), Path("/homework"), Path("/srv/home"), Path("/usr/bin/python3")]

    assert service.hidden_from_system_units(hidden + seen) == hidden


def test_the_program_is_the_daemon_beside_this_python() -> None:
    assert service.daemon_program() == Path(sys.executable).with_name("safelightd")
