"""What Wan's own program is told: its command line and its environment. Pure.

The options are those of generate.py, Wan-Video/Wan2.2 @ 42bf4cf.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safelight.jobspec import JobSpec
from safelight.models import OwnProgram
from safelight.plan import Plan
from safelight.wan_cli import Installed

LEFT_OUT = (
    "TQDM_DISABLE",  # its bars are all that it says of its steps
    "PYTORCH_ALLOC_CONF",  # a key that its torch does not know would end CUDA for it
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "PYTHONPATH",
    "PYTHONHOME",
)
"""What of the engine's environment is for the engine's own Python and torch."""


def command(
    spec: JobSpec, plan: Plan, program: OwnProgram, where: Installed, save_file: Path, image: Path | None
) -> list[str]:
    """Return the command that makes the clip of `spec` in `save_file`, whose folder must be there.

    Each value is part of its option's word, so that a prompt may begin with a dash.

    Args:
        image: the picture to animate, of the clip's own size.
    """
    size = next(size for size in program.sizes if (size.width, size.height) == (spec.width, spec.height))
    options: dict[str, object] = {
        "task": program.task,
        "size": size.argument,
        "frame_num": spec.num_frames,
        "ckpt_dir": where.checkpoints,
        "offload_model": True,
        "save_file": save_file,
        "prompt": spec.prompt,
        "base_seed": spec.seed,
        "image": image,
        "sample_steps": spec.num_inference_steps,
        "sample_shift": spec.flow_shift,
        # Of two experts it takes one number for both; left out, it uses its own two.
        "sample_guide_scale": spec.guidance_scale if spec.guidance_scale_2 in (None, spec.guidance_scale) else None,
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    words += ["--convert_model_dtype"] + (["--t5_cpu"] if plan.text_encoder_device == "cpu" else [])
    return [str(where.python), "-u", str(where.checkout / "generate.py"), *words]


def environment(engine: Mapping[str, str]) -> dict[str, str]:
    """Return the program's environment: the engine's GPU, and no network either."""
    kept = {name: value for name, value in engine.items() if name not in LEFT_OUT}
    return {**kept, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
