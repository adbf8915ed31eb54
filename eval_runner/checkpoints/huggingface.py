"""Hugging Face checkpoints: they are served as they stand, but for adapters (LoRA), which a program must merge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from autoeval_hooks.config import map_path
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.ticket import Ticket
from eval_runner.checkpoints import convert, trust
from eval_runner.checkpoints.base import Request, Servable, find


@contextmanager
def prepare(request: Request) -> Iterator[Servable]:
    """An adapter (`base.Prepare`)."""
    ticket, config = request.ticket, request.config
    found = find(ticket, config.path_map)
    if is_adapter(ticket):
        if config.convert is None:
            raise CheckpointError(
                f"{ticket.manifest.path}: an adapter (LoRA) without its base model, which nothing here loads; name a "
                "program that merges both in `convert.command` (examples/trl/merge.py is one), or have training save "
                "the merged model"
            )
        trust.check_weights(found.path, ticket.manifest, pickles=config.runner.allow_pickled_weights)
        given = partial(given_tokenizer, ticket, config.path_map)
        own = (lambda: found.path) if ticket.manifest.has_tokenizer else given
        with convert.converted(request, found, found.path, own) as servable:
            yield servable
        return
    tokenizer = found.path if ticket.manifest.has_tokenizer else given_tokenizer(ticket, config.path_map)
    trust.check_weights(found.path, ticket.manifest, pickles=config.runner.allow_pickled_weights)
    for directory in {found.path, tokenizer}:
        trust.check_code(directory, allowed=config.runner.trust_remote_code)
    yield Servable(found.path, tokenizer, found.unchanged)


def is_adapter(ticket: Ticket) -> bool:
    """Whether a checkpoint holds what was added to a model, and not the model: PEFT writes no config.json."""
    names = {f.path for f in ticket.manifest.files}
    return "adapter_config.json" in names and "config.json" not in names


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
