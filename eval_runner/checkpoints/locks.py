"""A lock that one process holds alone, or several together, and that ends with whoever holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from eval_runner.process import Stopped

POLL_S = 0.2
"""Seconds between two tries."""


class Lock:
    """`flock` on a file, which is made. It is not taken on entering; on leaving it is released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> Lock:
        self._open()
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
        self._fd = -1

    def shared(self) -> bool:
        """Hold it together with others; False where somebody holds it alone. What was held before is released."""
        return self._take(fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Hold it alone; False where anybody else holds it. What was held before is released."""
        return self._take(fcntl.LOCK_EX)

    def release(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def wait(self, stopping: Callable[[], bool]) -> None:
        """Wait before another try. Raises Stopped once `stopping` is true."""
        self.release()
        if stopping():
            raise Stopped("told to stop while waiting for another")
        time.sleep(POLL_S)

    def fileno(self) -> int:
        """The descriptor that holds it; a process that inherits it holds it too."""
        return self._fd

    def touch(self) -> None:
        """Note that it is used now, by the clock that stamps the file."""
        os.utime(self._fd)

    def remove(self) -> None:
        """Remove the file, held alone: who waits for it finds that and makes another."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _take(self, how: int) -> bool:
        while True:
            try:
                fcntl.flock(self._fd, how | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(self._fd, fcntl.LOCK_UN)        # converting one may have failed half-way
                return False
            try:
                there = self._path.stat()
            except FileNotFoundError:
                there = None
            if there is not None and os.path.samestat(there, os.fstat(self._fd)):
                return True
            os.close(self._fd)      # it was removed meanwhile: what we hold is nobody's
            self._open()
