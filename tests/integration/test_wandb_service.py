"""A W&B service that is away, hangs or refuses costs evaluation nothing: a real runner, sink and wandb client.

The evaluator and the service are stand-ins.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from autoeval_hooks import manifest, ticket
from autoeval_hooks import relay_files as files
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import config as configs
from eval_runner import status
from eval_runner.evaluators.base import Job
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.runner import Runner
from eval_runner.sinks import wandb as sinks
from eval_runner.sinks import wandb_children
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink
from tests.stand_ins import StandIn
from tests.wandb_runs import IDENTITY, ROOT, Backend, backend, environment, rows, train
from tests.wandb_trainer import wait_for

pytestmark = pytest.mark.slow      # minutes, most of them waiting: `make test-wandb`

TICKETS = 12
CONFIG = """queue: q
runner: {lease: 6.0}
suites: {s: {evaluators: [{type: helm, entries: [a]}]}}
sinks: [{type: wandb}]
"""


@pytest.fixture
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


@dataclass
class Waiting:
    """The queue of a training that has ended in W&B run r1: `TICKETS` checkpoints wait."""

    config: configs.Config
    run: RunIdentity
    at: list[float] = field(default_factory=list)
    """When each evaluation ended."""

    def drain(self, over: Callable[[], object] = lambda: False) -> bool:
        """Evaluate all, and wait until all is shown, or `over`; whether all is shown."""
        context = Context(self.config.queue, "r1", "sinks[0]", stopping=(stopped := threading.Event()).is_set)

        def work(job: Job) -> None:
            time.sleep(0.05)
            self.at.append(time.monotonic())

        def watch() -> None:
            while not stopped.wait(0.05):
                if len(self.at) == TICKETS and over():
                    stopped.set()

        thread = threading.Thread(target=watch)
        thread.start()
        with Progress() as progress:
            runner = Runner(self.config, {"s": [StandIn(during=work)]}, {"0-wandb": WandbSink({}, context)}, progress,
                            name="r1", stopped=stopped)  # fmt: skip
            settled = runner.run("drain")
        thread.join()
        return settled

    @property
    def why(self) -> str:
        """What `status` says of the points that wait, once it was tried to log them."""
        why = status.read(self.config.queue).points_why.get(self.run.key, "")
        return "" if "watching" in why else why


@pytest.fixture
def make_waiting(
    tmp_path: Path, service: Backend, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Waiting]:
    for key, value in environment(tmp_path / "runner", "online", service.url).items():
        monkeypatch.setenv(key, value)
    for key, value in {"STALE_S": 0.5, "ENDED_STALE_S": 0.3}.items():
        monkeypatch.setattr(files, key, value)
    monkeypatch.setattr(sinks, "PAUSE_S", 0.05)
    monkeypatch.setattr("eval_runner.publisher.PERIOD_S", 0.05)

    def make() -> Waiting:
        (tmp_path / "autoeval.yaml").write_text(CONFIG)
        config = configs.load(str(tmp_path / "autoeval.yaml"))
        queue, run = Queue(str(config.queue)), replace(IDENTITY, wandb_base_url=service.url)
        queue.create()
        train(environment(tmp_path / "t", "online", service.url), config.queue, 3, planned=3, leave="finish")
        for step in range(1, TICKETS + 1):
            path = checkpoint(step, f"weights of {step}".encode())
            made = manifest.build(str(path), path=str(path), step=step, run=run)
            queue.enqueue(ticket.new(made, "s", config.suites["s"].digest, 5))
        return Waiting(config, run)

    return make


def shown(service: Backend) -> list[int]:
    return sorted(row["bench/step"] for row in rows(service) if "bench/step" in row)


FAULTS: dict[str, tuple[Callable[[Backend], None], Callable[[Backend], None]]] = {
    "away": (Backend.go_away, Backend.come_back),
    "hangs": (lambda b: b.hang.clear(), lambda b: b.hang.set()),
    **{
        f"says {status}": (lambda b, s=status: setattr(b, "refuses", s), lambda b: setattr(b, "refuses", 0))  # type: ignore[misc]
        for status in (500, 429, 401, 403)
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_evaluation_goes_on_and_points_wait_until_the_service_is_back(
    service: Backend, make_waiting: Callable[[], Waiting], fault: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    waiting = make_waiting()
    breaks, mends = FAULTS[fault]
    monkeypatch.setattr(wandb_children, "WRITER_TIMEOUT_S", 8.0)
    breaks(service)
    began = time.monotonic()
    assert not waiting.drain(over=lambda: waiting.why)
    took = max(waiting.at) - began
    assert len(waiting.at) == TICKETS
    assert took < 15, took  # one evaluation alone takes 0.05 s; that the service is away is not noticed
    results, problems = store.done(waiting.config.queue)
    assert (len(results), problems) == (TICKETS, [])
    assert {r.generation for r in results} == {0}  # no lease was lost
    assert "lease" not in caplog.text
    assert "heartbeat" not in caplog.text
    assert list(status.read(waiting.config.queue).points_waiting.values()) == [TICKETS]
    print(f"{fault}: {TICKETS} evaluated in {took:.2f} s; told after {time.monotonic() - began:.1f} s: {waiting.why}")

    mends(service)
    monkeypatch.setattr(wandb_children, "WRITER_TIMEOUT_S", 120.0)
    assert waiting.drain()
    assert shown(service) == list(range(1, TICKETS + 1))
    assert status.read(waiting.config.queue).points_waiting == {}


def test_a_runner_that_is_told_to_stop_while_the_service_hangs_ends_at_once(
    tmp_path: Path, service: Backend, make_waiting: Callable[[], Waiting]
) -> None:
    waiting = make_waiting()
    service.hang.clear()
    asked = service.asked
    runner = subprocess.Popen([sys.executable, "-c", SCRIPT, str(waiting.config.path)],
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        wait_for(lambda: len(store.done(waiting.config.queue)[0]) == TICKETS, 60)
        wait_for(lambda: service.asked > asked, 60)     # a child of the sink waits for an answer
        began = time.monotonic()
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(60) == 0
        took = time.monotonic() - began
    finally:
        runner.kill()
        runner.wait()
    print(f"ended after {took:.2f} s")
    assert took < 15
    assert sinks_children() == []
    relay = waiting.config.queue / "relay" / waiting.run.key
    assert len(files.waiting(str(relay))) == TICKETS
    assert set(os.listdir(relay / "writer") if (relay / "writer").exists() else ["free"]) == {"free"}


SCRIPT = """
import sys, threading
from autoeval_hooks import relay_files as files
files.ENDED_STALE_S = 0.3
from eval_runner import config
from eval_runner.progress import Progress
from eval_runner.runner import Runner, stopped_by_signals
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink
from tests.stand_ins import StandIn

loaded, stopped = config.load(sys.argv[1]), threading.Event()
sink = WandbSink({}, Context(loaded.queue, "r1", "sinks[0]", stopping=stopped.is_set))
with Progress() as progress:
    runner = Runner(loaded, {"s": [StandIn()]}, {"0-wandb": sink}, progress, name="r1", stopped=stopped)
    with stopped_by_signals(runner):
        runner.run("forever")
"""


def sinks_children() -> list[str]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "sinks.wandb_" in line and "request.json" in line]
