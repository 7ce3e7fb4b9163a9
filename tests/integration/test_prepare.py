"""`safelight models prepare`, `verify` and `list`, on the tiny models and on a larger one.

The program itself starts torch in a process of its own, which takes seconds: most of these call what it calls there.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safelight import prepared
from safelight.errors import SafelightError
from safelight.plan import Precision
from safelightd import probe
from safelightd.precision import format_of
from safelightd.prepare import prepare as prepare_components
from safelightd.shards import Entry, Shard, split
from tests.cli_steps import process
from tests.conftest import Installation
from tests.integration.own_models import with_own_models
from tests.integration.rendering import Run, spec_for

FLUX = "tiny-flux-schnell"
WAN = "tiny-wan-t2v-a14b"


@pytest.fixture
def own(installation: Installation, tiny_models_folder: Path) -> Installation:
    """An installation with a models folder of its own, in which the tiny models are already built."""
    return with_own_models(installation, tiny_models_folder, FLUX, WAN)


def safelight(installation: Installation, *words: str) -> subprocess.CompletedProcess[str]:
    running = process(installation, *words)
    out, err = running.communicate(timeout=120)
    return subprocess.CompletedProcess(words, running.returncode, out, err)


def prepare(
    installation: Installation, key: str, precision: Precision, *components: str, force: bool = False
) -> tuple[list[str], str]:
    """Return what is ready, and what was said."""
    lines: list[str] = []
    facts = installation.models[key]
    ready = prepare_components(installation.config, facts, precision, components, force=force, say=lines.append)
    return ready, "\n".join(lines)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("precision", ["nf4", "fp8-weight-only", "int8-weight-only"])
def test_a_prepared_transformer_holds_the_parts_of_its_blocks_and_the_rest_in_bf16(
    precision: Precision, own: Installation
) -> None:
    ready, said = prepare(own, FLUX, precision)

    folder = prepared.folder(own.paths.models, FLUX, precision, "transformer")
    published, stored = tensors(own.paths.models / FLUX / "transformer"), tensors(folder)
    quantiser = format_of(precision)
    assert ready == [f"{FLUX}/{precision}/transformer"]
    assert quantiser
    for name, weight in published.items():
        if "blocks." in name and name.endswith(".weight") and weight.ndim == 2:
            parts = quantiser.quantise(weight.bfloat16())
            made = {part: stored.pop(f"{name}.{part}") for part in parts}
            assert all(torch.equal(parts[part].reshape(made[part].shape), made[part]) for part in parts), name
        else:
            assert torch.equal(stored.pop(name), weight.bfloat16()), name
    assert stored == {}
    assert (folder / "config.json").read_bytes() == (own.paths.models / FLUX / "transformer/config.json").read_bytes()
    assert [*prepared.folders(own.paths.models)] == [prepared.folder(own.paths.models, FLUX, precision, "transformer")]
    assert probe.read_machine(own.config).prepared == (f"{FLUX}/{precision}/transformer",)
    assert f"{FLUX}/{precision}/transformer: 40 weights in {precision}" in said
    assert "are free" in said


def test_in_bf16_every_large_component_is_prepared_and_what_its_class_keeps_stays_in_float32(own: Installation) -> None:
    ready, _ = prepare(own, WAN, "bf16")

    assert sorted(ready) == [f"{WAN}/bf16/{name}" for name in ("text_encoder", "transformer", "transformer_2")]
    folder = prepared.folder(own.paths.models, WAN, "bf16", "transformer")
    published = WanTransformer3DModel.from_pretrained(
        own.paths.models / WAN, subfolder="transformer", torch_dtype=torch.bfloat16, local_files_only=True
    ).state_dict()
    stored = tensors(folder)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.bfloat16", "torch.float32"}
    assert stored.keys() == published.keys()
    assert all(torch.equal(published[name], stored[name]) for name in published)


def test_what_is_published_in_bf16_is_not_prepared_in_it(own: Installation) -> None:
    file = own.paths.models / FLUX / "transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})

    ready, said = prepare(own, FLUX, "bf16", "transformer")

    assert (ready, said) == ([], f"{FLUX} transformer is published in bf16: nothing to do")


def test_a_text_encoder_is_prepared_when_it_is_named(own: Installation) -> None:
    ready, _ = prepare(own, FLUX, "nf4", "text_encoder_2")

    assert ready == [f"{FLUX}/nf4/text_encoder_2"]
    stored = tensors(prepared.folder(own.paths.models, FLUX, "nf4", "text_encoder_2"))
    assert [name for name in stored if ".wo." in name and stored[name].dtype == torch.bfloat16]
    assert not [name for name in stored if ".wo.weight." in name]


@pytest.mark.parametrize("precision", ["bf16", "nf4", "fp8-weight-only", "fp8-quanto", "int8-bnb"])
def test_a_job_from_prepared_folders_has_the_bits_of_one_that_quantises_on_the_way(
    precision: Precision, own: Installation
) -> None:
    components = ("transformer", "text_encoder_2")
    plan = {"dtype": "bfloat16", "precision": precision, "text_encoder_precision": precision}
    spec = spec_for(FLUX)
    on_the_way = Run(spec, own.paths.models, plan).latents()
    prepare(own, FLUX, precision, *components)

    from_prepared = Run(spec, own.paths.models, {**plan, "prepared": components}).latents()

    assert torch.equal(on_the_way, from_prepared)


def test_the_program_prepares_verify_names_the_damaged_file_and_the_remedy_mends_it(own: Installation) -> None:
    done = safelight(own, "models", "prepare", FLUX, "--precision", "nf4")
    well = safelight(own, "models", "verify")
    folder = prepared.folder(own.paths.models, FLUX, "nf4", "transformer")
    file = folder / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)

    damaged = safelight(own, "models", "verify", FLUX)
    other = safelight(own, "models", "verify", "flux-dev")
    remedy = f"safelight models prepare {FLUX} --precision nf4 --component transformer --force"

    assert (done.returncode, done.stdout) == (0, f"{FLUX}/nf4/transformer\n"), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{FLUX}/nf4/transformer is ready, ")
    assert (well.returncode, well.stdout) == (0, f"{FLUX}/nf4/transformer is as it was written\n")
    assert damaged.returncode == 1
    assert damaged.stdout == f"{file}: damaged: its bytes are not those that were written. Make it anew: {remedy}\n"
    assert (other.returncode, other.stderr) == (0, "nothing of flux-dev is pulled, registered or prepared\n")

    rows = {row["key"]: row for row in json.loads(safelight(own, "models", "list", "--json").stdout)}
    expected = {"precision": "nf4", "component": "transformer", "current": True}
    assert [{name: row[name] for name in expected} for row in rows[FLUX]["prepared"]] == [expected]
    assert rows["flux-dev"]["prepared"] == []

    prepare(own, FLUX, "nf4", "transformer", force=True)  # what the remedy runs
    assert safelight(own, "models", "verify").returncode == 0


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: os.truncate(folder / "config.json", 3), "config.json: is 3 bytes long and was"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read (No such file or directory)"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: damaged, or of a later version"),
        (lambda folder: folder.rename(folder.with_name("transformer_2")), f"is that of {WAN}/nf4/transformer."),
    ],
)
def test_every_harm_to_a_prepared_folder_is_named_and_none_of_it_is_used(
    harm: Any, says: str, own: Installation
) -> None:
    prepare(own, WAN, "nf4", "transformer")
    harm(prepared.folder(own.paths.models, WAN, "nf4", "transformer"))

    (found,) = prepared.folders(own.paths.models)
    (line,) = prepared.damage(found)

    assert says in line
    assert f"Make it anew: safelight models prepare {WAN} --precision nf4 --component {found.name} --force" in line


def test_the_second_time_nothing_is_done_unless_the_source_has_changed(own: Installation) -> None:
    prepare(own, FLUX, "fp8-weight-only")
    name = f"{FLUX}/fp8-weight-only/transformer"
    folder = prepared.folder(own.paths.models, FLUX, "fp8-weight-only", "transformer")
    first = folder.stat().st_ino
    published = own.paths.models / FLUX / "transformer"
    os.utime(published / "config.json")  # copied elsewhere and back: the same content

    again, said = prepare(own, FLUX, "fp8-weight-only")
    file = published / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    machine = probe.read_machine(own.config)
    with pytest.raises(SafelightError) as changed:
        prepare(own, FLUX, "fp8-weight-only")

    assert again == [name]
    assert "nothing to do" in said
    assert machine.prepared == ()
    assert str(changed.value) == (
        f"{name}: the weights in {published} have changed since it was made. Make it anew with --force."
    )
    assert folder.stat().st_ino == first

    assert prepare(own, FLUX, "fp8-weight-only", force=True)[0] == [name]
    assert folder.stat().st_ino != first
    assert probe.read_machine(own.config).prepared == (name,)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["transformer"]


def test_a_model_that_moves_to_other_weights_loses_what_was_prepared_of_the_old(own: Installation) -> None:
    prepare(own, FLUX, "nf4")
    finetune = own.root / "finetune"
    shutil.copytree(own.paths.models / FLUX / "transformer", finetune)
    row = {FLUX: {"components": {"transformer": str(finetune)}}}
    config = replace(own.config, settings=own.config.settings.model_copy(update={"models": row}))

    copied = probe.read_machine(config).prepared
    file = finetune / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})

    assert copied == (f"{FLUX}/nf4/transformer",)
    assert probe.read_machine(config).prepared == ()


def test_published_weights_may_be_deleted_once_they_are_prepared(own: Installation) -> None:
    prepare(own, FLUX, "nf4")
    (own.paths.models / FLUX / "transformer/diffusion_pytorch_model.safetensors").unlink()

    assert probe.read_machine(own.config).prepared == (f"{FLUX}/nf4/transformer",)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nonsense", "--precision", "nf4"), "nonsense: is not a model. Known: "),
        ((FLUX, "--precision", "nf5"), "nf5"),
    ],
)
def test_a_wrong_word_is_refused_by_the_program(words: tuple[str, ...], says: str, own: Installation) -> None:
    done = safelight(own, "models", "prepare", *words)

    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("key", "precision", "components", "code", "says"),
    [
        (FLUX, "nf4", ("vae", "x"), 2, "component vae has no repeated blocks. Use transformer, text_encoder_2."),
        (FLUX, "fp8-dynamic", (), 1, "which a CPU cannot. Use fp8-weight-only."),
        ("flux-dev", "nf4", (), 1, "model_index.json is missing. Put the diffusers folder of"),
    ],
)
def test_what_cannot_be_prepared_is_refused_with_the_reason(
    key: str, precision: Precision, components: tuple[str, ...], code: int, says: str, own: Installation
) -> None:
    with pytest.raises(SafelightError) as refused:
        prepare(own, key, precision, *components)

    assert says in str(refused.value)
    assert refused.value.exit_code == code
    assert not (own.paths.models / "prepared").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(own: Installation) -> None:
    policy = own.config.settings.policy.model_copy(update={"min_free_disk_gib": 1_000_000})
    config = replace(own.config, settings=own.config.settings.model_copy(update={"policy": policy}))

    with pytest.raises(SafelightError, match="Free some space"):
        prepare(replace(own, config=config), FLUX, "nf4")

    assert not (own.paths.models / "prepared").exists()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 10), "lies outside of the file: it is cut"),
        (lambda file: file.unlink(), "is missing. Fetch the model anew."),
        (lambda file: file.write_bytes(b"\0" * 100), "no safetensors file"),
        (
            lambda file: save_file({"x": torch.zeros(1)}, file, metadata={"format": "pt"}),
            ".weight is missing. Fetch the model anew.",
        ),
    ],
)
def test_damaged_weights_are_refused_and_leave_nothing(harm: Any, says: str, own: Installation) -> None:
    file = own.paths.models / FLUX / "transformer/diffusion_pytorch_model.safetensors"
    harm(file)

    with pytest.raises(SafelightError, match=str(file.parent)) as refused:
        prepare(own, FLUX, "nf4")

    assert says in str(refused.value)
    assert not (own.paths.models / "prepared").exists()


def test_a_full_disk_is_named_and_leaves_nothing(own: Installation) -> None:
    """A limit on the size of files stops a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(SafelightError, match="File too large"):
            prepare(own, FLUX, "nf4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

    assert list((own.paths.models / "prepared" / FLUX / "nf4").iterdir()) == []


def test_two_at_once_do_not_write_over_each_other(own: Installation) -> None:
    unfinished = prepared.folder(own.paths.models, FLUX, "nf4", "transformer.unfinished")
    unfinished.mkdir(parents=True)
    (unfinished / "of-the-other").touch()
    descriptor = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(SafelightError, match="another process is preparing this"):
            prepare(own, FLUX, "nf4")
    finally:
        os.close(descriptor)

    assert (unfinished / "of-the-other").exists()


LARGE = "large"
LARGE_BLOCKS = 12
LARGE_WEIGHTS_BYTES = 400_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan transformer of 403 MB in bf16, with random weights in three shards."""
    folder = tmp_path_factory.mktemp("large")
    source = folder / "published" / "transformer"
    source.mkdir(parents=True)
    (folder / "published/model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]})
    )
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=8, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64, freq_dim=64,
            ffn_dim=4096, num_layers=LARGE_BLOCKS,
        )  # fmt: skip
    model.save_config(source)
    stream = torch.Generator().manual_seed(3)
    names = sorted(model.state_dict())
    made = {
        name: torch.rand(model.state_dict()[name].shape, generator=stream, dtype=torch.bfloat16).sub_(0.5)
        for name in names
    }
    weight_map = {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        own = {name: made[name] for name in names[i::3]}
        save_file(own, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = source / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert sum(tensor.nbytes for tensor in made.values()) > LARGE_WEIGHTS_BYTES
    return folder / "published"


def with_large(installation: Installation, large: Path) -> Path:
    """Add the large model to an installation; return its models folder."""
    file = installation.config.source
    folder = installation.root / "models"
    text = file.read_text().replace(f'models = "{installation.paths.models}"', f'models = "{folder}"')
    file.write_text(f'{text}[models.{LARGE}]\nlike = "tiny-wan-ti2v"\npath = "{large}"\ntiny = false\n')
    return folder


def anonymous_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024 if "RssAnon" in fields else 0


@contextmanager
def preparing(installation: Installation) -> Iterator[subprocess.Popen[str]]:
    """Have `safelight models prepare` write its first shard."""
    unfinished = prepared.folder(installation.root / "models", LARGE, "fp8-weight-only", "transformer.unfinished")
    with process(installation, "models", "prepare", LARGE, "--precision", "fp8-weight-only") as running:
        while running.poll() is None and not list(unfinished.glob("*.safetensors")):
            time.sleep(0.002)
        assert running.poll() is None, running.communicate()
        yield running


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_starts_over_in_little_ram(
    installation: Installation, large: Path
) -> None:
    folder = with_large(installation, large)
    target = prepared.folder(folder, LARGE, "fp8-weight-only", "transformer")
    with preparing(installation) as running:
        running.kill()
    left = target.with_name("transformer.unfinished")
    (left / "diffusion_pytorch_model.safetensors").rename(left / "left-behind")

    assert not target.exists()
    assert [*prepared.folders(folder)] == []

    with preparing(installation) as running:
        before = peak = anonymous_bytes(running.pid)
        while running.poll() is None:
            peak = max(peak, anonymous_bytes(running.pid))
            time.sleep(0.002)

    manifest = prepared.read(target)
    assert running.returncode == 0
    assert manifest
    assert manifest.quantised == 10 * LARGE_BLOCKS
    assert 200_000_000 < manifest.size_bytes < 230_000_000
    assert peak - before < 150_000_000
    assert sorted(path.name for path in target.parent.iterdir()) == ["transformer"]
    assert not (target / "left-behind").exists()
    assert prepared.damage(target) == []


def test_an_interrupted_run_removes_what_it_wrote(installation: Installation, large: Path) -> None:
    folder = with_large(installation, large)
    with preparing(installation) as running:
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=300)

    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert list(prepared.folder(folder, LARGE, "fp8-weight-only", "").iterdir()) == []


def test_a_shard_is_a_safetensors_file_whose_every_tensor_is_aligned(tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "b": torch.arange(7, dtype=torch.uint8),
        "a": torch.tensor(1.5),
        "d": torch.linspace(-2, 2, 9).to(torch.float8_e4m3fn).view(3, 3),
        "c": torch.arange(5, dtype=torch.bfloat16).view(1, 5),
        "e": torch.empty(0, 4),
    }
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()]
    with Shard(tmp_path / "model.safetensors", entries) as shard:
        for name, tensor in reversed(made.items()):
            shard.write(name, tensor)
        shard.finish()

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(made)
        for name, tensor in made.items():
            assert torch.equal(tensor.float(), file.get_tensor(name).float()), name
    assert shard.nbytes == (tmp_path / "model.safetensors").stat().st_size


def test_what_belongs_together_is_in_one_shard() -> None:
    groups = [[Entry(f"{i}.{part}", (size,), torch.uint8) for part in "ab"] for i, size in enumerate([3, 3, 9, 1])]

    shards = split(groups, limit_bytes=12)

    assert [[entry.name for entry in shard] for shard in shards] == [
        ["0.a", "0.b", "1.a", "1.b"],
        ["2.a", "2.b"],
        ["3.a", "3.b"],
    ]


def test_the_client_offers_every_precision_that_can_be_prepared() -> None:
    from safelight.commands import models as commands

    assert commands.PRECISIONS == prepared.PRECISIONS
