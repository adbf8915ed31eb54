"""HELM's tables: `runs/<suite>/groups/<benchmark>.json`, which `helm-summarize` writes.

A file is a list of tables ``{"title", "header": [{"value"}], "rows": [[{"value"}]]}``, the same since HELM 0.2; since
0.4 its header cells carry `metadata` too. A row is a model, its name in the first cell; a cell without a value is one
that HELM had nothing for. Of a benchmark that was run on several data (subjects), the first table is the average over
all, and one table for each follows (`create_group_tables_by_subgroup` in HELM's `presentation/summarize.py`). A metric
that the first table lacks has no average, whatever the others have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import ConfigError

Column = list[tuple[str, float | None]]
"""The models of a table in its order, each with its value, None where there is none."""


@dataclass
class Values:
    """What there is of one metric of a benchmark: over all of its data, and of each part by the part's title."""

    whole: Column = field(default_factory=list)
    parts: dict[str, Column] = field(default_factory=dict)


def read(file: Path, metrics: Sequence[str]) -> tuple[dict[str, Values], list[str]]:
    """The values of those of `metrics` that the first table has, and its headings. Raises ConfigError for a
    file that holds no tables."""
    try:
        tables = json.loads(file.read_bytes())
        titled = [(str(t["title"]), [_heading(cell) for cell in t["header"]], t["header"], t["rows"]) for t in tables]
        found: dict[str, Values] = {}
        for metric in metrics:
            for title, headings, header, rows in titled:
                if (at := _place(metric, headings, header)) is None:
                    continue
                column = [(str(row[0]["value"]), _number(row[at])) for row in rows]
                if header is titled[0][2]:
                    found[metric] = Values(column)
                if metric in found and title and (len(tables) == 1 or header is not titled[0][2]):
                    found[metric].parts.setdefault(title, column)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"holds no tables of HELM's ({type(error).__name__}: {error})"
        raise ConfigError(f"{file}: {what}; make it anew with helm-summarize") from error
    return found, titled[0][1][1:] if titled else []


def _place(metric: str, headings: list[str], header: list[dict[str, Any]]) -> int | None:
    """Which column has the metric: the one headed so; else, where a table shows several benchmarks ("MMLU - EM"), the
    only one whose metric it is, and not of perturbed data."""
    if metric in headings:
        return len(headings) - 1 - headings[::-1].index(metric)      # the older recorder took the last
    named = [i for i, cell in enumerate(header) if _is(metric, headings[i], cell.get("metadata") or {})]
    return named[0] if len(named) == 1 else None


def _is(metric: str, heading: str, metadata: dict[str, Any]) -> bool:
    if metadata:
        return metadata.get("metric") == metric and "perturbation" not in metadata
    return heading.endswith(f" - {metric}")


def _heading(cell: dict[str, Any]) -> str:
    return str(cell.get("value") or "")


def _number(cell: dict[str, Any]) -> float | None:
    """A value that is no number, or not finite, is none."""
    value = cell.get("value")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
