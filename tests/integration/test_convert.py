"""Tickets of Megatron's checkpoints, evaluated through `convert`: from submit to the score. The converter and the
evaluator are stand-ins; the queue, the pins, the runner and the locks are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from autoeval_hooks import submit
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import runner as runners
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Result
from eval_runner.runner import Runner
from tests import converters
from tests import megatron_layouts as made
from tests.processes import wait_for
from tests.stand_ins import StandIn

WAIT_S = 60.0


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    path = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(path))
    return lambda: len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runners, "RETRY_S", 0.01)
    return write(tmp_path)


def write(tmp_path: Path, *how: str) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(yaml.safe_dump({
        "queue": "queue",
        "suites": {name: {"evaluators": [{"type": "helm", "entries": [name]}]} for name in ("a", "b")},
        "runner": {"lease": 6.0, "allow_pickled_weights": True, "max_attempts": 2},
        "convert": {
            "command": [sys.executable, converters.__file__, "{checkpoint}", "{output}", *how], "directory": "kept"
        },
        "sinks": [],
    }))  # fmt: skip
    return path


def drain(config_file: Path, evaluator: StandIn, progress: Progress, name: str = "r1") -> None:
    config = configs.load(str(config_file))
    assert Runner(config, {"a": [evaluator], "b": [evaluator]}, {}, progress, name=name).run("drain")


def run(config_file: Path, evaluator: StandIn) -> None:
    with Progress() as progress:
        drain(config_file, evaluator, progress)


def results(tmp_path: Path, *states: str) -> list[Result]:
    queue = Queue(str(tmp_path / "queue"))
    return [store.read(tmp_path / "queue" / "results" / token.result_name) for token in queue.tokens(*states)]


@pytest.mark.parametrize("make", [made.torch_dist, made.torch])
def test_two_suites_are_scored_and_the_checkpoint_is_converted_once(
    config_file: Path, tmp_path: Path, calls: Callable[[], int], make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "save" / "iter_0000010")
    assert submit(path, config=config_file) == {"a": True, "b": True}
    for file in path.rglob("*"):        # as Megatron's retention does
        if file.is_file():
            file.unlink()
    evaluator = StandIn()
    run(config_file, evaluator)
    done = results(tmp_path, "done")
    assert {r.suite for r in done} == {"a", "b"}
    assert all(r.step == 10 and r.scores for r in done)
    assert calls() == 1
    assert [job.endpoint for job in evaluator.jobs] == [None, None]
    assert all(job.facts["converted by"].startswith("python") for job in evaluator.jobs)
    assert list((tmp_path / "save" / ".autoeval" / "pins").iterdir()) == []


def test_two_runners_at_once_convert_once(config_file: Path, tmp_path: Path, calls: Callable[[], int]) -> None:
    write(tmp_path, "slow")
    submit(made.torch_dist(tmp_path / "save" / "iter_0000010"), config=config_file)
    queue = Queue(str(tmp_path / "queue"))
    with Progress() as progress:            # a process has one
        threads = [
            threading.Thread(target=drain, args=(config_file, StandIn(), progress, name), daemon=True)
            for name in ("r1", "r2")
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(list(queue.tokens("claimed"))) == 2 and calls() == 1)
        (tmp_path / "calls.go").touch()
        for thread in threads:
            thread.join(WAIT_S)
    assert len(results(tmp_path, "done")) == 2
    assert calls() == 1


def test_a_conversion_that_fails_fails_the_ticket_with_its_reason(
    config_file: Path, tmp_path: Path, calls: Callable[[], int]
) -> None:
    write(tmp_path, "fails")
    submit(made.torch_dist(tmp_path / "save" / "iter_0000010"), config=config_file, suites=("a",))
    evaluator = StandIn()
    run(config_file, evaluator)
    (failed,) = results(tmp_path, "failed")
    assert failed.failure is not None
    assert "not converted: " in failed.failure.message
    assert "no such architecture" in failed.failure.message
    assert evaluator.jobs == []
    assert calls() == 2         # max_attempts


RUNNER = """
import sys
from pathlib import Path
from eval_runner.progress import Progress
from tests.integration.test_convert import drain
from tests.stand_ins import StandIn
with Progress() as progress:
    drain(Path(sys.argv[1]), StandIn(), progress, "killed")
"""


def test_a_runner_that_is_killed_while_it_converts_leaves_nothing_in_the_way(
    config_file: Path, tmp_path: Path, calls: Callable[[], int]
) -> None:
    write(tmp_path, "slow")
    submit(made.torch_dist(tmp_path / "save" / "iter_0000010"), config=config_file, suites=("a",))
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(config_file)], cwd=Path(__file__).parents[2])
    try:
        wait_for(lambda: calls() == 1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [p.name[:5] for p in (tmp_path / "kept").iterdir() if p.is_dir()] == [".new-"]
    (tmp_path / "calls.go").touch()
    run(config_file, StandIn())
    assert len(results(tmp_path, "done")) == 1
    assert calls() == 2
    (left,) = [p for p in (tmp_path / "kept").iterdir() if p.is_dir()]
    assert not left.name.startswith(".")


def test_without_convert_or_a_server_it_is_said_which_keys_to_add(config_file: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(config_file.read_text())
    del data["convert"]
    config_file.write_text(yaml.safe_dump(data))
    submit(made.torch_dist(tmp_path / "save" / "iter_0000010"), config=config_file, suites=("a",))
    run(config_file, StandIn())
    (failed,) = results(tmp_path, "failed")
    assert failed.failure is not None
    assert failed.failure.kind == "configuration"
    assert "`convert: {command:" in failed.failure.message
