"""How the inbox process ends when it is asked to more than once."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.conftest import Installation
from tests.integration.test_inbox_service import until


def test_a_second_sigterm_at_any_moment_of_the_end_changes_nothing(installation: Installation) -> None:
    """Also while Python takes itself down: the service manager would call it a failure."""
    command = [sys.executable, "-m", "safelightd.cli", "inbox"]
    environment = {**installation.env, "PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        until(installation.paths.rejected.is_dir)
        ends_at = time.monotonic() + 20
        while process.poll() is None:
            assert time.monotonic() < ends_at
            process.terminate()
            time.sleep(0.001)

    assert process.returncode == 0
