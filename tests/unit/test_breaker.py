"""The breaker of a suite: what opens it, what it says, who respects it, what closes it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks.fsio import FileOps
from eval_runner import breaker
from eval_runner.breaker import Breakers
from eval_runner.results.schema import Failure

SUITE, OTHER = "a" * 64, "b" * 64
DOWN, WRONG, BROKEN = Failure("transient", "no GPU"), Failure("configuration", "no data"), Failure("checkpoint", "torn")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> object:
    (tmp_path / "breakers").mkdir()

    def one(threshold: int = 3, clock: Clock = clock, ops: FileOps | None = None) -> Breakers:
        return Breakers(tmp_path, threshold, ops or FileOps(), clock)

    return one


def fail(breakers: Breakers, *checkpoints: str, failure: Failure = DOWN, digest: str = SUITE) -> list[bool]:
    return [breakers.failed("quick", digest, checkpoint, failure) for checkpoint in checkpoints]


def seen(breakers: Breakers, digest: str = SUITE) -> bool:
    breakers.look()
    return breakers.stops(digest)


def test_failures_on_different_checkpoints_in_a_row_stop_a_suite_for_all_runners(
    make: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = make(), make()  # type: ignore[operator]
    assert fail(one, "c1", "c1", "c1") == [False] * 3           # one checkpoint, which has its own attempts
    assert fail(two, "c2") == [False]
    assert breaker.read(tmp_path) == []
    assert fail(one, "c3", failure=WRONG) == [True]
    assert seen(two)
    assert not seen(two, OTHER)
    assert breaker.read(tmp_path) == [breaker.Open("quick", SUITE, 3, "no data")]
    assert seen(make())  # type: ignore[operator]  # a later runner
    said = [r.message for r in caplog.records if "stopped" in r.message]
    assert len(said) == 3                                       # once by each runner
    assert "suite quick: stopped, since it failed on 3 checkpoint(s) in a row" in said[0]
    assert "no data. Mend that and give `autoeval-runner retry --suite quick`" in said[0]


def test_a_success_and_a_bad_checkpoint_break_no_suite(make: object, tmp_path: Path) -> None:
    one = make()  # type: ignore[operator]
    fail(one, "c1", "c2")
    one.succeeded(SUITE)
    assert fail(one, "c3", "c4") == [False, False]
    assert fail(one, "c5", "c6", "c7", failure=BROKEN) == [False] * 3
    assert fail(one, "c8", digest=OTHER) == [False]
    assert breaker.read(tmp_path) == []


def test_one_ticket_is_tried_after_each_pause_and_success_closes(make: object, clock: Clock, tmp_path: Path) -> None:
    one, two = make(), make()  # type: ignore[operator]
    fail(one, "c1", "c2", "c3")
    for pause in (900, 1800, 3600, 7200, 14400, 14400):
        clock.now += pause - 1
        assert seen(one)
        assert seen(two)
        clock.now += 1
        assert not seen(one)
        assert not seen(two)
        one.trying(SUITE)
        assert seen(one)            # one ticket only…
        assert seen(two)            # …by one runner only
        assert fail(one, "c4") == [True]
    clock.now += 14400
    two.look()
    two.trying(SUITE)
    two.succeeded(SUITE)
    assert not seen(one)
    assert not one.is_open(SUITE)
    assert os.listdir(tmp_path / "breakers") == []


def test_the_pause_is_counted_on_a_clock_that_was_seen_to_run(make: object, clock: Clock, tmp_path: Path) -> None:
    fail(make(), "c1", "c2", "c3")  # type: ignore[operator]
    clock.now += 899
    same_boot = make()  # type: ignore[operator]
    assert seen(same_boot)
    clock.now += 1
    assert not seen(same_boot)
    (file,) = (tmp_path / "breakers").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boot": "another host", "at": 5.0}))
    rebooted = Clock()
    rebooted.now = 10.0
    elsewhere = make(clock=rebooted)  # type: ignore[operator]
    assert seen(elsewhere)
    rebooted.now += 899
    assert seen(elsewhere)
    rebooted.now += 1
    assert not seen(elsewhere)
    late = json.loads(file.read_text()) | {"boot": breaker._boot(), "at": 1e15}
    file.write_text(json.dumps(late))
    future = make()  # type: ignore[operator]
    assert seen(future)
    clock.now += 900
    assert not seen(future)


def test_closing_by_hand(make: object, tmp_path: Path) -> None:
    one = make()  # type: ignore[operator]
    fail(one, "c1", "c2", "c3")
    assert breaker.close(tmp_path, SUITE)
    assert not breaker.close(tmp_path, SUITE)
    assert not seen(one)
    assert fail(one, "c4", "c5") == [False, False]              # its failures are forgotten


def test_a_full_disk_stops_the_suite_for_this_runner_all_the_same(make: object, tmp_path: Path) -> None:
    class Full(FileOps):
        full = True

        def create(self, path: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device", path)
            return super().create(path)

    ops = Full()
    one = make(ops=ops)  # type: ignore[operator]
    assert fail(one, "c1", "c2", "c3") == [False, False, True]
    assert seen(one)
    assert breaker.read(tmp_path) == []
    ops.full = False
    fail(one, "c4")
    assert breaker.read(tmp_path) == [breaker.Open("quick", SUITE, 4, "no GPU")]


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b'{"suite": "quick"}', b"x" * (breaker.MAX_BYTES + 1),
    json.dumps({"suite": "quick", "suite_digest": OTHER, "open": True}).encode(),
    json.dumps({"suite": "quick", "suite_digest": SUITE, "open": True, "command": "rm"}).encode(),
    json.dumps({"suite": "quick", "suite_digest": SUITE, "open": "yes"}).encode(),
])  # fmt: skip
def test_a_file_that_is_none_of_ours_stops_nothing(
    make: object, tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "breakers" / f"{SUITE}.json"
    path.write_bytes(text)
    for name in ("notes.txt", f".{SUITE}.json.tmp"):
        (path.parent / name).write_bytes(text)
    (path.parent / f"{'c' * 64}.json").symlink_to("/etc/passwd")
    (path.parent / f"{'d' * 64}.json").mkdir()
    os.mkfifo(path.parent / f"{'e' * 64}.json")
    one = make()  # type: ignore[operator]
    assert not seen(one)
    assert not seen(one)
    assert breaker.read(tmp_path) == []
    assert sum(str(path) in r.message for r in caplog.records) == 1     # said once
    assert fail(one, "c1", "c2", "c3") == [False, False, True]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(
    st.tuples(st.just("fail"), st.sampled_from("abcd"), st.sampled_from([DOWN, WRONG, BROKEN])), st.just(("ok",))
), max_size=12), st.integers(1, 4))  # fmt: skip
def test_open_is_what_the_rule_says(tmp_path_factory: pytest.TempPathFactory, events: list, threshold: int) -> None:
    """Against the rule in one line: open iff `threshold` different checkpoints failed since the last success."""
    root = tmp_path_factory.mktemp("b")
    (root / "breakers").mkdir()
    two = [Breakers(root, threshold) for _ in range(2)]
    failed: set[str] = set()
    for i, event in enumerate(events):
        one = two[i % 2]
        if event[0] == "ok":
            one.look()
            one.succeeded(SUITE)
            failed = set()
        else:
            counts = event[2].kind != "checkpoint"
            failed |= {event[1]} if counts else set()
            assert one.failed("quick", SUITE, event[1], event[2]) == (counts and len(failed) >= threshold)
        assert bool(breaker.read(root)) == (len(failed) >= threshold)


def test_a_record_holds_a_bounded_number_of_checkpoints(make: object, tmp_path: Path) -> None:
    one = make()  # type: ignore[operator]
    fail(one, "c1", "c2", "c3")
    one._known[SUITE] = replace(one._known[SUITE], checkpoints=tuple(f"{i:064}" for i in range(1000)))
    one._write(one._known[SUITE])
    fail(one, "more")
    assert breaker.read(tmp_path)[0].failures == 1000
