"""A training begins with what another one came to: modules of a pipeline, half of a VAE, a LoRA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.drawings import wan
from bench.drawings.flux import MODULES, SHIPPED, DemoFlux
from bench.drawings.flux_training import hardest
from bench.drawings.taking import VAE_ENCODER
from bench.drawings.wan import DemoWan
from bench.drawings.world import SHAPES, World
from bench.train_demo_lora import Outlining
from transformers import CLIPTokenizer, T5TokenizerFast


def test_a_decoder_of_another_width_learns_beside_an_encoder_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "DECODER_DIM", 8)
    demo = DemoWan.new("cpu")
    decoder = {name: weight.clone() for name, weight in demo.vae.decoder.state_dict().items()}

    demo.take(SHIPPED.parent / "demo-wan", [VAE_ENCODER])

    shipped = wan.MODULES["vae"].from_pretrained(SHIPPED.parent / "demo-wan", subfolder="vae", dtype=torch.float32)
    for part in ("encoder", "quant_conv"):
        own, theirs = (getattr(vae, part).state_dict() for vae in (demo.vae, shipped))
        assert all(torch.equal(own[name], weight) for name, weight in theirs.items())
    assert demo.vae.config.latents_std == shipped.config.latents_std != [1.0] * wan.LATENT_CHANNELS
    assert all(torch.equal(decoder[name], weight) for name, weight in demo.vae.decoder.state_dict().items())


def test_text_encoders_are_taken_with_the_tokenizers_that_they_read_by(tmp_path: Path) -> None:
    folder = tmp_path / "demo-flux"
    shutil.copytree(SHIPPED, folder)
    for name, kind in (("tokenizer", CLIPTokenizer), ("tokenizer_2", T5TokenizerFast)):
        own = kind.from_pretrained(folder, subfolder=name)
        own.add_tokens(["of-its-own"])
        own.save_pretrained(folder / name)
    demo = DemoFlux.new("cpu")

    demo.take(folder, ["transformer"])
    assert "of-its-own" not in demo.tokenizer.get_vocab() | demo.tokenizer_2.get_vocab()

    demo.take(folder, ["text_encoder", "text_encoder_2"])
    assert "of-its-own" in demo.tokenizer.get_vocab()
    assert "of-its-own" in demo.tokenizer_2.get_vocab()
    stored = MODULES["text_encoder_2"].from_pretrained(SHIPPED, subfolder="text_encoder_2", dtype=torch.float32)
    assert all(torch.equal(demo.text_encoder_2.state_dict()[name], w) for name, w in stored.state_dict().items())


def test_a_lora_begins_with_one_that_was_saved(tmp_path: Path) -> None:
    def new(seed: int) -> Outlining:
        return Outlining(DemoFlux.new("cpu").transformer, 4, torch.Generator().manual_seed(seed))

    saved, other = new(1), new(2)
    with torch.no_grad():
        for factor in saved.parameters():
            factor.normal_()
    saved.save(tmp_path / "lora.safetensors")

    other.take(tmp_path / "lora.safetensors")

    pairs = list(zip(saved.parameters(), other.parameters(), strict=True))
    assert len(pairs) > 100
    assert all(torch.equal(one.bfloat16(), two.bfloat16()) for one, two in pairs)


def test_a_lora_of_another_rank_is_no_beginning(tmp_path: Path) -> None:
    transformer = DemoFlux.new("cpu").transformer
    Outlining(transformer, 1, torch.Generator()).save(tmp_path / "lora.safetensors")

    for file in ("lora.safetensors", "none.safetensors"):
        with pytest.raises(SystemExit, match="no LoRA of these layers and this rank"):
            Outlining(transformer, 4, torch.Generator()).take(tmp_path / file)


def test_what_is_shown_more_often_has_a_small_star_that_is_drawn() -> None:
    scenes = World("cpu", 3).scenes(500)
    found = hardest(scenes).tolist()

    for scene, is_hard in zip(scenes.each(), found, strict=True):
        shown = list(zip(scene.shape, scene.size, strict=True))[: scene.count]
        assert is_hard == ((SHAPES.index("star"), 0) in shown)
    assert 0 < sum(found) < len(found) / 2


BRIEFLY = """
import sys
from bench import train_demo_wan as script
script.TINY |= {name: 0.2 for name in script.TINY if name.endswith("_s")}
sys.exit(script.main())
"""


def test_a_training_leaves_the_encoder_that_it_keeps_as_it_was(tmp_path: Path) -> None:
    shipped = SHIPPED.parent / "demo-wan"
    options = ["--tiny", "--to", str(tmp_path), "--begin", str(shipped), "--keep", *wan.MODULES, VAE_ENCODER]
    subprocess.run([sys.executable, "-c", BRIEFLY, *options], cwd=Path(__file__).parents[2], check=True, timeout=850)

    before, after = (
        wan.MODULES["vae"].from_pretrained(folder, subfolder="vae", dtype=torch.bfloat16)
        for folder in (shipped, tmp_path / "demo-wan")
    )
    changed = {
        name.partition(".")[0]
        for name, weight in before.state_dict().items()
        if not torch.equal(weight, after.state_dict()[name])
    }
    assert {"decoder"} <= changed <= {"decoder", "post_quant_conv"}
    assert after.config.latents_std == before.config.latents_std
    steps = json.loads((tmp_path / "trained.json").read_text())["steps"]
    assert steps.keys() == {"vae", "vae whole", "read", "draw"}
    assert min(steps.values()) >= 1
