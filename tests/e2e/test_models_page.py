"""What docs/models.md tells people to type gives a picture: from an empty disk, a cache, and a single file.

The real keys, with the sizes of tiny models; the hub is one on localhost.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import layouts

from safelightd import tiny
from tests.conftest import Installation
from tests.e2e.test_chaos import Daemon
from tests.e2e.test_readme import SETTINGS, block, shell
from tests.e2e.test_readme import env as _env
from tests.hub_server import COMMIT, Hub, files_of, serving
from tests.integration.lora_files import random_lora, step_distilled

PAGE = "docs/models.md"

TINY = "tiny-flux-schnell"

REPOSITORY = Path(__file__).parents[2]


def row(key: str) -> str:
    """Return settings by which a model has the size of the tiny one that is like it, whose own row it is."""
    shipped = (REPOSITORY / "config/models.toml").read_text(encoding="utf-8")
    rows = re.split(r"^(?=\[[\w-]+\]$)", shipped, flags=re.MULTILINE)
    like = next(each for each in rows if each.startswith("[tiny-") and f'like = "{key}"\n' in each)
    own = [line for line in like.splitlines() if not line.startswith(("like =", "tiny =", "repository =", "#"))]
    return "\n".join(own).replace(f"[{like[1 : like.index(']')]}", f"[models.{key}") + "\n"


env = _env


@pytest.fixture
def published(tiny_models_folder: Path) -> Path:
    tiny.build(TINY, tiny_models_folder / TINY)
    return tiny_models_folder / TINY


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with serving(Hub(files=files_of(published), repository="black-forest-labs/FLUX.1-schnell")) as server:
        yield server


@pytest.fixture
def person(installation: Installation, env: dict[str, str], hub: Hub) -> dict[str, str]:
    """The environment of a person with an empty models folder, whose hub is the one on localhost."""
    models = installation.root / "models"
    (installation.root / "safelight.toml").write_text(SETTINGS.format(models=models) + row("flux-schnell"))
    return {name: value for name, value in env.items() if not name.startswith("HF_")} | {"HF_ENDPOINT": hub.url}


def run(installation: Installation, person: dict[str, str], *headings: str) -> str:
    """Run the commands below headings beside a daemon and return what they said."""
    root = installation.root
    (root / "safelight/inbox").mkdir(parents=True)
    daemon = Daemon(installation, person)
    try:
        shell("until safelight status; do :; done", person, root)
        return "".join(shell(block(heading, PAGE), person, root) for heading in headings)
    finally:
        assert daemon.stop() == 0


def pictures(installation: Installation) -> list[str]:
    return [file.name for file in (installation.root / "pictures").rglob("*.png")]


def test_from_an_empty_disk(installation: Installation, person: dict[str, str]) -> None:
    first = block("From an empty disk", PAGE)
    second = (REPOSITORY / PAGE).read_text().split("```sh\n")[2].split("```")[0]
    root = installation.root
    (root / "safelight/inbox").mkdir(parents=True)
    daemon = Daemon(installation, person)
    try:
        shell("until safelight status; do :; done", person, root)
        said = shell(first + second, person, root)
    finally:
        assert daemon.stop() == 0

    assert "flux-schnell is as it was pulled" in said
    assert pictures(installation) == ["0001_a-red-fox-in-the-snow_s7.png"]


def test_from_an_existing_cache(installation: Installation, person: dict[str, str], published: Path, hub: Hub) -> None:
    repository = installation.root / ".cache/huggingface/hub/models--black-forest-labs--FLUX.1-schnell"
    for name, content in files_of(published).items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        link = repository / "snapshots" / COMMIT / name
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)

    said = run(installation, person, "From an existing cache")

    assert said.startswith("flux-schnell\n")
    assert "flux-schnell is as it was\n" in said
    assert pictures(installation) == ["0001_a-red-fox-in-the-snow_s7.png"]
    assert hub.asked == []
    assert not list((installation.root / "models").rglob("*.safetensors"))


def test_from_a_single_file(installation: Installation, person: dict[str, str], published: Path, hub: Hub) -> None:
    folder, unet = installation.root / "models", installation.root / "ComfyUI/models/unet"
    unet.mkdir(parents=True)
    authors = layouts.flux_of_authors(layouts.published(published / "transformer"))
    eight = layouts.prefixed(layouts.scaled(authors, "scale_weight"))
    layouts.save(eight, unet / "flux1-schnell-fp8.safetensors")

    said = run(installation, person, "From a single file")

    assert said.startswith("fox\n")
    assert "fp8_e4m3 scaled" in said
    assert pictures(installation) == ["0001_a-red-fox-in-the-snow_s7.png"]
    assert not [path for path in hub.paths("cdn") if "/transformer/" in path]
    assert (folder / "fox/transformer").is_dir()
    assert [file.name for file in (folder / "fox/transformer").iterdir()] == ["config.json"]
    (receipt,) = (installation.root / "state/safelight/receipts").glob("*.json")
    assert json.loads(receipt.read_bytes())["stored"] == {"transformer": "fp8_e4m3 scaled", "text_encoder_2": "fp32"}
    shutil.rmtree(folder / "fox")
    rows = json.loads(shell("safelight models list --json", person, installation.root))
    assert next(row["here"] for row in rows if row["key"] == "fox") == "incomplete"


def test_loras_that_take_steps_away(installation: Installation, env: dict[str, str], tiny_models_folder: Path) -> None:
    root, folder = installation.root, installation.root / "models"
    for key, like in (("wan-t2v-a14b", "tiny-wan-t2v-a14b"), ("flux-dev", "tiny-flux-dev")):
        tiny.build(like, folder / key)
        tiny.build(like, tiny_models_folder / like)
    settings = SETTINGS.format(models=folder) + row("wan-t2v-a14b") + row("flux-dev")
    (root / "safelight.toml").write_text(settings)
    for seed, (name, component) in enumerate((("high", "transformer"), ("low", "transformer_2"))):
        file = folder / f"loras/lightning/{name}_noise_model.safetensors"
        step_distilled(file, "tiny-wan-t2v-a14b", tiny_models_folder, component, seed=seed)
    random_lora(folder / "loras/Hyper-FLUX.1-dev-8steps-lora.safetensors", "tiny-flux-dev", tiny_models_folder)

    said = run(installation, env, "LoRAs that take steps away")

    receipts = [json.loads(file.read_bytes()) for file in (root / "state/safelight/receipts").glob("*.json")]
    ran = {receipt["spec"]["model"]: (receipt["spec"]["num_inference_steps"], len(receipt["spec"]["loras"]))
           for receipt in receipts}  # fmt: skip
    assert "wan-t2v-a14b 96x64, 9 frames, 4 steps: 1 job" in said
    assert "2 LoRAs fused" in said
    assert said.count(" done ") == 2
    assert ran == {"wan-t2v-a14b": (4, 2), "flux-dev": (8, 1)}
