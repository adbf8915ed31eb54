"""What an offline W&B run holds, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval_runner.sinks.wandb_log import Content


def logs(directory: Path, run_id: str = "*") -> list[Path]:
    """The transaction logs below a W&B directory, the oldest first."""
    return sorted(directory.glob(f"**/*run-*-{run_id}/run-*.wandb"))


def rows(path: Path) -> list[dict[str, Any]]:
    """The history rows in the order written, less W&B's own clock (`_timestamp`, `_runtime`)."""
    content = Content()
    content.add(path)
    return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in content.rows]


def definitions(path: Path) -> dict[str, str]:
    """Metric name (or pattern) → its step metric, as the last record about it says."""
    content = Content()
    content.add(path)
    return {name: metric.step_metric for name, metric in content.definitions.items()}


def series(found: list[dict[str, Any]], name: str, axis: str) -> list[tuple[Any, Any]]:
    """(axis, value) of each row that has the metric, in order."""
    return [(row.get(axis), row[name]) for row in found if name in row]
