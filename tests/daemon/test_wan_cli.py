"""Wan's own program as a child: what it is told, how what it says is read in any pieces, and that nothing outlives it.

Its stand-in, which can say the same, and what the program itself has said with 50 steps are in tests/data/wan_cli.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safelight import jobspec, models
from safelight.jobspec import JobSpec
from safelight.models import ModelFacts
from safelight.wan_cli import Installed
from safelight.wan_cli_plan import plan_of
from safelightd.failure import failure
from safelightd.progress import Cancelled, Watch
from safelightd.wan_cli import job, keeper
from safelightd.wan_cli.command import command, environment
from safelightd.wan_cli.program import Program, ProgramBroke, ProgramFailed, at_work
from safelightd.wan_cli.transcript import PENDING_BYTES_MAX, STAGES, WORDS_CHARACTERS_MAX, Transcript
from tests.daemon.roomy_engine import ROOMY
from tests.daemon.test_worker import eventually

DATA = Path(__file__).parents[1] / "data" / "wan_cli"
SAID = (DATA / "transcript.txt").read_bytes()
"""Of generate.py itself, Wan-Video/Wan2.2 @ 42bf4cf, told what `command` says: both streams in one pipe, on a CPU with
small random weights in the place of the published ones (its attention, its tokenizer and torch.cuda replaced)."""
TABLE = models.load()
DIGEST = "0" * 64


def spec_of(prompt: str = "a fox", **written: object) -> JobSpec:
    fields = {"model": "wan-ti2v-5b", "backend": "wan-cli", "prompt": prompt, "seed": 7, "num_frames": 5, **written}
    spec = jobspec.check(
        {"num_inference_steps": 4, **fields}, TABLE, "test", image_model="flux-dev", video_model="wan-ti2v-5b"
    )
    assert isinstance(spec, JobSpec), spec
    return spec


def words_of(spec: JobSpec, where: Installed, save_file: Path, image: Path | None = None) -> list[str]:
    facts: ModelFacts = TABLE[spec.model]
    assert facts.wan_cli is not None
    return command(spec, plan_of(spec, facts, ROOMY), facts.wan_cli, where, save_file, image)


# -- what it is told ---------------------------------------------------------------------------------------------------

WHERE = Installed(Path("/env/bin/python"), Path("/data/Wan2.2"), Path("/data/Wan2.2-TI2V-5B"))


def test_the_5b_is_told_all_that_the_job_says() -> None:
    assert words_of(spec_of("--a fox\nin 雪"), WHERE, Path("/out/program.mp4")) == [
        "/env/bin/python",
        "-u",
        "/data/Wan2.2/generate.py",
        "--task=ti2v-5B",
        "--size=1280*704",
        "--frame_num=5",
        "--ckpt_dir=/data/Wan2.2-TI2V-5B",
        "--offload_model=True",
        "--save_file=/out/program.mp4",
        "--prompt=--a fox\nin 雪",
        "--base_seed=7",
        "--sample_steps=4",
        "--sample_shift=5.0",
        "--sample_guide_scale=5.0",
        "--convert_model_dtype",
        "--t5_cpu",
    ]


def test_a_picture_is_told_with_the_area_of_its_clip() -> None:
    spec = spec_of(model="wan-i2v-a14b", image=DIGEST, width=832, height=464, text_encoder_device="cpu")
    words = words_of(spec, WHERE, Path("/out/program.mp4"), Path("/out/input.png"))

    wanted = {"--task=i2v-A14B", "--size=832*480", "--image=/out/input.png", "--sample_guide_scale=3.5", "--t5_cpu"}
    assert wanted <= {*words}


@pytest.mark.parametrize(("written", "told"), [({}, []), ({"guidance_scale": 2.0, "guidance_scale_2": 2.0}, ["2.0"])])
def test_two_experts_get_their_own_guidance_or_one_for_both(written: dict[str, object], told: list[str]) -> None:
    words = words_of(spec_of(model="wan-t2v-a14b", **written), WHERE, Path("/out/program.mp4"))

    assert [word.partition("=")[2] for word in words if word.startswith("--sample_guide_scale")] == told
    assert "--t5_cpu" not in words


def test_its_environment_shows_bars_and_has_nothing_of_our_python() -> None:
    ours = {"TQDM_DISABLE": "1", "PYTHONPATH": "/ours", "PYTORCH_ALLOC_CONF": "a:1", "CUDA_VISIBLE_DEVICES": "GPU-1"}

    assert environment({**ours, "HF_HUB_OFFLINE": "1"}) == {
        "CUDA_VISIBLE_DEVICES": "GPU-1",
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


# -- what it says ------------------------------------------------------------------------------------------------------


def told(pieces: list[bytes], steps: int = 50) -> list[tuple[str, int]]:
    """Return each stage and step that shows while the pieces come."""
    transcript = Transcript(steps)
    shown = [(transcript.stage, transcript.step)]
    for piece in pieces:
        transcript.feed(piece)
        shown.append((transcript.stage, transcript.step))
    return [now for before, now in zip([None, *shown], shown, strict=False) if now != before]


def test_a_transcript_shows_every_step_once_and_each_stage() -> None:
    assert b"\r" in SAID
    assert "▏".encode() in SAID  # a character of three bytes: pieces end within it
    shown = told([bytes([byte]) for byte in SAID])

    steps = [("denoise", step) for step in range(50)]
    assert shown == [("load", 0), ("encode", 0), *steps, ("decode", 50)]


def test_a_bar_shows_before_anything_follows_it() -> None:
    said = SAID.partition(b" 5/50 [")[0]

    assert told([said])[-1] == ("denoise", 4)
    assert told([said, b" 5/50 [00:47<07:02,", b"  9.38s/it]"])[-1] == ("denoise", 5)


@given(st.lists(st.integers(0, len(SAID)), max_size=12))
def test_pieces_of_any_size_end_in_the_same(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(SAID)]
    shown = told([SAID[start:end] for start, end in pairwise(places)])

    assert shown[-1] == ("decode", 50)
    assert shown == sorted(shown, key=lambda now: (STAGES.index(now[0]), now[1]))  # type: ignore[arg-type]  # of STAGES


@given(st.lists(st.binary(max_size=200), max_size=20))
@example([b"..."])
def test_nothing_that_it_could_say_breaks_the_reader(pieces: list[bytes]) -> None:
    transcript = Transcript(50)
    for piece in pieces:
        transcript.feed(piece)
    transcript.close()

    assert 0 <= transcript.step <= 50
    assert transcript.words


def test_a_line_that_never_ends_is_not_kept_whole() -> None:
    transcript = Transcript(50)
    for _ in range(100):
        transcript.feed(b"x" * 10_000)

    assert len(transcript._pending) == PENDING_BYTES_MAX


def test_a_long_line_has_its_last_words_at_once() -> None:
    transcript = Transcript(50)
    transcript.feed(b"x" * 40_000 + b"\n")
    started = time.process_time()

    assert transcript.words == "x" * WORDS_CHARACTERS_MAX
    assert time.process_time() - started < 0.5


LOG = "[2025-07-30 11:27:41,938] INFO: "


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", "it said nothing of it"),
        (f"{LOG}Input prompt: a secret\nsecret Error: fox\n{LOG}Creating WanT2V pipeline.\n", "it said nothing of it"),
        ("generate.py: error: unrecognized arguments: --bf16\n", "generate.py: error: unrecognized arguments: --bf16"),
        ("ModuleNotFoundError: No module named 'flash_attn'\n", "ModuleNotFoundError: No module named 'flash_attn'"),
        ("torch.OutOfMemoryError: CUDA out of memory.\nleaked\n", "torch.OutOfMemoryError: CUDA out of memory"),
        (f"{LOG}save_video failed, error: no codec\n{LOG}Finished.\n", "save_video failed, error: no codec"),
        ("Killed", "Killed"),
    ],
)
def test_its_last_words_are_its_error_and_never_the_prompt(said: str, words: str) -> None:
    transcript = Transcript(50)
    transcript.feed(said.encode())
    transcript.close()

    assert transcript.words == words


# -- at work -----------------------------------------------------------------------------------------------------------


class NoMeter:
    def reset(self) -> None: ...

    def settle(self) -> None: ...

    def peaks(self) -> tuple[int, int]:
        return 0, 0


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "Wan2.2"
    folder.mkdir()
    for file in ("generate.py", "transcript.txt"):
        shutil.copy(DATA / file, folder)
    return folder


@contextmanager
def running(checkout: Path, prompt: str, **written: Any) -> Iterator[tuple[Program, Path]]:
    spec = spec_of(prompt, **written)
    where = Installed(Path(sys.executable), checkout, checkout)
    made = checkout / "program.mp4"
    env = environment({**os.environ, "TQDM_DISABLE": "1"})
    with at_work(words_of(spec, where, made), checkout, env, spec.num_inference_steps) as program:
        yield program, made


def follow(program: Program, watch: Watch) -> None:
    for stage in STAGES:
        with watch.phase(stage):
            program.follow(stage, watch)


def test_a_clip_is_made_and_its_steps_are_told(checkout: Path) -> None:
    sent: list[dict[str, Any]] = []
    with running(checkout, "a fox") as (program, made):
        follow(program, Watch(sent.append, threading.Event(), NoMeter()))
        job._refuse_broken(made, spec_of(), program)

    assert [message["phase"] for message in sent if message["type"] == "phase"] == [*STAGES]
    steps = [(message["i"], message["n"]) for message in sent if message["type"] == "step"]
    assert steps[-1] == (4, 4)
    assert steps == sorted(set(steps))
    assert program.host_peak_bytes > 2**20


def test_what_the_program_itself_has_said_is_followed_while_it_comes_in_pieces(checkout: Path) -> None:
    sent: list[dict[str, Any]] = []
    with running(checkout, "replay it", num_inference_steps=50) as (program, made):
        follow(program, Watch(sent.append, threading.Event(), NoMeter()))
        job._refuse_broken(made, spec_of(), program)

    kinds = [message["phase"] for message in sent if message["type"] == "phase"]
    steps = [(message["phase"], message["i"], message["n"]) for message in sent if message["type"] == "step"]
    assert kinds == [*STAGES]
    assert len(steps) > 10  # two that were said while nobody read are told as one
    assert steps == sorted(set(steps))
    assert {(phase, n) for phase, _, n in steps} == {("denoise", 50)}
    assert steps[-1] == ("denoise", 50, 50)


@pytest.mark.parametrize(
    ("prompt", "stage", "said"),
    [
        ("crash", "denoise", r"ended with exit status 1 in denoise: RuntimeError: Given groups=1, .* 48 channels\.$"),
        ("oom", "decode", r"ran out of GPU memory in decode: torch.OutOfMemoryError: CUDA out of memory\. .*It has no"),
        ("pinned", "decode", r"ran out of RAM in decode: RuntimeError: .*DefaultCPUAllocator"),
    ],
)
def test_an_end_with_an_error_is_told_in_its_last_words(checkout: Path, prompt: str, stage: str, said: str) -> None:
    watch = Watch(lambda _: None, threading.Event(), NoMeter())
    with running(checkout, f"{prompt} it") as (program, _), pytest.raises(ProgramFailed, match=said):
        follow(program, watch)

    assert watch.current == stage


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("killed", r"was ended by signal 9 in denoise: it said nothing of it\.$"),
        ("gpu", r"ended with exit status 1 in denoise: RuntimeError: CUDA error: unspecified launch failure\.$"),
    ],
)
def test_what_the_gpu_may_have_done_is_not_taken_for_the_jobs_fault(checkout: Path, prompt: str, said: str) -> None:
    watch = Watch(lambda _: None, threading.Event(), NoMeter())
    with running(checkout, f"{prompt} it") as (program, _), pytest.raises(ProgramBroke, match=said) as caught:
        follow(program, watch)

    assert failure(caught.value, watch)["kind"] == "engine"


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        ("unsaved", ProgramFailed, "ended well, but without a clip: save_video failed, error: Unknown encoder"),
        ("full", OSError, "No space left on device"),
        ("broken", ProgramFailed, "left a broken clip. The clip cannot be decoded: it has no index of a video"),
        ("short", ProgramFailed, "left a broken clip. The clip is 1280x704, 4 frames at 24 a second"),
    ],
)
def test_an_end_without_an_error_is_none_without_the_clip(
    checkout: Path, prompt: str, error: type[Exception], said: str
) -> None:
    with running(checkout, f"{prompt} it") as (program, made):
        follow(program, Watch(lambda _: None, threading.Event(), NoMeter()))
        with pytest.raises(error, match=re.escape(said)):
            job._refuse_broken(made, spec_of(), program)


def pids_of(checkout: Path) -> list[int]:
    """Return the program's process and that of its own child, once it hangs."""
    file = checkout / "pids"
    eventually(lambda: file.exists() and len(file.read_text().split()) == 2)
    return [int(word) for word in file.read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stop_ends_the_program_and_all_that_it_started(checkout: Path) -> None:
    stop = threading.Event()
    pids: list[int] = []
    threading.Thread(target=lambda: (pids.extend(pids_of(checkout)), stop.set())).start()
    with pytest.raises(Cancelled), running(checkout, "hang on") as (program, _):
        follow(program, Watch(lambda _: None, stop, NoMeter()))

    assert is_gone(pids[0])
    eventually(lambda: is_gone(pids[1]))


HANGS = """
import sys
from pathlib import Path
from safelightd.wan_cli.program import at_work
with at_work(sys.argv[2:], Path(sys.argv[1]), {}, 4):
    sys.stdin.read()
"""


@pytest.fixture
def asked(checkout: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that has asked for a program which hangs."""
    where = Installed(Path(sys.executable), checkout, checkout)
    words = words_of(spec_of("hang on"), where, checkout / "program.mp4")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'client'}:{root / 'daemon'}"}
    program = [sys.executable, "-c", HANGS, str(checkout), *words]
    with subprocess.Popen(program, env=env, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_who_is_killed_leaves_nothing_of_it_behind(checkout: Path, asked: subprocess.Popen[bytes]) -> None:
    pids = pids_of(checkout)
    (kept_by,) = psutil.Process(asked.pid).children()
    asked.kill()

    eventually(lambda: all(map(is_gone, [kept_by.pid, *pids])))


def test_a_program_whose_keeper_is_killed_is_gone_with_it(checkout: Path, asked: subprocess.Popen[bytes]) -> None:
    program, child = pids_of(checkout)
    (kept_by,) = psutil.Process(asked.pid).children()
    kept_by.kill()

    eventually(lambda: is_gone(program))

    os.kill(child, signal.SIGKILL)  # of what the program had started only its keeper knows


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["/bin/sh", "-c", "exit 3"], 3),
        (["/bin/sh", "-c", "kill -SEGV $$"], 128 + 11),
        (["/no/such/python"], keeper.NOT_STARTED),
    ],
)
def test_the_keeper_ends_as_its_command_did(command: list[str], status: int) -> None:
    kept = [sys.executable, "-I", "-S", keeper.__file__, *command]
    done = subprocess.Popen(kept, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stderr is not None
    words = done.stderr.read().decode()

    assert (done.wait(), words) == (status, "/no/such/python: No such file or directory\n" if status == 127 else "")

    done.communicate()


@pytest.mark.parametrize("sleep", ["sleep 600", "setsid sleep 600"])
def test_what_a_command_leaves_behind_ends_with_it(sleep: str, tmp_path: Path) -> None:
    script = f"{sleep} & echo $! > {tmp_path}/pid; sleep 0.5"
    kept = [sys.executable, "-I", "-S", keeper.__file__, "/bin/sh", "-c", script]
    with subprocess.Popen(kept, stdin=subprocess.PIPE) as process:
        assert process.wait() == 0

    eventually(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_the_version_is_the_commit_of_a_clone(tmp_path: Path) -> None:
    assert job.version(tmp_path) == "unknown"

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "generate.py").touch()
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()

    assert job.version(tmp_path) == commit

    (tmp_path / "generate.py").write_text("changed")

    assert job.version(tmp_path) == f"{commit}-dirty"
