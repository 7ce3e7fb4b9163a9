"""Stands in for generate.py of Wan-Video/Wan2.2: its options, its log lines, tqdm's own bars, a real MP4, and no model.

The first word of the prompt says how it goes: `crash` (an exception while it denoises), `gpu` (one of CUDA's), `oom`
(out of GPU memory while it decodes), `pinned` (the same of RAM), `unsaved` (it cannot write, and exits with 0), `full`
(the same, of a full disk), `broken` and `short` (what it writes is no clip, or lacks frames), `killed` (by SIGKILL),
`hang` (at its second step, with a child of its own), `replay` (it says byte for byte what generate.py itself has said,
transcript.txt beside it, in pieces that end in awkward places); anything else, well. Bars are written a byte at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
from PIL import Image
from tqdm import tqdm

TASKS = {"t2v-A14B": "WanT2V", "i2v-A14B": "WanI2V", "ti2v-5B": "WanTI2V"}
log = logging.getLogger()

SIZES = ("720*1280", "1280*720", "480*832", "832*480", "704*1280", "1280*704", "1024*704", "704*1024")


class ByteByByte:
    """stderr, as a slow pipe shows it: lines, and the characters that bars are made of, come in pieces."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        for byte in text.encode():
            os.write(2, bytes([byte]))

    def flush(self) -> None: ...


def to_bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="t2v-A14B", choices=TASKS)
    parser.add_argument("--size", default="1280*720", choices=SIZES)
    for name in ("--frame_num", "--sample_steps"):
        parser.add_argument(name, type=int)
    for name in ("--ckpt_dir", "--save_file", "--prompt", "--image"):
        parser.add_argument(name)
    for name in ("--sample_shift", "--sample_guide_scale"):
        parser.add_argument(name, type=float)
    for name in ("--t5_cpu", "--convert_model_dtype"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--offload_model", type=to_bool)
    parser.add_argument("--base_seed", type=int, default=-1)
    return parser.parse_args()


def denoise(steps: int, word: str) -> None:
    for step in tqdm(range(steps), file=ByteByByte(), mininterval=0):
        if step == 1 and word == "crash":
            raise RuntimeError("Given groups=1, expected input to have 48 channels.")
        if step == 1 and word == "gpu":
            raise RuntimeError("CUDA error: unspecified launch failure")
        if step == 1 and word == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 1 and word == "hang":
            child = subprocess.Popen(["sleep", "600"])
            Path(__file__).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        time.sleep(0.01)


class OutOfMemoryError(RuntimeError):
    """Called as torch's is."""

    __module__ = "torch"


def replay(said: bytes) -> None:
    """Say it in pieces that end after the return before a bar, within its characters of three bytes and its numbers."""
    for piece in re.findall(rb"[^\r\xe2/\[]*[\r\xe2/\[]|[^\r\xe2/\[]+", said):
        os.write(2, piece)
        time.sleep(0.003)


def decode(word: str) -> None:
    if word == "oom":
        raise OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.53 GiB. GPU 0 has a total capacity of 23.52 GiB of which 1.11 GiB "
            "is free."
        )
    if word == "pinned":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")


def save(file: Path, size: str, frames: int, fps: int, word: str) -> None:
    if word == "broken":
        file.write_bytes(b"\0\0\0\x18ftypmp42" + b"\0" * 4096)
        return
    if word in ("unsaved", "full"):
        error = "[Errno 28] No space left on device" if word == "full" else "Unknown encoder 'libx264'"
        log.info("save_video failed, error: %s", error)
        return
    count = frames - 1 if word == "short" else frames
    source = ["-f", "lavfi", "-i", f"testsrc2=size={size.replace('*', 'x')}:rate={fps}", "-frames:v", str(count)]
    coded = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-y", str(file)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *coded], check=True)


def main() -> None:
    arguments = parse()
    prompt = arguments.prompt or "the example's"
    word = prompt.split()[0]
    Path(__file__).with_name("told.json").write_text(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}))
    fps = 24 if arguments.task == "ti2v-5B" else 16
    if word == "replay":
        said, finished, rest = Path(__file__).with_name("transcript.txt").read_bytes().rpartition(b"] INFO: Finished.")
        replay(said)
        save(Path(arguments.save_file), arguments.size, arguments.frame_num, fps, word)
        replay(finished + rest)
        return
    format_ = "[%(asctime)s] %(levelname)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=format_, handlers=[logging.StreamHandler(sys.stdout)])
    log.info("Generation job args: %s", arguments)
    log.info("Input prompt: %s", prompt)
    log.info("Creating %s pipeline.", TASKS[arguments.task])
    log.info("loading %s/models_t5_umt5-xxl-enc-bf16.pth", arguments.ckpt_dir)
    for _ in tqdm(range(3), desc="Loading checkpoint shards", file=ByteByByte(), mininterval=0):
        pass
    log.info("Generating video ...")
    denoise(arguments.sample_steps, word)
    decode(word)
    size = arguments.size
    if arguments.image:
        with Image.open(arguments.image) as picture:
            size = f"{picture.width}*{picture.height}"
    log.info("Saving generated video to %s", arguments.save_file)
    save(Path(arguments.save_file), size, arguments.frame_num, fps, word)
    log.info("Finished.")


if __name__ == "__main__":
    main()
