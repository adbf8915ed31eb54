"""SIGTERM to a real runner process with a real child; only what the child computes is a stand-in: it sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.queue import Queue

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from eval_runner import config, process
from eval_runner.progress import Progress
from eval_runner.runner import Runner, stopped_by_signals

class Sleeper:
    def check(self): ...
    def evaluate(self, job):
        deaf = sys.argv[2] == "deaf"
        process.run(["sleep", "300"], log=job.log, env=None, cwd=job.work_dir,
                    stopping=(lambda: False) if deaf else job.stopping)

with Progress() as progress:
    runner = Runner(config.load(sys.argv[1]), {"quick": [Sleeper()]}, {}, progress)
    with stopped_by_signals(runner):
        runner.run("forever")
"""


def sleepers(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent), "-x", "sleep"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("kind", "signals", "state"), [("polite", 1, "pending"), ("deaf", 2, "claimed")])
def test_one_signal_gives_the_ticket_back_and_a_second_ends_at_once(
    tmp_path: Path, checkpoint: Callable[..., Path], kind: str, signals: int, state: str
) -> None:
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")
    submit(checkpoint(100), step=100, config=config)
    runner = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(config), kind], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        wait_for(lambda: sleepers(runner.pid))
        (child,) = sleepers(runner.pid)
        for i in range(signals):
            runner.send_signal(signal.SIGTERM)
            if i + 1 < signals:
                time.sleep(1)
                assert runner.poll() is None
        assert runner.wait(20) == (0 if signals == 1 else 128 + signal.SIGTERM)
    finally:
        runner.kill()
        runner.wait()
    wait_for(lambda: gone(child))
    (token,) = Queue(str(tmp_path / "queue")).tokens()
    assert (token.state, token.failures) == (state, 0)       # what was not given back is reaped by another runner
    assert os.listdir(tmp_path / "queue" / "hb") == []
