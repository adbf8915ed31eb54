"""A runner's lease on what it claimed: a heartbeat that others watch, and an honest view of how old it is."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from autoeval_hooks.errors import QueueError
from autoeval_hooks.keeper import boottime
from autoeval_hooks.queue import Queue, Token
from eval_runner.evaluators.base import Limits
from eval_runner.process import GRACE_S

log = logging.getLogger("autoeval")

BEATS = 6
"""Heartbeats in the length of a lease, at least."""
BEAT_MAX_S = 5.0
"""Longest pause between two heartbeats, and between two looks whether a claim still stands."""


def limits(lease: float, timeout: float | None) -> Limits:
    """What a program may take of a lease (seconds) that is lost, so that it is gone before another runner starts it.

    We let go lease/2 after the last sign of life. Told so, the program has `grace`; where this process stands
    still and cannot tell it, it is ended `silence` after it did. Both leave a quarter of the lease, of which
    `process.POLL_S` and the time to kill are a small part.
    """
    return Limits(timeout, grace=min(GRACE_S, lease / 4), silence=lease / 4)


class Lease:
    """Beats in a thread while the context is open. Others reap our claims once our beat stands still for
    `seconds` of theirs; we let go after half of that on our own clock, so that no two evaluate one ticket. `note` says
    what we are at, and must answer at once."""

    def __init__(self, queue: Queue, seconds: float, note: Callable[[], bytes] = lambda: b"") -> None:
        self._queue = queue
        self._seconds = seconds
        self._note = note
        self._shown_at = boottime()
        self._gap_at = float("-inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="autoeval-lease", daemon=True)
        self._fd = -1
        self._watched: Token | None = None
        self._taken: Token | None = None

    def __enter__(self) -> Lease:
        try:
            self._fd = self._queue.start_heart()
        except FileExistsError as error:
            raise QueueError(
                f"{error.filename or self._queue.root}: a runner of the name {self._queue.runner!r} is there already; "
                "give this one another, or remove the file if that one is gone"
            ) from error
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

    @contextlib.contextmanager
    def watching(self, token: Token, since: float) -> Iterator[Callable[[], bool]]:
        """Look after a claim that was made at `since`. The function tells at once, without asking the file system,
        whether it is ours still as far as we know: nobody was seen to cancel it, nor could have taken it over."""
        self._taken = None
        self._watched = token
        try:
            yield lambda: self.held_since(since) and self._taken != token
        finally:
            self._watched = None

    def _look(self) -> None:
        token = self._watched
        if token is not None and not self._queue.holds(token):
            self._taken = token

    def _loop(self) -> None:
        count = 0
        while not self._over.wait(min(self._seconds / BEATS, BEAT_MAX_S)):
            count += 1
            started = boottime()      # a write that hangs counts from when it was begun
            try:
                self._queue.beat(self._fd, count, self._note())
            except OSError as error:
                log.warning("heartbeat failed: %s", error)
            else:
                if boottime() - self._shown_at >= self._seconds / 2:
                    self._gap_at = boottime()
                self._shown_at = started
            with contextlib.suppress(OSError):      # then the heartbeat has failed too, or will
                self._look()
