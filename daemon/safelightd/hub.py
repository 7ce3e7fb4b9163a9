"""The hub that models are fetched from, through huggingface_hub: what a repository holds, and its bytes.

The only module that speaks to the network, and only `safelightd pull` imports it. The environment's HF_ENDPOINT,
HF_TOKEN and HF_HOME mean what they mean everywhere. huggingface_hub's own downloads start over after a kill, so that
the bytes are asked for here, by ranges.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from safelight import __version__
from safelight.errors import BadConfig, SafelightError
from safelight.published import Published
from safelight.pulled import WantedFile

TIMEOUT_S = 30.0
"""For an answer, and for the next bytes of one."""

CHUNK_BYTES = 2**20
"""Of a file that is read back."""

PASSING = (408, 429, 500, 502, 503, 504)
"""Answers that may be another the next time."""


class Unreachable(SafelightError):
    """The hub does not answer, or stopped in the middle."""


class NotOnHub(BadConfig):
    """The hub has no such repository, commit or file."""


class NoAccess(BadConfig):
    """The hub does not give the files to this person."""


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    commit: str
    gated: bool
    files: tuple[WantedFile, ...]


@dataclass(frozen=True)
class Body:
    """Bytes of a file as they arrive, from `start` on."""

    start: int
    chunks: Iterator[bytes]


class Hub:
    """The repository of one model or ControlNet.

    Every method raises Unreachable, NotOnHub or NoAccess, with what to do about it.
    """

    def __init__(self, what: Published, endpoint: str | None = None) -> None:
        self._what = what
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = get_token()
        self._headers = build_hf_headers(
            token=self._token or False, library_name="safelight", library_version=__version__
        )

    def listing(self) -> Listing:
        """Return every file of the pinned commit, else of the one that `main` is now."""
        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        try:
            with self._explained():
                info = api.model_info(
                    self._what.repository,
                    revision=self._what.revision or None,
                    files_metadata=True,
                    timeout=TIMEOUT_S,
                )
        except HFValidationError as error:
            raise NotOnHub(f"[{self._what.table}] repository: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise Unreachable(f"{self._endpoint}: its answer is not a hub's. Is HF_ENDPOINT right?") from error
        if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
            raise Unreachable(f"{self._endpoint}: its answer names no commit. Is HF_ENDPOINT right?")
        return Listing(info.sha, bool(info.gated), tuple(map(_file, info.siblings or ())))

    def check_access(self, commit: str, file: WantedFile) -> None:
        """Raise NoAccess where files are refused: a listing is given to everybody, the files of it may not be."""
        with self._explained():
            get_hf_file_metadata(self._url(commit, file), token=self._token or False, timeout=TIMEOUT_S)

    def read(self, commit: str, file: WantedFile) -> bytes:
        """Return a small file whole, its digest checked."""
        with self.body(commit, file, 0) as body:
            content = b"".join(body.chunks)
        if len(content) != file.size_bytes or digest_of(content, file.digest) != file.digest:
            raise Unreachable(f"{file.name}: its bytes are not those that {self._endpoint} lists. Run it again.")
        return content

    @contextmanager
    def body(self, commit: str, file: WantedFile, start: int) -> Iterator[Body]:
        """Have a file's bytes from `start` on, or from 0 where the server does not know ranges."""
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # httpx2 leaves the token behind where a redirect leads to another host.
        with (
            self._explained(),
            get_session().stream("GET", self._url(commit, file), headers=headers, timeout=TIMEOUT_S) as answer,
        ):
            hf_raise_for_status(answer)
            # As they arrive: gathered into larger chunks, those before a break would be lost.
            yield Body(start if answer.status_code == 206 else 0, answer.iter_bytes())

    def _url(self, commit: str, file: WantedFile) -> str:
        return hf_hub_url(self._what.repository, file.name, revision=commit, endpoint=self._endpoint)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except GatedRepoError:
            self._refuse()
        except RepositoryNotFoundError as error:
            said = "" if self._token else ", or it is private and you gave no token (HF_TOKEN)"
            raise NotOnHub(
                f"{self._what.repository}: {self._endpoint} has no such repository{said}. "
                f"Correct repository = in [{self._what.table}]."
            ) from error
        except RevisionNotFoundError as error:
            raise NotOnHub(
                f"{self._what.repository} has no commit {self._what.revision}. "
                f"Correct revision = in [{self._what.table}]."
            ) from error
        except HfHubHTTPError as error:
            self._explain(error)
        except httpx2.RequestError as error:
            problem = str(error) or type(error).__name__
            raise Unreachable(f"{self._endpoint}: no answer ({problem}). Is this machine online?") from error

    def _explain(self, error: HfHubHTTPError) -> NoReturn:
        status = error.response.status_code
        if status in PASSING:
            raise Unreachable(f"{self._endpoint}: answers {status}. Try later.") from error
        if status == 401:
            raise NoAccess(
                f"{self._endpoint} does not know your token, or it has expired. Make another at "
                f"{self._endpoint}/settings/tokens and put it into HF_TOKEN or {constants.HF_TOKEN_PATH}."
            ) from error
        if status == 404:
            path = error.response.request.url.path
            raise NotOnHub(f"{self._what.repository}: {path} is not there. Run it again: it may be new.") from error
        raise SafelightError(f"{self._endpoint}: answers {status}. {error.server_message or ''}".rstrip()) from error

    def _refuse(self) -> NoReturn:
        """Raise what a person has to do before the authors let them have the files."""
        page = f"{self._endpoint}/{self._what.repository}"
        lines = [
            f"{self._what.repository} is gated: its authors give it to those who accept its licence "
            f"({self._what.licence})."
        ]
        if self._token:
            lines += [
                "The token that was sent may not read it.",
                f"  1. Log in with its account and accept at {page}; some authors answer later.",
                f"  2. Let a fine-grained token read gated repositories, too: {self._endpoint}/settings/tokens",
            ]
        else:
            lines += [
                f"  1. Log in and accept at {page}",
                f"  2. Make a token that may read at {self._endpoint}/settings/tokens",
                f"  3. Put it into HF_TOKEN, or into {constants.HF_TOKEN_PATH} (hf auth login)",
            ]
        lines.append(f"Then: {self._what.command}")
        raise NoAccess("\n".join(lines)) from None


def _file(sibling: RepoSibling) -> WantedFile:
    digest = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"blob:{sibling.blob_id}"
    size = sibling.lfs.size if sibling.lfs else sibling.size
    return WantedFile(name=sibling.rfilename, size_bytes=size or 0, digest=digest)


def digest_of(content: bytes, like: str) -> str:
    """Return the digest of some bytes, of the kind that `like` is."""
    if like.startswith("sha256:"):
        return f"sha256:{hashlib.sha256(content).hexdigest()}"
    return f"blob:{blob(len(content), content).hexdigest()}"


def blob(size: int, content: bytes = b"") -> hashlib._Hash:
    """Return git's hash of a file of so many bytes, begun with `content`: what names a file that git keeps itself."""
    return hashlib.sha1(b"blob %d\0" % size + content, usedforsecurity=False)
