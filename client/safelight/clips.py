"""The clips of a batch, as far as they are done: what `safelight concat` joins. Knows no queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safelight.errors import Fault, InvalidJob, LedgerDamaged
from safelight.jobspec import JobSpec
from safelight.ledger import Ledger
from safelight.receipt import Receipt


@dataclass(frozen=True)
class Clips:
    """What is there of a batch, in the order in which its jobs were submitted."""

    files: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...]
    """The other jobs of clips, each with what became of it."""


def of_batch(ledger: Ledger, batch: str, day: str | None = None) -> Clips:
    """Return the published clips of a batch.

    Args:
        day: the folder of the outbox that they lie in; else all.

    Raises:
        InvalidJob: there are none, or some are no MP4; each is named.
    """
    outbox = ledger.paths.outbox
    left: dict[str, str] = {}
    ended = [receipt for receipt in _receipts(ledger, left) if _fits(receipt.spec, batch)]
    found = [(receipt, output) for receipt in ended for output in receipt.outputs if receipt.state == "done"]
    if day is not None:
        found = [(receipt, output) for receipt, output in found if output.path.split("/", 1)[0] == day]
    faults = [
        Fault(str(outbox / output.path), f"is {receipt.spec.output_format}, not mp4", "Only MP4s can be joined.")
        for receipt, output in found
        if receipt.spec.output_format != "mp4"
    ]
    if not found:
        faults = [Fault(f"batch {batch}", "has no clip that is done", "safelight list shows the batches.")]
    if faults:
        raise InvalidJob(faults)
    files = tuple(outbox / output.path for _, output in found)
    left |= {receipt.id: f"is {receipt.state}" for receipt in ended if receipt.state != "done"}
    left |= dict.fromkeys(_open(ledger, batch), "has not ended")
    return Clips(files, tuple(sorted(left.items())))


def _receipts(ledger: Ledger, damaged: dict[str, str]) -> Iterator[Receipt]:
    """Yield the receipts in the order of submission; one that cannot be read keeps no clip of another batch back."""
    for job in sorted(ledger.ended()):
        try:
            receipt = ledger.receipt(job)
        except LedgerDamaged:
            damaged[job] = "has a record that cannot be read"
            continue
        if receipt:
            yield receipt


def _open(ledger: Ledger, batch: str) -> Iterator[str]:
    ended = ledger.ended()
    for submission in ledger.open_submissions():
        with suppress(LedgerDamaged):  # nobody can tell which jobs it holds
            yield from (
                spec.id for spec in ledger.submission(submission) if _fits(spec, batch) and spec.id not in ended
            )


def _fits(spec: JobSpec, batch: str) -> bool:
    return spec.kind == "video" and spec.batch == batch
