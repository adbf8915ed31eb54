"""Scores and their uncertainty out of one run directory of HELM.

HELM writes `stats.json`, rows over all instances, and `per_instance_stats.json`. A row's own `stddev` is that
over trials, so the standard error is taken from the instances; and only where they reproduce the row's value,
for a metric of a whole corpus (a macro F1, say) is no mean over instances.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.strict import near
from eval_runner.results.schema import Instance, Score
from eval_runner.results.statistics import mean_stderr, ratio_stderr, ratio_values

Rows = list[dict[str, Any]]
Sizes = dict[str | None, float]
"""Instances of each sub-split; None is the key of those in no sub-split."""


def read(
    run: Path, benchmark: str, metric: str, split: str | None, lower_is_better: bool | None, was_nan: bool = False
) -> tuple[Score, list[Instance]]:
    """The score `metric` of a run, and the values of its instances.

    `split` None takes the only split of the run. `was_nan` says that HELM dropped this metric for being NaN,
    in the whole run or in a sub-split. The score's `n` counts the instances that have the metric, where their
    values give the score: HELM computes some metrics only for instances with references. Else it counts all
    instances of the split, and `stderr` is None.
    Raises ConfigError for a run without instances, without this metric or with it in some sub-splits only;
    CheckpointError for a value that is not finite, AutoEvalError for files that a run should have left and
    did not.
    """
    stats, per_instance = _load(run / "stats.json"), _load(run / "per_instance_stats.json")
    rows = [row for row in stats if "perturbation" not in row["name"] and row["count"] > 0]
    sizes: dict[str, Sizes] = defaultdict(dict)
    for row in rows:
        if row["name"]["name"] == "num_instances":
            sizes[row["name"]["split"]][row["name"].get("sub_split")] = row["mean"]
    if split is None:
        if len(sizes) > 1:
            raise ConfigError(f"{benchmark}: no main split is known, and there are {', '.join(sorted(sizes))}")
        split = next(iter(sizes), "test")
    n = round(sum(sizes[split].values())) if split in sizes else 0
    if n == 0:
        raise ConfigError(
            f"{benchmark}: the run has no instances of the split {split!r}; HELM found no data for it"
            + (f" (it has {', '.join(sorted(sizes))})" if sizes else "")
            + "; put the data under data_dir, or set HF_HUB_OFFLINE=0 where the network may be used"
        )
    values = [row for row in rows if row["name"].get("split") == split and row["name"]["name"] == metric]
    if not values and was_nan:
        raise CheckpointError(f"{benchmark}: {metric} is not a number; the model's outputs are broken")
    if not values:
        known = {row["name"]["name"] for row in rows if row["name"].get("split") == split}
        raise ConfigError(f"{benchmark}: the run has no metric {metric!r}{near(metric, known)}")
    value, covered = _pooled(values, sizes[split])
    if covered != n:
        what = f"{benchmark}: {metric} covers only {covered} of {n} instances of the split {split!r}"
        if was_nan:
            raise CheckpointError(f"{what}, for it is not a number in the others; the model's outputs are broken")
        raise ConfigError(f"{what}; choose a metric that all sub-splits have by `metrics` beside `entries`")
    if not math.isfinite(value):
        raise CheckpointError(f"{benchmark}: {metric} is {value}; the model's outputs are broken")
    instances, stderr = _instances(per_instance, metric, split, value)
    higher = None if lower_is_better is None else not lower_is_better
    return (
        Score(benchmark, metric, split, value, len(instances) or n, stderr, higher),
        [Instance(benchmark, metric, split, key, v) for key, v in instances.items()],
    )


def _load(path: Path) -> Rows:
    try:
        data: Rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AutoEvalError(f"{path}: HELM left no readable results ({error})") from error
    return data


def _pooled(values: Rows, sizes: Sizes) -> tuple[float, int]:
    """A metric of a split and the number of instances that it covers.

    Where a scenario has sub-splits, it is their mean weighted by their instances, unless HELM computed it
    over all of them at once.
    """
    found = {row["name"].get("sub_split"): float(row["mean"]) for row in values}
    if None in found and (None not in sizes or len(sizes) == 1):
        return found[None], round(sum(sizes.values()))
    covered = sum(sizes.get(key, 0) for key in found)
    if not covered:
        return math.nan, 0
    return sum(sizes.get(key, 0) * mean for key, mean in found.items()) / covered, round(covered)


def _instances(per_instance: Rows, metric: str, split: str, value: float) -> tuple[dict[str, float], float | None]:
    """Values of the instances, each averaged over its trials, and the standard error of `value`."""

    def close(other: float) -> bool:
        return math.isclose(other, value, rel_tol=1e-6, abs_tol=1e-9)

    if metric == "bits_per_byte":
        nats = _per_instance(per_instance, "logprob", split, sum)
        size = _per_instance(per_instance, "num_bytes", split, sum)
        ids = [key for key in nats if size.get(key, 0) > 0]
        bits = [-nats[key] / math.log(2) for key in ids]
        sizes = [size[key] for key in ids]
        if ids and close(math.fsum(bits) / math.fsum(sizes)):
            return dict(zip(ids, ratio_values(bits, sizes), strict=True)), ratio_stderr(bits, sizes)[1]
    values = _per_instance(per_instance, metric, split, lambda trials: math.fsum(trials) / len(trials))
    if values and close(math.fsum(values.values()) / len(values)):
        return values, mean_stderr(list(values.values()))[1]
    return {}, None


def _per_instance(
    rows: Rows, metric: str, split: str, combine: Callable[[list[float]], float]
) -> dict[str, float]:
    """Value of each unperturbed instance. A stat's own value is its mean; `combine` is over trials or windows."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get("perturbation"):
            continue
        for stat in row["stats"]:
            name = stat["name"]
            if name["name"] == metric and name.get("split") == split and not name.get("perturbation") and stat["count"]:
                found[row["instance_id"]].append(stat["sum"] / stat["count"])
    return {key: combine(values) for key, values in found.items()}
