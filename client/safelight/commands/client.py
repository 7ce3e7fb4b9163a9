"""What every command starts from: one installation, read when first asked for, and its queue while it answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # heavy modules: a command that only shows its help must not pay for them
    from safelight.config import Config
    from safelight.jobqueue import JobQueue
    from safelight.ledger import Ledger
    from safelight.models import Models


class Client:
    """One installation as a command sees it."""

    def __init__(self, config_file: Path | None, *, verbose: bool = False) -> None:
        self.config_file = config_file
        self.verbose = verbose

    @cached_property
    def config(self) -> Config:
        from safelight import config

        found = config.for_client(os.environ, self.config_file)
        if self.verbose:
            there = "" if found.source.exists() else " (not there: defaults)"
            click.echo(f"settings {found.source}{there}, state {found.paths.state}", err=True)
        return found

    @cached_property
    def models(self) -> Models:
        from safelight import models

        return models.load(self.config)

    @cached_property
    def ledger(self) -> Ledger:
        from safelight.ledger import Ledger

        return Ledger(self.config.paths)

    @cached_property
    def is_on_workers_host(self) -> bool:
        """Whether the queue's server, and so the worker, is on this host, as far as its address tells."""
        from urllib.parse import urlsplit

        return urlsplit(self.config.url).hostname in (None, "localhost", "127.0.0.1", "::1")

    @property
    def own_ledger(self) -> Ledger | None:
        """The ledger, where this client may write it; None on another host than the worker's, or as another user."""
        return self.ledger if self.is_on_workers_host and self.ledger.writable() else None

    @contextmanager
    def queue(self, *, retries: int = 3) -> Iterator[JobQueue]:
        """Yield the queue, which has answered, if need be at the last of `retries` within a second.

        Raises:
            QueueUnreachable: it does not answer, or stopped answering inside the block.
        """
        from safelight import jobqueue, queueserver
        from safelight.errors import QueueUnreachable

        server = queueserver.connect(self.config.url, retries=retries)
        try:
            yield jobqueue.JobQueue(server, keep_days=self.config.settings.queue.keep_days)
        except queueserver.AWAY as error:
            raise QueueUnreachable(f"The queue stopped answering ({error}). See: safelight doctor.") from error
        finally:
            server.close()


pass_client = click.make_pass_decorator(Client)
"""Gives a command the Client as its first argument."""
