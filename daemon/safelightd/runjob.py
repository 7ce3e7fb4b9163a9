"""The whole job on one page: read this first."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image

from safelight import pictures
from safelight.begun import Begun
from safelight.config import Config
from safelight.errors import SafelightError
from safelight.fused import seen
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.machine import GIB, Machine
from safelight.models import Models
from safelight.plan import Overrun, Plan
from safelight.planner import NO_CIRCUMSTANCES, with_known_embeddings
from safelight.receipt import CacheRecord, Output, Receipt
from safelight.rung import Circumstances
from safelightd import (
    attention,
    calibration,
    checkpoint,
    compiling,
    device,
    embeddings,
    fused,
    lora,
    metadata,
    outputs,
    pipelines,
    preview,
    probe,
    room,
    verify,
)
from safelightd.loading import Loader
from safelightd.modelfolder import controlnet_folder, model_folder
from safelightd.pinnedset import PinnedSet
from safelightd.progress import Watch


@dataclass(frozen=True)
class Setting:
    """What is the same for all jobs of an engine."""

    config: Config
    models: Models
    ledger: Ledger
    pinned: PinnedSet
    """What stays in RAM from one job to the next."""
    embeddings: embeddings.Cache


def run_job(
    spec: JobSpec, attempt: int, setting: Setting, watch: Watch, circumstances: Circumstances = NO_CIRCUMSTANCES
) -> Receipt:
    """Return the receipt of `spec`, planned again where a kept result that the plan counted on is damaged or gone.

    Raises:
        Cancelled: it was asked to stop; no file is left.
        NoRoom: other programs have the memory that it needs.
        SafelightError: the job's own fault, said for a person.
    """
    with suppress(fused.Damaged):  # said in the log; only outside of this block is the memory of its frames free
        return _run_job(spec, attempt, setting, watch, circumstances)
    device.release()
    watch.forwards = watch.skipped = 0
    return _run_job(spec, attempt, setting, watch, dataclasses.replace(circumstances, without_fused=True))


def _run_job(spec: JobSpec, attempt: int, setting: Setting, watch: Watch, circumstances: Circumstances) -> Receipt:
    """Return the receipt of `spec`: its file verified, synced and published, the receipt in the ledger.

    Encode, denoise and decode have the device to themselves, one after another: the peak is the largest of the three.

    Raises:
        Cancelled: it was asked to stop; no file is left.
        SafelightError: the job's own fault, said for a person.
    """
    paths, ledger = setting.config.paths, setting.ledger
    if receipt := outputs.finish(spec.id, ledger, paths):
        return receipt  # rendered by an attempt that died before it could say so
    outputs.discard(spec.id, paths)
    started_at, versions = moment(), metadata.versions()

    with watch.phase("plan"):
        machine = probe.read_machine(setting.config, device.own())
        around = now(circumstances, setting, spec.model, checkpoint.begun(paths.checkpoints / spec.id, versions))
        spec = lora.resolved(spec, paths)
        learned = calibration.load(paths.state)
        plan = watch.plan = room.plan_here(spec, machine, setting.config, setting.models, learned, around)
    with watch.phase("load"):
        facts = setting.models[spec.model]
        family, folder = pipelines.family(facts.family), model_folder(facts, paths.models)
        plan = watch.plan = attention.planned(plan, spec, facts, setting.config, machine.gpu)
        results = fused.results(spec, plan, setting.config, setting.models, machine.gpu)
        loader = Loader(
            folder,
            plan,
            facts.component_paths,
            blocks=facts.blocks,
            models_folder=paths.models,
            pinned=setting.pinned,
            loras=lora.files(spec, paths),
            fused=results,
            controlnet=controlnet_folder(facts, spec.controlnet.model, paths.models) if spec.controlnet else None,
        )
        keys = embeddings.keys(
            spec, plan, facts, paths.models, machine.gpu,
            is_guided=family.is_guided(spec), changed=loader.changes_text_encoders,
        )  # fmt: skip
        known = setting.embeddings.get(keys)
        if keys.are_all_in(known):
            plan = watch.plan = with_known_embeddings(plan, facts)
        stored = loader.stored_precisions()
        made_by = checkpoint.digest(spec, plan, loader.weights(), versions)
        watch.preview = preview.Preview(paths, spec.id, loader.vae_key())
        watch.preview.begin(plan.seconds, lambda pictures: family.encoded_pictures(pictures, plan, loader, watch))
        settings = setting.config.settings
        kept = checkpoint.Checkpoint(
            paths.checkpoints / spec.id,
            made_by,
            settings.worker.checkpoint_s,
            leave_bytes=int(settings.policy.min_free_disk_gib * GIB),
            plan=plan,
            versions=versions,
        )
        control = spec.controlnet.image if spec.controlnet else None
        image, last_image, control_image = (
            input_picture(digest, paths.inputs) for digest in (spec.image, spec.last_image, control)
        )
    with watch.phase("encode"):
        embeds = family.encode(spec, plan, loader, watch, image, known)
        setting.embeddings.put(keys, embeds)
    with watch.phase("denoise"):
        latents = family.denoise(spec, plan, loader, embeds, watch, image, last_image, kept, control_image)
    if plan.compiled:
        compiling.remember(f"{facts.family}/{plan.precision}")
    with watch.phase("decode"):
        frames = family.decode(spec, plan, loader, latents, watch)
        frames = watch.preview.learning(frames, pipelines.values(family.first_frame(spec, latents)))
        file = outputs.write(spec, plan, frames, setting.config, watch.check)
    with watch.phase("verify"), outputs.explained(paths):
        verify.output(file, spec)
    with watch.phase("publish"):
        device.release()
        results.note_use()
        receipt_of = receipt_of_done(spec, plan, machine, attempt, started_at, watch, versions, around.overruns, stored)
        return outputs.publish(receipt_of, file, spec, ledger, paths)


def now(circumstances: Circumstances, setting: Setting, model: str, begun: Begun | None = None) -> Circumstances:
    """Return what the worker told, and what this process knows besides."""
    return dataclasses.replace(
        circumstances,
        begun=begun,
        compiled_here=compiling.compiled_here(),
        compiled_before=compiling.compiled_before(),
        pinned=setting.pinned.held,
        seen=seen(setting.config.paths.models, model),
    )


def receipt_of_done(
    spec: JobSpec,
    plan: Plan,
    machine: Machine,
    attempt: int,
    started_at: str,
    watch: Watch,
    versions: Mapping[str, str],
    overruns: tuple[Overrun, ...] = (),
    stored: Mapping[str, str] | None = None,
) -> Callable[[tuple[Output, ...]], Receipt]:
    """Return what makes the receipt once the output has its name."""
    return lambda published: Receipt(
        id=spec.id,
        state="done",
        spec=spec,
        plan=plan,
        outputs=published,
        attempts=attempt,
        overruns=overruns,
        started_at=started_at,
        finished_at=moment(),
        resumed_after_step=watch.resumed_after_step,
        began_anew=watch.began_anew,
        cache=cache_record(spec, watch),
        phases=dict(watch.records),
        seconds_per_step=watch.seconds_per_step,
        device_bytes_after=device.held_bytes(),
        machine=machine,
        versions=dict(versions),
        stored=dict(stored or {}),
    )


def cache_record(spec: JobSpec, watch: Watch) -> CacheRecord | None:
    """Return how often the job's cache answered; None where it has none."""
    if spec.cache is None:
        return None
    return CacheRecord(kind=spec.cache.kind, forwards=watch.forwards, skipped=watch.skipped)


def input_picture(digest: str | None, inputs: Path) -> Image.Image | None:
    """Return the input picture of this digest, read back whole.

    Raises:
        SafelightError: it is gone, or is no longer what was submitted.
    """
    if digest is None:
        return None
    file = inputs / digest
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise SafelightError(f"The input picture {file} is gone. Submit the job again with the picture.") from None
    if hashlib.sha256(content).hexdigest() != digest:
        raise SafelightError(f"The input picture {file} has changed since it was submitted. Submit the job again.")
    with Image.open(io.BytesIO(content)) as picture:
        return pictures.rgb(picture)


def moment() -> str:
    """Return now, as receipts say it."""
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
