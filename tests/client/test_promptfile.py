"""Prompt files: what each format means, and what each mistake is answered with."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safelight import config, models
from safelight.draft import ALIASES, Draft, parse_options, sweep
from safelight.errors import FAULTS_MAX, Fault, InvalidJob
from safelight.expand import expand
from safelight.jobspec import FIELDS
from safelight.promptfile import (
    JOBS_MAX,
    SUFFIXES,
    TABLE_BYTES_MAX,
    TEXT_BYTES_MAX,
    parse,
    parse_file,
)

SAMPLES = sorted(path for path in config.shipped("samples").iterdir() if path.is_file())


def drafts(name: str, text: str) -> list[Draft]:
    return parse(text.encode(), name)


def prompts(name: str, text: str) -> list[object]:
    return [draft.fields["prompt"] for draft in drafts(name, text)]


def faults(name: str, content: str | bytes) -> list[str]:
    with pytest.raises(InvalidJob) as caught:
        parse(content if isinstance(content, bytes) else content.encode(), name)
    return [str(fault) for fault in caught.value.faults]


# Text


def test_txt_is_one_job_a_line_without_comments_and_blank_lines() -> None:
    made = drafts("night.txt", "# foxes\na red fox\n\n   a blue fox  \n#a green fox\n")

    assert [(draft.fields, draft.where) for draft in made] == [
        ({"prompt": "a red fox"}, "night.txt:2"),
        ({"prompt": "a blue fox"}, "night.txt:4"),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_newlines_and_byte_order_mark_of_any_editor_are_read(newline: str, mark: str) -> None:
    assert prompts("n.txt", mark + newline.join(["one", "two", "", "zwei \u2028 drei"])) == [
        "one",
        "two",
        "zwei \u2028 drei",
    ]


def test_prompt_in_a_txt_is_not_read_as_anything_else() -> None:
    line = 'a "quoted" fox: 50% off -- and, #5 {a|b} <lora:x:0.8> --not an option, key: value'

    assert prompts("n.txt", line) == [line]


def test_front_matter_gives_every_line_its_defaults_which_options_override() -> None:
    text = "\n---\nmodel: flux-dev\nseed: 7\ncount: 2\n---\na fox\n--prompt a cat --seed 8\n"

    assert drafts("n.txt", text) == [
        Draft({"model": "flux-dev", "seed": "7", "prompt": "a fox"}, "n.txt:7", count=2),
        Draft({"model": "flux-dev", "seed": "8", "prompt": "a cat"}, "n.txt:8", count=2),
    ]


def test_prompt_in_the_front_matter_alone_is_the_prompt() -> None:
    assert drafts("n.txt", "---\nprompt: a red circle\ncount: 2\n---\n\n# nothing below\n") == [
        Draft({"prompt": "a red circle"}, "n.txt:2", count=2)
    ]
    assert drafts("n.txt", "---\nmatrix: {prompt: [a, b]}\n---\n") == [
        Draft({}, "n.txt:2", matrix={"prompt": ("a", "b")})
    ]


def test_prompt_in_the_front_matter_is_that_of_option_lines_without_one() -> None:
    assert drafts("n.txt", "---\nprompt: a fox\n---\n--seed 1\n--seed 2\n") == [
        Draft({"prompt": "a fox", "seed": "1"}, "n.txt:4"),
        Draft({"prompt": "a fox", "seed": "2"}, "n.txt:5"),
    ]


@pytest.mark.parametrize("line", ["a blue circle", "--prompt a blue circle", "--sweep prompt=a,b"])
@pytest.mark.parametrize("front", ["prompt: a fox", "matrix: {prompt: [a, b]}"])
def test_prompt_in_the_front_matter_and_below_it_is_one_fault(front: str, line: str) -> None:
    found = faults("n.txt", f"---\nseed: 5\n{front}\n---\n--seed 1\n{line}\n{line}\n")

    assert found == [
        "n.txt:3: there is a prompt in the front matter, and another at n.txt:6. "
        "Write both as lines below it, or keep one."
    ]


def test_markdown_is_one_prompt_with_its_line_breaks() -> None:
    made = drafts("fox.md", "---\nwidth: 512\n---\n\n# A fox\n\nin snow\n\n---\nat night\n")

    assert made == [Draft({"width": "512", "prompt": "# A fox\n\nin snow\n\n---\nat night"}, "fox.md")]


def test_markdown_without_front_matter_is_a_prompt() -> None:
    assert prompts("fox.md", "a fox\n") == ["a fox"]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("n.txt", "---\nwidth: 512\n", "n.txt: the front matter is never closed. End it with a line ---."),
        ("n.txt", "---\n\nstep: 4\n---\na fox", "n.txt:3: unknown key 'step'. Did you mean num_inference_steps?"),
        ("n.txt", "---\nwidth: 5\n\ncolour: 4\n---\na fox", "n.txt:4: unknown key 'colour'. Known: kind"),
        ("n.txt", "---\nmatrix:\n  width: [512]\n  steps: [1]\n---\na fox", "n.txt:4: unknown axis 'steps' in matrix."),
        ("n.txt", "---\n- a\n---\na fox", "n.txt: the front matter is no list of settings. Write name: value lines."),
        ("n.txt", "---\nwidth: 1\nwidth: 2\n---\na fox", "n.txt:3: 'width' is written twice. Keep one of them."),
        ("n.md", "---\nprompt: a\n---\nb", "n.md:2: the prompt is written twice, in the front matter and below it. "),
        ("n.txt", "\n# only a comment\n", "n.txt: there is no prompt in it. Write what the picture should show."),
    ],
)
def test_wrong_front_matter_names_its_line(name: str, text: str, fault: str) -> None:
    assert [each[: len(fault)] for each in faults(name, text)] == [fault]


# Option lines


def test_option_line_is_read_the_a1111_way() -> None:
    line = '--prompt "a red fox" --negative_prompt blur, noise --steps 20 --seed 7 --width 1024 --height 768 --n_iter 2'

    assert drafts("n.txt", line) == [
        Draft(
            {
                "prompt": "a red fox",
                "negative_prompt": "blur, noise",
                "num_inference_steps": "20",
                "seed": "7",
                "width": "1024",
                "height": "768",
            },
            "n.txt:1",
            count=2,
        )
    ]


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--prompt", "a", "red", "fox"], {"prompt": "a red fox"}),
        (["--prompt=--a fox", "--steps=4"], {"prompt": "--a fox", "num_inference_steps": "4"}),
        (["--prompt", "a -- b"], {"prompt": "a -- b"}),
        (["--seed", "1", "2", "3"], {"seed": "1,2,3"}),
        (["--seed", "-1"], {"seed": "-1"}),
        (["--size", "1280x704"], {"width": "1280", "height": "704"}),
        (["--cfg-scale", "4"], {"true_cfg_scale": "4"}),
        (["--distilled-cfg", "3.5"], {"guidance_scale": "3.5"}),
        (["--video-frames", "81", "--init-img", "a.png"], {"num_frames": "81", "image": "a.png"}),
        (["--text-encoder-device", "cpu"], {"text_encoder_device": "cpu"}),
    ],
)
def test_options_mean_the_fields_of_data(words: list[str], fields: dict[str, object]) -> None:
    assert parse_options(words, "add") == Draft(fields, "add")


def test_options_hold_controls_and_sweeps() -> None:
    words = ["--n", "3", "--expand", "all", "--wildcard-seed", "5", "--sweep", "steps=4,8", "--sweep", "cfg=1,2"]
    matrix = {"num_inference_steps": ("4", "8"), "true_cfg_scale": ("1", "2")}

    assert parse_options(words, "add") == Draft({}, "add", count=3, matrix=matrix, expand="all", wildcard_seed=5)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("--prompt a --setps 4", "unknown option '--setps'. Did you mean --steps?"),
        ("--prompt a --steps", "--steps has no value. Write --steps VALUE."),
        ("--prompt --steps 4", "--prompt has no value. Write --prompt VALUE."),
        ("--prompt a --steps 4 5", "--steps takes one value, not '4 5'. Put it in quotes, or keep one."),
        ("--prompt a --steps 4 --num_inference_steps 5", "num_inference_steps is written twice, the second time by"),
        ("--prompt a --size 4x", "size '4x' is not WIDTHxHEIGHT. Write it as 1280x704."),
        ("--prompt a --size 64x64 --width 5", "width is written twice, the second time by --width."),
        (
            "--prompt a fox's tail",
            "the options cannot be read: no closing quotation. Put text that holds an apostrophe",
        ),
        ("--prompt a --count many", "count 'many' is not a whole number."),
        ("--prompt a --sweep steps", "the sweep 'steps' has no values. Write it as steps=20,30,40."),
        ("--prompt a --sweep steps=1,2 --sweep num_inference_steps=3", "num_inference_steps is swept twice."),
        ("--prompt a --steps 4 --sweep steps=1,2", "num_inference_steps is written twice, once as an axis of matrix."),
    ],
)
def test_wrong_option_line_is_an_error_naming_its_line(line: str, fault: str) -> None:
    found = faults("n.txt", f"a fox\n{line}\n")

    assert [each[: len(fault) + 9] for each in found] == [f"n.txt:2: {fault}"]


def test_aliases_are_for_options_only() -> None:
    assert set(ALIASES.values()) <= {*FIELDS, "count"}
    assert not set(ALIASES) & set(FIELDS)
    assert faults("n.jsonl", '{"prompt": "a", "steps": 4}') == [
        "n.jsonl:1: unknown key 'steps'. Did you mean num_inference_steps?"
    ]


# Sweeps


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("steps=20,30,40", ("num_inference_steps", ("20", "30", "40"))),
        ("guidance=2, 3, .., 6", ("guidance_scale", ("2", "3", "4", "5", "6"))),
        ("guidance=0.1,0.2,...,0.5", ("guidance_scale", ("0.1", "0.2", "0.3", "0.4", "0.5"))),
        ("seed=5,3,..,-1,10", ("seed", ("5", "3", "1", "-1", "10"))),
        ("vae-tiling=on,off", ("vae_tiling", ("on", "off"))),
    ],
)
def test_sweep_is_an_axis_and_its_values(text: str, axis: tuple[str, tuple[object, ...]]) -> None:
    assert sweep(text) == axis


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "steps",
            "setps=1,2",
            "steps=",
            "steps=1,,2",
            "steps=..",
            "steps=1,..,5",
            "steps=1,2,..",
            "steps=1,1,..,5",
        ),
        *("steps=2,4,..,7", "steps=1,2,..,0", "steps=a,b,..,c", "seed=1,2,..,999999999", "steps=1,2,..,1e9"),
    ],
)
def test_sweep_that_means_nothing_exact_is_refused(text: str) -> None:
    with pytest.raises(InvalidJob, match="--sweep: "):
        sweep(text)


# Tables


def test_csv_names_its_columns_and_an_empty_cell_is_the_default() -> None:
    text = 'prompt,width,seed,count\n"a ""red"" fox, asleep",512,"1,2",\n\n"two\nlines",,,3\nshort\n'

    assert drafts("t.csv", text) == [
        Draft({"prompt": 'a "red" fox, asleep', "width": "512", "seed": "1,2"}, "t.csv:2"),
        Draft({"prompt": "two\nlines"}, "t.csv:4", count=3),
        Draft({"prompt": "short"}, "t.csv:6"),
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prompt,steps\na,4\n", "t.csv:1: unknown column 'steps'. Did you mean num_inference_steps?"),
        ("prompt,matrix\na,4\n", "t.csv:1: unknown column 'matrix'. Known: kind, model"),
        ("prompt,width,width\na\n", "t.csv:1: the column width is there twice. Keep one of them."),
        ("prompt;width\na;4\n", "t.csv:1: the columns are not separated by commas. Save it with commas."),
        ("prompt,width\na fox, asleep,4\n", "t.csv:2: 3 cells below 2 columns. Put text that holds a comma in double"),
        ('prompt\n"a fox\n', "t.csv:2: not CSV: unexpected end of data. Close every quote"),
        ("prompt,width\n", "t.csv: there is no prompt in it."),
    ],
)
def test_wrong_csv_names_its_line(text: str, fault: str) -> None:
    assert [each[: len(fault)] for each in faults("t.csv", text)] == [fault]


def test_jsonl_is_one_object_a_line() -> None:
    made = drafts("t.jsonl", '{"prompt": "a", "seed": [1, 2]}\n\n{"prompt": "b", "matrix": {"width": [512, 768]}}\n')

    assert made == [
        Draft({"prompt": "a", "seed": [1, 2]}, "t.jsonl:1"),
        Draft({"prompt": "b"}, "t.jsonl:3", matrix={"width": (512, 768)}),
    ]


def test_every_wrong_line_of_a_jsonl_is_named() -> None:
    text = '{"prompt": "a"\n["a"]\n{"prompt": "a", "prompt": "b"}\n{"prompt": NaN}\n{"prompt": "\\ud83d"}\n'

    assert [fault.split(": ")[0] for fault in faults("t.jsonl", text)] == [
        "t.jsonl:1",
        "t.jsonl:2",
        "t.jsonl:3",
        "t.jsonl",
    ]


# Documents

DOCUMENT = {
    "defaults": {"model": "flux-dev", "width": "512", "matrix": {"seed": ["1", "2"], "height": ["512", "768"]}},
    "jobs": [
        {"prompt": "a"},
        {"prompt": "b", "width": "768", "seed": "9"},
        {"prompt": "c", "matrix": {"width": ["256", "320"], "seed": ["3"]}, "expand": "all", "wildcard_seed": "4"},
    ],
}


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_document_has_defaults_and_jobs(suffix: str) -> None:
    """JSON is YAML; a job's own value replaces a default axis and a job's own axis a default value."""
    made = drafts(f"n.{suffix}", json.dumps(DOCUMENT, indent=1))
    seeds, heights = ("1", "2"), ("512", "768")

    assert [(draft.fields, draft.matrix) for draft in made] == [
        ({"model": "flux-dev", "width": "512", "prompt": "a"}, {"seed": seeds, "height": heights}),
        ({"model": "flux-dev", "width": "768", "prompt": "b", "seed": "9"}, {"height": heights}),
        ({"model": "flux-dev", "prompt": "c"}, {"seed": ("3",), "height": heights, "width": ("256", "320")}),
    ]
    assert (made[2].expand, made[2].wildcard_seed) == ("all", 4)
    assert [draft.where for draft in made] == [f"n.{suffix}:{line}" for line in (17, 20, 25)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.yaml", "- prompt: a\n- prompt: b\n"),
        ("n.json", '[{"prompt": "a"}, {"prompt": "b"}]'),
        ("n.yaml", "jobs:\n- {prompt: a}\n- {prompt: b}\n"),
    ],
)
def test_plain_list_of_jobs_is_a_document(name: str, text: str) -> None:
    assert prompts(name, text) == ["a", "b"]


@pytest.mark.parametrize(("name", "text"), [("n.yaml", "prompt: a"), ("n.json", '{"prompt": "a"}')])
def test_single_job_is_a_document(name: str, text: str) -> None:
    assert prompts(name, text) == ["a"]


def test_yaml_scalars_are_the_text_that_was_written() -> None:
    text = (
        "prompt: no\nvae_tiling: on\nseed: 010\nnegative_prompt: 1.50\nnot_before: 2026-11-23 06:00:00\nprompt_2: ~\n"
    )
    fields = {"prompt": "no", "vae_tiling": "on", "seed": "010", "negative_prompt": "1.50"}

    assert drafts("n.yaml", text)[0].fields == {**fields, "not_before": "2026-11-23 06:00:00"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: &x [*x]\n", "n.yaml:1: the alias '*x' is not taken."),
        ("a: &a [1]\nb: *a\n", "n.yaml:2: the alias '*a' is not taken."),
        ("prompt: !!python/object/apply:os.system [id]\n", "n.yaml:1: the tag 'tag:yaml.org,2002:python/object/apply:"),
        ("prompt: a\nprompt: b\n", "n.yaml:2: 'prompt' is written twice."),
        ("prompt: a\n---\nprompt: b\n", "n.yaml:2: a second document starts here."),
        ("prompt: a fox: red\n", "n.yaml:1: not YAML: mapping values are not allowed"),
        ("jobs:\n- prompt: a\n\tseed: 1\n", "n.yaml:3: not YAML: "),
        ("? [a]\n: b\n", "n.yaml:1: a key is not a word."),
        ("[" * 500 + "]" * 500, "n.yaml:1: nested more than 10 deep."),
        ("jobs: {prompt: a}\n", "n.yaml:1: there is no list of jobs."),
        ("just words\n", "n.yaml: there is no list of jobs."),
        ("jobs: [a fox]\n", "n.yaml:1: this job is not a mapping."),
        ("defaults: [1]\njobs: [{prompt: a}]\n", "n.yaml:1: defaults is not a mapping."),
        ("width: 512\njobs: [{prompt: a}]\n", "n.yaml:1: unknown key 'width' beside jobs. Move it into defaults."),
        ("- prompt: a\n- prompt: b\n  witdh: 5\n", "n.yaml:3: unknown key 'witdh'. Did you mean width?"),
        ("prompt: a\nmatrix: [1]\n", "n.yaml:2: matrix is not a mapping."),
        (
            "prompt: a\nmatrix: {steps: [1]}\n",
            "n.yaml:2: unknown axis 'steps' in matrix. Did you mean num_inference_steps?",
        ),
        ("prompt: a\nmatrix: {width: []}\n", "n.yaml:2: the axis width has no list of values."),
        ("prompt: a\nmatrix: {width: [[1]]}\n", "n.yaml:2: a value of the axis width is not text or a number."),
        ("prompt: a\nwidth: 1\nmatrix: {width: [1]}\n", "n.yaml:2: width is written twice, once as an axis of matrix."),
        ("prompt: a\nexpand: some\n", "n.yaml:2: expand 'some' is not random or all."),
        ("jobs:\n- prompt: a\n-\n  - b\n- prompt: c\n", "n.yaml:4: this job is not a mapping."),
        ("width: 5\njobs:\n", "n.yaml:1: unknown key 'width' beside jobs."),
        ("jobs:\n- prompt: a\nsize: 5\n", "n.yaml:3: unknown key 'size' beside jobs."),
        ("jobs:\n- prompt: a\n  seed: 1\n  count: x\n", "n.yaml:4: count 'x' is not a whole number."),
        ("defaults:\n  seed: 1\n  setps: 4\njobs:\n- prompt: a\n", "n.yaml:3: unknown key 'setps'."),
        ("jobs:\n", "n.yaml: there is no prompt in it."),
        ("", "n.yaml: there is no prompt in it."),
        ("a: \x07", "n.yaml: not YAML: unacceptable character"),
    ],
)
def test_wrong_yaml_names_its_line(text: str, fault: str) -> None:
    assert [each[: len(fault)] for each in faults("n.yaml", text)] == [fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"prompt": "a",\n "seed": 1,\n "seed": 2}', "n.json:3: 'seed' is written twice."),
        ('{"jobs": [\n{"prompt": "}{"},\n{"promt": "b"}]}', "n.json:3: unknown key 'promt'. Did you mean prompt?"),
        (
            '{"jobs": [\n{"prompt": "a"},\n{"loras": ["[{", {"name": [\n1]}]},\n{"tags": [\n"a"\n,"b"]}\n,\n3]}',
            "n.json:9: this job is",
        ),
        ('[\n{"prompt": "a"},\n"a fox"]', "n.json:3: this job is not a mapping."),
        ('{"prompt": "a",\n "matrix": {"width": [64],\n"colour"\n:[1]}}', "n.json:3: unknown axis 'colour' in matrix."),
        ('{"prompt": "\\"a:",\n "tags": ["x",\n"y"], "colour":\n1}', "n.json:3: unknown key 'colour'. Known: kind"),
        ('{"prompt": "a",\n "seed" 7}', "n.json:2: not JSON: "),
        ('{"seed": Infinity}', "n.json: not JSON: Infinity is no number."),
        ('{"seed": ' + "1" * 5000 + "}", "n.json: not JSON: Exceeds the limit"),
        ("[" * 200_000, "n.json: nested far too deep."),
    ],
)
def test_wrong_json_names_its_line(text: str, fault: str) -> None:
    assert [each[: len(fault)] for each in faults("n.json", text)] == [fault]


# Any file


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("a fox".encode("utf-16"), "it is UTF-16 text. Save it as UTF-8."),
        ("a fox".encode("utf-16-be"), "byte 0 is NUL, so it is no text. Save it as UTF-8."),
        (b"a f\xf6x", "byte 3 is not UTF-8. Save it as UTF-8."),
        (b"\xef\xbb\xbfa f\xf6x", "byte 6 is not UTF-8. Save it as UTF-8."),
        (b"\x89PNG\r\n\x1a\n\x00", "byte 8 is NUL, so it is no text. Save it as UTF-8."),
    ],
)
def test_what_is_no_utf_8_text_is_refused_with_the_byte(suffix: str, content: bytes, fault: str) -> None:
    assert faults(f"n{suffix}", content) == [f"n{suffix}: {fault}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_that_is_too_large_is_refused(suffix: str) -> None:
    limit = TEXT_BYTES_MAX if suffix in (".txt", ".md") else TABLE_BYTES_MAX

    assert faults(f"n{suffix}", b"#" * (limit + 1)) == [
        f"n{suffix}: it is larger than {limit >> 20} MiB. Split it into several files."
    ]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("n.txt", "a\n" * (JOBS_MAX + 1), f"n.txt: it holds more than {JOBS_MAX:,} jobs."),
        ("n.jsonl", "1\n" * 9999, f"n.jsonl: it has more than {FAULTS_MAX:,} faults and was not read further."),
        ("n.csv", "a," * 9999, f"n.csv:1: it has more than {FAULTS_MAX:,} faults and was not read further."),
        ("n.json", json.dumps({str(n): n for n in range(999)}), "n.json:1: it has 999 keys. At most 100."),
        (
            "n.json",
            json.dumps({"matrix": {str(n): n for n in range(999)}}),
            "n.json:1: matrix has 999 axes.",
        ),
        ("n.txt", "--prompt " + "a" * 100_000, "n.txt:1: the options are 100,009 characters long. At most 100,000."),
        ("n.yaml", "!" * 9_000_000, f"n.yaml:1: the tag 'tag:yaml.org,2002:{'!' * 58}... is not taken."),
    ],
)
def test_file_made_to_waste_time_is_given_up_early(name: str, text: str, fault: str) -> None:
    found = faults(name, text)

    assert found[-1].startswith(fault)
    assert len(found) <= FAULTS_MAX + 1


def test_file_of_another_kind_is_refused_naming_the_kinds() -> None:
    assert faults("fox.docx", "a fox") == [f"fox.docx: .docx is no prompt file. Known: {', '.join(SUFFIXES)}."]


def test_all_faults_of_a_file_are_told_at_once() -> None:
    assert [fault.split(": ")[0] for fault in faults("n.txt", "--a 1\na fox\n--b 2\n--prompt a --steps\n")] == [
        "n.txt:1",
        "n.txt:3",
        "n.txt:4",
    ]


def test_file_on_disk_is_read_and_named(tmp_path: Path) -> None:
    (tmp_path / "night.txt").write_text("a fox")

    assert [draft.where for draft in parse_file(tmp_path / "night.txt")] == [f"{tmp_path}/night.txt:1"]


@pytest.mark.parametrize("name", ["gone.txt", "folder.txt", "nul\0.txt"])
def test_file_that_cannot_be_read_is_an_invalid_job(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.txt").mkdir()

    with pytest.raises(InvalidJob, match="Name a prompt file that can be read"):
        parse_file(tmp_path / name)


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.name for sample in SAMPLES])
def test_sample_makes_jobs(sample: Path, tmp_path: Path) -> None:
    specs = expand(
        parse_file(sample),
        models.load(),
        config.load({"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}),
        submission="20261122-213105-417c0de",
        now=datetime(2026, 11, 22, 21, 31).astimezone(),
        batch=sample.stem,
        store_image=str,
        wildcards=sample.with_name("wildcards"),
        max_jobs=100,
    )

    assert specs
    assert all("__" not in spec.prompt for spec in specs)


def test_a_sample_draws_from_the_wildcard_file_beside_it() -> None:
    (season,) = config.shipped("samples").joinpath("wildcards").iterdir()

    assert f"__{season.stem}__" in config.shipped("samples").joinpath("seasons.txt").read_text()


def test_there_is_a_sample_of_each_kind() -> None:
    assert {sample.suffix for sample in SAMPLES} == {".txt", ".md", ".yaml", ".csv", ".jsonl"}


PIECES = [
    *("---", "--- ", "prompt: a", "--prompt ", '"', "jobs:", "- ", "defaults:", "  ", "matrix: {seed: [1, 2]}"),
    *("prompt,seed", "a,b", '{"prompt": "a"}', "[", "]", "{", "}", '"jobs": ', ", ", "--sweep steps=1,2,..,9 "),
    *("count: 2", "seed: -1", "# x"),
]
TEXTS = st.text(st.sampled_from("ab:-#{}[]|,\"'\n\r\t \\=&*!?%<>~$_.0159ä\u2028"), max_size=200) | st.lists(
    st.sampled_from([*PIECES, *(f"{piece}\n" for piece in PIECES)]), max_size=12
).map("".join)


def outcome(content: bytes, name: str) -> list[Draft] | tuple[Fault, ...]:
    try:
        return parse(content, name)
    except InvalidJob as error:
        return error.faults


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(st.binary(max_size=200) | TEXTS.map(str.encode))
@example(b"---\n---")
@example(b"--- \n\n\n--- \n")
@example(b"  ---\na\n---")
@example(b"\xef\xbb\xbf")
def test_any_bytes_are_drafts_or_readable_faults(suffix: str, content: bytes) -> None:
    name = f"n{suffix}"
    made = outcome(content, name)

    assert made
    for each in made:
        if isinstance(each, Draft):
            assert each.where.startswith(name)
            assert each.fields.keys() | each.matrix.keys() <= FIELDS.keys()
        else:
            assert each.where.startswith(name)
            assert each.problem
            assert each.remedy
