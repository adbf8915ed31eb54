"""Requests and tokens per minute, over a sliding window, for all threads that ask one service."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_S = 60.0


@dataclass
class Booking:
    """A request that was sent at `at` (seconds), and how many tokens it takes."""

    at: float
    tokens: float


class Rates:
    """When the next request may be sent. Nothing here waits; `clock` gives seconds that never go back.

    In no window of a minute are more than `requests` booked, nor more than `tokens`; a request that has more tokens
    than a minute may have is sent when nothing else is in the window.
    """

    def __init__(
        self,
        requests: float | None = None,
        tokens: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = requests
        self._tokens = tokens
        self._clock = clock
        self._booked: deque[Booking] = deque()
        self._paused = 0.0
        self._lock = threading.Lock()

    def book(self, tokens: float) -> Booking | float:
        """A booking for a request that may take so many tokens, to be sent now; or the seconds to wait before asking
        again."""
        with self._lock:
            now = self._clock()
            while self._booked and self._booked[0].at <= now - WINDOW_S:
                self._booked.popleft()
            if (wait := max(self._paused - now, self._wait(now, tokens))) > 0:
                return wait
            booking = Booking(now, tokens)
            self._booked.append(booking)
            return booking

    def correct(self, booking: Booking, tokens: float) -> None:
        """It took so many tokens."""
        with self._lock:
            booking.tokens = tokens

    def pause(self, seconds: float) -> None:
        """Nothing is sent for so long: the service asked for it."""
        with self._lock:
            self._paused = max(self._paused, self._clock() + seconds)

    def _wait(self, now: float, tokens: float) -> float:
        """Seconds until enough of what is booked has left the window."""
        if self._requests is None and self._tokens is None:
            self._booked.clear()
            return 0.0
        count, sum_ = len(self._booked), sum(b.tokens for b in self._booked)
        for leaving in [None, *self._booked]:
            if leaving is not None:
                count, sum_ = count - 1, sum_ - leaving.tokens
            requests_fit = self._requests is None or count + 1 <= self._requests or not count
            tokens_fit = self._tokens is None or sum_ + tokens <= self._tokens or not count
            if requests_fit and tokens_fit:
                return 0.0 if leaving is None else leaving.at + WINDOW_S - now
        return 0.0
