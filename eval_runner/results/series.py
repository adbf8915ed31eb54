"""Scores as series over steps: which results belong to one line, and what it is called.

Nothing is hidden, and nothing that cannot be compared shares a name. A suite's plain name is its definition
that was evaluated last; results of an earlier definition are called ``suite@1a2b3c4d`` after its digest. The files
that an evaluator read belong to the definition: with other questions it is another one. A run's plain name has, at
each step, the checkpoint that was saved last; where training went back and wrote the step again, the scores of the
earlier checkpoint are called ``run@5e6f7a8b`` after that checkpoint's digest.
"Last" is by the clocks of the runner and of the training host: it picks a name, never a result.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval_runner.results.schema import Result, Score

ANCHORS = "judge_anchors"
"""How the name of a benchmark of frozen answers ends. Each judge judges them anew: what moves there is the judge."""


@dataclass(frozen=True)
class Row:
    """One score with the names it goes by. `superseded`: its checkpoint was written again later. `place` sorts a
    benchmark's metrics as its evaluator gives them."""

    run: str
    suite: str
    result: Result
    score: Score
    superseded: bool
    place: int
    key: tuple[str, str, str, str]
    """What a series has in common beside its run: suite, benchmark, metric, split."""


def rows(results: Iterable[Result]) -> list[Row]:
    """All scores of the ok results, sorted by run, suite, benchmark, metric and split, which stand as in the last
    result, and step."""
    ok = sorted((r for r in results if r.status == "ok"), key=lambda r: (r.finished_at, r.generation, r.ticket))
    runs = run_names(ok)
    last_definition = {r.suite: definition(r) for r in ok}
    last_checkpoint = {
        (r.run.id, definition(r), r.step): r.checkpoint_digest for r in sorted(ok, key=lambda r: r.saved_at)
    }
    out: list[Row] = []
    places: dict[tuple[str, str, str, str], int] = {}
    for r in reversed(ok):
        superseded = last_checkpoint[r.run.id, definition(r), r.step] != r.checkpoint_digest
        run = runs[r.run.id] + (f"@{r.checkpoint_digest[:8]}" if superseded else "")
        suite = r.suite + (f"@{definition(r)[:8]}" if last_definition[r.suite] != definition(r) else "")
        for s in r.scores:
            key = suite, s.benchmark, s.metric, s.split
            out.append(Row(run, suite, r, s, superseded, places.setdefault(key, len(places)), key))
    out.reverse()
    return sorted(out, key=lambda row: (row.run, *row.key[:2], row.place, row.result.step))


def definition(result: Result) -> str:
    """The digest of what was evaluated: the suite's definition and, where evaluators read files, their content."""
    files = sorted(digest for e in result.evaluations for digest in e.provenance.values())
    if not files:
        return result.suite_digest
    return hashlib.sha256(" ".join([result.suite_digest, *files]).encode()).hexdigest()


def judge(row: Row) -> str:
    """The model that judged the answers behind a score, as it reported itself; "" where none did."""
    return next((e.versions.get("judge", "") for e in row.result.evaluations if row.score in e.scores), "")


def judge_changes(table: Sequence[Row]) -> dict[tuple[str, tuple[str, str, str, str], int], str]:
    """Where a series has another judge than at the checkpoint before: ``A → B`` by run, key and step.

    `table` is sorted as `rows` does. Scores by two judges are no line: what moved may be the judge.
    """
    changes = {}
    for old, new in itertools.pairwise(row for row in table if not row.superseded):
        if (old.run, old.key) == (new.run, new.key) and judge(old) != judge(new):
            changes[new.run, new.key, new.result.step] = change(old, new)
    return changes


def comparable(old: Row, new: Row) -> bool:
    """Whether what lies between two scores of a series may be told of the checkpoints, or, of anchors, of the judge."""
    return judge(old) == judge(new) or new.score.benchmark.endswith(f".{ANCHORS}")


def change(old: Row, new: Row) -> str:
    """``A → B`` for the judges of two scores."""
    return f"{judge(old) or 'none'} → {judge(new) or 'none'}"


def run_names(results: Sequence[Result]) -> dict[str, str]:
    """A run's name for people by its id; with the id where two runs share the name."""
    names = {r.run.id: r.run.name or r.run.id for r in results}
    count = Counter(names.values())
    return {run: name if count[name] == 1 else f"{name} ({run})" for run, name in names.items()}
