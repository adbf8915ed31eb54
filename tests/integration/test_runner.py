"""A ticket's whole path through a real queue and a real runner; only the evaluator is a stand-in, named `StandIn`."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks import submit
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.queue import Queue, boottime
from eval_runner import config as configs
from eval_runner import runner as runners
from eval_runner.cli import cli
from eval_runner.evaluators.base import Evaluator, Job, Outcome
from eval_runner.lease import Lease
from eval_runner.process import Stopped
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Evaluation, Instance, Result, Score
from eval_runner.runner import Runner

MakeCheckpoint = Callable[..., Path]


@dataclass
class StandIn:
    """Scores a checkpoint by the length of its weights; `faults` are raised first, one for each call."""

    faults: list[Exception] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    during: Callable[[Job], None] = lambda job: None

    def check(self) -> None: ...

    def evaluate(self, job: Job) -> Outcome:
        self.jobs.append(job)
        assert list(job.work_dir.iterdir()) == []
        if self.faults:
            raise self.faults.pop(0)
        self.during(job)
        value = float(len((job.path / "model.safetensors").read_bytes()))
        score = Score("length", "bytes", "test", value, n=1)
        return Outcome(Evaluation("stand-in", 0.1, (score,)), [Instance("length", "bytes", "test", "0", value)])


@dataclass
class Shown:
    """A sink that keeps what it is given."""

    results: list[Result] = field(default_factory=list)
    faults: list[Exception] = field(default_factory=list)

    def publish(self, result: Result) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.results.append(result)

    def flush(self) -> bool:
        return True


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        "queue: queue\nrunner: {lease: 6.0}\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n"
    )
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "RETRY_S", 0.01)
    monkeypatch.setattr("eval_runner.publisher.PERIOD_S", 0.05)


@pytest.fixture
def run(config_file: Path) -> Iterator[Callable[..., Runner]]:
    """Run until the queue is empty (or `mode`), with these parts."""
    with Progress() as progress:

        def go(evaluator: Evaluator, *, sink: Shown | None = None, mode: str = "drain", name: str = "r1") -> Runner:
            config = configs.load(str(config_file))
            runner = Runner(config, {"quick": [evaluator]}, {"shown": sink} if sink else {}, progress, name=name)
            assert runner.run(mode)  # type: ignore[arg-type]
            return runner

        yield go


Run = Callable[..., Runner]


def states(tmp_path: Path) -> list[str]:
    return [t.state for t in Queue(str(tmp_path / "queue")).tokens()]


def test_from_save_to_result(tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run) -> None:
    for step in (100, 200):
        path = checkpoint(step, b"w" * step)
        submit(path, step=step, config=config_file)
        shutil.rmtree(path)         # retention
    sink, evaluator = Shown(), StandIn()
    run(evaluator, sink=sink)
    contents = store.collect(tmp_path / "queue")
    assert {(r.step, r.scores[0].value) for r in contents.results} == {(100, 100.0), (200, 200.0)}
    assert contents.problems == contents.failed == ()
    assert [r.step for r in sink.results] == [200, 100]             # the newest first
    assert len({job.name for job in evaluator.jobs}) == 2           # no cache can mistake one for the other
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []
    assert not any(job.work_dir.exists() for job in evaluator.jobs)
    first = next(iter(contents.results))
    assert [i.value for i in store.instances(store.path_of(tmp_path / "queue", first))] == [float(first.step)]
    run(StandIn(faults=[AssertionError("evaluated twice")]), sink=sink)
    assert len(sink.results) == 2


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


def test_a_failed_evaluation_has_no_score_anywhere(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    sink = Shown()
    run(StandIn([CheckpointError("no")]), sink=sink)
    assert sink.results == []
    assert store.done(tmp_path / "queue") == ([], [])


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


@pytest.mark.parametrize(
    ("missing", "says"),
    [("tokenizer.json", "no tokenizer; pass `processing_class=tokenizer`"), ("config.json", "cannot be read")],
)
def test_a_checkpoint_that_lacks_something_says_so(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, missing: str, says: str
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    path = checkpoint(100, tokenizer=missing != "tokenizer.json")
    submit(path, step=100, config=config_file)
    (path / missing).unlink(missing_ok=True)
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert says in failed.failure.message


def test_pickled_weights_need_leave(tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run) -> None:
    path = checkpoint(100)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    submit(path, step=100, config=config_file)
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert "runner.allow_pickled_weights" in failed.failure.message
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 6.0, allow_pickled_weights: true"))
    CliRunner().invoke(cli, ["retry", "--config", str(config_file), "--all"], catch_exceptions=False)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_a_tokenizer_from_the_configuration(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text() + f"run: {{tokenizer: {tmp_path}/tokenizer}}\n")
    (tmp_path / "tokenizer").mkdir()
    submit(checkpoint(100, tokenizer=False), step=100, config=config_file)
    evaluator = StandIn()
    run(evaluator)
    assert evaluator.jobs[0].tokenizer == tmp_path / "tokenizer"


def test_a_changed_suite_is_a_new_result_and_a_changed_cadence_is_not(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    text = config_file.read_text()
    config_file.write_text(text.replace("entries: [a]", "entries: [b]"))
    evaluator, sink = StandIn(), Shown()
    run(evaluator, sink=sink)
    results, _ = store.done(tmp_path / "queue")
    by_status = {r.status: r for r in results}
    assert set(by_status) == {"ok", "refiled"}
    assert by_status["refiled"].refiled_as == by_status["ok"].ticket
    assert json.loads(by_status["ok"].suite_text)["evaluators"][0]["entries"] == ["b"]
    assert [r.status for r in sink.results] == ["ok"]
    assert len(evaluator.jobs) == 1
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []
    config_file.write_text(config_file.read_text().replace("quick: {", "quick: {every_steps: 50, priority: 9, "))
    assert submit(tmp_path / "out" / "checkpoint-100", step=100, config=config_file) == {"quick": False}


def test_a_suite_that_this_runner_does_not_know_is_left_for_another(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    text = config_file.read_text()
    config_file.write_text(text.replace("quick:", "other:"))
    run(StandIn([AssertionError("not ours")]))
    assert states(tmp_path) == ["pending"]
    config_file.write_text(text)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_hostile_tickets_are_quarantined_and_the_rest_goes_on(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    pending = tmp_path / "queue" / "pending"
    for i, text in enumerate([b"torn", b'{"version":9}', b'{"version":1,"command":"rm -rf /"}']):
        (pending / f"0-{i}-{str(i) * 64}~g0f0").write_bytes(text)
    runner = run(StandIn())
    assert sorted(states(tmp_path)) == ["done", "quarantine", "quarantine", "quarantine"]
    assert runner.failed == 3
    status = CliRunner().invoke(cli, ["status", "--config", str(config_file)])
    assert "was written by a newer autoeval" in status.stdout
    assert "command: unknown key" in status.stdout


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

    def beat(self: Queue, fd: int, count: int) -> None:
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


def test_paths_are_mapped_between_hosts(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    queue = Queue(str(tmp_path / "queue"))
    submit(checkpoint(100), step=100, config=config_file)
    (token,) = queue.tokens("pending")
    ticket = queue.read(token)
    here, there = str(tmp_path / "out"), "/train/out"       # the same ticket, as a host with another mount writes it
    moved = replace(ticket, pin=ticket.pin.replace(here, there),
                    manifest=replace(ticket.manifest, path=ticket.manifest.path.replace(here, there)))  # fmt: skip
    Path(queue.root, "pending", token.name).write_bytes(tickets.dump(moved))
    config_file.write_text(config_file.read_text() + f"path_map: {{/train: {tmp_path}}}\n")
    run(StandIn())
    assert states(tmp_path) == ["done"]
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []


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


@pytest.mark.parametrize("command", [["status"], ["retry", "--all"], ["close", "run"]])
def test_commands_without_a_queue_say_what_to_do(config_file: Path, command: list[str]) -> None:
    with pytest.raises(AutoEvalError, match="queue: not there yet"):
        CliRunner().invoke(cli, [*command, "--config", str(config_file)], catch_exceptions=False)


def test_a_suite_that_is_changed_back_is_evaluated_as_it_was(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    before = config_file.read_text()
    config_file.write_text(before.replace("entries: [a]", "entries: [b]"))
    refiled = StandIn(during=lambda job: pytest.fail("it is changed back before this is evaluated"))
    with Progress() as progress:
        runner = Runner(configs.load(str(config_file)), {"quick": [refiled]}, {}, progress)
        token = runner.queue.claim()
        assert token is not None
        runner._process(token, None)  # type: ignore[arg-type]  # only filed again, which needs no lease
    config_file.write_text(before)
    sink = Shown()
    run(StandIn(), sink=sink)
    results, _ = store.done(tmp_path / "queue")
    assert sorted(r.status for r in results) == ["ok", "refiled"]
    (shown,) = sink.results
    assert json.loads(shown.suite_text)["evaluators"][0]["entries"] == ["a"]
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []


def test_runners_that_disagree_on_a_suite_do_not_file_it_back_and_forth_for_ever(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    other = tmp_path / "other.yaml"
    other.write_text(config_file.read_text().replace("entries: [a]", "entries: [b]"))
    fail = StandIn([AssertionError("the two take only each other's tickets here")])
    with Progress() as progress:
        two = [Runner(configs.load(str(f)), {"quick": [fail]}, {}, progress) for f in (other, config_file)]
        for i in range(200):
            token = two[i % 2].queue.claim()
            if token is None:
                break
            two[i % 2]._process(token, None)  # type: ignore[arg-type]  # as above
    assert i < 199
    reasons = [f.failure.message for f in store.collect(tmp_path / "queue").failed]
    assert any("runners of this queue define it differently" in reason for reason in reasons)


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


def test_weights_that_came_later_are_refused(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    path = checkpoint(100)
    submit(path, step=100, config=config_file)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert "pytorch_model.bin: came after the manifest was taken" in failed.failure.message


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

    def slow(self: Queue, fd: int, count: int) -> None:
        if count == 2:
            hang.wait(1.2)
        beat(self, fd, count)

    monkeypatch.setattr(Queue, "beat", slow)
    with Lease(queue, 1.0) as lease:
        claimed_at = boottime()
        time.sleep(0.2)
        assert lease.held_since(claimed_at)
        time.sleep(2.0)
        assert not lease.held_since(claimed_at)     # it beats again, and others may have taken the ticket meanwhile
        assert lease.held_since(boottime())


@pytest.mark.parametrize(
    ("faults", "mode", "status"),
    [([], "--drain", 0), ([CheckpointError("no")], "--drain", 1), ([AutoEvalError("later")], "--once", 75)],
)
def test_exit_statuses(
    checkpoint: MakeCheckpoint, config_file: Path, monkeypatch: pytest.MonkeyPatch,
    faults: list[Exception], mode: str, status: int,
) -> None:  # fmt: skip
    submit(checkpoint(100), step=100, config=config_file)
    monkeypatch.setattr("eval_runner.registry.build_evaluators", lambda *a: [StandIn(faults)])
    assert CliRunner().invoke(cli, ["run", mode, "--config", str(config_file)]).exit_code == status
