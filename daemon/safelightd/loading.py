"""Single components of a diffusers folder, in memory for as long as a `with` lasts.

Reads local safetensors and nothing else: no network, no pickle, no code that comes with weights. Knows no pipeline.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from safelight import prepared
from safelight.lora import Lora
from safelight.models import Blocks
from safelight.plan import Plan, Precision
from safelight.refusals import BY_LIBRARY
from safelight.rung import Pinned
from safelightd import attention, compiling, libraryoffload, modelfiles, precision, singlefile, skeleton
from safelightd import lora as lora_files
from safelightd.assembly import Order, assembled
from safelightd.device import give_back
from safelightd.fused import Results
from safelightd.fusing import fuse
from safelightd.pinnedset import PinnedKey, PinnedSet
from safelightd.weights import BadModelFolder

CLASSES = {
    "diffusers": (
        "AutoencoderKL",
        "AutoencoderKLWan",
        "FlowMatchEulerDiscreteScheduler",
        "FluxControlNetModel",
        "FluxTransformer2DModel",
        "UniPCMultistepScheduler",
        "WanTransformer3DModel",
    ),
    "transformers": (
        "CLIPTextModel",
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "T5EncoderModel",
        "T5Tokenizer",
        "T5TokenizerFast",
        "UMT5EncoderModel",
    ),
}
"""What a model_index.json may name. Anything else would be a class nobody here has checked."""

TOLD_BY_BYTES = 2**20
"""Of a file: its names and shapes, and of FLUX's and Wan's VAEs some weights, which two trainings make differ."""

ALIGNMENT_BYTES = 64
"""Where torch's own allocations on the CPU begin (c10/core/alignment.h)."""

WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
"""How each library names a component's weights; sharded ones are listed in the same name plus .index.json."""

OTHER_SHAPE = ("ignore_mismatched_sizes", "automatic conversion of the weights")
"""Words of transformers' RuntimeErrors about the weights themselves; its others are the device's."""

_NO_PATHS: Mapping[str, str] = MappingProxyType({})
_NO_BLOCKS: Mapping[str, tuple[Blocks, ...]] = MappingProxyType({})


class Loader:
    """Loads the components of one model as its plan says.

    Args:
        folder: a diffusers folder with a model_index.json.
        component_paths: folders that replace single components, each holding that component alone, or single files.
        blocks: the repeated blocks of the components that are loaded block by block; others are loaded whole.
        models_folder: below it are the prepared folders that the plan may name.
        pinned: where the pinned blocks of one job wait for the next.
        fused: what is kept of such LoRAs in fewer bits, where the plan reads or keeps any.
        controlnet: the folder of the component of that name, which no index has.
        loras: what is added to the published weights on their way, each with its file.

    Raises:
        BadModelFolder: the folder or its index cannot be used. Every method raises it, naming the file.
        InvalidJob: a LoRA does not match the model.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        component_paths: Mapping[str, str] = _NO_PATHS,
        *,
        blocks: Mapping[str, tuple[Blocks, ...]] = _NO_BLOCKS,
        models_folder: Path | None = None,
        pinned: PinnedSet | None = None,
        loras: Sequence[tuple[Lora, Path]] = (),
        controlnet: Path | None = None,
        fused: Results | None = None,
    ) -> None:
        self._folder = folder
        self._plan = plan
        self._component_paths = dict(component_paths)
        self._blocks = blocks
        self._models_folder = models_folder
        self._pinned = pinned or PinnedSet(limit_bytes=0)
        self._index = modelfiles.read_json(folder / "model_index.json")
        unknown = sorted(set(component_paths) - set(self._index))
        if unknown:
            raise BadModelFolder(f"{folder}: the model has no component {', '.join(unknown)}. Correct its path's name.")
        if controlnet is not None:
            self._index["controlnet"] = ["diffusers", "FluxControlNetModel"]
            self._component_paths["controlnet"] = str(controlnet)
        self._loras = tuple((lora.sha256, lora.scale, lora.expert) for lora, _ in loras)
        self._fused = fused
        changes = self._read_changes(loras) if loras else lora_files.NOTHING
        self._changes = {name: own for name, own in changes.items() if name not in plan.fused}
        self._pinned.drop_unless([self._pinned_key(name) for name in plan.streamed])

    def _read_changes(self, loras: Sequence[tuple[Lora, Path]]) -> lora_files.Changes:
        """Return what LoRAs change of the transformers and of CLIP, which no plan quantises.

        Raises:
            InvalidJob: a LoRA does not match. BadModelFolder: there are no published weights to add it to.
        """
        shapes = {}
        for name, entry in self._index.items():
            if (name.startswith("transformer") and entry != [None, None]) or entry == ["transformers", "CLIPTextModel"]:
                shapes[name] = self._shapes(name)
        return lora_files.changes(loras, self._class("transformer")[1].__name__, shapes)

    def _shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        weights = WEIGHTS[self._class(name)[0]]
        folder = self._source(name)
        try:
            modelfiles.check_files(folder, weights)
        except BadModelFolder as error:
            raise BadModelFolder(f"{error} A LoRA is added to the published weights, whatever is prepared.") from error
        return {weight: stored.shape for weight, stored in singlefile.weights_in(folder, weights).items()}

    @property
    def changes_text_encoders(self) -> bool:
        """Whether a LoRA changes what prompts are encoded to."""
        return any(name.startswith("text_encoder") for name in self._changes)

    @contextmanager
    def component(
        self, name: str, device: str | torch.device, reshape: Callable[[nn.Module], None] | None = None
    ) -> Iterator[Any]:
        """Have one component on `device`, in evaluation mode and as the plan holds it, until the block ends.

        `reshape` may change the classes of a transformer's blocks before anything hooks or compiles them.
        Whatever ends it, the weights are given back there and then, even where a name still points at the module.
        What the class keeps in float32 (`_keep_in_fp32_modules`) stays so.
        """
        place = torch.device(device)
        try:
            with self._placed(name, place, reshape or _as_it_is) as module:
                yield module
        except BaseException as error:
            # A traceback holds every frame it passed, and those hold activations; so does that of a cause.
            passed: BaseException | None = error
            while passed:
                traceback.clear_frames(passed.__traceback__)
                passed = passed.__cause__ or passed.__context__
            raise
        finally:
            give_back()

    def _placed(
        self, name: str, device: torch.device, reshape: Callable[[nn.Module], None]
    ) -> AbstractContextManager[nn.Module]:
        if name not in self._blocks:
            return self._whole(name, device)
        if name.startswith("transformer") and self._plan.offload in BY_LIBRARY:
            return self._offloaded_by_library(name, device, reshape)
        return self._by_blocks(name, device, reshape)

    @contextmanager
    def _whole(self, name: str, device: torch.device) -> Iterator[nn.Module]:
        """A small component, as its library loads it."""
        module = self._load(name, device)
        try:
            yield module
        finally:
            _empty(module)

    @contextmanager
    def _by_blocks(self, name: str, device: torch.device, reshape: Callable[[nn.Module], None]) -> Iterator[nn.Module]:
        library, component_class = self._class(name)
        folder, config = self._source(name), self._config_folder(name)
        modelfiles.check_files(folder, WEIGHTS[library])
        modelfiles.check_class(config, component_class.__name__, library)
        stem = WEIGHTS[library].removesuffix(".safetensors")
        order = Order(
            folder=folder,
            device=device,
            dtype=getattr(torch, self._plan.dtype),
            paths=tuple(dict.fromkeys(blocks.path for blocks in self._blocks[name])),
            format=precision.format_of(self._precision(name)),
            streamed=self._plan.streamed.get(name, ()),
            from_file=not name.startswith("transformer") or self._plan.streamed_from == "file",
            changes=self._changes.get(name, {}),
        )
        module = skeleton.build(component_class, config, library)
        self._shape(name, module, reshape)
        with ExitStack() as leaving:
            if name in self._plan.fused:
                assert self._fused is not None
                stored = leaving.enter_context(self._fused.reading(name, WEIGHTS[library]))
            else:
                stored = singlefile.weights_of(module, folder, WEIGHTS[library])
            if self._fused and self._plan.keeping and name.startswith("transformer"):
                keeper = leaving.enter_context(self._fused.keeping(name, folder, config / "config.json", stem))
                order = replace(order, keeper=keeper)
            placed = leaving.enter_context(assembled(module, stored, order, self._pinned, self._pinned_key(name)))
            if self._plan.compiled and name.startswith("transformer"):
                compiling.compile_blocks(placed, order.paths)
            yield placed

    @contextmanager
    def _offloaded_by_library(
        self, name: str, device: torch.device, reshape: Callable[[nn.Module], None]
    ) -> Iterator[nn.Module]:
        """A transformer in RAM that its library brings to the GPU part by part."""
        module = self._load(name, torch.device("cpu"), device)
        self._shape(name, module, reshape)
        try:
            with libraryoffload.offloaded(module, device, self._plan):
                yield module
        finally:
            _empty(module)

    def _shape(self, name: str, module: nn.Module, reshape: Callable[[nn.Module], None]) -> None:
        reshape(module)
        if name.startswith("transformer"):
            attention.use(module, self._plan.attention)

    def _precision(self, name: str) -> Precision:
        if name.startswith("transformer"):
            return self._plan.precision
        return self._plan.text_encoder_precision or "bf16"

    def _source(self, name: str) -> Path:
        """Return the folder whose files a component is loaded from."""
        if name not in self._plan.prepared:
            return self._component_folder(name)
        assert self._models_folder is not None
        return prepared.folder(self._models_folder, self._plan.model, self._precision(name), name)

    def _pinned_key(self, name: str) -> PinnedKey:
        folder = self._source(name)
        files = tuple(_told([folder] if folder.is_file() else sorted(folder.glob("*"))))
        blocks = self._plan.streamed.get(name, ())
        loras = self._loras if name.startswith("transformer") else ()
        held = Pinned(self._plan.model, name, self._precision(name), self._plan.dtype, blocks, loras)
        return PinnedKey(held, folder, files)

    def weights(self) -> dict[str, list[tuple[str, int, int]]]:
        """Return what tells the files of the repeated components, and of their schedule, from others: name, size and
        time of change."""
        found = {name: list(self._pinned_key(name).files) for name in sorted(self._blocks)}
        return found | {
            "schedule": _told([self._folder / "model_index.json", *sorted(self._folder.glob("scheduler/*"))])
        }

    def vae_key(self) -> str:
        """Return what tells the VAE from others, whichever model has it: made of the beginnings of its files.

        Raises:
            BadModelFolder: a file is missing.
        """
        place = self._component_folder("vae")
        modelfiles.check_files(place, WEIGHTS["diffusers"])
        found = hashlib.sha256()
        for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
            with file.open("rb") as opened:
                found.update(f"{file.stat().st_size}\n".encode() + opened.read(TOLD_BY_BYTES))
        return found.hexdigest()[:16]

    def stored_precisions(self) -> dict[str, str]:
        """Return what most weights of the repeated components are published as, in words: bf16, Q4_K."""
        found = {}
        for name in sorted(self._blocks):
            try:
                found[name] = singlefile.precision_in(self._component_folder(name), WEIGHTS[self._class(name)[0]])
            except (BadModelFolder, OSError):
                continue  # what loads it says what is wrong; with a prepared one it need not be there
        return found

    def tokenizer(self, name: str = "tokenizer") -> Any:
        """Return a tokenizer."""
        folder = self._component_folder(name)
        modelfiles.check_vocabulary(folder)
        return _from_pretrained(self._class(name)[1], folder)

    def scheduler(self, **settings: float | None) -> Any:
        """Return a scheduler that has run nothing yet; `settings` replace its own, None leaves one as it is."""
        folder = self._component_folder("scheduler")
        scheduler = _from_pretrained(self._class("scheduler")[1], folder)
        wanted = {name: value for name, value in settings.items() if value is not None}
        if unknown := sorted(set(wanted) - set(scheduler.config)):
            raise BadModelFolder(
                f"{folder}: a {type(scheduler).__name__} has no {', '.join(unknown)}. "
                "Use the scheduler that the model came with."
            )
        return type(scheduler).from_config(scheduler.config, **wanted)

    def config(self, name: str) -> dict[str, Any]:
        """Return what a component says of itself, without its weights."""
        return modelfiles.read_json(self._config_folder(name) / "config.json")

    def option(self, name: str) -> Any:
        """Return a setting of the whole model, such as `boundary_ratio`; None where it has none."""
        return self._index.get(name)

    def _component_folder(self, name: str) -> Path:
        own = self._component_paths.get(name)
        place = Path(own or self._folder / name).expanduser()
        if own and not place.exists():
            raise modelfiles.gone(place, self._plan.model)
        return place

    def _config_folder(self, name: str) -> Path:
        """Return where a component's config.json is: beside its weights, of a single file in the model's own folder."""
        place = self._source(name)
        return self._folder / name if place.is_file() else place

    def _class(self, name: str) -> tuple[str, Any]:
        """Return a component's library and class."""
        match self._index.get(name):
            case [str(library), str(class_name)]:
                pass
            case _:
                raise BadModelFolder(f"{self._folder / 'model_index.json'}: no component {name}. Fetch the model anew.")
        if class_name not in CLASSES.get(library, ()):
            raise BadModelFolder(
                f"{self._folder / 'model_index.json'}: {name} is a {library}.{class_name}, which is never loaded. "
                f"Known: {', '.join(itertools.chain(*CLASSES.values()))}."
            )
        return library, getattr(importlib.import_module(library), class_name)

    def _load(self, name: str, device: torch.device, computes: torch.device | None = None) -> nn.Module:
        """Return a component as its library loads it, on `device`; LoRAs are added by `computes`, if another is."""
        library, component_class = self._class(name)
        folder = self._component_folder(name)
        modelfiles.check_files(folder, WEIGHTS[library])
        modelfiles.check_class(self._config_folder(name), component_class.__name__, library)
        if folder.is_file():
            module = skeleton.build(component_class, self._config_folder(name), library)
            module = singlefile.filled(module, folder, getattr(torch, self._plan.dtype)).to(device)
            self._change(name, module, computes or device)
            return module
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()  # stderr is the log
        # Straight to the device, tensor by tensor: host RAM never holds the whole component.
        placed = {} if device.type == "cpu" else {"device_map": {"": device}}
        module, found = _from_pretrained(
            component_class,
            folder,
            dtype=getattr(torch, (name == "vae" and self._plan.vae_dtype) or self._plan.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **placed,
        )
        if missing := sorted(found["missing_keys"]):
            # Both libraries would go on with random numbers in their place.
            raise BadModelFolder(
                f"{folder}: {len(missing)} weights are missing, {missing[0]} the first. Fetch the model anew."
            )
        assert isinstance(module, nn.Module)
        if (computes or device).type == "cpu":
            _align(module)
        self._change(name, module, computes or device)
        return module

    def _change(self, name: str, module: nn.Module, device: torch.device) -> None:
        """Add LoRAs to the weights of a module that its library loaded; CLIP's have other names in files."""
        weights = dict(module.named_parameters())
        for stored, changes in self._changes.get(name, {}).items():
            known = next(alias for alias in (stored, stored.removeprefix("text_model.")) if alias in weights)
            fuse(weights[known].data, changes, device)


def _told(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(file.name, (at := file.stat()).st_size, at.st_mtime_ns) for file in files]


def _align(module: nn.Module) -> None:
    """Put tensors where torch's own allocations begin: in a mapped file they lie anywhere, and the BLAS of some CPUs
    rounds by that (AMD EPYC, torch 2.13.0, 2026-11-27)."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def _from_pretrained(wanted: Any, folder: Path, **arguments: Any) -> Any:
    if not folder.is_dir():
        raise BadModelFolder(f"{folder} is missing. Fetch the model anew.")
    try:
        return wanted.from_pretrained(str(folder), local_files_only=True, **arguments)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own words; the libraries' have no number
        raise BadModelFolder(f"{folder}: cannot be loaded. {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in OTHER_SHAPE):
            raise
        raise BadModelFolder(f"{folder}: the weights are not of the shapes that config.json says.") from error


def _as_it_is(_module: nn.Module) -> None:
    """What `reshape` is where nobody asks for another shape."""


def _empty(module: nn.Module) -> None:
    """Let go of a module's tensors; the module is of no use afterwards."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data = tensor.data.new_empty(0)
