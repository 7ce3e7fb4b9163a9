"""`plan`: what a job would take on a machine, in memory and time. Needs no GPU, no torch and no running daemon."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from safelight.commands.client import Client, pass_client
from safelight.commands.options import JOB_OPTIONS_CONTEXT, SWEEP, JobCommand, drafts_of, job_options

if TYPE_CHECKING:
    from safelight.calibration import Calibration
    from safelight.jobqueue import WorkerRow
    from safelight.jobspec import JobSpec
    from safelight.machine import Machine
    from safelight.submit import Forecast

ASSUMED_VRAM_GIB, ASSUMED_VRAM_FREE_GIB = 16, 15
ASSUMED_RAM_GIB, ASSUMED_RAM_FREE_GIB = 32, 24
"""The machine safelight is made for, with a desktop that takes its share of it."""


@dataclass(frozen=True)
class Ground:
    """What a forecast stands on."""

    machine: Machine
    source: str
    calibration: Calibration
    told: bool = False
    """A worker has published the machine: what does not fit it is refused at submission, too."""


@click.command(cls=JobCommand, context_settings=JOB_OPTIONS_CONTEXT)
@click.argument("targets", metavar="[FILE|PROMPT]...", nargs=-1)
@click.option("-p", "--prompt", "prompts", metavar="PROMPT", multiple=True, help="A prompt, also of a single word.")
@job_options
@SWEEP
@click.option("--vram", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="GPU memory that is free.")
@click.option("--ram", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="RAM that is available.")
@click.option("--capability", metavar="N.N", help="The GPU's compute capability, such as 8.6.")
@click.option("--json", "as_json", is_flag=True, help="One object.")
@pass_client
@click.pass_context
def plan(
    ctx: click.Context, client: Client, /, targets: tuple[str, ...], prompts: tuple[str, ...], sweeps: tuple[str, ...],
    vram: float | None, ram: float | None, capability: str | None, *, as_json: bool,
    **written: str | tuple[str, ...] | None,
) -> None:  # fmt: skip
    """Say what jobs would take, and whether they fit.

    \b
        safelight plan prompts.yaml
        safelight plan "a red fox" --model flux-dev --size 1536x1024
        safelight plan night.txt --vram 8 --ram 16 --capability 8.6

    Queues nothing; needs no GPU and no running daemon. The machine is the one that a running worker has published,
    else an assumed one with a 16 GB GPU and 32 GB of RAM: the first line says which. --vram, --ram and --capability
    describe another. Exit code 2 when something fits nowhere.
    """
    from safelight import submit
    from safelight.commands.adding import lacking
    from safelight.errors import InvalidJob

    ground = ground_of(client, vram=vram, ram=ram, capability=capability)
    specs = _specs(client, targets, prompts, written, sweeps)
    found = submit.forecast(specs, ground.machine, client.models, ground.calibration)
    show(ground, found, as_json=as_json, notes=lacking(client, specs))
    ctx.exit(0 if all(shape.plan for shape in found) else InvalidJob.exit_code)


def _specs(
    client: Client, targets: tuple[str, ...], prompts: tuple[str, ...],
    written: dict[str, str | tuple[str, ...] | None], sweeps: tuple[str, ...],
) -> list[JobSpec]:  # fmt: skip
    from safelight.commands.adding import Source, expand_all, sources_of_files

    files = [Path(target).expanduser() for target in targets if Path(target).expanduser().is_file()]
    texts = [target for target in targets if not Path(target).expanduser().is_file()]
    for text in texts:
        if not text.strip().count(" "):
            raise click.UsageError(f"There is no file {text!r}. If it is a prompt of one word: --prompt {text}")
    if not targets and not prompts:
        raise click.UsageError("Name prompt files, or write a prompt.")
    sources = sources_of_files(files, {}, sweeps)
    if texts or prompts:
        sources.append(Source(drafts_of((*texts, *prompts), written, sweeps), Path.cwd(), "single", trusted=True))
    elif given := [name for name, value in written.items() if value is not None]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} describes a prompt; a file says it itself.")
    submissions = expand_all(client, sources, keep_images=False)
    return [spec for specs in submissions.values() for spec in specs]


def ground_of(
    client: Client, *, vram: float | None = None, ram: float | None = None, capability: str | None = None
) -> Ground:
    """Return the machine to plan for, and how it is known."""
    from safelight.calibration import NOTHING_LEARNED
    from safelight.errors import QueueUnreachable
    from safelight.machine import GIB, Machine

    machine, source = _assumed(client.config.settings.worker.device), "assumed, since no worker has told of its own"
    calibration = NOTHING_LEARNED
    told: list[WorkerRow] = []
    try:
        with client.queue(retries=0) as queue:
            calibration = queue.calibration()
            told = [worker for worker in queue.workers() if worker.machine]
    except QueueUnreachable:
        pass  # planning needs no daemon: the assumed machine stands, and the first line says so
    if told and told[0].machine:
        machine, source = told[0].machine, f"of the worker {told[0].name}"
    changes: dict[str, Any] = {}
    if vram is not None or capability is not None:
        changes |= {"device": "cuda", "gpu": "a GPU as written", "uuid": "", "driver": "", "multiprocessors": 0}
    if vram is not None:
        changes |= {"vram_total_bytes": int(vram * GIB), "vram_free_bytes": int(vram * GIB)}
    if ram is not None:
        changes |= {"ram_total_bytes": int(ram * GIB), "ram_available_bytes": int(ram * GIB)}
    if capability is not None:
        changes["capability"] = _capability(capability)
    if changes.get("device") == "cuda" and machine.device == "cpu":
        machine = _assumed("cuda").model_copy(
            update={name: getattr(machine, name) for name in ("ram_total_bytes", "ram_available_bytes", "cpus")}
        )
    if changes:
        source = f"as written, the rest {source}"
        calibration = NOTHING_LEARNED  # measured on another machine
    machine = Machine.model_validate({**machine.model_dump(), **changes})
    return Ground(machine, source, calibration, told=bool(told) and not changes)


def _capability(written: str) -> tuple[int, int]:
    major, dot, minor = written.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise click.UsageError(f"--capability {written!r} is not a compute capability. Write it as 8.6.")
    return int(major), int(minor)


def _assumed(device: Literal["cuda", "cpu"]) -> Machine:
    from safelight.machine import GIB, Machine

    ram_total, ram_available = ASSUMED_RAM_GIB * GIB, ASSUMED_RAM_FREE_GIB * GIB
    if device == "cpu":
        return Machine(device="cpu", ram_total_bytes=ram_total, ram_available_bytes=ram_available, cpus=8)
    return Machine(
        device="cuda",
        gpu=f"a {ASSUMED_VRAM_GIB} GB GPU",
        capability=(8, 9),
        vram_total_bytes=ASSUMED_VRAM_GIB * GIB,
        vram_free_bytes=ASSUMED_VRAM_FREE_GIB * GIB,
        ram_total_bytes=ram_total,
        ram_available_bytes=ram_available,
        cpus=8,
        compiler=True,
    )


def show(ground: Ground, found: list[Forecast], *, as_json: bool, notes: Sequence[str] = ()) -> None:
    """Print a forecast, and on stderr the notes."""
    if as_json:
        click.echo(json.dumps(_as_object(ground, found), ensure_ascii=False, indent=2))
    else:
        _print(ground, found)
    for note in notes:
        click.echo(note, err=True)


def _as_object(ground: Ground, found: list[Forecast]) -> dict[str, Any]:
    """Return a forecast as JSON has it."""
    return {
        "machine": ground.machine.model_dump(mode="json"),
        "machine_source": ground.source,
        "jobs": sum(shape.jobs for shape in found),
        "seconds": _seconds(found),
        "shapes": [
            {
                "jobs": shape.jobs,
                **shape.spec.model_dump(mode="json", include={*SHAPE_FIELDS}),
                "fits": shape.plan is not None,
                "faults": [str(fault) for fault in shape.faults],
                "plan": shape.plan.model_dump(mode="json") if shape.plan else None,
            }
            for shape in found
        ],
    }


SHAPE_FIELDS = ("model", "kind", "width", "height", "num_frames", "num_inference_steps")


def _seconds(found: list[Forecast]) -> float | None:
    """Return the time of all jobs, None as soon as one of them has no estimate."""
    known = [seconds for shape in found if shape.plan and (seconds := shape.plan.seconds_of(shape.jobs)) is not None]
    return round(sum(known), 1) if len(known) == len(found) else None


def _print(ground: Ground, found: list[Forecast]) -> None:
    from safelight import display

    machine = ground.machine
    device = f"{machine.gpu}, {display.gib(machine.vram_free_bytes)} free; " if machine.device == "cuda" else "CPU; "
    click.echo(f"Machine: {device}{display.gib(machine.ram_available_bytes)} of RAM available ({ground.source})")
    for shape in found:
        _print_shape(shape)
    jobs, seconds = sum(shape.jobs for shape in found), _seconds(found)
    total = f"about {display.duration(seconds)}" if seconds is not None else "time unknown"
    click.echo(f"\n{'1 job' if jobs == 1 else f'{jobs} jobs'}, {total}.")


def _print_shape(shape: Forecast) -> None:
    from safelight import display

    spec = shape.spec
    frames = f", {spec.num_frames} frames" if spec.num_frames else ""
    size = f"{spec.width}x{spec.height}{frames}, {spec.num_inference_steps} steps"
    click.echo(f"\n{spec.model} {size}: {'1 job' if shape.jobs == 1 else f'{shape.jobs} jobs'}")
    if shape.plan is None:
        for fault in shape.faults:
            click.echo(f"  does not fit: {fault}")
        return
    chosen = shape.plan
    click.echo(f"  {chosen.rung}")
    for phase, peak in chosen.predicted.items():
        took = f", {display.duration(peak.seconds)}" if peak.seconds is not None else ""
        on_gpu = f"{display.gib(peak.device_bytes)} of GPU memory, " if chosen.device == "cuda" else ""
        click.echo(f"  {phase:<8} {on_gpu}{display.gib(peak.host_bytes)} of RAM{took}")
    time = display.duration(chosen.seconds) if chosen.seconds is not None else "unknown: none has run here yet"
    click.echo(f"  time     {time}")
    for warning in chosen.warnings:
        click.echo(f"  slow: {warning}")
    for reason in chosen.passed_over:
        click.echo(f"  not {reason}")
