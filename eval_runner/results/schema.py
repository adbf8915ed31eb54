"""What an evaluation leaves behind: scores with their uncertainty, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from autoeval_hooks.run_identity import RunIdentity

VERSION = 1


@dataclass(frozen=True)
class Score:
    """One number. `stderr` is the standard error of `value`, None where it cannot be known.

    `n` counts the instances that `value` was computed from; a score with none does not exist. `low` and `high` are
    the 95 % interval where the evaluator knows a better one than `statistics.interval` makes of the standard error;
    either both are given or none.
    """

    benchmark: str
    metric: str
    split: str
    value: float
    n: int
    stderr: float | None = None
    higher_is_better: bool | None = None
    low: float | None = None
    high: float | None = None


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
class Detail:
    """What lies behind the instances of one question, for people to read: `texts` are pairs of heading and text, such
    as the question, the answer and the reviews. `id` is the instances'; `outcome` says in a word what came out."""

    benchmark: str
    id: str
    category: str
    outcome: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluator of a suite did. `versions` names the programs; `provenance` digests the files it used.

    `usage` counts what was asked of a service that is paid for: `requests`, `cached` (answered by an earlier
    evaluation's), `input_tokens`, `output_tokens`, and `cost_usd` where the price is known; empty without such a one.
    """

    evaluator: str
    seconds: float
    scores: tuple[Score, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)


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
    Of what was imported from another program only the time is known when its scores were written: all three times
    are that one, and the result is not `timed`.
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
    def timed(self) -> bool:
        """Whether `lag_s` and `eval_s` are known."""
        return not self.saved_at == self.started_at == self.finished_at

    @property
    def lag_s(self) -> float:
        return self.finished_at - self.saved_at

    @property
    def eval_s(self) -> float:
        return self.finished_at - self.started_at
