"""How long the demo takes until every output is verified. JSON out, exit by bar; `--svg FILE` keeps its picture."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from safelightd import demo

BAR_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="write what a terminal shows as an SVG")
    svg: Path | None = parser.parse_args().svg
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True, highlight=False)
    parent = Path(tempfile.mkdtemp(prefix="slb-"))
    started = time.monotonic()
    try:
        demo.run(parent / "safelight-demo", console)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    seconds = round(time.monotonic() - started, 1)
    if svg:
        text = console.export_svg(title="safelight demo").replace(f"{parent}/", "")
        text = re.sub(r"@font-face \{.*?\}\n", "", text, flags=re.DOTALL)  # no fetching: the reader's own monospace
        svg.write_text(text, encoding="utf-8")
    print(json.dumps({"demo_seconds": seconds, "bar": BAR_S}))
    return 0 if seconds <= BAR_S else 1


if __name__ == "__main__":
    sys.exit(main())
