"""Rate limits, with a clock of our own."""

from __future__ import annotations

import json
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_runner.evaluators.gpt.rates import TRAVEL_S, WINDOW_S, AllRates, Booking, Rates
from eval_runner.evaluators.gpt.retry import Failure, asked_wait, back_off
from eval_runner.evaluators.gpt.service import Service
from eval_runner.evaluators.gpt.worker import Work

MINUTE = WINDOW_S + TRAVEL_S


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def send(rates: Rates, clock: Clock, tokens: float) -> Booking:
    """As the client does: wait for as long as it is told."""
    while not isinstance(found := rates.book(tokens), Booking):
        assert found > 0
        clock.now += found + 1e-6
    return found


def test_without_limits_nothing_waits() -> None:
    rates = Rates(clock=Clock())
    assert all(isinstance(rates.book(1e9), Booking) for _ in range(1000))


def test_requests_a_minute() -> None:
    rates = Rates(requests=2, clock=(clock := Clock()))
    times = [send(rates, clock, 1).at - 1000 for _ in range(5)]
    assert times == pytest.approx([0, 0, MINUTE, MINUTE, 2 * MINUTE], abs=1e-3)


def test_tokens_a_minute_and_what_is_learnt_of_them() -> None:
    rates = Rates(tokens=100, clock=(clock := Clock()))
    first = send(rates, clock, 90)
    assert rates.book(20) == pytest.approx(MINUTE)
    rates.answered(first, 10)
    assert isinstance(rates.book(20), Booking)
    assert rates.book(71) == pytest.approx(MINUTE)


def test_more_tokens_than_a_minute_may_have_go_alone() -> None:
    rates = Rates(tokens=100, clock=(clock := Clock()))
    assert isinstance(rates.book(500), Booking)
    assert rates.book(1) == pytest.approx(MINUTE)
    clock.now += MINUTE
    assert isinstance(rates.book(1), Booking)
    assert rates.book(500) == pytest.approx(MINUTE)


def test_a_pause_is_for_all_and_is_not_cut_short() -> None:
    rates = Rates(clock=(clock := Clock()))
    rates.pause(30)
    rates.pause(1)
    assert rates.book(1) == pytest.approx(30)
    clock.now += 30
    assert isinstance(rates.book(1), Booking)


def test_after_a_pause_they_go_one_after_the_other() -> None:
    rates = Rates(clock=(clock := Clock()))
    sent = [send(rates, clock, 1) for _ in range(4)]
    for _ in sent:      # all are refused, which is one pause
        rates.pause(16)
    times = [send(rates, clock, 1).at - 1000 for _ in range(3)]
    assert times == pytest.approx([16, 17, 18], abs=1e-3)
    rates.pause(4)      # too fast
    assert send(rates, clock, 1).at == pytest.approx(clock.now)
    last = send(rates, clock, 1)
    assert last.at - 1000 == pytest.approx(18 + 4 + 2, abs=1e-3)
    for _ in range(7):
        rates.answered(last, 1)
    clock.now += 2
    assert isinstance(rates.book(1), Booking)
    assert rates.book(1) == pytest.approx(2 * 0.9**7)
    for _ in range(99):
        rates.answered(last, 1)
    clock.now += 2
    assert all(isinstance(rates.book(1), Booking) for _ in range(9))


def test_how_long_a_service_is_silent() -> None:
    rates = Rates(clock=(clock := Clock()))
    first = send(rates, clock, 1)
    clock.now += 7
    assert rates.silence(first) == pytest.approx(7)
    rates.answered(send(rates, clock, 1), 1)
    clock.now += 2
    assert rates.silence(first) == pytest.approx(2)


def test_a_service_has_one_window_whoever_asks_it(tmp_path: Path) -> None:
    every = AllRates(tmp_path / "rates.json")
    judge = every.of("http://judge/v1", "KEY", 4, None)
    assert every.of("http://judge/v1", "KEY", 2, None) is judge
    assert every.of("http://judge/v1", "KEY") is judge
    assert isinstance(judge.book(1), Booking)
    assert isinstance(judge.book(1), Booking)
    assert isinstance(judge.book(1), float)     # the stricter limit is two
    for other in (("http://judge/v1", "OTHER"), ("http://other/v1", "KEY")):
        assert isinstance(every.of(*other, 1).book(1), Booking)


def test_the_next_process_counts_what_the_last_one_sent(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    first = AllRates(path)
    sent = first.of("http://judge/v1", "KEY", 1).book(10)
    first.of("http://other/v1", None, 1)
    assert isinstance(sent, Booking)
    first.save()
    between = AllRates(path)        # asks another one only, and hands the rest on
    between.of("http://other/v1", None, 1)
    between.save()
    wait = AllRates(path).of("http://judge/v1", "KEY", 1).book(1)
    assert isinstance(wait, float)
    assert MINUTE - 5 < wait <= MINUTE
    now = time.monotonic()
    path.write_text(json.dumps({"http://judge/v1 KEY": [[now - MINUTE - 1, 1], [now + 1000, 1]]}))
    assert isinstance(AllRates(path).of("http://judge/v1", "KEY", 1).book(1), Booking)


def test_the_askers_of_a_phase_and_of_the_next_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *a, **k: None)   # slow, and no TLS here
    service = Service(name="the judge", base_url="http://127.0.0.1:9/v1", identity="judge", requests_per_minute=2)
    told: Any = SimpleNamespace(cache=str(tmp_path), evaluation="e")

    def phase() -> Work:
        work = Work(told, tmp_path)
        work.__dict__["budget"] = None
        return work

    with closing(phase()) as work:
        for scope in ("anchors", "reviews"):
            assert isinstance(work.asker(service, scope)._rates.book(1), Booking)
        assert isinstance(work.asker(service, "reviews")._rates.book(1), float)
    with closing(phase()) as work:
        assert isinstance(work.asker(service, "reviews")._rates.book(1), float)


@given(
    st.integers(1, 5), st.integers(10, 100), st.lists(st.tuples(st.integers(1, 10), st.floats(0, 40)), max_size=40)
)
def test_no_window_has_more(requests: int, tokens: int, sends: list[tuple[int, float]]) -> None:
    rates, sent = Rates(requests, tokens, clock := Clock()), []
    for size, pause in sends:
        clock.now += pause
        sent.append(send(rates, clock, size))
    for first in sent:
        window = [b for b in sent if first.at <= b.at < first.at + MINUTE]
        assert len(window) <= requests
        assert sum(b.tokens for b in window) <= tokens


def test_what_a_service_asks_to_wait() -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert asked_wait({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert asked_wait({"retry-after": "7"}) == 7
    assert asked_wait({"retry-after": then}) == pytest.approx(100, abs=3)
    assert asked_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert asked_wait({"retry-after-ms": "soon", "retry-after": "3"}) == 3
    for text in ("", "soon", "nan", "-1", "inf", "31 Feb 2020", "9" * 400):
        assert asked_wait({"retry-after": text}) is None, text


def test_back_off_grows_and_ends() -> None:
    for tries, most in ((1, 0.5), (2, 1), (4, 4), (20, 60)):
        waits = [back_off(tries) for _ in range(50)]
        assert most / 2 <= min(waits) < max(waits) <= most


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (Failure("x"), True), (Failure("x", 500), True), (Failure("x", 599), True), (Failure("x", 429), True),
        (Failure("x", 408), True), (Failure("x", 409), True), (Failure("x", 429, "insufficient_quota"), False),
        (Failure("x", 400), False), (Failure("x", 404), False), (Failure("x", 307), False),
    ],
)  # fmt: skip
def test_what_is_tried_again(failure: Failure, again: bool) -> None:
    assert failure.again is again


def test_what_is_refused() -> None:
    body = {"max_tokens": 1, "temperature": 0, "response_format": {}, "messages": []}
    assert Failure("use max_completion_tokens", 400).renamed(body)
    assert not Failure("use max_completion_tokens", 400).renamed({"max_completion_tokens": 1})
    assert Failure("x", 400, parameter="response_format.json_schema").refuses(body) == "response_format"
    assert Failure("x", 400, parameter="messages[0].content").refuses(body) == ""
    assert Failure("bad temperature", 422).refuses(body) == "temperature"
    assert Failure("bad temperature", 422).refuses({}) == ""
    assert Failure("temperatures are high", 400).refuses(body) == ""
    assert Failure("bad temperature", 404).refuses(body) == ""
