"""The demo models, which come with the project: small, trained, and of the same classes as the real ones.

Each is a diffusers folder beside this file, with a model card and the digests of its files. Unlike the tiny models they
draw what they are told, within their words; MODEL_CARD.md says how well.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from safelight import digests
from safelight.errors import SafelightError

KEYS = ("demo-flux", "demo-wan")
_PLACE = Path(__file__).parent


class DamagedDemoModel(SafelightError):
    """A file of a demo model is not the one that was shipped."""


def copy(key: str, folder: Path) -> None:
    """Put the files of demo model `key` into `folder`, which exists and is empty."""
    shutil.copytree(_PLACE / key, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)


def check(key: str, folder: Path) -> None:
    """Compare the files in `folder` with the digests that were shipped: 11 MB, 10 ms.

    Raises:
        DamagedDemoModel: a file is missing or has other bytes; all such are named.
    """
    bad = [name for name, digest in digests.listed(_PLACE / key).items() if not _is_whole(folder / name, digest)]
    if bad:
        raise DamagedDemoModel(
            f"{folder}: {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not as shipped. "
            f"Delete the folder: the next job of {key} brings it back."
        )


def _is_whole(file: Path, digest: str) -> bool:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False
