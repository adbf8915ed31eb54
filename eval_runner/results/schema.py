"""What an evaluation leaves behind: scores with their uncertainty, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from autoeval_hooks.run_identity import RunIdentity

VERSION = 1


@dataclass(frozen=True)
class Score:
    """One number. `stderr` is the standard error of `value`, None where it cannot be known.

    `n` counts the instances that `value` was computed from; a score with none does not exist.
    """

    benchmark: str
    metric: str
    split: str
    value: float
    n: int
    stderr: float | None = None
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Instance:
    """One per-instance value of one score, for paired tests: `id` is the same for equal data in any checkpoint.

    The mean over a score's instances is the score. Where the score is a ratio of sums, such as bits per byte, the
    value is what `statistics.ratio_values` says.
    """

    benchmark: str
    metric: str
    split: str
    id: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """What one evaluator of a suite did. `versions` names the programs; `provenance` digests the files it used."""

    evaluator: str
    seconds: float
    scores: tuple[Score, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why there is no score. `kind` is ``transient``, ``checkpoint`` or ``configuration``."""

    kind: str
    message: str
    log: str = ""


@dataclass(frozen=True)
class Result:
    """The record of one attempt at one ticket; `result.json` holds it, and it alone is the truth.

    Times are seconds since the epoch by the runner's clock, for people to read; nothing is decided by them.
    `lag_s` is the time from the save to the end of the evaluation, `tokens` a count (not billions).
    """

    version: int
    ticket: str
    generation: int
    runner: str
    status: Literal["ok", "failed", "refiled"]
    suite: str
    suite_digest: str
    suite_text: str
    """The definition that `suite_digest` is of, unexpanded, in canonical JSON; "" where this runner has another."""
    run: RunIdentity
    checkpoint: str
    checkpoint_digest: str
    step: int
    tokens: int | None
    saved_at: float
    started_at: float
    finished_at: float
    evaluations: tuple[Evaluation, ...] = ()
    failure: Failure | None = None
    refiled_as: str = ""

    @property
    def scores(self) -> tuple[Score, ...]:
        """All scores of all evaluators; empty unless the result is ok."""
        return tuple(s for e in self.evaluations for s in e.scores) if self.status == "ok" else ()

    @property
    def lag_s(self) -> float:
        return self.finished_at - self.saved_at

    @property
    def eval_s(self) -> float:
        return self.finished_at - self.started_at
