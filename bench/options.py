"""What every bench of full-size models can be told."""

from __future__ import annotations

import argparse
from pathlib import Path


def full_size(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of --folder, --limit-s and --tiny, with a bench's docstring as its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/safelight-bench"), help="of weights, compiled code")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin nothing after this")
    parser.add_argument("--tiny", action="store_true", help="the same path with models in little, on the CPU")
    return parser
