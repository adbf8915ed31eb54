"""Run one child process so that nothing of it outlives the call, and its output is on disk.

The child leads a session of its own. Whatever ends the call (its exit, `stopping`, a timeout, an
exception here) ends its whole process group; only a grandchild that opens yet another session can escape.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError

GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""
POLL_S = 0.1
"""Seconds between two looks at the child, at `stopping` and at the log's size."""
LOG_LIMIT = 64 << 20
"""Bytes. A log that grows beyond is cut down to its last `LOG_KEPT` bytes, as often as it takes."""
LOG_KEPT = 1 << 20


class Stopped(AutoEvalError):
    """The caller's `stopping` turned true; the child and its group are gone."""


def run(
    argv: list[str],
    *,
    log: Path,
    env: dict[str, str] | None,
    cwd: Path,
    stopping: Callable[[], bool] = lambda: False,
    timeout: float | None = None,
    on_tick: Callable[[], None] | None = None,
) -> int:
    """The exit status of `argv`, negative for a signal as in `subprocess`. Its output is appended to `log`.

    `on_tick` is called at each poll. Raises Stopped, AutoEvalError after `timeout` seconds, and OSError
    where the program cannot be started. Where util-linux's setpriv is found, the child also dies when the
    calling thread is killed; without it, a SIGKILL of the runner leaves the child to end by itself.
    """
    started = time.monotonic()
    with log.open("ab") as out:
        child = subprocess.Popen(
            _tied(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
    try:
        while not _exited(child.pid):
            if stopping():
                raise Stopped(f"{Path(argv[0]).name} was told to stop")
            if timeout is not None and time.monotonic() - started > timeout:
                raise AutoEvalError(f"{Path(argv[0]).name} took longer than {timeout:g} s; its log: {log}")
            if on_tick:
                on_tick()
            _bound(log)
            time.sleep(POLL_S)
    except BaseException:
        _end(child)
        raise
    _signal(child.pid, signal.SIGKILL)  # grandchildren; the unreaped leader still keeps the group's number ours
    return child.wait()


def tail(log: Path, lines: int = 5) -> str:
    """The last `lines` lines of a log that say something, joined by " | "; what an error message can quote."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error.strerror})"
    return " | ".join([line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()][-lines:])


def _tied(argv: list[str]) -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--", *argv] if setpriv else argv


def _exited(pid: int) -> bool:
    """Whether the child has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    try:
        while not _exited(child.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        _signal(child.pid, signal.SIGKILL)
        child.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _bound(log: Path) -> None:
    """Drop all but the end of a log over the limit. The child appends, so it goes on at the new end."""
    try:
        size = log.stat().st_size
    except FileNotFoundError:
        return
    if size > LOG_LIMIT:
        with log.open("r+b") as file:
            file.seek(size - LOG_KEPT)
            kept = file.read(LOG_KEPT)
            file.truncate(0)
            file.seek(0)
            file.write(f"[autoeval: {size - LOG_KEPT} bytes of log dropped here]\n".encode() + kept)
