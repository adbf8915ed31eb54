"""Stand-ins for an evaluator and a sink, for tests of what stands between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from eval_runner.evaluators.base import Job, Outcome
from eval_runner.results.schema import Evaluation, Instance, Result, Score


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
