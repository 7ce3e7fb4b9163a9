"""What `models list` shows: each model, whether it is here, what it lacks, and what is made of it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from safelight import digesting, display, fused, inventory, prepared, published, registered
from safelight.models import folder

if TYPE_CHECKING:
    from safelight.commands.client import Client
    from safelight.inventory import Standing
    from safelight.models import ModelFacts


def show(client: Client, *, as_json: bool) -> None:
    """Print the table, or its rows as JSON; what is wrong with registrations goes to stderr."""
    defaults = client.config.settings.defaults
    default_keys = (defaults.image_model, defaults.video_model)
    made = _prepared(client)
    kept_in = client.config.paths.models / fused.FOLDER
    kept = {facts.key: fused.held_bytes(kept_in / facts.key) for facts in client.models.values()}
    standings = {facts.key: inventory.standing(facts, client.config.paths.models) for facts in client.models.values()}
    digests = _digests(client)
    rows = [
        {
            "key": facts.key,
            "kind": facts.kind,
            "serves": inventory.serves(facts),
            "default": facts.key in default_keys,
            "licence": facts.licence,
            "bf16_bytes": 2 * sum(facts.components.values()),
            "present": (at := standings[facts.key]).state in inventory.WHOLE,
            "here": at.state,
            "missing": at.missing,
            "stored": at.precision,
            "stored_bytes": at.size_bytes,
            "registered": at.registered,
            "digests_done_bytes": None,
            "digests_total_bytes": None,
            "digests_faults": [],
            **digests.get(facts.key, {}),
            "tiny": facts.tiny,
            "folder": str(folder(facts, client.config.paths.models)),
            "component_paths": facts.component_paths,
            "repository": facts.repository,
            "prepared": made.get(facts.key, []),
            "controlnets": _controlnets(client, facts),
            "fused_bytes": kept[facts.key],
        }
        for facts in client.models.values()
    ]
    for fault in client.models.faults:
        click.echo(fault, err=True)
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    cells = [
        [
            f"{facts.key}{' *' if facts.key in default_keys else ''}",
            ", ".join(inventory.serves(facts)),
            stored(standings[facts.key]),
            "tiny" if facts.tiny else display.gib(2 * sum(facts.components.values())),
            here(standings[facts.key], facts) + _digesting(digests.get(facts.key)),
            ", ".join(f"{net['key']} {net['here']}" for net in _controlnets(client, facts)) or "-",
            _shown(made.get(facts.key, []), kept[facts.key]),
            facts.licence,
            ", ".join([str(folder(facts, client.config.paths.models)), *facts.component_paths.values()]),
        ]
        for facts in client.models.values()
    ]
    display.columns(
        ["MODEL", "SERVES", "STORED", "BF16", "HERE", "CONTROLNETS", "PREPARED", "LICENCE", "FOLDER"], cells
    )


def _controlnets(client: Client, facts: ModelFacts) -> list[dict[str, object]]:
    """Return what is there of a model's ControlNets."""
    folder = client.config.paths.models
    rows: list[dict[str, object]] = []
    for key, at in inventory.controlnets(facts, folder).items():
        what = published.of_controlnet(facts, key, folder)
        rows.append(
            {
                "key": key,
                "here": at.state,
                "missing": at.missing,
                "repository": what.repository,
                "licence": what.licence,
                "folder": str(what.folder),
            }
        )
    return rows


def stored(standing: Standing) -> str:
    """Return what most of a transformer is held as on disk, and how large all of the model is."""
    return f"{standing.precision}, {display.gib(standing.size_bytes)}" if standing.precision else "-"


def here(standing: Standing, facts: ModelFacts) -> str:
    """Return how much of a model is there, in words, and what it lacks."""
    if standing.state == "missing" and (cache := inventory.in_hub_cache(facts, os.environ)):
        return f"in the hub's cache: safelight models add {cache}"
    if not standing.missing:
        return standing.state
    more = f" and {len(standing.missing) - 2} more" if len(standing.missing) > 2 else ""
    word = {"incomplete": "incomplete: lacks", "damaged": "damaged:", "gone": "gone:"}.get(
        standing.state, standing.state
    )
    return f"{word} {', '.join(standing.missing[:2])}{more}"


def _digests(client: Client) -> dict[str, dict[str, object]]:
    """Return how many bytes have digests of each registered model that is there, and what could not be read."""
    config = client.config
    reading = digesting.read(config.paths.digests)
    found: dict[str, dict[str, object]] = {}
    for registration in registered.read_all(config.paths.models)[0]:
        try:
            at = registered.digested(config.paths.models, registration)
        except OSError:
            continue  # what is gone is said of it
        found[registration.key] = {
            "digests_done_bytes": reading.done_of(registration.key, at),
            "digests_total_bytes": at.total_bytes,
            "digests_faults": reading.faults_of(at),
        }
    return found


def _digesting(row: dict[str, Any] | None) -> str:
    """Return how much of a model has digests, in words; "" where all of it has."""
    if not row or (row["digests_done_bytes"] == row["digests_total_bytes"] and not row["digests_faults"]):
        return ""
    percent = 100 * row["digests_done_bytes"] // max(1, row["digests_total_bytes"])
    return f", digests {percent} %" + "".join(f", {fault}" for fault in row["digests_faults"][:1])


def _prepared(client: Client) -> dict[str, list[dict[str, object]]]:
    """Return what is prepared, by model: {precision, component, bytes, current}."""
    found: dict[str, list[dict[str, object]]] = {}
    for manifest, current in prepared.manifests(client.config.paths.models, client.models):
        row = {
            "precision": manifest.precision,
            "component": manifest.component,
            "bytes": manifest.size_bytes,
            "current": current,
        }
        found.setdefault(manifest.key, []).append(row)
    return found


def _shown(made: list[dict[str, object]], kept_bytes: int) -> str:
    words = [f"{row['precision']} {row['component']}{'' if row['current'] else ' (of other weights)'}" for row in made]
    words += [f"{display.gib(kept_bytes)} with LoRAs"] if kept_bytes else []
    return ", ".join(words) or "-"
