"""Clips as MP4, GIF, WebP and folders of frames, with posters, through the outbox: real files, read by others, too."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageSequence

from safelight import content, embedded
from safelight.config import Config
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.receipt import Receipt
from safelightd import formats, metadata, outputs, verify, video, webp
from tests.conftest import Installation
from tests.integration import making

NAME = "2026-11-22/night/0001_a-red-fox_s7"
FORMATS = ["mp4", "gif", "webp", "png"]

needs_ffprobe = pytest.mark.skipif(not shutil.which("ffprobe"), reason="no ffprobe here: apt install ffmpeg")


@pytest.fixture
def config(installation: Installation) -> Config:
    return installation.config


def clip(output_format: str = "mp4", **changes: Any) -> JobSpec:
    """A clip that every format can hold: 25 frames a second."""
    return making.clip_spec(output_format=output_format, **{"fps": 25, **changes})


def write(spec: JobSpec, config: Config) -> Path:
    file = outputs.write(spec, making.PLAN, making.frames(spec), config)
    verify.output(file, spec)
    return file


def publish(spec: JobSpec, config: Config) -> Receipt:
    file = write(spec, config)
    return outputs.publish(
        lambda published: making.receipt(spec, published), file, spec, Ledger(config.paths), config.paths
    )


def with_output(config: Config, **values: bool) -> Config:
    output = config.settings.output.model_copy(update=values)
    return replace(config, settings=config.settings.model_copy(update={"output": output}))


def below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def probed(*words: str) -> dict[str, Any]:
    """What ffprobe finds when it decodes every frame."""
    command = ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v:0", "-show_streams", "-of", "json"]
    said = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
    assert said.stderr == ""
    (stream,) = json.loads(said.stdout)["streams"]
    return dict(stream)


# What another program finds.


@needs_ffprobe
@pytest.mark.parametrize("interpolate", [None, 2, 4])
@pytest.mark.parametrize(("frames", "fps"), [(5, 16), (9, 24), (33, 30)])
def test_another_program_decodes_the_exact_frames_of_an_mp4(
    frames: int, fps: int, interpolate: int | None, config: Config
) -> None:
    spec = clip(num_frames=frames, fps=fps, interpolate=interpolate)

    found = probed(str(write(spec, config)))

    times = interpolate or 1
    assert (found["codec_name"], found["pix_fmt"], found["color_space"]) == ("h264", "yuv420p", "bt709")
    assert (found["width"], found["height"]) == (96, 64)
    assert (int(found["nb_frames"]), int(found["nb_read_frames"])) == ((frames - 1) * times + 1,) * 2
    assert found["r_frame_rate"] == found["avg_frame_rate"] == f"{fps * times}/1"


@needs_ffprobe
@pytest.mark.parametrize("fps", [4, 10, 25, 50])
def test_another_program_decodes_the_exact_frames_of_a_gif(fps: int, config: Config) -> None:
    found = probed(str(write(clip("gif", fps=fps), config)))

    assert (found["codec_name"], int(found["nb_read_frames"]), found["avg_frame_rate"]) == ("gif", 9, f"{fps}/1")


@needs_ffprobe
def test_another_program_decodes_the_exact_frames_of_a_folder(config: Config) -> None:
    found = probed("-framerate", "25", "-i", f"{write(clip('png'), config)}/%04d.png")

    assert (found["codec_name"], found["pix_fmt"], int(found["nb_read_frames"])) == ("png", "rgb24", 9)


def test_another_program_decodes_the_exact_frames_of_a_webp(config: Config) -> None:
    """ffprobe of Debian cannot read animated WebP; the ffmpeg that comes with imageio-ffmpeg can."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(write(clip("webp"), config))]

    said = subprocess.run([*command, "-f", "framemd5", "-"], capture_output=True, text=True, check=True)

    assert len([line for line in said.stdout.splitlines() if not line.startswith("#")]) == 9
    assert said.stderr == ""


def test_exif_of_a_webp_begins_as_its_specification_says(config: Config) -> None:
    content = write(clip("webp"), config).read_bytes()

    assert content[content.index(b"EXIF") + 8 :].startswith(b"MM\0*"), "readers may take it for damaged else"


# What is published.


@pytest.mark.parametrize(
    ("output_format", "ends"),
    [
        ("mp4", [".jpg", ".json", ".mp4"]),
        ("gif", [".gif", ".json"]),
        ("webp", [".json", ".webp"]),
        ("png", [".json", *(f"/{number:04}.png" for number in range(1, 10))]),
    ],
)
def test_clip_is_published_in_every_format(output_format: str, ends: list[str], config: Config) -> None:
    spec = clip(output_format)

    receipt = publish(spec, config)

    outbox = config.paths.outbox
    (output,) = receipt.outputs
    assert sorted(name for name in below(outbox) if not name.startswith("latest")) == [f"{NAME}{end}" for end in ends]
    assert output.path == f"{NAME}{formats.suffix(spec)}"
    assert (output.num_frames, output.fps, output.interpolated_by) == (9, 25, None)
    assert content.is_there_as(outbox / output.path, output.sha256, output.bytes)
    assert Receipt.model_validate_json((outbox / f"{NAME}.json").read_bytes()) == receipt
    verify.output(outbox / output.path, spec)


@pytest.mark.parametrize("output_format", FORMATS)
def test_interpolated_clip_says_so_and_what_the_file_is(output_format: str, config: Config) -> None:
    receipt = publish(clip(output_format, fps=10, interpolate=2), config)

    (output,) = receipt.outputs
    assert (output.num_frames, output.fps, output.interpolated_by) == (17, 20, "ffmpeg minterpolate")
    assert (receipt.spec.num_frames, receipt.spec.fps) == (9, 10)
    assert below(config.paths.unfinished) == []


@pytest.mark.parametrize("output_format", FORMATS)
def test_moving_picture_comes_back_in_order(output_format: str, config: Config) -> None:
    spec = clip(output_format)

    file = write(spec, config)

    if output_format == "mp4":
        found = list(video.read_frames(file))
    elif output_format == "png":
        found = [np.asarray(Image.open(frame)) for frame in sorted(file.iterdir())]
    else:
        with Image.open(file) as animation:
            found = [np.asarray(picture.convert("RGB")) for picture in ImageSequence.Iterator(animation)]
    for written, decoded in zip(making.frames(spec), found, strict=True):
        assert np.abs(written.astype(int) - decoded).mean() < (0.001 if output_format == "png" else 3)


@pytest.mark.parametrize("output_format", ["gif", "webp"])
def test_frame_that_is_like_the_one_before_is_a_frame_of_its_own(output_format: str, config: Config) -> None:
    """libwebp's own writer, and Pillow's for GIF, would make one of both that is shown longer."""
    spec = clip(output_format)
    frames = [making.gradient(spec, 20, 230)] * 9

    verify.output(outputs.write(spec, making.PLAN, frames, config), spec)


@pytest.mark.parametrize("fps", [1, 7, 16, 24, 30, 120])
def test_frames_of_a_webp_begin_within_half_a_millisecond_of_their_moment(fps: int, config: Config) -> None:
    file = write(clip("webp", fps=fps), config)

    began_ms = 0
    with Image.open(file) as animation:
        for number, picture in enumerate(ImageSequence.Iterator(animation)):
            picture.load()
            assert abs(began_ms - 1000 * number / fps) <= 0.5
            began_ms += picture.info["duration"]
    assert abs(began_ms - 9000 / fps) <= 0.5


def test_gif_of_a_rate_that_it_cannot_keep_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hundredths"):
        video.write_gif(tmp_path / "a.gif", [], fps=24, width=96, height=64)


@pytest.mark.parametrize("output_format", FORMATS)
def test_same_job_gives_the_same_bytes(output_format: str, config: Config) -> None:
    spec = clip(output_format, fps=25, interpolate=2)

    digests = {content.digest(write(spec, config)) for _ in range(2)}

    assert len(digests) == 1


def test_digest_of_a_folder_is_what_a_person_can_compute(config: Config) -> None:
    receipt = publish(clip("png"), config)
    folder = config.paths.outbox / receipt.outputs[0].path

    command = "cat *.png | wc -c; sha256sum * | sha256sum"
    size, digest = subprocess.run(command, cwd=folder, shell=True, capture_output=True, text=True).stdout.split("\n")[
        :2
    ]

    assert digest.split()[0] == receipt.outputs[0].sha256
    assert int(size) == receipt.outputs[0].bytes


# What is inside.


@pytest.mark.parametrize("output_format", FORMATS)
def test_clip_of_every_format_says_how_to_make_it_again(output_format: str, config: Config) -> None:
    spec = clip(output_format, fps=25, interpolate=2, prompt="赤い狐 🦊\n;=#", negative_prompt="blur")

    found = embedded.read(write(spec, config))

    assert (found.spec, found.plan, found.versions) == (spec, making.PLAN, metadata.versions())


@pytest.mark.parametrize("output_format", FORMATS)
def test_switched_off_metadata_leaves_no_word_of_the_prompt(output_format: str, config: Config) -> None:
    receipt = publish(clip(output_format, prompt="unmistakable"), with_output(config, metadata=False))

    folder = (config.paths.outbox / receipt.outputs[0].path).parent
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".json"]
    assert files
    assert [file.name for file in files if b"unmistakable" in file.read_bytes()] == []
    assert embedded.read(config.paths.outbox / receipt.outputs[0].path).spec == receipt.spec, "of the receipt beside"


def test_no_frame_of_a_clip_is_taken_for_a_picture_of_a1111(config: Config) -> None:
    folder = write(clip("png"), config)

    for frame in folder.iterdir():
        with Image.open(frame) as picture:
            assert "parameters" not in picture.info
            assert "safelight" in picture.info


# Posters.


def test_poster_is_the_frame_in_the_middle(config: Config) -> None:
    spec = clip()

    receipt = publish(spec, config)

    poster = receipt.outputs[0].poster
    assert poster is not None
    assert poster.path == f"{NAME}.jpg"
    assert content.is_there_as(config.paths.outbox / poster.path, poster.sha256, poster.bytes)
    with Image.open(config.paths.outbox / poster.path) as picture:
        errors = [np.abs(np.asarray(picture).astype(int) - frame).mean() for frame in making.frames(spec)]
    assert int(np.argmin(errors)) == 4
    assert embedded.read(config.paths.outbox / poster.path).spec == spec


def test_poster_can_be_switched_off(config: Config) -> None:
    receipt = publish(clip(), with_output(config, poster=False))

    assert receipt.outputs[0].poster is None
    assert [Path(name).suffix for name in below(config.paths.outbox) if not name.startswith("latest")] == [
        ".json",
        ".mp4",
    ]
    assert "poster" not in (config.paths.outbox / f"{NAME}.json").read_text()


def test_clip_whose_posters_name_is_taken_gets_another(config: Config) -> None:
    mine = config.paths.outbox / f"{NAME}.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"a person's own")

    (output,) = publish(clip(), config).outputs

    assert output.poster is not None
    assert (output.path, output.poster.path) == (f"{NAME}-2.mp4", f"{NAME}-2.jpg")
    assert mine.read_bytes() == b"a person's own"


class Stop(BaseException):
    """Ends a publisher where a kill might."""


def intended(spec: JobSpec, config: Config, monkeypatch: pytest.MonkeyPatch) -> Receipt:
    """Leave a job as an engine leaves it that dies right after the intention."""

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "_complete", stop)
        with pytest.raises(Stop):
            publish(spec, config)
    receipt = Ledger(config.paths).intended(spec.id)
    assert receipt is not None
    return receipt


@pytest.mark.parametrize("taken", ["mp4", "jpg", "json"])
def test_name_of_any_part_taken_after_the_intention_is_chosen_anew(
    taken: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = clip()
    intended(spec, config, monkeypatch)
    (config.paths.outbox / f"{NAME}.{taken}").write_bytes(b"another's")

    receipt = outputs.finish(spec.id, Ledger(config.paths), config.paths)

    assert receipt is not None
    (output,) = receipt.outputs
    assert output.poster is not None
    assert (output.path, output.poster.path) == (f"{NAME}-2.mp4", f"{NAME}-2.jpg")
    names = [name for name in below(config.paths.outbox) if not name.startswith("latest")]
    assert names == sorted([f"{NAME}.{taken}", *(f"{NAME}-2.{end}" for end in ("jpg", "json", "mp4"))])
    assert content.is_there_as(config.paths.outbox / output.path, output.sha256, output.bytes)


def test_lost_poster_keeps_no_clip_from_being_finished(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = clip()
    intended(spec, config, monkeypatch)
    (config.paths.unfinished / spec.id / "output.jpg").unlink()

    receipt = outputs.finish(spec.id, Ledger(config.paths), config.paths)

    assert receipt is not None
    verify.output(config.paths.outbox / receipt.outputs[0].path, spec)


# Folders of frames.


@pytest.mark.parametrize("kind", ["folder", "file", "receipt"])
def test_folders_name_taken_after_the_intention_is_chosen_anew(
    kind: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = clip("png")
    intended(spec, config, monkeypatch)
    other = config.paths.outbox / (f"{NAME}.json" if kind == "receipt" else NAME)
    if kind == "folder":
        other.mkdir()
        other /= "0001.png"
    other.write_bytes(b"another's")

    receipt = outputs.finish(spec.id, Ledger(config.paths), config.paths)

    assert receipt is not None
    assert receipt.outputs[0].path == f"{NAME}-2"
    assert other.read_bytes() == b"another's"
    verify.output(config.paths.outbox / f"{NAME}-2", spec)
    assert not (config.paths.unfinished / spec.id).exists()


def test_lost_folder_is_an_error_that_names_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = clip("png")
    intended(spec, config, monkeypatch)
    shutil.rmtree(config.paths.unfinished)

    with pytest.raises(outputs.OutputLost, match="was rendered, but is not there"):
        outputs.finish(spec.id, Ledger(config.paths), config.paths)


def _cut(folder: Path) -> None:
    frame = folder / "0005.png"
    frame.write_bytes(frame.read_bytes()[:100])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a frame is missing": (lambda folder: (folder / "0005.png").unlink(), "not numbered from 0001.png on"),
    "the last is missing": (lambda folder: (folder / "0009.png").unlink(), "has 8 frames, 9 were asked for"),
    "another file": (lambda folder: (folder / "Thumbs.db").write_bytes(b"x"), "not numbered"),
    "a frame is cut": (_cut, "cannot be decoded"),
    "a frame of another size": (
        lambda folder: Image.new("RGB", (64, 64)).save(folder / "0005.png"),
        "A frame of the clip is 64x64",
    ),
    "a grey frame": (lambda folder: Image.new("L", (96, 64)).save(folder / "0005.png"), "0005.png of the clip is L"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_folder_that_is_not_as_asked_is_refused(damage: str, config: Config) -> None:
    spec = clip("png")
    folder = write(spec, config)
    harm, message = DAMAGES[damage]
    harm(folder)

    with pytest.raises(verify.Refused, match=message):
        verify.output(folder, spec)


@pytest.mark.parametrize("output_format", ["gif", "webp"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.97])
def test_truncated_animation_is_refused(output_format: str, keep: float, config: Config) -> None:
    spec = clip(output_format)
    frames = (making.noise(spec, seed) for seed in range(9))
    file = outputs.write(spec, making.PLAN, frames, with_output(config, metadata=False))
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])

    with pytest.raises(verify.Refused):
        verify.output(file, spec)


@pytest.mark.parametrize("output_format", ["gif", "webp"])
def test_animation_at_another_rate_or_length_is_refused(output_format: str, config: Config) -> None:
    file = write(clip(output_format), config)

    with pytest.raises(verify.Refused, match=r"Frame 1 of the clip lasts 40 ms, (50|100) were asked for"):
        verify.output(file, clip(output_format, fps=20 if output_format == "webp" else 10))
    with pytest.raises(verify.Refused, match="has 9 frames, 13 were asked for"):
        verify.output(file, clip(output_format, num_frames=13))


@pytest.mark.parametrize("output_format", FORMATS)
def test_clip_that_shows_nothing_is_refused_in_every_format(output_format: str, config: Config) -> None:
    spec = clip(output_format)
    file = outputs.write(spec, making.PLAN, [making.colour(spec)] * 9, config)

    with pytest.raises(verify.Refused, match="9 of 9 frames of the clip are black"):
        verify.output(file, spec)


# Disks.


@pytest.mark.parametrize("interpolate", [None, 2])
@pytest.mark.parametrize("output_format", FORMATS)
def test_clip_that_the_disk_refuses_leaves_nothing(output_format: str, interpolate: int | None, config: Config) -> None:
    spec = clip(output_format, fps=25, interpolate=interpolate)
    frames = (making.noise(spec, seed) for seed in range(9))

    with making.file_size_limit(1024), pytest.raises(OSError, match="File too large"):
        outputs.write(spec, making.PLAN, frames, config)

    assert below(config.paths.outbox) == []


@pytest.mark.parametrize("output_format", FORMATS)
def test_clip_that_fills_the_disk_leaves_nothing(output_format: str, installation: Installation) -> None:
    small = installation.root / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root; RLIMIT_FSIZE is tested instead")
    try:
        config = replace(installation.config, paths=replace(installation.paths, outbox=small / "outbox"))
        spec = clip(output_format, width=256, height=256, num_frames=33)
        with pytest.raises(OSError, match="No space left on device"):
            outputs.write(spec, making.PLAN, (making.noise(spec, seed) for seed in range(33)), config)
        assert below(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_webp_holds_one_frame_at_a_time(tmp_path: Path) -> None:
    """The file grows with each frame that was given."""
    spec = clip("webp")
    sizes: list[int] = []

    def frames() -> Iterator[np.ndarray]:
        for seed in range(9):
            sizes.append((tmp_path / "a.webp").stat().st_size)
            yield making.noise(spec.model_copy(update={"width": 256, "height": 256}), seed)

    webp.write(tmp_path / "a.webp", frames(), fps=25, width=256, height=256)

    assert sizes[-1] > 4 * sizes[2] // 2 > 0


# The whole job.


@pytest.mark.parametrize("interpolate", [None, 2])
@pytest.mark.parametrize("output_format", FORMATS)
def test_whole_job_ends_in_a_clip_of_every_format(
    output_format: str, interpolate: int | None, installation: Installation
) -> None:
    from tests.integration.rendering import spec_for
    from tests.integration.warm_engine import receipts

    asked = {"fps": 10, "num_frames": 5, "output_format": output_format, "interpolate": interpolate}
    spec = spec_for("tiny-wan-ti2v", **asked)
    spec = spec.model_copy(update={"id": "job-1", "submitted_at": "2026-11-22T12:00:00+00:00"})

    receipt = receipts(installation)(spec)

    (output,) = receipt.outputs
    assert (output.num_frames, output.fps) == ((9, 20) if interpolate else (5, 10))
    assert (output.poster is not None) == (output_format == "mp4")
    verify.output(installation.paths.outbox / output.path, spec)
    assert embedded.read(installation.paths.outbox / output.path).spec == spec
    assert installation.ledger.receipt("job-1") == receipt
