"""LoRA files as changes of a model's weights: read in any layout that diffusers knows, and matched with the model.

diffusers' own converters bring kohya's, XLabs', ComfyUI's and Wan's own names into one layout. They leave out what they
do not know, some of it silently; here that is an error. The arithmetic is in `safelightd.fusing`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from safelight.errors import Fault, InvalidJob
from safelight.jobspec import JobSpec
from safelight.lora import Lora
from safelight.lorafiles import file_of, find
from safelight.paths import Paths
from safelightd.fusing import Change

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""By component, its weights."""

Changes = Mapping[str, Mapping[str, tuple[Change, ...]]]
"""By component and weight."""

NOTHING: Changes = MappingProxyType({})

EXPERTS = {"high": "transformer", "low": "transformer_2"}
"""The components of Wan A14B, as WanPipeline calls them: the first runs above the boundary, where noise is high."""

SHOWN_MAX = 5
"""Names of keys in a message; then their number."""

ADAPTER_METADATA = "lora_adapter_metadata"
"""What diffusers writes beside peft's tensors: their scale (loaders/lora_base.py, 0.42)."""

LEFT_OUT = ("dora_scale", "lora_magnitude_vector", "t5xxl", "position_embedding", "text_projection", ".diff", ".hada_",
            ".lokr_")  # fmt: skip
"""In the names of tensors that diffusers' converters for FLUX drop, with no more than a line in a log, or know not."""

UPS = (".lora_B.weight", ".lora_up.weight", ".up.weight")
"""Ends the names of factors that are multiplied from the left, in every layout."""

KNOWN_BEGINNINGS = ("transformer.", "lora_unet_", "lora_te_", "lora_te1_", "diffusion_model.", "text_encoder.")

OF_WAN = (
    (r"self_attn\.(norm_[qk])", r"attn1.\1"),
    (r"self_attn\.([qkv])", r"attn1.to_\1"),
    (r"self_attn\.o", "attn1.to_out.0"),
    (r"cross_attn\.(norm_[qk])", r"attn2.\1"),
    (r"cross_attn\.([qkv])", r"attn2.to_\1"),
    (r"cross_attn\.o", "attn2.to_out.0"),
    (r"cross_attn\.norm_k_img", "attn2.norm_added_k"),
    (r"cross_attn\.([kv])_img", r"attn2.add_\1_proj"),
    (r"ffn\.0", "ffn.net.0.proj"),
    (r"ffn\.2", "ffn.net.2"),
    (r"norm3", "norm2"),
)
"""Parts of a block in Wan's own names and in diffusers' (convert_wan_to_diffusers.py)."""

BESIDE_WANS_BLOCKS = {
    "time_projection.1": "condition_embedder.time_proj",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}

_FACTOR = re.compile(r"(.+)\.lora_([AB])\.(weight|bias)")


def resolved(spec: JobSpec, paths: Paths) -> JobSpec:
    """Return the job with the digest of every LoRA that was submitted from where its file could not be seen.

    Raises:
        InvalidJob: there is no such LoRA, or its file is damaged.
    """
    loras = tuple(lora if lora.sha256 else find(lora, paths.models) for lora in spec.loras)
    return spec.model_copy(update={"loras": loras}) if loras else spec


def files(spec: JobSpec, paths: Paths) -> list[tuple[Lora, Path]]:
    """Return a job's LoRAs with their files, which are what they were when it was submitted.

    Raises:
        InvalidJob: one is gone, or has changed.
    """
    return [(lora, file_of(lora, paths.models, paths.inputs)) for lora in spec.loras]


def changes(loras: Sequence[tuple[Lora, Path]], transformer_class: str, shapes: Shapes) -> Changes:
    """Return what LoRAs add to the weights of each component; one of scale 0 adds nothing.

    Raises:
        InvalidJob: a file cannot be read, or has keys that the model has no place for; they are named.
    """
    found: dict[str, dict[str, tuple[Change, ...]]] = {}
    faults = []
    for lora, file in loras:
        unmatched = []
        for component, weight, change in _of_file(lora, file, transformer_class):
            for target in _targets(component, lora, shapes):
                name, problem = _matched(weight, change, shapes.get(target, {}))
                if problem:
                    unmatched.append(f"{component}.{weight}{problem}")
                elif lora.scale:
                    own = found.setdefault(target, {})
                    own[name] = (*own.get(name, ()), change)
        if unmatched:
            faults.append(
                Fault(f"LoRA {lora.label}", _not_matching(unmatched), "Use one that was made for this model.")
            )
    if faults:
        raise InvalidJob(faults)
    return found


def _targets(component: str, lora: Lora, shapes: Shapes) -> Sequence[str]:
    """Return the components that a file's `transformer` means: one that was made for both experts changes both."""
    if component != "transformer":
        return (component,)
    if lora.expert != "both":
        return (EXPERTS[lora.expert],)
    return [name for name in EXPERTS.values() if name in shapes]


def _matched(weight: str, change: Change, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str]:
    """Return the model's name for a weight, and what is wrong with the change."""
    # transformers 5 has dropped the first part of CLIP's names, which published files still have.
    name = next((known for known in (weight, f"text_model.{weight}", weight.removeprefix("text_model."))
                 if known in shapes), "")  # fmt: skip
    if not name:
        return "", " (no such weight)"
    if not change.fits(shapes[name]):
        return name, f" ({'x'.join(map(str, change.shape))}, the model's is {'x'.join(map(str, shapes[name]))})"
    return name, ""


def _not_matching(keys: Iterable[str]) -> str:
    named = sorted(set(keys), key=lambda key: [part.zfill(4) for part in re.split(r"(\d+)", key)])
    more = f" and {len(named) - SHOWN_MAX} more" if len(named) > SHOWN_MAX else ""
    found = "1 key does" if len(named) == 1 else f"{len(named)} keys do"
    return f"{found} not match the model: {', '.join(named[:SHOWN_MAX])}{more}"


def _of_file(lora: Lora, file: Path, transformer_class: str) -> Iterator[tuple[str, str, Change]]:
    """Yield component, weight and change of everything in a file."""
    tensors, told = _read(lora, file)
    plain: dict[str, torch.Tensor] = {}
    if transformer_class.startswith("Wan"):
        plain = _take_wans_differences(tensors)
    converted = _converted(lora, tensors, transformer_class)
    alphas = {name.removesuffix(".alpha"): value for name, value in converted.items() if name.endswith(".alpha")}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    odd = []
    for name, tensor in converted.items():
        match = _FACTOR.fullmatch(name)
        if match and match[3] == "weight":
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif match and match[2] == "B":
            plain[f"{match[1]}.bias"] = tensor
        elif not name.endswith(".alpha"):
            odd.append(name)
    odd += [f"{module}.lora_{factor}.weight without its other half" for module, pair in pairs.items()
            for factor in pair if len(pair) == 1]  # fmt: skip
    if odd:
        raise _refused(lora, _not_matching(odd))
    for module, pair in pairs.items():
        up, down = pair["B"].flatten(1), pair["A"].flatten(1)
        component, _, weight = module.partition(".")
        scale = lora.scale * _own_scale(module, down.shape[0], alphas, told)
        yield component, f"{weight}.weight", Change(scale, up, down)
    for name, difference in plain.items():
        component, _, weight = name.partition(".")
        yield component, weight, Change(lora.scale, difference)


def _read(lora: Lora, file: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it cannot be iterated
            metadata = stored.metadata() or {}
        told = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        raise _refused(lora, f"{file} is damaged ({error})") from error
    if any(name.endswith(".alpha") for name in tensors):
        # The converters multiply by it, and what is stored in half precision would be rounded.
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    return tensors, told if isinstance(told, dict) else {}


def _own_scale(module: str, rank: int, alphas: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> float:
    """Return what peft would multiply by (LoraConfig and LoraLayer.update_layer, peft 0.21)."""
    if module in alphas:
        return float(alphas[module]) / rank
    component, _, weight = module.partition(".")
    own = {key.partition(".")[2]: value for key, value in told.items() if key.partition(".")[0] == component}
    if "lora_alpha" not in own:
        return 1.0
    alpha = _pattern(own.get("alpha_pattern") or {}, weight, own["lora_alpha"])
    divisor = _pattern(own.get("rank_pattern") or {}, weight, own.get("r", rank))
    return float(alpha) / (math.sqrt(divisor) if own.get("use_rslora") else float(divisor))


def _pattern(patterns: Mapping[str, float], weight: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", weight)), default)


def _converted(lora: Lora, tensors: dict[str, torch.Tensor], transformer_class: str) -> dict[str, torch.Tensor]:
    """Return the tensors in diffusers' and peft's names: `transformer.<module>.lora_A.weight`.

    Raises:
        InvalidJob: something would be left out, or the layout is unknown.
    """
    convert = _converter(transformer_class)
    left_out = [name for name, tensor in tensors.items() if any(part in name for part in LEFT_OUT) and tensor.any()]
    if left_out:
        raise _refused(lora, f"it has what cannot be applied: {_not_matching(left_out)}")
    try:
        with _warnings() as warnings:
            converted = convert(_as_kohya(tensors) if transformer_class.startswith("Flux") else tensors)
    except (
        ValueError,
        KeyError,
        AssertionError,
        NotImplementedError,
        IndexError,
        RuntimeError,
        AttributeError,
    ) as error:
        raise _refused(lora, f"its layout is unknown ({type(error).__name__}: {_short(error)})") from error
    if warnings:
        raise _refused(lora, f"parts of it would be left out: {_short(warnings[0])}")
    if _rows(tensors) != _rows(converted):
        named = [name for name in tensors if name.endswith(UPS) and not name.startswith(KNOWN_BEGINNINGS)]
        raise _refused(lora, f"parts of it would be left out: {_not_matching(named or tensors)}")
    return converted


def _rows(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the rows of all factors that are multiplied from the left: a converter parts them, or leaves some out."""
    return sum(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(UPS) and tensor.ndim > 1)


def _converter(transformer_class: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, WanLoraLoaderMixin

    if transformer_class.startswith("Wan"):
        return lambda tensors: dict(WanLoraLoaderMixin.lora_state_dict(dict(tensors)))

    def of_flux(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(tensors), return_alphas=True)
        return {_of_clip(name): tensor for name, tensor in found.items()} | (alphas or {})

    return of_flux


def _of_clip(name: str) -> str:
    """Return peft's name of a text encoder's factor under one of diffusers' older names."""
    if not name.startswith("text_encoder."):
        return name
    for older, module in ((r"\.to_([qkv])_lora\.", r".\1_proj."), (r"\.to_out_lora\.", ".out_proj.")):
        name = re.sub(older, module, name)
    name = re.sub(r"\.lora(_linear_layer)?\.(?=down\.|up\.)", ".", name)
    return name.replace(".down.weight", ".lora_A.weight").replace(".up.weight", ".lora_B.weight")


def _as_kohya(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return FLUX's own module names with peft's factors under kohya's, by which diffusers' converter goes."""
    if not any(name.startswith("diffusion_model.") and ".lora_A." in name for name in tensors):
        return dict(tensors)
    return {
        name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up."): tensor
        for name, tensor in tensors.items()
    }


def _take_wans_differences(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take whole differences of weights and biases out of `tensors`; return them under diffusers' names.

    Distilled Wan weights come with them, for norms and biases; the converter drops some, and reads others as what they
    are only where there are factors, too.
    """
    taken = {}
    for name in [name for name in tensors if name.endswith((".diff", ".diff_b"))]:
        module, _, kind = name.removeprefix("diffusion_model.").rpartition(".")
        tensor = tensors.pop(name)
        if tensor.any():
            taken[f"transformer.{_of_wan(module)}.{'weight' if kind == 'diff' else 'bias'}"] = tensor
    return taken


def _of_wan(module: str) -> str:
    """Return diffusers' name of a module in Wan's names; the same, where there is none."""
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", module)
    if not block:
        return BESIDE_WANS_BLOCKS.get(module, module)
    for own, theirs in OF_WAN:
        if match := re.fullmatch(own, block[2]):
            return f"{block[1]}.{match.expand(theirs)}"
    return module


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect what diffusers' loaders warn of: what they leave out."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, collector = logging.getLogger("diffusers.loaders"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield found
    finally:
        logger.removeHandler(collector)


def _short(problem: object) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _refused(lora: Lora, problem: str) -> InvalidJob:
    return InvalidJob([Fault(f"LoRA {lora.label}", problem, "Use one that was made for this model.")])
