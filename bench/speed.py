"""FLUX.1-schnell, weights in place: our loop and decode beside diffusers' leaf group offload, on a 16 GB card."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench import fullsize
from bench.measured import NIGHT, Place, limit
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelight.planner import make_plan
from safelight.rung import Circumstances
from safelightd import calibration, device, pipelines, probe, runjob
from safelightd.loading import Loader
from safelightd.modelfolder import model_folder
from safelightd.pinnedset import PinnedSet
from safelightd.progress import Watch

TIMED_RUNS = 3
STEPS = 4


class Loaded:
    """A loader whose one component is in place already."""

    def __init__(self, loader: Loader, component: Any) -> None:
        self._loader = loader
        self._component = component

    @contextmanager
    def component(self, _name: str, _device: object) -> Iterator[Any]:
        yield self._component

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def run_speed(place: Place, model: str, shrink: int) -> list[Any]:
    """Return a line for the automatic plan, one for exact bf16, and one for the stock pipeline."""
    place.setting.pinned.drop_unless([])
    side = 1024 // shrink
    spec = place.spec(model, width=side, height=side, num_inference_steps=STEPS)
    exact_spec = spec if place.device == "cpu" else spec.model_copy(update={"precision": "bf16", "compile": "off"})
    exact_plan = _plan(place, exact_spec)
    family = pipelines.family("flux")
    embeddings = family.encode(spec, exact_plan, _loader(place, exact_plan), _watch())
    device.release()
    lines: list[Any] = []
    latents: dict[str, torch.Tensor] = {}
    for name, plan in (("auto", _plan(place, spec)), ("bf16", exact_plan)):
        line, latents[name] = _ours(place, spec, plan, embeddings)
        lines.append({"part": "speed", "name": name, "rung": plan.rung, **line})
    line, stock = _stock(place, spec, embeddings)
    device.release()
    lines.append({"part": "speed", "name": "stock", **line})
    if place.device == "cuda":
        limit(None, 0)
    elsewhere = exact_plan.model_copy(update={"offload": "model", "streamed": {}})
    resident = family.denoise(spec, elsewhere, _loader(place, elsewhere), embeddings, _watch())
    lines.append(
        {
            "part": "speed",
            "name": "bits",
            "bf16_equals_resident": torch.equal(latents["bf16"], resident),
            "bf16_equals_stock": torch.equal(latents["bf16"], stock),
            "auto_relative_error": round(float((latents["auto"] - resident).norm() / resident.norm()), 5),
        }
    )
    return lines


def _plan(place: Place, spec: JobSpec) -> Plan:
    around = runjob.now(Circumstances(waiting=NIGHT), place.setting, spec.model)
    known = calibration.load(place.config.paths.state)
    return make_plan(spec, probe.read_machine(place.config, device.own()), place.models, known, around)


def _loader(place: Place, plan: Plan) -> Loader:
    facts = place.models[plan.model]
    folder = model_folder(facts, place.config.paths.models)
    return Loader(folder, plan, blocks=facts.blocks, models_folder=place.config.paths.models, pinned=PinnedSet(0))


def _watch() -> Watch:
    return Watch(lambda _told: None, threading.Event(), fullsize.Meter())


def _ours(place: Place, spec: JobSpec, plan: Plan, embeddings: Any) -> tuple[dict[str, float], torch.Tensor]:
    family, loader = pipelines.family("flux"), _loader(place, plan)
    with loader.component("transformer", plan.device) as transformer:
        loaded: Any = Loaded(loader, transformer)
        denoise_s, latents = _timed(lambda: family.denoise(spec, plan, loaded, embeddings, _watch()))
    device.release()
    with loader.component("vae", plan.device) as vae:
        loaded = Loaded(loader, vae)
        decode_s, _ = _timed(lambda: list(family.decode(spec, plan, loaded, latents, _watch())))
    device.release()
    return _seconds(denoise_s, decode_s), latents


def _stock(place: Place, spec: JobSpec, embeddings: Any) -> tuple[dict[str, float], torch.Tensor]:
    """FluxPipeline as its documentation sets up leaf group offload with a stream; the VAE stays on the GPU."""
    from diffusers import FluxPipeline

    dtype = embeddings.prompt_embeds.dtype
    pipe = FluxPipeline.from_pretrained(
        model_folder(place.models[spec.model], place.config.paths.models),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        dtype=dtype, local_files_only=True, use_safetensors=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    if place.device == "cuda":
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True
        )
        pipe.vae.to("cuda")
    given = {
        "prompt_embeds": embeddings.prompt_embeds.to(place.device),
        "pooled_prompt_embeds": embeddings.pooled_prompt_embeds.to(place.device),
        "width": spec.width, "height": spec.height, "num_inference_steps": STEPS,
        "max_sequence_length": spec.max_sequence_length,
    }  # fmt: skip

    def latents() -> torch.Tensor:
        made: torch.Tensor = pipe(**given, generator=torch.Generator().manual_seed(spec.seed), output_type="latent")[0]
        return made.cpu()

    denoise_s, found = _timed(latents)
    unpacked = pipe._unpack_latents(found.to(place.device), spec.height, spec.width, pipe.vae_scale_factor)
    scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor

    def decode() -> Any:
        with torch.no_grad():
            return pipe.image_processor.postprocess(pipe.vae.decode(scaled, return_dict=False)[0], output_type="np")

    decode_s, _ = _timed(decode)
    return _seconds(denoise_s, decode_s), found


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the median seconds of a few runs after one that compiles and fills caches, and the last answer."""
    answer = run()
    found = []
    for _ in range(TIMED_RUNS):
        fullsize.synchronise()
        began = time.perf_counter()
        answer = run()
        fullsize.synchronise()
        found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2], answer


def _seconds(denoise_s: float, decode_s: float) -> dict[str, float]:
    return {
        "denoise_s": round(denoise_s, 4), "decode_s": round(decode_s, 4), "seconds": round(denoise_s + decode_s, 4),
    }  # fmt: skip
