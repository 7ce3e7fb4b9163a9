"""What a process of the daemon says when the system refuses it something: a line, and no traceback."""

from __future__ import annotations

import pytest

from tests.conftest import Installation
from tests.programs import programs


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize("verbose", [False, True])
def test_a_worker_that_cannot_write_its_state_names_the_folder_and_may_be_started_again(
    installation: Installation, *, verbose: bool
) -> None:
    """Its disk may be back by then."""
    blocked = installation.root / "blocked"
    blocked.touch()
    settings = installation.config.source
    written = settings.read_text().replace(f"{installation.root}/state", f"{blocked}/state")
    settings.write_text(f'{written}[queue]\nurl = "{installation.config.url}"\n')
    with programs(installation.env) as run:
        process = run("-m", "safelightd.cli", *(["-v"] if verbose else []), "worker")
        _, log = process.communicate(timeout=300)

    assert process.returncode == 1
    assert log.splitlines()[-1].startswith(f"{blocked}")
    assert "safelight doctor looks at every folder" in log.splitlines()[-1]
    assert ("Traceback" in log) is verbose
