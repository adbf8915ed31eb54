"""Children of the runner: nothing of them outlives the call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
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
    run: Callable[..., int], tmp_path: Path
) -> None:
    started: list[int] = []

    def stopping() -> bool:
        started.append(_grandchild(tmp_path / "log"))
        time.sleep(0.2)
        return True

    with pytest.raises(process.Stopped):
        run(PARENT, "60", stopping=stopping, grace=0.3)
    assert _gone(started[0])


def test_a_program_that_was_told_to_end_has_its_grace(run: Callable[..., int], tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
def end(*_):
    time.sleep(0.5)
    print("tidied up", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), flush=True)
time.sleep(60)
"""
    with pytest.raises(process.Stopped):
        run(code, stopping=lambda: bool(_grandchild(tmp_path / "log")), grace=30)
    assert "tidied up" in (tmp_path / "log").read_text()


def test_a_program_that_ends_badly_when_it_is_to_stop_was_stopped(run: Callable[..., int], tmp_path: Path) -> None:
    """As where a batch system ends all processes of a job at once: the child's end is no failure of its own."""
    calls = iter(range(10_000))

    def stopping() -> bool:
        if next(calls):
            return True
        assert _gone(_grandchild(tmp_path / "log"))
        time.sleep(0.5)     # until its end is known: then no other look at `stopping` comes before the last
        return False

    with pytest.raises(process.Stopped):
        run("import os; print(os.getpid(), flush=True); os.kill(os.getpid(), 15)", stopping=stopping)


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    for argv in ([str(tmp_path / "nowhere")], [str(tmp_path)], ["no-such-program-anywhere"]):
        with pytest.raises(OSError, match=r"No such file|Permission denied"):
            process.run(argv, log=tmp_path / "log", env=None, cwd=tmp_path)
    with pytest.raises(FileNotFoundError):
        process.run([sys.executable, "-c", ""], log=tmp_path / "log", env=None, cwd=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        process.run([sys.executable, "-c", ""], log=tmp_path / "nowhere" / "log", env=None, cwd=tmp_path)


def test_the_environment_and_the_standard_streams_are_as_given(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ.get('PYTHONPATH'), sorted(os.environ), repr(sys.stdin.read()))"
    assert process.run([sys.executable, "-c", code], log=tmp_path / "log", env={"PYTHONPATH": "/x"}, cwd=tmp_path) == 0
    first, _, rest = (tmp_path / "log").read_text().partition(" ")
    assert first == "/x"
    assert "AUTOEVAL" not in rest
    assert rest.rstrip().endswith("''")
    code = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
    (tmp_path / "log").unlink()
    process.run([sys.executable, "-c", code], log=tmp_path / "log", env=None, cwd=tmp_path)
    assert (tmp_path / "log").read_text() == "[0, 1, 2, 3]\n"       # 3 is the listing's own


def test_the_end_of_a_program_is_told_where_sigchld_is_ignored(run: Callable[..., int]) -> None:
    """As what starts us may leave it: without a word of it, a child's end is lost."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run("raise SystemExit(3)", timeout=60) == 3
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_program_whose_runner_stands_still_is_ended(run: Callable[..., int], tmp_path: Path) -> None:
    def starved() -> bool:
        if _grandchild(tmp_path / "log"):
            time.sleep(3)       # the calling thread gets no time; it is not stopped, and its lease may be well
        return False

    with pytest.raises(AutoEvalError, match=r"its runner stood still for more than 0\.5 s") as caught:
        run(PARENT, "60", stopping=starved, silence=0.5)
    assert not isinstance(caught.value, process.Stopped)        # it uses up an attempt: not tried for ever
    assert _gone(_grandchild(tmp_path / "log"))


def test_a_supervisor_that_is_killed_takes_the_program_with_it(run: Callable[..., int], tmp_path: Path) -> None:
    def kill() -> None:
        if (tmp_path / "log").read_text():
            parent = Path(f"/proc/{_grandchild(tmp_path / 'log')}/stat").read_text().rpartition(")")[2].split()[1]
            os.kill(int(parent), signal.SIGKILL)

    assert run("import os, time; print(os.getpid(), flush=True); time.sleep(60)", on_tick=kill) == -signal.SIGKILL
    assert _gone(_grandchild(tmp_path / "log"))


def test_a_file_system_that_hangs_keeps_no_child_alive(run: Callable[..., int], tmp_path: Path) -> None:
    hang = threading.Event()

    def tick() -> None:
        if (tmp_path / "log").read_text():
            hang.wait(60)

    with pytest.raises(process.Stopped):
        run(PARENT, "60", on_tick=tick, stopping=lambda: bool(_grandchild(tmp_path / "log")), grace=0.1)
    assert _gone(_grandchild(tmp_path / "log"))
    assert not hang.is_set()
    hang.set()


def test_a_log_on_a_full_disk_ends_nothing(
    run: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    assert run("for i in range(2000): print('x' * 1000)") == 0
    assert [r.message for r in caplog.records] == [f"{tmp_path}/log: output is lost: No space left on device"]


@pytest.mark.parametrize(
    ("status", "means"),
    [(0, "exit status 0"), (3, "exit status 3"), (-11, "killed by signal 11 (SIGSEGV)"), (-35, "killed by signal 35"),
     (-9, "killed by signal 9 (SIGKILL: out of memory? see `dmesg`; give the job more memory, or ask for less)")],
)  # fmt: skip
def test_what_a_status_means(status: int, means: str) -> None:
    assert process.reason(status) == means


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
    sizes = []
    flood = "for i in range(10_000):\n    print('x' * 9_999, flush=True)\n"
    code = f"{flood}print('the end')"
    assert run(code, on_tick=lambda: sizes.append((tmp_path / "log").stat().st_size)) == 0
    text = (tmp_path / "log").read_text()
    assert max(sizes) <= 200_000
    assert len(text) <= 200_000
    assert "bytes of log dropped here" in text
    assert text.endswith("the end\n")


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
