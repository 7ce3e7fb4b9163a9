"""The world of the demo models: what is drawn is read back right, captions say it, held-out scenes stay held out."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
import pytest
import torch
from bench.drawings import analyser, framewise, whole_clips
from bench.drawings.drawing import clips, parts_of_clips, pictures, placed
from bench.drawings.tokens import TokenTables, clip_tokenizer, t5_tokenizer
from bench.drawings.training import accuracy, as_bytes, clip_verdict, verdict
from bench.drawings.wan import DemoWan
from bench.drawings.world import COLOURS, SHAPES, World, held_out, texts

from safelight import models


def test_the_analyser_reads_every_true_picture_right() -> None:
    scenes = World("cpu", 11).scenes(400)
    drawn = as_bytes(pictures(scenes, placed(scenes, torch.Generator().manual_seed(12))))

    answers = [verdict(scene, picture) for scene, picture in zip(scenes.each(), drawn, strict=True)]

    assert set(accuracy(scenes.each(), answers).values()) == {100.0}


@pytest.mark.parametrize("outline", [False, True], ids=["filled", "outlined"])
def test_the_analyser_tells_outlines_from_filled_shapes(outline: bool) -> None:
    scenes = World("cpu", 23).scenes(400)
    drawn = as_bytes(pictures(scenes, placed(scenes, torch.Generator().manual_seed(24)), outline=outline))

    found = [analyser.read(picture) for picture in drawn]
    answers = [analyser.verdict(*each, outline=outline) for each in zip(scenes.each(), found, strict=True)]
    others = [analyser.verdict(*each, outline=not outline) for each in zip(scenes.each(), found, strict=True)]

    assert {thing.is_outline for each in found for thing in each.things} == {outline}
    assert set(accuracy(scenes.each(), answers).values()) == {100.0}
    assert accuracy(scenes.each(), others)["shape"] == 0.0


def test_the_analyser_reads_every_true_clip_right() -> None:
    scenes = World("cpu", 13).scenes(60, clip=True)
    drawn = as_bytes(clips(scenes, 17, torch.Generator().manual_seed(14)))

    answers = [clip_verdict(scene, clip) for scene, clip in zip(scenes.each(), drawn, strict=True)]

    assert set(accuracy(scenes.each(), answers).values()) == {100.0}


def test_noise_and_smears_are_no_shapes() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    smear = np.full((128, 128, 3), 255, np.uint8)
    smear[40:60, 20:110] = COLOURS["red"]

    assert {thing.shape for thing in analyser.read(noise).things} <= {analyser.NO_SHAPE}
    assert [thing.shape for thing in analyser.read(smear).things] == [analyser.NO_SHAPE]


def test_a_wrong_colour_shape_size_or_place_is_told_apart() -> None:
    scenes = World("cpu", 15).scenes(60)
    drawn = as_bytes(pictures(scenes, placed(scenes, torch.Generator().manual_seed(16))))
    others = [*scenes.each()[1:], scenes.each()[0]]

    answers = [verdict(other, picture) for other, picture in zip(others, drawn, strict=True)]

    assert sum(answer["all"] for answer in answers) <= 1
    for name in ("count", "background", "colour", "shape", "size", "position"):
        assert not all(answer[name] for answer in answers), name


def test_training_never_sees_what_is_held_out() -> None:
    training, kept = World("cpu", 17).scenes(3000, "training"), World("cpu", 18).scenes(300, "held out")

    assert not held_out(training).any()
    assert held_out(kept).all()
    asked = texts(World("cpu", 18).captions(kept, plain=True))
    assert not set(asked) & set(texts(World("cpu", 17).captions(training, plain=True)))
    assert 0.05 < held_out(World("cpu", 19).scenes(5000)).float().mean() < 0.2


def test_no_clip_that_is_held_out_was_asked_for_in_training() -> None:
    def asked(which: Literal["training", "held out"], count: int) -> set[tuple[int, ...]]:
        scenes = World("cpu", 20).scenes(count, which, clip=True).each()
        return {(scene.colour[0], scene.shape[0], scene.motion) for scene in scenes}

    kept = asked("held out", 400)

    assert len(kept) > 10
    assert not kept & asked("training", 20_000)


def test_captions_use_the_words_of_the_table_and_no_others() -> None:
    facts = models.load()["demo-flux"]
    world = World("cpu", 20)
    said = texts(world.captions(world.scenes(20_000)))

    assert not {word for text in said for word in facts.unknown_words(text)}
    assert {word for text in said for word in re.split(r"[ ,.]+", text) if word} == set(facts.vocabulary.split())


def test_words_are_looked_up_to_the_very_tokens_that_the_tokenizers_give() -> None:
    world, tables = World("cpu", 21), TokenTables.of("cpu")
    captions = world.captions(world.scenes(200))
    said = texts(captions)

    t5 = t5_tokenizer()(said, padding="max_length", max_length=32, return_tensors="pt").input_ids
    clip = clip_tokenizer()(said, padding="max_length", max_length=tables.for_clip(captions).shape[1]).input_ids

    assert torch.equal(tables.for_t5(captions), t5)
    assert tables.for_clip(captions).tolist() == clip


def test_each_word_is_told_which_shape_it_belongs_to() -> None:
    world = World("cpu", 22)
    scenes = world.scenes(100)
    captions, owner = world.captions_of(scenes, plain=True)

    for scene, text, belongs in zip(scenes.each(), texts(captions), owner.tolist(), strict=True):
        words = text.replace(",", " ,").replace(".", " .").split()
        for i in range(scene.count):
            own = [word for word, of in zip(words, belongs, strict=False) if of == i + 1]
            assert own[-2:] == [list(COLOURS)[scene.colour[i]], SHAPES[scene.shape[i]]]


def test_whole_clips_come_to_what_the_video_vae_itself_makes_of_them() -> None:
    torch.manual_seed(23)
    vae = DemoWan.new("cpu").vae
    seen = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    own = vae.encode(seen).latent_dist
    own_again = vae.decode(own.mean).sample

    mean, logvar = whole_clips.encoded(vae, seen)
    again = whole_clips.decoded(vae, mean).clamp(-1, 1)

    torch.testing.assert_close(mean, own.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logvar, own.logvar, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, own_again, rtol=1e-4, atol=1e-5)
    parameters = list(vae.parameters())
    by_own = torch.autograd.grad((own_again**2).sum() + own.logvar.sum(), parameters, allow_unused=True)
    by_whole = torch.autograd.grad((again**2).sum() + logvar.sum(), parameters, allow_unused=True)
    for expected, actual in zip(by_own, by_whole, strict=True):
        assert expected is not None
        assert actual is not None
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item() + 1e-6)


def test_parts_of_clips_are_drawn_as_the_clips_are() -> None:
    scenes = World("cpu", 24).scenes(3, clip=True)
    whole = clips(scenes, 17, torch.Generator().manual_seed(25))

    all_of_it = parts_of_clips(scenes, 17, 17, 128, torch.Generator().manual_seed(25))
    torch.manual_seed(26)
    middle = int(torch.randint(9, ())) + 4
    torch.manual_seed(26)
    parts = parts_of_clips(scenes, 17, 9, 96, torch.Generator().manual_seed(25))

    assert torch.equal(all_of_it, whole)
    for part, clip in zip(parts, whole, strict=True):
        tiles = clip[:, middle].unfold(1, 96, 1).unfold(2, 96, 1).flatten(1, 2)
        assert (tiles - part[:, 4][:, None]).abs().flatten(2).amax((0, 2)).min() < 0.02


def test_the_transformer_with_a_noise_level_a_frame_is_the_one_with_one_a_token() -> None:
    torch.manual_seed(27)
    transformer = DemoWan.new("cpu").transformer
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    noisy, sigma, embeds = torch.randn(2, 48, 5, 8, 8), torch.rand(2, 5), torch.randn(2, 32, 128)
    own = transformer(noisy, (1000 * sigma).repeat_interleave(16, dim=1), embeds, return_dict=False)[0]

    velocity = framewise.velocity(transformer, noisy, sigma, embeds, framewise.block_applied)

    torch.testing.assert_close(velocity, own, rtol=1e-3, atol=1e-4)
    parameters = list(transformer.parameters())
    by_own, by_frames = (torch.autograd.grad((made**2).mean(), parameters) for made in (own, velocity))
    for expected, actual in zip(by_own, by_frames, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item() + 1e-6)
