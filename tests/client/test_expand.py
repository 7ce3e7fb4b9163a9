"""Drafts into jobs: templates, matrix, seeds and count, and the same again for the same submission."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight import config, models, promptfile
from safelight.commands.adding import sources_of_files
from safelight.draft import Draft
from safelight.errors import FAULTS_MAX, Fault, InvalidJob, in_order
from safelight.expand import expand
from safelight.jobspec import FIELDS, SEED_MAX, JobSpec
from safelight.sizes import KeptPicture, Size
from safelight.wildcards import COUNT_CEILING, DEPTH_MAX, Wildcards

TABLE = models.load()
CONFIG = config.load({"HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"})
NOW = datetime(2026, 11, 22, 21, 31, 5, tzinfo=timezone(timedelta(hours=1)))
SUBMISSION = "20261122-203105-417c0de"
DIGEST = "ab" * 32
KEPT = KeptPicture(DIGEST, Size(1280, 704))


def expanded(*drafts: Draft, wildcards: Path = Path("/nonexistent"), **changed: Any) -> list[JobSpec]:
    arguments: dict[str, Any] = {
        "submission": SUBMISSION,
        "now": NOW,
        "batch": "night",
        "store_image": lambda name: KEPT,
        "wildcards": wildcards,
        "max_jobs": 1000,
    }
    return expand(drafts, TABLE, CONFIG, **{**arguments, **changed})


def faults(*drafts: Draft, **changed: Any) -> list[str]:
    with pytest.raises(InvalidJob) as caught:
        expanded(*drafts, **changed)
    return [str(fault) for fault in caught.value.faults]


def draft(
    prompt: object = "a fox", where: str = "n.txt:1", *, fields: Mapping[str, object] | None = None, **changed: Any
) -> Draft:
    return Draft({"prompt": prompt, **(fields or {})}, where, **changed)


# Numbers and defaults


def test_jobs_are_numbered_in_the_order_of_the_file() -> None:
    specs = expanded(draft("a", count=2), draft("b"))

    assert [(spec.id, spec.index, spec.prompt) for spec in specs] == [
        (f"{SUBMISSION}-00001", 1, "a"),
        (f"{SUBMISSION}-00002", 2, "a"),
        (f"{SUBMISSION}-00003", 3, "b"),
    ]


def test_moment_of_submission_has_its_zone() -> None:
    assert expanded(draft())[0].submitted_at == "2026-11-22T21:31:05+01:00"
    assert expanded(draft(), now=NOW.astimezone(UTC))[0].submitted_at == "2026-11-22T20:31:05+00:00"


def test_folder_gives_batch_and_priority_which_the_job_overrides() -> None:
    own = {"batch": "mine", "priority": "low"}
    specs = expanded(draft(), draft(fields=own), draft(fields={"batch": None, "priority": None}), priority="high")

    assert [(spec.batch, spec.priority) for spec in specs] == [("night", "high"), ("mine", "low"), ("night", "high")]


def test_job_without_a_model_gets_the_configured_one() -> None:
    assert [spec.model for spec in expanded(draft(), draft(fields={"kind": "video"}))] == [
        CONFIG.settings.defaults.image_model,
        CONFIG.settings.defaults.video_model,
    ]


# Seeds


def test_image_i_of_a_count_has_the_seed_plus_i() -> None:
    assert [spec.seed for spec in expanded(draft(fields={"seed": "40"}, count=3))] == [40, 41, 42]


@pytest.mark.parametrize("seed", [None, -1, "-1"])
def test_random_seed_is_drawn_once_and_counts_up(seed: object) -> None:
    first, second, other = (spec.seed for spec in expanded(draft(fields={"seed": seed}, count=2), draft()))

    assert second == first + 1
    assert other not in (first, second)


@pytest.mark.parametrize("seeds", [[7, 9], ["7", "9"], "7,9", "7 9", (7, 9)])
def test_each_seed_of_a_list_is_a_job(seeds: object) -> None:
    assert [spec.seed for spec in expanded(draft(fields={"seed": seeds}, count=2))] == [7, 8, 9, 10]


def test_random_seeds_fit_whatever_the_count() -> None:
    for submission in range(10):
        assert max(spec.seed for spec in expanded(draft(count=1000), submission=str(submission))) <= SEED_MAX


@pytest.mark.parametrize(
    ("fields", "count", "fault"),
    [
        ({"seed": SEED_MAX}, 2, f"seed {SEED_MAX} with count 2 goes beyond {SEED_MAX}. Lower one of them."),
        ({"seed": SEED_MAX + 1}, 9, f"seed {SEED_MAX + 1} is outside 0 to {SEED_MAX}. Use {SEED_MAX}."),
        ({"seed": -5}, 9, f"seed -5 is outside 0 to {SEED_MAX}. Use 0."),
        ({"seed": "x"}, 9, "seed 'x' is not a whole number. Write it in digits."),
        ({"seed": True}, 9, "seed 'True' is not a whole number. Write it in digits."),
        ({"seed": "1,,2"}, 1, "seed '' is not a whole number. Write it in digits."),
        ({"seed": []}, 1, "the list of seeds is empty. Write some, or leave it out."),
        ({}, 0, "count 0 makes no job. Write 1 or more."),
    ],
)
def test_seed_that_cannot_be_used_is_one_fault(fields: dict[str, object], count: int, fault: str) -> None:
    assert faults(draft(fields=fields, count=count)) == [f"n.txt:1: {fault}"]


# Matrix


def test_matrix_is_every_combination_with_its_axes() -> None:
    specs = expanded(draft(matrix={"num_inference_steps": ("2", 4), "width": (512, "768")}, fields={"seed": 1}))

    assert [(spec.num_inference_steps, spec.width, spec.axes) for spec in specs] == [
        (steps, width, {"num_inference_steps": steps, "width": width}) for steps in (2, 4) for width in (512, 768)
    ]


def test_cells_of_a_matrix_share_seed_and_words() -> None:
    """Cells differ in their axes alone, so that a person can compare them."""
    template = "a {red|green|blue|white|black} fox"
    specs = expanded(draft(template, matrix={"num_inference_steps": (1, 2, 3)}, count=4))

    assert len(specs) == 12
    for i in range(4):
        assert len({(spec.prompt, spec.seed) for spec in specs[i::4]}) == 1
    assert len({spec.prompt for spec in specs}) > 1


def test_axis_of_seeds_replaces_the_seed_and_records_the_drawn_one() -> None:
    specs = expanded(draft(matrix={"seed": (5, -1), "width": (512, 768)}))

    assert [spec.seed for spec in specs[:2]] == [5, 5]
    assert specs[2].seed == specs[3].seed == specs[3].axes["seed"]


def test_axis_of_prompts_keeps_the_written_prompt() -> None:
    specs = expanded(draft(matrix={"prompt": ("a {red|blue} fox", "a cat")}))

    assert [spec.axes for spec in specs] == [{"prompt": "a {red|blue} fox"}, {"prompt": "a cat"}]
    assert [spec.template for spec in specs] == ["a {red|blue} fox", None]


def test_axis_of_pictures_names_the_picture() -> None:
    (spec,) = expanded(draft(matrix={"image": ("a.png",)}))

    assert (spec.image, spec.axes) == (DIGEST, {"image": "a.png"})


# Templates


def test_template_is_kept_when_it_changed_the_prompt() -> None:
    (drawn,) = expanded(draft("a {red|red} fox"))
    (escaped,) = expanded(draft(r"a \{red\} fox"))

    assert (drawn.prompt, drawn.template) == ("a red fox", "a {red|red} fox")
    assert (escaped.prompt, escaped.template) == ("a {red} fox", r"a \{red\} fox")


PLAIN = [
    "a fox (masterpiece:1.2), [blurry], 50% off, #5, $$ :: $5, <ink:0.8>",
    "snake_case, a __ b, ____, _x_, https://example.org/a//b /* no comment */",
    r"\(fox\), back\slash, 'quotes' \"both\"",
    "a | b :: c; d -- e",
    "狐狸，雪 🦊 \u200d",
]


@pytest.mark.parametrize("prompt", PLAIN)
@pytest.mark.parametrize("mode", ["random", "all"])
def test_plain_text_passes_through_unchanged(prompt: str, mode: str) -> None:
    (spec,) = expanded(draft(prompt, expand=mode))

    assert (spec.prompt, spec.template) == (prompt, None)


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("fox{ in snow|}", ["fox in snow", "fox"]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("{2$$a|b|c}", ["a,b", "a,c", "b,a", "b,c", "c,a", "c,b"]),
        ("{1-2$$ and $$a|b}", ["a", "b", "a and b", "b and a"]),
        ("{-1$$a|b}", ["a", "b"]),
        ("{2-$$a|b}", ["a,b", "b,a"]),
        ("{0.5::a|2::b|.5::c}", ["a", "b", "c"]),
        ("{a::b|c}", ["a::b", "c"]),
        ("{(a:1.2)|$5|#7|50%|c // d}", ["(a:1.2)", "$5", "#7", "50%", "c // d"]),
        (r"{a\|b|\{c\}}", ["a|b", "{c}"]),
        ("{a|a|b}", ["a", "b"]),
        (r"\__init__ {a|b}", ["__init__ a", "__init__ b"]),
    ],
)
def test_expand_all_makes_a_job_of_every_text(template: str, texts: list[str]) -> None:
    assert [spec.prompt for spec in expanded(draft(template, expand="all"))] == texts


def test_weights_decide_how_often_an_option_is_drawn() -> None:
    template = Wildcards(Path("/nonexistent")).compile("{0.5::a|2::b|c}", "x")
    drawn = Counter(template.draw(Random(i)) for i in range(7000))

    assert {text: round(times / 2000, 1) for text, times in drawn.items()} == {"a": 0.5, "b": 2.0, "c": 1.0}


def test_picks_are_different_and_weighted() -> None:
    template = Wildcards(Path("/nonexistent")).compile("{2$$a|b|8::c}", "x")
    drawn = Counter(template.draw(Random(i)) for i in range(4000))

    assert set(drawn) == {"a,b", "a,c", "b,a", "b,c", "c,a", "c,b"}
    assert (drawn["c,a"] + drawn["c,b"]) / 4000 == pytest.approx(0.8, abs=0.03)


def test_other_texts_are_templates_too() -> None:
    fields: dict[str, object] = {
        "model": "flux-dev",
        "true_cfg_scale": 4,
        "negative_prompt": "{x|y}",
        "prompt_2": "{p|q}",
    }
    specs = expanded(draft("{a|b}", fields=fields, expand="all"))

    assert len({(spec.prompt, spec.prompt_2, spec.negative_prompt) for spec in specs}) == len(specs) == 8


@pytest.mark.filterwarnings("ignore:.*delimited_list:DeprecationWarning")  # dynamicprompts with pyparsing 3.3
@pytest.mark.parametrize(
    "template",
    [
        *("{a|b|c}", "{a|b}-{c|d}", "{a|{b|c}}", "{2$$a|b|c}", "{2$$ + $$a|b|c}", "{1-2$$a|b}", "{-2$$a|b}", "{a|}"),
        *("{2-$$a|b|c}", "{0-1$$a|b}", "{2::a|b}", "{2$$a|b|{c|d}}", "x {|a} y", "__colour__ fox", "{2$$__colour__}"),
        *("__c*__", "__sub/nested__", "{__colour__|white}"),
    ],
)
def test_templates_mean_what_they_mean_to_dynamicprompts(template: str, wildcard_folder: Path) -> None:
    from dynamicprompts.generators import CombinatorialPromptGenerator
    from dynamicprompts.wildcards import WildcardManager

    theirs = CombinatorialPromptGenerator(WildcardManager(wildcard_folder)).generate(template, 100)
    ours = Wildcards(wildcard_folder).compile(template, "x").every()

    assert sorted(ours) == sorted(theirs)


# Wildcards


@pytest.fixture
def wildcard_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "wildcards"
    (folder / "sub").mkdir(parents=True)
    (folder / "colour.txt").write_text("# of foxes\nred\n\n  blue  \nred\n")
    (folder / "sub" / "nested.txt").write_text("{very|} __colour__\n")
    return folder


def test_wildcard_draws_from_its_file(wildcard_folder: Path) -> None:
    specs = expanded(draft("__colour__, __sub/nested__", expand="all"), wildcards=wildcard_folder)

    assert [spec.prompt for spec in specs][:4] == ["red, very red", "red, very blue", "red,  red", "red,  blue"]
    assert {spec.template for spec in specs} == {"__colour__, __sub/nested__"}


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (
            "__color__",
            "there is no wildcard __color__. Did you mean __colour__? Write \\__color__ for the text itself.",
        ),
        ("__xyz__", "there is no wildcard __xyz__. Known: __colour__, __sub/nested__. Write"),
        ("__~colour__", "there is no wildcard __~colour__."),
        ("__../secret__", "there is no wildcard __../secret__."),
        ("__x*__", "there is no wildcard __x*__."),
        ("a {b", "the brace { at column 3 is never closed. Close it, or write \\{ for the brace itself."),
        ("a {b|{c}", "the brace { at column 6 offers no choice."),
        ("a } b", "the brace } at column 3 closes nothing. Write \\} for the brace itself."),
        ('{"a": 1}', "the brace { at column 1 offers no choice. Separate options by |, or write \\{ for the brace"),
        ("{3$$a|b}", "the brace { at column 1 asks for 3 of 2 options. Ask for no more than there are."),
        ("{3$$__colour__}", "the brace { at column 1 asks for 3 of 2 options."),
        ("{2-1$$a|b}", "the brace { at column 1 asks for 2 to 1 of 2 options."),
        ("{0::a|b}", "the brace { at column 1 has an option of weight 0. Leave the option out."),
        ("${x=!{a|b}} ${x}", "'${x=' at column 1 is a part of dynamicprompts that is not taken."),
        ("{@a|b}", "'{@' at column 1 is a part of dynamicprompts that is not taken."),
        ("%{a $$ b}", "'%{a $$' at column 1 is a part of dynamicprompts that is not taken."),
        ("{" * 60 + "a|b" + "}" * 60, f"its choices are nested more than {DEPTH_MAX} deep."),
    ],
)
def test_template_that_means_nothing_is_a_fault_and_never_text(prompt: str, fault: str, wildcard_folder: Path) -> None:
    found = faults(draft(prompt), wildcards=wildcard_folder)

    assert any(each.startswith(f"n.txt:1: {fault}") for each in found), found


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"a\n__x__\n", "x.txt:2: a wildcard contains itself: __x__ -> __x__."),
        (b"a\n{b\n", "x.txt:2: the brace { at column 1 is never closed."),
        (b"__gone__\n", "x.txt:1: there is no wildcard __gone__."),
        (b"a\xff", "x.txt: byte 1 is not UTF-8."),
        (b"# nothing\n", "n.txt:1: the wildcard __x__ has no values."),
    ],
)
def test_fault_in_a_wildcard_file_names_its_line_once(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    found = faults(draft("__x__ and {a|__x__}", count=3), wildcards=tmp_path)

    assert [each.removeprefix(f"{tmp_path}/")[: len(fault)] for each in found] == [fault]


def test_wildcards_that_contain_each_other_are_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n{y|__b__}")
    (tmp_path / "b.txt").write_text("__a__")

    (fault,) = faults(draft("__a__"), wildcards=tmp_path)
    assert "a wildcard contains itself: __a__ -> __b__ -> __a__" in fault


def test_links_in_the_wildcard_folder_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "wildcards"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "x.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "out").symlink_to(tmp_path)

    assert "cannot be read" in faults(draft("__x__"), wildcards=folder)[0]
    assert "there is no wildcard __out/secret__" in faults(draft("__out/secret__"), wildcards=folder)[0]


def test_wildcards_that_would_swell_are_refused_quickly(tmp_path: Path) -> None:
    """Twenty files that each name the one below twice stand for a text of a million words."""
    (tmp_path / "w0.txt").write_text("word")
    for n in range(1, 21):
        (tmp_path / f"w{n}.txt").write_text(f"__w{n - 1}__ __w{n - 1}__")

    assert "can become longer than" in faults(draft("__w20__"), wildcards=tmp_path)[0]


# Limits


@pytest.mark.parametrize(
    ("drafts", "jobs"),
    [
        ([draft(count=1001)], "1,001"),
        ([draft(count=10**9)], "1,000,000,000"),
        ([draft("{a|b}" * 11, expand="all")], "2,048"),
        ([draft("{a|b}" * 100, expand="all")], f"{COUNT_CEILING:,}"),
        ([draft("{9$$1|2|3|4|5|6|7|8|9}", expand="all")], "362,880"),
        ([draft(matrix={"seed": tuple(range(600)), "width": (512, 768)})], "1,200"),
        ([draft("{a|b}", matrix={"prompt": ("{a|b|c}", "d")}, expand="all", count=251)], "1,004"),
        ([draft(where=f"n.txt:{n}") for n in range(1, 1002)], "1,001"),
    ],
)
def test_more_jobs_than_allowed_is_one_fault_that_says_how_many(drafts: list[Draft], jobs: str) -> None:
    where = "n.txt" if len(drafts) > 1 else "n.txt:1"

    assert faults(*drafts) == [
        f"{where}: it makes {jobs} jobs, and 1,000 are allowed at once. Ask for fewer, or split the file."
    ]


def test_as_many_jobs_as_allowed_are_made() -> None:
    assert len(expanded(draft("{a|b}" * 3, expand="all", count=125))) == 1000


def test_all_faults_are_told_at_once_and_each_once() -> None:
    wrong = draft("a {fox", where="n.txt:1", fields={"width": 5}, matrix={"num_inference_steps": (99, 98)}, count=50)

    assert [fault.split(". ")[0] for fault in faults(wrong, draft(), draft("", where="n.txt:3"))] == [
        "n.txt:1: the brace { at column 3 is never closed",
        "n.txt:1: width 5 is not a multiple of 16",
        "n.txt:1: num_inference_steps 99 is outside 1 to 8",
        "n.txt:1: num_inference_steps 98 is outside 1 to 8",
        "n.txt:3: the prompt is empty",
    ]


# Where it is written


def told_of(text: str, name: str = "n.txt", **changed: Any) -> list[str]:
    """Return what a person is told of a wrong prompt file."""
    with pytest.raises(InvalidJob) as caught:
        expanded(*promptfile.parse(text.encode(), name), **{"store_image": refuse, **changed})
    return [str(fault) for fault in in_order(caught.value.faults)]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("n.txt", "---\nmodel: flux-dev\n\nheight: 100\n---\na fox\na cat\n", ["n.txt:4: height 100"]),
        ("n.txt", "---\nmatrix:\n  seed: [1]\n  width: 512, 5\n---\na fox\n", ["n.txt:4: width 5"]),
        ("n.txt", "---\nheight: 5\n---\n--prompt a --height 7\nb\n", ["n.txt:2: height 5", "n.txt:4: height 7"]),
        ("n.txt", "---\ncount: 0\n---\na\nb\n", ["n.txt:2: count 0 makes no job"]),
        ("n.txt", "---\nfps: 16\n---\n--prompt a --model flux-dev\n", ["n.txt:4: fps means nothing to flux-dev"]),
        ("n.txt", "---\nprompt_2: '{x'\n---\na\nb\n", ["n.txt:2: the brace {"]),
        ("n.txt", "---\nimage: gone.png\nmodel: wan-ti2v-5b\n---\na\nb\n", ["n.txt:2: image gone.png: there is no"]),
        ("n.md", "---\nseed: 5\nwidth: 5\n---\na fox\n", ["n.md:3: width 5"]),
        ("n.md", "---\nseed: 5\n---\n\na fox {\n", ["n.md:5: the brace {"]),
        ("n.yaml", "- prompt: a\n  model: flux-dev\n  matrix:\n    width: [512, 5]\n", ["n.yaml:4: width 5"]),
        ("n.yaml", "defaults:\n  width: 5\njobs:\n- prompt: a\n  height: 7\n", ["n.yaml:2: width", "n.yaml:5: height"]),
        ("n.json", '[{"prompt": "a",\n"loras": "x:99",\n"seed": -9}]', ["n.json:2: LoRA x", "n.json:3: seed -9"]),
        ("n.csv", "prompt,width\na,512\nb,5\n", ["n.csv:3: width 5"]),
        ("n.jsonl", '{"prompt": "a"}\n{"prompt": "b", "width": 5}', ["n.jsonl:2: width 5"]),
    ],
)
def test_a_wrong_value_is_told_where_it_is_written(name: str, text: str, told: list[str]) -> None:
    found = told_of(text, name)

    assert [fault[: len(start)] for fault, start in zip(found, told, strict=True)] == told


def test_a_wrong_value_that_many_prompts_inherit_is_one_line_of_the_report() -> None:
    assert told_of("---\nmodel: flux-dev\n\nheight: 600\n---\n" + "a fox\n" * 999) == [
        "n.txt:4: height 600 is not a multiple of 16 (for lines 6, 7, 8, 9, 10 and 994 more). Use 592 or 608."
    ]


def test_an_inherited_value_that_is_wrong_for_some_prompts_names_them() -> None:
    text = "---\nmodel: flux-dev\nstrength: 0.5\n---\n--prompt a --image a.png\nb\n--prompt c --image a.png\nd\n"

    assert told_of(text, store_image=lambda name: KEPT) == [
        "n.txt:3: strength would be ignored without an image (for lines 6, 8). Add image: NAME, or leave it out."
    ]


def test_what_the_command_line_says_is_not_told_of_a_line_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_text("---\nnum_inference_steps: 4\nwidth: 5\n---\na fox\na cat\n")
    (source,) = sources_of_files([tmp_path / "n.txt"], {"batch": None}, ("steps=4,999",))

    with pytest.raises(InvalidJob) as caught:
        expanded(*source.drafts)
    told = [str(fault).removeprefix(f"{tmp_path}/") for fault in in_order(caught.value.faults)]

    assert told == [
        "n.txt:3: width 5 is not a multiple of 16 (for lines 5, 6). Use 256.",
        "n.txt:5: num_inference_steps 999 is outside 1 to 8 (also line 6). Use 8.",
    ]


def test_one_mistake_on_many_lines_is_told_once_with_its_lines() -> None:
    text = "a red fox\n" * 999

    (told,) = told_of(f"---\nmodel: demo-flux\n---\n{text}")
    assert told.startswith(
        "n.txt:4: demo-flux does not know 'fox' of prompt (also lines 5, 6, 7, 8, 9 and 993 more). Its"
    )


def test_mistakes_with_one_long_remedy_have_it_once() -> None:
    first, second, third = told_of("---\nmodel: demo-flux\n---\na fox\na cat\na dog\n")

    words = first.partition("small letters: ")[2].removesuffix(".").split(", ")
    assert sorted(TABLE["demo-flux"].vocabulary.split()) == words
    assert second == "n.txt:5: demo-flux does not know 'cat' of prompt. See n.txt:4 above."
    assert third == "n.txt:6: demo-flux does not know 'dog' of prompt. See n.txt:4 above."


def test_a_report_ends_after_a_thousand_faults_and_says_how_many_more_there_are() -> None:
    text = "---\nmodel: demo-flux\n---\n" + "".join(f"word{number}\n" for number in range(FAULTS_MAX + 500))
    told = told_of(text.translate(str.maketrans("0123456789", "zyxvutsrqp")), max_jobs=10_000)

    assert len(told) == FAULTS_MAX + 1
    assert told[-1] == "n.txt: 500 more faults are not listed. Correct these first."
    assert sum(map(len, told)) < 100_000


def test_lines_of_several_files_are_told_apart() -> None:
    faults = [Fault(f"{name}:{line}", "it is wrong", "Right it.") for line in (3, 1) for name in ("b.txt", "a.txt")]

    assert [str(fault) for fault in in_order(faults)] == [
        "b.txt:1: it is wrong (also line 3). Right it.",
        "a.txt:1: it is wrong (also line 3). Right it.",
    ]


PLACES = st.sampled_from(["", "n.txt", "add", "m.txt:0", "n.txt:1", "n.txt:2", "n.txt:30", "m.txt:4", "n.txt:٣", "x:²"])


@given(
    st.lists(st.builds(Fault, PLACES, st.sampled_from("pq"), st.sampled_from(["r", "R" * 300]), PLACES), max_size=12)
)
def test_any_faults_are_told_once_and_none_is_left_out(found: list[Fault]) -> None:
    told = in_order(found)

    assert len(set(told)) == len(told) <= len(found)
    assert {fault.problem[0] for fault in told} == {fault.problem for fault in found}
    assert {fault.where for fault in told} <= {fault.where for fault in found}
    assert in_order(told) == told


# Pictures


def refuse(name: str) -> KeptPicture:
    raise InvalidJob([Fault(name, "there is no such picture", "Put it there.")])


def test_picture_is_kept_once_and_named_by_its_digest() -> None:
    kept: list[str] = []

    def keep(name: str) -> KeptPicture:
        kept.append(name)
        return KEPT

    fields: dict[str, object] = {"model": "wan-i2v-a14b", "image": "a.png", "last_image": "b.png"}
    specs = expanded(draft(fields=fields, count=3), draft(fields=fields), store_image=keep)

    assert sorted(kept) == ["a.png", "b.png"]
    assert {(spec.image, spec.last_image) for spec in specs} == {(DIGEST, DIGEST)}


def test_picture_that_cannot_be_kept_is_a_fault_beside_the_others() -> None:
    fields: dict[str, object] = {"model": "wan-ti2v-5b", "image": "a.png", "num_frames": 80}

    assert faults(draft(fields=fields, count=2), store_image=refuse) == [
        "n.txt:1: image a.png: there is no such picture. Put it there.",
        "n.txt:1: num_frames 80 is not 4n + 1. Use 81.",
    ]


SEEN = {"wide.png": Size(1920, 1080), "tall.png": Size(1080, 1920)}


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"image": "tall.png"}, (704, 1280)),
        ({"image": "wide.png"}, (1280, 704)),
        ({"image": "tall.png", "width": 1280}, (1280, 704)),
        ({"image": "tall.png", "height": "704"}, (1280, 704)),
        ({"model": "wan-i2v-a14b", "image": "tall.png", "last_image": "wide.png"}, (480, 832)),
        ({"model": "flux-dev", "controlnet": "union-pro-2:tall.png"}, (768, 1360)),
        ({"model": "flux-dev", "controlnet": "union-pro-2:tall.png", "image": "wide.png"}, (1360, 768)),
        ({"model": "flux-dev"}, (1024, 1024)),
    ],
)
def test_the_job_has_the_shape_of_the_picture_that_it_begins_with(
    fields: dict[str, object], size: tuple[int, int]
) -> None:
    (spec,) = expanded(draft(fields=fields), store_image=lambda name: KeptPicture(DIGEST, SEEN[name]))

    assert (spec.width, spec.height) == size


def test_each_picture_of_a_matrix_gives_its_own_job_its_shape() -> None:
    drafts = [
        draft(matrix={"image": ("tall.png", "wide.png")}),
        draft(matrix={"image": ("tall.png",), "width": (832,)}),
    ]

    specs = expanded(*drafts, store_image=lambda name: KeptPicture(DIGEST, SEEN[name]))

    assert [(spec.width, spec.height) for spec in specs] == [(704, 1280), (1280, 704), (832, 704)]


def test_of_a_picture_that_cannot_be_kept_no_size_is_a_fault_beside_it() -> None:
    fields: dict[str, object] = {"model": "wan-i2v-a14b", "image": "a.png", "backend": "wan-cli"}

    assert faults(draft(fields=fields), store_image=refuse) == [
        "n.txt:1: image a.png: there is no such picture. Put it there."
    ]


# The same again


def test_same_submission_gives_the_same_jobs_again(wildcard_folder: Path) -> None:
    drafts = [
        draft("a __colour__ {fox|cat|dog}", count=5),
        draft("{2$$a|b|c}", matrix={"seed": (-1, 3)}),
        draft("{a|b}", expand="all", where="n.txt:3"),
    ]

    assert expanded(*drafts, wildcards=wildcard_folder) == expanded(*drafts, wildcards=wildcard_folder)


def test_same_jobs_come_out_of_every_python() -> None:
    """What was drawn under an id must not change with the interpreter: recovery would make other jobs of it."""
    template = "a {red|green|blue} {2$$fox|cat|owl|hare} {0.5::asleep|2::awake}"
    specs = expanded(draft(template, count=3))

    assert [(spec.prompt, spec.seed) for spec in specs] == [
        ("a blue cat,owl asleep", 2010273147),
        ("a green cat,fox asleep", 2010273148),
        ("a blue owl,hare awake", 2010273149),
    ]


def test_another_submission_draws_otherwise() -> None:
    one, other = (expanded(draft("{a|b|c|d}" * 20), submission=name)[0] for name in ("one", "other"))

    assert one.prompt != other.prompt
    assert one.seed != other.seed


def test_wildcard_seed_fixes_the_words_and_not_the_seed() -> None:
    fixed = draft("{a|b|c|d}" * 20, wildcard_seed=5)
    one, other = (expanded(fixed, submission=name)[0] for name in ("one", "other"))

    assert one.prompt == other.prompt
    assert one.seed != other.seed


# Speed


@pytest.mark.parametrize("line", ["a red fox number {n} in the snow", "--prompt a fox {n} --steps 2 --seed {n}"])
def test_ten_thousand_lines_are_read_and_expanded_in_seconds(line: str) -> None:
    """0.2 + 1.5 s on an idle machine of two cores; ten times that is still a fault of ours, not of its load."""
    content = "\n".join(line.replace("{n}", str(n)) for n in range(10_000)).encode()
    started = time.process_time()

    specs = expanded(*promptfile.parse(content, "n.txt"), max_jobs=10_000)

    assert len(specs) == 10_000
    assert time.process_time() - started < 20


# Anything

SCALARS: st.SearchStrategy[object] = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20)
)
MARKS = ["{", "}", "|", "$$", "2$$", "1-2$$", "::", "0.5::", "__", "__colour__", "__gone__", "\\", "a", " ", "-", "x"]
TEMPLATES = st.lists(st.sampled_from(MARKS), max_size=14).map("".join)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | TEMPLATES
LEGAL = st.fixed_dictionaries({"prompt": TEMPLATES.map("a {}".format) | st.just("a")})
DRAFTS = st.builds(
    Draft,
    st.dictionaries(st.sampled_from([*FIELDS, "unknown"]), VALUES, max_size=4) | LEGAL,
    st.just("n.txt:1"),
    st.integers(1, 4) | st.integers(),
    st.dictionaries(
        st.sampled_from([*FIELDS, "unknown"]), st.lists(SCALARS | TEMPLATES, max_size=3).map(tuple), max_size=2
    ),
    st.sampled_from(["random", "all"]),
    st.none() | st.integers(),
)


@given(st.lists(DRAFTS, max_size=3), st.sampled_from([refuse, lambda name: KEPT]))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_drafts_are_specs_or_readable_faults(
    wildcard_folder: Path, drafts: list[Draft], store: Callable[[str], KeptPicture]
) -> None:
    found: tuple[Fault, ...] = ()
    specs: list[JobSpec] = []
    try:
        specs = expanded(*drafts, wildcards=wildcard_folder, store_image=store, max_jobs=200)
    except InvalidJob as error:
        found = error.faults

    assert bool(specs) != bool(found) or not drafts
    assert len(specs) <= 200
    assert len(set(found)) == len(found)
    assert all(JobSpec.model_validate_json(spec.model_dump_json()) == spec for spec in specs)
    assert "\n".join(map(str, found)).encode() is not None
