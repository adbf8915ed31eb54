"""Curves from our own results: one for each run, suite and definition of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner.recorder.curves import EARLIER, SUMMARY, Curve
from eval_runner.recorder.metrics import CORE_METRICS, averages
from eval_runner.recorder.settings import Benchmark
from eval_runner.results import store
from eval_runner.results.schema import Score
from eval_runner.results.series import Row, definition
from eval_runner.results.series import rows as series_rows

Key = tuple[str, str]


def read(
    queue: Path, where: str, *, model: str = "", run: str = "", suite: str = "",
    benchmarks: Sequence[Benchmark] | None = None, config: dict[str, Any] | None = None,
) -> tuple[list[Curve], list[str]]:  # fmt: skip
    """The curves of a queue's results, and what is missing, a line each.

    `model` is what the model of the curves is called, "" for the run's name. `run` (our id, W&B's id or name) and
    `suite` choose among the results. Without `benchmarks` each score is recorded under its own name
    ``benchmark.metric``, and HELM's core metrics that are there under theirs, such as ``mmlu.EM``.

    An earlier definition of a suite is a curve of its own, `suite@DIGEST`, tagged `EARLIER`. Of a checkpoint that was
    written again, and of several results at one step, the last counts. Raises ConfigError for a run or suite that no
    result is of, and where several runs would be of one `model`; QueueError where there is no queue.
    """
    contents = store.collect(queue)
    table = [row for row in series_rows(contents.results) if not row.superseded]
    table = _chosen(table, where, run, suite)
    curves, missing = [], list(contents.problems)
    groups: dict[Key, list[Row]] = {}
    for row in table:
        groups.setdefault((row.run, row.suite), []).append(row)
    if model and len(runs := sorted({name for name, _ in groups})) > 1:
        raise ConfigError(f"{where}.run: the results are of several runs: {', '.join(runs)}; name one")
    for (name, label), some in sorted(groups.items()):
        last: dict[int, dict[tuple[str, ...], Score]] = {}
        for row in some:
            last.setdefault(row.result.step, {})[row.key] = row.score
        steps = {step: [*scores.values()] for step, scores in last.items()}
        values, lacking = _values(steps, benchmarks)
        missing += [f"{name}, suite {label}: {line}" for line in lacking]
        if values:
            first = some[0].result
            tokens = {row.result.step: row.result.tokens / 1e9 for row in some if row.result.tokens is not None}
            curves.append(Curve(
                model=model or name, name=label, tag=SUMMARY if label == first.suite else EARLIER, rows=values,
                key=f"{first.suite}-{definition(first)[:8]}", tokens=tokens,
                config={**(config or {}), "suite": first.suite, "suite_digest": first.suite_digest,
                        "definition": definition(first)},
            ))  # fmt: skip
    return curves, missing


def _chosen(table: list[Row], where: str, run: str, suite: str) -> list[Row]:
    names = {row.result.run.id: {row.run, row.result.run.id, row.result.run.wandb_id, row.result.run.name} - {""}
             for row in table}  # fmt: skip
    known = {name for some in names.values() for name in some}
    if run and run not in known:
        raise ConfigError(f"{where}.run: no result is of a run called {run!r}{near(run, known)}")
    table = [row for row in table if not run or run in names[row.result.run.id]]
    if suite and suite not in (suites := {row.result.suite for row in table}):
        raise ConfigError(f"{where}.suite: no result is of a suite called {suite!r}{near(suite, suites)}")
    return [row for row in table if not suite or row.result.suite == suite]


def _values(
    steps: dict[int, list[Score]], benchmarks: Sequence[Benchmark] | None
) -> tuple[dict[int, dict[str, float]], list[str]]:
    asked = CORE_METRICS if benchmarks is None else [key for benchmark in benchmarks for key in benchmark.keys]
    out: dict[int, dict[str, float]] = {}
    missing = []
    for key in asked:
        found, lacking = averages(key, steps)
        for step, average in sorted(found.items()):
            out.setdefault(step, {})[key] = average.value
        for step, parts in sorted(lacking.items()):
            missing.append(f"{key} at step {step}: lacks {', '.join(parts)}, so that there is no average")
        if benchmarks is not None and (gaps := sorted(steps.keys() - found.keys() - lacking.keys())):
            missing.append(f"{key}: nothing of step {', '.join(map(str, gaps))}")
    if benchmarks is None:
        for step, scores in sorted(steps.items()):
            for score in scores:
                out.setdefault(step, {}).setdefault(f"{score.benchmark}.{score.metric}", score.value)
    return out, missing
