"""Stand-ins for an evaluator and a sink, for tests of what stands between them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autoeval_hooks.errors import AutoEvalError
from eval_runner import process
from eval_runner.evaluators.base import Job, Outcome
from eval_runner.results.schema import Evaluation, Instance, Result, Score
from eval_runner.sinks.base import Standing
from tests.processes import MARK


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

    def compare(self, results: Sequence[Result], *, repair: bool) -> list[Standing]:
        return []


@dataclass
class Program:
    """An evaluator whose work is a real child process, as that of all real ones is: Python, given the model's weights
    by path. It scores what stands in the file ``result.json`` that the child leaves. Each of `codes` is run once, and
    then `GOOD`."""

    codes: list[str] = field(default_factory=list)
    mark: str = ""

    def check(self) -> None: ...

    def evaluate(self, job: Job) -> Outcome:
        argv = [sys.executable, "-c", self.codes.pop(0) if self.codes else GOOD, str(job.path / "model.safetensors")]
        status = job.run(argv, env=os.environ | {MARK: self.mark})
        if status != 0:
            raise AutoEvalError(f"the program failed: {process.reason(status)}; log: {job.log}")
        try:
            value = float(json.loads((job.work_dir / "result.json").read_text())["value"])
        except (OSError, ValueError, KeyError) as error:
            raise AutoEvalError(f"the program left no readable result ({error}); log: {job.log}") from error
        score = Score("length", "bytes", "test", value, n=1)
        return Outcome(Evaluation("program", 0.1, (score,)), [Instance("length", "bytes", "test", "0", value)])


GOOD = "import os, sys, json; json.dump({'value': os.path.getsize(sys.argv[1])}, open('result.json', 'w'))"
"""What a `Program` does that works."""
