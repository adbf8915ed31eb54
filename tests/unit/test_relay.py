"""The relay's own rules, with a stand-in for the W&B run that records what is logged into it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import relay as relays
from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import TicketError
from autoeval_hooks.relay import Relay
from autoeval_hooks.run_identity import RunIdentity
from tests.wandb_trainer import drop, point

IDENTITY = RunIdentity(id="ours", wandb_id="r1", wandb_mode="online")


class StandInRun:
    """A W&B run as far as the relay knows one. `rows` are complete; `open` is the row that is being made."""

    def __init__(self, id: str = "r1") -> None:
        self.id = id
        self.disabled = False
        self.open: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.broken = False

    def log(self, data: dict[str, float], commit: bool = True) -> None:
        if self.broken:
            raise RuntimeError("W&B is broken")
        self.open |= data
        if commit:
            self.rows.append(self.open)
            self.open = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    @property
    def steps(self) -> list[float]:
        rows = [*self.rows, self.open]
        return [row["bench/step"] for row in rows if "bench/step" in row]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"POLL_S": 0.005, "BEAT_S": 0.02, "GRACE_S": 0.05, "END_WAIT_S": 2.0}.items():
        monkeypatch.setattr(relays, key, value)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> StandInRun:
    open_run = StandInRun()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=open_run))  # type: ignore[arg-type]
    return open_run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "relay" / "r1"


@pytest.fixture
def make(directory: Path, run: StandInRun) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def relay(*, logs_by_step: bool = False, planned: int | None = None, started: bool = True) -> Relay:
        made.append(Relay(str(directory), IDENTITY, logs_by_step=logs_by_step, planned_last_step=planned))
        if started:
            made[-1].start()
            until(lambda: announced(directory) == made[-1]._incarnation)
        return made[-1]

    yield relay
    sys.modules["wandb"].run = None  # type: ignore[attr-defined]  # as after wandb.finish(): the threads end
    until(lambda: not any(t.name == "autoeval-relay" for t in threading.enumerate()))


def until(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def announced(directory: Path) -> str:
    try:
        return str(json.loads((directory / "run.json").read_text())["incarnation"])
    except FileNotFoundError:
        return ""


def names(directory: Path, part: str) -> list[str]:
    return sorted(name for name in os.listdir(directory / part) if not name.startswith("."))


def standing(directory: Path, part: str) -> list[int]:
    """The steps of the points there."""
    return sorted(int(files.ticket_of(name), 16) for name in names(directory, part))


def ready(relay: Relay, count: int = 1) -> None:
    until(lambda: len(relay._ready) == count)


def step(relay: Relay, run: StandInRun) -> None:
    """The trainer logs a row, and then the adapter calls."""
    run.log({"loss": 1.0})
    relay.on_log()


def test_one_point_a_row_and_the_row_before_is_complete(
    make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    (directory / "points").mkdir(parents=True)
    drop(directory, [3, 1])
    relay = make()
    ready(relay, 2)
    step(relay, run)
    assert run.steps == [1]
    assert run.rows == [{"loss": 1.0}]  # the row of the trainer was not touched; the point has joined the next
    time.sleep(0.1)
    assert standing(directory, "taken") == [1, 3]  # its row is open: not delivered yet
    step(relay, run)
    assert run.steps == [1, 3]
    assert run.rows[1] == {**point(1).row(), "loss": 1.0}
    until(lambda: standing(directory, "logged") == [1])
    assert ("bench/step", None) in run.defined
    assert ("bench/s/arc/acc", "bench/step") in run.defined


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "torn": lambda p: p.write_bytes(files.encode(point(9))[:-5]),
    "empty": lambda p: p.touch(),
    "newer": lambda p: p.write_text(json.dumps({**json.loads(files.encode(point(9))), "version": 2})),
    "not a number": lambda p: p.write_bytes(files.encode(point(9)).replace(b"0.009", b"NaN")),
    "a metric of the training": lambda p: p.write_bytes(files.encode(point(9)).replace(b"bench/s/arc/acc", b"loss")),
    "the axis as a metric": lambda p: p.write_bytes(files.encode(point(9)).replace(b"bench/lag_s", b"bench/step")),
    "another ticket": lambda p: p.write_bytes(files.encode(point(8))),
    "negative step": lambda p: p.write_bytes(files.encode(point(9)).replace(b'"step": 9', b'"step": -9')),
    "too large": lambda p: p.write_bytes(b" " * (files.POINT_BYTES + 1)),
    "a link": lambda p: p.symlink_to("/etc/passwd"),
    "a pipe": lambda p: os.mkfifo(p),
    "a directory": lambda p: p.mkdir(),
    "an unknown key": lambda p: p.write_text(json.dumps({**json.loads(files.encode(point(9))), "call": "x"})),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_point_is_set_aside_and_holds_up_nothing(
    kind: str, make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    relay = make()
    HOSTILE[kind](directory / "points" / f"{point(9).ticket}.json")
    drop(directory, [1])
    ready(relay)
    until(lambda: (directory / "refused").is_dir() and len(names(directory, "refused")) == 2)
    assert next((directory / "refused").glob("*.reason")).read_text().startswith(point(9).ticket)
    step(relay, run)
    assert run.steps == [1]


def test_a_point_that_is_right_is_read(directory: Path) -> None:
    assert files.parse_point(files.encode(point(9)), f"{point(9).ticket}.json") == point(9)
    with pytest.raises(TicketError, match=r"x\.json: ticket"):
        files.parse_point(files.encode(point(9)), "x.json")


def test_no_log_without_a_fresh_heartbeat(
    make: Callable[..., Relay], run: StandInRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system hangs for longer than the lease; meanwhile a runner thinks us dead and looks for the points. One
    it finds, and of the other it has found that it is not there."""
    relay = make()
    monkeypatch.setattr(relays, "LEASE_S", 0.2)
    drop(directory, [1, 2])
    ready(relay, 2)
    goes_on = threading.Event()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *a: (goes_on.wait(5), pwrite(*a))[1])
    time.sleep(0.3)
    step(relay, run)
    assert run.steps == []
    before = names(directory, "taken")
    os.rename(directory / "taken" / before[0], directory / "logged" / before[0])
    goes_on.set()
    until(lambda: len(relay._ready) == 1)
    until(lambda: (step(relay, run), run.steps)[1])
    step(relay, run)
    assert run.steps == [2]
    until(lambda: standing(directory, "logged") == [1, 2])
    assert before[1] not in names(directory, "logged")  # what was taken before is not taken by the same name again


def test_the_training_thread_touches_no_file(
    make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    relay, main, seen, watching = make(), threading.get_ident(), [], [True]

    def audit(event: str, args: object) -> None:
        if watching[0] and threading.get_ident() == main and event.split(".")[0] in ("open", "os", "shutil"):
            seen.append(event)

    drop(directory, [1, 2, 3])
    ready(relay, 3)
    watching[0] = True
    sys.addaudithook(audit)
    for _ in range(4):
        run.log({"loss": 1.0})
        relay.on_log()
    watching[0] = False
    assert run.steps == [1, 2, 3]
    assert seen == []


def test_a_wandb_that_fails_never_raises_and_loses_nothing(
    make: Callable[..., Relay], run: StandInRun, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relay = make()
    drop(directory, [1])
    ready(relay)
    run.broken = True
    with caplog.at_level(logging.WARNING, "autoeval"):
        relay.on_log()
    assert "W&B is broken" in caplog.text
    run.broken = False
    step(relay, run)
    assert run.steps == [1]


def test_no_run_another_run_and_a_run_that_ends(
    make: Callable[..., Relay], run: StandInRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = make()
    monkeypatch.setattr(relays, "GRACE_S", 60.0)
    drop(directory, [1, 2, 3])
    ready(relay, 3)
    step(relay, run)
    step(relay, run)  # the row of 1 is complete, that of 2 is open
    monkeypatch.setattr(relays, "POLL_S", 0.5)
    time.sleep(0.05)  # the background thread sleeps now: the training thread sees the change first
    sys.modules["wandb"].run = StandInRun("other")  # type: ignore[attr-defined]
    relay.on_log()
    assert not relay._stopped
    until(lambda: relay._stopped)
    relay.on_log()
    relay.end(5)  # returns at once
    assert run.steps == [1, 2]
    until(lambda: standing(directory, "points") == [3])  # surely not logged
    assert standing(directory, "taken") == [1, 2]  # whether W&B could send when it finished is not known
    assert names(directory, "logged") == []
    beat = (directory / "heartbeat").read_text()
    time.sleep(0.1)
    assert (directory / "heartbeat").read_text() == beat

    for other in (None, StandInRun("other")):
        sys.modules["wandb"].run = other  # type: ignore[attr-defined]
        idle = make(started=False)
        idle.start()
        idle.on_log()
        idle.end(1)
    assert not any(t.name == "autoeval-relay" for t in threading.enumerate())


@pytest.mark.parametrize(("planned", "last", "complete"), [(10, 10, True), (10, 9, False), (None, 10, False)])
def test_the_end_is_marked(
    make: Callable[..., Relay], directory: Path, planned: int | None, last: int, complete: bool
) -> None:
    relay = make(planned=planned)
    (directory / "closed").touch()
    relay.end(last)
    ended = json.loads((directory / "ended.json").read_text())
    assert (ended["last_step"], ended["complete"]) == (last, complete)
    assert ended["incarnation"] == announced(directory)
    beat = (directory / "heartbeat").read_text()
    until(lambda: (directory / "heartbeat").read_text() != beat)  # the process lives


def test_after_the_end_rows_of_their_own_unless_by_step(
    make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    relay = make()
    drop(directory, [1])
    ready(relay)
    step(relay, run)  # 1 is in the open row when training ends
    drop(directory, [2])
    relay.end(5)
    drop(directory, [3])
    until(lambda: standing(directory, "logged") == [1, 2, 3])
    assert run.rows[1:] == [point(1).row(), point(2).row(), point(3).row()]

    by_step = make(logs_by_step=True)
    drop(directory, [4])
    ready(by_step)
    by_step.end(5)
    by_step.on_log()
    time.sleep(0.1)
    assert run.steps == [1, 2, 3]
    assert standing(directory, "points") == [4]
    assert standing(directory, "taken") == []


def test_the_next_training_in_one_process_takes_over(
    make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    first = make()
    drop(directory, [1, 2])
    ready(first, 2)
    step(first, run)
    second = make()
    who = f"{files.RELAY}{second._incarnation}-0"
    until(lambda: names(directory, "taken")[:1] == [files.taken(point(1).ticket, who)])  # no runner looks for it
    assert announced(directory) == second._incarnation
    ready(second)
    step(first, run)  # an adapter that is still registered
    step(second, run)
    step(second, run)
    assert run.steps == [1, 2]
    until(lambda: standing(directory, "logged") == [1, 2])


def test_another_process_that_trains_the_run_ends_ours(
    make: Callable[..., Relay], run: StandInRun, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    relay = make()
    (directory / "new").write_text("another\n")
    with caplog.at_level(logging.WARNING, "autoeval"):
        os.rename(directory / "new", directory / "heartbeat")
        until(lambda: relay._stopped)
    assert "another process trains this W&B run" in caplog.text
    drop(directory, [1])
    step(relay, run)
    assert run.steps == []


@pytest.mark.parametrize("whole", [False, True], ids=["file", "directory"])
def test_a_heartbeat_that_vanishes_is_made_again(
    make: Callable[..., Relay], run: StandInRun, directory: Path, whole: bool
) -> None:
    relay = make()
    relay.end(5)
    if whole:
        os.rename(directory, directory.with_name("moved"))  # so that nothing comes back while it is removed
        shutil.rmtree(directory.with_name("moved"))
    else:
        os.unlink(directory / "heartbeat")
    until(lambda: (directory / "heartbeat").exists() and (directory / "ended.json").exists())
    assert announced(directory) == relay._incarnation
    drop(directory, [1])
    until(lambda: standing(directory, "logged") == [1])
    assert run.steps == [1]


def test_what_an_earlier_process_took_is_left_to_a_runner(
    make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    """It may be in the run, and only a look at the run can tell."""
    first = make()
    drop(directory, [1, 2])
    ready(first, 2)
    step(first, run)
    (lost,) = [name for name in names(directory, "taken") if name.startswith(point(1).ticket)]
    kept = directory / "taken" / files.taken(point(5).ticket, f"{files.RELAY}killed-0")
    kept.write_bytes(files.encode(point(5)))
    # A runner that thought us dead looked and found nothing yet; this process knows better than to log it again.
    os.rename(directory / "taken" / lost, directory / "points" / f"{point(1).ticket}.json")
    drop(directory, [6])
    ready(first, 2)
    for _ in range(5):
        step(first, run)
    assert run.steps == [1, 2, 6]
    assert kept.exists()
    assert standing(directory, "points") == [1]


def test_only_a_few_points_are_taken_before_they_are_logged(
    make: Callable[..., Relay], run: StandInRun, directory: Path
) -> None:
    relay = make()
    drop(directory, list(range(relays.AHEAD + 9)))
    ready(relay, relays.AHEAD)
    time.sleep(0.05)
    assert len(names(directory, "taken")) == relays.AHEAD
    for _ in range(relays.AHEAD + 10):
        step(relay, run)
        time.sleep(0.01)
    until(lambda: (step(relay, run), len(names(directory, "logged")))[1] == relays.AHEAD + 9)
    assert sorted(run.steps) == list(range(relays.AHEAD + 9))


def test_a_point_that_waits_is_read_once(
    make: Callable[..., Relay], run: StandInRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows of training pass: the interpreter's time is training's."""
    reads: list[str] = []
    read = relays.read_point
    monkeypatch.setattr(relays, "read_point", lambda d, name: (reads.append(name), read(d, name))[1])
    relay = make()
    drop(directory, list(range(3 * relays.AHEAD)))
    ready(relay, relays.AHEAD)
    until(lambda: (step(relay, run), len(names(directory, "logged")))[1] == 3 * relays.AHEAD)
    assert sorted(run.steps) == list(range(3 * relays.AHEAD))
    assert sorted(reads) == sorted(set(reads))


def test_a_point_that_cannot_be_taken_is_not_logged(
    make: Callable[..., Relay], run: StandInRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = make()
    monkeypatch.setattr(relays, "move", lambda *a: False)
    drop(directory, [1])
    time.sleep(0.1)
    step(relay, run)
    step(relay, run)
    assert run.steps == []


def test_a_resumed_training_reopens_a_closed_run(make: Callable[..., Relay], directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "closed").touch()
    make()
    until(lambda: not (directory / "closed").exists())


def test_a_queue_that_cannot_be_written_costs_a_warning(
    directory: Path, run: StandInRun, make: Callable[..., Relay], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    directory.parent.parent.joinpath("relay").write_text("a file where the directory should be")
    monkeypatch.setattr(relays, "END_WAIT_S", 0.2)
    relay = make(started=False)
    with caplog.at_level(logging.WARNING, "autoeval"):
        relay.start()
        step(relay, run)
        began = time.monotonic()
        relay.end(3)
        assert time.monotonic() - began < 1.0
    assert sum("autoeval: relay" in r.message for r in caplog.records) == 1  # said once, however often it is tried
