"""`add`, `batch`, `list`, `show`, `doctor` as a person uses them, on a real server and a real ledger."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from safelight.calibration import Calibration
from safelight.jobqueue import JobQueue
from safelight.machine import GIB, Machine
from tests.cli_steps import (
    CPU,
    WORKER,
    Safelight,
    end,
    ids_of,
    listed,
    runner,
    start,
)
from tests.conftest import Installation


@pytest.fixture
def safelight(installation: Installation, queue: JobQueue) -> Safelight:
    """Runs a command line against the installation, whose server is up."""
    return runner(installation)


def test_add_prints_the_id_alone_and_the_job_is_in_ledger_and_queue(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    (job,) = ids_of(safelight("add", "a red fox", "--steps", "2", "--seed", "7", "--tags", "fox,snow"))

    spec = installation.ledger.spec(job)
    assert spec is not None
    assert (spec.prompt, spec.num_inference_steps, spec.seed, spec.tags) == ("a red fox", 2, 7, ("fox", "snow"))
    assert queue.spec(job) == spec
    assert queue.waiting_ids() == [job]


def test_add_takes_several_prompts_counts_and_seeds(safelight: Safelight, queue: JobQueue) -> None:
    jobs = ids_of(safelight("add", "a red fox", "a blue cat", "--seed", "7,9", "-n", "2"))

    specs = [queue.spec(job) for job in jobs]
    assert [(spec.prompt, spec.seed) for spec in specs if spec] == [
        ("a red fox", 7), ("a red fox", 8), ("a red fox", 9), ("a red fox", 10),
        ("a blue cat", 7), ("a blue cat", 8), ("a blue cat", 9), ("a blue cat", 10),
    ]  # fmt: skip


def test_add_understands_the_names_of_other_programs(safelight: Safelight, queue: JobQueue) -> None:
    written = (
        "--model",
        "tiny-flux-dev",
        "--cfg_scale",
        "4",
        "--negative",
        "blur",
        "--distilled-cfg",
        "3",
        "--size",
        "96x64",
    )
    (job,) = ids_of(safelight("add", "a red fox", *written))

    spec = queue.spec(job)
    assert spec is not None
    assert (spec.true_cfg_scale, spec.negative_prompt, spec.guidance_scale) == (4.0, "blur", 3.0)
    assert (spec.width, spec.height) == (96, 64)


def test_add_names_every_fault_and_queues_nothing(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    result = safelight("add", "a red fox", "--steps", "99", "--size", "100x64", "--negative-prompt", "blur")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "add: width 100 is not a multiple of 16. Use 96 or 112.",
        "add: num_inference_steps 99 is outside 1 to 8. Use 8.",
        "add: negative_prompt would be ignored by tiny-flux-schnell. Leave it out.",
    ]
    assert queue.waiting_ids() == []
    assert not installation.paths.jobs.exists()


def test_a_dash_without_a_name_is_no_option(safelight: Safelight, queue: JobQueue) -> None:
    result = safelight("batch", "-", "--format", "txt", stdin="--prompt a red fox --\n")

    assert result.exit_code == 2
    assert result.stderr == "stdin.txt:1: -- alone is no option. Leave it out, or write a name behind it.\n"


def test_add_asks_for_quotes_instead_of_making_three_jobs(safelight: Safelight, queue: JobQueue) -> None:
    result = safelight("add", "a", "red", "fox")

    assert result.exit_code == 2
    assert '"a red fox"' in result.stderr
    assert queue.waiting_ids() == []


def test_add_keeps_a_copy_of_the_picture(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    picture = installation.root / "portrait.png"
    Image.new("RGB", (96, 64), "blue").save(picture)
    content = picture.read_bytes()

    (job,) = ids_of(safelight("add", "she turns", "--image", str(picture)))
    picture.unlink()

    spec = queue.spec(job)
    assert spec is not None
    assert spec.kind == "video"
    assert spec.image is not None
    assert (installation.paths.inputs / spec.image).read_bytes() == content


def test_a_clip_of_a_picture_has_its_shape_unless_a_size_is_written(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    picture = installation.root / "portrait.png"
    Image.new("RGB", (200, 300), "blue").save(picture)

    (alike,) = ids_of(safelight("add", "she turns", "--image", str(picture)))
    (written,) = ids_of(safelight("add", "she turns", "--image", str(picture), "--size", "96x64"))
    receipt = end(installation, queue, alike)
    (again,) = ids_of(safelight("rerun", str(installation.paths.outbox / receipt.outputs[0].path)))

    sizes = [(spec.width, spec.height) for spec in map(queue.spec, (alike, written, again)) if spec]
    assert sizes == [(64, 96), (96, 64), (64, 96)]


def test_add_refuses_a_picture_that_something_shows_through(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    picture = installation.root / "cut-out.png"
    Image.new("RGBA", (96, 64), (255, 0, 0, 0)).save(picture)

    result = safelight("add", "she turns", "--image", str(picture))

    assert result.exit_code == 2
    assert "image cut-out.png: it has transparency" in result.stderr
    assert "Save it without transparency, on the background that is meant." in result.stderr
    assert queue.waiting_ids() == []
    assert list(installation.paths.inputs.glob("*")) == []


def test_add_refuses_what_fits_no_worker(safelight: Safelight, queue: JobQueue) -> None:
    """A job without hope is refused now, not at three in the night."""
    small = Machine(
        device="cuda", gpu="GTX 1650", capability=(7, 5), vram_total_bytes=4 * GIB, vram_free_bytes=3 * GIB,
        ram_total_bytes=32 * GIB, ram_available_bytes=28 * GIB, cpus=8,
    )  # fmt: skip
    queue.publish_worker(WORKER, 60, device="cuda", machine=small.model_dump_json(), engine="")

    result = safelight("add", "a red fox", "--model", "flux-dev", "--precision", "fp16", "--offload", "model")

    assert result.exit_code == 2
    assert "GTX 1650" in result.stderr
    assert queue.waiting_ids() == []


def test_add_without_a_server_accepts_nothing(installation: Installation) -> None:
    """Otherwise a person who repeats the command would have every job twice."""
    result = runner(installation)("add", "a red fox")

    assert result.exit_code == 4
    assert result.stdout == ""
    assert "safelight up" in result.stderr
    assert list(installation.paths.jobs.glob("*")) == []


def test_add_from_another_user_relies_on_the_server(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    """Where the ledger cannot be written the job is queued, and durable in the append-only file."""
    installation.paths.state.joinpath("jobs").write_text("not a folder, so that nothing can be written below it")

    (job,) = ids_of(safelight("add", "a red fox"))

    assert queue.waiting_ids() == [job]


def test_dry_run_queues_nothing_and_says_what_it_would_take(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    shown = Calibration(
        load={"tiny-flux-schnell/encode/float32 on cpu": 1.0}, work={"tiny-flux-schnell/decode/whole": 100.0}
    )  # fmt: skip
    queue.set_calibration(shown)
    queue.publish_worker(WORKER, 60, device="cpu", machine=CPU.model_dump_json(), engine="")

    result = safelight("add", "a {red|blue} fox", "--expand", "all", "--dry-run", "--json", "--steps", "2")

    found = json.loads(result.stdout)
    assert found["jobs"] == 2
    assert found["seconds"] == pytest.approx(2 * found["shapes"][0]["plan"]["seconds"], abs=0.1)
    assert found["seconds"] > 2 * 100 * 0.3  # the decode's 0.3 s, as this machine has shown them
    assert found["machine_source"] == f"of the worker {WORKER}"
    assert queue.waiting_ids() == []
    assert not installation.paths.jobs.exists()


@pytest.mark.parametrize("words", [["add", "a red fox"], ["add", "a red fox", "--dry-run"], ["plan", "a red fox"]])
def test_jobs_of_a_model_that_is_not_there_are_noted_with_what_fetches_it(
    safelight: Safelight, queue: JobQueue, words: list[str]
) -> None:
    """Somebody may be fetching it: the job is queued all the same."""
    result = safelight(*words, "--model", "flux-schnell", "--count", "2", "--steps", "2")

    assert result.stderr.splitlines() == [
        "flux-schnell: missing. Its jobs fail as long as it is not whole. Fetch it: safelight models pull flux-schnell"
    ]
    assert len(queue.waiting_ids()) == (2 if words == ["add", "a red fox"] else 0)


def test_jobs_of_a_half_copied_model_and_of_a_missing_controlnet_are_noted(
    safelight: Safelight, installation: Installation, queue: JobQueue, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "lines.png")
    (tmp_path / "models/flux-dev").mkdir(parents=True)
    (tmp_path / "models/flux-dev/model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    written = re.sub(r"models = .*", f'models = "{tmp_path}/models"', installation.config.source.read_text())
    installation.config.source.write_text(written)

    led = ["--controlnet", f"union-pro-2:{tmp_path}/lines.png"]
    result = safelight("add", "a red fox", "--model", "flux-dev", "--size", "1024x1024", *led)

    assert len(ids_of(result)) == 1
    assert [line.rpartition(": ")[2] for line in result.stderr.splitlines()] == [
        "safelight models pull flux-dev", "safelight models pull flux-dev --controlnet union-pro-2"
    ]  # fmt: skip


def test_a_model_that_cannot_be_looked_at_is_noted_and_refuses_no_job(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    """On a disk that has gone, or below a folder of somebody else."""
    own = f'\n[models.flux-dev]\npath = "{installation.root}/{"x" * 300}"\n'
    installation.config.source.write_text(installation.config.source.read_text() + own)

    result = safelight("add", "a red fox", "--model", "flux-dev")

    assert len(ids_of(result)) == 1
    assert result.stderr.startswith("flux-dev: ")
    assert "File name too long. Its jobs may fail. Let the worker's user read it." in result.stderr


def test_batch_makes_a_batch_of_each_file(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    (installation.root / "night.txt").write_text("a red fox\n# no\n--prompt a blue cat --steps 3 --seed 5\n")
    (installation.root / "cats.yaml").write_text("jobs:\n- prompt: a cat\n  count: 2\n")

    jobs = ids_of(safelight("batch", str(installation.root / "night.txt"), str(installation.root / "cats.yaml")))

    specs = [queue.spec(job) for job in jobs]
    assert [(spec.batch, spec.index, spec.prompt) for spec in specs if spec] == [
        ("night", 1, "a red fox"), ("night", 2, "a blue cat"), ("cats", 1, "a cat"), ("cats", 2, "a cat"),
    ]  # fmt: skip


def test_batch_tells_all_faults_of_all_files_and_queues_nothing(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    good, bad = installation.root / "good.txt", installation.root / "bad.txt"
    good.write_text("a red fox\n")
    bad.write_text("--prompt x --steps 99\n--prompt y --size 100x64\n")

    absent = [str(installation.root / name) for name in ("absent.txt", "away.txt")]
    result = safelight("batch", str(good), absent[0], str(bad), absent[1])

    assert result.exit_code == 2
    assert [line.split(": ")[0].removeprefix(f"{installation.root}/") for line in result.stderr.splitlines()] == [
        "absent.txt", "bad.txt:1", "bad.txt:2", "away.txt",
    ]  # fmt: skip
    assert queue.waiting_ids() == []


def test_batch_reads_stdin(safelight: Safelight, queue: JobQueue) -> None:
    (job,) = ids_of(safelight("batch", "-", "--format", "jsonl", "--batch", "made", stdin='{"prompt": "a red fox"}\n'))

    spec = queue.spec(job)
    assert spec is not None
    assert (spec.prompt, spec.batch) == ("a red fox", "made")


def test_batch_options_win_over_the_file(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    file = installation.root / "night.txt"
    file.write_text("---\npriority: low\nnum_inference_steps: 1\n---\na red fox\n")

    jobs = ids_of(safelight("batch", str(file), "--priority", "high", "--sweep", "steps=2,3", "--batch", "other"))

    specs = [queue.spec(job) for job in jobs]
    assert [(spec.priority, spec.num_inference_steps, spec.batch) for spec in specs if spec] == [
        ("high", 2, "other"), ("high", 3, "other"),
    ]  # fmt: skip


def test_batch_refuses_more_than_max_jobs(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    file = installation.root / "night.txt"
    file.write_text("a red fox\n" * 4)

    result = safelight("batch", str(file), "--max-jobs", "3")

    assert result.exit_code == 2
    assert queue.waiting_ids() == []


def test_list_shows_what_runs_then_what_waits_then_what_ended_newest_first(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    jobs = ids_of(safelight("add", "a b", "c d", "e f", "g h", "i j"))
    end(installation, queue, jobs[0])
    queue.server.zincrby("safelight:ended", -5, jobs[0])  # ended five seconds earlier
    end(installation, queue, jobs[1], "failed", "no such LoRA")
    start(queue, jobs[3])

    found = listed(safelight)

    assert [(job["id"], job["state"]) for job in found] == [
        (jobs[3], "running"), (jobs[2], "queued"), (jobs[4], "queued"), (jobs[1], "failed"), (jobs[0], "done"),
    ]  # fmt: skip
    assert found[3]["error"] == "no such LoRA"
    assert [Path(path).is_file() for path in found[4]["outputs"]] == [True]
    assert {"id", "state", "model", "kind", "batch", "attempts", "outputs", "error", "prompt"} <= found[0].keys()


def test_list_hands_scripts_sound_json_whatever_the_prompt_says(safelight: Safelight) -> None:
    prompt = 'a sign that says "x","batch":\\ and ,"batch":"y", 日本 \u2028'
    safelight("add", prompt)

    (found,) = listed(safelight)

    assert (found["prompt"], found["batch"]) == (prompt, "single")
    assert json.loads(safelight("status", "--json").stdout)["waiting"] == 1


def test_list_filters_by_state_and_batch(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    a, b = ids_of(safelight("add", "a b", "c d", "--batch", "one"))
    (c,) = ids_of(safelight("add", "e f", "--batch", "two"))
    end(installation, queue, a, "failed", "because")

    assert [job["id"] for job in listed(safelight, "--batch", "one")] == [b, a]
    assert [job["id"] for job in listed(safelight, "--state", "queued")] == [b, c]
    assert [job["id"] for job in listed(safelight, "--state", "failed", "--batch", "one")] == [a]
    assert listed(safelight, "--state", "done") == []
    assert safelight("list", "--batch", "three").exit_code == 2


def test_list_and_show_know_jobs_by_their_tags(safelight: Safelight) -> None:
    (fox,) = ids_of(safelight("add", "a red fox", "--tags", "fox,snow"))
    (cat,) = ids_of(safelight("add", "a blue cat", "--tags", "snow"))
    ids_of(safelight("add", "a green door"))

    assert [(job["id"], job["tags"]) for job in listed(safelight, "--tag", "fox")] == [(fox, ["fox", "snow"])]
    assert [job["id"] for job in listed(safelight, "--tag", "snow")] == [fox, cat]
    assert safelight("list", "--tag", "fo").stdout == "No jobs.\n"
    assert "tags        fox, snow\n" in safelight("show", fox).stdout


def test_list_shows_fifty_rows_and_says_how_many_more(safelight: Safelight) -> None:
    safelight("add", "a red fox", "-n", "60")

    result = safelight("list")

    assert len(result.stdout.splitlines()) == 1 + 50
    assert "and 10 more" in result.stderr
    assert len(safelight("list", "--all").stdout.splitlines()) == 1 + 60


def test_list_and_status_name_what_holds(safelight: Safelight, queue: JobQueue) -> None:
    safelight("add", "a red fox")
    queue.publish_worker(WORKER, 60, device="cpu", machine=CPU.model_dump_json(), engine="")
    queue.set_holds(WORKER, {"disk": "1.0 GiB free"})
    safelight("pause", "the cat sleeps on it")

    assert "disk" in safelight("list").stderr
    found = json.loads(safelight("status", "--json").stdout)
    assert found["holds"] == {"user": "the cat sleeps on it", "disk": "1.0 GiB free"}
    assert found["done_at"] is None


def test_list_shows_no_control_characters(safelight: Safelight) -> None:
    """A prompt from a file must not move the cursor or retitle the terminal."""
    safelight("add", "red \x1b[31m fox\x07 \x9b2J", "--seed", "1")

    assert not set(safelight("list").stdout) & {"\x1b", "\x07", "\x9b"}


def test_show_knows_a_job_by_any_part_of_its_id(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    receipt = end(installation, queue, a)

    found = json.loads(safelight("show", a[-9:], "--json").stdout)

    assert (found["id"], found["state"], found["receipt"]["id"], found["error"]) == (a, "done", a, None)
    assert found["outputs"] == [str(installation.paths.outbox / receipt.outputs[0].path)]
    ambiguous = safelight("show", a[:15])
    assert ambiguous.exit_code == 2
    assert a in ambiguous.stderr
    assert b in ambiguous.stderr


@pytest.mark.parametrize("written", ["nothing-like-it", "..", "../../etc/passwd", "", "a/b"])
def test_show_of_an_unknown_id_is_a_usage_error(safelight: Safelight, written: str) -> None:
    safelight("add", "a red fox")

    assert safelight("show", written).exit_code == 2


def test_show_reads_the_ledger_when_the_queue_has_forgotten(
    safelight: Safelight, installation: Installation, queue: JobQueue
) -> None:
    a, b = ids_of(safelight("add", "a b", "c d"))
    end(installation, queue, a)
    queue.server.flushall()

    assert json.loads(safelight("show", a, "--json").stdout)["state"] == "done"
    assert json.loads(safelight("show", b, "--json").stdout)["state"] == "queued"


def test_show_of_a_file_says_what_made_it(safelight: Safelight, installation: Installation, queue: JobQueue) -> None:
    (job,) = ids_of(safelight("add", "a red fox", "--seed", "7"))
    receipt = end(installation, queue, job)

    found = json.loads(safelight("show", str(installation.paths.outbox / receipt.outputs[0].path), "--json").stdout)

    assert (found["id"], found["spec"]["seed"], found["state"]) == (job, 7, "done")


def test_doctor_finds_nothing_wrong_with_a_running_installation(safelight: Safelight, queue: JobQueue) -> None:
    queue.publish_worker(WORKER, 60, device="cpu", machine=CPU.model_dump_json(), engine="")

    result = safelight("doctor", "--json")

    looks = {found["name"]: found["look"] for found in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert (looks["queue"], looks["worker"], looks["device"], looks["settings"]) == ("ok", "ok", "ok", "ok")


def test_doctor_reckons_what_waits_against_the_room_beside_the_reserve(
    safelight: Safelight, queue: JobQueue, installation: Installation
) -> None:
    ids_of(safelight("add", "a red fox"))
    calm = [found["says"] for found in json.loads(safelight("doctor", "--json").stdout) if found["name"] == "disk"]
    written = installation.config.source.read_text()
    installation.config.source.write_text(written.replace("min_free_disk_gib = 0", "min_free_disk_gib = 1e6"))

    found = [found for found in json.loads(safelight("doctor", "--json").stdout) if found["name"] == "disk"]

    assert len(calm) == 1
    assert [one["look"] for one in found] == ["fail", "warn"]
    assert "what waits (1 job) may need" in found[1]["says"]


def test_doctor_refuses_a_server_that_evicts(safelight: Safelight, queue: JobQueue) -> None:
    queue.server.config_set("maxmemory-policy", "allkeys-lru")

    result = safelight("doctor")

    assert result.exit_code == 3
    assert "allkeys-lru" in result.stdout


def test_batch_names_what_is_miswritten_and_what_is_illegal_in_one_answer(
    safelight: Safelight, queue: JobQueue, tmp_path: Path
) -> None:
    """A spelling fault on one line must not hide a value fault on another."""
    file = tmp_path / "night.txt"
    file.write_text("a {fox\na boat\n--prompt two --stpes 3\n--prompt three --width 1030\n")

    result = safelight("batch", str(file))

    assert result.exit_code == 2
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in result.stderr.splitlines()] == ["1", "3", "4"]
    assert queue.counts()["queued"] == 0


def test_list_says_nothing_where_the_shell_has_closed_stdout(installation: Installation, queue: JobQueue) -> None:
    ids_of(runner(installation)("add", "a red fox"))
    words = ["sh", "-c", '"$0" -m safelight.cli list >&-', sys.executable]

    done = subprocess.run(
        words, env={**installation.env, "PYTHONPATH": "client:daemon"}, stderr=subprocess.PIPE, text=True, check=False
    )

    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("words", [["list", "--batch"], ["show"], ["pause"]])
def test_a_word_that_is_no_text_is_shown_as_typed_with_what_to_do(safelight: Safelight, words: list[str]) -> None:
    result = safelight(*words, "caf\udce9 au lait")

    assert result.exit_code == 2
    assert result.stderr == "'caf\\udce9 au lait' is not UTF-8 text. Type it again, or copy it from safelight list.\n"
