"""What lm_eval kept of every document: the `samples_TASK_DATE.jsonl` beside a results file.

A row holds one document under one filter: `doc`, `doc_hash` (from 0.4.3 on), `filter` (from 0.4.7 on), `resps`, and
every metric's raw value under its name. Versions before 0.4.3 wrote one JSON array a task, in a file with the model's
arguments in its name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError
from eval_runner.results.statistics import mean_stderr, ratio_values

Row = dict[str, Any]

PREFIX = "samples_"
_ID = 16
"""Hexadecimal digits of a document's hash in its id."""


def load(results: Path, task: str) -> list[Row]:
    """The rows of a task that belong to a results file, in their order; empty where no samples were kept.

    Raises AutoEvalError for a file that is no samples file.
    """
    path = _file(results, task)
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
        if not all(isinstance(row, dict) and "doc_id" in row for row in rows):
            raise ValueError("a row without doc_id")
    except (OSError, ValueError) as error:
        raise AutoEvalError(f"{path}: no readable samples of lm_eval ({error})") from error
    return list(rows)


def by_filter(rows: Sequence[Row], filters: Sequence[str]) -> dict[str, dict[str, Row]]:
    """For each filter, the rows by the id of their document: its hash, and a number where documents are repeated.

    Where rows do not name their filter, the k-th row of a document is of the k-th of `filters`: lm_eval goes through
    the documents once for each. The order of `doc_id` tells repeated documents apart.
    """
    seen: Counter[Any] = Counter()
    sorted_out: dict[str, list[Row]] = {name: [] for name in filters}
    for row in rows:
        turn = seen[row["doc_id"]]
        seen[row["doc_id"]] += 1
        name = row.get("filter") or (filters[turn] if turn < len(filters) else "")
        sorted_out.setdefault(name, []).append(row)
    found: dict[str, dict[str, Row]] = {}
    for name, own in sorted_out.items():
        repeats: Counter[str] = Counter()
        found[name] = {}
        for row in sorted(own, key=lambda row: int(row["doc_id"])):
            key = _hash(row)[:_ID]
            repeats[key] += 1
            found[name][key if repeats[key] == 1 else f"{key}.{repeats[key]}"] = row
    return found


def instances(rows: dict[str, Row], metric: str, value: float) -> tuple[dict[str, float], float | None]:
    """Values of the documents whose mean is the score `value`, and their standard error; nothing where there are none.

    A mean is taken as it is. bits_per_byte and the perplexities are functions of a ratio of sums, so that their
    instances are `statistics.ratio_values`; for a perplexity exp(R), what a document adds to it to first order.
    What no such rule reproduces (an F1 or BLEU over all documents) has no instances.
    """
    raw = {key: row[metric] for key, row in rows.items() if row.get(metric) is not None}
    for values in _candidates(list(raw.values())):
        if math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-6, abs_tol=1e-9):
            return dict(zip(raw, values, strict=True)), mean_stderr(values)[1]
    return {}, None


def broken(rows: Iterable[Row]) -> bool:
    """Whether a log-likelihood is not a number. lm_eval makes an accuracy of such ones without a word."""
    return any(_has_nan(row.get("resps")) for row in rows)


def _candidates(raw: list[Any]) -> Iterable[list[float]]:
    """The ways in which lm_eval makes a score of values (its `api/metrics.py`), as values whose mean is the score."""
    if not raw:
        return
    if all(isinstance(v, bool | int | float) for v in raw):
        numbers = [float(v) for v in raw]
        yield numbers
        yield from _exponential([-v for v in numbers])                          # perplexity
    elif all(isinstance(v, list) and len(v) == 2 and all(isinstance(x, int | float) for x in v) for v in raw):
        nats, sizes = [-float(v[0]) for v in raw], [float(v[1]) for v in raw]
        if math.fsum(sizes) > 0:
            yield ratio_values([n / math.log(2) for n in nats], sizes)          # bits_per_byte
            yield from _exponential(ratio_values(nats, sizes))                  # word_perplexity, byte_perplexity


def _exponential(values: list[float]) -> Iterable[list[float]]:
    """exp of the mean, to first order in each value: their mean is that exactly."""
    mean = math.fsum(values) / len(values)
    if mean < 700:      # beyond, there is no such float
        yield [math.exp(mean) * (1 + v - mean) for v in values]


def _has_nan(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return value == "nan" or (isinstance(value, float) and math.isnan(value))       # lm_eval writes text


def _hash(row: Row) -> str:
    given = row.get("doc_hash")
    if isinstance(given, str) and given:
        return given
    return hashlib.sha256(json.dumps(row.get("doc"), sort_keys=True).encode()).hexdigest()


def _file(results: Path, task: str) -> Path | None:
    date = results.stem.removeprefix("results").removeprefix("_")
    if date:
        path = results.with_name(f"{PREFIX}{task}_{date}.jsonl")
        return path if path.is_file() else None
    old = sorted(results.parent.glob("*.jsonl"))
    return next((p for p in old if p.stem == task or p.stem.endswith(f"_{task}")), None)
