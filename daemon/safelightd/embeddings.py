"""Prompt embeddings on disk: a prompt that was encoded before is not encoded again.

A night of jobs shares its prompts, and all clips of a model share their negative prompt. Knows no text encoder: what a
family's `encode` returns is stored field by field. Imports torch: the engine only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from safelight import durable, models, prepared
from safelight.jobspec import JobSpec
from safelight.models import ModelFacts
from safelight.plan import Plan
from safelightd import metadata
from safelightd.logs import Log

VERSION = 1
"""Of what a file holds and of what its name is made of."""

DIGEST = "sha256"
"""The tensor that holds the others' digest."""

NEGATIVE = "negative_"
"""Begins the names of the fields that are made of the negative prompt."""

IDENTITY_BYTES = 2**20
"""Of each of a component's files, its first: a safetensors file's header is there, and most other files whole. All of
9.5 GB of text encoder would take 9 s (1.0 GB/s of SHA-256, 2026-11-23)."""

LEFT_OVER_S = 3600.0
"""An unfinished file of that age is nobody's any more."""

log = Log("safelight.embeddings")


@dataclass(frozen=True)
class Keys:
    """By which names a job's embeddings are known. Texts are known one by one, so that jobs share what they share."""

    prompt: str
    negative: str | None
    """None where the job is not guided away from anything."""

    def are_all_in(self, known: Mapping[str, torch.Tensor]) -> bool:
        """Whether nothing of the job is left to be encoded."""
        prompt = any(not name.startswith(NEGATIVE) for name in known)
        return prompt and (self.negative is None or any(name.startswith(NEGATIVE) for name in known))


def keys(
    spec: JobSpec,
    plan: Plan,
    facts: ModelFacts,
    models_folder: Path,
    gpu: str,
    *,
    is_guided: bool,
    changed: bool = False,
) -> Keys:
    """Return the names of a job's embeddings: of all that decides their bits, and of nothing else.

    Those are the texts, the files of text encoders and tokenizers, what the plan says of encoding, the GPU's name and
    the libraries. Which blocks are streamed changes no bit.

    Args:
        gpu: the card's name, "" where there is none.
        changed: a LoRA is added to a text encoder's weights.
        is_guided: as the family's `is_guided` says; the negative prompt is not encoded otherwise.
    """
    common: dict[str, Any] = {
        "v": VERSION,
        "family": facts.family,
        "components": _identities(plan, facts, models_folder),
        "max_sequence_length": spec.max_sequence_length,
        "dtype": plan.dtype,
        "text_encoder_precision": plan.text_encoder_precision,
        "device": gpu if plan.text_encoder_device == "cuda" else plan.text_encoder_device,
        "versions": metadata.versions(),
    }
    if changed:
        common["loras"] = [[lora.sha256, lora.scale] for lora in spec.loras]
    negative = _digest(common | {"texts": [spec.negative_prompt, None]}) if is_guided else None
    return Keys(_digest(common | {"texts": [spec.prompt, spec.prompt_2]}), negative)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identities(plan: Plan, facts: ModelFacts, models_folder: Path) -> dict[str, str]:
    """Return what tells the files of text encoders and tokenizers from others, by component."""
    encoders = [name for name in facts.components if name.startswith("text_encoder")]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    folders = {name: prepared.component_folder(facts, models_folder, name) for name in (*encoders, *tokenizers)}
    if precision := plan.text_encoder_precision:
        made = [name for name in plan.prepared if name in encoders]
        folders |= {name: prepared.folder(models_folder, plan.model, precision, name) for name in made}
    index = models.folder(facts, models_folder) / "model_index.json"  # names the components' classes
    return {"index": _file_identity(index)} | {name: _identity(folder) for name, folder in sorted(folders.items())}


def _identity(folder: Path) -> str:
    """Return a digest of a folder's files: their names, sizes, times and first bytes; of their manifest where there is
    one, which has the digests of all bytes."""
    manifest = folder / prepared.MANIFEST
    if manifest.is_file():
        return _file_identity(manifest)
    files = sorted(file for file in folder.glob("*") if file.is_file())
    return _digest([[file.name, _file_identity(file)] for file in files])


def _file_identity(file: Path) -> str:
    """Return a digest of a file's size, time and first bytes; "" where it is missing, which the loader will say."""
    try:
        with file.open("rb") as stream:
            at = os.fstat(stream.fileno())
            begin = hashlib.sha256(stream.read(IDENTITY_BYTES)).hexdigest()
    except FileNotFoundError:
        return ""
    return f"{at.st_size} {at.st_mtime_ns} {begin}"


class Cache:
    """Embeddings of earlier jobs, the least recently used removed above a limit. 0 keeps nothing.

    Never a reason for a job to fail: what cannot be read is encoded anew, what cannot be written is not kept, and both
    are said in the log.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def get(self, keys: Keys) -> dict[str, torch.Tensor]:
        """Return what is known of a job's embeddings, by field: all, one text's, or nothing."""
        known = self._read(keys.prompt)
        if keys.negative:
            known |= {NEGATIVE + name: tensor for name, tensor in self._read(keys.negative).items()}
        return known

    def put(self, keys: Keys, embeddings: Any) -> None:
        """Keep a job's embeddings: the tensors of a dataclass, those of the negative prompt named so."""
        fields = {field.name: getattr(embeddings, field.name) for field in dataclasses.fields(embeddings)}
        tensors = {name: value for name, value in fields.items() if value is not None}
        negative = {name.removeprefix(NEGATIVE): t for name, t in tensors.items() if name.startswith(NEGATIVE)}
        self._write(keys.prompt, {name: t for name, t in tensors.items() if not name.startswith(NEGATIVE)})
        if keys.negative:
            self._write(keys.negative, negative)
        self._trim()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, torch.Tensor]:
        if not self._limit_bytes:
            return {}
        file = self._file(key)
        try:
            # Cloned: in the file's bytes they lie anywhere, and BLAS rounds by where a tensor begins.
            tensors = {name: tensor.clone() for name, tensor in load(file.read_bytes()).items()}
            if tensors.pop(DIGEST).numpy().tobytes() != _digest_of(tensors):
                raise ValueError("its bytes are not those that were written")
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning("embeddings.damaged", file=file, error=error)
            _remove(file)
            return {}
        with suppress(OSError):  # on a disk that became read-only the order of removal matters no more
            os.utime(file)
        return tensors

    def _write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        file = self._file(key)
        if file.exists() or sum(tensor.nbytes for tensor in tensors.values()) > self._limit_bytes:
            return
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        digest = torch.frombuffer(bytearray(_digest_of(own)), dtype=torch.uint8)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            durable.write(file, save({**own, DIGEST: digest}))
        except OSError as error:
            log.warning("embeddings.not_kept", file=file, error=error)

    def _trim(self) -> None:
        """Remove what is above the limit, the least recently used first, and what a dead process left unfinished."""
        try:
            found = [(entry.stat(), Path(entry.path)) for entry in os.scandir(self._folder) if entry.is_file()]
        except FileNotFoundError:
            return  # nothing was ever kept, or another worker trims: the next job's turn
        except OSError as error:
            log.warning("embeddings.not_trimmed", folder=self._folder, error=error)
            return
        left_over = {path for at, path in found if path.suffix == ".part" and time.time() - at.st_mtime > LEFT_OVER_S}
        kept = sorted(((at, path) for at, path in found if path.suffix == ".safetensors"), key=_age)
        above = sum(at.st_size for at, _ in kept) - self._limit_bytes
        for path in left_over:
            _remove(path)
        for at, path in kept:
            if above <= 0:
                return
            _remove(path)
            above -= at.st_size


def _age(found: tuple[os.stat_result, Path]) -> int:
    return found[0].st_mtime_ns


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("embeddings.not_removed", file=file, error=error)


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the digest of tensors with their names, shapes and types: a cut or flipped bit is not encoded text."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.digest()
