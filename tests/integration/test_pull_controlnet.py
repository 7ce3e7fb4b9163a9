"""`safelight models pull KEY --controlnet NAME`, against a hub on localhost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from safelight import published, pulled
from safelight.errors import BadConfig, InvalidJob, SafelightError
from safelightd import pull as pulling
from safelightd import tiny
from safelightd.hub import NoAccess, NotOnHub, Unreachable
from safelightd.modelfolder import controlnet_folder
from safelightd.weights import BadModelFolder
from tests.cli_steps import process, runner
from tests.conftest import Installation
from tests.hub_server import COMMIT, LICENSED, Hub, files_of, serving, with_hub
from tests.integration.rendering import Run, picture, spec_for

DEV = "tiny-flux-dev"
COMMAND = "safelight models pull fox --controlnet lines"

ROW = """
[models.fox]
like = "tiny-flux-dev"
tiny = false
[models.fox.controlnets.lines]
repository = "somebody/lines"
licence = "Some licence"
parameters = 282_048
blocks = []
[models.fox.controlnets.none]
parameters = 1
blocks = []
"""

WEIGHTS = "diffusion_pytorch_model.safetensors"

NEVER = {
    "README.md": b"# A ControlNet",
    "images/pose.png": b"a picture",
    "images/config.json": b"{}",
    "diffusion_pytorch_model.bin": b"a pickle" * 20_000,
    "diffusion_pytorch_model.fp16.safetensors": b"a second copy" * 20_000,
    "flux-lines.safetensors": b"a third copy" * 20_000,
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("net") / "tiny"
    tiny.build_controlnet(folder)
    return {name: content for name, content in files_of(folder).items() if name in ("config.json", WEIGHTS)}


@pytest.fixture
def hub(net: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub(files={**net, **NEVER}, repository="somebody/lines")) as server:
        yield server


@pytest.fixture
def own(installation: Installation, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """An installation with an empty models folder, whose hub is the one on localhost, and no token."""
    return with_hub(installation, hub, monkeypatch, ROW)


Pull = Callable[..., Path | None]


@pytest.fixture
def pull(own: Installation, hub: Hub) -> Pull:
    """Calls what `safelightd pull` calls."""

    def call(key: str = "lines", *, force: bool = False) -> Path | None:
        what = published.named(own.models, "fox", key, own.paths.models)
        return pulling.pull(
            own.config, what, force=force, say=lambda _line: None, ask=lambda: True, tell=lambda *_told: None,
            pauses_s=(0.01,), endpoint=hub.url,
        )  # fmt: skip

    return call


def place(own: Installation) -> Path:
    return own.paths.models / "controlnets/lines"


def here(own: Installation) -> str:
    rows: list[dict[str, Any]] = json.loads(runner(own)("models", "list", "--json").stdout)
    (row,) = [each for row in rows if row["key"] == "fox" for each in row["controlnets"] if each["key"] == "lines"]
    assert (row["repository"], row["licence"], row["folder"]) == ("somebody/lines", "Some licence", str(place(own)))
    return str(row["here"])


def test_its_settings_and_one_copy_of_its_weights_are_fetched_to_where_jobs_look(
    own: Installation, hub: Hub, pull: Pull, net: dict[str, bytes], tiny_models_folder: Path
) -> None:
    assert here(own) == "missing"

    assert pull() == place(own) == controlnet_folder(own.models["fox"], "lines", own.paths.models)

    found = files_of(place(own))
    found.pop(pulled.MANIFEST)
    assert found == net
    manifest = pulled.read(place(own))
    assert manifest
    assert (manifest.key, manifest.repository, manifest.commit) == ("lines", "somebody/lines", COMMIT)
    assert here(own) == "present"
    assert "lines present" in runner(own)("models", "list").stdout
    hub.asked.clear()
    assert pull() == place(own)
    assert hub.asked == []
    fields = {"controlnet": {"model": "tiny", "image": "0" * 64}, "num_inference_steps": 2}
    of_pulled, of_built = (
        Run(spec_for(DEV, **fields), tiny_models_folder, control_image=picture(), controlnet=folder).latents()
        for folder in (place(own), None)
    )
    assert torch.equal(of_pulled, of_built)


def test_shards_are_those_that_the_index_names(own: Installation, hub: Hub, pull: Pull, net: dict[str, bytes]) -> None:
    weights = load(hub.files.pop(WEIGHTS))
    names = sorted(weights)
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    hub.files |= {shard: save({name: weights[name] for name in part}) for shard, part in shards.items()}
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    hub.files[f"{WEIGHTS}.index.json"] = json.dumps({"weight_map": weight_map}).encode()

    pull()

    assert sorted(file.name for file in place(own).iterdir()) == sorted(
        [*shards, f"{WEIGHTS}.index.json", "config.json", pulled.MANIFEST]
    )
    (place(own) / min(shards)).unlink()
    assert here(own) == "incomplete"


def test_a_hub_that_goes_away_leaves_nothing_that_looks_whole_and_the_next_pull_goes_on(
    own: Installation, hub: Hub, pull: Pull, net: dict[str, bytes]
) -> None:
    half = len(net[WEIGHTS]) // 2
    hub.cut[WEIGHTS] = [half, 0, 0]
    with pytest.raises(Unreachable, match="What has arrived is kept"):
        pull()

    assert not place(own).exists()
    assert here(own).endswith(" pulled")
    with pytest.raises(BadModelFolder, match=f"is missing. {COMMAND} fetches it"):
        controlnet_folder(own.models["fox"], "lines", own.paths.models)
    hub.cut.clear()
    pull()
    assert hub.ranges_of(WEIGHTS)[-1] == f"bytes={half}-"
    assert (place(own) / WEIGHTS).read_bytes() == net[WEIGHTS]


def test_wrong_bytes_never_get_its_name_and_damaged_ones_are_named_and_mended(
    own: Installation, hub: Hub, pull: Pull, net: dict[str, bytes]
) -> None:
    hub.sent[WEIGHTS] = net[WEIGHTS][:-1] + bytes([net[WEIGHTS][-1] ^ 1])
    with pytest.raises(SafelightError, match=f"{WEIGHTS}: its bytes are not those that the hub lists"):
        pull()
    assert not place(own).exists()
    hub.sent.clear()
    pull()
    assert runner(own)("models", "verify").stdout == "ControlNet lines of fox is as it was pulled\n"
    (place(own) / WEIGHTS).write_bytes(net[WEIGHTS][:-1] + bytes([net[WEIGHTS][-1] ^ 1]))

    said = runner(own)("models", "verify", "fox")
    pull(force=True)

    assert said.exit_code == 1
    assert f"{COMMAND} --force" in said.stdout
    assert (place(own) / WEIGHTS).read_bytes() == net[WEIGHTS]


def test_one_that_was_put_there_by_hand_is_left_alone(
    own: Installation, hub: Hub, pull: Pull, net: dict[str, bytes]
) -> None:
    place(own).mkdir(parents=True)
    for name, content in net.items():
        (place(own) / name).write_bytes(content)

    assert pull() == place(own)
    with pytest.raises(SafelightError, match="was not pulled, and is left alone"):
        pull(force=True)
    (place(own) / WEIGHTS).unlink()
    with pytest.raises(SafelightError, match=r"lacks \*\.safetensors\. Move it away"):
        pull()
    assert hub.paths("cdn") == []


def test_a_gated_and_an_unknown_one_say_what_to_do(
    own: Installation, hub: Hub, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    with pytest.raises(NoAccess) as refused:
        pull()
    assert f"accept at {hub.url}/somebody/lines" in str(refused.value)
    assert "(Some licence)" in str(refused.value)
    assert str(refused.value).endswith(f"Then: {COMMAND}")
    hub.repository = "somebody/moved"
    with pytest.raises(NotOnHub, match=r"Correct repository = in \[models\.fox\.controlnets\.lines\]"):
        pull()
    with pytest.raises(BadConfig, match=r"ControlNet none of fox is not on the hub: \[models\.fox\.controlnets\.none"):
        pull("none")
    with pytest.raises(InvalidJob, match=r"--controlnet dots: is no ControlNet of fox\. Known: tiny, lines, none"):
        pull("dots")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_mode": 10}, "asks for a mode, which is not offered"),
        ({"_class_name": "SD3ControlNetModel"}, "is a SD3ControlNetModel, not a FluxControlNetModel"),
        (None, "has no diffusion_pytorch_model.safetensors, and pickles are never fetched"),
    ],
)
def test_what_no_job_could_use_is_refused_before_its_weights_are_fetched(
    change: dict[str, object] | None, says: str, own: Installation, hub: Hub, pull: Pull
) -> None:
    if change is None:
        hub.files.pop(WEIGHTS)
    else:
        hub.files["config.json"] = json.dumps(json.loads(hub.files["config.json"]) | change).encode()

    with pytest.raises(BadConfig, match=says):
        pull()

    assert hub.paths("cdn") == []
    assert not place(own).exists()


def test_the_whole_program_fetches_one_with_a_token_and_a_script_must_say_yes(
    own: Installation, hub: Hub, net: dict[str, bytes]
) -> None:
    hub.gated = True
    own = replace(own, env=own.env | {"HF_TOKEN": LICENSED})

    def run(*words: str) -> tuple[int, str, str]:
        running = process(own, "models", "pull", "fox", "--controlnet", "lines", *words)
        out, err = running.communicate(timeout=300)
        return running.returncode, out, err

    refused, done = run(), run("--yes")

    assert refused[0] == InvalidJob.exit_code
    assert f"{COMMAND}: asks before it fetches, and there is no terminal" in refused[2]
    assert done[:2] == (0, f"{place(own)}\n")
    assert "ControlNet lines of fox is ready" in done[2]
    assert LICENSED not in done[2]
    assert (place(own) / WEIGHTS).read_bytes() == net[WEIGHTS]
