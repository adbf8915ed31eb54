"""Hugging Face checkpoints: they are served as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoeval_hooks.config import map_path
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.ticket import Ticket
from eval_runner.checkpoints import trust
from eval_runner.checkpoints.base import Request, Servable, find


@contextmanager
def prepare(request: Request) -> Iterator[Servable]:
    """An adapter (`base.Prepare`)."""
    ticket, config = request.ticket, request.config
    found = find(ticket, config.path_map)
    tokenizer = found.path if ticket.manifest.has_tokenizer else given_tokenizer(ticket, config.path_map)
    trust.check_weights(found.path, ticket.manifest, pickles=config.runner.allow_pickled_weights)
    for directory in {found.path, tokenizer}:
        trust.check_code(directory, allowed=config.runner.trust_remote_code)
    yield Servable(found.path, tokenizer, found.unchanged)


def given_tokenizer(ticket: Ticket, path_map: dict[str, str]) -> Path:
    """The tokenizer that `run.tokenizer` named to the training side. Raises CheckpointError without one."""
    if not ticket.manifest.tokenizer:
        raise CheckpointError(
            f"{ticket.manifest.path}: no tokenizer; pass `processing_class=tokenizer` to the Trainer, "
            "or set `run.tokenizer` to a tokenizer's directory"
        )
    directory = Path(map_path(ticket.manifest.tokenizer, path_map))
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: the tokenizer that `run.tokenizer` names is not here")
    return directory
