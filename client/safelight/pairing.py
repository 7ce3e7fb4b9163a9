"""Texts and pictures in the inbox: which picture a text means, where it lies, and whether jobs have it already.

`foo.png` beside `foo.txt` is the image of every job of that text that names none. Any text may name pictures beside
it or in the folder of its batch. Pictures stay where they are until no text needs them: jobs work with copies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from safelight import controlnet, inputs
from safelight.draft import Draft
from safelight.drops import place_of, stem_of
from safelight.errors import Fault, InvalidJob
from safelight.paths import Paths
from safelight.sizes import KeptPicture


def pictures_named(drafts: Iterable[Draft]) -> set[str]:
    """Return the pictures that drafts name, as written."""
    named: set[str] = set()
    for draft in drafts:
        for field in ("image", "last_image"):
            named.update(str(value) for value in (draft.fields.get(field), *draft.matrix.get(field, ())) if value)
        named |= _leading(draft)
    return named


def _leading(draft: Draft) -> set[str]:
    """Return the pictures that ControlNets read, as written."""
    named = set()
    for value in (draft.fields.get("controlnet"), *draft.matrix.get("controlnet", ())):
        with suppress(ValueError):  # refused when the draft is expanded
            named.add(controlnet.read(value).image)
    return named


def names_image(draft: Draft) -> bool:
    return bool(draft.fields.get("image")) or "image" in draft.matrix


def paired(text: str, suffixes: Sequence[str], drafts: Sequence[Draft]) -> Sequence[Draft]:
    """Return the drafts of the text at path `text`, with the picture of its name as image of each that names none.

    One that a ControlNet reads is not started from, too.

    Args:
        suffixes: of the pictures of its name.

    Raises:
        InvalidJob: there are several.
    """
    stem = stem_of(text).rpartition("/")[2]
    names = [stem + suffix for suffix in suffixes]
    if len(names) > 1:
        remedy = "Keep one of them, or name it in the text: image: NAME."
        raise InvalidJob([Fault(text, f"{' and '.join(names)} both have its name", remedy)])
    if not names:
        return drafts
    return [
        draft
        if names_image(draft) or names[0] in _leading(draft)
        else replace(draft, fields={**draft.fields, "image": names[0]})
        for draft in drafts
    ]


def picture_paths(text: str, name: str) -> list[str]:
    """Return where in the inbox the picture `name` of the text at path `text` may lie, the likelier first.

    Beside the text, else in the folder of its batch; [] for a name that leads elsewhere and is refused in the end.
    """
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return []
    return [os.path.normpath(f"{folder}/{name}" if folder else name) for folder in _bases(text)]


def _bases(text: str) -> list[str]:
    """Return the folders that the pictures of a text are looked for in, in that order."""
    return list(dict.fromkeys((text.rpartition("/")[0], place_of(text).area)))


def find_picture(paths: Paths, text: str, name: str) -> str:
    """Return where in the inbox the picture `name` of a text lies: a plain file, reached by no link.

    Raises:
        InvalidJob: it leads elsewhere, or is not there.
    """
    beside, *others = _bases(text)
    try:
        return str(inputs.resolve(name, paths.inbox / beside).relative_to(paths.inbox))
    except InvalidJob:
        for folder in others:
            return str(inputs.resolve(name, paths.inbox / folder).relative_to(paths.inbox))
        raise


def store_picture(paths: Paths, path: str) -> KeptPicture:
    """Copy a picture of the inbox to the inputs and return it; the copy's mtime says when it was last used.

    Raises:
        InvalidJob: it is no picture that can be used.
        OSError: it cannot be read, or the copy not be written.
    """
    kept = inputs.store(paths.inbox / path, paths.inputs)
    os.utime(paths.inputs / kept.digest)
    return kept


def was_used(paths: Paths, path: str) -> bool:
    """Whether a picture in the inbox has gone into a job since it came, as its copy among the inputs tells.

    One that is larger than any input is not read: 40 GB called .png kept all texts waiting for 41 s (2026-11-26).

    Raises:
        OSError: it cannot be read.
    """
    with (paths.inbox / path).open("rb") as picture:
        status = os.fstat(picture.fileno())
        if status.st_size > inputs.SIZE_BYTES_MAX:
            return False
        digest = hashlib.file_digest(picture, "sha256").hexdigest()
    try:
        return (paths.inputs / digest).stat().st_mtime_ns >= status.st_ctime_ns
    except FileNotFoundError:
        return False
