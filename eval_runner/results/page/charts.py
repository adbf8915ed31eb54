"""What page.js draws."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from eval_runner.results.page.words import ARROWS
from eval_runner.results.series import Row, judge_changes
from eval_runner.results.statistics import bounds

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1")
"""Told apart by colour-blind readers too (Okabe and Ito, 2008); further runs get them again, dashed."""


def chart_data(table: Sequence[Row]) -> dict[str, Any]:
    """What page.js draws: runs with their checkpoints, and a chart for each benchmark with its metrics' lines."""
    shown = [row for row in table if not row.superseded]
    names = list(dict.fromkeys(row.run for row in shown))
    runs = [{"name": name, "color": COLORS[i % len(COLORS)], "checkpoints": []} for i, name in enumerate(names)]
    changes = judge_changes(table)
    place: dict[tuple[str, int], int] = {}
    charts: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in sorted(shown, key=lambda row: (row.suite != row.result.suite, row.key[:2], row.place)):
        r, s, run = row.result, row.score, names.index(row.run)
        checkpoints: Any = runs[run]["checkpoints"]
        at = place.setdefault((row.run, r.step), len(checkpoints))
        if at == len(checkpoints):
            name = os.path.basename(r.checkpoint.rstrip("/"))
            checkpoints.append({"step": r.step, "tokens": r.tokens, "checkpoint": name})
        metrics = charts.setdefault(row.key[:2], {})
        metric = metrics.setdefault(
            row.key[2:], {"name": f"{s.metric} ({s.split})", "direction": ARROWS[s.higher_is_better], "lines": {}}
        )
        line = metric["lines"].setdefault(run, {"run": run, "at": [], "value": [], "low": [], "high": [], "n": []})
        if changed := changes.get((row.run, row.key, r.step)):
            line.setdefault("judges", []).append([len(line["at"]), changed])    # the place in the line, A → B
        low, high = bounds(s) or (None, None)
        for name, value in (("at", at), ("value", s.value), ("low", low), ("high", high), ("n", s.n)):
            line[name].append(value)
    several = len({suite for suite, _ in charts}) > 1
    return {
        "runs": runs,
        "colors": len(COLORS),
        "tokens": bool(shown) and all(row.result.tokens is not None for row in shown),
        "charts": [
            {
                "title": f"{suite} · {benchmark}" if several else benchmark,
                "metrics": [{**m, "lines": list(m["lines"].values())} for m in metrics.values()],
            }
            for (suite, benchmark), metrics in charts.items()
        ],
    }


