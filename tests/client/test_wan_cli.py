"""Jobs for Wan's own program: what it cannot do is refused with a remedy, and so is what the machine lacks. Pure."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight import config, doctor, jobspec, models, submit, wan_cli
from safelight.calibration import NOTHING_LEARNED
from safelight.errors import BadConfig, InvalidJob
from safelight.jobspec import JobSpec
from safelight.machine import GIB, Machine
from safelight.plan import Plan
from safelight.planner import DoesNotFit, make_plan
from safelight.wan_cli import OWN_NEGATIVE_PROMPT
from safelight.wan_cli_plan import device_bytes, host_bytes
from tests.cli_steps import runner
from tests.conftest import Installation

TABLE = models.load()
DIGEST = "0" * 64
OWN = [facts for facts in TABLE.values() if facts.wan_cli and not facts.tiny]


def checked(**written: object) -> JobSpec | list[str]:
    fields = {"prompt": "a fox", "seed": 1, "backend": "wan-cli", **written}
    found = jobspec.check(fields, TABLE, "n.txt:1", image_model="flux-schnell", video_model="wan-ti2v-5b")
    return found if isinstance(found, JobSpec) else [f"{fault.problem}. {fault.remedy}" for fault in found]


def job(**written: object) -> JobSpec:
    spec = checked(kind="video", **written)
    assert isinstance(spec, JobSpec), spec
    return spec


def card(vram_gib: float, ram_gib: float, capability: tuple[int, int] = (8, 9)) -> Machine:
    return Machine(
        device="cuda", gpu="Some GPU", capability=capability, cpus=8,
        vram_total_bytes=int(vram_gib * GIB), vram_free_bytes=int(vram_gib * GIB),
        ram_total_bytes=int(ram_gib * GIB), ram_available_bytes=int(ram_gib * GIB),
    )  # fmt: skip


def plan_of(spec: JobSpec, machine: Machine) -> Plan:
    return make_plan(spec, machine, TABLE, NOTHING_LEARNED)


# -- what it cannot do -------------------------------------------------------------------------------------------------


def test_a_job_runs_by_diffusers_unless_it_says_otherwise() -> None:
    made = checked(backend=None)

    assert isinstance(made, JobSpec)
    assert made.backend == "diffusers"


def test_an_unknown_backend_is_told_the_nearest() -> None:
    assert checked(backend="wan_cli") == ["backend 'wan_cli' is not diffusers or wan-cli. Did you mean wan-cli?"]


@pytest.mark.parametrize("key", [facts.key for facts in OWN])
def test_the_models_own_defaults_are_the_programs(key: str) -> None:
    facts = TABLE[key]
    picture = {"image": DIGEST} if facts.image == "required" else {}
    size = {"width": 832, "height": 464} if key == "wan-i2v-a14b" else {}

    assert facts.defaults.negative_prompt == OWN_NEGATIVE_PROMPT
    assert job(model=key, **picture, **size).backend == "wan-cli"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            {"negative_prompt": "blurry"},
            "negative_prompt would be ignored by Wan's own program, which has its own. Leave it, or backend, out.",
        ),
        (
            {"width": 832, "height": 480},
            "832x480 is not a size that Wan's own program makes of wan-ti2v-5b. Use one of 1280x704, 704x1280.",
        ),
        (
            {"width": 1000},
            "1000x704 is not a size that Wan's own program makes of wan-ti2v-5b. Use one of 1280x704, 704x1280.",
        ),
        ({"num_frames": 12}, "num_frames 12 is not 4n + 1. Use 13."),
        ({"fps": 16}, "fps 16 would be ignored by Wan's own program. Use 24, or leave backend out."),
        ({"max_sequence_length": 256}, "max_sequence_length 256 would be ignored by Wan's own program. Use 512."),
        ({"precision": "fp8"}, "precision fp8 is not offered by Wan's own program. Use auto or bf16."),
        ({"offload": "partial"}, "offload partial is not offered by Wan's own program. Use auto or model."),
        ({"vae_tiling": "on"}, "vae_tiling on is not offered by Wan's own program. Use auto or off."),
        ({"vae_tiling": "strips"}, "vae_tiling strips is not offered by Wan's own program. Use auto or off."),
        ({"compile": "on"}, "compile on is not offered by Wan's own program. Use auto or off."),
        (
            {"output_format": "gif"},
            "a gif cannot show 24 frames a second: its frames last whole hundredths of one. Use webp.",
        ),
        (
            {"model": "wan-i2v-a14b", "image": DIGEST, "last_image": DIGEST, "height": 464},
            "last_image would be ignored by Wan's own program. Leave it, or backend, out.",
        ),
        ({"last_image": DIGEST}, "last_image would be ignored by wan-ti2v-5b. Leave it out."),
        (
            {"model": "wan-t2v-a14b", "guidance_scale": 5},
            "guidance 5 and 3: Wan's own program takes one for both experts. "
            "Write guidance_scale_2 5, too, or leave both out.",
        ),
        (
            {"model": "wan-t2v-a14b", "image": DIGEST},
            "image would be ignored by wan-t2v-a14b. Leave it out, or use a model that animates pictures.",
        ),
        (
            {"model": "wan-i2v-a14b", "image": DIGEST},
            "832x480 is not a size that Wan's own program makes of wan-i2v-a14b. "
            "Use one of 1280x720, 720x1280, 832x464, 480x832.",
        ),
        (
            {"model": "tiny-wan-ti2v"},
            "backend wan-cli does not run tiny-wan-ti2v. Leave backend out, or use one of Wan's models.",
        ),
        (
            {"model": "flux-dev"},
            "backend wan-cli does not run flux-dev. Leave backend out, or use one of Wan's models.",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_program_would_refuse_or_ignore_is_refused(written: dict[str, object], said: str) -> None:
    kind = {} if written.get("model") == "flux-dev" else {"kind": "video"}

    assert checked(**kind, **written) == [said]


def test_one_guidance_for_both_experts_is_taken() -> None:
    assert job(model="wan-t2v-a14b", guidance_scale=5, guidance_scale_2=5).guidance_scale == 5


# -- what the machine lacks --------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_its_authors() -> None:
    assert device_bytes(job(), TABLE["wan-ti2v-5b"]) == 22_900_000_000
    assert device_bytes(job(num_frames=9), TABLE["wan-ti2v-5b"]) == 22_900_000_000
    assert device_bytes(job(model="wan-t2v-a14b"), TABLE["wan-t2v-a14b"]) == 41_300_000_000
    assert device_bytes(job(model="wan-t2v-a14b", num_frames=121), TABLE["wan-t2v-a14b"]) > 46_000_000_000
    assert 31.3e9 < host_bytes(TABLE["wan-ti2v-5b"]) - 2.4 * GIB < 31.5e9
    assert 97e9 < host_bytes(TABLE["wan-t2v-a14b"]) - 2.4 * GIB < 98e9


def test_a_card_of_24_gb_beside_64_gb_of_ram_runs_the_5b() -> None:
    plan = plan_of(job(), card(23, 55))

    assert plan.rung == "Wan's own program, bf16, offload model, text encoders on the cpu"
    assert list(plan.predicted) == ["encode", "denoise", "decode"]
    assert plan.seconds is not None
    assert 200 < plan.seconds < 4_000
    assert "text encoders" not in plan_of(job(text_encoder_device="gpu"), card(23, 55)).rung


def test_its_seconds_are_those_that_were_measured() -> None:
    h100 = card(79, 200, (9, 0)).model_copy(update={"multiprocessors": 132, "clock_mhz": 1980})

    assert plan_of(job(), h100).seconds_per_step == pytest.approx(2.75, rel=0.1)


def test_what_a_laptop_lacks_is_told_all_at_once_with_what_would_do() -> None:
    with pytest.raises(DoesNotFit) as caught:
        plan_of(job(), card(14.8, 26))

    instead = "Wan's own program has no smaller way: leave backend out, and diffusers takes less."
    assert str(caught.value).splitlines() == [
        "wan-ti2v-5b: wan-ti2v-5b at 1280x704x121 by Wan's own program needs about 21.3 GiB of GPU memory on Some GPU. "
        f"14.8 GiB is free. {instead}",
        "wan-ti2v-5b: wan-ti2v-5b at 1280x704x121 by Wan's own program needs about 31.6 GiB of RAM. "
        f"26.0 GiB is free. {instead}",
    ]


def test_a_card_without_flash_attention_and_a_machine_without_a_card_are_refused() -> None:
    cpu = Machine(device="cpu", ram_total_bytes=GIB, ram_available_bytes=GIB, cpus=8)
    for machine, said in ((card(48, 200, (7, 5)), "flash_attn, which needs compute capability 8.0"), (cpu, "NVIDIA")):
        with pytest.raises(DoesNotFit, match=said):
            plan_of(job(), machine)


def test_submission_refuses_what_no_worker_could_run() -> None:
    with pytest.raises(InvalidJob, match="of RAM"):
        submit.refuse_hopeless([job()], [card(24, 31)], TABLE)

    assert submit.refuse_hopeless([job()], [card(24, 64)], TABLE) == []


def test_jobs_of_two_backends_are_two_shapes() -> None:
    specs = [job(), checked(backend=None, kind="video")]

    assert [shape.jobs for shape in submit.forecast(specs, card(24, 64), TABLE, NOTHING_LEARNED)] == [1, 1]


# -- where it is -------------------------------------------------------------------------------------------------------


def settings(tmp_path: Path, text: str) -> config.Config:
    file = tmp_path / "safelight.toml"
    file.write_text(text)
    return config.load({"HOME": str(tmp_path), "SAFELIGHT_CONFIG": str(file)})


def test_a_job_is_refused_where_the_settings_do_not_name_the_program(tmp_path: Path) -> None:
    there = settings(tmp_path, "")
    with pytest.raises(InvalidJob) as caught:
        wan_cli.refuse_unconfigured([job(), job(seed=2)], models.load(there), there)

    assert str(caught.value).replace(f"{tmp_path}/", "").splitlines() == [
        "backend wan-cli: safelight.toml does not say where Wan's own program is. "
        'Write checkout = "FOLDER" below [wan_cli], or leave backend out.',
        "backend wan-cli: safelight.toml does not say where Wan's own checkpoints of wan-ti2v-5b are. "
        'Write native = "FOLDER" below [models.wan-ti2v-5b], or leave backend out.',
    ]


SAID = '[wan_cli]\ncheckout = "Wan2.2"\n[models.wan-ti2v-5b]\nnative = "weights"\n'


def test_everything_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    there = settings(tmp_path, SAID)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").touch()
    wan_cli.refuse_unconfigured([job()], models.load(there), there)
    with pytest.raises(BadConfig) as caught:
        wan_cli.installed(models.load(there)["wan-ti2v-5b"], there)

    assert str(caught.value).replace(f"{tmp_path}/", "").splitlines() == [
        "Wan2.2 has no generate.py. Set [wan_cli] checkout to a clone of Wan-Video/Wan2.2.",
        "Wan2.2/.venv/bin/python is no Python. "
        "Set [wan_cli] python to that of the environment that has what Wan's own program needs.",
        "weights lacks models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl, Wan2.2_VAE.pth. "
        "Copy the checkpoints again, whole.",
    ]


def test_a_folder_in_the_layout_of_diffusers_is_told_as_such(tmp_path: Path) -> None:
    there = settings(tmp_path, SAID)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model_index.json").touch()
    with pytest.raises(BadConfig, match="weights is in the layout of diffusers"):
        wan_cli.installed(models.load(there)["wan-ti2v-5b"], there)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[wan_cli]\npython = "/usr/bin/python3"', "python is of no use without checkout"),
        (
            '[wan_cli]\ncheckout = "~nobody-here/Wan2.2"',
            "wan_cli.checkout = '~nobody-here/Wan2.2': it has no home folder",
        ),
        ('[wan_cli]\ncheckouts = "a"', "wan_cli.checkouts: no such setting. Did you mean wan_cli.checkout?"),
        ('[models.flux-dev]\nnative = "a"', "native names checkpoints for Wan's own program, which does not run"),
    ],
)
def test_wrong_settings_are_told(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        models.load(settings(tmp_path, text))

    assert said in str(caught.value)


def test_a_model_that_is_like_another_has_checkpoints_of_its_own(tmp_path: Path) -> None:
    table = models.load(settings(tmp_path, f'{SAID}[models.mine]\nlike = "wan-ti2v-5b"\n'))

    assert (table["wan-ti2v-5b"].native, table["mine"].native) == ("weights", "")


def test_doctor_says_what_is_missing_of_a_program_that_was_named(tmp_path: Path) -> None:
    there = settings(tmp_path, SAID)
    looks = [(found.look, found.says) for found in doctor._own_program(there, models.load(there))]

    assert {look for look, _ in looks} == {"fail"}
    assert len(looks) == 3
    assert all(says.startswith("wan-ti2v-5b: ") for _, says in looks)
    nowhere = settings(tmp_path, "")

    assert [*doctor._own_program(nowhere, models.load(nowhere))] == []


# -- as a person meets it ----------------------------------------------------------------------------------------------

OPTIONS = ("a red fox", "--model", "wan-ti2v-5b", "--backend", "wan-cli")


def test_plan_shows_what_it_takes_before_anything_is_set_up(installation: Installation) -> None:
    safelight = runner(installation)
    roomy = safelight("plan", *OPTIONS, "--vram", "24", "--ram", "64")
    tight = safelight("plan", *OPTIONS, "--vram", "16", "--ram", "64")

    assert roomy.exit_code == 0
    assert "  Wan's own program, bf16, offload model, text encoders on the cpu\n" in roomy.stdout
    assert "denoise  21.3 GiB of GPU memory, 31.6 GiB of RAM" in roomy.stdout
    assert tight.exit_code == InvalidJob.exit_code
    assert "by Wan's own program needs about 21.3 GiB of GPU memory" in tight.stdout


def test_add_queues_nothing_where_the_program_is_not_set_up(installation: Installation) -> None:
    refused = runner(installation)("add", *OPTIONS)

    assert refused.exit_code == InvalidJob.exit_code
    assert "does not say where Wan's own program is" in refused.stderr
    assert refused.stdout == ""
