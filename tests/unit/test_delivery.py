"""The background thread: order, retries, the deadline, and the guard around what training calls."""

from __future__ import annotations

import os
import threading
import time

import pytest

from autoeval_hooks import delivery
from autoeval_hooks.delivery import Delivery, never_raise
from autoeval_hooks.errors import CheckpointError


def test_work_is_done_in_order_in_another_thread() -> None:
    done: list[int] = []
    threads: set[int] = set()
    work = Delivery()
    for i in range(20):
        work.put(lambda i=i: (done.append(i), threads.add(threading.get_ident())), f"work {i}")
    assert work.flush(5)
    assert done == list(range(20))
    assert threading.get_ident() not in threads


def test_failing_work_is_tried_again_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.05)
    log: list[str] = []

    def flaky() -> None:
        log.append("flaky")
        if log.count("flaky") < 3:
            raise OSError("disk full")

    work = Delivery()
    work.put(flaky, "the flaky one")
    work.put(lambda: log.append("other"), "the other")
    assert work.flush(5)            # everything was tried once: pins are made, whatever the queue does
    assert log == ["flaky", "other"]
    assert work.finish(5)
    assert log == ["flaky", "other", "flaky", "flaky"]
    messages = [r.getMessage() for r in caplog.records]
    assert "autoeval: the flaky one failed and will be tried again: disk full" in messages
    assert "autoeval: the flaky one succeeded at try 3" in messages
    assert len(messages) == 2


def test_what_fails_for_ever_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of it that the thread is never idle between two tries."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(delivery, "LONGEST_PAUSE_S", 0.01)
    over = threading.Event()

    def refuse() -> None:
        if not over.wait(0.02):
            raise OSError("quota exceeded")

    work, ended = Delivery(), threading.Event()
    for i in range(20):
        work.put(refuse, f"work {i}")
    threading.Thread(target=lambda: work.finish(1) or ended.set(), daemon=True).start()
    try:
        assert ended.wait(20)
    finally:
        over.set()


def test_the_end_waits_for_what_failed_once_and_gets_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_S", 0.01)
    tried: set[int] = set()

    def work(i: int) -> None:
        if i not in tried:
            tried.add(i)
            raise OSError("the queue is away")
        time.sleep(0.3)

    slow = Delivery()
    for i in range(8):
        slow.put(lambda i=i: work(i), f"work {i}")
    assert slow.finish(1.5)         # all of it takes longer than that, each of it does not


def test_what_cannot_succeed_is_given_up_and_freed(caplog: pytest.LogCaptureFixture) -> None:
    freed: list[int] = []

    def hopeless() -> None:
        raise CheckpointError("it is gone")

    work = Delivery()
    work.put(hopeless, "handing over x", lambda: freed.append(1))
    assert work.finish(5)
    assert freed == [1]
    assert [r.getMessage() for r in caplog.records] == ["autoeval: handing over x: given up: it is gone"]


def test_a_hang_is_waited_for_once(caplog: pytest.LogCaptureFixture) -> None:
    hang, after = threading.Event(), threading.Event()
    work = Delivery()
    work.put(lambda: hang.wait() and None, "hanging")
    began = time.monotonic()
    assert not work.flush(0.3)
    assert 0.3 <= time.monotonic() - began < 2
    began = time.monotonic()
    assert not any(work.flush(0.3) for _ in range(50))
    assert time.monotonic() - began < 0.25
    assert len([r for r in caplog.records if "delivery is behind" in r.getMessage()]) == 1
    work.put(after.set, "after")
    hang.set()
    assert after.wait(5)
    assert work.flush(5)


def test_the_end_waits_as_long_as_something_is_finished() -> None:
    work = Delivery()
    for _ in range(5):
        work.put(lambda: time.sleep(0.2), "slow work")
    assert not work.flush(0.1)
    began = time.monotonic()
    assert work.finish(0.5)         # a second in all, and never half of one without progress
    assert time.monotonic() - began > 0.5
    hang = threading.Event()
    work.put(lambda: hang.wait() and None, "hanging")
    assert not work.finish(0.2)
    hang.set()


def test_a_process_that_forked_delivers_too() -> None:
    work = Delivery()
    work.put(lambda: None, "before")
    assert work.flush(5)
    child = os.fork()
    if child == 0:
        work.put(lambda: None, "in the child")
        os._exit(0 if work.finish(5) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_guard_lets_only_interrupts_pass(caplog: pytest.LogCaptureFixture) -> None:
    @never_raise
    def raises(error: BaseException) -> None:
        raise error

    raises(ValueError("ours"))
    raises(OSError(5, "I/O error"))
    assert len(caplog.records) == 2
    for error in (KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)):
            raises(error)


def test_a_flush_waits_for_what_was_put_before_it_alone() -> None:
    """Work that puts more work, one after the other, holds nobody who waits for what is urgent."""
    work, done = Delivery(), []

    def link(n: int) -> None:
        done.append(n)
        if n < 30:
            work.put(lambda: link(n + 1), f"link {n + 1}")
            time.sleep(0.1)

    work.put(lambda: link(0), "link 0")
    assert work.flush(2)
    assert len(done) < 10
    assert work.finish(5)
    assert done == list(range(31))
