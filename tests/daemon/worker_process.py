"""The real worker process, with the scripted engine behind its link."""

from __future__ import annotations

import sys
from pathlib import Path

from safelight import config as settings
from safelight import jobqueue
from safelightd import logs, probe, worker

if __name__ == "__main__":
    logs.set_up(verbose=True)
    config = settings.load()
    server = jobqueue.connect(config.url, timeout_s=30.0)
    engine = [sys.executable, str(Path(__file__).with_name("scripted_engine.py"))]
    sys.exit(worker.GpuWorker(config, probe.read_machine(config), server, engine).run())
