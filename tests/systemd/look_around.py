"""What a process of ours can do inside its unit's sandbox, written as JSON to the file that the command line names."""

from __future__ import annotations

import errno
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def lines(file: str) -> list[str]:
    return [line.strip() for line in Path(file).read_text().splitlines()]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    seen = {
        "inet": outcome(lambda: socket.socket(socket.AF_INET)),
        "inet6": outcome(lambda: socket.socket(socket.AF_INET6)),
        "netlink": outcome(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
        "unix": outcome(lambda: socket.socket(socket.AF_UNIX)),
        "interfaces": [line.split(":")[0] for line in lines("/proc/self/net/dev")[2:]],
        "usr": outcome(Path("/usr/safelight-was-here").touch),
        "home": outcome(lambda: list(Path("/home/ann").iterdir())),
        "tmp": Path("/tmp/of-the-machine").exists(),
        "capabilities": status["CapEff"],
        "no_new_privileges": status["NoNewPrivs"],
    }
    file.write_text(json.dumps(seen))
