"""Scores and per-instance values out of the files that a program left."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner.evaluators.command import files, paths
from eval_runner.evaluators.command.settings import Metric, Settings, literal
from eval_runner.results.schema import Instance, Score
from eval_runner.results.statistics import mean_stderr

MAX_ERRORS = 5
"""Of one file: a hundred thousand rows can be wrong alike."""
DIGITS = 3
"""A value that is rounded to so many decimals, or more, is taken for the mean that it was rounded from."""

Values = dict[str, dict[str, float]]
"""Metric → id → value."""


@dataclass
class _Wrong:
    """What is wrong with the files: `misfits` are the program's or the settings' fault, `broken` the checkpoint's."""

    misfits: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def raise_first(self, prefix: str) -> None:
        said = [*self.misfits, *self.broken]
        if said:
            more = f"; and {len(said) - MAX_ERRORS} more like these" if len(said) > MAX_ERRORS else ""
            kind = ConfigError if self.misfits else CheckpointError
            why = "" if self.misfits else "; are the model's outputs broken?"
            raise kind(prefix + "; ".join(said[:MAX_ERRORS]) + more + why)


def read(settings: Settings, output: Path, where: str) -> tuple[list[Score], list[Instance]]:
    """The scores that the settings ask for, and the values of their instances; `output` is the real path of {output}.

    `where` begins every message. Raises ConfigError for what is missing, is no number, or does not agree,
    CheckpointError for a value that is not finite or null, AutoEvalError for a file that cannot be read.
    """
    wrong, prefix = _Wrong(), f"{where}: "
    try:
        asked = any(m.path or m.stderr or (m.n and not literal(m.n)) for m in settings.metrics.values())
        data = files.load(output, settings.scores) if asked else None
        values = _instances(settings, output, wrong)
    except AutoEvalError as error:
        raise type(error)(prefix + str(error)) from error
    wrong.raise_first(prefix)
    found = [_score(settings, name, metric, data, values.get(name), wrong) for name, metric in settings.metrics.items()]
    wrong.raise_first(prefix)
    instances = [
        Instance(settings.metrics[name].benchmark, name, settings.metrics[name].split, key, value)
        for name, by_id in values.items() for key, value in by_id.items()
    ]  # fmt: skip
    return [score for score in found if score is not None], instances


def _score(
    settings: Settings, name: str, metric: Metric, data: Any, values: dict[str, float] | None, wrong: _Wrong
) -> Score | None:
    """One score; None where something is `wrong`."""
    at = f"{settings.scores}: metrics.{name}"
    before = len(wrong.misfits) + len(wrong.broken)
    value = _number(data, metric.path, at, wrong, wrong.broken) if metric.path else None
    stderr = _stderr(data, metric.stderr, f"{at}.stderr", wrong) if metric.stderr else None
    n = _count(data, metric.n, f"{at}.n", wrong) if metric.n else None
    if len(wrong.misfits) + len(wrong.broken) > before:
        return None
    if values is not None:
        mean, of_mean = mean_stderr(list(values.values()))
        if value is not None and not _agrees(value, mean):
            wrong.misfits.append(f"{at}: {metric.path} is {value:g}, and the mean over its {len(values)} instances is "
                                 f"{mean:g}; take it out of `instances.values` if it is no such mean")  # fmt: skip
        if n is not None and n != len(values):
            wrong.misfits.append(f"{at}.n: {metric.n} is {n}, and there are {len(values)} instances")
        value, n, stderr = mean, len(values), of_mean if stderr is None else stderr
    assert value is not None
    # A number that nothing more is known of counts as one observation, whose error is unknown.
    return Score(metric.benchmark, name, metric.split, value, n or 1, stderr, metric.higher_is_better)


def _instances(settings: Settings, output: Path, wrong: _Wrong) -> Values:
    """The rows' values. Each row has all of them, and an id of its own."""
    asked = settings.instances
    if asked is None:
        return {}
    key, steps = paths.parse(asked.id), {name: paths.parse(path) for name, path in asked.values.items()}
    out: Values = {name: {} for name in steps}
    seen: set[str] = set()
    for place, row in files.rows(output, asked.file):
        try:
            found = paths.get(row, key)
            if type(found) not in (str, int):
                raise paths.NoValueError(f"its id {asked.id} is {paths.kind(found)}; expected text or a whole number")
            if str(found) in seen:
                raise paths.NoValueError(f"its id {found!r:.80} is another row's, too")
            seen.add(str(found))
            for name, path in steps.items():
                value = paths.get(row, path)
                number = float(value) if isinstance(value, bool) else _finite(value, asked.values[name])
                out[name][str(found)] = number
        except paths.NoValueError as error:
            wrong.misfits.append(f"{place}: {error}")
        except _NotFiniteError as error:
            wrong.broken.append(f"{place}: {error}")
        if len(wrong.misfits) + len(wrong.broken) > MAX_ERRORS:
            break
    if not seen and not wrong.misfits:
        wrong.misfits.append(f"{asked.file}: has no rows: nothing was evaluated")
    return out


def _number(data: Any, path: str, at: str, wrong: _Wrong, not_finite: list[str]) -> float | None:
    """The number at a path; None where something is wrong, which `not_finite` is told of null, NaN and infinity."""
    try:
        return _finite(paths.get(data, paths.parse(path)), path)
    except paths.NoValueError as error:
        wrong.misfits.append(f"{at}: {error}")
    except _NotFiniteError as error:
        not_finite.append(f"{at}: {error}")
    return None


def _stderr(data: Any, path: str, at: str, wrong: _Wrong) -> float | None:
    """None for null, too: one that the program does not know."""
    unknown: list[str] = []
    found = _number(data, path, at, wrong, unknown)
    if unknown and paths.get(data, paths.parse(path)) is not None:
        wrong.misfits += [f"{error}; write null where no standard error is known" for error in unknown]
    if found is not None and found < 0:
        wrong.misfits.append(f"{at}: {path} is {found:g}, and no standard error is below 0")
    return found


def _count(data: Any, written: str, at: str, wrong: _Wrong) -> int | None:
    if literal(written):
        return int(written)
    found = _number(data, written, at, wrong, wrong.misfits)
    if found is not None and (found < 1 or found != int(found)):
        wrong.misfits.append(f"{at}: {written} is {found:g}; a score has 1 or more instances")
    return None if found is None else int(found)


class _NotFiniteError(ValueError):
    """What a diverged model leaves."""


def _finite(found: Any, path: str) -> float:
    if found is None:
        raise _NotFiniteError(f"{path} is null")
    if type(found) not in (int, float):
        raise paths.NoValueError(f"{path} is {paths.kind(found)}; expected a number")
    try:
        number = float(found)
    except OverflowError as error:
        raise paths.NoValueError(f"{path} is too large a number") from error
    if not math.isfinite(number):
        raise _NotFiniteError(f"{path} is {number}, which is no number")
    return number


def _agrees(value: float, mean: float) -> bool:
    """To 1e-6, or as closely as a value that was rounded can."""
    exponent = Decimal(repr(value)).as_tuple().exponent
    decimals = max(-exponent, DIGITS) if isinstance(exponent, int) else DIGITS
    return math.isclose(value, mean, rel_tol=1e-6, abs_tol=1e-9) or abs(value - mean) <= 0.500001 * 10.0**-decimals
