"""What a runner does when its evaluator, its file system, its lease or its user stops it in the middle."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks import submit
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import boottime
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import runner as runners
from eval_runner.cli import cli
from eval_runner.evaluators.base import Job
from eval_runner.lease import Lease
from eval_runner.process import Stopped
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import Shown, StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]


def states(tmp_path: Path) -> list[str]:
    return [t.state for t in Queue(str(tmp_path / "queue")).tokens()]


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    evaluator = StandIn([AutoEvalError("the node hiccuped"), OSError("so did the disk")])
    run(evaluator)
    assert states(tmp_path) == ["done"]
    assert len(evaluator.jobs) == 3
    for step, error in ((200, CheckpointError("it is broken")), (300, ConfigError("x.yaml: y: no"))):
        submit(checkpoint(step, f"{step}".encode()), step=step, config=config_file)
        evaluator = StandIn([error])
        assert run(evaluator).failed == 1
        assert len(evaluator.jobs) == 1
    failures = {f.step: f.failure for f in store.collect(tmp_path / "queue").failed}
    assert {s: (f.kind, f.message) for s, f in failures.items()} == {
        200: ("checkpoint", "it is broken"), 300: ("configuration", "x.yaml: y: no"),
    }  # fmt: skip


def test_attempts_are_bounded_and_a_retry_starts_afresh(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    evaluator = StandIn([AutoEvalError(f"fault {i}") for i in range(9)])
    run(evaluator)
    assert states(tmp_path) == ["failed"]
    assert len(evaluator.jobs) == 3         # runner.max_attempts
    status = CliRunner().invoke(cli, ["status", "--config", str(config_file), "--json"])
    (shown,) = json.loads(status.stdout)["tickets"]
    assert (shown["state"], shown["step"], shown["why"]) == ("failed", 100, "fault 2")
    retried = CliRunner().invoke(cli, ["retry", "--config", str(config_file), shown["ticket"][:8]])
    assert retried.stdout == f"{shown['ticket'][:12]}: queued\n"
    run(StandIn())
    assert states(tmp_path) == ["done"]
    assert len(store.done(tmp_path / "queue")[0]) == 1


def test_a_checkpoint_that_changed_before_or_meanwhile_publishes_nothing(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    before, meanwhile, gone = checkpoint(100), checkpoint(200, b"two"), checkpoint(300, b"three")
    for step, path in ((100, before), (200, meanwhile), (300, gone)):
        submit(path, step=step, config=config_file)
    (before / "model.safetensors").write_bytes(b"other!!")
    shutil.rmtree(gone)

    def rewrite(job: Job) -> None:
        (job.path / "model.safetensors").write_bytes(b"four")

    sink = Shown()
    run(StandIn(during=rewrite), sink=sink)
    assert sink.results == []
    reasons = {f.step: f.failure.message for f in store.collect(tmp_path / "queue").failed}
    assert "content is not that of the manifest" in reasons[100]
    assert "changed while it was evaluated; nothing is published" in reasons[200]
    assert "it was not pinned and is gone" in reasons[300]


def test_a_stop_gives_the_ticket_back_without_using_up_an_attempt(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    with Progress() as progress:
        runner = Runner(configs.load(str(config_file)), {}, {}, progress)

        def stop(job: Job) -> None:
            runner.stopped.set()
            assert job.stopping()
            raise Stopped("told to")

        runner.evaluators["quick"] = [StandIn(during=stop)]
        runner.run("forever")
    (token,) = Queue(str(tmp_path / "queue")).tokens()
    assert (token.state, token.generation, token.failures) == ("pending", 1, 0)


def test_a_runner_that_lost_its_lease_stops_and_cannot_commit(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    thief = Queue(str(tmp_path / "queue"), runner="thief")

    def stolen(job: Job) -> None:
        (token,) = thief.tokens("claimed")
        assert thief.release(token, failed=True) == "pending"

    run(StandIn(during=stolen), mode="once")
    assert states(tmp_path) == ["pending"]
    assert store.done(tmp_path / "queue") == ([], [])
    assert len(os.listdir(tmp_path / "queue" / "results")) == 1     # the zombie's, which no token names
    run(StandIn(), name="r2")
    assert states(tmp_path) == ["done"]
    assert [r.runner for r in store.done(tmp_path / "queue")[0]] == ["r2"]


def test_a_heartbeat_that_fails_ends_the_evaluation_before_others_may_start(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 1.0"))
    submit(checkpoint(100), step=100, config=config_file)
    beats = iter(range(2))

    def beat(self: Queue, fd: int, count: int, note: bytes = b"") -> None:
        if next(beats, None) is None:
            raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Queue, "beat", beat)
    waited: list[bool] = []

    def work(job: Job) -> None:
        over = threading.Event()
        for _ in range(100):
            if job.stopping():
                waited.append(True)
                raise Stopped("the lease is lost")
            over.wait(0.05)

    run(StandIn(during=work), mode="once")
    assert waited == [True]
    assert states(tmp_path) == ["pending"]


def test_a_sink_that_fails_is_tried_again_and_blocks_nothing(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    sink = Shown(faults=[OSError("service away"), RuntimeError("still")])
    run(StandIn(), sink=sink)
    assert [r.step for r in sink.results] == [100]


def test_a_full_disk_keeps_the_ticket(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    write, faults = store.write, iter(range(2))

    def full(*args: object, **kwargs: object) -> object:
        if next(faults, None) is not None:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", full)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_a_drain_waits_for_what_a_dead_runner_holds_and_not_for_a_live_one(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 1.5"))
    submit(checkpoint(100), step=100, config=config_file)
    Queue(str(tmp_path / "queue"), runner="dead").claim()
    evaluator = StandIn()
    run(evaluator)
    assert states(tmp_path) == ["done"]
    assert len(evaluator.jobs) == 1
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    live = Queue(str(tmp_path / "queue"), runner="live")
    assert live.claim() is not None
    with Lease(live, 1.5):
        run(evaluator)
        assert sorted(states(tmp_path)) == ["claimed", "done"]


def test_a_claim_that_a_file_server_did_not_confirm_is_given_back(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    Queue(str(tmp_path / "queue"), runner="r1").claim()     # done on the server, and `r1` does not know
    run(StandIn(), name="r1")
    assert states(tmp_path) == ["done"]


class Mute(FileOps):
    """A file server that moves a token from one state to another, or (not `done`) does not, and says that it failed."""

    def __init__(self, src: str, dst: str, done: bool = True) -> None:
        self.way, self.done, self.faults = (f"/{src}/", f"/{dst}/"), done, 1

    def rename(self, src: str, dst: str) -> None:
        fails = self.faults and self.way[0] in src and self.way[1] in dst
        if not fails or self.done:
            super().rename(src, dst)
        if fails:
            self.faults = 0
            raise OSError(5, "Input/output error", src)


def test_a_drain_does_not_end_with_a_claim_that_it_does_not_know_of(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "IDLE_S", (0.01, 0.05))
    submit(checkpoint(100), step=100, config=config_file)
    with Progress() as progress:
        config = configs.load(str(config_file))
        Runner(config, {"quick": [StandIn()]}, {}, progress, ops=Mute("pending", "claimed")).run("drain")
    assert states(tmp_path) == ["done"]


def test_one_ticket_is_evaluated_and_none_is_kept(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "IDLE_S", (0.01, 0.05))
    for step in (100, 200):
        submit(checkpoint(step, b"w" * step), step=step, config=config_file)
    with Progress() as progress:
        config = configs.load(str(config_file))
        Runner(config, {"quick": [StandIn()]}, {}, progress, ops=Mute("pending", "claimed")).run("once")
    assert sorted(states(tmp_path)) == ["done", "pending"]


def test_a_stop_gives_the_ticket_back_though_the_file_system_fails_at_first(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "IDLE_S", (0.01, 0.05))
    submit(checkpoint(100), step=100, config=config_file)

    def stop(job: Job) -> None:
        runner.stopped.set()
        raise Stopped("told to")

    with Progress() as progress:
        config = configs.load(str(config_file))
        ops = Mute("claimed", "pending", done=False)
        runner = Runner(config, {"quick": [StandIn(during=stop)]}, {}, progress, ops=ops)
        runner.run("forever")
    (token,) = Queue(str(tmp_path / "queue")).tokens()
    assert (ops.faults, token.state, token.failures) == (0, "pending", 0)


@pytest.mark.parametrize("done", [True, False])
def test_a_commit_that_a_file_server_did_not_confirm_costs_no_evaluation(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, quick: None, done: bool
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    evaluator, sink = StandIn(), Shown()
    with Progress() as progress:
        config = configs.load(str(config_file))
        ops = Mute("claimed", "done", done)
        runner = Runner(config, {"quick": [evaluator]}, {"shown": sink}, progress, ops=ops)
        assert runner.run("drain")
    assert ops.faults == 0
    assert (states(tmp_path), len(evaluator.jobs), len(sink.results)) == (["done"], 1, 1)
    assert (runner.done, runner.failed, runner.given_back) == (1, 0, set())
    assert os.listdir(tmp_path / "queue" / "breakers") == []
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []


def test_what_another_runner_finished_was_not_given_back(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    monkeypatch.setattr(runners, "RETRY_S", 3600.0)

    def meanwhile(job: Job) -> None:        # while the second is evaluated: the first, which failed here
        if not evaluator.faults and not other:
            other.append(Runner(configs.load(str(config_file)), {"quick": [StandIn()]}, {}, progress))
            other[0].run("once")

    other: list[Runner] = []
    evaluator = StandIn([AutoEvalError("out of memory")], during=meanwhile)
    with Progress() as progress:
        runner = run(evaluator)
    assert states(tmp_path) == ["done", "done"]
    assert (runner.done, runner.given_back, other[0].done) == (1, set(), 1)


def test_a_ticket_that_is_retried_is_taken_at_once(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 6.0, max_attempts: 1"))
    submit(checkpoint(100), step=100, config=config_file)
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    monkeypatch.setattr(runners, "RETRY_S", 3600.0)

    def retry(job: Job) -> None:
        for token in Queue(str(tmp_path / "queue")).tokens("failed"):
            assert Queue(str(tmp_path / "queue")).retry(token)

    with Progress() as progress:
        evaluators = {"quick": [StandIn([AutoEvalError("out of memory")], during=retry)]}
        runner = Runner(configs.load(str(config_file)), evaluators, {}, progress)  # type: ignore[arg-type]
        late = threading.Timer(60, runner.stopped.set)
        late.start()
        runner.run("drain")
        late.cancel()
    assert states(tmp_path) == ["done", "done"]


def test_a_file_system_that_stalls_does_not_end_the_runner(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "IDLE_S", (0.01, 0.05))
    submit(checkpoint(100), step=100, config=config_file)
    claim, faults = Queue.claim, iter(range(3))

    def stale(self: Queue, **kwargs: object) -> object:
        if next(faults, None) is not None:
            raise OSError(116, "Stale file handle")
        return claim(self, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Queue, "claim", stale)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_a_file_system_that_stalls_does_not_condemn_a_checkpoint(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    pread, faults = os.pread, iter(range(1))

    def stale(*args: int) -> bytes:
        if next(faults, None) is not None:
            raise OSError(116, "Stale file handle")
        return pread(*args)

    monkeypatch.setattr(os, "pread", stale)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_a_stop_ends_the_wait_for_late_points(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path
) -> None:
    class Waiting(Shown):
        def flush(self) -> bool:
            return False

    with Progress() as progress:
        runner = Runner(configs.load(str(config_file)), {}, {"shown": Waiting()}, progress)
        threading.Timer(0.5, runner.stopped.set).start()
        began = time.monotonic()
        assert not runner.run("drain")
    assert time.monotonic() - began < 5


def test_a_gap_in_the_heartbeat_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(str(tmp_path / "queue"))
    queue.create()
    hang = threading.Event()
    beat = Queue.beat

    def slow(self: Queue, fd: int, count: int, note: bytes = b"") -> None:
        if count == 2:
            hang.wait(1.2)
        beat(self, fd, count, note)

    monkeypatch.setattr(Queue, "beat", slow)
    with Lease(queue, 1.0) as lease:
        claimed_at = boottime()
        time.sleep(0.2)
        assert lease.held_since(claimed_at)
        time.sleep(2.0)
        assert not lease.held_since(claimed_at)     # it beats again, and others may have taken the ticket meanwhile
        assert lease.held_since(boottime())
