"""Who is out in the storm: what each of its processes does, with the product's own code, until it is killed.

A host is a mount of the export with a name and a clock of its own; `World.truth` is the export's directory on the
server's disk, which no client's cache stands before. What a process saw is appended to its log, a line in one write
on memory that outlives it: who is killed may have done what the log does not tell, and never the reverse.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoeval_hooks import config as hook_configs
from autoeval_hooks import fsio, manifest, ticket
from autoeval_hooks.errors import AutoEvalError, CheckpointError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.handover import Handover, Save
from autoeval_hooks.keeper import boottime
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from eval_runner import config as configs
from eval_runner import runner as runners
from eval_runner.evaluators.base import Job, Outcome
from eval_runner.process import Stopped
from eval_runner.progress import Progress
from eval_runner.results.schema import Evaluation, Result, Score
from eval_runner.runner import Runner, stopped_by_signals
from eval_runner.sinks.base import Context, point
from eval_runner.sinks.wandb import WandbSink

PINNED = 4
"""Every so many-th step is a checkpoint of its own, handed over with a pin; the rest are tickets for one checkpoint."""
CROWD = 40
"""Submitters pause while more tickets are pending: the storm is to end soon after the wind."""
SKEW_S = {"a": 0.0, "b": 120.0}
"""How far each host's wall clock is ahead."""


@dataclass(frozen=True)
class World:
    mounts: dict[str, Path]
    """Host → the storm's directory as this host sees it."""
    truth: Path
    logs: Path
    lease: float

    def config(self, host: str) -> Path:
        return self.mounts[host] / f"autoeval-{host}.yaml"

    def calm(self) -> bool:
        """Whether the storm is over: no new tickets, no faults."""
        return (self.logs / "calm").exists()

    def pending(self) -> int:
        return len(os.listdir(self.truth / "queue" / "pending"))

    def claim_stands(self, result_name: str) -> bool:
        """Whether the claim of this attempt stands, asked of the disk."""
        tokens = Queue(str(self.truth / "queue")).tokens("claimed")
        return any(token.result_name == result_name for token in tokens)

    def on_disk(self, path: Path, host: str) -> Path:
        return self.truth / path.relative_to(self.mounts[host])


@dataclass(frozen=True)
class Seen:
    """A line of a log. `at` is in seconds since the guest booted, on a clock that all of its hosts share."""

    at: float
    by: str
    what: str
    words: tuple[str, ...]


class Log:
    """Appends to the log of one process."""

    def __init__(self, world: World, name: str) -> None:
        self._fd = os.open(world.logs / f"{name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def __call__(self, *words: object) -> None:
        line = "\t".join(str(w).replace("\n", " | ") for w in (f"{boottime():.3f}", *words))
        os.write(self._fd, f"{line}\n".encode())


def seen(world: World, name: str = "*") -> Iterator[Seen]:
    """What the processes of these names logged, all incarnations."""
    for path in sorted(world.logs.glob(f"{name}.log")):
        for line in path.read_text().splitlines():
            at, what, *words = line.split("\t")
            yield Seen(float(at), path.stem, what, tuple(words))


def become(host: str) -> None:
    """Make this process one of a host: its name, its wall clock."""
    real, real_ns, skew = time.time, time.time_ns, SKEW_S[host]
    time.time = lambda: real() + skew
    time.time_ns = lambda: real_ns() + int(skew * 1e9)
    socket.gethostname = lambda: f"host-{host}"


UNANSWERED = {"rename": FileNotFoundError, "link": FileExistsError}
"""What a client makes of an operation that was done and whose answer was lost."""


class Doomed(FileOps):
    """The file system's calls. One in `one_in` is this process's last: it is killed before or after it, where a kill
    from outside rarely comes. Of renames and links, ten times as many are done and their answer is lost, as a file
    server may lose it; asked again, the server says that there is nothing to rename, or that the link is there. The
    loss is made up here: it is too rare to wait for."""

    def __init__(self, world: World, life: str, log: Log, rng: random.Random, one_in: int) -> None:
        self._parts = world, life, log, rng, one_in

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_"):
            return found
        world, life, log, rng, one_in = self._parts

        def die(when: str) -> None:
            if rng.random() * one_in < 0.5 and not world.calm():
                (world.logs / f"{life}.hurt").touch()
                log("dies", when, name)
                os.kill(os.getpid(), signal.SIGKILL)

        def call(*args: Any, **named: Any) -> Any:
            die("before")
            answer = found(*args, **named)
            die("after")
            if name in UNANSWERED and rng.random() * one_in < 10 and not world.calm():
                log("unanswered", name, *args)
                raise UNANSWERED[name](f"{args}")
            return answer

        return call


# ---------------------------------------------------------------------- submitting


@dataclass
class Submitter:
    """The trainer of a run, or its twin: one who submits the same tickets at the same time from the other host."""

    world: World
    host: str
    run: str
    name: str
    twin: bool
    life: str
    log: Log
    rng: random.Random

    def __call__(self) -> None:
        self.settings = hook_configs.load(self.world.config(self.host))
        self.suite = self.settings.suites["quick"]
        self.queue = Queue(self.settings.queue, ops=Doomed(self.world, self.life, self.log, self.rng, 400))
        self.out = self.world.mounts[self.host] / "out" / self.run
        base = self.world.mounts[self.host] / "out" / "base" / "checkpoint-0"
        self.base = manifest.build(str(base), path=str(base), step=0, run=RunIdentity("base"))
        self.begun = self.world.logs / f"{self.run}.step"
        step = 1 + sum(1 for s in seen(self.world, self.name) if s.what in ("ack", "gone"))
        while not self.world.calm():
            if self.world.pending() > CROWD or (self.twin and int(self.begun.read_text() or 0) < step):
                time.sleep(0.02)
                continue
            if not self.twin:
                self.begun.write_text(str(step))
            self._again(step)
            step += 1

    def _again(self, step: int) -> None:
        """One ticket; as the hook does, again and again while the file system fails."""
        while True:
            try:
                found, new = self._pinned(step) if step % PINNED == 0 else self._plain(step)
            except CheckpointError as error:     # the twin came too late: retention was faster
                self.log("gone", step, error)
            except OSError as error:
                self.log("again", step, error)
                time.sleep(0.1)
                continue
            else:
                self.log("ack", found, "new" if new else "known")
            return

    def _identity(self, step: int) -> RunIdentity:
        name = f"{self.run}-{step // 200}"
        return RunIdentity(name, name, project="storm", wandb_id=name, wandb_mode="offline")

    def _plain(self, step: int) -> tuple[str, bool]:
        draft = replace(self.base, run=self._identity(step), step=step, saved_at=time.time())
        made: Ticket = ticket.new(
            replace(draft, digest=manifest.digest_of(draft)), "quick", self.suite.digest, self.rng.choice((5, 5, 5, 9))
        )
        return made.id, self.queue.enqueue(made)

    def _pinned(self, step: int) -> tuple[str, bool]:
        path = self.out / f"checkpoint-{step}"
        if not self.twin:
            save(path, step)
        elif path.name not in os.listdir(self.out):
            raise CheckpointError(f"{path}: not there")
        what = Save(str(path), step, self._identity(step), time.time())
        found = manifest.build(str(path), path=str(path), step=step, run=what.run)
        handover = Handover(self.settings, self.queue, what, ("quick",))
        while "quick" not in handover.tickets:
            try:
                handover.run()
            except OSError as error:
                self.log("again", step, error)
                time.sleep(0.1)
        if not self.twin:        # save_total_limit: 1. Gone at once, or the twin hands over what is left of it.
            gone = self.out / f"deleting-{fsio.unique()}"
            with contextlib.suppress(OSError):
                (self.out / f"checkpoint-{step - PINNED}").rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        return ticket.ticket_id(found.digest, self.suite.digest), handover.tickets["quick"]


def save(path: Path, step: int) -> None:
    """A checkpoint, whole or not at all; one that is there stays. Its weights count as large (see `storm.main`)."""
    if path.name in os.listdir(path.parent):
        return
    passing = path.parent / f"saving-{fsio.unique()}"
    passing.mkdir()
    (passing / "model.safetensors").write_bytes(random.Random(f"{path}").randbytes(8192))
    (passing / "config.json").write_text('{"model_type": "llama"}')
    (passing / "tokenizer.json").write_text(f'{{"step": {step}}}')
    fsio.moved(fsio.FileOps(), str(passing), str(path))


# ---------------------------------------------------------------------- evaluating


@dataclass
class StandIn:
    """Stands in for an evaluator: sleeps a little and draws a score, which no other attempt has. Half of the time it
    does not hear that it should stop, as between two looks of a real one; sometimes it fails."""

    world: World
    host: str
    log: Log
    rng: random.Random

    def check(self) -> None: ...

    def evaluate(self, job: Job) -> Outcome:
        try:
            return self._evaluate(job)
        except AutoEvalError:
            raise
        except BaseException:
            self.log("crash", traceback.format_exc())
            raise

    def _evaluate(self, job: Job) -> Outcome:
        attempt = job.log.name.split(".0-")[0]
        self.log("evaluates", attempt)
        deaf = self.rng.random() < 0.5
        end = time.monotonic() + (self.rng.uniform(0.5, 3.0) if self.rng.random() < 0.1 else self.rng.uniform(0, 0.03))
        while time.monotonic() < end:
            if not deaf and job.stopping():
                raise Stopped("told to")
            time.sleep(0.02)
        if not self.world.calm() and self.rng.random() < 0.03:
            raise AutoEvalError("the stand-in hiccuped") if self.rng.random() < 0.7 else CheckpointError("so it says")
        self._look(job, attempt)
        score = Score("luck", "drawn", "test", self.rng.random(), n=1)
        return Outcome(Evaluation("stand-in", 0.1, (score,)))

    def _look(self, job: Job, attempt: str) -> None:
        """Whether the pin stayed while the claim did, and whether who lost the claim was told, in this order."""
        pin = self.world.on_disk(job.path, self.host)
        whole = len(list(pin.glob("*.*"))) == 3
        if self.world.claim_stands(attempt):
            if not whole:
                self.log("freed", attempt)
        elif not job.stopping():
            self.log("untold", attempt.partition("~")[0], attempt)


class Witness(WandbSink):
    """The W&B sink, which leaves points in relay/ for a training process that never comes; each call is logged."""

    def __init__(self, context: Context, log: Log) -> None:
        super().__init__({}, context)
        self._log = log

    def publish(self, result: Result) -> None:
        self._log("publish", result.ticket, content(result))
        super().publish(result)

    def flush(self) -> bool:
        return True


def content(result: Result) -> str:
    """A digest of what is shown of a result."""
    return hashlib.sha256(json.dumps(asdict(point(result)), sort_keys=True).encode()).hexdigest()


def evaluate_all(world: World, host: str, name: str, log: Log, rng: random.Random) -> None:
    """A runner's life; `name` is used once."""
    runners.RETRY_S = 0.2
    config = configs.load(str(world.config(host)))
    doomed = Doomed(world, name, log, rng, 2000)
    context = Context(queue=config.queue, runner=name, where="storm", path_map=config.path_map, ops=doomed)
    sink = Witness(context, log)
    with open(world.logs / f"{name}.stderr", "a") as errors:
        os.dup2(errors.fileno(), 2)
    with Progress() as progress:
        parts: dict[str, Any] = {"quick": [StandIn(world, host, log, rng)]}
        runner = Runner(config, parts, {"witness": sink}, progress, name=name, ops=doomed)
        complete, sweep = runner.queue.complete, runner._keeper.sweep

        def witnessed(token: Any) -> bool:
            committed = complete(token)
            log("complete", token.ticket, token.generation, token.runner, committed)
            return committed

        def swept() -> list[tuple[Any, str]]:
            reaped = sweep()
            for token, became in reaped:
                log("reaped", token.ticket, token.generation, token.runner, became)
            return reaped

        runner.queue.complete, runner._keeper.sweep = witnessed, swept  # type: ignore[method-assign]
        with stopped_by_signals(runner):
            runner.run("forever")


# ---------------------------------------------------------------------- meddling


def meddle(world: World, host: str, log: Log, rng: random.Random) -> None:
    """A user who cancels and retries; once it is calm, one who retries what failed."""
    queue = Queue(str(world.mounts[host] / "queue"), runner=f"user-{fsio.unique()}")
    while True:
        time.sleep(rng.uniform(0.1, 0.5))
        try:
            calm = world.calm()
            waiting = list(queue.tokens("pending", "claimed"))
            if waiting and not calm and rng.random() < 0.4:
                token = rng.choice(waiting)
                log("cancels", token.ticket)
                log("cancelled", token.ticket, queue.cancel(token, "the user changed their mind"))
            ended = [t for t in queue.tokens("failed", "cancelled") if t.state == "failed" or not calm]
            if ended and (calm or rng.random() < 0.5):
                token = rng.choice(ended)
                log("retried", token.ticket, queue.retry(token))
        except OSError as error:
            log("again", error)
