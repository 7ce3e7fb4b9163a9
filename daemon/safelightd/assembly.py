"""A component put together from its stored tensors, block by block, each where the plan wants it.

The module is built without memory; every tensor it gets is a view of one of a few buffers: one for what is not
repeated, one a resident block, one ring for all streamed blocks. So no byte is held twice, nothing fragments, and
giving everything back means emptying those buffers. Knows the plan's words and no file but those of the component.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from safelight.cpu_ladder import STREAMED_AT_ONCE
from safelightd.fusing import Change, fuse
from safelightd.pinned import PinnedMemory
from safelightd.pinnedset import PinnedKey, PinnedSet
from safelightd.precision import Format
from safelightd.shards import Entry
from safelightd.streaming import FromFile, FromPinned, Source, places, stream
from safelightd.weights import BadModelFolder, Reader, Stored

ALIGNMENT_BYTES = 256
"""Of every tensor in a buffer, as CUDA's own allocations are: kernels read 16 bytes at a time."""

NOT_REPEATED = -1
"""The block of what belongs to none."""


@dataclass(frozen=True)
class Tensor:
    """One plain tensor of a module: a parameter, a buffer, or a part of a quantised weight."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: Stored | None
    """None: it is made from the weight on its way."""

    @property
    def nbytes(self) -> int:
        return -(-self.entry.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    @property
    def entry(self) -> Entry:
        """How it stands in a file."""
        return Entry(self.name, self.shape, self.dtype)


@dataclass
class Block:
    """What lies in memory together."""

    tensors: list[Tensor] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """All names of a tensor that has several."""
    made: dict[str, Stored] = field(default_factory=dict)
    """By Linear, the weight its parts are made from."""
    quantised: list[str] = field(default_factory=list)
    """Every Linear whose weight is held in parts."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors as views of `buffer`, a flat uint8 tensor of `nbytes`."""
        starts = accumulate((tensor.nbytes for tensor in self.tensors), initial=0)
        return {
            tensor.name: _view(buffer[start : start + tensor.nbytes], tensor)
            for start, tensor in zip(starts, self.tensors, strict=False)
        }


class Keeper(Protocol):
    """What keeps a component while it is put together."""

    def begin(self, entries: Sequence[Entry], quantised: int) -> None:
        """Say what will be written, in its order, and of how many quantised weights that is."""
        ...

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write some of them, as they lie in memory when the current stream has come so far."""
        ...


@dataclass(frozen=True)
class Order:
    """How a component is to lie in memory."""

    folder: Path
    """Where its files are, for errors and for the identity of a pinned set."""
    device: torch.device
    dtype: torch.dtype
    paths: tuple[str, ...]
    """The ModuleLists of its repeated blocks, in running order."""
    format: Format | None = None
    streamed: tuple[int, ...] = ()
    from_file: bool = False
    changes: Mapping[str, Sequence[Change]] = field(default_factory=dict)
    """By weight, what LoRAs add to it on its way."""
    keeper: Keeper | None = None
    """Gets every tensor as the component holds it; never of blocks that come from the file at every step."""


@contextmanager
def assembled(
    module: nn.Module, stored: Mapping[str, Stored], order: Order, pinned: PinnedSet, key: PinnedKey
) -> Iterator[nn.Module]:
    """Have `module`, built on the meta device, filled and placed as `order` says, until the block ends.

    Args:
        key: what a pinned set is known by: the files, the precision and the streamed blocks.

    Raises:
        BadModelFolder: tensors are missing or of other shapes than the module's.
    """
    fixed = dtypes_kept(module, order.dtype)
    blocks = _blocks(module, stored, order, fixed)
    buffers: list[torch.Tensor] = []
    with ExitStack() as leaving:
        leaving.callback(_give_back, buffers)
        resident = [block for place, block in blocks.items() if place not in order.streamed]
        moving = [blocks[place] for place in order.streamed]
        if order.keeper:
            entries = [tensor.entry for block in (*resident, *moving) for tensor in block.tensors]
            order.keeper.begin(entries, sum(len(block.quantised) for block in blocks.values()))
        with Reader(order.device) as reader:
            for block in resident:
                buffers.append(buffer := torch.empty(block.nbytes, dtype=torch.uint8, device=order.device))
                _fill(block, block.views(buffer), reader, order)
                _attach(module, block, block.views(buffer), order)
                if order.keeper:
                    reader.finish()
                    order.keeper.write(block.views(buffer))
            if moving:
                buffers.append(_streamed(module, moving, order, reader, pinned, key, leaving))
            reader.finish()
        _settle_buffers(module, order.device)
        yield module.eval()


def running_order(module: nn.Module, paths: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the repeated blocks with their names, in the order they run in."""
    lists = [(path, module.get_submodule(path)) for path in paths]
    return [(f"{path}.{i}", block) for path, blocks in lists for i, block in enumerate(blocks.children())]


def dtypes_kept(module: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of the parameters that stay in float32 although the rest is `dtype`.

    As diffusers (models/model_loading_utils.py, 0.42) and transformers (modeling_utils.py, 5.23) load them: what
    diffusers keeps it keeps in both half precisions, transformers only in float16 unless it is strict.
    """
    if dtype == torch.float32:
        return frozenset()
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if not hasattr(module, "_keep_in_fp32_modules_strict") or dtype == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return frozenset(name for name, _ in module.named_parameters() if kept & set(name.split(".")))


def _blocks(module: nn.Module, stored: Mapping[str, Stored], order: Order, fixed: frozenset[str]) -> dict[int, Block]:
    """Return what lies together, by place in running order; first what is not repeated."""
    prefixes = [f"{name}." for name, _ in running_order(module, order.paths)]
    place_of = {prefix: place for place, prefix in enumerate(prefixes)}
    depth = {path: path.count(".") + 2 for path in order.paths}
    blocks: dict[int, Block] = {place: Block() for place in (NOT_REPEATED, *range(len(prefixes)))}
    linears = {f"{name}.weight": linear for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}
    missing, misshapen = [], []
    for names, tensor in _named_once(module):
        name = next((alias for alias in names if alias in stored), names[0])
        place = next(
            (place_of[prefix] for parts in depth.values() if (prefix := _prefix(names[0], parts)) in place_of),
            NOT_REPEATED,
        )
        block = blocks[place]
        linear = linears.get(names[0])
        if place != NOT_REPEATED and linear is not None and order.format and order.format.takes(names[0], linear):
            missing += _add_quantised(block, names[0], linear, stored, order)
        elif name not in stored:
            missing.append(names[0])
        elif stored[name].shape != tuple(tensor.shape):
            misshapen.append(names[0])
        else:
            dtype = torch.float32 if names[0] in fixed else order.dtype
            dtype = dtype if tensor.is_floating_point() else stored[name].dtype
            block.tensors.append(Tensor(names[0], tuple(tensor.shape), dtype, stored[name]))
            block.aliases[names[0]] = names
    if missing:
        # Both libraries would go on with random numbers in their place.
        raise BadModelFolder(
            f"{order.folder}: {len(missing)} weights are missing, {missing[0]} the first. Fetch the model anew."
        )
    if misshapen:
        raise BadModelFolder(
            f"{order.folder}: the weights are not of the shapes that config.json says, {misshapen[0]} the first."
        )
    return blocks


def _add_quantised(block: Block, name: str, linear: nn.Linear, stored: Mapping[str, Stored], order: Order) -> list[str]:
    """Add the parts of a quantised weight; return what of it is missing."""
    assert order.format is not None
    layout = order.format.layout(linear.out_features, linear.in_features, order.dtype)
    parts = [Tensor(f"{name}.{part}", tuple(shape), dtype, None) for part, (shape, dtype) in layout.items()]
    block.quantised.append(name.removesuffix(".weight"))
    if name in stored and stored[name].shape == (linear.out_features, linear.in_features):
        block.tensors += parts
        block.made[name.removesuffix(".weight")] = stored[name]
        return []
    block.tensors += [Tensor(part.name, part.shape, part.dtype, stored.get(part.name)) for part in parts]
    return [part.name for part in parts if part.name not in stored or stored[part.name].shape != part.shape]


def _named_once(module: nn.Module) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield every parameter and persistent buffer with all its names: T5's embedding has two."""
    names: dict[int, list[str]] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for aliases in names.values():
        yield aliases, tensors[aliases[0]]


def _put(module: nn.Module, name: str, view: torch.Tensor) -> None:
    """Put a tensor in the place of the meta tensor of this name."""
    path, _, child = name.rpartition(".")
    parent = module.get_submodule(path)
    if child in parent._parameters:  # noqa: SLF001 - Module offers no other way to replace a meta tensor in place
        parent._parameters[child] = nn.Parameter(view, requires_grad=False)  # noqa: SLF001 - as above
    else:
        parent._buffers[child] = view  # noqa: SLF001 - as above


def _prefix(name: str, parts: int) -> str:
    return ".".join(name.split(".")[:parts]) + "."


def _fill(block: Block, views: Mapping[str, torch.Tensor], reader: Reader, order: Order) -> None:
    """Read a block's tensors to where `views` are, and add what LoRAs change; quantise those that are not stored so,
    one Linear at a time."""
    reader.read((tensor.stored, views[tensor.name]) for tensor in block.tensors if tensor.stored)
    _change(block, views, reader, order)
    for linear, stored in block.made.items():
        _fill_quantised(linear, stored, views, reader, order)


def _change(block: Block, views: Mapping[str, torch.Tensor], reader: Reader, order: Order) -> None:
    """Add LoRAs to what was just read."""
    changed = [tensor.name for tensor in block.tensors if tensor.stored and tensor.name in order.changes]
    if changed:
        reader.finish()
    for name in changed:
        fuse(views[name], order.changes[name], order.device)


def _fill_quantised(
    linear: str, stored: Stored, views: Mapping[str, torch.Tensor], reader: Reader, order: Order
) -> None:
    """Quantise one weight to where `views` are. Nothing of it is left when the next one is read."""
    assert order.format is not None
    weight = torch.empty(stored.shape, dtype=order.dtype, device=order.device)
    reader.read([(stored, weight)])
    reader.finish()
    if changes := order.changes.get(f"{linear}.weight"):
        fuse(weight, changes, order.device)
    for part, made in order.format.quantise(weight).items():
        views[f"{linear}.weight.{part}"].copy_(made.view(views[f"{linear}.weight.{part}"].shape))


def _attach(module: nn.Module, block: Block, views: Mapping[str, torch.Tensor], order: Order) -> None:
    """Make the module compute with `views`."""
    parts_of = {linear: f"{linear}.weight." for linear in block.quantised}
    parts = {name for prefix in parts_of.values() for name in views if name.startswith(prefix)}
    for name, view in views.items():
        if name not in parts:
            for alias in block.aliases.get(name, [name]):
                _put(module, alias, view)
    for linear, prefix in parts_of.items():
        own = {name.removeprefix(prefix): view for name, view in views.items() if name.startswith(prefix)}
        assert order.format is not None
        attached = order.format.attach(_linear(module, linear), own, order.dtype)
        parent, _, child = linear.rpartition(".")
        setattr(module.get_submodule(parent), child, attached)


def _streamed(
    module: nn.Module, blocks: Sequence[Block], order: Order, reader: Reader, pinned: PinnedSet, key: PinnedKey,
    leaving: ExitStack,
) -> torch.Tensor:  # fmt: skip
    """Attach the streamed blocks to a ring and start it; return the ring's memory."""
    sizes = [block.nbytes for block in blocks]
    layout = places(sizes, at_once=2 if order.device.type == "cuda" else STREAMED_AT_ONCE)
    ring = torch.empty(layout.nbytes, dtype=torch.uint8, device=order.device)
    targets = [ring[begin : begin + size] for begin, size in zip(layout.offsets, sizes, strict=True)]
    for block, target in zip(blocks, targets, strict=True):
        _attach(module, block, block.views(target), order)
    source: Source
    if order.from_file:
        source = _from_file(blocks, targets, order)
    else:
        memory = pinned.take(key) or _pinned_copy(blocks, sizes, reader, order, pinned.take_to_refill(sum(sizes)))
        leaving.callback(pinned.keep, key, memory)
        for block, own in zip(blocks, memory.bytes.split(sizes), strict=True):
            if order.keeper:
                order.keeper.write(block.views(own))
        source = FromPinned(memory.bytes.split(sizes), targets)
    leaving.callback(source.close)
    modules = [block for _, block in running_order(module, order.paths)]
    stream([modules[i] for i in order.streamed], layout.follows, source)
    return ring


def _pinned_copy(
    blocks: Sequence[Block], sizes: Sequence[int], reader: Reader, order: Order, there: PinnedMemory | None
) -> PinnedMemory:
    """Return pinned memory with the blocks in it; `there` is some of the right size."""
    memory = there or PinnedMemory(sum(sizes), order.device)
    try:
        try:
            for block, own in zip(blocks, memory.bytes.split(list(sizes)), strict=True):
                _fill(block, block.views(own), reader, order)
        finally:
            if order.device.type == "cuda":
                torch.cuda.synchronize()  # what was quantised or changed on the GPU has arrived
    except BaseException:
        memory.close()
        raise
    return memory


def _from_file(blocks: Sequence[Block], targets: Sequence[torch.Tensor], order: Order) -> Source:
    if any(block.made for block in blocks):
        raise BadModelFolder(
            f"{order.folder}: what is streamed from the file must lie there in its precision. Prepare it: "
            "safelight models prepare."
        )
    wanted = []
    changed: list[list[tuple[torch.Tensor, Sequence[Change]]]] = []
    for block, target in zip(blocks, targets, strict=True):
        views = block.views(target)
        wanted.append([(tensor.stored, views[tensor.name]) for tensor in block.tensors if tensor.stored])
        changed.append([(view, order.changes[name]) for name, view in views.items() if name in order.changes])

    def change(j: int) -> None:
        for view, changes in changed[j]:
            fuse(view, changes, order.device)

    return FromFile(wanted, order.device, change)


def _settle_buffers(module: nn.Module, device: torch.device) -> None:
    """Move what the module computed for itself when it was built, such as Wan's rotary frequencies."""
    for part in module.modules():
        for key, tensor in part._buffers.items():  # noqa: SLF001 - Module.to would copy every parameter, too
            if tensor is not None and tensor.device != device:
                part._buffers[key] = tensor.to(device)  # noqa: SLF001 - as above


def _give_back(buffers: Sequence[torch.Tensor]) -> None:
    """Empty the buffers, also where a name still points at the module."""
    if any(buffer.is_cuda for buffer in buffers):
        torch.cuda.synchronize()
    for buffer in buffers:
        buffer.untyped_storage().resize_(0)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _view(part: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    return part[:size].view(tensor.dtype).view(tensor.shape)
