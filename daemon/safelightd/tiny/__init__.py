"""The tiny models: true diffusers folders of the real classes with random weights, built where they are missing.

They draw noise. They exist so that every path of a real job can be shown and tested on any machine in seconds.
The demo models, which draw, are put in place the same way.
Importing this package is cheap; building imports torch and diffusers.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelight import durable
from safelight.errors import SafelightError
from safelightd import demo_models

KEYS = ("tiny-flux-schnell", "tiny-flux-dev", "tiny-wan-ti2v", "tiny-wan-t2v-a14b", "tiny-wan-i2v-a14b")


class NotATinyModel(SafelightError):
    """A tiny model was asked for that cannot be built here."""


def build(key: str, folder: Path) -> None:
    """Put the tiny or demo model `key` at `folder`, whole and synced, unless it is there already.

    The folder appears by one rename. Several processes may build at once: the first wins, all return.

    Raises:
        NotATinyModel: no tiny model has this key, or `folder` holds something else.
        DamagedDemoModel: a file of a demo model is not the one that was shipped.
    """
    if key in demo_models.KEYS:
        _build(folder, "model_index.json", lambda unfinished: demo_models.copy(key, unfinished))
        demo_models.check(key, folder)
    else:
        _build(folder, "model_index.json", lambda unfinished: _save(_pipeline(key), unfinished))


def build_controlnet(folder: Path) -> None:
    """Put the tiny ControlNet of the tiny dev at `folder`, as `build` does.

    Raises:
        NotATinyModel: `folder` holds something else.
    """
    _build(folder, "config.json", lambda unfinished: _save(_controlnet(), unfinished))


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=True)


def _build(folder: Path, index: str, fill: Callable[[Path], None]) -> None:
    if (folder / index).is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    unfinished.mkdir()
    try:
        fill(unfinished)
        durable.sync_filesystem(unfinished)
        _put_in_place(unfinished, folder, index)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    durable.sync_folder(folder.parent)


def _put_in_place(unfinished: Path, folder: Path, index: str) -> None:
    try:
        unfinished.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not (folder / index).is_file():
            raise NotATinyModel(
                f"{folder}: something that is no model is in the way of a tiny one. Move it away."
            ) from error


def _controlnet() -> Any:
    import torch

    from safelightd.tiny import flux

    with torch.random.fork_rng(devices=[]):
        return flux.controlnet()


def _pipeline(key: str) -> Any:
    import torch

    from safelightd.tiny import flux, wan

    # The classes draw their own initial weights from torch's shared stream, which is not ours to move.
    with torch.random.fork_rng(devices=[]):
        match key:
            case "tiny-flux-schnell":
                return flux.pipeline(key, guidance_embeds=False)
            case "tiny-flux-dev":
                return flux.pipeline(key, guidance_embeds=True)
            case "tiny-wan-ti2v":
                return wan.ti2v(key)
            case "tiny-wan-t2v-a14b":
                return wan.t2v_a14b(key)
            case "tiny-wan-i2v-a14b":
                return wan.i2v_a14b(key)
    raise NotATinyModel(f"{key}: no tiny model has this name. Known: {', '.join(KEYS)}.")
