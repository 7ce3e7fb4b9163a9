"""The real engine, where the machine is said to have a card of 80 GB: Wan's own program runs on no smaller one, and no
test has one. Nothing here touches it: the program is a stand-in.
"""

from __future__ import annotations

import sys

from safelight.machine import GIB, Machine
from safelightd import engine, probe

ROOMY = Machine(
    device="cuda",
    gpu="A card of 80 GB",
    capability=(9, 0),
    vram_total_bytes=80 * GIB,
    vram_free_bytes=79 * GIB,
    ram_total_bytes=256 * GIB,
    ram_available_bytes=240 * GIB,
    cpus=2,
)

if __name__ == "__main__":
    probe.read_machine = lambda *_: ROOMY
    sys.exit(engine.main())
