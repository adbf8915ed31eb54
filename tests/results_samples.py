"""Results made up for tests of what is done with results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Detail, Evaluation, Failure, Instance, Result, Score

T0 = 1_800_000_000.0


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def result(
    step: int, *scores: Score, run: str = "demo", run_id: str = "", suite: str = "quick", suite_digest: str = "",
    checkpoint_digest: str = "", finished: float = 0.0, tokens: int | None = None, failure: Failure | None = None,
    generation: int = 0, runner: str = "eval-1",
) -> Result:  # fmt: skip
    """An ok result, or a failed one where `failure` is given. It finishes 60 s after it was saved, unless told."""
    run_id = run_id or f"id-{run}"
    suite_digest = suite_digest or digest(suite)
    checkpoint_digest = checkpoint_digest or digest(run_id, step)
    return Result(
        version=VERSION, ticket=digest(checkpoint_digest, suite_digest), generation=generation, runner=runner,
        status="failed" if failure else "ok", suite=suite, suite_digest=suite_digest, suite_text="{}",
        run=RunIdentity(id=run_id, name=run), checkpoint=f"/data/{run_id}/checkpoint-{step}",
        checkpoint_digest=checkpoint_digest, step=step, tokens=tokens, saved_at=T0 + step,
        started_at=T0 + step + 20, finished_at=finished or T0 + step + 60,
        evaluations=(Evaluation("helm", 30.0, scores),) if scores else (), failure=failure,
    )  # fmt: skip


def score(
    value: float, stderr: float | None = None, *, n: int = 100, benchmark: str = "mcqa", metric: str = "exact_match",
    split: str = "test", higher: bool | None = True,
) -> Score:  # fmt: skip
    return Score(benchmark, metric, split, value, n, stderr, higher)


def instances_of(s: Score, values: Iterable[float]) -> list[Instance]:
    return [Instance(s.benchmark, s.metric, s.split, f"id{i}", v) for i, v in enumerate(values)]


def queue(root: Path) -> Path:
    Queue(str(root)).create()
    return root


def publish(
    root: Path, r: Result, instances: Iterable[Instance] = (), *, details: Iterable[Detail] = (), state: str = "done",
    record: bool = True,
) -> Token:  # fmt: skip
    """Put a result and its token where a runner would."""
    token = Token(state, f"5-{int(r.finished_at)}", r.ticket, r.generation, 0, r.runner)
    if record:
        store.write(root, token.result_name, r, instances, details=details)
    (root / state / token.name).touch()
    return token
