"""Results of LoRAs in fewer bits that are kept: the bits of what is made on the fly, and never a failed job."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from safelight import fused as kept
from safelight import planner, prepared
from safelight.calibration import Calibration
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import Plan
from safelight.receipt import Receipt
from safelight.rung import Circumstances
from safelightd import fused, holds, probe, room, runjob
from safelightd.embeddings import Cache
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.pinnedset import PinnedSet
from safelightd.progress import Cancelled, Watch
from safelightd.shards import Entry
from tests.cli_steps import runner
from tests.conftest import Installation
from tests.daemon.test_worker import specs_of
from tests.integration.lora_files import random_lora, rescaled
from tests.integration.making import file_size_limit
from tests.integration.own_models import changed, with_own_models
from tests.integration.rendering import NoMeter, Run, plan_for, spec_for
from tests.integration.test_streaming import HELD

FLUX = "tiny-flux-schnell"
WAN = "tiny-wan-t2v-a14b"
PRECISION = "int8-weight-only"
TRANSFORMERS = {FLUX: ("transformer",), WAN: ("transformer", "transformer_2")}


@pytest.fixture
def own(installation: Installation, tiny_models_folder: Path) -> Installation:
    """An installation with a models folder of its own, and a LoRA named style."""
    own = with_own_models(installation, tiny_models_folder, FLUX, WAN)
    random_lora(own.paths.models / "loras/style.safetensors", FLUX, own.paths.models)
    return limited(own, 32)


def limited(installation: Installation, gib: float) -> Installation:
    (before,) = re.findall(r"\[worker\]\n(?:fused_gib = .*\n)?", installation.config.source.read_text())
    return changed(installation, before, f"[worker]\nfused_gib = {gib!r}\n")


def lora_of(own: Installation, scale: float = 1.0, seed: int = 1, model: str = FLUX) -> tuple[Lora, Path]:
    return rescaled(random_lora(own.root / f"{model}{seed}.safetensors", model, own.paths.models, seed=seed), scale)


def results_of(own: Installation, plan: Plan, *loras: tuple[Lora, Path], gpu: str = "") -> fused.Results:
    return fused.Results(own.config, own.models, plan, kept.loras_of([lora for lora, _ in loras]), gpu)


def run_of(own: Installation, *loras: tuple[Lora, Path], model: str = FLUX, **plan: Any) -> Run:
    """A job in fewer bits, which reads or keeps what its plan says."""
    fields = {"dtype": "bfloat16", "precision": PRECISION, **plan}
    spec = spec_for(model, **({"num_frames": 5} if model == WAN else {}))
    results = results_of(own, plan_for(model, **fields), *loras)
    return Run(spec, own.paths.models, plan_changes=fields, loras=loras, fused=results)


def keep(own: Installation, *loras: tuple[Lora, Path], model: str = FLUX, **plan: Any) -> Path:
    """Run a job that keeps what it makes; return the folder of its set."""
    run = run_of(own, *loras, model=model, keeping=True, **plan)
    run.latents()
    assert run.loader._fused is not None
    return run.loader._fused.folder


def whole(own: Installation) -> list[str]:
    return kept.usable(own.paths.models, own.models, prepared.versions())


def files_below(own: Installation) -> list[Path]:
    return [file for file in (own.paths.models / "fused").rglob("*") if file.is_file()]


# -- from the plan to the picture ---------------------------------------------------------------------------------


def on_a_card(
    spec: JobSpec, machine: Machine, table: Models, known: Calibration, around: Circumstances
) -> Plan:  # fmt: skip
    """Plan as for a card, which this machine has not, and compute on the CPU."""
    card = machine.model_copy(
        update={
            "device": "cuda", "gpu": "cpu", "capability": (8, 9),
            "vram_total_bytes": 16 * GIB, "vram_free_bytes": 15 * GIB,
        }
    )  # fmt: skip
    plan = planner.make_plan(spec, card, table, known, around)
    return plan.model_copy(update={"device": "cpu", "text_encoder_device": "cpu", "compiled": False})


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has jobs planned as for a card: plans for the CPU quantise nothing."""
    monkeypatch.setattr(room, "make_plan", on_a_card)


def run_job(own: Installation, scale: float = 1.0, **around: Any) -> Receipt:
    (spec,) = specs_of(own, ["a fox"])
    fields = {"loras": (Lora(name="style", scale=scale),), "precision": PRECISION, "seed": 7}
    cache = Cache(own.paths.embeddings, 1 * GIB)
    setting = runjob.Setting(own.config, own.models, own.ledger, PinnedSet(1 << 40), cache)
    watch = Watch(lambda _told: None, threading.Event(), NoMeter())
    return runjob.run_job(spec.model_copy(update=fields), 1, setting, watch, Circumstances(**around))


def pixels(own: Installation, receipt: Receipt) -> bytes:
    """What was drawn, without the record of its job."""
    with Image.open(own.paths.outbox / receipt.outputs[0].path) as picture:
        return picture.tobytes()


def what(receipt: Receipt) -> tuple[tuple[str, ...], bool]:
    assert receipt.plan is not None
    return receipt.plan.fused, receipt.plan.keeping


@pytest.mark.usefixtures("card")
def test_the_second_job_of_its_loras_keeps_what_it_makes_and_the_third_reads_it_for_the_same_picture(
    own: Installation,
) -> None:
    receipts = [run_job(own) for _ in range(3)]

    assert [what(receipt) for receipt in receipts] == [((), False), ((), True), (("transformer",), False)]
    assert len({pixels(own, receipt) for receipt in receipts}) == 1
    plans = [receipt.plan for receipt in receipts]
    assert [plan.rung.count("1 LoRA fused") for plan in plans if plan] == [1, 1, 1]
    assert plans[2] is not None
    assert "1 LoRA fused before" in plans[2].rung
    assert what(run_job(own, scale=0.5)) == ((), False)


@pytest.mark.usefixtures("card")
def test_the_first_job_keeps_what_it_makes_where_another_with_its_loras_waits(own: Installation) -> None:
    assert [what(run_job(own, again=True)), what(run_job(own))] == [((), True), (("transformer",), False)]


@pytest.mark.usefixtures("card")
def test_nothing_is_kept_nor_noted_where_the_limit_is_0_and_what_was_kept_goes_when_an_engine_starts(
    own: Installation,
) -> None:
    run_job(own, again=True)
    off = limited(own, 0)
    assert len(files_below(off)) == 3

    fused.tidy(off.config, off.models)

    assert what(run_job(off, again=True)) == ((), False)
    assert not list((off.paths.models / "fused").glob("*/*/*"))


@pytest.mark.usefixtures("card")
def test_a_lora_file_that_has_changed_makes_another_result(own: Installation) -> None:
    first, _ = run_job(own, again=True), run_job(own)
    random_lora(own.paths.models / "loras/style.safetensors", FLUX, own.paths.models, seed=9)
    other = run_job(own)

    assert what(other) == ((), False)
    assert pixels(own, other) != pixels(own, first)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def break_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"?" * 8 + content[16:])


def lie_about_names(file: Path) -> None:
    """A header that can be read, of as many bytes, in which a tensor has another name."""
    file.write_bytes(file.read_bytes().replace(b"context_embedder", b"context_embodder"))


def no_manifest(file: Path) -> None:
    (file.parent / prepared.MANIFEST).write_text("{}")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("harm", [cut, break_header, lie_about_names, no_manifest, Path.unlink])
def test_a_damaged_result_is_made_anew_and_fails_no_job(
    harm: Any, own: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_job(own, again=True)
    (file,) = (own.paths.models / "fused").rglob("*.safetensors")
    harm(file)
    with caplog.at_level("INFO", "safelight.fused"):
        second, third, fourth = (run_job(own) for _ in range(3))

    assert len({pixels(own, receipt) for receipt in (first, second, third, fourth)}) == 1
    assert what(second)[0] == ()
    assert what(fourth) == (("transformer",), False)
    assert "fused.removed" in caplog.text
    assert len(files_below(own)) == 3


@pytest.mark.usefixtures("card")
def test_a_result_that_goes_between_plan_and_load_is_done_without(
    own: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_job(own, again=True)

    def and_then_it_goes(*of: Any) -> Plan:
        plan = on_a_card(*of)
        for at in kept.sets(own.paths.models) if plan.fused else []:
            assert kept.remove_set(at)
        return plan

    monkeypatch.setattr(room, "make_plan", and_then_it_goes)
    second = run_job(own)

    assert what(second) == ((), False)
    assert pixels(own, second) == pixels(own, first)


# -- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", HELD[1:])
def test_what_is_kept_has_the_bits_of_what_is_made_in_every_precision(precision: str, own: Installation) -> None:
    lora = lora_of(own)
    made = run_of(own, lora, precision=precision).latents()

    keeping = run_of(own, lora, precision=precision, keeping=True).latents()
    read = run_of(own, lora, precision=precision, fused=("transformer",)).latents()

    assert torch.equal(made, keeping)
    assert torch.equal(made, read)
    plan = plan_for(FLUX, dtype="bfloat16", precision=precision)
    assert whole(own) == [f"{results_of(own, plan, lora).set_name}/transformer"]


@pytest.mark.parametrize("streamed_from", ["pinned", "file"])
def test_what_was_kept_by_a_job_that_streams_is_read_by_one_that_streams_otherwise(
    streamed_from: str, own: Installation
) -> None:
    lora, other = lora_of(own), lora_of(own, 0.5, seed=2)
    made = run_of(own, lora, other).latents()
    keep(own, lora, other, offload="partial", streamed={"transformer": (0, 2)})
    streaming = {"offload": "partial", "streamed": {"transformer": (1, 2, 3)}, "streamed_from": streamed_from}

    assert torch.equal(made, run_of(own, lora, other, fused=("transformer",), **streaming).latents())


def test_both_experts_are_kept_and_read(own: Installation) -> None:
    lora = lora_of(own, model=WAN)
    made = run_of(own, lora, model=WAN).latents()

    folder = keep(own, lora, model=WAN)

    assert sorted(at.name for at in folder.iterdir()) == ["transformer", "transformer_2"]
    assert torch.equal(made, run_of(own, lora, model=WAN, fused=TRANSFORMERS[WAN]).latents())


def test_weights_in_float16_are_another_set_of_the_same_bits_again(own: Installation) -> None:
    lora = lora_of(own, model=WAN)
    half = {"dtype": "float16", "precision": "nf4", "vae_dtype": "float32"}
    made = run_of(own, lora, model=WAN, **half).latents()

    folder = keep(own, lora, model=WAN, **half)

    dtypes = {tensor.dtype for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()}
    assert torch.float16 in dtypes
    assert torch.equal(made, run_of(own, lora, model=WAN, fused=TRANSFORMERS[WAN], **half).latents())
    assert keep(own, lora, model=WAN, precision="nf4") != folder


def test_blocks_that_are_pinned_stay_when_what_they_came_from_is_kept(own: Installation) -> None:
    pinned, lora = PinnedSet(1 << 40), lora_of(own)
    streaming = {"offload": "partial", "streamed": {"transformer": (0, 1, 2, 3)}}
    addresses = set()
    for more in ({}, {"keeping": True}, {"fused": ("transformer",)}):
        run = run_of(own, lora, **streaming, **more)
        Run(run.spec, run.models_folder, run.plan_changes, loras=run.loras, fused=run.fused, pinned=pinned).latents()
        assert pinned._memory is not None
        addresses.add((pinned._memory.bytes.data_ptr(), pinned._key))

    assert len(addresses) == 1


def test_several_files_are_written_where_one_would_be_large(own: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelightd.storedfolder.SHARD_BYTES", 100_000)
    monkeypatch.setattr("safelightd.shards.PIECE_BYTES", 1000)
    lora = lora_of(own)
    made = run_of(own, lora).latents()

    folder = keep(own, lora, offload="partial", streamed={"transformer": (1,)})

    assert len(list(folder.rglob("*.safetensors"))) > 2
    assert torch.equal(made, run_of(own, lora, fused=("transformer",)).latents())
    assert kept.damage(folder / "transformer") == []


# -- what is not kept ---------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_nothing_and_fails_nothing(own: Installation, caplog: pytest.LogCaptureFixture) -> None:
    lora = lora_of(own)
    made = run_of(own, lora).latents()
    with file_size_limit(50_000):
        found = run_of(own, lora, keeping=True).latents()

    assert torch.equal(made, found)
    assert files_below(own) == []
    assert "fused.not_kept" in caplog.text


@pytest.mark.parametrize(
    ("before", "after"), [("fused_gib = 1", "fused_gib = 1e-5"), ("disk_gib = 0", "disk_gib = 1e6")]
)
def test_a_limit_or_a_disk_that_is_too_small_for_one_keeps_nothing(
    before: str, after: str, own: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    tight = changed(limited(own, 1), before, after)
    lora = lora_of(tight)

    assert torch.equal(run_of(tight, lora).latents(), run_of(tight, lora, keeping=True).latents())
    assert files_below(tight) == []
    assert "do not fit [worker] fused_gib" in caplog.text
    assert probe.read_machine(tight.config).fused_room_bytes < 100_000


def test_the_room_for_both_experts_is_wanted_before_the_first_is_written(own: Installation) -> None:
    lora = lora_of(own, model=WAN)
    size = kept.held_bytes(keep(own, lora, model=WAN))
    shutil.rmtree(own.paths.models / "fused")
    tight = limited(own, 0.75 * size / GIB)

    keep(tight, lora, model=WAN)

    assert files_below(tight) == []


def test_a_job_that_is_cancelled_while_it_keeps_leaves_nothing(own: Installation) -> None:
    run = run_of(own, lora_of(own), keeping=True)
    results = run.loader._fused
    assert results is not None
    published = own.paths.models / FLUX / "transformer"

    def cancelled() -> None:
        with results.keeping("transformer", published, published / "config.json", "m") as keeper:
            keeper.begin([Entry("a", (4,), torch.int8), Entry("b", (4,), torch.int8)], 0)
            keeper.write({"a": torch.zeros(4, dtype=torch.int8)})
            assert len(files_below(own)) == 1
            raise Cancelled

    with pytest.raises(Cancelled):
        cancelled()

    assert files_below(own) == []


KILLED = """
import os, sys
from safelightd.storedfolder import emptied
from pathlib import Path
folder = Path(sys.argv[1])
with emptied(folder, "keeping"):
    (folder / "model.safetensors").write_bytes(b"half")
    print("begun", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_engine_writes(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", KILLED, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        yield writer
        writer.kill()


def test_what_a_killed_engine_left_is_removed_and_what_a_living_one_writes_is_let_be(
    own: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    lora = lora_of(own)
    target = results_of(own, run_of(own, lora).plan, lora).folder / "transformer"
    unfinished = target.with_name(f"transformer{prepared.UNFINISHED}")
    with another_engine_writes(unfinished):
        keep(own, lora)
        assert "another process is keeping this" in caplog.text
        fused.tidy(own.config, own.models)
        assert [file.name for file in files_below(own)] == ["model.safetensors"]
    assert unfinished.exists()

    fused.tidy(own.config, own.models)
    assert files_below(own) == []
    keep(own, lora)
    assert len(whole(own)) == 1


def test_what_was_being_removed_when_its_engine_was_killed_is_made_anew(own: Installation) -> None:
    lora = lora_of(own)
    folder = keep(own, lora) / "transformer"
    (folder / prepared.MANIFEST).unlink()
    assert whole(own) == []

    keep(own, lora)

    assert len(whole(own)) == 1
    assert kept.damage(folder) == []


def test_what_another_engine_has_made_meanwhile_is_left_as_it_is(own: Installation) -> None:
    folder = keep(own, lora_of(own))
    before = (folder / "transformer").stat().st_ino

    keep(own, lora_of(own))

    assert (folder / "transformer").stat().st_ino == before


def test_weights_that_change_while_they_are_read_are_not_kept(own: Installation) -> None:
    run = run_of(own, lora_of(own), keeping=True)
    results = run.loader._fused
    assert results is not None
    published = own.paths.models / FLUX / "transformer"
    with results.keeping("transformer", published, published / "config.json", "m") as keeper:
        keeper.begin([Entry("a", (4,), torch.int8)], 0)
        keeper.write({"a": torch.zeros(4, dtype=torch.int8)})
        (published / "config.json").write_text("{}")
        keeper.finish()

    assert files_below(own) == []


# -- what goes ----------------------------------------------------------------------------------------------------


def unused_for(at: Path, seconds: float) -> None:
    os.utime(at, (time.time() - seconds,) * 2)


def test_the_least_recently_used_goes_first_and_none_that_was_used_within_the_hour(own: Installation) -> None:
    first, second, third = (keep(own, lora_of(own, scale)) for scale in (0.1, 0.2, 0.3))
    tight = limited(own, 3.5 * kept.held_bytes(first) / GIB)

    refused = keep(tight, lora_of(own, 0.4))
    assert [at for at in (first, second, third, refused) if any(at.glob("*"))] == [first, second, third]

    unused_for(second, 2 * kept.RESTS_S)
    unused_for(third, 3 * kept.RESTS_S)
    fourth = keep(tight, lora_of(own, 0.5))
    assert [at for at in (first, second, third, fourth) if any(at.glob("*"))] == [first, second, fourth]


def test_what_a_job_reads_is_not_removed(own: Installation) -> None:
    lora = lora_of(own)
    folder = keep(own, lora)
    unused_for(folder, 2 * kept.RESTS_S)
    run = run_of(own, lora, fused=("transformer",))
    with run.loader.component("transformer", "cpu"):
        assert not kept.remove_set(folder)
        fused.tidy(limited(own, 0).config, own.models)
        assert len(whole(own)) == 1

    assert kept.remove_set(folder)
    assert not folder.exists()


def test_room_is_what_the_limit_leaves_beside_sets_in_use(own: Installation) -> None:
    first = keep(own, lora_of(own, 0.1))
    size = kept.held_bytes(first)
    tight = limited(own, 1.5 * size / GIB)

    def room() -> int:
        return kept.room_bytes(tight.config, tight.models, whole(tight))

    assert abs(room() - size // 2) <= 1
    unused_for(first, 2 * kept.RESTS_S)
    assert abs(room() - size * 3 // 2) <= 1


def test_loras_that_were_used_long_ago_are_forgotten(own: Installation) -> None:
    results = [results_of(own, run_of(own, lora_of(own, scale)).plan, lora_of(own, scale)) for scale in (0.1, 0.2)]
    for each in results:
        each.note_use()
    assert kept.seen(own.paths.models, FLUX) == {each.set_name for each in results}
    unused_for(results[0].folder, 2 * kept.SEEN_S)

    fused.tidy(own.config, own.models)

    assert kept.seen(own.paths.models, FLUX) == {results[1].set_name}
    assert kept.seen(own.paths.models, WAN) == frozenset()


def other_weights(own: Installation, _patch: pytest.MonkeyPatch) -> None:
    tiny_file = own.paths.models / FLUX / "transformer/config.json"
    tiny_file.write_text(tiny_file.read_text() + " ")


def weights_of_the_same_edges(own: Installation, _patch: pytest.MonkeyPatch) -> None:
    """As a merge of the same model: its first and last MiB may be those of the one that it takes the place of."""
    (file,) = (own.paths.models / FLUX / "transformer").glob("*.safetensors")
    os.utime(file, (0, 0))


def other_libraries(_own: Installation, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prepared, "LIBRARIES", ("torch",))


def other_arithmetic(_own: Installation, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kept, "VERSION", 2)


@pytest.mark.parametrize("change", [other_weights, weights_of_the_same_edges, other_libraries, other_arithmetic])
def test_a_stale_result_is_not_used_and_removed(
    change: Any, own: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(own, lora_of(own))
    assert len(probe.read_machine(own.config).fused) == 1
    change(own, monkeypatch)

    assert probe.read_machine(own.config).fused == ()
    fused.tidy(own.config, own.models)
    assert files_below(own) == []
    assert folder.exists()  # that its LoRAs were used is remembered


def test_what_is_kept_makes_way_for_jobs_where_the_disk_is_short(own: Installation) -> None:
    folder = keep(own, lora_of(own))
    short = changed(own, "min_free_disk_gib = 0", "min_free_disk_gib = 1e9")

    reasons = holds.read(short.config, user_hold=None, gpu=None)

    assert "min_free_disk_gib" in reasons["disk"]
    assert not folder.exists()


def test_folders_that_come_and_go_meanwhile_disturb_no_plan(own: Installation) -> None:
    begun, over = threading.Event(), threading.Event()

    def churn() -> None:
        at = kept.set_folder(own.paths.models, f"{FLUX}/{PRECISION}/{'0' * 16}")
        while not over.is_set():
            (at / "transformer").mkdir(parents=True, exist_ok=True)
            (at / "transformer" / "manifest.json").write_text("{}")
            shutil.rmtree(own.paths.models / kept.FOLDER, ignore_errors=True)
            begun.set()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert begun.wait(10)
        for _ in range(1000):
            usable = whole(own)
            assert usable == []
            assert kept.room_bytes(own.config, own.models, usable) > 0
            assert kept.seen(own.paths.models, FLUX) <= {f"{FLUX}/{PRECISION}/{'0' * 16}"}
    finally:
        over.set()
        thread.join()


def test_a_result_in_the_place_of_another_is_not_used(own: Installation) -> None:
    first, second = keep(own, lora_of(own, 0.1)), keep(own, lora_of(own, 0.2))
    shutil.rmtree(second)
    first.rename(second)

    assert whole(own) == []


def manifests(own: Installation) -> Mapping[str, kept.Manifest]:
    return {manifest.name: manifest for manifest in map(kept.read, kept.folders(own.paths.models))}


def test_a_manifest_says_all_that_the_bits_depend_on(own: Installation) -> None:
    loras = lora_of(own, 0.5), lora_of(own, seed=2)
    keep(own, *loras)

    (manifest,) = manifests(own).values()

    assert manifest.loras == ((loras[0][0].sha256, 0.5, "both"), (loras[1][0].sha256, 1.0, "both"))
    assert (manifest.key, manifest.precision, manifest.dtype, manifest.made_on) == (FLUX, PRECISION, "bfloat16", "cpu")
    assert manifest.source == prepared.source(own.paths.models / FLUX / "transformer")
    assert manifest.versions == prepared.versions()
    assert manifest.quantised == 40


def test_the_lock_of_a_reader_is_shared(own: Installation) -> None:
    lora = lora_of(own)
    folder = keep(own, lora) / "transformer"
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)

    run_of(own, lora, fused=("transformer",)).latents()

    assert not kept.remove(folder)
    os.close(descriptor)
    assert kept.remove(folder)


def test_a_loader_reads_what_is_kept_without_its_loras_in_memory(own: Installation) -> None:
    lora = lora_of(own)
    keep(own, lora)
    plan = plan_for(FLUX, dtype="bfloat16", precision=PRECISION, fused=("transformer",))
    facts = own.models[FLUX]
    loader = Loader(
        model_folder(facts, own.paths.models), plan, blocks=facts.blocks, models_folder=own.paths.models,
        loras=[lora], fused=results_of(own, plan, lora),
    )  # fmt: skip

    assert loader._changes == {}


# -- what a person sees and removes -------------------------------------------------------------------------------


def test_a_person_sees_how_much_is_kept_reads_it_again_and_removes_it(own: Installation) -> None:
    folder = keep(own, lora_of(own))
    safelight = runner(own)
    listed = json.loads(safelight("models", "list", "--json").stdout)
    assert {row["key"]: row["fused_bytes"] for row in listed if row["fused_bytes"]} == {FLUX: kept.held_bytes(folder)}
    assert "with LoRAs" in safelight("models", "list").stdout
    assert f"{PRECISION}/{folder.name}/transformer is as it was written" in safelight("models", "verify", FLUX).stdout

    (file,) = folder.rglob("*.safetensors")
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    found = safelight("models", "verify", FLUX)
    assert found.exit_code == 1
    assert f"{file}: damaged" in found.stdout
    assert f"safelight models rm {FLUX} --fused" in found.stdout

    assert safelight("models", "rm", FLUX, "--fused").exit_code == 0
    assert not list((own.paths.models / "fused").glob("*/*/*"))
    assert (own.paths.models / FLUX).is_dir()


def test_what_a_job_reads_is_not_removed_by_a_person_either(own: Installation) -> None:
    lora, safelight = lora_of(own), runner(own)
    keep(own, lora)
    with run_of(own, lora, fused=("transformer",)).loader.component("transformer", "cpu"):
        kept_on, refused = (safelight("models", "rm", FLUX, *more) for more in (["--fused"], ["--yes"]))

    assert (kept_on.exit_code, refused.exit_code) == (1, 2)
    assert "a job uses it" in kept_on.stderr
    assert "is in use by a job" in refused.stderr
    assert len(whole(own)) == 1


def test_a_model_that_is_removed_takes_what_was_kept_of_it_along(own: Installation) -> None:
    keep(own, lora_of(own))
    assert runner(own)("models", "rm", FLUX, "--yes").exit_code == 0

    assert files_below(own) == []


@pytest.mark.parametrize("words", [("../models", "--fused"), (FLUX, "--fused", "--delete", "x")])
def test_a_wrong_word_removes_nothing(words: tuple[str, ...], own: Installation) -> None:
    keep(own, lora_of(own))

    assert runner(own)("models", "rm", *words).exit_code == 2
    assert len(whole(own)) == 1
