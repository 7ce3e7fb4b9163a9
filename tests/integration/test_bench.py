"""What the benches ask of a GPU for minutes is legal at full size: their tiny forms shrink it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import (
    cases,
    demo,
    fullsize,
    gpu_cache,
    gpu_decode,
    gpu_decode_wan,
    gpu_files,
    gpu_video,
    gpu_video_a14b,
    shapes,
)

from safelight import caches, models
from safelight.receipt import Receipt

ROOT = Path(__file__).parents[2]
TABLE = models.load()
CASES = [
    (key, size)
    for key in ("flux-schnell", "flux-dev", "wan-ti2v-5b", "wan-t2v-a14b", "wan-i2v-a14b")
    for sizes in (cases.SIZES, cases.LEARNED_AT)
    for size in cases._of(sizes, key)
]
CASES += [
    ("wan-ti2v-5b", "x".join(map(str, gpu_video.SIZE))),
    ("wan-t2v-a14b", "x".join(map(str, gpu_video_a14b.SIZE))),
]
CASES += [(key, size) for key in gpu_video_a14b.TINY for sizes in gpu_video_a14b.FITS.values() for size in sizes]


@pytest.mark.parametrize(("key", "size"), [*dict.fromkeys(CASES)])
def test_every_size_of_a_bench_is_one_that_its_model_takes(key: str, size: str) -> None:
    width, height, *frames = map(int, size.removesuffix(cases.FROM_A_PICTURE).split("x"))
    more: dict[str, Any] = {"num_frames": frames[0]} if frames else {}
    if size.endswith(cases.FROM_A_PICTURE) or TABLE[key].image == "required":
        more["image"] = "0" * 64
    spec = fullsize.spec_of(TABLE[key], tiny=False, width=width, height=height, num_inference_steps=2, **more)

    assert (spec.width, spec.height) == (width, height)


@pytest.mark.parametrize("key", ["flux-schnell", "wan-ti2v-5b", "wan-t2v-a14b", "wan-i2v-a14b"])
def test_every_model_of_a_bench_has_its_true_size(key: str) -> None:
    facts = TABLE[key]
    for name in shapes.components(facts):
        module = fullsize.on_meta(shapes.CLASSES[facts.family][name], shapes.config(facts, name, fullsize.FULL))

        assert sum(parameter.numel() for parameter in module.parameters()) == facts.components[name]


def test_every_cache_of_a_bench_is_one() -> None:
    for name in gpu_cache.CACHES:
        assert name == gpu_cache.NONE or caches.read(name).kind
    for key, job in gpu_cache.JOBS.items():
        fullsize.spec_of(TABLE[key], tiny=False, **job)


def test_bars_are_judged_on_what_was_measured() -> None:
    ours = {"steps": 50, "step_s": 1.9, "clip_s": 100.0, "decode_and_mp4_s": 8.0}
    decode, step, clip = gpu_video._bars(ours, {"step_s": 2.8, "decode_s": 19.7})

    assert (step["ok"], clip["ok"], decode["ok"]) == (True, True, False)
    assert gpu_video._bars(ours, {}) == [clip]
    assert gpu_video._bars({}, {"step_s": 2.8, "decode_s": 19.7}) == []


def test_a_clip_of_fewer_steps_is_reckoned_up_to_a_whole_one() -> None:
    ours = {"steps": 4, "step_s": 2.0, "first_step_s": 30.0, "clip_s": 44.0, "decode_and_mp4_s": 8.0}
    (clip,) = gpu_video._bars(ours, {})

    assert (clip["seconds"][0], clip["of_steps"]) == (108.0, 4)


def test_an_expert_that_is_all_on_the_gpu_is_what_the_largest_clip_on_16_gb_is_judged_by() -> None:
    resident = {"part": "resident", "name": "bf16, resident", "step_s": 7.0}
    case = {
        "part": "cases", "name": "wan-t2v-a14b 832x480x81 on 16 GB", "step_ms": [9000.0, 8400.0],
        "phases": {"denoise": {"swap_seconds": 11.0}},
    }  # fmt: skip
    step, swap = gpu_video_a14b.step_bars([resident, case])

    assert (step["measured"], step["ok"]) == (1.2, False)
    assert (swap["measured"], swap["ok"]) == (11.0, False)
    assert len(gpu_video_a14b.step_bars([case])) == 1


def test_single_files_are_tried_in_little(capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu_files.main(["--tiny"])
    first, *tried, left_out = map(json.loads, capsys.readouterr().out.splitlines())

    assert code == 0, tried
    assert (first["layout"], first["prompts"]) == ("published", 2)
    assert [(line["layout"], line["plan"]) for line in tried if "layout" in line] == [
        ("bf16 authors", "bf16"),
        ("fp8 scaled", "bf16"),
        ("fp8 scaled", "int8-weight-only"),
        ("fp8 scaled", "nf4"),
        ("Q4_0", "bf16"),
    ]
    assert [line["decoder"] for line in tried if "decoder" in line] == ["Q6_K", "fp8_e4m3 by row"]
    assert all(line["finite"] > line["numbers"] / 2 for line in tried if "decoder" in line)
    assert "Q4_K" in left_out["left_out"]


def test_strips_are_tried_in_little(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decode.main(["--tiny", "--rows", "32"]) == 0

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["way"] for line in lines if "way" in line] == ["whole", "strips of 32", "tiles of 512"]
    assert [bar["ok"] for bar in lines if "bar" in bar] == [True]


def test_strips_of_clips_are_tried_in_little(capsys: pytest.CaptureFixture[str]) -> None:
    case = ("--cases", "wan-ti2v-5b:256x256")

    assert gpu_decode_wan.main(["--tiny", *case, "--rows", "48", "--latent-frames", "2"]) == 0

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["way"] for line in lines if "way" in line] == ["whole", "strips of 48", "tiles of 512"]
    assert [bar["ok"] for bar in lines if "bar" in bar] == [True]


def test_the_first_job_of_a_model_stands_for_no_warm_one() -> None:
    def receipt(second: int, took_s: float, model: str = "demo-flux", **fields: Any) -> Receipt:
        clip = model == "demo-wan"
        asked = {"model": model, "prompt": "a red circle", "seed": 1, **({"num_frames": 17} if clip else {}), **fields}
        spec = fullsize.spec_of(TABLE[model], tiny=False, **asked)
        moment = "2026-11-26T20:00:{:09.6f}+00:00"
        return Receipt(
            id=f"{model}{second}", state="done", spec=spec,
            started_at=moment.format(second), finished_at=moment.format(second + took_s),
        )  # fmt: skip

    taken = demo.job_seconds(
        [receipt(20, 1.9, "demo-wan"), receipt(1, 3.0), receipt(5, 0.3), receipt(7, 0.9, num_inference_steps=8),
         receipt(9, 0.25), receipt(10, 5.0, "demo-wan")]
    )  # fmt: skip

    assert taken == {"picture": [0.3, 0.25], "clip": [1.9]}


def test_weights_are_the_same_only_with_the_same_bits_and_dtype() -> None:
    zeros = torch.zeros(2, 3)

    assert gpu_files._same_bits(zeros, zeros.clone())
    assert not gpu_files._same_bits(zeros, -zeros)
    assert not gpu_files._same_bits(zeros, zeros.int())
    assert not gpu_files._same_bits(zeros, zeros.view(3, 2))


def exact_line(**changes: Any) -> dict[str, Any]:
    same = {"lost_points": 0.0, "largest_difference": 0, "streamed_differs": {"ram": 0}, "weights_differing": 0}
    return same | changes


@pytest.mark.parametrize(
    ("layout", "plan", "prompts", "changes", "ok"),
    [
        ("fp8", "bf16", 64, {"lost_points": 10.0, "largest_difference": 90}, True),
        ("fp8", "bf16", 64, {"lost_points": 10.1}, False),
        ("fp8", "bf16", 8, {"lost_points": 12.5}, True),
        ("Q4_0", "bf16", 64, {"lost_points": 50.0}, True),
        ("fp8", "nf4", 64, {"lost_points": 50.0}, True),
        ("Q4_0", "bf16", 64, {"weights_differing": 1}, False),
        ("fp8", "nf4", 64, {"streamed_differs": {"ram": 1}}, False),
        ("bf16 authors", "bf16", 64, {"largest_difference": 1}, False),
    ],
)
def test_a_layout_is_judged_by_its_bits(
    layout: str, plan: str, prompts: int, changes: dict[str, Any], ok: bool
) -> None:
    of_name = {each.name: each for each in gpu_files._layouts("flux", tiny=False)}

    assert gpu_files._is_held(of_name[layout], plan, prompts, exact_line(**changes)) is ok


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_bench_that_misses_a_bar_does_not_hide_the_later_ones(tmp_path: Path) -> None:
    """Given a Python that only notes what it is to run, and fails for one script, make runs all and names that one."""
    python, ran, installed = tmp_path / "python", tmp_path / "ran", tmp_path / "installed"
    python.write_text(f'#!/bin/sh\necho "$2" >> {ran}\ntest "$2" != bench.demo\n', encoding="utf-8")
    python.chmod(0o755)
    installed.touch()
    command = ["make", "bench", f"BIN={tmp_path}", f"INSTALLED={installed}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = ["accuracy", "client", "demo", "handover", "inbox", "outlines", "register", "soak", "standstill"]

    assert ran.read_text().split() == [f"bench.{name}" for name in names]
    assert done.returncode == 2  # make's own, of a command that failed
    assert "Missed a bar, or failed: demo\n" in done.stderr
