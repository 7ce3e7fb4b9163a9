"""The real worker process, with the scripted engine behind its link, or the engine that the command line names."""

from __future__ import annotations

import sys
from pathlib import Path

from safelight import config as settings
from safelightd import logs, worker

if __name__ == "__main__":
    logs.set_up(verbose=True)
    scripted = [sys.executable, str(Path(__file__).with_name("scripted_engine.py"))]
    sys.exit(worker.serve(settings.load(), sys.argv[1:] or scripted))
