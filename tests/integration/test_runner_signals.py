"""Signals to a real runner process with a real child; only what the child computes is a stand-in: it sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import runner as runners
from eval_runner import scratch
from eval_runner.progress import Progress
from tests.processes import MARK, marked, wait_for

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from eval_runner import config
from eval_runner.evaluators.base import Job
from eval_runner.progress import Progress
from eval_runner.runner import Runner, stopped_by_signals

AWAY = '''
import os, subprocess, sys, time
subprocess.Popen(["sleep", "300"], start_new_session=True)      # a grandchild in a session of its own
if os.fork() == 0:                                              # and a daemon: its parent is gone too
    os.setsid()
    if os.fork() == 0:
        time.sleep(300)
    os._exit(0)
open("ready", "w").close()
time.sleep(300)
'''

class Sleeper:
    def check(self): ...
    def evaluate(self, job):
        if sys.argv[2] == "deaf":
            object.__setattr__(job, "stopping", lambda: False)
        job.run([sys.executable, "-c", AWAY], env=None)

with Progress() as progress:
    runner = Runner(config.load(sys.argv[1]), {"quick": [Sleeper()]}, {}, progress)
    with stopped_by_signals(runner):
        runner.run("forever")
"""


@pytest.fixture
def config(tmp_path: Path, checkpoint: Callable[..., Path]) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        "queue: queue\nrunner: {lease: 8}\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n"
    )
    submit(checkpoint(100), step=100, config=path)
    return path


@pytest.fixture
def start(config: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """Start a runner and wait until its program runs; its process, and the mark of all below it."""
    started = []

    def go(kind: str = "polite") -> tuple[subprocess.Popen[bytes], str]:
        mark, scratch_dir = uuid.uuid4().hex, tmp_path / "tmp"
        scratch_dir.mkdir(exist_ok=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark, "TMPDIR": str(scratch_dir)}
        runner = subprocess.Popen([sys.executable, "-c", SCRIPT, str(config), kind], env=env)
        started.append(runner)
        wait_for(lambda: list(scratch_dir.glob("autoeval-work-*/*/ready")))
        return runner, mark

    yield go
    for runner in started:
        runner.kill()
        runner.wait()


@pytest.mark.parametrize(("kind", "signals", "state"), [("polite", 1, "pending"), ("deaf", 2, "claimed")])
def test_one_signal_gives_the_ticket_back_and_a_second_ends_at_once(
    tmp_path: Path, start: Callable[..., tuple[subprocess.Popen[bytes], str]], kind: str, signals: int, state: str
) -> None:
    runner, mark = start(kind)
    for i in range(signals):
        runner.send_signal(signal.SIGTERM)
        if i + 1 < signals:
            time.sleep(1)
            assert runner.poll() is None
    assert runner.wait(60) == (0 if signals == 1 else 128 + signal.SIGTERM)
    assert marked(mark) == []
    (token,) = Queue(str(tmp_path / "queue")).tokens()
    assert (token.state, token.failures) == (state, 0)       # what was not given back is reaped by another runner
    assert os.listdir(tmp_path / "queue" / "hb") == []
    assert os.listdir(tmp_path / "tmp") == []


def test_a_signal_counts_though_its_message_fails(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it comes in the midst of another message, and standard error refuses to be entered twice."""

    def fails(*args: object) -> None:
        raise RuntimeError("reentrant call")

    monkeypatch.setattr(runners.log, "warning", fails)
    with Progress() as progress:
        runner = runners.Runner(configs.load(str(config)), {}, {}, progress)
        with pytest.raises(RuntimeError, match="reentrant"), runners.stopped_by_signals(runner):
            signal.raise_signal(signal.SIGTERM)
    assert runner.stopped.is_set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_nothing_below_a_runner_outlives_it_or_its_standing_still(
    tmp_path: Path, start: Callable[..., tuple[subprocess.Popen[bytes], str]], number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runner, mark = start()
    assert len(marked(mark)) >= 4
    runner.send_signal(number)
    wait_for(lambda: set(marked(mark)) <= {runner.pid})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    if number is signal.SIGSTOP:
        assert scratch.sweep() == []        # it lives, and may come back to its files
        runner.send_signal(signal.SIGCONT)
        wait_for(lambda: [t.generation for t in Queue(str(tmp_path / "queue")).tokens() if t.generation])
        runner.kill()
    runner.wait()
    wait_for(lambda: marked(mark) == [])
    removed = scratch.sweep()
    assert number is signal.SIGSTOP or len(removed) == 1
    assert os.listdir(tmp_path / "tmp") == []
