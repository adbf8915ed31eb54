"""Scores, with their uncertainty and per-document values, out of what lm_eval writes: `results_DATE.json` and samples.

The format is that of lm-evaluation-harness 0.4: `results` has, for each task and group, ``METRIC,FILTER`` and
``METRIC_stderr,FILTER``; `configs`, `versions`, `n-shot`, `higher_is_better` and `n-samples` go by task (the last two
from 0.4.3 on), `group_subtasks` by group. What lacks is named in `Read.gaps`, and never made up.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError
from eval_runner.evaluators.lm_eval import samples
from eval_runner.evaluators.written import clean
from eval_runner.results.schema import Instance, Score

_NO_METRICS = ("alias", "name", "sample_len", "sample_count", "samples", " ")
_LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
_ADAPTERS = ("peft", "delta", "lora_local_path")
_MODEL_KEYS = (*_ADAPTERS, "pretrained", "model", "path", "engine")


@dataclass(frozen=True)
class Gap:
    """A score that is not there. `broken`: because the model's outputs are no numbers."""

    benchmark: str
    metric: str
    why: str
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.benchmark}{': ' + self.metric if self.metric else ''} {self.why}"


@dataclass(frozen=True)
class Read:
    """One results file. `tasks` are those that were run, without groups, as lm_eval names them.

    `model` is what lm_eval was told to load, usually a path, and its revision as ``MODEL@REVISION``; `arguments` is
    lm_eval's configuration as text (model_args, limit, batch_size, …); `date` is when it began, in seconds since the
    epoch, None where the file does not say.
    `versions` names lm_eval, transformers, torch, and each task with its shots.
    """

    path: Path
    scores: tuple[Score, ...]
    instances: tuple[Instance, ...]
    versions: dict[str, str]
    model: str
    date: float | None
    tasks: tuple[str, ...]
    arguments: dict[str, str] = field(default_factory=dict)
    gaps: tuple[Gap, ...] = ()


def files(directory: Path) -> list[Path]:
    """The results files below a directory, the oldest first; every call of lm_eval leaves one more."""
    return sorted(p for p in directory.rglob("results*.json") if re.fullmatch(r"results(_\d.*)?", p.stem))


def read(path: Path) -> Read:
    """All scores of a results file, or of a directory that holds just one (at any depth).

    A score's `n` counts the documents that have the metric. Its standard error is lm_eval's, else that of the
    documents' values where these reproduce the score. A group's score has its tasks' documents as instances where it
    is the mean over all of them. Raises AutoEvalError for what is no such file, or more than one.
    """
    if path.is_dir():
        found = files(path)
        if len(found) != 1:
            what = f"{len(found)} results files, read one of them" if found else "no results file of lm_eval"
            raise AutoEvalError(f"{path}: {what}")
        path = found[0]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
            raise ValueError("no `results`")
        return _Reader(path, data).read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AutoEvalError(f"{path}: no results file of lm_eval ({type(error).__name__}: {error})") from error


class _Reader:
    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._path = path
        self._data = data
        self._results: dict[str, dict[str, Any]] = data["results"]
        self._configs: dict[str, dict[str, Any]] = data.get("configs") or {}
        below = {name: list(tasks) for name, tasks in (data.get("group_subtasks") or {}).items() if tasks}
        self._groups = {name: _leaves(name, below) for name in below}
        self._found: dict[tuple[str, str], tuple[Score, dict[str, float]]] = {}
        self._notes: dict[str, str] = {}
        self._gaps: list[Gap] = []

    def read(self) -> Read:
        tasks = [name for name in self._results if name not in self._groups]
        for name in tasks:
            self._task(name)
        for name in self._groups:
            self._group(name)
        taken: dict[str, str] = {}
        for name in {name for name, _ in self._found}:
            if taken.setdefault(clean(name), name) != name:
                raise AutoEvalError(f"{self._path}: tasks {name!r} and {taken[clean(name)]!r} have one name here")
        scores = [score for score, _ in self._found.values()]
        instances = [
            Instance(score.benchmark, score.metric, score.split, key, value)
            for score, values in self._found.values()
            for key, value in values.items()
        ]
        config = self._data.get("config") or {}
        date = self._data.get("date")
        return Read(
            self._path, tuple(scores), tuple(instances), self._versions(), "@".join(filter(None, model_of(self._data))),
            date if isinstance(date, float) else None, tuple(tasks),
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()
             if value not in (None, [], {}, "")},
            tuple(self._gaps),
        )  # fmt: skip

    def _task(self, task: str) -> None:
        metrics = _metrics(self._results[task])
        if not metrics:
            self._gap(task, "", "has no metric: did it yield any sample?")
        rows = samples.load(self._path, task)
        if self._configs.get(task, {}).get("output_type") in _LIKELIHOODS and samples.broken(rows):
            self._gap(task, "", "has log-likelihoods that are not a number; the model's outputs are broken", True)
            return
        by_filter = samples.by_filter(rows, list(dict.fromkeys(name for _, name, _ in metrics)))
        for metric, name, value in metrics:
            if not self._is_finite(task, metric, name, value):
                continue
            own = by_filter.get(name, {})
            values, stderr = samples.instances(own, metric, value)
            n = sum(1 for row in own.values() if row.get(metric) is not None) or self._size(task)
            if n < 1:
                self._gap(task, _name(metric, name), "is of an unknown number of documents, or of none")
                continue
            self._add(task, metric, name, value, n, stderr, self._split(task), values)

    def _group(self, group: str) -> None:
        leaves = self._groups[group]
        if missing := [task for task in leaves if task not in self._results]:
            self._gap(group, "", f"lacks its tasks {', '.join(missing)}")
            return
        for metric, name, value in _metrics(self._results.get(group, {})):
            if not self._is_finite(group, metric, name, value):
                continue
            key = _name(metric, name)
            parts = {task: self._found[task, key] for task in leaves if (task, key) in self._found}
            if any(gap.benchmark == clean(task) and gap.metric in ("", key) for gap in self._gaps for task in leaves):
                self._gap(group, key, "is of tasks that have no such score")
                continue
            if without := [task for task in leaves if task not in parts]:       # as the group's definition has it
                self._notes[f"group {group} {key}"] = f"without {', '.join(without)}"
            n, splits = sum(score.n for score, _ in parts.values()), {score.split for score, _ in parts.values()}
            if n < 1:
                self._gap(group, key, "is in none of its tasks")
                continue
            split = splits.pop() if len(splits) == 1 else "mixed"
            pooled = {f"{task}.{i}": v for task, (_, values) in parts.items() for i, v in values.items()}
            mean = math.fsum(pooled.values()) / len(pooled) if len(pooled) == n else math.nan
            if not math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                pooled = {}
            self._add(group, metric, name, value, n, None, split, pooled)

    def _add(
        self, benchmark: str, metric: str, name: str, value: float, n: int, stderr: float | None, split: str,
        values: dict[str, float],
    ) -> None:  # fmt: skip
        row = self._results[benchmark]
        given = row.get(f"{metric}_stderr,{name}", row.get(f"{metric}_stderr"))
        if isinstance(given, int | float) and math.isfinite(given) and n > 1:
            stderr = float(given)
        score = Score(
            clean(benchmark), _name(metric, name), split, value, n, stderr, self._higher(benchmark, metric)
        )
        self._found[benchmark, score.metric] = score, values

    def _is_finite(self, benchmark: str, metric: str, name: str, value: float) -> bool:
        if math.isfinite(value):
            return True
        self._gap(benchmark, _name(metric, name), f"is {value}; the model's outputs are broken", True)
        return False

    def _gap(self, benchmark: str, metric: str, why: str, broken: bool = False) -> None:
        self._gaps.append(Gap(clean(benchmark), metric, why, broken))

    def _size(self, task: str) -> int:
        told = (self._data.get("n-samples") or {}).get(task) or {}
        return int(told.get("effective") or self._results[task].get("sample_len") or 0)

    def _split(self, task: str) -> str:
        """lm_eval takes the test split where a task names one, else that of validation."""
        config = self._configs.get(task, {})
        return str(config.get("test_split") or config.get("validation_split") or "unknown")

    def _higher(self, benchmark: str, metric: str) -> bool | None:
        told = (self._data.get("higher_is_better") or {}).get(benchmark) or {}
        if metric in told:
            return told[metric] if isinstance(told[metric], bool) else None
        if benchmark in self._groups:
            each = {self._higher(task, metric) for task in self._groups[benchmark]} - {None}
            return each.pop() if len(each) == 1 else None
        listed = self._configs.get(benchmark, {}).get("metric_list") or []
        found = [one.get("higher_is_better") for one in listed if one.get("metric") == metric]
        return found[0] if found and isinstance(found[0], bool) else None

    def _versions(self) -> dict[str, str]:
        found = {}
        for name, key in (("lm_eval", "lm_eval_version"), ("transformers", "transformers_version")):
            if self._data.get(key):
                found[name] = str(self._data[key])
        if torch := re.search(r"PyTorch version: (\S+)", self._data.get("pretty_env_info") or ""):
            found["torch"] = torch.group(1)
        shots = self._data.get("n-shot") or {}
        for task, version in sorted((self._data.get("versions") or {}).items()):
            found[f"task {task}"] = f"{version}, {shots[task]}-shot" if task in shots else str(version)
        return found | self._notes


def model_of(data: dict[str, Any]) -> tuple[str, str]:
    """What lm_eval was told to load, and which revision of it, by its results file; "" where that is not said.

    An adapter stands for the model that it makes of another; the subfolder or file that was asked for is a part of the
    model's name. `model_name` is not enough: lm_eval writes the same for all revisions.
    """
    config = data.get("config")
    args = config.get("model_args") if isinstance(config, dict) else None
    if isinstance(args, str):
        args = dict(part.split("=", 1) for part in args.split(",") if "=" in part)
    told = {str(key): str(value) for key, value in args.items() if value} if isinstance(args, dict) else {}
    key = next((key for key in _MODEL_KEYS if key in told), "")
    inside = [told[part] for part in ("subfolder", "gguf_file") if part in told and key not in _ADAPTERS]
    model = told.get(key) or str(data.get("model_name") or "")
    return "/".join([model, *inside]), "" if told.get("revision") == "main" else told.get("revision", "")


def _leaves(group: str, below: dict[str, list[str]], above: tuple[str, ...] = ()) -> list[str]:
    """The tasks of a group and of the groups in it."""
    found: list[str] = []
    for name in below[group]:
        if name in above:
            raise ValueError(f"group {name!r} is a part of itself")
        found += _leaves(name, below, (*above, group)) if name in below else [name]
    return list(dict.fromkeys(found))


def _metrics(row: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Name, filter and value of each metric of a task; the oldest files name no filter."""
    found = []
    for key, value in row.items():
        metric, _, name = key.partition(",")
        if metric in _NO_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        found.append((metric, name or "none", float(value)))
    return found


def _name(metric: str, name: str) -> str:
    """As results and W&B have it: `acc` of ``acc,none``, `exact_match.strict-match` of others."""
    return clean(metric if name == "none" else f"{metric}.{name}")


def chosen(found: Iterable[Score], wanted: dict[str, tuple[str, ...]]) -> list[Score]:
    """The scores that `metrics:` leaves: those of a benchmark that it does not name are all there."""
    return [s for s in found if s.benchmark not in wanted or s.metric in wanted[s.benchmark]]
