"""Points that were lost between the result and the run come back, once, with the real wandb client.

The shipped stand-in plays the service: it keeps rows by the offset that a writer names.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autoeval_hooks import relay_files as files
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.cli import cli
from eval_runner.sinks import wandb as sinks
from eval_runner.sinks import wandb_children
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink
from tests import results_samples, wandb_log
from tests.wandb_runs import (
    IDENTITY,
    Backend,
    backend,
    environment,
    expected,
    result,
    rows,
    scores,
    train,
    training_rows,
    with_mode,
)
from tests.wandb_stand_in import standing

pytestmark = pytest.mark.slow      # minutes, most of them waiting: `make test-wandb`

Sync = Callable[..., Result]


@pytest.fixture
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


@pytest.fixture
def queue(tmp_path: Path, service: Backend, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A queue, in the environment of a runner whose clocks are fast."""
    for key, value in environment(tmp_path / "runner", "online", service.url).items():
        monkeypatch.setenv(key, value)
    for key, value in {"STALE_S": 0.5, "ENDED_STALE_S": 0.3}.items():
        monkeypatch.setattr(files, key, value)
    monkeypatch.setattr(sinks, "PAUSE_S", 0.05)
    monkeypatch.setattr(wandb_children, "SHOWN_S", 0.0)
    return results_samples.queue(tmp_path / "q")


@pytest.fixture
def sync(tmp_path: Path, queue: Path) -> Sync:
    config = tmp_path / "autoeval.yaml"
    config.write_text(f"queue: {queue}\nsuites: {{quick: {{evaluators: [{{type: helm, entries: [a]}}]}}}}\n")

    def go(*args: str) -> Result:
        return CliRunner().invoke(cli, ["sync", "--config", str(config), "--json", *args], catch_exceptions=False)

    return go


def ours(service: Backend) -> RunIdentity:
    return replace(IDENTITY, wandb_base_url=service.url)


def publish(queue: Path, sink: WandbSink | None, *steps: int, run: RunIdentity) -> None:
    """What a runner leaves for these steps."""
    for step in steps:
        if not any(step == int(name.split("~")[0], 16) for name in os.listdir(queue / "results")):
            results_samples.publish(queue, result(step, run))
        if sink is not None:
            sink.publish(result(step, run))


def make_sink(queue: Path) -> WandbSink:
    return WandbSink({}, Context(queue=queue, runner="r-1", where="sinks[0]"))


def flush(sink: WandbSink, seconds: float = 60.0) -> None:
    """Flush until nothing waits."""
    end = time.monotonic() + seconds
    while not sink.flush():
        assert time.monotonic() < end, sink.waiting
        time.sleep(0.05)


@pytest.mark.parametrize("grace", [0.05, 60.0], ids=["thought delivered", "not sure"])
def test_a_training_that_dies_between_log_and_upload(
    tmp_path: Path, queue: Path, service: Backend, grace: float
) -> None:
    """Killed with W&B's own process, which had sent nothing yet; the relay had moved its point to logged/, or not."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, queue, 12, points={"2": [10]}, end=False, leave="crash", status=-9, grace=grace, send_every=60,
          linger=0.3)  # fmt: skip
    directory = queue / "relay" / ours(service).key
    assert standing(directory) == {"logged" if grace < 1 else "taken": [10]}
    run = service.run("p", "r1")
    assert scores(rows(service)) == []
    run.set_state("crashed")
    sink = make_sink(queue)
    flush(sink)
    assert scores(rows(service)) == expected(10)
    assert standing(directory) == {"logged": [10]}
    before = rows(service)
    flush(make_sink(queue))
    assert rows(service) == before


def test_killed_and_resumed_at_once(tmp_path: Path, queue: Path, service: Backend) -> None:
    """The resumed training's relay finds what the killed one had taken: one point sent, one not. It logs neither, and
    the runner brings the one that is not there."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, queue, 12, points={"2": [10], "12": [20]}, end=False, leave="crash", status=-9, grace=60.0, linger=2.5)
    directory = queue / "relay" / ours(service).key
    assert standing(directory) == {"taken": [10, 20]} or standing(directory) == {"taken": [10], "points": [20]}
    assert scores(rows(service)) == expected(10)
    train(env, queue, 12, start=13, resume="must", points={"14": [30]}, leave="finish", grace=60.0)
    assert scores(rows(service)).count((10, 0.01)) == 1
    flush(make_sink(queue))
    found = rows(service)
    assert sorted(scores(found)) == expected(10, 20, 30)
    assert len(training_rows(found)) == 24
    assert service.run("p", "r1").overwritten == 0


def test_a_service_that_says_yes_and_loses_rows(tmp_path: Path, queue: Path, service: Backend) -> None:
    """While training lives and afterwards; what comes back is there once."""
    service.loses_rows = True
    env = environment(tmp_path / "t", "online", service.url)
    train(env, queue, 12, points={"2": [10]}, planned=12, leave="finish")
    directory = queue / "relay" / ours(service).key
    assert standing(directory) == {"logged": [10]}
    sink = make_sink(queue)
    publish(queue, sink, 20, run=ours(service))
    end = time.monotonic() + 30
    while not any("not all came" in w.why for w in sink.waiting) and time.monotonic() < end:
        sink.flush()
        time.sleep(0.05)
    assert ["not all came" in w.why for w in sink.waiting] == [True], sink.waiting
    service.loses_rows = False
    flush(sink)
    assert sorted(scores(rows(service))) == expected(10, 20)


def test_an_offline_directory_that_was_deleted(tmp_path: Path, queue: Path, service: Backend, sync: Sync) -> None:
    """The scores that came after training stood in a directory of their own. No runner would look again: sync does."""
    env = environment(tmp_path / "t", "offline", service.url)
    train(env, queue, 12, points={"2": [10]}, planned=12, leave="finish")
    run = replace(with_mode("offline"), wandb_base_url=service.url)
    sink = make_sink(queue)
    publish(queue, sink, 10, 20, 30, run=run)
    flush(sink)
    first, second = wandb_log.logs(tmp_path / "t", "r1")
    assert sorted(scores(wandb_log.rows(second))) == expected(20, 30)
    assert json.loads(sync("--dry-run").stdout)["counts"] == {"shown": 3}
    shutil.rmtree(second.parent)
    done = sync("--wait", "60")
    assert (done.exit_code, json.loads(done.stdout)["repaired"]) == (0, 2), done.stdout
    first, second = wandb_log.logs(tmp_path / "t", "r1")
    assert scores(wandb_log.rows(first)) == expected(10)
    assert sorted(scores(wandb_log.rows(second))) == expected(20, 30)

    shutil.rmtree(tmp_path / "t" / "wandb")  # or not mounted: nobody can tell
    done = sync()
    assert done.exit_code == 75
    assert {(p["state"], "are not here" in p["says"]) for p in json.loads(done.stdout)["points"]} == {("unclear", True)}


def test_a_result_that_cannot_be_read_is_not_called_shown(
    tmp_path: Path, queue: Path, service: Backend, sync: Sync
) -> None:
    publish(queue, None, 10, run=replace(ours(service), wandb_id=""))
    assert sync().exit_code == 0
    (record,) = queue.glob("results/*/result.json")
    record.write_text("{")
    told = sync()
    assert told.exit_code == 75
    assert "warning: ticket" in told.stderr


@pytest.mark.parametrize("removed", [["logged"], ["logged", "given"], ["."]])
def test_everything_given_again_is_there_once(
    tmp_path: Path, queue: Path, service: Backend, removed: list[str]
) -> None:
    """Marks and files removed by hand, after the training."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, queue, 12, points={"2": [10]}, planned=12, leave="finish")
    sink = make_sink(queue)
    publish(queue, sink, 10, 20, run=ours(service))
    flush(sink)
    before = rows(service)
    directory = queue / "relay" / ours(service).key
    for name in removed:
        shutil.rmtree(directory / name)
    if removed == ["."]:  # not even who trained it is known
        sink.publish(result(10, ours(service)))
        (directory / "closed").touch()
    for _ in range(2):
        again = make_sink(queue)
        publish(queue, again, 10, 20, run=ours(service))
        flush(again)
        assert rows(service) == before
    assert standing(directory) == {"logged": [10, 20]}


def test_a_resumed_training_logs_nothing_twice_when_all_is_given_again(
    tmp_path: Path, queue: Path, service: Backend
) -> None:
    env = environment(tmp_path / "t", "online", service.url)
    train(env, queue, 12, points={"2": [10]}, leave="finish")
    sink = make_sink(queue)
    publish(queue, sink, 10, 20, run=ours(service))
    flush(sink)
    shutil.rmtree(queue / "relay" / ours(service).key / "logged")
    publish(queue, make_sink(queue), 10, 20, run=ours(service))
    train(env, queue, 12, start=13, resume="must", leave="finish")
    assert sorted(scores(rows(service))) == expected(10, 20)
    flush(make_sink(queue))
    assert sorted(scores(rows(service))) == expected(10, 20)


def test_sync_tells_all_cases_and_repairs_twice_with_the_same_outcome(
    tmp_path: Path, queue: Path, service: Backend, sync: Sync
) -> None:
    """10 by the relay, 20 by the runner; 30 was never given; the row of 40 was lost since; that of 50 was changed;
    60 is there twice; 70 is of nobody."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, queue, 12, points={"2": [10]}, planned=12, leave="finish")
    sink = make_sink(queue)
    publish(queue, sink, 10, 20, 40, 50, 60, run=ours(service))
    flush(sink)
    publish(queue, None, 30, run=ours(service))
    run = service.run("p", "r1")
    by_step: dict[Any, int] = {row.get("bench/step"): offset for offset, row in run.rows.items()}
    last = max(run.rows)
    for i, step in enumerate((60, 70)):
        changed = {**run.rows[by_step[60]], "_step": last + 1 + i, "bench/step": step}
        run.rows[last + 1 + i] = changed
    run.rows[by_step[50]] = {**run.rows[by_step[50]], "bench/s/arc/acc": 0.9}
    run.rows[by_step[40]] = {"_step": run.rows[by_step[40]]["_step"]}
    before, held = rows(service), {k: dict(v) for k, v in run.rows.items()}
    kept = sorted(str(path) for path in (queue / "relay").rglob("*"))

    dry = sync("--dry-run")
    states = {p["step"]: (p["state"], p["says"]) for p in json.loads(dry.stdout)["points"]}
    assert {step: state for step, (state, _) in states.items()} == {
        10: "shown", 20: "shown", 30: "missing", 40: "missing", 50: "different", 60: "twice", 70: "unknown",
    }  # fmt: skip
    assert states[50][1] == "bench/s/arc/acc is 0.9, not 0.05"
    assert dry.exit_code == 75
    assert rows(service) == before
    assert sorted(str(path) for path in (queue / "relay").rglob("*")) == kept

    done = sync("--wait", "60")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["counts"] == {"shown": 4, "different": 1, "twice": 1, "unknown": 1}
    assert told["repaired"] == 2
    assert {p["step"] for p in told["points"] if p["was"] == "missing"} == {30, 40}
    found = rows(service)
    assert found[: len(before)] == before
    assert sorted(scores(found[len(before) :])) == expected(30, 40)
    assert {k: run.rows[k] for k in held} == held
    again = sync("--wait", "60")
    assert (again.exit_code, json.loads(again.stdout)["repaired"]) == (1, 0)
    assert rows(service) == found
