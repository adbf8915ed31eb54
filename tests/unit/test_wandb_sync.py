"""What `sync` makes of results and rows, without W&B: a stand-in takes the place of the child processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.cli import cli
from eval_runner.results.schema import Evaluation, Score
from eval_runner.sinks import wandb as sinks
from eval_runner.sinks.base import Context
from eval_runner.sinks.base import point as of
from eval_runner.sinks.wandb import WandbSink
from eval_runner.sinks.wandb_reader import Held
from tests import results_samples
from tests.wandb_runs import IDENTITY, result
from tests.wandb_stand_in import StandIn, standing, take
from tests.wandb_trainer import drop, point

BEAT = "a 00000000000000000001\n"
RELAY, KILLED = f"{files.RELAY}a-0", f"{files.RELAY}killed-0"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(sinks.process, "run", stand_in.run)
    return stand_in


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run's directory, with a training process that has shown itself."""
    path = tmp_path / "queue" / "relay" / IDENTITY.key
    for part in files.STAGES:
        (path / part).mkdir(parents=True)
    (path / "heartbeat").write_text(BEAT)
    announced = files.Announcement(files.VERSION, IDENTITY, "a", False, 10)
    (path / "run.json").write_bytes(files.encode(announced))
    return path


@pytest.fixture
def sink(tmp_path: Path) -> WandbSink:
    return WandbSink({}, Context(queue=tmp_path / "queue", runner="r-1", where="sinks[0]"))


def dead(directory: Path) -> None:
    """A runner has seen the training process gone, and looked for all that it logged."""
    (directory / "audited").write_text(BEAT)


def found(sink: WandbSink, *steps: int, repair: bool = True) -> dict[int, tuple[str, str]]:
    return {s.step: (s.state, s.says) for s in sink.compare([result(step) for step in steps], repair=repair)}


def row(step: int, **metrics: float) -> dict[str, Any]:
    """The row of a result, or one with other values."""
    return {**of(result(step)).row(), **metrics}


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "gone"])
def test_every_place_of_a_point_and_a_run_with_and_without_its_row(
    directory: Path, sink: WandbSink, writer: StandIn, alive: bool
) -> None:
    """Step → place: 1 nowhere, 2 points, 3 taken by the training, 4 logged by it, 5 logged by one killed before,
    6 taken by a runner that died, 7 logged by a runner. 11 to 17 stand likewise and are in the run."""
    if not alive:
        dead(directory)
    places = {3: ("taken", RELAY), 4: ("logged", RELAY), 5: ("logged", KILLED), 6: ("taken", "r"), 7: ("logged", "r")}
    for base in (0, 10):
        drop(directory, [base + step for step in range(2, 8)])
        for step, (stage, who) in places.items():
            take(directory, base + step, who, stage)
    writer.held.rows = [row(step) for step in range(11, 18)]
    steps = [*range(1, 8), *range(11, 18)]
    before = sorted(str(path) for path in directory.rglob("*"))
    told = found(sink, *steps, repair=False)
    assert sorted(str(path) for path in directory.rglob("*")) == before
    assert told == found(sink, *steps)
    states = {step: says[0] for step, says in told.items()}
    # What a training process that may live has logged can still be sent. One that was killed is watched first.
    sent = "waiting" if alive else "missing"
    assert states == {
        1: "missing", 2: "waiting", 3: sent, 4: sent, 5: "waiting", 6: "missing", 7: "missing",
        **dict.fromkeys(range(11, 18), "shown"),
    }  # fmt: skip
    if alive:
        assert standing(directory) == {
            "points": [1, 2, 6, 7], "taken": [3, 13], "logged": [4, 5, *[step for step in range(11, 18) if step != 13]]
        }  # fmt: skip
    else:
        assert standing(directory) == {"points": [1, 2, 3, 4, 6, 7], "logged": [5, *range(11, 18)]}
    again = {step: says[0] for step, says in found(sink, *steps).items()}
    assert again == {step: "waiting" if now == "missing" else now for step, now in states.items()}


def test_other_values_and_rows_of_nobody_are_told_and_left(
    directory: Path, sink: WandbSink, writer: StandIn
) -> None:
    dead(directory)
    drop(directory, [5])
    take(directory, 5, RELAY, "logged")
    writer.held.rows = [
        row(1, **{"bench/s/arc/acc": 0.5}),
        row(2), row(2),
        row(3, **{"bench/lag_s": 7.5}),
        {k: v for k, v in row(4).items() if k != "bench/s/arc/acc/n"},
        {"_step": 8, "bench/step": 80},
    ]  # fmt: skip
    told = found(sink, 1, 2, 3, 4, 5)
    assert told[1] == ("different", "bench/s/arc/acc is 0.5, not 0.001")
    assert told[2] == ("twice", "2 rows of the run have it; W&B cannot remove a row")
    assert told[3][0] == "different"
    assert "bench/lag_s is 7.5, not 3.123456789" in told[3][1]
    assert told[4][0] == "different"
    assert "bench/s/arc/acc/n is not there, not 100.0" in told[4][1]
    assert told[5] == ("missing", "")
    assert told[80] == ("unknown", "no result accounts for this row")
    assert standing(directory) == {"points": [5], "logged": [1, 2, 4]}


def test_what_is_logged_while_we_look_is_not_missing(directory: Path, sink: WandbSink, writer: StandIn) -> None:
    dead(directory)
    drop(directory, [5])

    def log_meanwhile(argv: list[str], **kwargs: Any) -> int:
        status = writer.run(argv, **kwargs)
        take(directory, 5, "another-runner", "logged")
        return status

    sinks.process.run = log_meanwhile
    assert found(sink, 5)[5][0] == "waiting"
    assert standing(directory) == {"logged": [5]}


def test_what_cannot_be_repaired_does_not_hold_up_the_others(
    directory: Path, sink: WandbSink, writer: StandIn
) -> None:
    """Nor does a row of somebody's that is no row of ours."""
    dead(directory)
    writer.held.rows = [{"_step": 1, "bench/step": "first"}, {"_step": 2, "bench/step": float("nan")}]
    long = replace(result(1), evaluations=(Evaluation("e", 1.0, (Score("b" * 400, "acc", "test", 0.5, 9),)),))
    told = {s.step: (s.state, s.says) for s in sink.compare([long, result(2)], repair=True)}
    assert told[1][0] == "missing"
    assert told[1][1].startswith("it cannot be repaired: ")
    assert told[1][1].endswith("not a name for a score")
    assert told[2] == ("missing", "")
    assert standing(directory) == {"points": [2]}


def test_the_directory_is_not_listed_for_each_result(
    directory: Path, sink: WandbSink, writer: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead(directory)
    drop(directory, list(range(1, 41)))
    for step in range(1, 41):
        take(directory, step, "r", "logged")
    writer.held.rows = [row(step) for step in range(1, 39)]
    listed: list[str] = []
    waiting = files.waiting
    monkeypatch.setattr(files, "waiting", lambda d, stage="points": (listed.append(stage), waiting(d, stage))[1])
    states = [state for state, _ in found(sink, *range(1, 41)).values()]
    assert states == ["shown"] * 38 + ["missing"] * 2
    assert len(listed) < 10


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (Held(False, "", []), "W&B has no such run"),
        (Held(True, "running", []), "W&B says that the run is running"),
        (AutoEvalError("python took longer than 300 s"), "took longer than 300 s"),
    ],
)
def test_what_cannot_be_looked_for_is_unclear_and_moves_nothing(
    directory: Path, sink: WandbSink, writer: StandIn, held: Any, says: str
) -> None:
    dead(directory)
    drop(directory, [5])
    take(directory, 5, RELAY, "logged")
    if isinstance(held, Exception):
        writer.status = held
    else:
        writer.held = held
    told = found(sink, 5)
    assert told[5][0] == "unclear"
    assert says in told[5][1]
    assert standing(directory) == {"logged": [5]}


def test_a_run_that_reports_to_no_wandb_is_none_of_ours(sink: WandbSink, tmp_path: Path) -> None:
    assert sink.compare([result(5, RunIdentity(id="ours"))], repair=True) == []
    assert not (tmp_path / "queue" / "relay").exists()


@pytest.fixture
def run_sync(tmp_path: Path) -> Callable[..., Result]:
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\n")
    results_samples.queue(tmp_path / "queue")

    def go(*args: str) -> Result:
        return CliRunner().invoke(cli, ["sync", "--config", str(config), *args], catch_exceptions=False)

    return go


def test_the_command_repairs_and_says_so(
    tmp_path: Path, directory: Path, writer: StandIn, run_sync: Callable[..., Result]
) -> None:
    dead(directory)
    second = replace(IDENTITY, wandb_id="r2", name="another")
    for r in (result(1), result(2), result(3, second)):
        results_samples.publish(tmp_path / "queue", r)
    writer.held.rows = [row(1), row(3)]
    dry = run_sync("--dry-run", "--json", "the training")
    assert dry.exit_code == 75
    told = json.loads(dry.stdout)
    assert told["counts"] == {"shown": 1, "missing": 1, "unknown": 1}
    assert standing(directory) == {}

    def deliver(argv: list[str], **kwargs: Any) -> int:
        writer.held.rows += [row(2)] if argv[-2].endswith("writer") else []
        return writer.run(argv, **kwargs)

    sinks.process.run = deliver
    writer.held.rows = [row(1)]
    done = run_sync("--json", "r1")
    assert done.exit_code == 0, done.stdout
    told = json.loads(done.stdout)
    assert (told["counts"], told["repaired"]) == ({"shown": 2}, 1)
    again = run_sync("r1")
    assert (again.exit_code, again.stdout) == (0, "2 shown\n")
    assert len(writer.wrote) == 1
    with pytest.raises(Exception, match="no result is of a run called 'r3'; known: another"):
        run_sync("r3")


def test_with_nothing_to_repair_nobody_else_is_waited_for(
    tmp_path: Path, directory: Path, writer: StandIn, run_sync: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    results_samples.publish(tmp_path / "queue", result(1))
    writer.held.rows = [row(1)]
    monkeypatch.setattr(WandbSink, "flush", lambda self: pytest.fail("there is nothing to bring"))
    assert run_sync("--wait", "600").exit_code == 0


def test_the_command_says_what_differs_and_what_waits(
    tmp_path: Path, directory: Path, writer: StandIn, run_sync: Callable[..., Result]
) -> None:
    results_samples.publish(tmp_path / "queue", result(1))
    writer.held.rows = [row(1, **{"bench/s/arc/acc": 0.5})]
    done = run_sync()
    assert done.exit_code == 1
    assert "bench/s/arc/acc is 0.5, not 0.001" in done.stdout
    writer.held.rows = []
    drop(directory, [1])
    os.unlink(directory / "points" / f"{point(1).ticket}.json")
    done = run_sync()
    assert done.exit_code == 75
    assert "watching whether the training process is alive" in done.stdout


def test_two_results_of_a_step_that_share_their_price_are_two(
    directory: Path, sink: WandbSink, writer: StandIn
) -> None:
    """What stands in the run is another suite's point at the same step; ours is missing, not different."""
    dead(directory)
    paid = {"cost_usd": 0.25}
    ours, other = (
        replace(r, evaluations=tuple(replace(e, usage=paid) for e in r.evaluations))
        for r in (result(1), replace(result(1), suite="other", ticket="0" * 64, finished_at=result(1).finished_at + 9))
    )
    assert of(ours).metrics["bench/cost_usd"] == 0.25
    writer.held.rows = [of(other).row()]
    (told,) = (s for s in sink.compare([ours], repair=False) if s.step == 1 and s.ticket)
    assert told.state == "missing"


def test_a_point_has_a_price_where_one_is_known() -> None:
    r = result(1)
    (e,) = r.evaluations
    assert "bench/cost_usd" not in of(replace(r, evaluations=(replace(e, usage={"requests": 5.0}),))).metrics
    both = replace(r, evaluations=(e, replace(e, usage={"cost_usd": 0.5}), replace(e, usage={"cost_usd": 0.25})))
    assert of(both).metrics["bench/cost_usd"] == 0.75
