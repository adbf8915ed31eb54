"""What outlives a runner that is killed, cut off, cancelled or out of space; the evaluator is a stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoeval_hooks import submit
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import boottime
from autoeval_hooks.queue import Queue
from eval_runner import cli, lease, process
from eval_runner import config as configs
from eval_runner.config.models import RunnerSection
from eval_runner.evaluators.base import Job, Outcome
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Evaluation, Instance, Score
from eval_runner.runner import Runner
from tests.processes import MARK, marked, wait_for
from tests.stand_ins import Program, Shown, StandIn

ROOT = Path(__file__).parents[2]
MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]
Start = Callable[..., subprocess.Popen[bytes]]

SCRIPT = """
import os, sys, time
from pathlib import Path
from autoeval_hooks.queue import Queue
from eval_runner import config
from eval_runner.evaluators.base import Outcome
from eval_runner.progress import Progress
from eval_runner.results.schema import Evaluation, Instance, Score
from eval_runner.runner import Runner

file, lives, kind = sys.argv[1:]
CHILD = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
now = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
life = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
begun = now()
while True:
    os.pwrite(life, b"%.6f %.6f" % (begun, now()), 0)
    time.sleep(0.01)
    if sys.argv[2] == "second" and now() > begun + 0.5:
        break
'''
beat = Queue.beat
def broken(self, fd, count, note=b""):
    if os.path.exists(os.path.join(lives, "break")) and kind == "first":
        raise OSError(116, "Stale file handle")
    beat(self, fd, count)
Queue.beat = broken

class Three:
    '''A stand-in that is interrupted in the last of its three parts.'''
    def check(self): ...
    def evaluate(self, job):
        scores, values = [], []
        for part in "abc":
            outcome = job.finished.get(part)
            if outcome is None:
                with open(os.path.join(lives, "log"), "a") as log:
                    log.write(f"{kind}-{part} ")
                if part == "c":
                    job.run([sys.executable, "-c", CHILD, os.path.join(lives, kind), kind], env=None)
                value = ord(part) / 7
                score = Score(part, "em", "test", value, n=1)
                outcome = Outcome(Evaluation("three", 1.0, (score,)), [Instance(part, "em", "test", "0", value)])
                job.finished.put(part, outcome)
            scores += outcome.evaluation.scores
            values += outcome.instances
        return Outcome(Evaluation("three", 3.0, tuple(scores)), values)

with Progress() as progress:
    Runner(config.load(file), {"quick": [Three()]}, {}, progress).run("forever")
"""


@pytest.fixture
def start(config_file: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a runner process; what is below it bears its `mark`."""
    started = []
    for name in ("lives", "tmp"):
        (tmp_path / name).mkdir()

    def go(kind: str, mark: str = "") -> subprocess.Popen[bytes]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp"), MARK: mark}
        argv = [sys.executable, "-c", SCRIPT, str(config_file), str(tmp_path / "lives"), kind]
        started.append(subprocess.Popen(argv, env=env))
        return started[-1]

    yield go
    for runner in started:
        runner.kill()
        runner.wait()


def life(tmp_path: Path, kind: str) -> tuple[float, float]:
    """When a child began and when it was last seen, by the one clock of this host."""
    begun, last = (tmp_path / "lives" / kind).read_text().split()
    return float(begun), float(last)


def done(tmp_path: Path) -> list[store.Result]:
    return store.done(tmp_path / "queue")[0]


@pytest.mark.parametrize("how", ["its heartbeat fails", "it is stopped"])
def test_a_child_is_gone_before_a_second_runner_starts_one(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, start: Start, how: str
) -> None:
    """The child ignores SIGTERM, and a lease is the shortest that leaves a slow machine time to start anything."""
    submit(checkpoint(100), step=100, config=config_file)
    first = start("first")
    wait_for((tmp_path / "lives" / "first").exists)
    start("second")
    if how == "its heartbeat fails":
        (tmp_path / "lives" / "break").touch()
    else:
        first.send_signal(signal.SIGSTOP)
    wait_for(lambda: done(tmp_path), 120)
    assert life(tmp_path, "first")[1] < life(tmp_path, "second")[0]
    assert (tmp_path / "lives" / "log").read_text() == "first-a first-b first-c second-c "
    (result,) = done(tmp_path)
    assert [(s.benchmark, s.value) for s in result.scores] == [(p, ord(p) / 7) for p in "abc"]


@given(st.one_of(st.floats(1, 100), st.floats(1, 1e9)))
def test_every_lease_that_may_be_configured_leaves_time_to_end_a_child(seconds: float) -> None:
    RunnerSection(lease=seconds)
    limits = lease.limits(seconds, None)
    for wait in (limits.grace, limits.silence):
        assert seconds / 2 + process.POLL_S + wait + 0.1 < seconds


@pytest.mark.parametrize("rebooted", [False, True])
def test_what_was_finished_survives_a_power_cut(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, start: Start, monkeypatch: pytest.MonkeyPatch,
    rebooted: bool,
) -> None:  # fmt: skip
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 2.0"))
    submit(checkpoint(100), step=100, config=config_file)
    mark = uuid.uuid4().hex
    runner = start("first", mark)
    wait_for((tmp_path / "lives" / "first").exists)
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):       # one took the next with it
            os.kill(pid, signal.SIGKILL)
    runner.wait()
    wait_for(lambda: marked(mark) == [])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert len(os.listdir(tmp_path / "tmp")) == 1
    if rebooted:
        booted = boottime()
        for module in ("autoeval_hooks.keeper", "eval_runner.lease", "eval_runner.runner"):
            monkeypatch.setattr(f"{module}.boottime", lambda: boottime() - booted)
    with Progress() as progress:
        evaluator = Resuming()
        config = configs.load(str(config_file))
        assert Runner(config, {"quick": [evaluator]}, {"shown": (sink := Shown())}, progress).run("drain")
    assert evaluator.asked == ["c"]
    (result,) = done(tmp_path)
    assert [(s.benchmark, s.value) for s in result.scores] == [(p, ord(p) / 7) for p in "abc"]
    assert len(list(store.instances(store.path_of(tmp_path / "queue", result)))) == 3
    assert len(sink.results) == 1
    assert os.listdir(tmp_path / "queue" / "partial") == os.listdir(tmp_path / "tmp") == []


class Resuming:
    """As `Three` in SCRIPT, in this process; `asked` are the parts that it had to evaluate."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.during: Callable[[Job, str], None] = lambda job, part: None

    def check(self) -> None: ...

    def evaluate(self, job: Job) -> Outcome:
        outcomes = []
        for part in "abc":
            outcome = job.finished.get(part)
            if outcome is None:
                self.asked.append(part)
                self.during(job, part)
                value = ord(part) / 7
                values = [Instance(part, "em", "test", "0", value)]
                outcome = Outcome(Evaluation("three", 1.0, (Score(part, "em", "test", value, n=1),)), values)
                job.finished.put(part, outcome)
            outcomes.append(outcome)
        scores = tuple(s for o in outcomes for s in o.evaluation.scores)
        return Outcome(Evaluation("three", 3.0, scores), [i for o in outcomes for i in o.instances])


def test_a_failed_attempt_keeps_its_parts_and_a_changed_checkpoint_has_none(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    path = checkpoint(100)
    submit(path, step=100, config=config_file)
    faults = [OSError(5, "Input/output error"), RuntimeError("no memory")]
    evaluator = Resuming()

    def fail(job: Job, part: str) -> None:
        if part == "b" and faults:
            raise faults.pop(0)

    evaluator.during = fail
    run(evaluator)
    assert evaluator.asked == ["a", "b", "b", "b", "c"]
    other = checkpoint(200, b"two")
    submit(other, step=200, config=config_file)

    def rewrite(job: Job, part: str) -> None:
        if part == "b":
            (other / "model.safetensors").write_bytes(b"2nd")

    evaluator.during = rewrite
    run(evaluator)
    (failed,) = store.collect(tmp_path / "queue").failed
    assert "changed while it was evaluated; nothing is published" in failed.failure.message
    assert len(list((tmp_path / "queue" / "partial").glob("*/*"))) == 1         # that of `a`, from before


def test_two_runners_of_one_name_are_one_clear_error(
    tmp_path: Path, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(StandIn(), name="twin")
    (tmp_path / "queue" / "hb" / "twin").write_text("1")
    monkeypatch.setattr("autoeval_hooks.fsio.unique", lambda: "twin")
    monkeypatch.setattr("eval_runner.registry.build_evaluators", lambda *a: [StandIn()])
    monkeypatch.setattr(sys, "argv", ["autoeval-runner", "run", "--drain", "--config", str(config_file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path}/queue/hb/twin: a runner of the name 'twin' is there already; ")
    assert (tmp_path / "queue" / "hb" / "twin").read_text() == "1"


def test_a_cancelled_ticket_ends_its_evaluation(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    submit(checkpoint(200, b"two"), step=200, config=config_file)
    person, mark = Queue(str(tmp_path / "queue"), runner="person"), uuid.uuid4().hex
    cancelled = []

    class Cancelled(Program):
        def evaluate(self, job: Job) -> Outcome:
            if not cancelled:
                (token,) = person.tokens("claimed")
                assert person.cancel(token, "a newer checkpoint took its place")
                cancelled.append(token.ticket)
            return super().evaluate(job)

    sink, began = Shown(), time.monotonic()
    runner = run(Cancelled(["import time; time.sleep(300)"], mark), sink=sink)
    assert time.monotonic() - began < 200
    assert marked(mark) == []
    assert [r.step for r in sink.results] == [100]
    assert sorted(t.state for t in person.tokens()) == ["cancelled", "done"]
    assert f"ticket {cancelled[0][:12]}: cancelled: a newer checkpoint took its place" in capsys.readouterr().err
    assert (runner.failed, runner.given_back) == (0, set())
    assert len(os.listdir(tmp_path / "queue" / "results")) == 1
    assert store.collect(tmp_path / "queue").failed == ()


def test_a_reaped_ticket_ends_its_evaluation_and_is_no_failure(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    thief = Queue(str(tmp_path / "queue"), runner="thief")

    class Stolen(Program):
        def evaluate(self, job: Job) -> Outcome:
            (token,) = thief.tokens("claimed")
            assert thief.release(token, failed=True) == "pending"
            return super().evaluate(job)

    run(Stolen(["import time; time.sleep(300)"]), mode="once")
    (token,) = thief.tokens()
    assert (token.state, token.failures, token.generation) == ("pending", 1, 1)
    assert "another runner took it over" in capsys.readouterr().err
    assert os.listdir(tmp_path / "queue" / "results") == []


class Full(FileOps):
    """A disk that is full for what is named `what`, for so many writes."""

    def __init__(self, what: str, times: int) -> None:
        self.what, self.left, self.path = what, times, ""

    def create(self, path: str) -> int:
        self.path = path
        return super().create(path)

    def write(self, fd: int, data: bytes) -> int:
        if self.left and self.what in self.path:
            self.left -= 1
            raise OSError(28, "No space left on device", self.path)
        return super().write(fd, data)


def test_a_queue_whose_disk_is_full_gets_its_ticket_back_and_says_so(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("eval_runner.runner.RETRY_S", 0.01)
    submit(checkpoint(100), step=100, config=config_file)
    with Progress() as progress:
        config = configs.load(str(config_file))
        runner = Runner(config, {"quick": [Resuming()]}, {}, progress, ops=Full("result", 99))
        assert runner.run("once")
        (token,) = runner.queue.tokens()
        assert (token.state, token.failures) == ("pending", 1)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert any("No space left on device" in x["message"] and x["level"] == "error" for x in lines)
        assert sum("a finished part could not be kept" in x["message"] for x in lines) == 3
        assert Runner(config, {"quick": [Resuming()]}, {}, progress, ops=Full("result", 2)).run("drain")
    (result,) = done(tmp_path)
    assert len(result.scores) == 3
    assert os.listdir(tmp_path / "queue" / "tmp") == []
