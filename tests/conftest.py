"""Fixtures that many tests share: small checkpoints, tickets and queues of our own making."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoeval_hooks import manifest, ticket
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket

SUITE = "5" * 64


@pytest.fixture(autouse=True)
def logger_left_as_it_was() -> Iterator[None]:
    """A test that leaves our logger changed fails itself, not a later one that counts what was logged."""
    logger = logging.getLogger("autoeval")
    yield
    left, logger.propagate = logger.propagate, True
    assert left


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory in the layout of a Hugging Face checkpoint; its weights are the given bytes."""

    def make(step: int = 100, weights: bytes = b"weights", *, name: str = "", tokenizer: bool = True) -> Path:
        path = tmp_path / "out" / (name or f"checkpoint-{step}")
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(weights)
        (path / "config.json").write_text('{"model_type": "llama"}')
        (path / "optimizer.pt").write_bytes(b"optimizer")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        if tokenizer:
            (path / "tokenizer.json").write_text("{}")
        return path

    return make


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    made = Queue(str(tmp_path / "queue"), runner="me")
    made.create()
    return made


@pytest.fixture
def new_ticket(checkpoint: Callable[..., Path]) -> Callable[..., Ticket]:
    """A valid ticket for a checkpoint that exists."""

    def make(step: int = 100, *, priority: int = 5, suite: str = "quick", run: str = "run1") -> Ticket:
        path = checkpoint(step, f"weights of {step}".encode())
        found = manifest.build(str(path), path=str(path), step=step, run=RunIdentity(run))
        return ticket.new(found, suite, SUITE, priority)

    return make
