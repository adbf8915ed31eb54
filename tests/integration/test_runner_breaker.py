"""A suite that fails on every checkpoint is stopped by real runners; only the evaluator is a stand-in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoeval_hooks import submit
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.queue import Queue
from eval_runner import breaker
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]


@pytest.fixture
def five(checkpoint: MakeCheckpoint, config_file: Path) -> None:
    for step in range(100, 600, 100):
        submit(checkpoint(step, b"w" * step), step=step, config=config_file)


def states(tmp_path: Path) -> Counter[tuple[str, int]]:
    return Counter((t.state, t.failures) for t in Queue(str(tmp_path / "queue")).tokens())


def failing(error: type[AutoEvalError] = AutoEvalError) -> StandIn:
    return StandIn([error("the disk of the data is away") for _ in range(99)])


def command(config_file: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, [*args, "--config", str(config_file)], catch_exceptions=False)


@pytest.mark.usefixtures("five", "quick")
def test_a_drain_ends_with_the_tickets_waiting_and_says_why(
    tmp_path: Path, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = failing()
    monkeypatch.setattr("eval_runner.registry.build_evaluators", lambda *a: [bad])
    ended = command(config_file, "run", "--drain")
    assert ended.exit_code == 75
    assert "suite quick: stopped, since it failed on 3 checkpoint(s) in a row" in ended.stderr
    assert "the disk of the data is away. Mend that and give `autoeval-runner retry --suite quick`" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("tickets wait for suite quick, which is stopped: see ")
    assert len({job.name for job in bad.jobs}) == len(bad.jobs) == 3
    assert states(tmp_path) == {("pending", 0): 3, ("pending", 1): 2}
    assert command(config_file, "run", "--drain").exit_code == 75       # a later runner respects it
    assert command(config_file, "run", "--once").exit_code == 75
    assert len(bad.jobs) == 3
    assert states(tmp_path) == {("pending", 0): 3, ("pending", 1): 2}
    assert command(config_file, "retry", "--suite", "quick").stdout == "suite quick: goes on\n"
    run(StandIn())
    assert sum(n for (state, _), n in states(tmp_path).items() if state == "done") == 5


@pytest.mark.usefixtures("five")
def test_a_wrong_configuration_does_not_fail_every_ticket(tmp_path: Path, config_file: Path, run: Run) -> None:
    bad = failing(ConfigError)
    runner = run(bad)
    assert len(bad.jobs) == 3
    assert runner.failed == 2                       # those before the breaker knew; the third waits with the rest
    assert states(tmp_path) == {("failed", 0): 2, ("pending", 0): 3}
    assert [o.suite for o in runner.held_back()] == ["quick"]
    runner.breakers.clock = lambda: float("inf")    # the pause is over by now, and they wait all the same
    assert [o.suite for o in runner.held_back()] == ["quick"]
    retried = command(config_file, "retry", "--suite", "quick").stdout.splitlines()
    assert retried[0] == "suite quick: goes on"
    assert [line.partition(": ")[2] for line in retried[1:]] == ["queued", "queued"]
    assert run(StandIn()).held_back() == []
    assert states(tmp_path) == {("done", 0): 5}


def an_hour_later(tmp_path: Path) -> None:
    (file,) = (tmp_path / "queue" / "breakers").iterdir()
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"at": record["at"] - 3600}))


@pytest.mark.usefixtures("five")
@pytest.mark.parametrize("works", [True, False])
def test_after_a_pause_one_ticket_is_tried(tmp_path: Path, run: Run, works: bool) -> None:
    run(failing(ConfigError))
    an_hour_later(tmp_path)
    tried = StandIn() if works else failing(ConfigError)
    run(tried)
    assert len(tried.jobs) == (3 if works else 1)
    assert states(tmp_path) == {("failed", 0): 2, **({("done", 0): 3} if works else {("pending", 0): 3})}
    assert bool(breaker.read(tmp_path / "queue")) != works


@pytest.mark.usefixtures("five")
def test_no_other_runner_takes_a_ticket_while_one_is_tried(tmp_path: Path, run: Run) -> None:
    run(failing())
    (stopped,) = breaker.read(tmp_path / "queue")
    an_hour_later(tmp_path)
    other, stops = breaker.Breakers(tmp_path / "queue", 3), []

    def look(job: object = None) -> None:
        other.look()
        stops.append(other.stops(stopped.suite_digest))

    look()
    run(StandIn(during=look))
    assert stops == [False, True, False, False, False, False]


@pytest.mark.usefixtures("five")
def test_a_ticket_that_is_named_closes_the_breaker_of_its_suite(tmp_path: Path, config_file: Path, run: Run) -> None:
    run(failing(ConfigError))
    (first, second) = (f.ticket for f in store.collect(tmp_path / "queue").failed)
    assert command(config_file, "retry", first).stdout == f"suite quick: goes on\n{first[:12]}: queued\n"
    run(failing(ConfigError))
    waiting = next(t.ticket for t in Queue(str(tmp_path / "queue")).tokens("pending"))
    assert command(config_file, "retry", waiting).stdout == "suite quick: goes on\n"
    assert command(config_file, "retry", second).stdout == f"{second[:12]}: queued\n"
    assert command(config_file, "retry", "--suite", "quik").exit_code == 2


@pytest.mark.usefixtures("five")
def test_another_definition_and_another_suite_go_on(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    run(failing())
    config_file.write_text(config_file.read_text().replace("entries: [a]", "entries: [b]"))
    good = StandIn()
    run(good)                                       # the tickets are filed again, under the new definition
    assert len(good.jobs) == 5
    results, _ = store.done(tmp_path / "queue")
    assert Counter(r.status for r in results) == {"ok": 5, "refiled": 5}
    assert {json.loads(r.suite_text)["evaluators"][0]["entries"][0] for r in results if r.status == "ok"} == {"b"}
    assert len(breaker.read(tmp_path / "queue")) == 1


@pytest.mark.usefixtures("five")
def test_a_success_in_between_keeps_it_going(tmp_path: Path, run: Run) -> None:
    faults: list[Exception] = [ConfigError("1"), ConfigError("2")]
    evaluator = StandIn(faults)
    count = iter(range(99))

    def again(job: object) -> None:
        if next(count) == 0:
            faults.append(ConfigError("4"))

    evaluator.during = again
    run(evaluator)
    assert states(tmp_path) == {("failed", 0): 3, ("done", 0): 2}
    assert breaker.read(tmp_path / "queue") == []
