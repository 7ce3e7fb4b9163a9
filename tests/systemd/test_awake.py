"""A real logind and a real polkit: who may keep the machine awake, and that a sleep waits for the engine to be gone.

The unit that would put the machine to sleep is replaced by one that only takes a moment.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safelight import service
from safelight.config import Config
from tests.systemd.booted import PERSON, Machine
from tests.systemd.conftest import GPU

needs_polkit = pytest.mark.skipif(not shutil.which("pkaction"), reason="polkit is not installed")

SUSPEND = """\
[Service]
Type=oneshot
ExecStart=/bin/sleep 1
"""

A_JOB = """
import subprocess, sys
from safelightd import logs
from safelightd.awake import Awake
logs.set_up()
awake = Awake()
awake.job_starts()
print(subprocess.run(["systemd-inhibit", "--list", "--no-legend"], capture_output=True, text=True).stdout)
"""

A_NIGHT = """
import select, time
from safelightd.awake import Awake
slept = [0.0]
awake = Awake(lambda: slept[0])
print("ready", flush=True)
while not awake.hold:
    select.select([awake._logind.descriptor], [], [], 20)
    awake.look()
began = time.monotonic()
time.sleep(1.5)
awake.let_sleep()
while awake.hold:
    select.select([awake._logind.descriptor], [], [], 20)
    awake.look()
print("slept" if awake.take_resumed() else "did not", time.monotonic() - began, flush=True)
"""


def inhibitors(listed: str) -> list[str]:
    """Return "what:mode" of ours as systemd-inhibit lists them."""
    rows = [line.split() for line in listed.splitlines() if line.startswith("safelight ")]
    return sorted(f"{what}:{row[-1]}" for row in rows for what in [next(word for word in row if word in WHATS)])


WHATS = ("sleep", "idle", "handle-lid-switch")


@needs_polkit
def test_a_person_who_is_not_logged_in_may_block_sleep_with_the_rule_alone(machine: Machine, config: Config) -> None:
    machine.root("systemctl", "start", "systemd-logind.service", f"user@{PERSON}.service")
    before = machine.person(sys.executable, "-c", A_JOB)

    assert inhibitors(before.stdout) == ["idle:block", "sleep:delay"], before.stdout + before.stderr
    assert "sleep.not_blocked what=sleep:handle-lid-switch" in before.stderr

    rule = service.render("user", program=Path("/bin/true"), config=config, gpu=GPU)["polkit.rules"]
    person = next(line for line in rule.splitlines() if "subject.user" in line).split('"')[1]
    write = f"cat > /etc/polkit-1/rules.d/50-safelight.rules <<'END'\n{rule.replace(person, 'ann')}END"
    assert machine.root("sh", "-c", f"mkdir -p /etc/polkit-1/rules.d; {write}").returncode == 0
    machine.root("systemctl", "restart", "polkit.service")
    after = machine.person(sys.executable, "-c", A_JOB)

    expected = ["handle-lid-switch:block", "idle:block", "sleep:block", "sleep:delay"]
    assert inhibitors(after.stdout) == expected, after.stdout + after.stderr
    assert "sleep.not_blocked" not in after.stderr


def test_a_real_sleep_waits_until_nothing_is_on_the_gpu_and_its_end_is_heard(machine: Machine) -> None:
    unit = f"cat > /etc/systemd/system/systemd-suspend.service <<'END'\n{SUSPEND}END"
    assert machine.root("sh", "-c", unit).returncode == 0
    able = "echo mem > /run/state && mount --bind /run/state /sys/power/state"  # a virtual machine often has no sleep
    assert machine.root("sh", "-c", able).returncode == 0
    machine.root("systemctl", "daemon-reload")
    machine.root("systemctl", "start", "systemd-logind.service")
    answer = machine.root("busctl", "call", *LOGIN1, "CanSuspend").stdout
    if "yes" not in answer:
        pytest.skip(f"logind says that this kernel cannot suspend: {answer.strip()}")
    with subprocess.Popen(
        [*machine.enter(), sys.executable, "-c", A_NIGHT], stdout=subprocess.PIPE, text=True
    ) as night:
        assert night.stdout is not None
        assert night.stdout.readline() == "ready\n"
        asked = machine.root("busctl", "call", *LOGIN1, "Suspend", "b", "false")

        assert asked.returncode == 0, asked.stderr
        said, _ = night.communicate(timeout=300)

    what, seconds = said.rsplit(" ", 1)
    assert what == "slept"
    assert float(seconds) > 2.4  # a second and a half for us, and the second of the unit


LOGIN1 = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
