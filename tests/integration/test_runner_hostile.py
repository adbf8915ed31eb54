"""Evaluators whose program does its worst, as a real child of a real runner: what is left, and what comes next."""

from __future__ import annotations

import os
import re
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.queue import Queue
from eval_runner import process
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.processes import marked
from tests.stand_ins import GOOD, Program

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]

DAEMON = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        time.sleep(300)
    os._exit(0)
"""
DEEP = """
import os
os.makedirs("a/b/c")
for i in range(40):
    with open(f"a/b/c/{i}", "wb") as file:
        file.write(b"x" * (1 << 20))
os.symlink("/", "a/root")
for path in ("a/b/c", "a/b", "a"):
    os.chmod(path, 0)
"""
HOSTILE = {
    "crashes": ("import os; os.kill(os.getpid(), 11)", r"killed by signal 11 \(SIGSEGV\)"),
    "gives up after half of its output": (
        "print('half', flush=True); open('result.json', 'w').write('{\"val'); raise SystemExit(1)", "exit status 1"),
    "is killed for memory": ("import os; os.kill(os.getpid(), 9)", r"killed by signal 9 \(SIGKILL: out of memory\?"),
    "hangs": ("import time; time.sleep(300)", "not done after 4 s, so it was ended.*`runner.timeout`"),
    "hangs and ignores SIGTERM": (
        "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)", "not done after 4 s"),
    "hangs with daemons around it": (DAEMON + "time.sleep(300)", "not done after 4 s"),
    "leaves daemons and fails": (DAEMON + "raise SystemExit(3)", "exit status 3"),
    "writes half a result": (
        "open('result.json', 'w').write('{\"value\": 4')", "left no readable result"),
    "leaves no result": ("pass", "left no readable result.*No such file"),
    "leaves a result that is none": (
        "open('result.json', 'w').write('{\"value\": NaN}')", "its value is nan, which is no number"),
    "floods its output and fails": (
        "import os\nfor i in range(30): os.write(1, b'x' * 999_999 + b'\\n')\nraise SystemExit(1)", "exit status 1"),
    "floods its output and hangs": ("import os\nwhile True: os.write(1, b'x' * 1_000_000)", "not done after 4 s"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_a_program_that(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """…harms its own ticket only: it fails with the reason, nothing of the program is left, the next one is well."""
    monkeypatch.setattr(process, "LOG_LIMIT", 4 << 20)
    code, reason = HOSTILE[how]
    limit = "timeout: 4, " if "not done" in reason else ""
    after(tmp_path, checkpoint, config_file, run, monkeypatch, limit, code)
    (failed,) = store.collect(tmp_path / "queue").failed
    assert failed.step == 100
    assert re.search(reason, failed.failure.message), failed.failure.message
    (done,) = store.done(tmp_path / "queue")[0]
    assert done.step == 200


@pytest.mark.parametrize("code", [
    DAEMON + GOOD, DEEP + GOOD, "import os; os.close(1); os.close(2)\n" + GOOD,
    "import os, signal; signal.signal(15, signal.SIG_IGN); os.killpg(0, 15)\n" + GOOD,
])  # fmt: skip
def test_a_program_that_is_odd_and_right(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    after(tmp_path, checkpoint, config_file, run, monkeypatch, "", code)
    assert {r.step for r in store.done(tmp_path / "queue")[0]} == {100, 200}


def after(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch,
    limit: str, code: str,
) -> None:  # fmt: skip
    """Evaluate two checkpoints, the first by this program; nothing is left but what belongs in the queue."""
    text = config_file.read_text().replace("lease: 6.0", f"lease: 20, {limit}order: oldest, max_attempts: 1")
    config_file.write_text(text)
    for step in (100, 200):
        submit(checkpoint(step, b"w" * step), step=step, config=config_file)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    mark = uuid.uuid4().hex
    run(Program([code], mark))
    assert marked(mark) == []
    assert os.listdir(scratch) == []
    assert sorted(t.state for t in Queue(str(tmp_path / "queue")).tokens()) in (["done", "failed"], ["done", "done"])
    assert all(log.stat().st_size <= 6 << 20 for log in (tmp_path / "queue" / "logs").iterdir())


def test_a_working_directory_that_cannot_be_made_gives_the_ticket_back(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    mkdtemp, faults = tempfile.mkdtemp, iter(range(2))

    def full(*args: str, **kwargs: str) -> str:
        if next(faults, None) is not None:
            raise OSError(28, "No space left on device", "/tmp")
        return mkdtemp(*args, **kwargs)

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    run(Program())
    (token,) = Queue(str(tmp_path / "queue")).tokens()
    assert (token.state, token.failures) == ("done", 2)
