"""Weights in fewer bits: the libraries' own numbers, in memory that belongs to somebody else."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

import bitsandbytes
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from optimum.quanto import freeze, qfloat8, quantize
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import T5EncoderModel, UMT5EncoderModel

from safelight.errors import InvalidJob
from safelight.plan import Precision
from safelight.prepared import PRECISIONS
from safelightd import precision
from safelightd.precision import Format, format_of
from safelightd.precision import by_torchao as torchao_formats
from safelightd.tiny import flux, wan

CPU = torch.device("cpu")

ON_CPU: list[Precision] = [name for name in PRECISIONS if name not in ("bf16", "fp8-dynamic")]
"""What a CPU can compute with."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def held(name: Precision) -> Format:
    found = format_of(name)
    assert found is not None
    return found


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(out_features: int = 128, in_features: int = 192, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    made = nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    made.weight = nn.Parameter(random(out_features, in_features, seed=seed), requires_grad=False)
    if bias:
        made.bias = nn.Parameter(random(out_features, seed=seed + 1), requires_grad=False)
    return made


def attached(name: Precision, original: nn.Linear) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return what computes in the place of a Linear, and the memory of its parts."""
    parts = {part: made.clone() for part, made in held(name).quantise(original.weight).items()}
    empty = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
    empty.bias = original.bias
    return held(name).attach(empty, parts, original.weight.dtype), parts


def by_torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def apply(original: nn.Linear) -> nn.Module:
        quantize_(original, config)
        return original

    return apply


def by_quanto(original: nn.Linear) -> nn.Module:
    stack = nn.Sequential(original)
    quantize(stack, weights=qfloat8)
    freeze(stack)
    return stack


def by_nf4(original: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear4bit(
        original.in_features, original.out_features, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(original.weight.data, requires_grad=False, quant_type="nf4", module=made)
    made.bias = original.bias
    return made.to("cpu")


def by_int8(original: nn.Linear) -> nn.Module:
    made = bitsandbytes.nn.Linear8bitLt(
        original.in_features, original.out_features, has_fp16_weights=False, threshold=6.0
    )
    made.weight = bitsandbytes.nn.Int8Params(original.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = original.bias
    return made.to("cpu")


LIBRARIES: Mapping[str, Callable[[nn.Linear], nn.Module]] = {
    "fp8-weight-only": by_torchao(Float8WeightOnlyConfig(set_inductor_config=False)),
    "int8-dynamic": by_torchao(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)),
    "int8-weight-only": by_torchao(Int8WeightOnlyConfig(set_inductor_config=False)),
    "fp8-quanto": by_quanto,
    "nf4": by_nf4,
    "int8-bnb": by_int8,
}
"""How a person would quantise a Linear with the library itself."""


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_weight_computes_as_its_library_would(name: Precision, tokens: int) -> None:
    original = linear()
    x = random(2, tokens, 192, seed=5) * 4  # with outliers beyond 6, which int8-bnb treats apart
    module, _ = attached(name, original)

    expected = LIBRARIES[name](copy.deepcopy(original))(x)

    assert float(x.abs().max()) > 6
    assert torch.equal(expected, module(x))


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("bias", [True, False])
def test_other_parts_in_the_same_memory_are_other_weights(name: Precision, bias: bool) -> None:
    """Also after a forward: what a library settles at its first must not be a copy."""
    first, second = linear(bias=bias), linear(bias=bias, seed=9)
    x = random(3, 192, seed=5)
    module, memory = attached(name, first)
    before = module(x)
    for part, made in held(name).quantise(second.weight).items():
        memory[part].copy_(made)
    if bias:
        first.bias.copy_(second.bias)

    expected = attached(name, second)[0](x)

    assert not torch.equal(before, expected)
    assert torch.equal(expected, module(x))


@pytest.mark.parametrize("name", [*ON_CPU, "fp8-dynamic"])
@pytest.mark.parametrize("shape", [(64, 64), (320, 64), (16, 1024), (2048, 192)])
def test_the_layout_of_a_weight_is_known_without_it(name: Precision, shape: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16,) if name == "fp8-dynamic" else DTYPES:
        made = held(name).quantise(random(*shape, dtype=dtype))
        expected = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in made.items()}

        assert expected == dict(held(name).layout(*shape, dtype))
        assert list(expected) == list(held(name).layout(*shape, dtype))
        assert all(tensor.is_contiguous() for tensor in made.values())


@pytest.mark.parametrize("name", ["fp8-weight-only", "int8-dynamic", "int8-weight-only"])
def test_a_large_weight_is_quantised_piece_by_piece_to_the_bytes_of_the_whole(name: Precision) -> None:
    original = linear(torchao_formats.AT_ONCE // 2048 + 5, 2048, bias=False)
    made = held(name).quantise(original.weight)

    whole: Any = LIBRARIES[name](original).weight
    assert all(torch.equal(getattr(whole, part), tensor) for part, tensor in made.items())


def test_both_ways_to_multiply_8_bit_floats_hold_the_same_bytes() -> None:
    weight = random(128, 192)
    dynamic, weight_only = held("fp8-dynamic").quantise(weight), held("fp8-weight-only").quantise(weight)

    assert all(torch.equal(dynamic[part], weight_only[part]) for part in weight_only)


def flux_block() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model: FluxTransformer2DModel = flux.pipeline("tiny-flux-dev", guidance_embeds=True).transformer
    angles = torch.linspace(0, 3, 24 * 32).view(24, 32)
    seen = {
        "hidden_states": random(1, 16, 64, seed=1),
        "encoder_hidden_states": random(1, 8, 64, seed=2),
        "temb": random(1, 64, seed=3),
    }
    return model.transformer_blocks[0], {**seen, "image_rotary_emb": (angles.cos(), angles.sin())}  # type: ignore[dict-item]  # a pair


def t5_block() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return flux._t5().encoder.block[1], {"hidden_states": random(1, 8, 64, seed=1)}


def quantised(block: nn.Module, name: Precision) -> list[str]:
    """Hold the block's Linears in a precision; return which were left alone."""
    left = []
    for path, layer in list(block.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        if not held(name).takes(f"{path}.weight", layer):
            left.append(path)
            continue
        parent, _, child = path.rpartition(".")
        setattr(block.get_submodule(parent), child, attached(name, layer)[0])
    return left


def flat(made: Any) -> torch.Tensor:
    tensors = [tensor for tensor in (made if isinstance(made, tuple) else (made,)) if isinstance(tensor, torch.Tensor)]
    return torch.cat([tensor.float().flatten() for tensor in tensors])


RANGES = {"nf4": (0.05, 0.15), "fp8-weight-only": (0.015, 0.045), "fp8-quanto": (0.015, 0.045)}
"""Of a block's error against float32; (0.004, 0.02) for 8-bit integers. One weight of normal random numbers alone has
0.085 in nf4, 0.025 in 8-bit floats (3 bits of mantissa), 0.007 to 0.010 in integers; a block has several in a row."""


@pytest.mark.parametrize("make", [flux_block, t5_block])
@pytest.mark.parametrize("name", ON_CPU)
@torch.no_grad()
def test_a_block_is_as_near_to_float32_as_its_bits_allow(name: Precision, make: Any) -> None:
    block, seen = make()
    block.eval().to(torch.bfloat16)
    exact = copy.deepcopy(block).to(torch.float32)
    wide = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in seen.items()}
    quantised(block, name)

    expected, made = flat(exact(**wide)), flat(block(**seen))
    error = float((made - expected).norm() / expected.norm())

    low, high = RANGES.get(name, (0.004, 0.02))
    assert low < error < high


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "int8-bnb"])
@torch.no_grad()
def test_a_compiled_block_has_no_break_and_follows_its_memory(name: Precision) -> None:
    """Without a recompilation: the streaming ring holds another block's weights at every call."""
    torch.compiler.reset()
    block, seen = flux_block()
    block.eval().to(torch.bfloat16)
    others = [attached(name, linear(64, 64, bias=False, seed=seed))[1] for seed in (20, 21)]
    quantised(block, name)
    replaced = nn.Linear(64, 64, bias=False, device="meta")
    memory = {part: tensor.clone() for part, tensor in others[0].items()}
    block.attn.to_q = held(name).attach(replaced, memory, torch.bfloat16)  # type: ignore[union-attr]  # Any's attribute
    run = torch.compile(block.forward, fullgraph=True, backend="aot_eager")

    for other in others:
        for part, tensor in other.items():
            memory[part].copy_(tensor)
        with torch.compiler.set_stance("fail_on_recompile" if other is others[1] else "default"):
            made = flat(run(**seen))

        assert torch.equal(flat(block(**seen)), made)


@pytest.mark.parametrize("make", [flux._t5, wan._umt5])
def test_what_t5_casts_by_the_dtype_of_its_weight_is_not_held_in_4_or_mixed_8_bits(
    make: Callable[[], T5EncoderModel | UMT5EncoderModel],
) -> None:
    left = {name: quantised(copy.deepcopy(make().encoder.block), name) for name in ON_CPU}

    wo = ["0.layer.1.DenseReluDense.wo", "1.layer.1.DenseReluDense.wo"]
    assert left == {name: wo if name in ("nf4", "int8-bnb") else [] for name in ON_CPU}


@pytest.mark.parametrize("name", [*ON_CPU, "fp8-dynamic"])
def test_every_linear_of_the_tiny_transformers_blocks_is_taken(name: Precision) -> None:
    transformers: tuple[nn.Module, ...] = (
        flux._transformer(guidance_embeds=True),
        wan._transformer("k", "transformer", 48, 48),
    )
    blocks = [*transformers[0].transformer_blocks, *transformers[0].single_transformer_blocks, *transformers[1].blocks]  # type: ignore[misc]  # lists of modules
    layers = [(path, layer) for block in blocks for path, layer in block.named_modules() if type(layer) is nn.Linear]

    assert isinstance(transformers[1], WanTransformer3DModel)
    assert len(layers) > 50
    assert all(held(name).takes(f"{path}.weight", layer) for path, layer in layers)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("nf4", (40, 64), "40 input features cannot be held in nf4, which takes multiples of 64"),
        ("fp8-dynamic", (24, 64), "24 input features cannot be held in fp8-dynamic, which takes multiples of 16"),
        ("fp8-dynamic", (64, 24), "24 output features"),
        ("int8-dynamic", (20, 64), "20 input features"),
        ("fp8-quanto", (64, 1), "1 output features"),
    ],
)
def test_a_layer_whose_size_a_format_cannot_take_is_refused_by_name(
    name: Precision, sizes: tuple[int, int], words: str
) -> None:
    with pytest.raises(InvalidJob, match=f"blocks.3.to_q.weight: {words}.*Use another precision"):
        held(name).takes("blocks.3.to_q.weight", nn.Linear(*sizes, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_8_bit_products_are_refused_in_another_dtype_than_bfloat16(dtype: torch.dtype) -> None:
    for use in (
        lambda: held("fp8-dynamic").layout(64, 64, dtype),
        lambda: held("fp8-dynamic").quantise(random(64, 64, dtype=dtype)),
    ):
        with pytest.raises(InvalidJob, match="computes in bfloat16, and the plan in float"):
            use()


def test_a_cpu_cannot_multiply_8_bit_floats_and_can_do_the_rest() -> None:
    reasons = {name: precision.unusable(name, CPU) for name in get_args(Precision)}

    assert [name for name, reason in reasons.items() if reason] == ["fp8-dynamic"]
    assert "which a CPU cannot. Use fp8-weight-only." in str(reasons["fp8-dynamic"])


@pytest.mark.parametrize(
    ("name", "library"), [("fp8-weight-only", "torchao"), ("nf4", "bitsandbytes"), ("fp8-quanto", "optimum")]
)
def test_a_missing_library_is_named(name: Precision, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)

    assert f"needs {library}" in str(precision.unusable(name, CPU))


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_whole_weights_have_no_format(name: Precision) -> None:
    assert format_of(name) is None


def test_8_bit_products_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    module, _ = attached("int8-bnb", linear())
    with caplog.at_level(logging.WARNING):
        module(random(3, 192))

    assert caplog.messages == []


def test_the_libraries_are_imported_without_a_warning_or_a_word() -> None:
    program = """
import logging; logging.basicConfig()
from safelightd import precision
for name in precision.LIBRARIES: precision.format_of(name)
import diffusers.models.transformers.transformer_flux
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
