"""`cancel`, and what `status` and `retry` make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoeval_hooks import submit
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import Shown, StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]


@pytest.fixture
def command(config_file: Path) -> Callable[..., Result]:
    return lambda *argv: CliRunner().invoke(cli, [*argv, "--config", str(config_file)])


@pytest.fixture
def three(checkpoint: MakeCheckpoint, config_file: Path, tmp_path: Path) -> Queue:
    """Tickets of two runs, at steps 100 and 200, and 100."""
    for step, run, weights in ((100, "a", b"1"), (200, "a", b"2"), (100, "b", b"3")):
        path = checkpoint(step, weights, name=f"{run}-{step}")
        submit(path, step=step, config=config_file, run=RunIdentity(f"id-{run}", run))
    return Queue(str(tmp_path / "queue"), runner="somebody")


def states(queue: Queue) -> dict[tuple[str, int], str]:
    read = [(queue.read(t).manifest, t.state) for t in queue.tokens()]
    return {(m.run.name, m.step): state for m, state in read}


@pytest.mark.parametrize(
    ("argv", "cancelled"),
    [
        (["--step", "100"], {("a", 100), ("b", 100)}),
        (["--run", "a"], {("a", 100), ("a", 200)}),
        (["--run", "id-b"], {("b", 100)}),
        (["--run", "a", "--step", "100"], {("a", 100)}),
        (["--suite", "quick"], {("a", 100), ("a", 200), ("b", 100)}),
        (["--suite", "other"], set()),
        (["--step", "300"], set()),
    ],
)
def test_what_is_meant_is_cancelled_and_nothing_else(
    three: Queue, command: Callable[..., Result], argv: list[str], cancelled: set[tuple[str, int]]
) -> None:
    done = command("cancel", *argv, "--reason", "not needed")
    assert done.exit_code == 0
    assert {key for key, state in states(three).items() if state == "cancelled"} == cancelled
    assert done.stdout.count(": cancelled\n") == len(cancelled)
    assert ("no pending or claimed ticket is meant" in done.stderr) == (not cancelled)
    shown = json.loads(command("status", "--json").stdout)
    assert shown["counts"]["cancelled"] == len(cancelled)
    assert [t["why"] for t in shown["tickets"] if t["state"] == "cancelled"] == ["not needed"] * len(cancelled)


def test_by_the_start_of_its_id(three: Queue, command: Callable[..., Result], run: Run) -> None:
    token = next(iter(three.tokens("pending")))
    assert command("cancel", token.ticket[:10]).stdout == f"{token.ticket[:12]}: cancelled\n"
    assert three.reason(next(iter(three.tokens("cancelled")))) == "cancelled by hand"
    again = command("cancel", token.ticket[:10])
    assert again.exit_code == 2
    assert "no pending or claimed ticket starts with" in again.stderr
    assert command("cancel").exit_code == 2
    assert "cancelled by hand" in command("status").stdout
    # `--all` means failed ones; a cancelled one is brought back by its id alone.
    assert "no ticket has failed" in command("retry", "--all").stderr
    assert command("retry", token.ticket[:10]).stdout == f"{token.ticket[:12]}: queued\n"
    run(StandIn())
    assert set(states(three).values()) == {"done"}


def test_a_ticket_that_is_being_evaluated(
    three: Queue, command: Callable[..., Result], run: Run, tmp_path: Path
) -> None:
    """The runner that holds it cannot commit; nothing is published."""
    sink = Shown()

    def while_it_runs(job: object) -> None:
        done = command("cancel", "--suite", "quick")
        assert done.stdout.count("cancelled; runner r1 stops evaluating it") == 1

    run(StandIn(during=while_it_runs), sink=sink)
    assert set(states(three).values()) == {"cancelled"}
    assert sink.results == []
    assert store.done(tmp_path / "queue") == ([], [])


def test_a_ticket_that_moves_while_it_is_cancelled(
    three: Queue, command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = Queue.cancel
    raced: list[Token] = []

    def race(self: Queue, token: Token, reason: str) -> bool:
        if token.state == "pending" and not raced:
            claimed = three.claim(wanted=lambda t: t.ticket == token.ticket)
            assert claimed is not None
            raced.append(claimed)
        return cancel(self, token, reason)

    monkeypatch.setattr(Queue, "cancel", race)
    assert "cancelled; runner somebody stops evaluating it" in command("cancel", "--run", "b").stdout
    raced.clear()

    def ends(self: Queue, token: Token, reason: str) -> bool:
        claimed = three.claim(wanted=lambda t: t.ticket == token.ticket)
        assert claimed is not None
        assert three.fail(claimed)
        return cancel(self, token, reason)

    monkeypatch.setattr(Queue, "cancel", ends)
    assert "not cancelled; it is failed by now" in command("cancel", "--step", "200").stdout


def test_one_that_cannot_be_read_is_cancelled_by_its_id_alone(
    three: Queue, command: Callable[..., Result]
) -> None:
    token = next(iter(three.tokens("pending")))
    Path(three.root, "pending", token.name).write_text("torn")
    command("cancel", "--suite", "quick")
    assert [t.ticket for t in three.tokens("pending")] == [token.ticket]
    command("cancel", token.ticket)
    assert list(three.tokens("pending")) == []
