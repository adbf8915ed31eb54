"""Requests and tokens per minute, over a sliding window, for all that ask one service."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks import fsio
from eval_runner.evaluators.gpt import retry

WINDOW_S = 60.0
TRAVEL_S = 0.5
"""More, since one request may take longer to arrive than another."""
SLOWER, FASTER = 2.0, 0.9
"""What the time between two requests is multiplied by: after a pause, and after an answer."""
FIRST_GAP = 1 / 16
"""Of the first pause: the time between two requests after it."""
LEAST_GAP_S = 1e-3


@dataclass
class Booking:
    """A request that was sent at `at` (seconds), and how many tokens it takes."""

    at: float
    tokens: float


class Rates:
    """When the next request may be sent. Nothing here waits; `clock` gives seconds that never go back.

    In no window of a minute are more than `requests` booked, nor more than `tokens`; a request that has more tokens
    than a minute may have is sent when nothing else is in the window. After a pause, requests are let go one after the
    other, at a distance that doubles with every pause and shrinks with every answer: threads that all come back at once
    would only be refused once more.
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
        self._paused = self._next = self._answered = float("-inf")
        self._gap = 0.0
        self._lock = threading.Lock()

    def limit(self, requests: float | None, tokens: float | None) -> None:
        """Keep to these, too, where they are stricter."""
        with self._lock:
            self._requests = min((n for n in (self._requests, requests) if n is not None), default=None)
            self._tokens = min((n for n in (self._tokens, tokens) if n is not None), default=None)

    def sent(self) -> list[tuple[float, float]]:
        """What is in the window: when it was sent, and its tokens."""
        with self._lock:
            return [(b.at, b.tokens) for b in self._booked]

    def recall(self, sent: list[tuple[float, float]]) -> None:
        """Count what another process sent before. What lies in the future is of a clock that was set anew."""
        with self._lock:
            now = self._clock()
            self._booked.extend(Booking(at, tokens) for at, tokens in sent if now - _span() < at <= now)

    def book(self, tokens: float) -> Booking | float:
        """A booking for a request that may take so many tokens, to be sent now; or the seconds to wait before asking
        again."""
        with self._lock:
            now = self._clock()
            while self._booked and self._booked[0].at <= now - _span():
                self._booked.popleft()
            if (wait := max(self._paused - now, self._next - now, self._wait(now, tokens))) > 0:
                return wait
            booking = Booking(now, tokens)
            self._booked.append(booking)
            self._next = now + self._gap
            return booking

    def answered(self, booking: Booking, tokens: float) -> None:
        """It was answered, and took so many tokens."""
        with self._lock:
            booking.tokens = tokens
            self._answered = self._clock()
            self._gap = gap if (gap := self._gap * FASTER) >= LEAST_GAP_S else 0.0

    def silence(self, booking: Booking) -> float:
        """Seconds since the service last answered anything, at most since this was sent."""
        with self._lock:
            return self._clock() - max(self._answered, booking.at)

    def pause(self, seconds: float) -> None:
        """Nothing is sent for so long: the service asked for it."""
        with self._lock:
            now = self._clock()
            if now >= self._paused:     # else it was sent before the pause that is on
                first = max(seconds, retry.FIRST_WAIT_S) * FIRST_GAP
                self._gap = min(max(self._gap * SLOWER, first), retry.LONGEST_WAIT_S)
            self._paused = max(self._paused, now + seconds)

    def _wait(self, now: float, tokens: float) -> float:
        """Seconds until enough of what is booked has left the window."""
        if self._requests is None and self._tokens is None:
            return 0.0
        count, sum_ = len(self._booked), sum(b.tokens for b in self._booked)
        for leaving in [None, *self._booked]:
            if leaving is not None:
                count, sum_ = count - 1, sum_ - leaving.tokens
            requests_fit = self._requests is None or count + 1 <= self._requests or not count
            tokens_fit = self._tokens is None or sum_ + tokens <= self._tokens or not count
            if requests_fit and tokens_fit:
                return 0.0 if leaving is None else leaving.at + _span() - now
        return 0.0


def _span() -> float:
    return WINDOW_S + TRAVEL_S


class AllRates:
    """One `Rates` for each service that a process asks, which is known by its URL and the variable of its key. `path`
    is a file that hands what was sent on to the next process on this host."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rates: dict[str, Rates] = {}

    def of(
        self, base_url: str, api_key_env: str | None, requests: float | None = None, tokens: float | None = None
    ) -> Rates:
        """The service's; it keeps to the strictest of the limits that it was asked with."""
        name = f"{base_url} {api_key_env or ''}"
        if name not in self._rates:
            self._rates[name] = Rates()
            self._rates[name].recall(self._earlier().get(name, []))
        self._rates[name].limit(requests, tokens)
        return self._rates[name]

    def save(self) -> None:
        """For the next process; `time.monotonic` is one clock for all processes of a boot."""
        sent = self._earlier() | {name: rates.sent() for name, rates in self._rates.items()}
        fsio.replace(str(self._path), json.dumps(sent).encode())

    def _earlier(self) -> dict[str, list[tuple[float, float]]]:
        try:
            found: dict[str, list[tuple[float, float]]] = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        return found
