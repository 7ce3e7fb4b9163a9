"""Drafts into jobs: matrix, templates, seeds and count multiplied out, pictures kept, every job checked.

Everything random derives from the submission's id: the same drafts under the same id, with the same wildcard files,
give the same jobs again. That is how a submission that was cut short is taken up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import TypeGuard

from safelight import controlnet, lora
from safelight.config import Config
from safelight.draft import Draft
from safelight.errors import Fault, InvalidJob
from safelight.faults import Faults
from safelight.ids import job_id
from safelight.jobspec import FIELDS, PROMPT_CHARACTERS_MAX, SEED_MAX, JobSpec, check
from safelight.lora import Lora
from safelight.models import Models
from safelight.sizes import KeptPicture, Size
from safelight.wildcards import Template, Wildcards

TEMPLATES = ("prompt", "prompt_2", "negative_prompt")
"""Fields that may hold choices and wildcards."""

PICTURES = ("image", "last_image")

_ANY_SEED = -1
_MISSING = KeptPicture("0" * 64, Size(1, 1))
"""Stands for a picture that could not be kept while the rest of its job is checked."""


def expand(
    drafts: Sequence[Draft],
    models: Models,
    config: Config,
    *,
    submission: str,
    now: datetime,
    batch: str,
    priority: str | None = None,
    store_image: Callable[[str], KeptPicture],
    keep_lora: Callable[[Lora], Lora] = lambda lora: lora,
    wildcards: Path,
    max_jobs: int,
) -> list[JobSpec]:
    """Return the jobs that `drafts` ask for, checked and numbered, in the order of the file.

    A draft runs through its matrix, then (expand: all) the texts of its templates, then its seeds, then its count:
    image i has seed + i. A seed that is absent or -1 is drawn once a draft, as if the number had been written there;
    likewise image i gets the same drawn words in every cell of a matrix, so that cells can be compared.

    Args:
        batch: the folder's, as `priority`; a draft's own win.
        store_image: keeps the picture of that name and returns what it is kept as, or raises InvalidJob.
        keep_lora: finds a LoRA by name, or keeps its file, and returns it with its digest, or raises InvalidJob. Left
            out, the host that runs the job looks.
        wildcards: the folder that `__name__` draws from.

    Raises:
        InvalidJob: every distinct fault, once.
    """
    faults = Faults("")
    wildcard_files = Wildcards(wildcards)
    ready = [
        _make_ready(draft, f"{submission}/{position}", position, wildcard_files, faults.at(draft.where, draft.places))
        for position, draft in enumerate(drafts, start=1)
    ]
    total = sum(each.jobs for each in ready)
    if total > max_jobs:
        first = drafts[0].where
        place = faults.at(first if len(drafts) == 1 else first.rsplit(":", 1)[0])
        place.add(f"it makes {total:,} jobs, and {max_jobs:,} are allowed at once", "Ask for fewer, or split the file.")
        raise _refused(faults)

    pictures, loras = _Pictures(store_image), _Loras(keep_lora)
    folder = {"batch": batch, "priority": priority}
    image_model, video_model = config.settings.defaults.image_model, config.settings.defaults.video_model
    submitted_at = (now if now.tzinfo else now.astimezone()).isoformat(timespec="seconds")
    specs: list[JobSpec] = []
    for each in ready:
        place = faults.at(each.draft.where, each.draft.places)
        for job in each.multiplied():
            own = {name: value for name, value in job.fields.items() if value is not None}
            kept, shape = pictures.kept(own, place)
            fields = {**folder, **loras.kept(kept, place)}
            spec = check(
                fields,
                models,
                place.where,
                image_model=image_model,
                video_model=video_model,
                picture=shape,
                places=each.draft.places,
            )
            if isinstance(spec, list):
                faults.found += spec
                continue
            index = len(specs) + 1
            numbered = {"id": job_id(submission, index), "index": index, "submitted_at": submitted_at}
            specs.append(spec.model_copy(update={**numbered, "template": job.template, "axes": job.axes}))
    if faults.found:
        raise _refused(faults)
    return specs


def _refused(faults: Faults) -> InvalidJob:
    return InvalidJob(list(dict.fromkeys(faults.found)))


@dataclass(frozen=True)
class _Job:
    """One job of a draft, not yet checked."""

    fields: dict[str, object]
    axes: dict[str, str | int | float]
    template: str | None


@dataclass(frozen=True)
class _Ready:
    """A draft with its templates compiled and its seeds drawn: what is left is to multiply."""

    draft: Draft
    matrix: dict[str, tuple[object, ...]]
    seeds: tuple[object, ...]
    """Of every cell; one where the matrix has an axis of seeds, which then counts instead."""
    count: int
    words: str
    """What the drawn words derive from."""
    templates: dict[str, Template]
    """By what was written; plain text has none."""

    @property
    def jobs(self) -> int:
        """How many jobs this makes, without making them; equal texts count each."""
        ways = {name: len(values) for name, values in self.matrix.items()}
        if self.draft.expand == "all":
            for name in TEMPLATES:
                values = self.matrix.get(name) or (self.draft.fields.get(name),)
                ways[name] = sum(self.templates[text].count if self._has_choices(text) else 1 for text in values)
        return prod(ways.values()) * len(self.seeds) * self.count

    def _has_choices(self, text: object) -> TypeGuard[str]:
        return isinstance(text, str) and text in self.templates

    def multiplied(self) -> Iterator[_Job]:
        for values in product(*self.matrix.values()):
            cell = dict(zip(self.matrix, values, strict=True))
            fields = {**self.draft.fields, **cell}
            axes = {name: _axis_value(name, value) for name, value in cell.items()}
            written = {name: text for name in TEMPLATES if self._has_choices(text := fields.get(name))}
            template = written.get("prompt")
            for words, seed in self._runs(written, (cell["seed"],) if "seed" in cell else self.seeds):
                changed = words.get("prompt") != template
                yield _Job({**fields, **words, "seed": seed}, axes, template if changed else None)

    def _runs(self, written: dict[str, str], seeds: Sequence[object]) -> Iterator[tuple[dict[str, str], object]]:
        """Yield the texts of the templates in `written`, and the seed, of each job of a cell."""
        numbers = [seed + i if isinstance(seed, int) else seed for seed in seeds for i in range(self.count)]
        if self.draft.expand == "all":
            pools = [dict.fromkeys(self.templates[text].every()) for text in written.values()]
            for texts in product(*pools):
                for number in numbers:
                    yield dict(zip(written, texts, strict=True)), number
            return
        for place, number in enumerate(numbers):
            origins = {name: f"{self.words}/{place}/{name}" for name in written}
            yield {name: self.templates[text].draw(_rng(origins[name])) for name, text in written.items()}, number


def _rng(origin: str) -> Random:
    return Random(origin)  # noqa: S311  repeatable on purpose; nothing is secret here


def _make_ready(draft: Draft, origin: str, position: int, wildcards: Wildcards, faults: Faults) -> _Ready:
    """Compile a draft's templates and draw its seeds; what is wrong with either goes to `faults`."""
    rng = _rng(f"{origin}/seed")
    count = draft.count
    if count < 1:
        faults.of("count").add(f"count {count} makes no job", "Write 1 or more.")
        count = 1
    matrix = dict(draft.matrix)
    for name in [name for name, values in matrix.items() if not values]:
        faults.of(name).add(f"the axis {name} has no values", "Write some, or leave it out.")
        del matrix[name]
    if "seed" in matrix:
        seeds = matrix["seed"] = _seeds(matrix["seed"], rng, count)
    else:
        seeds = _seeds(_listed(draft.fields.get("seed")), rng, count)
    if not seeds:
        faults.of("seed").add("the list of seeds is empty", "Write some, or leave it out.")
    if count > 1 and not all(isinstance(seed, int) and 0 <= seed <= SEED_MAX - count + 1 for seed in seeds):
        if beyond := [seed for seed in seeds if isinstance(seed, int) and seed <= SEED_MAX < seed + count - 1]:
            faults.of("seed", "count").add(
                f"seed {beyond[0]} with count {count} goes beyond {SEED_MAX}", "Lower one of them."
            )
        count = 1  # the rest is checked once
    own_seed = draft.wildcard_seed not in (None, _ANY_SEED)
    return _Ready(
        draft=draft,
        matrix=matrix,
        seeds=seeds[:1] if "seed" in matrix else seeds,
        count=count,
        words=f"{draft.wildcard_seed}/{position}" if own_seed else f"{origin}/words",
        templates=_templates(draft, wildcards, faults),
    )


def _listed(seed: object) -> Sequence[object]:
    if isinstance(seed, str):
        return re.split(r"\s*,\s*|\s+", seed.strip())
    if isinstance(seed, list | tuple):
        return seed
    return [_ANY_SEED if seed is None else seed]


def _seeds(written: Sequence[object], rng: Random, count: int) -> tuple[object, ...]:
    """Return the seeds as numbers, -1 replaced; one that is no number becomes text, for the check to refuse."""
    read, _ = FIELDS["seed"]
    seeds: list[object] = []
    for value in written:
        try:
            seed = read(value)
        except (ValueError, OverflowError):
            seeds.append(str(value))
        else:
            seeds.append(rng.randint(0, max(SEED_MAX - count + 1, 0)) if seed == _ANY_SEED else seed)
    return tuple(seeds)


def _templates(draft: Draft, wildcards: Wildcards, faults: Faults) -> dict[str, Template]:
    """Return the template of each text of the draft that is more than plain text."""
    templates: dict[str, Template] = {}
    for name in TEMPLATES:
        for text in (*draft.matrix.get(name, ()), draft.fields.get(name)):
            if not isinstance(text, str) or text in templates or len(text) > PROMPT_CHARACTERS_MAX:
                continue  # the check refuses what is no text, or too long
            try:
                template = wildcards.compile(text, faults.of(name).where)
            except InvalidJob as error:
                faults.found += error.faults
                continue
            if template.parts != (text,):
                templates[text] = template
    return templates


def _axis_value(name: str, value: object) -> str | int | float:
    """Return a value as a grid shows it: the number it means, or the text."""
    if name in FIELDS:
        try:
            read = FIELDS[name][0](value)
        except (ValueError, OverflowError):
            return str(value)  # the check refuses the job
        if isinstance(read, str | int | float):
            return read
    return str(value)


class _Pictures:
    """Keeps each picture once."""

    def __init__(self, store: Callable[[str], KeptPicture]) -> None:
        self._store = store
        self._known: dict[str, KeptPicture | tuple[Fault, ...]] = {}

    def kept(self, fields: dict[str, object], faults: Faults) -> tuple[dict[str, object], Size | None]:
        """Return the fields with digests for the names of pictures, and the size of the one that gives its shape.

        That is the one that the job animates or starts from, else the one that leads it.
        """
        named = {name: value for name in PICTURES if isinstance(value := fields.get(name), str | int | float)}
        found = {name: self._one(name, str(value), faults, name) for name, value in named.items()}
        kept = {**fields, **{name: picture.digest for name, picture in found.items()}}
        shaping = found.get("image")
        if leading := fields.get("controlnet"):
            with suppress(ValueError):  # the check says it
                read = controlnet.read(leading)
                picture = self._one("controlnet", read.image, faults, "controlnet image")
                kept["controlnet"] = read.model_copy(update={"image": picture.digest})
                shaping = shaping or picture
        return kept, shaping.size if shaping else None

    def _one(self, field: str, name: str, faults: Faults, described: str) -> KeptPicture:
        if name not in self._known:
            try:
                self._known[name] = self._store(name)
            except InvalidJob as error:
                self._known[name] = error.faults
        known = self._known[name]
        if isinstance(known, KeptPicture):
            return known
        for fault in known:
            faults.of(field).add(f"{described} {fault.where}: {fault.problem}", fault.remedy)
        return _MISSING


class _Loras:
    """Finds or keeps each LoRA once."""

    def __init__(self, keep: Callable[[Lora], Lora]) -> None:
        self._keep = keep
        self._known: dict[str, Lora | tuple[Fault, ...]] = {}

    def kept(self, fields: dict[str, object], faults: Faults) -> dict[str, object]:
        """Return the fields with every LoRA of the job in `loras`, those of the prompts included, which lose them."""
        texts: dict[str, object] = {}
        try:
            named = [(each, faults.of("loras")) for each in lora.read(fields.get("loras", ()))]
        except ValueError:
            return fields  # the check says it
        for name in TEMPLATES:
            text = fields.get(name)
            if not isinstance(text, str):
                continue
            try:
                texts[name], found = lora.take_tags(text)
            except ValueError as error:
                faults.of(name).add(f"{name}: {error}")
                continue
            if found and name == "negative_prompt":
                faults.of(name).add(f"{found[0].tag} stands in the negative prompt", "Move it into the prompt.")
            else:
                named += [(each, faults.of(name)) for each in found]
        if not named:
            return fields | texts
        return fields | texts | {"loras": tuple(self._one(each, place) for each, place in named)}

    def _one(self, named: Lora, faults: Faults) -> Lora:
        key = f"{named.name}\n{named.path}"
        if key not in self._known:
            try:
                self._known[key] = self._keep(named)
            except InvalidJob as error:
                self._known[key] = error.faults
        known = self._known[key]
        if isinstance(known, Lora):
            return known.model_copy(update={"scale": named.scale, "expert": named.expert})
        for fault in known:
            faults.add(f"{fault.where}: {fault.problem}", fault.remedy)
        return named
