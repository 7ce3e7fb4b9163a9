"""The real worker process, with the scripted engine behind its link, or the engine that the command line names.

How many seconds the machine has slept stands in the file that SLEPT names, if it does: a test cannot let it sleep.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safelight import config as settings
from safelightd import logs, worker
from safelightd.awake import Awake

if __name__ == "__main__":
    logs.set_up(verbose=True)
    scripted = [sys.executable, str(Path(__file__).with_name("scripted_engine.py"))]
    slept = os.environ.get("SLEPT")
    awake = Awake(lambda: float(Path(slept).read_text())) if slept else None
    sys.exit(worker.serve(settings.load(), sys.argv[1:] or scripted, awake))
