"""How LoRAs are written, found and kept. No torch: what is in a file does not matter here, but that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight import digests, lora, lorafiles, promptfile
from safelight.draft import parse_options
from safelight.errors import InvalidJob
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.wan_cli import refusals
from tests.client.test_expand import TABLE, draft, expanded, faults
from tests.client.test_plan import gpu, job, plan_of


def safetensors(file: Path, content: bytes = b"\0" * 16, cut: int = 0) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [len(content) // 4], "data_offsets": [0, len(content)]}})
    whole = len(header).to_bytes(8, "little") + header.encode() + content
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(whole[: len(whole) - cut])
    return file


# -- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("style", [Lora(name="style")]),
        ("style:0.8", [Lora(name="style", scale=0.8)]),
        ("a/style:-1, grain", [Lora(name="a/style", scale=-1.0), Lora(name="grain")]),
        ("fast:1:high,fast2:1:low", [Lora(name="fast", expert="high"), Lora(name="fast2", expert="low")]),
        ("my/file.safetensors:2", [Lora(path="my/file.safetensors", scale=2.0)]),
        ([{"name": "style", "scale": 1}, "grain:0.5"], [Lora(name="style"), Lora(name="grain", scale=0.5)]),
        ([{"path": "x.safetensors", "expert": "low"}], [Lora(path="x.safetensors", expert="low")]),
        ({"name": "style"}, [Lora(name="style")]),
        ([], []),
    ],
)
def test_loras_are_read_from_words_lists_and_mappings(written: object, read: list[Lora]) -> None:
    assert lora.read(written) == tuple(read)


@pytest.mark.parametrize(
    "written",
    [
        "style:much", "style:1:2:3", ":1", "style:1:middle", "../style", "/etc/style", "~/style", 7, [7], [{}],
        [{"name": "a", "path": "b.safetensors"}], [{"name": "a", "weight": 1}], [{"name": "a", "scale": True}],
        "style:nan", [{"name": "a\nb"}], [{"name": "<x>"}],
    ],
)  # fmt: skip
def test_what_is_no_lora_is_a_fault(written: object) -> None:
    told = faults(draft(fields={"loras": written}))

    assert len(told) == 1
    assert told[0].startswith("n.txt:1: loras: ")


@given(st.text())
def test_any_text_is_loras_or_a_fault(text: str) -> None:
    for read in (lora.read, lora.take_tags):
        with suppress(ValueError):
            read(text)


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("a red fox", "a red fox", []),
        ("a red fox <lora:style:0.8>", "a red fox", [Lora(name="style", scale=0.8)]),
        ("<lora:a:1><lora:b>, a fox", ", a fox", [Lora(name="a"), Lora(name="b")]),
        ("a fox <lora:style:0.8>, in snow", "a fox, in snow", [Lora(name="style", scale=0.8)]),
        ("<LORA:x:1> a < b", "<LORA:x:1> a < b", []),
    ],
)
def test_tags_leave_the_prompt_and_are_loras(prompt: str, text: str, found: list[Lora]) -> None:
    assert lora.take_tags(prompt) == (text, tuple(found))


def test_a_job_has_the_loras_of_its_list_and_of_its_prompts_and_the_template_keeps_what_was_written() -> None:
    (spec,) = expanded(draft("a {fox <lora:fur:0.5>|fox <lora:fur:0.5>}", fields={"loras": "style:0.8"}))

    assert [(each.name, each.scale) for each in spec.loras] == [("style", 0.8), ("fur", 0.5)]
    assert spec.prompt == "a fox"
    assert spec.template == "a {fox <lora:fur:0.5>|fox <lora:fur:0.5>}"


@pytest.mark.parametrize(
    ("prompt", "fields", "says"),
    [
        ("a <lora:x:0.5:0.7>", {}, "scales text encoder and model apart"),
        ("a <lora:x:te=0.5>", {}, "scales text encoder and model apart"),
        ("a <lora:>", {}, "has no name"),
        (
            "a fox",
            {"negative_prompt": "b <lora:x>", "true_cfg_scale": 3, "model": "flux-dev"},
            "in the negative prompt",
        ),
        ("a <lora:x:0.5>", {"loras": "x"}, "LoRA x is named twice"),
        ("a <lora:x:99>", {}, "scale 99 is outside -10 to 10"),
        ("a <lora:x:1:high>", {}, "flux-schnell has one expert, not a high one"),
        ("a fox", {"loras": ",".join(f"n{i}" for i in range(17))}, "17 LoRAs are named"),
    ],
)
def test_tags_and_lists_that_cannot_be_meant_are_faults(prompt: str, fields: dict[str, Any], says: str) -> None:
    assert [says in told for told in faults(draft(prompt, fields=fields))] == [True]


def test_one_lora_may_have_two_scales_for_two_experts() -> None:
    fields = {"model": "wan-t2v-a14b", "loras": "fast:1:high, fast:0.5:low"}

    (spec,) = expanded(draft(fields=fields))

    assert [(each.scale, each.expert) for each in spec.loras] == [(1.0, "high"), (0.5, "low")]


def test_options_and_files_name_loras_alike() -> None:
    options = parse_options(["--prompt", "a fox", "--lora", "style:0.8", "--lora=grain"], "add").fields
    (line,) = promptfile.parse(b"--prompt a fox --lora style:0.8 --lora grain", "n.txt")
    (row,) = promptfile.parse(b'prompt,loras\na fox,"style:0.8,grain"', "n.csv")
    (listed,) = promptfile.parse(
        b"jobs:\n- prompt: a fox\n  loras:\n  - name: style\n    scale: 0.8\n  - grain", "n.yaml"
    )

    read = [lora.read(fields["loras"]) for fields in (options, line.fields, row.fields, listed.fields)]
    assert read == [(Lora(name="style", scale=0.8), Lora(name="grain"))] * 4


def test_a_matrix_may_have_loras_for_an_axis() -> None:
    specs = expanded(draft(matrix={"loras": ("a:0.5", "a:1")}))

    assert [spec.loras[0].scale for spec in specs] == [0.5, 1.0]
    assert [spec.axes for spec in specs] == [{"loras": "a:0.5"}, {"loras": "a:1"}]


def test_wans_own_program_takes_none() -> None:
    told = [problem for _, problem, _ in refusals({"loras": (Lora(name="x"),)}, TABLE["wan-ti2v-5b"])]

    assert "LoRAs would be ignored by Wan's own program" in told


def test_a_spec_keeps_its_loras_as_json() -> None:
    spec = job(loras=[{"name": "style", "scale": 0.8}])

    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_name_is_found_with_digest_and_size_in_folders_and_behind_links(tmp_path: Path) -> None:
    file = safetensors(tmp_path / "elsewhere/style.safetensors")
    (tmp_path / "models/loras").mkdir(parents=True)
    (tmp_path / "models/loras/mine").symlink_to(tmp_path / "elsewhere")

    for name in ("mine/style", "style"):
        found = lorafiles.find(Lora(name=name, scale=0.3), tmp_path / "models")
        assert (found.name, found.scale, found.size_bytes) == ("mine/style", 0.3, file.stat().st_size)
        assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (
            lorafiles.file_of(found, tmp_path / "models", tmp_path) == tmp_path / "models/loras/mine/style.safetensors"
        )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stile", "Did you mean style?"),
        ("GRAIN", "There are grain, style"),
        ("outline", "or outlines?"),
        ("old", "it is pickled, and a pickle can run any program"),
        ("both", "Use a/both or b/both."),
        ("cut", "it is cut"),
        ("text", "it is no safetensors file"),
    ],
)
def test_a_name_that_cannot_be_used_says_why(name: str, says: str, tmp_path: Path) -> None:
    top = tmp_path / "loras"
    for found in ("style", "grain"):
        safetensors(top / f"{found}.safetensors")
    if name in ("both", "cut", "text"):
        (top / "grain.safetensors").unlink()
    if name == "both":
        safetensors(top / "a/both.safetensors")
        safetensors(top / "b/both.safetensors")
    if name == "cut":
        safetensors(top / "cut.safetensors", cut=3)
    if name == "text":
        (top / "text.safetensors").write_text("hello, this is none")
    (top / "old.pt").write_bytes(b"\x80\x04")

    with pytest.raises(InvalidJob) as caught:
        lorafiles.find(Lora(name=name), tmp_path)

    assert says in str(caught.value)


def test_the_lora_that_comes_with_safelight_is_known_by_name_where_there_is_no_folder(tmp_path: Path) -> None:
    found = lorafiles.find(Lora(name="outlines", scale=0.5), tmp_path)

    file = lorafiles.file_of(found, tmp_path, tmp_path)
    assert (found.name, found.scale, found.size_bytes) == ("outlines", 0.5, file.stat().st_size)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["", "mine/"])
def test_a_file_of_ones_own_goes_before_the_one_that_comes_with_safelight(place: str, tmp_path: Path) -> None:
    own = safetensors(tmp_path / f"loras/{place}outlines.safetensors")

    found = lorafiles.find(Lora(name="outlines"), tmp_path)

    assert found.name == f"{place}outlines"
    assert lorafiles.file_of(found, tmp_path, tmp_path) == own


def test_a_shipped_lora_that_was_damaged_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (shipped,) = lorafiles.shipped_names().values()
    copy = tmp_path / shipped.name
    shutil.copy(shipped.with_name(digests.NAME), tmp_path)
    shutil.copy(shipped, copy)
    lorafiles.check_shipped(copy, "outlines")
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x55")

    with pytest.raises(InvalidJob, match=r"outlines\.safetensors is not as shipped"):
        lorafiles.check_shipped(copy, "outlines")


def test_a_file_that_changes_after_its_submission_is_refused(tmp_path: Path) -> None:
    file = safetensors(tmp_path / "loras/style.safetensors")
    found = lorafiles.find(Lora(name="style"), tmp_path)
    safetensors(file, b"\1" * 16)
    os.utime(file, (1, 1))

    with pytest.raises(InvalidJob, match="has changed since it was submitted"):
        lorafiles.file_of(found, tmp_path, tmp_path)
    file.unlink()
    with pytest.raises(InvalidJob, match=r"no style\.safetensors"):
        lorafiles.file_of(found, tmp_path, tmp_path)


def test_a_file_beside_a_job_is_kept_by_its_digest(tmp_path: Path) -> None:
    file = safetensors(tmp_path / "x.safetensors")

    kept = lorafiles.store(Lora(path="x.safetensors", scale=0.5), file, tmp_path / "inputs")
    content = file.read_bytes()
    file.unlink()

    assert kept.scale == 0.5
    assert lorafiles.file_of(kept, tmp_path, tmp_path / "inputs").read_bytes() == content
    assert [found.name for found in (tmp_path / "inputs").iterdir()] == [kept.sha256]


@pytest.mark.parametrize(
    ("name", "cut"), [("x.ckpt", 0), ("x.safetensors", 5), ("link.safetensors", 0), ("none.safetensors", 0)]
)
def test_a_file_that_cannot_be_used_is_not_kept(name: str, cut: int, tmp_path: Path) -> None:
    safetensors(tmp_path / name.replace("link", "x").replace("none", "x"), cut=cut)
    if name.startswith("link"):
        (tmp_path / name).symlink_to(tmp_path / "x.safetensors")

    with pytest.raises(InvalidJob):
        lorafiles.store(Lora(path=name), tmp_path / name, tmp_path / "inputs")

    assert not (tmp_path / "inputs").exists() or not list((tmp_path / "inputs").iterdir())


# -- plans ---------------------------------------------------------------------------------------------------------


def with_loras(size_bytes: int = 300_000_000, **written: Any) -> JobSpec:
    return job(**written).model_copy(update={"loras": (Lora(name="x", sha256="0" * 64, size_bytes=size_bytes),)})


def test_the_plan_counts_a_loras_ram_and_says_that_it_is_fused() -> None:
    without, plan = plan_of(job(), gpu(16)), plan_of(with_loras(), gpu(16))

    assert plan.loras == 1
    assert "1 LoRA fused" in plan.rung
    for phase in ("encode", "decode"):
        assert plan.predicted[phase].host_bytes == without.predicted[phase].host_bytes + 600_000_000


def test_prepared_weights_in_fewer_bits_are_not_used_with_a_lora_and_those_in_bf16_are() -> None:
    machine = gpu(16, prepared=("flux-schnell/fp8-weight-only/transformer", "flux-schnell/bf16/transformer"))

    assert plan_of(job(precision="fp8-weight-only"), machine).prepared == ("transformer",)
    assert plan_of(with_loras(precision="fp8-weight-only"), machine).prepared == ()
    assert plan_of(with_loras(precision="bf16"), machine).prepared == ("transformer",)


def test_a_night_of_loras_in_fewer_bits_is_told_what_each_job_does_again() -> None:
    plan = plan_of(with_loras(precision="fp8-weight-only"), gpu(16), waiting=50)

    assert [warning for warning in plan.warnings if "models prepare" in warning] == []
    assert any("adds its LoRAs and makes fp8-weight-only" in warning for warning in plan.warnings)


def test_blocks_that_are_pinned_with_another_lora_are_filled_and_not_pinned_anew() -> None:
    from safelight.rung import Pinned

    spec = with_loras(precision="bf16", offload="partial", compile="off")
    first = plan_of(spec, gpu(16))
    blocks = first.streamed["transformer"]
    mine = ("0" * 64, 1.0, "both")

    def after(*loras: tuple[str, float, str]) -> Any:
        return plan_of(spec, gpu(16), pinned=Pinned("flux-schnell", "transformer", "bf16", "bfloat16", blocks, loras))

    assert after(mine).pinned_before
    assert not after().pinned_before
    shipped = [plan.predicted["denoise"].shipped for plan in (first, after(), after(mine))]
    assert [found.pin_seconds > 0 for found in shipped if found] == [True, False, False]
    assert shipped[0].load_seconds == shipped[1].load_seconds > shipped[2].load_seconds
