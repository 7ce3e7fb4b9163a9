"""The options that describe a job: diffusers' names, with the short ones that people know. Read by safelight.draft."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from safelight.draft import Draft

_OPTIONS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("--model",), "KEY", "A model of `safelight models list`; else the default of [defaults]."),
    (("--backend",), "NAME", "diffusers, or wan-cli: Wan's own program, where [wan_cli] says that it is installed."),
    (("--kind",), "KIND", "image or video, where no model is named."),
    (("--negative-prompt",), "TEXT", "What it should not show. There is no short -n for it."),
    (("--prompt-2",), "TEXT", "Another prompt for FLUX's second text encoder."),
    (("--size",), "WxH", "Such as 1280x704. Left out: of the picture's shape, else the model's own."),
    (("--width",), "PIXELS", ""),
    (("--height",), "PIXELS", ""),
    (("--steps", "--num-inference-steps"), "N", "Denoising steps."),
    (("--guidance", "--guidance-scale"), "SCALE", "Guidance; for FLUX dev the distilled one."),
    (("--guidance-2", "--guidance-scale-2"), "SCALE", "The same for Wan A14B's low-noise expert."),
    (("--cfg", "--true-cfg-scale"), "SCALE", "True guidance of FLUX dev, with a negative prompt. Twice the time."),
    (("--max-sequence-length",), "TOKENS", "Tokens of the prompt that are read."),
    (("--frames", "--num-frames"), "N", "Frames of a clip, 4n + 1."),
    (("--fps",), "N", "Frames a second of a clip."),
    (("--interpolate",), "N", "2 or 4 times the frames a second: ffmpeg makes those between the model's."),
    (("--shift", "--flow-shift"), "SHIFT", "Flow shift of Wan's scheduler."),
    (("--image",), "FILE", "The picture to animate, or to start from. It is copied now: move it as you like."),
    (
        ("--strength",),
        "0 TO 1",
        "How far a picture of FLUX may leave the one it starts from; 0.6 where none is written.",
    ),
    (("--last-image",), "FILE", "The picture to end with."),
    (
        ("--controlnet",),
        "MODEL:IMAGE[:SCALE[:START[:END]]]",
        "A ControlNet of the model, the picture that leads it, how much, and between which shares of the steps.",
    ),
    (
        ("--lora", "--loras"),
        "NAME[:SCALE]",
        "A LoRA of the folder loras of the models, or a .safetensors file (repeatable). For one of Wan A14B's two "
        "experts NAME:SCALE:high or :low. In a prompt <lora:NAME:SCALE>.",
    ),
    (("--seed",), "N[,N...]", "One job a seed. Left out, or -1: a random one, which is written down."),
    (("-n", "--count"), "N", "How many of each prompt, their seeds counting up. A count, not the negative prompt."),
    (("--expand",), "HOW", "random: draw one text of {a|b} and __wildcards__ a job. all: a job of every text."),
    (("--wildcard-seed",), "N", "Draw the same texts again another day; else each submission draws anew."),
    (
        ("--precision",),
        "HOW",
        "auto, bf16, fp16, fp8, int8, nf4, or one exactly: fp8-dynamic, fp8-weight-only, fp8-quanto, int8-dynamic, "
        "int8-weight-only, int8-bnb. Left out, the planner decides; so for the next six.",
    ),
    (("--offload",), "HOW", "auto, model, partial, block, leaf or sequential."),
    (("--low-cpu-mem-usage",), "HOW", "auto, on or off: of offload leaf, pin on the way. Slower, and less RAM."),
    (("--compile",), "HOW", "auto, on or off: run the transformer's blocks compiled."),
    (("--vae-tiling",), "HOW", "auto; off: whole; strips, without seams; on: in tiles."),
    (("--text-encoder-precision",), "HOW", "As --precision, of the large text encoder."),
    (("--text-encoder-device",), "HOW", "auto, gpu or cpu."),
    (("--cache",), "HOW", "first-block:threshold=0.08 or taylorseer:cache_interval=3: faster, and another result."),
    (("--format", "--output-format"), "KIND", "png, jpg or webp; of clips mp4, gif, webp, or png: a folder of frames."),
    (("--priority",), "CLASS", "high, normal, low or night (only inside the window of [policy])."),
    (("--not-before",), "WHEN", "Such as 2026-11-23T06:00, your local time."),
    (("--tags",), "A,B", "Words to find it by: safelight list --tag A."),
)

_ALIASES = {
    "steps": "num-inference-steps",
    "negative": "negative-prompt",
    "guidance": "guidance-scale",
    "distilled-cfg": "guidance-scale",
    "distilled-cfg-scale": "guidance-scale",
    "guidance-2": "guidance-scale-2",
    "cfg": "true-cfg-scale",
    "cfg-scale": "true-cfg-scale",
    "frames": "num-frames",
    "video-frames": "num-frames",
    "frame-num": "num-frames",
    "shift": "flow-shift",
    "init-img": "image",
    "init-image": "image",
    "end-img": "last-image",
    "end-image": "last-image",
    "lora": "loras",
    "format": "output-format",
    "n-iter": "count",
    "batch-count": "count",
}
"""safelight.draft.ALIASES once more (a test compares them): that module is too heavy for --help."""


def canonical(name: str) -> str:
    """Return an option's one name for what a person typed: `--negative_prompt` and `--cfg-scale` work too."""
    dashed = name.replace("_", "-")
    return _ALIASES.get(dashed, dashed)


JOB_OPTIONS_CONTEXT = {"token_normalize_func": canonical}


class JobCommand(click.Command):
    """A command of the options that describe a job, by any of their names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words; an option that is not there is compared with what people type, which click has not kept."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            names = [name for parameter in self.get_params(ctx) for name in parameter.opts]
            near = difflib.get_close_matches(error.option_name, [*names, *(f"--{alias}" for alias in _ALIASES)], n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"{ctx.command_path} --help lists them."
            raise click.UsageError(f"There is no option {error.option_name}. {remedy}", ctx) from error


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every option that describes a job; the command gets them as keywords, under the names of data."""
    for names, metavar, help_text in reversed(_OPTIONS):
        parameter = names[-1].removeprefix("--").replace("-", "_")
        repeated = parameter == "loras"
        command = click.option(
            *names, parameter, metavar=metavar, help=help_text, multiple=repeated, callback=_none_for_nothing
        )(command)
    return command


def _none_for_nothing(_context: click.Context, _parameter: click.Parameter, value: object) -> object:
    """What was not given is None, also of an option that may be repeated."""
    return None if value == () else value


SWEEP = click.option(
    "--sweep",
    "sweeps",
    metavar="NAME=A,B",
    multiple=True,
    help="A job for each value; with several, for each combination. steps=4,8 or guidance=2,3,..,6.",
)


def drafts_of(
    prompts: tuple[str, ...], written: Mapping[str, str | tuple[str, ...] | None], sweeps: tuple[str, ...]
) -> list[Draft]:
    """Return a draft a prompt, each with the same options.

    Raises:
        InvalidJob: an option cannot be read; every fault is listed.
    """
    from safelight.draft import parse_options
    from safelight.errors import Fault, InvalidJob

    options = [
        f"--{name}={value}"
        for name, values in written.items()
        for value in (values if isinstance(values, tuple) else (values,))
        if value is not None
    ]
    options += [f"--sweep={text}" for text in sweeps]
    drafts = []
    faults: dict[Fault, None] = {}
    for number, prompt in enumerate(prompts, start=1):
        where = "add" if len(prompts) == 1 else f"prompt {number}"
        try:
            drafts.append(parse_options([f"--prompt={prompt}", *options], where))
        except InvalidJob as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise InvalidJob(list(faults))
    return drafts
