"""The W&B sink's decisions and files, without W&B: a stand-in takes the place of the writer process."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.sinks import wandb as sinks
from eval_runner.sinks import wandb_children, wandb_lease, wandb_writer
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink, close_run
from eval_runner.sinks.wandb_cases import TABLE, decide
from eval_runner.sinks.wandb_lease import Lease
from eval_runner.sinks.wandb_reader import BUSY, Held, Look, Refused
from eval_runner.sinks.wandb_writer import Request, Target, _from_config
from tests.wandb_runs import IDENTITY, result
from tests.wandb_stand_in import StandIn, standing, take
from tests.wandb_trainer import drop, point

BEAT = "a 00000000000000000001\n"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sink's clock; set now[0]."""
    time = [1000.0]
    monkeypatch.setattr(files, "clock", lambda: time[0])
    return time


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(sinks.process, "run", stand_in.run)
    return stand_in


@pytest.fixture
def make_sink(tmp_path: Path) -> Callable[..., WandbSink]:
    def make(**settings: Any) -> WandbSink:
        return WandbSink(settings, Context(queue=tmp_path, runner="r-1", where="sinks[0]", config_file="a.yaml"))

    return make


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run's directory with one point and a heartbeat, as the hook and a runner leave it."""
    path = tmp_path / "relay" / IDENTITY.key
    for part in files.STAGES:
        (path / part).mkdir(parents=True)
    drop(path, [5])
    (path / "heartbeat").write_text(BEAT)
    announce(path)
    return path


def announce(path: Path, *, by_step: bool = False, ended: bool | None = None, of: str = "a") -> None:
    record = files.Announcement(files.VERSION, IDENTITY, "a", by_step, 10)
    (path / "run.json").write_bytes(files.encode(record))
    if ended is not None:
        (path / "ended.json").write_bytes(files.encode(files.Ended(files.VERSION, of, 10, ended)))


# hook, closed, free, late → what is done
EXPECTED = {
    ("alive", False, False, "wait"): "relay", ("alive", False, False, "companion"): "relay",
    ("alive", False, True, "wait"): "relay", ("alive", False, True, "companion"): "relay",
    ("alive", True, False, "wait"): "relay", ("alive", True, False, "companion"): "relay",
    ("alive", True, True, "wait"): "relay", ("alive", True, True, "companion"): "relay",
    ("unclear", False, False, "wait"): "wait", ("unclear", False, False, "companion"): "wait",
    ("unclear", False, True, "wait"): "wait", ("unclear", False, True, "companion"): "wait",
    ("unclear", True, False, "wait"): "wait", ("unclear", True, False, "companion"): "wait",
    ("unclear", True, True, "wait"): "wait", ("unclear", True, True, "companion"): "wait",
    ("gone", False, False, "wait"): "wait", ("gone", False, False, "companion"): "companion",
    ("gone", False, True, "wait"): "write", ("gone", False, True, "companion"): "write",
    ("gone", True, False, "wait"): "write", ("gone", True, False, "companion"): "write",
    ("gone", True, True, "wait"): "write", ("gone", True, True, "companion"): "write",
    ("none", False, False, "wait"): "wait", ("none", False, False, "companion"): "companion",
    ("none", False, True, "wait"): "wait", ("none", False, True, "companion"): "companion",
    ("none", True, False, "wait"): "write", ("none", True, False, "companion"): "write",
    ("none", True, True, "wait"): "write", ("none", True, True, "companion"): "write",
}  # fmt: skip


def test_every_case_has_its_way() -> None:
    cases = itertools.product(("alive", "unclear", "gone", "none"), (False, True), (False, True), ("wait", "companion"))
    found = {(h, c, f, late): decide(h, closed=c, free=f, late=late) for h, c, f, late in cases}  # type: ignore[arg-type]
    assert {case: found[case].way for case in found} == EXPECTED
    assert set(map(id, found.values())) == set(map(id, TABLE))  # no row of the table is dead
    assert all(case.why for case in TABLE)


@pytest.mark.parametrize(
    ("ended", "of", "by_step", "still"),
    [
        (None, "a", False, files.STALE_S),
        (True, "a", False, files.ENDED_STALE_S),
        (True, "a", True, files.ENDED_STALE_S),
        (True, "another", False, files.STALE_S),  # the end of an earlier training says nothing of this one
    ],
)
def test_only_a_heartbeat_that_stands_still_for_long_enough_is_a_dead_hook(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn,
    ended: bool | None, of: str, by_step: bool, still: float,
) -> None:  # fmt: skip
    announce(directory, by_step=by_step, ended=ended, of=of)
    sink = make_sink()
    assert not sink.flush()  # the first sight proves nothing
    now[0] += still - 1
    assert not sink.flush()
    (directory / "heartbeat").write_text(BEAT.replace("1", "2"))
    assert not sink.flush()
    assert "alive" in sink.waiting[0].why
    now[0] += still - 1
    assert not sink.flush()
    assert writer.wrote == []
    now[0] += 2
    assert sink.flush()
    request = writer.wrote[0][0]
    assert request.heartbeat_seen == BEAT.replace("1", "2")
    assert not request.companion
    assert standing(directory) == {"logged": [5]}
    drop(directory, [6])
    assert sink.flush()  # still dead, and no new wait for what is known


@pytest.mark.parametrize("ended", [None, False])
def test_by_step_and_not_over_waits(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn, ended: bool | None
) -> None:
    announce(directory, by_step=True, ended=ended)
    sink, beside = make_sink(), make_sink(late="companion")
    for s in (sink, beside):
        s.flush()
    now[0] += 10 * files.STALE_S
    assert not sink.flush()
    assert "close RUN" in sink.waiting[0].why
    assert (sink.waiting[0].run, sink.waiting[0].points) == (IDENTITY.key, 1)
    assert writer.wrote == []
    assert beside.flush()
    assert writer.wrote[0][0].companion
    drop(directory, [6])
    assert close_run(directory.parents[1], "the training") == IDENTITY.key
    assert sink.flush()
    assert not writer.wrote[1][0].companion


ALIVE = BEAT.replace("1", "2")


@pytest.mark.parametrize("there", [True, False])
def test_what_a_dead_runner_took_is_looked_for_before_a_resumed_training_may_log_it(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn, there: bool
) -> None:
    """But not what a runner took that lives: it has the lease."""
    lease = Lease(directory / "writer", "alive")
    assert lease.acquire()
    take(directory, 5, "alive")
    sink = make_sink()
    sink.flush()
    (directory / "heartbeat").write_text(ALIVE)
    with lease.beating():
        assert not sink.flush()
        assert standing(directory) == {"taken": [5]}
        assert writer.looked == []
    if there:
        writer.held.rows.append(point(5).row())
    assert sink.flush() is there
    assert standing(directory) == {"logged" if there else "points": [5]}
    assert len(writer.looked) == 1
    assert there or "alive" in sink.waiting[0].why
    assert writer.wrote == []


def test_a_lease_that_nobody_shows_to_hold_is_broken_and_a_living_one_is_not(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    lease = Lease(directory / "writer", "other")
    assert lease.acquire()
    sink = make_sink()
    for _ in range(4):
        sink.flush()
        now[0] += files.STALE_S + 1
        lease._path.write_text(f"{now[0]}")
    sink.flush()
    assert [request.broken for request, _ in writer.wrote] == [""] * len(writer.wrote)
    drop(directory, [6])
    sink.flush()
    now[0] += wandb_lease.STALE_S + 1
    drop(directory, [7])
    sink.flush()
    broken = writer.wrote[-1][0].broken
    assert broken == f"other {now[0] - wandb_lease.STALE_S - 1}"
    lost, winner = Lease(directory / "writer", "b"), Lease(directory / "writer", "a")
    assert not winner.acquire("other, as it was before")
    assert winner.acquire(broken)
    assert not lost.acquire(broken)
    assert not lost.acquire()
    assert winner.held()
    assert not lease.held()
    wandb_lease.release(directory / "writer", "other")  # which has nothing to give back
    assert not lost.acquire()
    wandb_lease.release(directory / "writer", "a")
    assert lost.acquire()


@pytest.mark.parametrize("how", ["taken", "the file system fails"])
def test_a_writer_that_lost_its_lease_ends(directory: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(wandb_lease, "BEAT_S", 0.01)
    monkeypatch.setattr(wandb_lease, "STALE_S", 0.6)
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    lease = Lease(directory / "writer", "a")
    assert lease.acquire()
    with lease.beating():
        _, before = wandb_lease.seen(directory / "writer")
        while wandb_lease.seen(directory / "writer")[1] == before:
            assert not ended.is_set()
        if how == "taken":
            assert Lease(directory / "writer", "b").acquire(broken=_seen_still(directory))
        else:
            monkeypatch.setattr(wandb_lease._OPS, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "EIO")))
        assert ended.wait(10)


def _seen_still(directory: Path) -> str:
    """What the holder shows at the moment that it is taken for dead."""
    os.rename(directory / "writer" / "a", directory / "writer" / "x")
    return wandb_lease.seen(directory / "writer")[1]


def test_of_many_who_want_the_lease_at_once_one_gets_it(directory: Path) -> None:
    leases = [Lease(directory / "writer", f"w{i}") for i in range(8)]
    got: list[bool] = []
    start = threading.Barrier(len(leases))

    def want(lease: Lease) -> None:
        start.wait()
        got.append(lease.acquire())

    threads = [threading.Thread(target=want, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    assert len(os.listdir(directory / "writer")) == 1
    assert not any(name.startswith(".writer") for name in os.listdir(directory))


def test_what_a_killed_training_took_is_not_logged_by_its_successor(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    """It is looked for, but only once it must have been sent, if it was."""
    drop(directory, [6])
    for step in (5, 6):
        take(directory, step, f"{files.RELAY}killed-0")
    sink = make_sink()
    sink.flush()
    for beat in range(2, 9):
        now[0] += files.STALE_S / 8
        (directory / "heartbeat").write_text(BEAT.replace("1", str(beat)))
        assert not sink.flush()
    assert writer.looked == []
    now[0] += files.STALE_S / 8 + 1
    writer.held = Held(True, "running", [point(6).row()])
    (directory / "heartbeat").write_text(BEAT.replace("1", "9"))
    assert not sink.flush()
    assert standing(directory) == {"points": [5], "logged": [6]}
    assert "alive" in sink.waiting[0].why
    assert writer.wrote == []


def test_what_a_training_took_is_its_own_while_it_lives_and_looked_for_once_it_is_gone(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    """Also what it had put into logged/: it cannot know what W&B could send."""
    drop(directory, [6, 7])
    for step, stage in ((5, "taken"), (6, "logged"), (7, "logged")):
        take(directory, step, f"{files.RELAY}a-0", stage)
    sink = make_sink()
    sink.flush()
    (directory / "heartbeat").write_text(ALIVE)
    assert not sink.flush()
    assert writer.looked == []
    now[0] += files.STALE_S + 1
    writer.held = Held(True, "running", [point(7).row()])
    assert not sink.flush()
    assert "running" in sink.waiting[0].why  # it may still come
    assert standing(directory) == {"taken": [5], "logged": [6, 7]}
    now[0] += sinks.PAUSE_S + 1
    writer.held.state = "crashed"
    assert sink.flush()
    assert standing(directory) == {"logged": [5, 6, 7]}
    assert len(writer.wrote) == 1
    assert sorted(os.listdir(directory / "logged"))[2].endswith("~relay-a-0")
    looks = len(writer.looked)
    assert make_sink().flush()  # a runner that starts later does not look again
    assert len(writer.looked) == looks


def test_a_run_that_was_deleted_is_not_filled_again(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    take(directory, 5, f"{files.RELAY}a-0", "logged")
    writer.held = Held(False, "", [])
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    assert sink.flush()
    assert standing(directory) == {"logged": [5]}
    assert len(writer.looked) == 1
    assert writer.wrote == []


def test_a_training_that_comes_back_while_it_was_looked_for_keeps_what_it_took(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    take(directory, 5, f"{files.RELAY}a-0")
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1

    def wake(argv: list[str], **kwargs: Any) -> int:
        (directory / "heartbeat").write_text(ALIVE)
        return writer.run(argv, **kwargs)

    monkeypatch.setattr(sinks.process, "run", wake)
    assert not sink.flush()
    assert standing(directory) == {"taken": [5]}
    assert "come to life" in sink.waiting[0].why


def test_offline_and_out_of_reach_waits_and_says_what_to_do(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    """But only what may be in the run: a point that nobody took is logged all the same."""
    run = replace(IDENTITY, wandb_mode="offline", wandb_dir="/not/here")
    (directory / "run.json").write_bytes(files.encode(files.Announcement(files.VERSION, run, "a", False, 10)))
    take(directory, 5, f"{files.RELAY}a-0")
    drop(directory, [6])
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    assert not sink.flush()
    assert "(/not/here) are not here" in sink.waiting[0].why
    assert "path_map" in sink.waiting[0].why
    assert (directory / "why").read_text() == sink.waiting[0].why
    assert standing(directory) == {"taken": [5], "logged": [6]}


def test_a_run_that_no_hook_announced_waits_for_the_user(
    tmp_path: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    sink = make_sink()
    sink.publish(result(5))
    assert not sink.flush()
    now[0] += 10 * files.STALE_S
    assert not sink.flush()
    assert "no training process has shown itself" in sink.waiting[0].why
    close_run(tmp_path, IDENTITY.key)
    assert sink.flush()
    assert writer.wrote[0][0].look.run == IDENTITY


def test_publish_is_idempotent_wherever_the_point_stands(tmp_path: Path, make_sink: Callable[..., WandbSink]) -> None:
    sink = make_sink()
    directory, name = tmp_path / "relay" / IDENTITY.key, f"{5:064x}.json"
    sink.publish(result(5))
    first = (directory / "points" / name).read_bytes()
    for src, dst in ((f"points/{name}", f"taken/{5:064x}~r"), (f"taken/{5:064x}~r", f"logged/{5:064x}~r")):
        os.rename(directory / src, directory / dst)
        sink.publish(result(5))
        assert os.listdir(directory / "points") == []
    os.rename(directory / "logged" / f"{5:064x}~r", directory / "points" / name)
    sink.publish(replace(result(5), finished_at=9.0))
    assert os.listdir(directory / "points") == [name]
    assert (directory / "points" / name).read_bytes() == first
    assert files.parse_point(first, name).row()["bench/s/arc/acc"] == 0.005


@pytest.mark.parametrize("there", [True, False])
def test_a_point_whose_file_was_removed_is_looked_for_before_it_is_logged(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn, there: bool
) -> None:
    """A replay of all results, with the files deleted, beside a training that would log what it is given."""
    sink = make_sink()
    take(directory, 5, f"{files.RELAY}a-0", "logged")
    shutil.rmtree(directory / "logged")
    sink.publish(result(5))
    sink.publish(result(5))
    assert standing(directory) == {"taken": [5]}
    sink._watch.look(directory, "wait")
    (directory / "heartbeat").write_text(ALIVE)
    if there:
        writer.held.rows.append(point(5).row())
    assert sink.flush() is there
    assert standing(directory) == {"logged" if there else "points": [5]}


def test_nothing_for_a_run_without_wandb(tmp_path: Path, make_sink: Callable[..., WandbSink]) -> None:
    sink = make_sink()
    sink.publish(result(5, RunIdentity(id="ours")))
    assert not (tmp_path / "relay").exists()
    assert sink.flush()


@pytest.mark.parametrize("status", [1, BUSY, AutoEvalError("python took longer than 300 s")])
def test_a_writer_that_fails_is_not_hurried_and_its_lease_is_given_back(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn, status: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tries: list[str] = []

    def run(argv: list[str], **kwargs: Any) -> int:
        request = files.parse(Request, Path(argv[-1]).read_bytes(), "request")
        assert Lease(directory / "writer", request.who).acquire(request.broken)
        tries.append(request.who)
        return writer.run(argv, **kwargs)

    monkeypatch.setattr(sinks.process, "run", run)
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    writer.status = status
    assert not sink.flush()
    assert any(said in sink.waiting[0].why for said in ("it said this", "no answer: it is away, slow, or refuses"))
    assert (directory / "why").read_text() == sink.waiting[0].why
    assert os.listdir(directory / "writer") == ["free"]
    assert standing(directory) == {"points": [5]}
    now[0] += sinks.PAUSE_S - 1
    assert not sink.flush()
    assert len(tries) == 1
    now[0] += 2
    assert not sink.flush()
    assert len(tries) == 2
    now[0] += sinks.PAUSE_S + 1
    assert not sink.flush()
    assert len(tries) == 2  # the pause has doubled
    writer.status = 0
    now[0] += sinks.PAUSE_S
    assert sink.flush()
    assert not (directory / "why").exists()
    assert len(set(tries)) == 3


def test_a_service_that_hangs_for_one_run_leaves_the_turn_to_what_comes(
    tmp_path: Path, directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    runs = [directory]
    for i in range(2):
        runs.append(tmp_path / "relay" / f"z{i}")
        shutil.copytree(directory, runs[-1])
    tried: list[str] = []

    def hang(argv: list[str], **kwargs: Any) -> int:
        now[0] += wandb_children.WRITER_TIMEOUT_S
        tried.append(kwargs["log"].parent.name)
        raise AutoEvalError("python took longer than 300 s")

    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    monkeypatch.setattr(sinks.process, "run", hang)
    for _ in range(3):
        assert not sink.flush()
        assert len(sink.waiting) == 3
    assert sorted(set(tried)) == sorted(run.name for run in runs)  # one in each turn, and each has its turn
    assert len(tried) == 3


def test_one_broken_run_does_not_hold_up_another(
    tmp_path: Path, directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    broken = tmp_path / "relay" / "a-broken-one"
    (broken / "points").mkdir(parents=True)
    (broken / "run.json").write_text("{torn")
    drop(broken, [5])
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    assert not sink.flush()
    assert [w.run for w in sink.waiting] == ["a-broken-one"]
    assert "not valid JSON" in sink.waiting[0].why
    assert standing(directory) == {"logged": [5]}
    assert close_run(tmp_path, "r1") == IDENTITY.key


def test_a_run_whose_directory_cannot_be_listed_does_not_hold_up_another(
    tmp_path: Path, directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn
) -> None:
    (broken := tmp_path / "relay" / "a-broken-one").mkdir()
    (broken / "points").touch()
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    assert not sink.flush()
    assert [(w.run, "Not a directory" in w.why) for w in sink.waiting] == [("a-broken-one", True)]
    assert standing(directory) == {"logged": [5]}


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of step 5 is none that we may read. A stand-in: root may read all."""
    read = FileOps.read

    def refuse(self: FileOps, path: str, limit: int, owners: frozenset[int] | None = None) -> bytes:
        if f"{point(5).ticket}" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return read(self, path, limit, owners)

    monkeypatch.setattr(FileOps, "read", refuse)


def test_a_point_that_cannot_be_read_does_not_hold_up_those_that_are_looked_for(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn, secret: None
) -> None:
    drop(directory, [6, 7])
    for step in (5, 6):
        take(directory, step, f"{files.RELAY}a-0")
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    writer.held.rows.append(point(6).row())
    assert not sink.flush()
    assert standing(directory) == {"taken": [5], "logged": [6, 7]}
    assert sink.waiting[0].why.endswith("cannot be read: Permission denied")
    assert sink.waiting[0].points == 1
    children = len(writer.looked) + len(writer.wrote)
    assert not sink.flush()
    assert len(writer.looked) + len(writer.wrote) == children      # it is tried again, but not at once


def test_the_writer_brings_what_it_can_read_and_says_what_it_cannot(
    directory: Path, secret: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins take the place of W&B."""
    drop(directory, [6])
    look = Look(IDENTITY, False, (), (), (), "")
    request = Request(look, False, False, "", str(directory), "me", "", BEAT, 0.0)
    logged: list[files.Point] = []
    monkeypatch.setattr(wandb_writer, "_present", lambda request, points: set())
    monkeypatch.setattr(wandb_writer, "_deliver", lambda request, lease, points: logged.extend(points) or logged)
    with pytest.raises(Refused, match=r"^1 point\(s\) cannot be read here, such as 0*5\.json: Permission denied$"):
        wandb_writer.deliver(request)
    assert logged == [point(6)]
    assert os.listdir(directory / "writer") == ["free"]


def test_the_writer_gets_no_other_runs_settings(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for key in ("WANDB_RUN_ID", "WANDB_MODE", "WANDB_RESUME", "WANDB_SERVICE", "WANDB_TAGS"):
        monkeypatch.setenv(key, "of another run")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("OTHER_KEY", "o" * 40)
    sink = make_sink(api_key_env="OTHER_KEY", base_url="http://127.0.0.1:1")
    sink.flush()
    now[0] += files.STALE_S + 1
    assert sink.flush()
    env = writer.wrote[0][1]["env"]
    assert {k: v for k, v in env.items() if v == "of another run"} == {}
    assert (env["WANDB_API_KEY"], env["WANDB_BASE_URL"]) == ("o" * 40, "http://127.0.0.1:1")
    for path in directory.rglob("*"):
        assert not path.is_file() or b"o" * 40 not in path.read_bytes()  # no secret in the queue


@pytest.mark.parametrize("there", [True, False])
def test_offline_scores_go_beside_the_run_or_to_our_own_directory(
    tmp_path: Path, directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: StandIn,
    there: bool,
) -> None:  # fmt: skip
    """The path in the identity is data: it is used, mapped, only where the run's own directory is found in it."""
    own = tmp_path / "mnt" / "out" / "wandb"
    log = own / "offline-run-20260101_000000-r1" / "run-r1.wandb"
    log.parent.mkdir(parents=True)
    if there:
        log.touch()
    run = replace(IDENTITY, wandb_mode="offline", wandb_dir="/train/out/wandb")
    (directory / "run.json").write_bytes(files.encode(files.Announcement(files.VERSION, run, "a", False, 10)))
    sink = make_sink()
    sink.children._context = replace(sink._context, path_map={"/train": str(tmp_path / "mnt")})
    sink.flush()
    now[0] += files.STALE_S + 1
    assert sink.flush()
    request = writer.wrote[0][0]
    assert request.look.offline
    assert request.look.logs == ((str(log),) if there else ())
    assert Path(request.directory) == (own.parent if there else tmp_path)
    assert (tmp_path / "wandb").is_dir() is not there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"late": "soon"}, "sinks[0].late: 'soon' is not one of"),
        ({"lat": "wait"}, "sinks[0].lat: unknown key; did you mean 'late'?"),
        ({"api_key_env": "NO_SUCH_KEY"}, "sinks[0].api_key_env: the environment has no NO_SUCH_KEY"),
        ({"dir": 3}, "sinks[0].dir: expected text"),
    ],
)
def test_settings_that_are_wrong(make_sink: Callable[..., WandbSink], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_sink(**settings)
    assert str(error.value).startswith("a.yaml: ")
    assert message in str(error.value)


def test_closing_a_run_that_is_not_or_is_two(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run called 'the trainin'; did you mean"):
        close_run(tmp_path, "the trainin")
    other = tmp_path / "relay" / "other"
    other.mkdir()
    (other / "identity.json").write_bytes(files.encode(replace(IDENTITY, wandb_id="r2")))
    with pytest.raises(ConfigError, match=f"2 runs called 'the training'; name one of other, {IDENTITY.key}"):
        close_run(tmp_path, "the training")
    assert close_run(tmp_path, "r2") == "other"
    assert (other / "closed").exists()


def test_definitions_from_a_config() -> None:
    stored = [
        {"1": "train/global_step", "6": [3], "7": []},
        {"2": "*", "5": 1, "6": [1], "7": []},
        {"1": "loss", "4": "epoch", "6": [2, 3], "7": [1, 5]},
    ]
    plain = {"step_metric": None, "step_sync": None, "hidden": None, "summary": None}
    assert list(_from_config(stored)) == [
        {**plain, "name": "train/global_step"},
        {**plain, "name": "*", "step_metric": "train/global_step", "step_sync": True},
        {"name": "loss", "step_metric": "epoch", "step_sync": False, "hidden": True, "summary": "min,last"},
    ]
    assert Target({}, []).state == ""
