"""Background delivery with a deadline, and the guard that keeps every fault of ours out of training."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from autoeval_hooks.errors import CheckpointError

log = logging.getLogger("autoeval")
F = TypeVar("F", bound=Callable[..., Any])

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


@dataclass
class _Item:
    work: Callable[[], None]
    what: str
    abandon: Callable[[], None]
    number: int
    tries: int = 0
    not_before: float = 0.0


class Delivery:
    """One daemon thread that does the given work in order; nothing that it meets reaches the caller.

    Work that fails is tried again with growing pauses for as long as the process lives, others going ahead
    of it; only a CheckpointError is final.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._busy = False
        self._count = 0
        self._doing = 0
        self._progress = 0
        self._nearer = 0
        self._stalled_at = -1
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], None], what: str, abandon: Callable[[], None] = lambda: None) -> None:
        """Have `work` done. Takes microseconds. `what` names it in warnings."""
        with self._changed:
            self._count += 1
            self._items.append(_Item(work, what, abandon, self._count))
            if self._thread is None or not self._thread.is_alive():     # a fork leaves no thread in the child
                thread = threading.Thread(target=self._loop, name="autoeval-delivery", daemon=True)
                thread.start()
                self._thread = thread
            self._changed.notify_all()

    def flush(self, deadline: float) -> bool:
        """Wait at most `deadline` seconds until everything that was put by now was tried; False when time was up.

        A file system that hangs is waited for once: until something moves again, later calls return at once.
        """
        with self._changed:
            last = self._count
            if self._stalled_at == self._progress and self._untried(last):
                return False
            if not self._changed.wait_for(lambda: not self._untried(last), deadline):
                self._stalled_at = self._progress
                log.warning(
                    "autoeval: delivery is behind by %d checkpoint(s) after %.1f s (slow or hanging file system?); "
                    "training goes on, delivery too", len(self._items) + self._busy, deadline,
                )  # fmt: skip
                return False
        return True

    def finish(self, patience: float) -> bool:
        """Wait until everything is done, as long as something is done, or tried for the first time, at least every
        `patience` seconds: what only fails again and again holds nobody."""
        with self._changed:
            while self._busy or self._items:
                if not self._changed.wait_for(self._nearer_than(self._nearer), patience):
                    return False
        return True

    def _nearer_than(self, before: int) -> Callable[[], bool]:
        return lambda: self._nearer != before

    def _untried(self, last: int) -> bool:
        """Whether something up to the number `last` was not tried yet."""
        if self._busy and self._doing <= last:
            return True
        return any(not item.tries and item.number <= last for item in self._items)

    def _loop(self) -> None:
        while True:
            item = self._next()
            nearer = self._do(item)
            with self._changed:
                self._busy = False
                self._progress += 1
                self._nearer += nearer
                self._changed.notify_all()

    def _next(self) -> _Item:
        with self._changed:
            while True:
                now = time.monotonic()
                for item in self._items:
                    if item.not_before <= now:
                        self._items.remove(item)
                        self._busy, self._doing = True, item.number
                        return item
                soonest = min((item.not_before for item in self._items), default=None)
                self._changed.wait(None if soonest is None else soonest - now)

    def _do(self, item: _Item) -> bool:
        """Try it; False when it failed not for the first time."""
        try:
            item.work()
        except CheckpointError as error:
            log.warning("autoeval: %s: given up: %s", item.what, error)
            never_raise(item.abandon)()
        except Exception as error:
            item.tries += 1
            if item.tries == 1:
                log.warning("autoeval: %s failed and will be tried again: %s", item.what, _say(error))
            log.debug("autoeval: %s", item.what, exc_info=True)
            item.not_before = time.monotonic() + min(FIRST_PAUSE_S * 2 ** (item.tries - 1), LONGEST_PAUSE_S)
            with self._changed:
                self._items.append(item)
            return item.tries == 1
        else:
            if item.tries:
                log.warning("autoeval: %s succeeded at try %d", item.what, item.tries + 1)
        return True


def never_raise(function: F) -> F:
    """Wrap what training calls: an Exception becomes one warning. KeyboardInterrupt and SystemExit pass."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            log.warning("autoeval: %s failed and was passed over: %s", function.__name__, _say(error))
            log.debug("autoeval: in %s", function.__name__, exc_info=True)
            return None

    return guarded  # type: ignore[return-value]  # the same signature


def _say(error: Exception) -> str:
    text = str(error).strip()
    return text if text else type(error).__name__
