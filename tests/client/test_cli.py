"""The client's commands where no server runs: help, settings, the ledger alone, plans, the way to the daemon."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from safelight import clidoc, draft
from safelight import config as settings
from safelight.cli import COMMANDS, Commands, main
from safelight.commands import options
from safelight.jobspec import FIELDS
from safelight.models import ModelFacts, Models
from tests.cli_steps import Safelight, runner
from tests.conftest import Installation

ROOT = Path(__file__).parents[2]

HELP_OF_ALL = """\
import sys
from click.testing import CliRunner
from safelight.cli import COMMANDS, main
for words in [[], *([name] for name in COMMANDS), ["models", "list"], ["service", "install"], ["service", "uninstall"]]:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0, (words, result.output)
    assert "Usage: " in result.output
print(" ".join(name for name in ("redis", "rq", "pydantic", "torch", "rich", "PIL", "yaml") if name in sys.modules))
"""


@pytest.fixture
def safelight(installation: Installation) -> Safelight:
    """Runs a command line against an installation where nothing runs."""
    return runner(installation)


# help


def test_help_of_no_command_imports_anything_heavy() -> None:
    """`safelight --help` and shell completion must answer at once, also on a slow laptop."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "client")},
    )  # fmt: skip

    assert (done.stderr, done.stdout.strip()) == ("", "")


def test_the_page_of_the_command_line_is_what_help_says() -> None:
    written = (ROOT / "docs/cli.md").read_text(encoding="utf-8")

    assert written == clidoc.document(), "python -m safelight.clidoc > docs/cli.md"


def test_every_command_exists_under_its_name() -> None:
    ctx = click.Context(main)
    assert isinstance(main, Commands)

    assert [main.get_command(ctx, name).name for name in COMMANDS] == list(COMMANDS)  # type: ignore[union-attr] - None fails, too


def test_a_command_that_is_not_there_names_the_nearest(safelight: Safelight) -> None:
    result = safelight("cancle")

    assert result.exit_code == 2
    assert "Did you mean cancel?" in result.stderr


def test_job_options_are_the_fields_and_the_aliases_of_prompt_files() -> None:
    """What a prompt file may say can be said on the command line, by the same names."""
    accepted = {options.canonical(name) for command in ("add", "plan") for name in _long_options(command)}

    own_options = {"prompt", "batch"}  # an argument as well; an option of `add` and `batch` alone
    for name in (*FIELDS, "count", "expand", "wildcard_seed", "size", "sweep"):
        assert options.canonical(name) in accepted | own_options
    for alias, name in draft.ALIASES.items():
        if len(alias) > 1:
            assert options.canonical(alias) == name.replace("_", "-")


@pytest.mark.parametrize("command", ["add", "plan"])
@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("--stesp", "Did you mean --steps?"),
        ("--step", "Did you mean --steps?"),
        ("--neg", "Did you mean --negative?"),
        ("--cfg-scal", "Did you mean --cfg-scale?"),
        ("--negative_promt", "Did you mean --negative-prompt?"),
        ("--sead", "Did you mean --seed?"),
        ("--xyzzy", "--help lists them."),
    ],
)
def test_an_option_that_is_not_there_names_the_nearest_that_people_type(
    safelight: Safelight, command: str, written: str, remedy: str
) -> None:
    result = safelight(command, "a red fox", written, "4")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith(remedy)


def _long_options(command: str) -> list[str]:
    found = main.get_command(click.Context(main), command)  # type: ignore[attr-defined] - main is the group
    return [name[2:] for parameter in found.params for name in parameter.opts if name.startswith("--")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(safelight: Safelight, shell: str) -> None:
    result = safelight("completion", shell)

    assert result.exit_code == 0
    assert "_SAFELIGHT_COMPLETE" in result.stdout


# settings and exit codes


def test_wrong_settings_are_3_and_every_fault_is_told(safelight: Safelight, installation: Installation) -> None:
    installation.config.source.write_text("[pahts]\ninbox = 'x'\n[queue]\nkeep_days = 0\n")

    result = safelight("list")

    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 2
    assert "Traceback" not in result.stderr
    assert "Traceback" in safelight("-v", "list").stderr


def test_config_option_wins_over_the_environment(safelight: Safelight, installation: Installation) -> None:
    other = installation.root / "other.toml"
    other.write_text('[defaults]\nimage_model = "flux-dev"\n')

    rows = json.loads(safelight("--config", str(other), "models", "list", "--json").stdout)

    assert [row["key"] for row in rows if row["default"]] == ["flux-dev", "wan-ti2v-5b"]
    assert safelight("--config", str(installation.root / "absent.toml"), "list").exit_code == 3


def test_a_settings_file_that_is_not_there_says_how_it_was_named(
    safelight: Safelight, installation: Installation
) -> None:
    absent = installation.root / "absent.toml"
    by_option = safelight("--config", str(absent), "list").stderr
    installation.config.source.unlink()

    by_environment = safelight("list").stderr

    assert by_option == f"{absent}: there is no such settings file. Write it, or leave --config out.\n"
    assert by_environment.endswith("there is no such settings file. Write it, or unset SAFELIGHT_CONFIG.\n")


def test_a_lora_that_is_not_there_names_those_that_come_with_safelight(safelight: Safelight) -> None:
    result = safelight("add", "a red fox <lora:nope>", "--model", "demo-flux")

    assert result.exit_code == 2
    assert "There are outlines." in result.stderr


@pytest.mark.parametrize("words", [["list"], ["status"], ["watch"], ["cancel", "--all"], ["add", "a red fox"]])
def test_a_server_that_does_not_answer_is_4(safelight: Safelight, words: list[str]) -> None:
    result = safelight(*words)

    assert (result.exit_code, result.stdout) == (4, "")
    assert "Start it" in result.stderr


def test_a_full_disk_or_a_closed_folder_is_told_without_a_traceback(
    safelight: Safelight, installation: Installation
) -> None:
    """Whatever the file system refuses names the file, and is no bug."""
    installation.paths.state.write_text("not a folder")

    result = safelight("pause")

    assert result.exit_code == 1
    assert str(installation.paths.state) in result.stderr
    assert "Traceback" not in result.stderr


def test_pause_works_while_nothing_runs(safelight: Safelight, installation: Installation) -> None:
    paused = safelight("pause", "a game")

    assert paused.exit_code == 0
    assert "on disk" in paused.stderr
    assert json.loads(installation.paths.user_hold.read_text())["reason"] == "a game"
    assert safelight("resume").exit_code == 0
    assert not installation.paths.user_hold.exists()


# which daemon


@pytest.fixture
def listening(installation: Installation) -> Iterator[list[socket.socket]]:
    servers: list[socket.socket] = []
    yield servers
    for server in servers:
        server.close()


def _listen(servers: list[socket.socket], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    servers.append(server)


def _found(installation: Installation, env: dict[str, str]) -> Path:
    system = installation.root / "etc/safelight.toml"
    system.parent.mkdir(exist_ok=True)
    system.write_text("")
    found = settings.for_client(
        env, system_config=system, system_runtime=installation.root / "sys", system_state=installation.root / "var"
    )
    return found.source.relative_to(installation.root)


def test_a_client_prefers_the_users_daemon_and_takes_the_systems(
    installation: Installation, listening: list[socket.socket]
) -> None:
    env = {"XDG_CONFIG_HOME": str(installation.root / "own"), "XDG_RUNTIME_DIR": str(installation.root / "run"),
           "XDG_STATE_HOME": str(installation.root / "own")}  # fmt: skip
    own, system = Path("own/safelight/safelight.toml"), Path("etc/safelight.toml")

    assert _found(installation, env) == own
    _listen(listening, installation.root / "sys/redis/redis.sock")
    assert _found(installation, env) == system
    _listen(listening, installation.root / "run/safelight/redis/redis.sock")
    assert _found(installation, env) == own
    listening[1].close()  # killed: its socket's file stays
    assert _found(installation, env) == system
    named = {**env, "SAFELIGHT_CONFIG": str(installation.config.source)}
    assert _found(installation, named) == Path("safelight.toml")


# plans


def test_plan_on_the_cpu_speaks_of_no_gpu_memory(safelight: Safelight) -> None:
    result = safelight("plan", "a red fox", "--steps", "2")

    assert result.exit_code == 0
    assert "of RAM" in result.stdout
    assert "GPU" not in result.stdout


def test_plan_says_which_machine_it_assumes_and_needs_no_torch(installation: Installation) -> None:
    installation.config.source.write_text("")

    program = "import sys; from safelight.cli import main; sys.argv[0] = 'safelight'; sys.exit(main())"
    words = ["plan", "a red fox", "--model", "tiny-flux-schnell"]
    command = [sys.executable, "-X", "importtime", "-c", program, *words]
    result = subprocess.run(command, env=installation.env, capture_output=True, text=True, timeout=300)

    assert result.returncode == 0
    assert "16 GB GPU" in result.stdout.splitlines()[0]
    assert "assumed" in result.stdout.splitlines()[0]
    assert "pydantic" in result.stderr  # the list of imports is there
    assert "| torch" not in result.stderr


def test_plan_for_another_machine_says_what_does_not_fit(safelight: Safelight) -> None:
    words = (
        "plan",
        "a red fox",
        "--model",
        "wan-t2v-a14b",
        "--precision",
        "bf16",
        "--ram",
        "16",
        "--capability",
        "8.6",
    )
    small, large = (
        safelight(*words, "--vram", "4", "--json"),
        safelight(*words, "--vram", "200", "--ram", "400", "--json"),
    )

    assert (small.exit_code, large.exit_code) == (2, 0)
    (shape,) = json.loads(small.stdout)["shapes"]
    assert (shape["fits"], bool(shape["faults"])) == (False, True)
    (shape,) = json.loads(large.stdout)["shapes"]
    assert {"encode", "denoise", "decode"} <= shape["plan"]["predicted"].keys()
    assert json.loads(large.stdout)["machine"]["capability"] == [8, 6]


def test_plan_of_files_counts_the_jobs_of_each_shape(safelight: Safelight, installation: Installation) -> None:
    file = installation.root / "night.txt"
    file.write_text("a red fox\na blue cat\n--prompt a b --steps 2 --n_iter 3\n")

    found = json.loads(safelight("plan", str(file), "--json").stdout)

    assert [(shape["num_inference_steps"], shape["jobs"]) for shape in found["shapes"]] == [(4, 2), (2, 3)]
    assert safelight("plan", "absent.txt").exit_code == 2
    assert safelight("plan").exit_code == 2
    assert safelight("plan", str(file), "--steps", "2").exit_code == 2


# doctor and models


def test_doctor_names_wrong_settings_and_is_3(safelight: Safelight, installation: Installation) -> None:
    installation.config.source.write_text("[worker]\ndevise = 'cpu'\n")

    result = safelight("doctor")

    assert result.exit_code == 3
    assert "worker.device" in result.stdout


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has an NVIDIA driver")
def test_doctor_without_a_gpu_is_5(safelight: Safelight, installation: Installation) -> None:
    installation.config.source.write_text('[paths]\ninbox="inbox"\noutbox="outbox"\nstate="state"\nmodels="models"\n')

    result = safelight("doctor", "--json")

    looks = {found["name"]: found for found in json.loads(result.stdout)}
    assert result.exit_code == 5
    assert looks["device"]["look"] == "fail"
    assert 'device = "cpu"' in looks["device"]["remedy"]


def test_doctor_without_a_server_is_4(safelight: Safelight) -> None:
    result = safelight("doctor")

    assert result.exit_code == 4
    assert "FAIL  queue" in result.stdout


def test_doctor_finds_the_shard_that_is_missing(safelight: Safelight, installation: Installation) -> None:
    """A copy that was cut short is found in the evening, not at the first job of the night."""
    folder = installation.root / "fox"
    _write_model(folder, installation.models["flux-schnell"])
    installation.config.source.write_text(
        f'{installation.config.source.read_text()}[models.fox]\nlike = "flux-schnell"\npath = "{folder}"\n'
    )
    assert "fox: complete" in safelight("doctor").stdout

    (folder / "transformer/weights-2.safetensors").unlink()
    result = safelight("doctor")

    assert result.exit_code == 3
    assert "transformer/weights-2.safetensors" in result.stdout


def _write_model(folder: Path, facts: ModelFacts) -> None:
    index: dict[str, object] = {"_class_name": facts.pipeline, "feature_extractor": [None, None]}
    for component in facts.components:
        index[component] = ["diffusers", "Anything"]
        (folder / component).mkdir(parents=True)
        shards = [f"weights-{number}.safetensors" for number in (1, 2)]
        for shard in shards:
            (folder / component / shard).write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensor, and whole
        weight_map = {"a": shards[0], "b": shards[1]}
        (folder / component / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_small_model_is_present_once_it_was_built(safelight: Safelight, installation: Installation) -> None:
    folder = installation.root / "models"
    written = installation.config.source.read_text()
    installation.config.source.write_text(written.replace(str(installation.paths.models), str(folder)))

    def here() -> tuple[str, list[str]]:
        rows = json.loads(safelight("models", "list", "--json").stdout)
        says = [one["says"] for one in json.loads(safelight("doctor", "--json").stdout) if one["name"] == "models"]
        return next(row["here"] for row in rows if row["key"] == "tiny-flux-schnell"), says[:1]

    before = here()
    (folder / "tiny-flux-schnell").mkdir(parents=True)
    (folder / "tiny-flux-schnell/model_index.json").write_text("{}")

    assert before == ("built on first use", ["tiny-flux-schnell: built on first use"])
    assert here() == ("present", ["tiny-flux-schnell: present"])


def test_models_list_has_what_a_person_must_know(safelight: Safelight, installation: Installation) -> None:
    rows = {row["key"]: row for row in json.loads(safelight("models", "list", "--json").stdout)}

    assert rows.keys() == set(installation.models.keys())
    assert isinstance(installation.models, Models)
    assert rows["flux-schnell"]["bf16_bytes"] == 2 * sum(installation.models["flux-schnell"].components.values())
    assert (rows["tiny-flux-schnell"]["default"], rows["flux-schnell"]["default"]) == (True, False)
    assert (rows["tiny-flux-schnell"]["present"], rows["flux-schnell"]["present"]) == (True, False)
    assert "Non-Commercial" in safelight("models", "list").stdout


# the daemon


def test_up_becomes_the_safelightd_of_the_same_installation(installation: Installation) -> None:
    folder = installation.root / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    (folder / "safelightd").write_text('#!/bin/sh\necho "$0 $@"\n')
    (folder / "safelightd").chmod(0o755)
    path = os.pathsep.join([str(ROOT / "client"), str(ROOT / "daemon"), *(p for p in sys.path if "site-packages" in p)])

    done = subprocess.run(
        [folder / "python", "-m", "safelight.cli", "--config", "x.toml", "up", "--anything", "more"],
        env={**installation.env, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.stdout == f"{folder}/safelightd --config x.toml up --anything more\n", done.stderr


@pytest.mark.parametrize("command", ["up", "demo"])
def test_up_and_demo_say_what_to_install_where_only_the_client_is(installation: Installation, command: str) -> None:
    packages = installation.root / "packages"
    packages.mkdir()
    shutil.copytree(Path(click.__file__).parent, packages / "click")

    done = subprocess.run(
        [sys.executable, "-S", "-m", "safelight.cli", command],  # -S: none of the installed packages
        env={**installation.env, "PYTHONPATH": os.pathsep.join([str(ROOT / "client"), str(packages)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 3
    assert "safelight[daemon]" in done.stderr


def test_service_install_refuses_or_shows_the_units(safelight: Safelight) -> None:
    """The units themselves are tested with a systemd; here only that the command reaches them."""
    result = safelight("service", "uninstall", "--dry-run")

    assert (result.exit_code, result.stdout) == (0, "No user units of safelight are installed.\n")
