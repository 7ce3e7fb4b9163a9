"""`safelight models pull`, `verify` and `list`, against a hub on localhost that serves a tiny model as it would a real
one: in shards, beside what no job needs."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from safelight import config as settings
from safelight import models, pulled
from safelight import published as published_as
from safelight.errors import BadConfig, InvalidJob, SafelightError
from safelightd import pull as pulling
from safelightd import tiny
from safelightd.hub import NoAccess, NotOnHub, Unreachable
from tests.cli_steps import process, runner
from tests.conftest import Installation
from tests.hub_server import COMMIT, LICENSED, Hub, files_of, serving, with_hub
from tests.integration.rendering import Run, spec_for

FLUX = "tiny-flux-schnell"
KEY = "fox"

ROW = """
[models.fox]
like = "tiny-flux-schnell"
tiny = false
repository = "somebody/a-model"
[models.fox.files]
patterns = [
    "model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*", "text_encoder/*", "text_encoder_2/*",
    "transformer/*", "vae/*",
]
"""

STEM = "transformer/diffusion_pytorch_model"
SHARD = f"{STEM}-00002-of-00002.safetensors"

NEVER = {
    "README.md": b"# A model",
    "flux1-fox.safetensors": b"the transformer a second time" * 9_000,
    "ae.safetensors": b"the vae a second time" * 9_000,
    f"{STEM}.fp16.safetensors": b"the transformer a third time" * 9_000,
    f"{STEM}.bin": b"a pickle" * 9_000,
    "vae/diffusion_pytorch_model.pt": b"a pickle" * 9_000,
    "text_encoder/flax_model.msgpack": b"flax" * 9_000,
    "transformer/more/config.json": b"{}",
    ".gitattributes": b"*.safetensors filter=lfs",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A tiny model as the hub has large ones: its transformer in two shards with an index, and much beside it."""
    folder = tmp_path_factory.mktemp("published") / FLUX
    tiny.build(FLUX, folder)
    files = files_of(folder)
    weights = load(files.pop(f"{STEM}.safetensors"))
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        files[f"transformer/{shard}"] = save({name: weights[name] for name in part}, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    files[f"{STEM}.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


@pytest.fixture
def hub(published: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub(files={**published, **NEVER})) as server:
        yield server


@pytest.fixture
def own(installation: Installation, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """An installation with an empty models folder, whose hub is the one on localhost, and no token."""
    return with_hub(installation, hub, monkeypatch, ROW)


class Pulled:
    """Calls what `safelightd pull` calls, and keeps what was said."""

    def __init__(self, own: Installation, hub: Hub) -> None:
        self.own, self.hub = own, hub
        self.said = ""
        self.ask: pulling.Ask = lambda: True
        self.folder = own.paths.models / KEY
        self.hidden = pulled.hidden(self.folder)

    def __call__(self, *, force: bool = False, tell: pulling.Tell = lambda *_: None, key: str = KEY) -> Path | None:
        lines: list[str] = []
        try:
            return pulling.pull(
                self.own.config,
                published_as.of_model(self.own.models[key], self.own.paths.models),
                force=force,
                say=lines.append,
                ask=self.ask,
                tell=tell,
                pauses_s=(0.01, 0.01),
                endpoint=self.hub.url,
            )
        finally:
            self.said = "\n".join(lines)


@pytest.fixture
def pull(own: Installation, hub: Hub) -> Pulled:
    return Pulled(own, hub)


def whole(pull: Pulled, published: dict[str, bytes]) -> bool:
    """Whether exactly the files that are needed lie in the final folder, and nothing beside it."""
    found = files_of(pull.folder)
    found.pop(pulled.MANIFEST)
    return found == published and os.listdir(pull.own.paths.models) == [KEY]


def here(own: Installation) -> str:
    rows: list[dict[str, Any]] = json.loads(runner(own)("models", "list", "--json").stdout)
    return next(str(row["here"]) for row in rows if row["key"] == KEY)


def safelight(own: Installation, *words: str) -> subprocess.CompletedProcess[str]:
    running = process(own, *words)
    out, err = running.communicate(timeout=300)
    return subprocess.CompletedProcess(words, running.returncode, out, err)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_jobs_need_is_fetched_and_nothing_else_and_a_job_runs_with_it(
    pull: Pulled,
    hub: Hub,
    own: Installation,
    published: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.gated = True  # what is sent to the CDN is looked at, too
    monkeypatch.setenv("HF_TOKEN", LICENSED)

    assert here(own) == "missing"
    assert pull() == pull.folder

    assert whole(pull, published)
    manifest = pulled.read(pull.folder)
    assert manifest
    assert (manifest.repository, manifest.commit, manifest.licence) == ("somebody/a-model", COMMIT, "Apache-2.0")
    assert sorted(file.name for file in manifest.files) == sorted(published)
    assert pulled.damage(published_as.of_model(own.models[KEY], own.paths.models)) == []
    assert here(own) == "present"
    assert f"somebody/a-model at {COMMIT[:12]} (main) -> {pull.folder}" in pull.said
    assert "licence: Apache-2.0, gated: your token may read it" in pull.said
    assert f"in {len(published)} files" in pull.said
    assert "of disk are free" in pull.said
    assert [name for name in NEVER if hub.paths("hub", f"{COMMIT}/{name}") or hub.paths("cdn", f"/cdn/{name}")] == []
    assert all("authorization" in head for at, _, head in hub.asked if at == "hub")
    assert not [head for at, _, head in hub.asked if at == "cdn" and "authorization" in head]
    assert LICENSED not in pull.said

    shutil.copytree(pull.folder, tmp_path / "pulled" / FLUX)
    tiny.build(FLUX, tmp_path / "built" / FLUX)
    of_pulled, of_built = (Run(spec_for(FLUX), tmp_path / name).latents() for name in ("pulled", "built"))
    assert torch.equal(of_pulled, of_built)


def test_a_model_that_is_there_is_not_asked_for(pull: Pulled, hub: Hub) -> None:
    pull()
    hub.asked.clear()

    assert pull() == pull.folder

    assert hub.asked == []
    assert pull.said == f"{KEY} is there: nothing to do"
    assert pull(force=True) == pull.folder
    assert pull.said.endswith("every byte of it: nothing to do")
    assert not hub.paths("cdn", "-of-00002.safetensors")[2:]


def test_one_that_was_put_there_by_hand_is_left_alone(pull: Pulled, hub: Hub, published: dict[str, bytes]) -> None:
    for name, content in published.items():
        (pull.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (pull.folder / name).write_bytes(content)

    pull()
    assert pull.said == f"{KEY} is there, put there by hand: nothing to do"
    with pytest.raises(SafelightError, match="was not pulled, and is left alone"):
        pull(force=True)
    (pull.folder / SHARD).unlink()
    with pytest.raises(SafelightError, match=f"lacks {SHARD}"):
        pull()
    (pull.folder / "model_index.json").unlink()
    with pytest.raises(SafelightError, match="something that is no model is in the way"):
        pull()
    assert hub.paths("cdn") == []


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    pull: Pulled, hub: Hub, published: dict[str, bytes]
) -> None:
    size = len(published[SHARD])
    hub.cut[SHARD] = [size // 4, 0, size // 4]
    hub.status[SHARD] = [503]

    pull()

    assert whole(pull, published)
    assert hub.ranges_of(SHARD) == [None, f"bytes={size // 4}-", f"bytes={size // 4}-", f"bytes={size // 2}-"]


def test_a_server_that_knows_no_ranges_sends_it_all_again(pull: Pulled, hub: Hub, published: dict[str, bytes]) -> None:
    hub.ranges = False
    hub.cut[SHARD] = [len(published[SHARD]) // 2]

    pull()

    assert whole(pull, published)


def test_a_hub_that_stays_away_leaves_what_has_arrived_for_the_next_pull(
    pull: Pulled, hub: Hub, own: Installation, published: dict[str, bytes]
) -> None:
    size = len(published[SHARD])
    hub.cut[SHARD] = [size // 2, 0, 0, 0]

    with pytest.raises(Unreachable, match="What has arrived is kept; run it again"):
        pull()

    assert not pull.folder.exists()
    assert (pull.hidden / f"{SHARD}{pulled.PART}").read_bytes() == published[SHARD][: size // 2]
    assert here(own).endswith(" pulled")
    fetched = len(hub.paths("cdn"))

    hub.cut.clear()
    pull()

    assert "are here already" in pull.said
    assert whole(pull, published)
    assert hub.ranges_of(SHARD)[-1] == f"bytes={size // 2}-"
    larger = [name for name in published if len(published[name]) > size]
    assert len(hub.paths("cdn")) - fetched <= 1 + len(larger)


def test_a_hub_that_is_gone_in_the_middle_is_said_and_nothing_looks_whole(pull: Pulled, hub: Hub) -> None:
    """The address answers no more: the connection is refused, not broken."""

    def gone(name: str, arrived: int, _of: int) -> None:
        hub.cdn_url = "http://localhost:9"

    with pytest.raises(Unreachable, match="no answer"):
        pull(tell=gone)

    assert not pull.folder.exists()
    assert pulled.arrived(pull.folder)


@pytest.mark.parametrize("name", [SHARD, "model_index.json"])
def test_wrong_bytes_are_removed_and_never_put_in_place(name: str, pull: Pulled, hub: Hub) -> None:
    content = hub.files[name]
    hub.sent[name] = content[:-1] + bytes([content[-1] ^ 1])

    with pytest.raises(SafelightError, match=f"{name}: its bytes are not those that the hub lists"):
        pull()

    assert not pull.folder.exists()
    assert not (pull.hidden / name).exists()
    assert not (pull.hidden / f"{name}{pulled.PART}").exists()
    hub.sent.clear()
    assert pull() == pull.folder


def test_a_body_that_is_too_short_or_too_long_never_looks_complete(
    pull: Pulled, hub: Hub, published: dict[str, bytes]
) -> None:
    hub.sent[SHARD] = published[SHARD][:-9]
    with pytest.raises(SafelightError, match=f"{SHARD}: "):
        pull()
    assert not pull.folder.exists()

    hub.sent[SHARD] = published[SHARD] + b"more"
    assert pull() == pull.folder
    assert whole(pull, published)


def test_what_was_damaged_between_two_pulls_is_found_by_reading_and_fetched_again(
    pull: Pulled, hub: Hub, published: dict[str, bytes]
) -> None:
    hub.sent["vae/diffusion_pytorch_model.safetensors"] = b"wrong"
    hub.cut[SHARD] = [len(published[SHARD]) // 2, 0, 0, 0]
    with pytest.raises(Unreachable):
        pull()
    for file in pull.hidden.rglob("*"):
        if file.is_file() and file.name != pulled.WANTED:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (pull.hidden / "transformer/left-behind.bin").write_bytes(b"a pickle")
    hub.sent.clear()
    hub.cut.clear()

    pull()

    assert "is damaged, and is fetched again" in pull.said
    assert "the part that was here is damaged, and is fetched again" in pull.said
    assert whole(pull, published)


def test_a_newer_commit_replaces_only_what_changed(pull: Pulled, hub: Hub, published: dict[str, bytes]) -> None:
    pull()
    newer = "beef" + "0" * 36
    hub.commit, hub.files["scheduler/scheduler_config.json"] = newer, b'{"_class_name": "Other"}'
    hub.asked.clear()

    assert pull() == pull.folder
    assert hub.asked == []

    pull(force=True)
    manifest = pulled.read(pull.folder)
    assert manifest
    assert manifest.commit == newer
    assert (pull.folder / "scheduler/scheduler_config.json").read_bytes() == b'{"_class_name": "Other"}'
    assert hub.paths("cdn") == []


def test_a_damaged_model_is_named_by_verify_and_mended_by_force(
    pull: Pulled, hub: Hub, own: Installation, published: dict[str, bytes]
) -> None:
    pull()
    said = runner(own)("models", "verify", KEY)
    assert (said.exit_code, said.output) == (0, f"{KEY} is as it was pulled\n")
    shard = pull.folder / SHARD
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)

    said = runner(own)("models", "verify")
    assert said.exit_code == 1
    assert f"{shard}: damaged: its bytes are not those that were fetched" in said.stdout
    assert f"safelight models pull {KEY} --force" in said.stdout
    hub.asked.clear()
    pull(force=True)

    assert whole(pull, published)
    assert [Path(path).name for path in hub.paths("cdn")] == [Path(SHARD).name]
    shard.unlink()
    assert here(own) == "incomplete"
    with pytest.raises(SafelightError, match="--force"):
        pull()


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", ["1. Log in and accept at {url}/somebody/a-model", "{url}/settings/tokens", "HF_TOKEN", "{root}/token"]),
        ("hf_another", ["The token that was sent may not read it", "accept at {url}/somebody/a-model", "fine-grained"]),
    ],
)
def test_a_gated_model_says_what_to_accept_and_where_the_token_goes(
    token: str, words: list[str], pull: Pulled, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", token)

    with pytest.raises(NoAccess) as refused:
        pull()

    said = str(refused.value)
    assert refused.value.exit_code == 3
    assert [word for word in words if word.format(url=hub.url, root=pull.own.root) not in said] == []
    assert "Apache-2.0" in said
    assert not (token and token in said + pull.said)
    assert not pull.own.paths.models.exists()


def changed(own: Installation, old: str, new: str) -> Installation:
    source = own.config.source
    source.write_text(source.read_text().replace(old, new))
    config = settings.load(own.env)
    return replace(own, config=config, models=models.load(config))


@pytest.mark.parametrize("token", ["", "hf_another"])
def test_an_unknown_repository_or_commit_is_named(
    token: str, own: Installation, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(NotOnHub, match=r"somebody/none: .* has no such repository"):
        Pulled(changed(own, "somebody/a-model", "somebody/none"), hub)()
    with pytest.raises(NotOnHub, match=r"has no commit abc. Correct revision = in \[models.fox\]"):
        Pulled(changed(own, '"somebody/none"', '"somebody/a-model"\nrevision = "abc"'), hub)()


def test_a_pinned_commit_is_the_one_that_is_fetched(own: Installation, hub: Hub) -> None:
    pull = Pulled(changed(own, '"somebody/a-model"', f'"somebody/a-model"\nrevision = "{COMMIT}"'), hub)

    pull()

    assert "(pinned in the settings)" in pull.said
    assert hub.paths("hub")[0] == f"/api/models/somebody/a-model/revision/{COMMIT}"


def test_another_repository_does_not_inherit_the_pinned_commit(own: Installation) -> None:
    pinned = f'"somebody/a-model"\nrevision = "{COMMIT}"\n[models.two]\nlike = "fox"\n'
    table = changed(own, '"somebody/a-model"', f'{pinned}[models.three]\nlike = "fox"\nrepository = "a/b"').models

    assert (table["two"].revision, table["three"].revision) == (COMMIT, "")


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(own: Installation, hub: Hub) -> None:
    pull = Pulled(changed(own, "min_free_disk_gib = 0", "min_free_disk_gib = 1_000_000"), hub)

    with pytest.raises(SafelightError, match=r"Free some space, or set \[paths\] models to a larger disk"):
        pull()

    assert "licence: Apache-2.0" in pull.said
    assert not pull.own.paths.models.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: files.pop("model_index.json"), "has no model_index.json"),
        (lambda files: files.pop(SHARD), f"names {SHARD}, which the repository does not have"),
        (lambda files: files.pop("vae/diffusion_pytorch_model.safetensors"), "no safetensors in vae/, and pickles are"),
    ],
)
def test_a_repository_that_jobs_could_not_load_is_refused(
    change: Callable[[dict[str, bytes]], Any], says: str, pull: Pulled, hub: Hub
) -> None:
    change(hub.files)

    with pytest.raises(BadConfig, match=says):
        pull()

    assert not pull.own.paths.models.exists()


def test_a_name_that_leads_elsewhere_is_not_fetched(pull: Pulled, hub: Hub, own: Installation) -> None:
    hub.files |= {"transformer/../../evil.json": b"{}", "vae/..": b"{}", "/transformer/evil.json": b"{}"}

    pull()

    assert not list(own.root.rglob("*evil*"))


def test_a_tiny_model_and_one_without_a_repository_are_not_on_the_hub(pull: Pulled) -> None:
    with pytest.raises(BadConfig, match="built on first use"):
        pull(key=FLUX)


def test_a_pull_that_ends_while_a_second_asks_leaves_it_nothing_to_do(
    pull: Pulled, hub: Hub, own: Installation, published: dict[str, bytes]
) -> None:
    pull.ask = lambda: bool(Pulled(own, hub)())

    assert pull() == pull.folder

    assert pull.said.endswith("is there: nothing to do")
    assert hub.ranges_of(SHARD) == [None]
    assert whole(pull, published)


def test_who_says_no_has_fetched_nothing(pull: Pulled, hub: Hub) -> None:
    pull.ask = lambda: False

    assert pull() is None

    assert hub.paths("cdn") == []
    assert not pull.own.paths.models.exists()


def test_a_script_must_say_yes_and_then_the_whole_program_fetches_although_the_daemon_is_offline(
    own: Installation, hub: Hub, published: dict[str, bytes]
) -> None:
    hub.gated = True
    token = own.root / ".cache/huggingface/token"
    token.parent.mkdir(parents=True)
    token.write_text(f"{LICENSED}\n")

    refused = safelight(own, "models", "pull", KEY)
    assert refused.returncode == InvalidJob.exit_code
    assert "there is no terminal to ask at. Add --yes." in refused.stderr
    assert not own.paths.models.exists()

    done = safelight(own, "--verbose", "models", "pull", KEY, "--yes")

    assert (done.returncode, done.stdout) == (0, f"{own.paths.models / KEY}\n"), done.stderr
    assert "licence: Apache-2.0" in done.stderr
    assert LICENSED not in done.stderr + refused.stderr
    assert whole(Pulled(own, hub), published)
    assert {path.split("/")[1] for path in hub.paths("hub")} == {"api", "somebody"}
    assert not [path for path in hub.paths("hub") if path.startswith("/api/") and "/models/" not in path]
    assert safelight(own, "models", "pull", "no-such").returncode == 2


def read_until(terminal: int, words: str) -> str:
    said = ""
    while words not in said:
        said += os.read(terminal, 4096).decode()
    return said


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_a_person_is_asked(answer: str, code: int, own: Installation) -> None:
    ours, theirs = pty.openpty()
    path = os.pathsep.join(["client", "daemon"])
    running = subprocess.Popen(
        [sys.executable, "-m", "safelight.cli", "models", "pull", KEY],
        env={**own.env, "PYTHONPATH": path},
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    said = read_until(ours, "[y/N] ")
    os.write(ours, f"{answer}\n".encode())
    said += read_until(ours, "Nothing was fetched." if code else "is ready")
    assert running.wait(30) == code
    os.close(ours)
    assert "licence: Apache-2.0" in said


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_that_is_ended_in_the_middle_goes_on_where_it_was(
    end: signal.Signals, own: Installation, hub: Hub, pull: Pulled, published: dict[str, bytes]
) -> None:
    hub.slow[SHARD] = 2.0
    running = process(own, "models", "pull", KEY, "--yes")
    part = pull.hidden / f"{SHARD}{pulled.PART}"
    wait_until(lambda: part.is_file() and part.stat().st_size > 0)

    second = safelight(own, "models", "pull", KEY, "--yes")
    running.send_signal(end)
    _, said = running.communicate(timeout=300)

    assert second.returncode == 1
    assert "another process is pulling this. Wait for it." in second.stderr
    assert running.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    if end == signal.SIGINT:
        assert f"What has arrived is kept; it goes on with: safelight models pull {KEY}" in said
        assert "Traceback" not in said
    assert not pull.folder.exists()
    assert here(own).endswith(" pulled")
    left = part.stat().st_size
    assert 0 < left < len(published[SHARD])

    hub.slow.clear()
    pull()

    assert whole(pull, published)
    assert hub.ranges_of(SHARD)[-1] == f"bytes={left}-"


def test_progress_is_one_line_on_a_terminal_and_few_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(pulling.time, "monotonic", lambda: float(next(now)))
    shown: dict[bool, str] = {}
    for terminal in (True, False):
        out = io.StringIO()
        progress = pulling.Progress(out.write, terminal=terminal)
        for second in range(61):
            progress.tell("vae/x.safetensors", second * 2**20, 2**30)
        progress.say("done")
        shown[terminal] = out.getvalue()

    assert shown[True].count("\n") == 2
    assert "60.0 MiB of 1.0 GiB, 1.0 MiB/s, 16 min left: vae/x.safetensors\ndone\n" in shown[True]
    assert shown[False].count("\n") == 4
