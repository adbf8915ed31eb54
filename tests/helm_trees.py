"""Made-up output of HELM, in its layout: what `helm-run` leaves of a run, as far as results are read from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

RIGHT = (1.0, 0.0, 1.0, 1.0, 0.0)
T0 = 1_700_000_000


def helm_run(
    output: Path, model: str, benchmark: str = "mmlu:subject=anatomy", values: Sequence[float] = RIGHT, *,
    suite: str = "v1", shots: int = 5, metric: str = "exact_match", split: str = "test",
    groups: Sequence[str] | None = None, at: int = T0,
) -> Path:  # fmt: skip
    """A run of `benchmark` (a run spec with its arguments) on `model`, whose instances have `values`, as if written at
    `at`."""
    name = f"{benchmark}{',' if ':' in benchmark else ':'}model={model.replace('/', '_')}"
    path = output / "runs" / suite / name
    path.mkdir(parents=True)
    spec = {
        "name": name, "scenario_spec": {"class_name": "helm.S", "args": {"of": benchmark}},
        "adapter_spec": {"method": "m", "max_train_instances": shots, "model": model, "model_deployment": model},
        "metric_specs": [{"class_name": "helm.M", "args": {}}],
        "groups": list(groups) if groups is not None else [benchmark.partition(":")[0]],
    }  # fmt: skip
    n, total = len(values), sum(values)
    stats = [
        {"name": {"name": metric, "split": split}, "count": 1, "sum": total, "mean": total / n},
        {"name": {"name": "num_instances", "split": split}, "count": 1, "sum": n, "mean": n},
    ]
    each = [
        {"instance_id": f"id{i}", "train_trial_index": 0,
         "stats": [{"name": {"name": metric, "split": split}, "count": 1, "sum": value, "mean": value}]}
        for i, value in enumerate(values)
    ]  # fmt: skip
    for file, content in (("run_spec", spec), ("stats", stats), ("per_instance_stats", each)):
        written = path / f"{file}.json"
        written.write_text(json.dumps(content))
        os.utime(written, (at, at))
    return path
