"""The flag that ends a runner, set wherever a signal may come."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from eval_runner.stop import Stop

AT_EVERY_LINE = """
import signal, sys, threading
from eval_runner.stop import Stop

made, lines = {make}, 0
signal.signal(signal.SIGTERM, lambda number, frame: made.set())

def trace(frame, event, argument):      # a signal before the n-th line of `wait` and of what it calls
    global lines
    if frame.f_code.co_filename.endswith(("stop.py", "threading.py")):
        lines += 1
        if lines == int(sys.argv[1]):
            signal.raise_signal(signal.SIGTERM)
        return trace

sys.settrace(trace)
made.wait(0.2)
sys.settrace(None)
print(lines)
"""


def lines_with_a_signal(make: str, n: int) -> int:
    """How many lines `wait` ran, with a signal before the n-th. Raises TimeoutExpired where the handler hangs."""
    argv = [sys.executable, "-c", AT_EVERY_LINE.format(make=make), str(n)]
    return int(subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout)


def test_a_signal_may_set_it_at_any_moment_of_waiting() -> None:
    total = lines_with_a_signal("Stop()", 0)
    assert total > 5
    for n in range(1, total + 1):
        lines_with_a_signal("Stop()", n)


def test_an_event_would_hang_there() -> None:
    """Why it is not a `threading.Event`; once this fails, it may be."""

    def hangs(n: int) -> bool:
        try:
            lines_with_a_signal("threading.Event()", n)
        except subprocess.TimeoutExpired:
            return True
        return False

    assert any(hangs(n) for n in range(1, 12))


def test_waiting_ends_when_it_is_set_and_when_time_is_up() -> None:
    stop = Stop()
    began = time.monotonic()
    assert not stop.wait(0.05)
    assert time.monotonic() - began >= 0.05
    threading.Timer(0.1, stop.set).start()
    assert stop.wait(30)
    assert time.monotonic() - began < 20
    assert stop.wait(30)
    assert stop.is_set()
    stop.set()


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_no_time_is_no_wait(seconds: float) -> None:
    assert not Stop().wait(seconds)
