"""A runner's lease on what it claimed: a heartbeat that others watch, and an honest view of how old it is."""

from __future__ import annotations

import contextlib
import logging
import threading

from autoeval_hooks.keeper import boottime
from autoeval_hooks.queue import Queue

log = logging.getLogger("autoeval")

BEATS = 6
"""Heartbeats in the length of a lease."""


class Lease:
    """Beats in a thread while the context is open. Others reap our claims once our beat stands still for
    `seconds` of theirs; we let go after half of that on our own clock, so that no two evaluate one ticket."""

    def __init__(self, queue: Queue, seconds: float) -> None:
        self._queue = queue
        self._seconds = seconds
        self._shown_at = boottime()
        self._gap_at = float("-inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="autoeval-lease", daemon=True)
        self._fd = -1

    def __enter__(self) -> Lease:
        self._fd = self._queue.start_heart()
        self._queue.beat(self._fd, 0)
        self._shown_at = boottime()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):      # a heartbeat that stays behind is one of the dead
            self._queue.stop_heart(self._fd)

    def held_since(self, moment: float) -> bool:
        """Whether our signs of life have come often enough, from `moment` (`boottime` seconds) until now, for what we
        claimed then to be ours still. A gap is not forgotten: another may have taken the ticket over in it."""
        return boottime() - self._shown_at < self._seconds / 2 and self._gap_at < moment

    def _loop(self) -> None:
        count = 0
        while not self._over.wait(self._seconds / BEATS):
            count += 1
            started = boottime()      # a write that hangs counts from when it was begun
            try:
                self._queue.beat(self._fd, count)
            except OSError as error:
                log.warning("heartbeat failed: %s", error)
            else:
                if boottime() - self._shown_at >= self._seconds / 2:
                    self._gap_at = boottime()
                self._shown_at = started
