"""A hub on localhost: speaks what huggingface_hub asks of the real one, and misbehaves as it is told.

Large files are answered by a redirect to a second server, as the hub sends people to its CDN.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from safelight import config as settings
from safelight import models
from tests.conftest import Installation

COMMIT = "c0ffee" + "0" * 34
LICENSED = "hf_" + "may_read"

LFS_BYTES = 100_000
"""Weights, and larger files, are kept as the hub keeps weights: apart from git, named by their sha256."""


@dataclass
class Hub:
    """What the servers have, what they do wrong, and what they were asked."""

    files: dict[str, bytes]
    repository: str = "somebody/a-model"
    commit: str = COMMIT
    gated: bool = False
    cut: dict[str, list[int]] = field(default_factory=dict)
    """By file: after how many bytes each of the next answers ends."""
    sent: dict[str, bytes] = field(default_factory=dict)
    """By file: what is sent in place of what is listed."""
    slow: dict[str, float] = field(default_factory=dict)
    """By file: seconds between its sixteenths."""
    status: dict[str, list[int]] = field(default_factory=dict)
    """By file: what the next requests for it are answered with."""
    ranges: bool = True
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Server, path and headers of every request."""
    url: str = ""
    cdn_url: str = ""

    def paths(self, server: str, name: str = "") -> list[str]:
        return [path for at, path, _ in self.asked if at == server and path.endswith(name)]

    def ranges_of(self, name: str) -> list[str | None]:
        found = [(path, head) for _, path, head in self.asked if path.endswith(name) and head["method"] == "GET"]
        return [head.get("range") for path, head in found if "/cdn/" in path or not self.is_large(name)]

    def is_large(self, name: str) -> bool:
        return name.endswith(".safetensors") or len(self.files[name]) > LFS_BYTES

    def listing(self) -> dict[str, Any]:
        return {
            "id": self.repository,
            "sha": self.commit,
            "gated": "auto" if self.gated else False,
            "private": False,
            "tags": [],
            "siblings": [self._sibling(name, content) for name, content in self.files.items()],
        }

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        row: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
        if self.is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            row |= {"blobId": "0" * 40, "lfs": {"size": len(content), "sha256": sha256, "pointerSize": 134}}
        return row


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub
    name: str

    def handle_error(self, *_request: object) -> None:
        """Say nothing of a client that has hung up."""


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast("_Server", self.server).hub

    def log_message(self, *_words: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer, and remember what was asked."""
        hub, name = self.hub, cast("_Server", self.server).name
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        hub.asked.append((name, path, {**headers, "method": self.command}))
        if name == "cdn":
            self._bytes(path.removeprefix("/cdn/"))
        elif path in (f"/api/models/{hub.repository}", f"/api/models/{hub.repository}/revision/{hub.commit}"):
            self._answer(200, json.dumps(hub.listing()).encode())
        elif path.startswith(f"/api/models/{hub.repository}/revision/"):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith(prefix := f"/{hub.repository}/resolve/{hub.commit}/"):
            self._resolve(path.removeprefix(prefix))
        else:
            # What the real one says to a stranger of a repository that is not there.
            self._refuse(404 if "authorization" in headers else 401, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the base class names it

    def _resolve(self, name: str) -> None:
        hub = self.hub
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hub.gated and token != LICENSED:
            self._refuse(403 if token else 401, "GatedRepo")
        elif name not in hub.files:
            self._refuse(404, "EntryNotFound")
        elif hub.status.get(name) and self.command == "GET":
            self._refuse(hub.status[name].pop(0), "")
        elif hub.is_large(name):
            linked = {
                "Location": f"{hub.cdn_url}/cdn/{name}",
                "X-Linked-Size": str(len(hub.files[name])),
                "X-Linked-ETag": f'"{hashlib.sha256(hub.files[name]).hexdigest()}"',
            }
            self._answer(302, b"", **linked)
        else:
            self._bytes(name)

    def _bytes(self, name: str) -> None:
        hub = self.hub
        content = hub.sent.get(name, hub.files[name])
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and hub.ranges else 0
        self.send_response(206 if asked and hub.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked and hub.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{git_blob(hub.files[name])}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = hub.cut.get(name)
        end = start + cut.pop(0) if cut else len(content)
        step = max(len(content) // 16, 1)
        for at in range(start, min(end, len(content)), step):
            self.wfile.write(content[at : min(at + step, end)])
            time.sleep(hub.slow.get(name, 0))
        if end < len(content):
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", **({"X-Error-Code": code} if code else {}))

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": self.hub.commit, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Have the hub and its CDN answer until the block ends, each at a port of its own."""
    servers = []
    for name in ("hub", "cdn"):
        server = _Server(("127.0.0.1", 0), _Answers)
        server.hub, server.name = hub, name
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    # Two names, so that a token that follows a redirect is a token given away.
    hub.url = f"http://127.0.0.1:{servers[0].server_address[1]}"
    hub.cdn_url = f"http://localhost:{servers[1].server_address[1]}"
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def with_hub(installation: Installation, hub: Hub, monkeypatch: pytest.MonkeyPatch, row: str) -> Installation:
    """Return an installation with an empty models folder, whose hub is the one on localhost, and no token.

    Args:
        row: what its settings say of the model that the hub has.
    """
    source = installation.config.source
    folder = installation.root / "models"
    source.write_text(re.sub("^models = .*$", f'models = "{folder}"', source.read_text(), flags=re.MULTILINE) + row)
    env = {name: value for name, value in installation.env.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(installation.root / "token"))
    config = settings.load(env)
    return replace(installation, env=env, config=config, models=models.load(config))
