"""The queue's server: how to reach it, and whether jobs are safe on it. Knows nothing of what stands in the queue."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import redis
from redis._parsers.base import BaseParser
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from safelight import units
from safelight.errors import BadConfig, QueueUnreachable

SERVER_MIN = {"valkey": (7, 2), "redis": (6, 2)}
"""The oldest versions with the reliable path (BLMOVE) and, for Valkey, WAITAOF."""

AWAY = (redis.ConnectionError, redis.TimeoutError, redis.ReadOnlyError, redis.OutOfMemoryError)
"""What a call raises while the server is down, loading (BusyLoadingError is a ConnectionError) or full: try later."""

# A server that cannot write its append-only file (a full disk) refuses writes as a read-only replica does. redis-py
# gives MISCONF no class of its own, and a bare ResponseError is also what a bug of ours raises.
BaseParser.EXCEPTION_CLASSES["MISCONF"] = redis.ReadOnlyError


def check_url(url: str) -> None:
    """Refuse a queue that anybody on the network could read or fill.

    Raises:
        BadConfig: no URL, or a TCP URL off this machine without TLS, or without a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise BadConfig(f"[queue] url = {_shown(url)!r}: {error}.") from error
    if parts.scheme == "unix":
        return
    if parts.scheme not in ("redis", "rediss"):
        raise BadConfig(
            f"[queue] url = {_shown(url)!r}: unknown scheme. Use unix://, rediss:// or redis:// on loopback."
        )
    loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme == "redis" and not loopback:
        raise BadConfig(f"[queue] url: {parts.hostname} without TLS. Use rediss://, or a unix socket.")
    if not parts.password:
        raise BadConfig("[queue] url: no password. Jobs on this queue run on your GPU: give the server one.")


def connect(url: str, *, timeout_s: float = 5.0, retries: int = 3) -> redis.Redis:
    """Return a connection that has answered a PING.

    Raises:
        QueueUnreachable: nothing answers.
        BadConfig: the URL is not safe to use, or the server refuses its password.
    """
    check_url(url)
    backoff = Retry(ExponentialBackoff(cap=1.0, base=0.05), retries)
    try:
        server = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=backoff)
    except ValueError as error:
        raise BadConfig(f"[queue] url = {_shown(url)!r}: {error}.") from error
    try:
        server.ping()
    except redis.BusyLoadingError as error:
        raise QueueUnreachable(f"{_shown(url)} is still loading its data.", "Try again in a moment.") from error
    except redis.AuthenticationError as error:
        raise BadConfig(f"The queue at {_shown(url)} refused the password of [queue] url: {error}.") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise QueueUnreachable(f"The queue at {_shown(url)} does not answer.", _start(url)) from error
    return server


def _start(url: str) -> str:
    """The embedded server listens on a unix socket alone."""
    return units.remedy() if url.startswith("unix:") else "Start that server, or correct [queue] url."


def _shown(url: str) -> str:
    return re.sub(r"://[^@/]*@", "://***@", url)


def check_server(server: redis.Redis) -> None:
    """Refuse a server on which jobs could be lost.

    Raises:
        BadConfig: too old, evicting, or without an append-only file.
    """
    facts: dict[str, Any] = server.info()
    name = str(facts.get("server_name", "redis"))
    version = str(facts.get("valkey_version" if name == "valkey" else "redis_version", "0.0"))
    oldest = SERVER_MIN.get(name, SERVER_MIN["redis"])
    numbers = tuple(int(part) for part in version.split(".")[:2])
    faults = []
    if numbers < oldest:
        faults.append(f"{name} {version} is older than {oldest[0]}.{oldest[1]}")
    if facts.get("maxmemory_policy", "noeviction") != "noeviction":
        faults.append(f"its maxmemory-policy is {facts['maxmemory_policy']}, which deletes jobs: set noeviction")
    if not int(facts.get("aof_enabled", 0)):
        faults.append("it keeps no append-only file: set appendonly yes")
    if faults:
        raise BadConfig(f"The queue server cannot keep jobs safe: {'; '.join(faults)}.")
