"""Run one program so that nothing of it outlives the call, and its output is on disk and bounded.

The program runs under `supervisor`, in a session of its own. Whatever ends the call (its exit, `stopping`, a
timeout, an exception here, the death of this process) ends it and all that it started, also what left its session
and its group. The calling thread touches no file meanwhile, so that a file system which hangs keeps nothing alive.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError
from eval_runner import secrets, supervisor

GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL."""
SILENCE_S = 60.0
"""Seconds that this process may be stopped or starved of time before what it runs is ended for it."""
POLL_S = 0.1
"""Seconds between two looks at the child and at `stopping`, and between two calls of `on_tick`."""
END_S = 10.0
"""Seconds that the kernel is given to end what was killed; what waits for a device that hangs may take longer."""
LOG_LIMIT = 64 << 20
"""Bytes. A log that would grow beyond is cut down to its last `LOG_KEPT` bytes, as often as it takes."""
LOG_KEPT = 1 << 20

logger = logging.getLogger("autoeval")


class Stopped(AutoEvalError):
    """The caller's `stopping` turned true; the child and all that it started are gone."""


class TimedOut(AutoEvalError):
    """The child took longer than it was given; it and all that it started are gone."""


def run(
    argv: list[str],
    *,
    log: Path,
    env: dict[str, str] | None,
    cwd: Path,
    stopping: Callable[[], bool] = lambda: False,
    timeout: float | None = None,
    grace: float = GRACE_S,
    silence: float = SILENCE_S,
    on_tick: Callable[[], None] | None = None,
    on_start: Callable[[int], None] = lambda pid: None,
    keep: Sequence[int] = (),
) -> int:
    """The exit status of `argv`, negative for a signal as in `subprocess`. Its output is appended to `log`.

    `stopping` must answer at once. `on_tick` is called now and then in a thread of its own, and what it raises is
    raised here. `on_start` is told the process id of the supervisor, which all of the program is below. The
    descriptors `keep` stay open until nothing of the program is left, also where this process dies first. Raises
    Stopped, TimedOut after `timeout` seconds, AutoEvalError if this process stood still for `silence` seconds, and
    OSError where the program cannot be started. Told to end, it has `grace` seconds for it.
    """
    started = time.monotonic()
    name = Path(argv[0]).name
    with contextlib.ExitStack() as stack:
        child = _Child(argv, env, cwd, silence, keep)
        stack.callback(child.close)
        on_start(child.pid)
        side = _Side(child.output, log, on_tick)
        stack.callback(side.close)
        try:
            while (status := child.status()) is None:
                if stopping():
                    raise Stopped(f"{name} was told to stop")
                if timeout is not None and time.monotonic() - started > timeout:
                    raise TimedOut(f"{name} took longer than {timeout:g} s; its log: {log}")
                side.check()
                child.wanted()
                time.sleep(POLL_S)
        except BaseException:
            child.ask(grace)
            child.close()
            raise
        while not side.finished():      # what the child wrote last; a file system that hangs must not keep us
            if stopping():
                raise Stopped(f"{name} was told to stop")
    side.check()
    if status != 0 and stopping():      # what stops us has stopped the child too, such as a batch system
        raise Stopped(f"{name} was told to stop")
    if child.abandoned():
        raise AutoEvalError(
            f"{name} was ended, for its runner stood still for more than {silence:g} s: is the machine overloaded?"
        )
    return status


def reason(status: int) -> str:
    """What an exit status of `run` means."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        number = signal.Signals(-status)
        hint = ": out of memory? see `dmesg`; give the job more memory, or ask for less" if status == -9 else ""
        return f"killed by signal {-status} ({number.name}{hint})"
    return f"killed by signal {-status}"


def tail(log: Path, lines: int = 5) -> str:
    """The last `lines` lines of a log that say something, joined by " | "; what an error message can quote."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error.strerror})"
    return " | ".join([line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()][-lines:])


class _Child:
    """A program under its supervisor. `output` is the reading end of the pipe that it writes to."""

    def __init__(
        self, argv: list[str], env: dict[str, str] | None, cwd: Path, silence: float, keep: Sequence[int]
    ) -> None:
        self._program = argv[0]
        self._said: dict[str, int] = {}
        self.output, output = os.pipe()
        self._report, report = os.pipe()
        alive, self._alive = os.pipe()
        os.set_blocking(self._report, False)
        os.set_blocking(self._alive, False)
        try:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(report), repr(silence), *argv],
                stdin=alive, stdout=output, stderr=subprocess.STDOUT, pass_fds=(report, *keep), env=env, cwd=cwd,
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            for fd in (self.output, self._report, self._alive):
                os.close(fd)
            raise
        finally:
            for fd in (output, report, alive):
                os.close(fd)

    def status(self) -> int | None:
        """The exit status, once nothing of the program is left. Raises OSError if it could not be started."""
        over = self._supervisor.poll()      # first: what it says, it says before it ends
        self._listen()
        if "failed" in self._said:
            code = self._said["failed"]
            raise OSError(code, os.strerror(code), self._program)
        if "ended" in self._said:
            return os.waitstatus_to_exitcode(self._said["ended"])
        return over                         # the supervisor itself was killed, if any

    @property
    def pid(self) -> int:
        """The supervisor's."""
        return self._supervisor.pid

    def abandoned(self) -> bool:
        """Whether it was ended because this process stood still."""
        return "silent" in self._said

    def wanted(self) -> None:
        """Tell the supervisor to go on."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._alive, b".")

    def ask(self, grace: float) -> None:
        """Let the program end by itself, for `grace` seconds at most."""
        deadline, asked = time.monotonic() + grace, False
        while self._supervisor.poll() is None and "ended" not in self._said and time.monotonic() < deadline:
            self._listen()      # it may have been started only now
            asked = asked or self._signal(signal.SIGTERM)
            self.wanted()
            time.sleep(POLL_S / 5)

    def close(self) -> None:
        """End what is left. It may be called again."""
        if self._alive < 0:
            return
        os.close(self._alive)
        self._alive = -1
        try:
            self._supervisor.wait(END_S)
        except subprocess.TimeoutExpired:
            logger.warning("%s: cannot be ended (does it wait for a device?); it is left behind", self._program)
        finally:
            self._listen()
            if self._supervisor.poll() != 0:        # it is stuck, or was killed itself
                self._signal(signal.SIGKILL)
                self._supervisor.kill()
                self._supervisor.wait()
            os.close(self._report)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self._report, 4096).decode().splitlines():
                word, _, number = line.partition(" ")
                self._said[word] = int(number or 0)

    def _signal(self, number: signal.Signals) -> bool:
        """To the program's process group, as long as this has not ended: then the number may be another's. Whether
        it was there to be told."""
        if "started" not in self._said or "ended" in self._said:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._said["started"], number)
        return True


class _Side:
    """A thread that writes a pipe's content to a log, and calls `on_tick` meanwhile."""

    def __init__(self, pipe: int, log: Path, on_tick: Callable[[], None] | None) -> None:
        self._pipe = pipe
        self._log = log
        self._on_tick = on_tick
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, name="autoeval-child", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    def finished(self) -> bool:
        """Whether all that the child wrote, which has ended, is in the log; waits a moment for it."""
        self._over.set()
        self._thread.join(POLL_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._over.set()
        self._thread.join(10 * POLL_S)      # a file system that hangs keeps the thread, not us

    def _loop(self) -> None:
        try:
            with _Log(self._log) as log:
                while not self._over.is_set():
                    self._copy(log, POLL_S)
                    if self._on_tick:
                        self._on_tick()
                deadline = time.monotonic() + 1.0
                while self._copy(log, 0) and time.monotonic() < deadline:
                    pass
        except BaseException as error:
            self._error = error
        finally:
            os.close(self._pipe)

    def _copy(self, log: _Log, wait: float) -> bool:
        """Copy what comes within `wait` seconds; whether there may be more."""
        end, data = time.monotonic() + wait, b""
        while select.select([self._pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            data = os.read(self._pipe, 1 << 20)
            if not data:        # the child closed its output, and may go on
                self._over.wait(max(0.0, end - time.monotonic()))
                break
            log.write(data)
        return bool(data)


class _Log:
    """A log file, bounded in size, without our secrets. What it cannot take, on a full disk, is lost with a warning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed = False
        self._veil = secrets.Veil()

    def __enter__(self) -> _Log:
        self._file = self._path.open("a+b", buffering=0)
        return self

    def __exit__(self, *exc: object) -> None:
        self._write(self._veil.rest())
        self._file.close()

    def write(self, data: bytes) -> None:
        self._write(self._veil.feed(data))

    def _write(self, data: bytes) -> None:
        try:
            if self._file.tell() + len(data) > LOG_LIMIT:
                self._cut()
            self._file.write(data)
        except OSError as error:
            if not self._failed:
                logger.warning("%s: output is lost: %s", self._path, error.strerror)
            self._failed = True

    def _cut(self) -> None:
        """Drop all but the end."""
        size = self._file.tell()
        self._file.seek(max(0, size - LOG_KEPT))
        kept = self._file.read(LOG_KEPT)
        self._file.truncate(0)
        self._file.write(f"[autoeval: {size - len(kept)} bytes of log dropped here]\n".encode() + kept)
