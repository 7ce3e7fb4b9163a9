"""The scripted engine of the worker's tests, with one word more: `long`, whose second step takes so many seconds.

patient_engine.py SECONDS ARGUMENTS-OF-THE-ENGINE...
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.daemon import scripted_engine

if __name__ == "__main__":
    seconds = float(sys.argv.pop(1))
    end_early, run = scripted_engine.end_early, scripted_engine.run

    def run_with_patience(link: Any, config: Any, ledger: Any, message: Any, cancelled: threading.Event) -> None:
        def end_early_or_wait(word: str, config: Any, cancelled: threading.Event) -> None:
            if word == "long":
                link.send("step", message["execution"], phase="denoise", i=1, n=2, seconds_left=seconds)
                cancelled.wait(seconds)
            end_early(word, config, cancelled)

        scripted_engine.end_early = end_early_or_wait
        run(link, config, ledger, message, cancelled)

    scripted_engine.run = run_with_patience
    scripted_engine.main()
