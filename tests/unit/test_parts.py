"""Finished parts: kept for the next attempt at their own ticket, and never taken for anything else's."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.ticket import Ticket
from eval_runner import parts
from eval_runner.attempt import Attempt
from eval_runner.config.models import Suite
from eval_runner.evaluators.base import Outcome
from eval_runner.parts import Kept
from eval_runner.results import store
from eval_runner.results.schema import Detail, Evaluation, Instance, Score
from tests.conftest import SUITE

SCORE = Score("mmlu", "em", "test", 1 / 3, n=3, stderr=0.1, higher_is_better=True)
OUTCOME = Outcome(
    Evaluation("helm", 12.5, (SCORE,), {"crfm-helm": "0.5"}, {"/data": "sha256:0"}),
    [Instance("mmlu", "em", "test", f"{i}\N{SNOWMAN}", i / 3) for i in range(3)],
    [Detail("mmlu", "1", "anatomy", "win", (("Question", "?"),))],
)
KEY = "mmlu:subject=anatomy \N{SNOWMAN} ../.."


@pytest.fixture
def make(queue: Queue, new_ticket: Callable[..., Ticket]) -> Callable[..., Kept]:
    """The parts of one evaluator at one attempt; all of the same ticket unless it is another `step`."""
    tickets: dict[int, Ticket] = {}

    def one(
        runner: str = "r1", *, index: int = 0, step: int = 100, ops: FileOps | None = None,
        unchanged: Callable[[], None] = lambda: None,
    ) -> Kept:  # fmt: skip
        if step not in tickets:
            tickets[step] = new_ticket(step)
        ticket = tickets[step]
        token = Token("claimed", "0-1", ticket.id, 0, 0, runner)
        suite = Suite(name="quick", cadence=None, digest=SUITE, text="{}", evaluators=[])  # type: ignore[arg-type]
        attempt = Attempt(ticket, token, suite)
        record = lambda done: attempt.result("ok", evaluations=done)  # noqa: E731
        return Kept(Path(queue.root), index, record, unchanged, ops or FileOps())

    return one


def same(found: Outcome | None) -> bool:
    return found is not None and (found.evaluation, list(found.instances), list(found.details)) == (
        OUTCOME.evaluation, OUTCOME.instances, OUTCOME.details,
    )  # fmt: skip


def test_what_one_attempt_put_another_gets_and_only_for_the_same(make: Callable[..., Kept]) -> None:
    first = make("r1")
    assert first.get(KEY) is None
    first.put(KEY, OUTCOME)
    again = make("r2")
    assert same(again.get(KEY))
    assert again.get(KEY + " ") is None                     # asked otherwise
    assert make("r2", index=1).get(KEY) is None             # another evaluator of the suite
    assert make("r2", step=200).get(KEY) is None            # another checkpoint


def test_two_attempts_that_keep_the_same_part_are_no_error(make: Callable[..., Kept], queue: Queue) -> None:
    first, zombie = make("r1"), make("r0")
    first.put(KEY, OUTCOME)
    (path,) = Path(queue.root, "partial").glob("*/*")
    before = (path / store.RECORD).read_bytes()
    zombie.put(KEY, replace(OUTCOME, instances=[]))
    assert (path / store.RECORD).read_bytes() == before     # the first stays
    assert same(make("r2").get(KEY))
    assert os.listdir(os.path.join(queue.root, "tmp")) == []


def test_no_part_of_a_changed_checkpoint_is_kept(make: Callable[..., Kept], queue: Queue) -> None:
    def changed() -> None:
        raise CheckpointError("changed while it was evaluated")

    with pytest.raises(CheckpointError, match="changed"):
        make(unchanged=changed).put(KEY, OUTCOME)
    assert list(Path(queue.root).glob("partial/*/*")) == []


@pytest.mark.parametrize("number", [28, 5, 30, 122])
def test_a_part_that_cannot_be_kept_does_no_harm(make: Callable[..., Kept], queue: Queue, number: int) -> None:
    class Failing(FileOps):
        def write(self, fd: int, data: bytes) -> int:
            raise OSError(number, os.strerror(number))

    one = make(ops=Failing())
    one.put(KEY, OUTCOME)
    assert one.get(KEY) is None
    assert list(Path(queue.root).glob("partial/*/*")) == []
    assert os.listdir(os.path.join(queue.root, "tmp")) == []


def damage(path: Path, how: str) -> None:
    record = json.loads((path / store.RECORD).read_text())
    if how == "torn record":
        (path / store.RECORD).write_bytes((path / store.RECORD).read_bytes()[:-20])
    elif how == "no record":
        (path / store.RECORD).unlink()
    elif how == "torn instances":
        (path / store.INSTANCES).write_bytes((path / store.INSTANCES).read_bytes()[:-9])
    elif how == "no instances file":
        (path / store.INSTANCES).unlink()
    elif how == "torn details":
        (path / store.DETAILS).write_bytes((path / store.DETAILS).read_bytes()[:-9])
    elif how == "a bad instance":
        (path / store.INSTANCES).write_bytes(gzip.compress(b'{"benchmark": "x"}\n'))
    elif how == "a file":
        shutil.rmtree(path)
        path.write_text("x")
    else:
        field, value = {
            "another ticket": ("ticket", "0" * 64), "another checkpoint": ("checkpoint_digest", "0" * 64),
            "another suite": ("suite_digest", "0" * 64), "two parts": ("evaluations", record["evaluations"] * 2),
            "a command": ("command", "rm"), "a failure": ("status", "failed"),
            "no score": ("evaluations", [record["evaluations"][0] | {"scores": []}]),
        }[how]  # fmt: skip
        (path / store.RECORD).write_text(json.dumps(record | {field: value}))


@pytest.mark.parametrize("how", [
    "torn record", "no record", "torn details", "torn instances", "no instances file", "a bad instance", "a file",
    "another ticket",
    "another checkpoint", "another suite", "two parts", "a command", "a failure", "no score",
])  # fmt: skip
def test_a_part_that_is_torn_or_foreign_is_evaluated_again(
    make: Callable[..., Kept], queue: Queue, how: str
) -> None:
    one = make()
    one.put(KEY, OUTCOME)
    (path,) = Path(queue.root, "partial").glob("*/*")
    damage(path, how)
    assert one.get(KEY) is None
    one.put(KEY, OUTCOME)           # and the new one takes its place
    assert same(one.get(KEY))


def test_parts_go_with_their_ticket_and_links_are_not_followed(
    make: Callable[..., Kept], queue: Queue, tmp_path: Path
) -> None:
    root, precious = Path(queue.root), tmp_path / "precious"
    precious.mkdir()
    (precious / store.RECORD).write_text("{}")
    one, other = make(), make(step=200)
    one.put(KEY, OUTCOME)
    other.put(KEY, OUTCOME)
    assert len(os.listdir(root / "partial")) == 2
    ticket = one.record(()).ticket
    (root / "partial" / ticket / "0-link").symlink_to(precious)
    one._path("linked").symlink_to(precious)
    assert one.get("linked") is None
    parts.remove(root, ticket)
    parts.remove(root, ticket)
    assert os.listdir(root / "partial") == [other.record(()).ticket]
    (root / "partial" / ticket).symlink_to(precious)
    assert one.get("x") is None
    (precious / one._path("x").name).mkdir()
    (precious / one._path("x").name / store.RECORD).write_text("{}")
    assert one.get("x") is None
    parts.remove(root, ticket)
    assert os.listdir(root / "partial") == [other.record(()).ticket]
    assert (precious / store.RECORD).exists()
    assert (precious / one._path("x").name / store.RECORD).exists()
