"""The digests that come with shipped files, as `sha256sum` writes them."""

from __future__ import annotations

from pathlib import Path

NAME = "SHA256SUMS"


def listed(folder: Path) -> dict[str, str]:
    """Return the digest of each file that the list in a folder names, by its path in there."""
    lines = (folder / NAME).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
