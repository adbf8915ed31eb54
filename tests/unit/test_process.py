"""Children of the runner: nothing of them outlives the call."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError
from eval_runner import process

PARENT = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


def _gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def _grandchild(log: Path) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        words = log.read_text().split() if log.exists() else []
        if words:
            return int(words[0])
        time.sleep(0.02)
    raise AssertionError("the child never started")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    def call(code: str, *args: str, **options: object) -> int:
        return process.run(
            [sys.executable, "-c", code, *args], log=tmp_path / "log", env=None, cwd=tmp_path, **options
        )  # fmt: skip

    return call


def test_status_and_output_of_both_streams(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("import os; os.write(1, b'out\\n'); os.write(2, b'err\\n'); raise SystemExit(3)") == 3
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGTERM)") == -signal.SIGTERM


def test_a_grandchild_ends_with_the_child(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(PARENT, "0.2") == 0
    assert _gone(_grandchild(tmp_path / "log"))


def test_stop_ends_the_whole_group_even_where_sigterm_is_ignored(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.3)
    started: list[int] = []

    def stopping() -> bool:
        started.append(_grandchild(tmp_path / "log"))
        time.sleep(0.2)
        return True

    with pytest.raises(process.Stopped):
        run(PARENT, "60", stopping=stopping)
    assert _gone(started[0])


def test_timeout_ends_the_child_and_names_the_log(run: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(AutoEvalError, match=r"took longer than 0\.5 s") as caught:
        run("import time; time.sleep(60)", timeout=0.5)
    assert str(tmp_path / "log") in str(caught.value)


def test_an_exception_of_the_callers_ends_the_child(run: Callable[..., int], tmp_path: Path) -> None:
    def tick() -> None:
        if (tmp_path / "log").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(PARENT, "60", on_tick=tick)
    assert _gone(_grandchild(tmp_path / "log"))


def test_a_flood_of_output_does_not_fill_the_disk(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LOG_LIMIT", 200_000)
    monkeypatch.setattr(process, "LOG_KEPT", 1_000)
    flood = "for i in range(100):\n    print('x' * 9_999, flush=True)\n    time.sleep(0.02)\n"
    code = f"import time\n{flood}print('the end')"
    assert run(code) == 0
    text = (tmp_path / "log").read_text()
    assert len(text) < 600_000
    assert "bytes of log dropped here" in text
    assert text.endswith("the end\n")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="util-linux's setpriv is not here")
def test_the_child_dies_when_the_runner_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from eval_runner import process
process.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
            log=Path({str(tmp_path / "log")!r}), env=None, cwd=Path({str(tmp_path)!r}))
"""
    runner = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(Path.cwd())})
    child = _grandchild(tmp_path / "log")
    runner.kill()
    runner.wait()
    assert _gone(child)


def test_tail_is_one_line_of_the_last_lines_that_say_something(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a\n\nb\r 10%\r 20%\n  c \xff\n\n")
    assert process.tail(tmp_path / "log", 2) == "20% | c \ufffd"
    assert "No such file" in process.tail(tmp_path / "none")
