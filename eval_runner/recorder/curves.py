"""Curves: what is recorded, one W&B run each, and what of it a run lacks.

A curve's values stand on the logged axis ``bench/step`` (`bench/tokens` in billions), each metric under the name that
the older recorder gave it, ``benchmark.METRIC``. W&B's own step is not used: it only grows, so that a late point would
be dropped. Hence the order in which points come does not matter, and a point that is there is not logged again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoeval_hooks.relay_files import AXIS, TOKENS_AXIS

SUMMARY, DETAIL, EARLIER = "summary", "detail", "earlier"
TAGS = ("evalate", "autoeval")
"""The older recorder's tag, which it spelt so, and ours; `SUMMARY`, `DETAIL` or, of an earlier definition of a suite,
`EARLIER` comes beside them: leaderboards read what is tagged `SUMMARY`."""
_REFUSED = re.compile(r"[:;,#?/'\s]+")
_MAX_ID = 128


@dataclass(frozen=True)
class Curve:
    """One W&B run: a model's values of a benchmark, of all benchmarks (`summary`), or of a suite.

    `rows` has values by step and key, `tokens` the billions of tokens at a step where they are known. `name` is shown,
    `key` makes the run's id; `config` is the run's.
    """

    model: str
    name: str
    tag: str
    rows: dict[int, dict[str, float]]
    key: str = ""
    tokens: dict[int, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that any step has, in the order in which they first come."""
        return tuple(dict.fromkeys(key for step in sorted(self.rows) for key in self.rows[step]))

    def run_id(self, project: str) -> str:
        """The id that the older recorder gave the run; what W&B takes in no id becomes ``-``."""
        return identity(project, self.model, self.key or self.name)


def identity(*parts: str) -> str:
    """A run's id: its parts with ``-`` between, and for what W&B takes in no id; a long one is cut, with a digest."""
    own = _REFUSED.sub("-", "-".join(parts))
    if len(own) <= _MAX_ID:
        return own
    return f"{own[: _MAX_ID - 13]}-{hashlib.sha256(own.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Missing:
    """What a run lacks: `rows` to log, in order of steps; `there` counts values that it has, and `changed` says which
    it has otherwise, a line each."""

    rows: tuple[dict[str, float], ...]
    there: int
    changed: tuple[str, ...]

    @property
    def values(self) -> int:
        """How many values are to be logged."""
        return sum(len(row.keys() - {AXIS, TOKENS_AXIS}) for row in self.rows)


def missing(curve: Curve, held: Iterable[Mapping[str, Any]]) -> Missing:
    """What the run that holds the rows `held`, as they were logged, lacks of the curve.

    Of several values that it holds for one key and step, the last counts. Rows without ``bench/step`` are the older
    recorder's, which no chart over that axis shows.
    """
    last: dict[tuple[float, str], float] = {}
    for row in held:
        step = row.get(AXIS)
        if isinstance(step, int | float):
            last |= {(step, key): value for key, value in row.items() if isinstance(value, int | float)}
    rows, there, changed = [], 0, []
    for step in sorted(curve.rows):
        lacking = {}
        for key, value in curve.rows[step].items():
            was = last.get((step, key))
            if was is not None and math.isclose(was, value, rel_tol=1e-12, abs_tol=0.0):
                there += 1
                continue
            if was is not None:
                changed.append(f"{key} at step {step}: was {was!r}, is now {value!r}")
            lacking[key] = value
        if lacking:
            tokens = {TOKENS_AXIS: curve.tokens[step]} if step in curve.tokens else {}
            rows.append({**lacking, AXIS: step, **tokens})
    return Missing(tuple(rows), there, tuple(changed))


def latest(curve: Curve) -> dict[str, float]:
    """Each key's value at its greatest step: what the run's summary is to show, whatever was logged last."""
    out: dict[str, float] = {}
    for step in sorted(curve.rows):
        out |= curve.rows[step]
    return out


def lines(model: str, rows: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Model, step, ``benchmark.METRIC`` and value, with tabs between; by step, and in the order asked for."""
    return [f"{model}\t{step}\t{key}\t{value!r}" for step in sorted(rows) for key, value in rows[step].items()]
