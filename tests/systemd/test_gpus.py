"""One worker a GPU, whoever starts it: several instances, and both sets, on cards whose driver is a stand-in.

The stand-in is NVIDIA's NVML as built for the tests of the daemon, once a card, each with a UUID of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from safelight.service import Kind
from tests.systemd.booted import CHECKOUT, SETTINGS, Daemon, boot, until

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="the stand-in for the driver needs gcc")

SOURCE = CHECKOUT / "tests" / "daemon" / "stand_in_driver.c"
CARDS = [f"GPU-00000000-0000-0000-0000-00000000000{number}" for number in (1, 2)]
WORKERS = [f"worker@{card}" for card in CARDS]
GPU_SETTINGS = SETTINGS.replace('"cpu"', '"cuda"')
TAKEN = "Another worker uses this device"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Kind, Daemon]]:
    """Both sets, strangers to each other, on a machine of two cards, each worker with its card's driver; none runs."""
    source = SOURCE.read_text()
    with boot(tmp_path_factory.mktemp("machine")) as machine:
        sets: dict[Kind, Daemon] = {kind: Daemon(machine, kind) for kind in ("system", "user")}
        cards = machine.path("/opt/cards")
        for card, worker in zip(CARDS, WORKERS, strict=True):
            (cards / card).mkdir(parents=True)
            words = ["gcc", "-shared", "-fPIC", "-o", str(cards / card / "libnvidia-ml.so.1"), "-x", "c", "-"]
            subprocess.run(words, input=source.replace(CARDS[0], card), text=True, check=True)
            driver = f"LD_LIBRARY_PATH=/opt/cards/{card} STAND_IN_CARD=/opt/cards/state"
            for daemon in sets.values():
                daemon.drop_in(worker, f"[Service]\nEnvironment={driver}\nRestartSec=200ms\n", "driver")
        (cards / "state").write_text("well")
        for daemon in sets.values():
            daemon.install(GPU_SETTINGS, gpu=CARDS[0], member=False)
        assert until(lambda: all(daemon.active("redis", "inbox") for daemon in sets.values()), 60), machine.journal()
        yield sets


@pytest.fixture
def system(sets: dict[Kind, Daemon]) -> Daemon:
    return _without_workers(sets)["system"]


@pytest.fixture
def user(sets: dict[Kind, Daemon]) -> Daemon:
    return sets["user"]


def _without_workers(sets: dict[Kind, Daemon]) -> dict[Kind, Daemon]:
    for daemon in sets.values():
        daemon.systemctl("stop", "safelight-worker@*.service")
        daemon.systemctl("reset-failed", "safelight-worker@*.service")
    return sets


def start(daemon: Daemon, worker: str) -> bool:
    return daemon.systemctl("start", f"safelight-{worker}.service").returncode == 0


def test_each_gpu_has_a_worker_of_its_own_by_uuid(system: Daemon) -> None:
    assert all(start(system, worker) for worker in WORKERS), system.machine.journal()

    assert len({system.main(worker) for worker in WORKERS}) == 2
    with system.queue() as queue:
        assert {row.name.partition("-")[2] for row in queue.workers()} == set(CARDS)
    locks = {path.name for path in system.machine.path("/dev/shm").iterdir()}
    assert {f"safelight-{card}.lock" for card in CARDS} <= locks


@pytest.mark.parametrize("first", ["system", "user"])
@pytest.mark.parametrize("there", [False, True])
def test_the_system_and_a_person_never_have_a_worker_on_one_gpu(
    system: Daemon, user: Daemon, first: Kind, there: bool
) -> None:
    """Whoever comes second is told why and not restarted, also where the lock's file is another user's from before."""
    has, wants = (system, user) if first == "system" else (user, system)
    lock = system.machine.path(f"/dev/shm/safelight-{CARDS[0]}.lock")
    lock.unlink(missing_ok=True)
    if there:
        assert start(wants, WORKERS[0]), system.machine.journal()
        wants.systemctl("stop", f"safelight-{WORKERS[0]}.service")
    assert start(has, WORKERS[0]), system.machine.journal()
    before = has.main(WORKERS[0])

    assert not start(wants, WORKERS[0])
    assert until(lambda: wants.show(WORKERS[0], "ActiveState") == "failed", 20), system.machine.journal()
    assert (wants.show(WORKERS[0], "ExecMainStatus"), wants.show(WORKERS[0], "NRestarts")) == ("3", "0")
    assert TAKEN in system.machine.journal(20)
    assert (has.main(WORKERS[0]), has.show(WORKERS[0], "ActiveState")) == (before, "active")
    assert start(wants, WORKERS[1]), system.machine.journal()


def test_no_worker_is_ready_before_its_device_was_probed(system: Daemon) -> None:
    """The driver hangs: its library is a pipe to which nobody writes."""
    library = system.machine.path(f"/opt/cards/{CARDS[0]}/libcuda.so.1")
    os.mkfifo(library)
    try:
        system.systemctl("start", "--no-block", f"safelight-{WORKERS[0]}.service")

        assert until(lambda: system.show(WORKERS[0], "StatusText") == "Probing the device", 20)
        assert system.show(WORKERS[0], "ActiveState") == "activating"

        library.open("w").close()

        assert until(lambda: system.active(WORKERS[0]), 20), system.machine.journal()
        told = "Held: gpu: libcuda.so.1 cannot be loaded"
        assert until(lambda: system.show(WORKERS[0], "StatusText").startswith(told), 10)
    finally:
        library.unlink()


def test_a_gpu_that_is_not_there_holds_its_worker_and_is_never_the_cpu(system: Daemon) -> None:
    assert start(system, "worker@7")
    assert system.show("worker@7", "StatusText").startswith("Held: gpu: GPU 7: ")
