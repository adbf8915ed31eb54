"""The sink and its writer with the real wandb client: scores of runs whose training process is gone.

The shipped stand-in plays the service: it stores rows by the offset that a writer names, so a clobbered row shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks import relay_files as files
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.sinks import wandb as sinks
from eval_runner.sinks import wandb_children
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink, close_run
from tests import wandb_log
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

MakeSink = Callable[..., WandbSink]


@pytest.fixture
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


@pytest.fixture
def make_sink(tmp_path: Path, service: Backend, monkeypatch: pytest.MonkeyPatch) -> MakeSink:
    """A sink whose clocks are fast, for the queue tmp_path/q; the process's environment is that of a runner."""
    for key, value in environment(tmp_path / "runner", "online", service.url).items():
        monkeypatch.setenv(key, value)
    for key, value in {"STALE_S": 0.3, "ENDED_STALE_S": 0.1}.items():
        monkeypatch.setattr(files, key, value)
    monkeypatch.setattr(sinks, "PAUSE_S", 0.05)
    monkeypatch.setattr(wandb_children, "SHOWN_S", 0.0)

    def make(runner: str = "r-1", **settings: str) -> WandbSink:
        return WandbSink(settings, Context(queue=tmp_path / "q", runner=runner, where="sinks[0]"))

    return make


def ours(service: Backend) -> RunIdentity:
    """The run that the stand-in trainer trains."""
    return replace(IDENTITY, wandb_base_url=service.url)


def flush(sink: WandbSink, seconds: float = 20.0) -> bool:
    """Flush until nothing waits or the time is over."""
    end = time.monotonic() + seconds
    while not (done := sink.flush()) and time.monotonic() < end:
        time.sleep(0.05)
    return done


def waits(sink: WandbSink, why: str) -> None:
    """Flushing for a second moves nothing, for this reason."""
    assert not flush(sink, 1.0)
    assert [why in w.why for w in sink.waiting] == [True], sink.waiting


def wandb_processes() -> list[str]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "wandb-core" in line or "wandb_writer" in line]


@pytest.mark.slow
def test_killed_training_online(tmp_path: Path, service: Backend, make_sink: MakeSink) -> None:
    """Three points that the killed process could not deliver: one in its open row, one in memory, one that comes late.
    One more that it did deliver, less than the grace time ago. All are there once, and all else is as it was."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, tmp_path / "q", 12, points={"2": [10], "10": [20], "end": [30]}, end=False, leave="kill", status=-9,
          grace=60.0, linger=2.5)  # fmt: skip
    sink = make_sink()
    sink.publish(result(5, ours(service)))
    before = training_rows(rows(service))
    run = service.run("p", "r1")
    waits(sink, "is running")
    assert len(run.rows) == 12  # a service that still hears from a writer is believed

    run.set_state("crashed")  # what the service says some minutes later
    run.states.clear()
    assert flush(sink)
    found = rows(service)
    assert training_rows(found) == before
    assert len(before) == 12
    assert sorted(scores(found)) == expected(5, 10, 20, 30)
    assert run.overwritten == 0
    assert run.states == []  # it crashed, and that is what it says
    assert (run.display_name, run.group, run.job_type) == ("the training", "g", "")
    assert run.config["lr"] == {"value": 1}
    assert run.summary["loss"] == {"min": pytest.approx(1 / 12)}
    assert run.summary["train/global_step"] == 12
    assert _axes(run.config["_wandb"]["value"]["m"])["bench/s/arc/acc"] == "bench/step"
    # A chart over Hugging Face's own axis is right too where the row is ours alone.
    assert (5, 5) in wandb_log.series(found, "train/global_step", "bench/step")
    assert sink.flush()
    assert rows(service) == found


@pytest.mark.parametrize("sent", [True, False], ids=["sent", "lost"])
def test_a_script_that_ends_in_order(tmp_path: Path, service: Backend, make_sink: MakeSink, sent: bool) -> None:
    """W&B sends in its exit hook, after the relay. What could be lost there waits until the row has been seen.
    A service that loses what comes stands in for a job that is killed while the hook sends."""
    service.loses_rows = not sent
    env = environment(tmp_path / "t", "online", service.url)
    train(env, tmp_path / "q", 5, points={"2": [10], "end": [20]}, planned=5, grace=40.0)
    service.loses_rows = False
    directory = tmp_path / "q" / "relay" / ours(service).key
    assert os.listdir(directory / "logged") == []
    assert len(os.listdir(directory / "taken")) == 2
    before = rows(service)
    assert scores(before) == (expected(10, 20) if sent else [])
    sink = make_sink()
    assert flush(sink)
    assert sorted(scores(rows(service))) == expected(10, 20)
    assert len(os.listdir(directory / "logged")) == 2
    if sent:
        assert rows(service) == before


def _axes(definitions: list[dict[str, object]]) -> dict[object, object]:
    """Name or pattern → step metric, from a run's config."""
    names = [d.get("1") or d["2"] for d in definitions]
    return {name: names[d["5"] - 1] if "5" in d else None for name, d in zip(names, definitions, strict=True)}  # type: ignore[operator]


def test_killed_training_offline_and_sync(tmp_path: Path, service: Backend, make_sink: MakeSink) -> None:
    """The late points stand in a second directory beside the first; `wandb sync` of both makes one run."""
    env = environment(tmp_path / "t", "offline")
    train(env, tmp_path / "q", 12, points={"2": [10], "10": [20], "end": [30]}, end=False, leave="kill", status=-9,
          grace=60.0, linger=2.5)  # fmt: skip
    before = training_rows(rows(tmp_path / "t"))
    sink = make_sink()
    sink.publish(result(5, replace(with_mode("offline"), wandb_base_url=env["WANDB_BASE_URL"])))
    assert flush(sink)
    logs = wandb_log.logs(tmp_path / "t", "r1")
    assert len(logs) == 2
    assert training_rows(wandb_log.rows(logs[0])) == before
    assert len(before) == 12

    env = environment(tmp_path / "sync", "online", service.url)
    wandb = Path(sys.executable).with_name("wandb")
    subprocess.run([wandb, "sync", *(log.parent for log in logs)], env=env, check=True, capture_output=True, timeout=60)
    found, run = rows(service), service.run("p", "r1")
    assert training_rows(found) == before
    assert sorted(scores(found)) == expected(5, 10, 20, 30)
    assert run.overwritten == 0
    assert (run.display_name, run.group) == ("the training", "g")
    assert run.config["lr"] == {"value": 1}
    assert run.summary["loss"] == {"min": pytest.approx(1 / 12)}
    assert run.summary["train/global_step"] == 12
    assert _axes(run.config["_wandb"]["value"]["m"])["*"] == "train/global_step"


@pytest.mark.slow
def test_by_step_run_keeps_its_next_step_free(tmp_path: Path, service: Backend, make_sink: MakeSink) -> None:
    """Stopped at 10 of 20, resumed, complete: points of the first half wait for the second, or go beside the run."""
    env = environment(tmp_path / "t", "online", service.url)
    steps: dict[str, object] = {"by_step": True, "planned": 20}
    train(env, tmp_path / "q", 10, points={"end": [3, 4]}, leave="finish", **steps)
    sink = make_sink()
    waits(sink, "autoeval-runner close RUN")
    assert len(rows(service)) == 10

    beside = make_sink("r-2", late="companion")
    assert flush(beside)
    companion = service.run("p", "r1-eval")
    assert sorted(scores(companion.history())) == expected(3, 4)
    assert (companion.group, companion.job_type, companion.state) == ("g", "eval", "finished")
    assert len(rows(service)) == 10

    sink.publish(result(5, ours(service)))
    waits(sink, "autoeval-runner close RUN")
    train(env, tmp_path / "q", 10, start=11, resume="must", points={"20": [6]}, leave="finish", **steps)
    found = rows(service)
    assert [row["_step"] for row in training_rows(found)] == list(range(1, 21))  # not one was lost
    assert scores(found) == expected(5)  # by the relay, which found it waiting
    assert flush(sink)  # complete: the last one by the sole writer
    assert training_rows(rows(service)) == training_rows(found)
    assert scores(rows(service)) == expected(5, 6)
    assert service.run("p", "r1").overwritten == 0


@pytest.mark.slow
def test_without_the_guard_a_resumed_by_step_run_loses_rows(
    tmp_path: Path, service: Backend, make_sink: MakeSink
) -> None:
    """Why the run above must wait: closed by the user and resumed all the same, it loses as many rows as were added."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, tmp_path / "q", 6, by_step=True, planned=20, points={"end": [3, 4]}, leave="finish")
    sink = make_sink()
    waits(sink, "autoeval-runner close RUN")
    assert close_run(tmp_path / "q", "r1") == ours(service).key
    assert flush(sink)
    assert scores(rows(service)) == expected(3, 4)
    assert len(training_rows(rows(service))) == 6
    train(env, tmp_path / "q", 4, start=7, resume="must", by_step=True, leave="finish")
    assert len(training_rows(rows(service))) == 8
    assert not (tmp_path / "q" / "relay" / ours(service).key / "closed").exists()  # it is not over, as it turned out


@pytest.mark.slow
def test_a_service_that_hangs_or_loses_rows(
    tmp_path: Path, service: Backend, make_sink: MakeSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = environment(tmp_path / "t", "online", service.url)
    train(env, tmp_path / "q", 3, leave="finish")
    before = set(wandb_processes())
    sink = make_sink()
    sink.publish(result(5, ours(service)))
    monkeypatch.setattr(wandb_children, "WRITER_TIMEOUT_S", 4.0)
    service.hang.clear()
    flush(sink, 2.0)
    assert ["took longer than 4 s" in w.why for w in sink.waiting] == [True], sink.waiting
    end = time.monotonic() + 10
    while set(wandb_processes()) - before and time.monotonic() < end:
        time.sleep(0.1)
    assert set(wandb_processes()) - before == set()
    directory = tmp_path / "q" / "relay" / ours(service).key
    assert len(os.listdir(directory / "points")) == 1  # nothing was logged so far
    assert os.listdir(directory / "writer") == ["free"]

    service.hang.set()
    monkeypatch.setattr(wandb_children, "WRITER_TIMEOUT_S", 60.0)
    service.loses_rows = True  # nor is a service believed that says yes to all
    flush(sink, 2.0)
    assert ["not all came" in w.why for w in sink.waiting] == [True], sink.waiting
    service.loses_rows = False
    assert flush(sink)
    assert scores(rows(service)) == expected(5)


def test_the_key_never_goes_to_a_service_that_a_ticket_names(
    tmp_path: Path, service: Backend, make_sink: MakeSink
) -> None:
    with backend() as other:
        sink = make_sink()
        sink.publish(result(5, replace(IDENTITY, wandb_base_url=other.url)))
        close_run(tmp_path / "q", "r1")
        waits(sink, f"the run reports to {other.url}")
        assert other.operations == []


def test_two_runners_and_one_that_died(tmp_path: Path, service: Backend, make_sink: MakeSink) -> None:
    """Two sinks at once, and points that a dead runner had taken: each is there once. The run stays failed, as its
    script left it, and keeps its metric definitions, which resuming alone would lose."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, tmp_path / "q", 3, leave="finish")
    run = service.run("p", "r1")
    definitions = _axes(run.config["_wandb"]["value"]["m"])
    assert definitions == {"train/global_step": None, "loss": None, "*": "train/global_step"}
    run.set_state("failed")
    first, second = make_sink("r-1"), make_sink("r-2")
    directory = tmp_path / "q" / "relay" / ours(service).key
    for step in (5, 6, 7):
        first.publish(result(step, ours(service)))
    os.rename(directory / "points" / f"{6:064x}.json", directory / "taken" / f"{6:064x}~dead")
    for step in (5, 6, 7):
        second.publish(result(step, ours(service)))  # a replay
    assert sorted(os.listdir(directory / "points")) == [f"{step:064x}.json" for step in (5, 7)]
    threads = [threading.Thread(target=flush, args=(sink,)) for sink in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(scores(rows(service))) == expected(5, 6, 7)
    assert run.overwritten == 0
    assert run.state == "failed"
    axes = _axes(run.config["_wandb"]["value"]["m"])
    assert {name: axes[name] for name in definitions} == definitions
    assert axes["bench/s/arc/acc"] == "bench/step"
    assert run.summary["loss"] == {"min": pytest.approx(1 / 3)}
    first.publish(result(5, ours(service)))
    assert os.listdir(directory / "points") == []


@pytest.mark.slow
def test_a_row_that_shows_late_is_not_logged_again_by_the_other_runner(
    tmp_path: Path, service: Backend, make_sink: MakeSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_children, "SHOWN_S", 60.0)
    train(environment(tmp_path / "t", "online", service.url), tmp_path / "q", 3, planned=3, leave="finish")
    first, second = make_sink("r-1"), make_sink("r-2")
    first.publish(result(5, ours(service)))
    service.late = 8.0
    for sink in (first, second):
        sink.flush()
    time.sleep(0.5)
    end = time.monotonic() + 90
    while not first.flush() and "watching" in first.waiting[0].why and time.monotonic() < end:
        time.sleep(0.05)
    assert flush(second, 90.0)
    assert scores(rows(service)) == expected(5)


def test_training_that_comes_back_meanwhile_gets_the_points(
    tmp_path: Path, service: Backend, make_sink: MakeSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer looks at the heartbeat once more, as the last thing before it opens the run."""
    env = environment(tmp_path / "t", "online", service.url)
    train(env, tmp_path / "q", 3, leave="finish")
    sink = make_sink()
    sink.publish(result(5, ours(service)))
    directory = tmp_path / "q" / "relay" / ours(service).key
    run_writer = sinks.process.run

    def resume_first(*args: object, **kwargs: object) -> int:
        (directory / "heartbeat").write_text("another 00000000000000000000\n")
        return run_writer(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(sinks.process, "run", resume_first)
    end = time.monotonic() + 20
    while not any("come to life" in w.why for w in sink.waiting) and time.monotonic() < end:
        sink.flush()
        time.sleep(0.05)
    assert any("come to life" in w.why for w in sink.waiting)
    assert len(os.listdir(directory / "points")) == 1
    assert scores(rows(service)) == []
