"""A folder of weights being written: under another name, and its own when it is whole and on the disk.

What was interrupted never has the right name, and is removed by who writes there next. Knows no tensor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safelight import durable, prepared
from safelight.machine import GIB
from safelight.prepared import StoredFile
from safelightd.claim import claimed
from safelightd.shards import Entry

SHARD_BYTES = GIB
"""At most, of one file: it is hashed as soon as it is written, out of the page cache."""


def unfinished(target: Path) -> Path:
    """Return the name that a folder has while it is written."""
    return target.with_name(target.name + prepared.UNFINISHED)


@contextmanager
def emptied(folder: Path, doing: str) -> Iterator[None]:
    """Have an empty folder that no other process writes to; what an interrupted run left in it is removed.

    Whatever is there under this name when the block ends is removed, too.

    Raises:
        SafelightError: another process is writing to it.
    """
    with claimed(folder, doing):
        for left in folder.iterdir():
            left.unlink()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def names(stem: str, count: int) -> list[str]:
    """Return the names of so many files of weights, as the libraries look for them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, stem: str, shards: Mapping[str, Sequence[Entry]]) -> list[StoredFile]:
    """Write what says in which file each tensor is; nothing where there is one file."""
    if len(shards) == 1:
        return []
    weight_map = {entry.name: name for name, entries in shards.items() for entry in entries}
    total = sum(entry.nbytes for entries in shards.values() for entry in entries)
    content = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()
    return [write_small(folder / f"{stem}.safetensors.index.json", content)]


def write_small(file: Path, content: bytes) -> StoredFile:
    """Write a small file of the folder."""
    durable.write(file, content)
    return StoredFile(name=file.name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def put_in_place(folder: Path, target: Path) -> None:
    """Give a whole folder its name; one that has it makes way."""
    replaced = target.with_name(f"{target.name}.replaced{prepared.UNFINISHED}")
    shutil.rmtree(replaced, ignore_errors=True)
    durable.sync_folder(folder)
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    durable.sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
