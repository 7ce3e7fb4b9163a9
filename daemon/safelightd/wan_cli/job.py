"""The whole job of the back end wan-cli on one page, as safelightd.runjob has that of diffusers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from PIL import ImageOps

from safelight import __version__, wan_cli
from safelight.jobspec import JobSpec
from safelight.plan import Plan
from safelight.planner import NO_CIRCUMSTANCES
from safelight.receipt import Receipt
from safelight.rung import Circumstances
from safelight.wan_cli import Installed
from safelightd import calibration, device, formats, outputs, probe, room, runjob, verify, video
from safelightd.failure import MACHINE_ERRNOS
from safelightd.progress import Watch
from safelightd.runjob import Setting
from safelightd.wan_cli.command import command, environment
from safelightd.wan_cli.program import Program, ProgramFailed, at_work
from safelightd.wan_cli.transcript import STAGES

GIT_TIMEOUT_S = 30.0


def run_job(
    spec: JobSpec, attempt: int, setting: Setting, watch: Watch, circumstances: Circumstances = NO_CIRCUMSTANCES
) -> Receipt:
    """Return the receipt of `spec`, rendered by Wan's own program: verified, synced and published like any other.

    Raises:
        Cancelled: it was asked to stop; no process and no file is left.
        NoRoom: other programs have the memory that it needs.
        SafelightError: the job's own fault, or the program's, in its last words.
        ProgramBroke: perhaps the GPU's.
    """
    paths, ledger = setting.config.paths, setting.ledger
    if receipt := outputs.finish(spec.id, ledger, paths):
        return receipt  # rendered by an attempt that died before it could say so
    outputs.discard(spec.id, paths)
    started_at = runjob.moment()

    with watch.phase("plan"):
        setting.pinned.drop_unless([])  # what the jobs of this process keep in RAM is wanted elsewhere now
        device.release()
        machine = probe.read_machine(setting.config)
        learned = calibration.load(paths.state)
        plan = watch.plan = room.plan_here(spec, machine, setting.config, setting.models, learned, circumstances)
        where = wan_cli.installed(setting.models[spec.model], setting.config)
    folder = outputs.make_room(spec, paths)
    try:
        file = _rendered(spec, plan, where, setting, watch, folder)
        with watch.phase("verify"), outputs.explained(paths):
            verify.output(file, spec)
        with watch.phase("publish"):
            versions = {"safelight": __version__, "wan-cli": version(where.checkout)}
            receipt_of = runjob.receipt_of_done(spec, plan, machine, attempt, started_at, watch, versions)
            return outputs.publish(receipt_of, file, spec, ledger, paths)
    except BaseException:
        outputs.discard(spec.id, paths)
        raise


def _rendered(spec: JobSpec, plan: Plan, where: Installed, setting: Setting, watch: Watch, folder: Path) -> Path:
    """Return the output in the job's own format, made of the clip that the program writes."""
    program = setting.models[spec.model].wan_cli
    assert program is not None  # else it could not have been planned
    made = folder / "program.mp4"
    words = command(spec, plan, program, where, made, _picture(spec, setting, folder))
    with at_work(words, where.checkout, environment(os.environ), spec.num_inference_steps) as running:
        for stage in STAGES:
            with watch.phase(stage):
                running.follow(stage, watch)
        watch.records["load"] = watch.records["load"].model_copy(update={"host_peak_bytes": running.host_peak_bytes})
        _refuse_broken(made, spec, running)
    with watch.phase("decode"), outputs.explained(setting.config.paths):
        settings = setting.config.settings.output
        return formats.write(folder, video.read_frames(made), spec, plan, settings, watch.check)


def _picture(spec: JobSpec, setting: Setting, folder: Path) -> Path | None:
    """Return the picture to animate in the clip's own size: the program takes the shape of the clip from it."""
    picture = runjob.input_picture(spec.image, setting.config.paths.inputs)
    if picture is None:
        return None
    file = folder / "input.png"
    ImageOps.fit(picture, (spec.width, spec.height)).save(file)
    return file


def _refuse_broken(made: Path, spec: JobSpec, running: Program) -> None:
    """Raise unless the program left the clip: it exits with 0 whether or not it could write one.

    Raises:
        OSError: the disk was at fault.
        ProgramFailed: anything else.
    """
    if made.is_file() and made.stat().st_size:
        try:
            verify.clip(made, spec.model_copy(update={"output_format": "mp4", "interpolate": None}))
        except verify.Refused as refused:
            raise ProgramFailed(f"Wan's own program left a broken clip. {refused}") from refused
        return
    for code in MACHINE_ERRNOS:
        if os.strerror(code) in running.words:
            raise OSError(code, os.strerror(code), str(made))
    raise ProgramFailed(f"Wan's own program ended well, but without a clip: {running.words}.")


def version(checkout: Path) -> str:
    """Return the commit of the program's folder, "unknown" where it is no clone or there is no git to ask."""
    if not (checkout / ".git").exists():
        return "unknown"
    words = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    ask = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(checkout), *words]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
