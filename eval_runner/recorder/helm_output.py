"""What HELM left of some benchmarks, as a recorder wants it: for each step, `benchmark.METRIC` and its value.

HELM's tables are read where there are some, as the older recorder read them; its run directories for the models that
they do not have. A model's step is the number behind the last ``/`` or ``_`` of its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks.errors import ConfigError
from eval_runner.recorder import helm_runs, helm_tables
from eval_runner.recorder.helm_runs import Index
from eval_runner.recorder.helm_tables import Column, Values
from eval_runner.recorder.settings import Benchmark, HelmSource

Rows = dict[int, dict[str, float]]
"""By step, values by key."""


@dataclass
class Found:
    """`summary` has ``benchmark.METRIC``; `details`, by benchmark, have the benchmark's parts as well, keyed
    ``benchmark.PART.METRIC``. `missing` names what was asked for and is not there or is no value to show, a line each;
    `notes` say what was read."""

    summary: Rows = field(default_factory=dict)
    details: dict[str, Rows] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Benchmarks of which there is nothing at all."""
    notes: list[str] = field(default_factory=list)
    unclear: dict[str, str] = field(default_factory=dict)
    """Why a key has no value at any step."""
    gaps: dict[tuple[str, int], str] = field(default_factory=dict)
    """Why a key has no value at a step."""


def read(source: HelmSource, model_name: str, asked: Sequence[Benchmark], default_step: int, where: str) -> Found:
    """Read a suite of HELM's. `where` is the entry's key path, for messages.

    What is not there or cannot be read is named in `missing`. Raises ConfigError where the suite holds several models
    and none of them is `model_name`.
    """
    suite = source.output / "runs" / source.suite
    if not suite.is_dir():
        return Found(missing=[_not_there(source)])
    runs = helm_runs.index(suite)
    found = Found(missing=[*runs.unreadable.values()])
    values: dict[str, dict[str, Values]] = {}
    for benchmark in asked:
        values[benchmark.name] = _benchmark(suite, benchmark, runs, found)
    wanted = _model(values, source.model, model_name, found, where)
    for benchmark in asked:
        for metric, of_metric in values[benchmark.name].items():
            _add(found, benchmark.name, metric, of_metric, wanted, default_step)
    _name_gaps(found, asked)
    return found


def split_step(model: str) -> tuple[str, int | None]:
    """The name without its step, and the step: of ``demo/100``, ``demo_100`` and ``demo/100 [method: x]``, 100."""
    name = re.sub(r" \[.*\]\Z", "", model)
    match = re.fullmatch(r"(.*)[/_](\d{1,18})", name, re.DOTALL)
    return (match[1], int(match[2])) if match else (name, None)


def _not_there(source: HelmSource) -> str:
    runs = source.output / "runs"
    if not runs.is_dir():
        return f"helm_output_dir: {source.output} has no directory `runs`; name HELM's output directory"
    there = sorted(p.name for p in runs.iterdir() if p.is_dir())
    return f"helm_suite_name: {runs} has no suite {source.suite!r}; it has {', '.join(there) or 'none'}"


def _benchmark(suite: Path, benchmark: Benchmark, runs: Index, found: Found) -> dict[str, Values]:
    """The values of a benchmark by metric: from its table, and from the runs of models or metrics that it lacks."""
    name, of_group = benchmark.name, runs.of_group(benchmark.name)
    file = suite / "groups" / f"{name}.json"
    if not file.is_file() and not of_group:
        found.absent.append(name)
        return {}
    out, headings = _table(file, benchmark.metrics, found)
    tabled = {split_step(model) for values in out.values() for model, _ in values.whole}
    newer = [run for run in of_group if split_step(run.model) not in tabled]
    lacking = [metric for metric in benchmark.metrics if metric not in out]
    more, unclear = helm_runs.read(suite, name, of_group, lacking, found.missing) if lacking else ({}, {})
    if out and newer:
        others, why = helm_runs.read(suite, name, newer, [*out], found.missing)
        unclear |= why
        for metric, values in others.items():
            out[metric].whole += values.whole
            for title, column in values.parts.items():
                out[metric].parts.setdefault(title, []).extend(column)
    table = f"; its table has {', '.join(headings[:6])}{', …' if headings[6:] else ''}" if headings else ""
    found.unclear |= {f"{name}.{metric}": f"{why}{table}" for metric, why in unclear.items()}
    used = ["HELM's table"] if out else []
    if more:
        used.append(f"run directories: HELM has no table with {', '.join(more)} (see helm-summarize)")
    elif out and newer:
        used.append("run directories that came after it")
    found.notes.append(f"{name}: from {' and '.join(used) or 'nothing'}")
    return out | more


def _table(file: Path, metrics: Sequence[str], found: Found) -> tuple[dict[str, Values], list[str]]:
    if not file.is_file():
        return {}, []
    try:
        return helm_tables.read(file, metrics)
    except ConfigError as error:
        found.missing.append(str(error))
        return {}, []


def _model(values: dict[str, dict[str, Values]], given: str, model_name: str, found: Found, where: str) -> str:
    """The one model to record, by its name without the step. Raises ConfigError where it is not clear."""
    bases = sorted({split_step(m)[0] for some in values.values() for v in some.values() for m, _ in v.whole})
    if given:
        mine = [base for base in bases if base == given]
    else:
        named = [base for base in bases if model_name in (base, base.rpartition("/")[2])]
        mine = bases if len(bases) == 1 else [base for base in named if base == model_name] or named
    if bases and len(mine) != 1:
        key = "helm_model" if given else "model_name"
        called = repr(given or model_name)
        raise ConfigError(
            f"{where}.{key}: the suite's models are {', '.join(bases)}, and {'several are' if mine else 'none is'} "
            f"{called}; say which by `helm_model`"
        )
    if others := [base for base in bases if base not in mine]:
        found.notes.append(f"other models of the suite are left out: {', '.join(others)}")
    return mine[0] if mine else ""


def _add(found: Found, name: str, metric: str, values: Values, model: str, default_step: int) -> None:
    """Take the model's values of one metric, but where a part is missing or two rows of one step disagree."""
    key = f"{name}.{metric}"
    whole = _steps(values.whole, model, default_step)
    parts = {title: part for title, column in values.parts.items() if (part := _steps(column, model, default_step))}
    rows = found.details.setdefault(name, {})
    for step, some in sorted(whole.items()):
        lacking = sorted(title for title, part in parts.items() if part.get(step, {None}) == {None})
        if len(some) > 1:
            found.gaps[key, step] = f"has {len(some)} different values there, and which to take is not clear"
        elif None in some:
            found.gaps[key, step] = "HELM has no value there"
        elif lacking:
            found.gaps[key, step] = f"lacks {', '.join(lacking)}, so that there is no average"
        else:
            (value,) = some
            found.summary.setdefault(step, {})[key] = rows.setdefault(step, {})[key] = value  # type: ignore[assignment]
    for title, part in parts.items():
        for step, some in part.items():
            if len(some) == 1 and (value := next(iter(some))) is not None:
                rows.setdefault(step, {})[f"{name}.{_short(title, parts)}.{metric}"] = value


def _steps(column: Column, model: str, default_step: int) -> dict[int, set[float | None]]:
    """The model's values by step: one each, unless two rows are of one step."""
    out: dict[int, set[float | None]] = {}
    for name, value in column:
        base, step = split_step(name)
        if base == model:
            out.setdefault(default_step if step is None else step, set()).add(value)
    return out


def _short(title: str, titles: Iterable[str]) -> str:
    """The title up to its first comma, as the older recorder has it, where that is the only one so."""
    short = title.partition(",")[0]
    return short if sum(other.partition(",")[0] == short for other in titles) == 1 else title


def _name_gaps(found: Found, asked: Sequence[Benchmark]) -> None:
    """Name what a step lacks, also where it has another benchmark only."""
    steps = sorted({*found.summary, *(step for _, step in found.gaps)})
    for key in (key for benchmark in asked if benchmark.name not in found.absent for key in benchmark.keys):
        have = {step for step, row in found.summary.items() if key in row}
        named = {step for k, step in found.gaps if k == key}
        found.missing += [f"{key} at step {s}: {found.gaps[key, s]}" for s in sorted(named)]
        if key in found.unclear or not have | named:
            found.missing.append(f"{key}: {found.unclear.get(key, 'HELM has nothing of this model')}")
        elif gaps := [step for step in steps if step not in have | named]:
            found.missing.append(f"{key}: nothing of step {', '.join(map(str, gaps))}")
