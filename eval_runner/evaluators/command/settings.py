"""The settings of a `type: command` entry."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoeval_hooks.strict import build, near
from eval_runner import commands
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.command import paths
from eval_runner.evaluators.written import clean, refused

SERVER = ("server_url", "server_model")
PLACEHOLDERS = ("checkpoint", "tokenizer", "step", "name", "output", "work_dir", "config_dir", "python", *SERVER)
_OWN = ("output", "work_dir")
_HERE = "{config_dir}/"
_INTERPRETERS = re.compile(r"\{python\}|python[0-9.]*|bash|sh|env|perl|ruby|node|Rscript|torchrun")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Metric:
    """Where a score stands in the JSON. `path` None is the mean of its instances. `n` and `stderr` are paths, too;
    `n` may also be a number itself. `benchmark` is never empty after `parse`."""

    path: str | None = None
    stderr: str | None = None
    n: str | None = None
    higher_is_better: bool | None = None
    benchmark: str = ""
    split: str = "test"


@dataclass(frozen=True)
class Instances:
    """Where per-instance values stand: a file of rows below {output}, the path of a row's id, and metric → path."""

    file: str
    values: dict[str, str]
    id: str = "id"


@dataclass(frozen=True)
class Settings:
    """What the suite says; see README. After `parse`, `name` is never empty, and fit for a benchmark's name."""

    command: tuple[str, ...]
    metrics: dict[str, Metric]
    name: str = ""
    env: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    scores: str = "scores.json"
    instances: Instances | None = None
    working_directory: str = "."

    @property
    def program(self) -> str:
        """What the command runs, in a word: behind an interpreter, its first argument that is no option."""
        first, *more = self.command or ("",)
        if _INTERPRETERS.fullmatch(Path(first).name):
            first = next((a for a in more if not a.startswith("-") and "{" not in a.replace(_HERE, "")), first)
        return Path(first).name

    @property
    def placeholders(self) -> set[str]:
        """Those that the command or its environment uses."""
        texts = (*self.command, *self.env.values(), self.working_directory)
        return {name for text in texts for name in commands.placeholders(text)}

    @property
    def asks_server(self) -> bool:
        return not self.placeholders.isdisjoint(SERVER)


def parse(data: dict[str, Any], context: Context) -> Settings:
    """Raises ConfigError that names every key that does not fit. Reads no file."""
    errors: list[str] = []
    where = context.where
    settings = build(Settings, _rewritten(data), where, errors)
    if settings is not None:
        _check_command(settings, where, errors)
        _check_metrics(settings, where, errors)
        _check_instances(settings, where, errors)
        settings = _completed(settings, where, errors)
    if errors or settings is None:
        raise refused(context, errors)
    return settings


def _rewritten(data: dict[str, Any]) -> dict[str, Any]:
    """A metric that is a path alone, and an `n` that is a number, as the dataclasses have them."""
    data = dict(data)
    if isinstance(data.get("metrics"), dict):
        metrics = data["metrics"] = dict(data["metrics"])
        for name, one in metrics.items():
            if isinstance(one, str):
                metrics[name] = {"path": one}
            elif isinstance(one, dict) and type(one.get("n")) is int:
                metrics[name] = one | {"n": str(one["n"])}
    return data


def _check_command(s: Settings, where: str, errors: list[str]) -> None:
    if not s.command:
        errors.append(f"{where}.command: is empty; write [PROGRAM, ARGUMENT…]")
        return
    found = [e for i, a in enumerate(s.command) for e in commands.problems(a, f"{where}.command[{i}]", PLACEHOLDERS)]
    for name, value in s.env.items():
        if not _VARIABLE.fullmatch(name):
            found.append(f"{where}.env: {name!r:.60} is no name of an environment variable")
        found += commands.problems(value, f"{where}.env.{name:.60}", PLACEHOLDERS)
    found += commands.problems(s.working_directory, f"{where}.working_directory", _OWN)
    errors += found
    if found:
        return
    if commands.placeholders(s.command[0]) and s.command[0] != "{python}":
        errors.append(f"{where}.command[0]: the only placeholder that names a program is {{python}}, the runner's own")
    if "output" not in s.placeholders:
        errors.append(f"{where}.command: has no {{output}}, so that the program cannot know where to leave its scores")
    if s.placeholders.isdisjoint(("checkpoint", "server_url")):
        errors.append(f"{where}.command: has neither {{checkpoint}} nor {{server_url}}, so that the program cannot "
                      "know what to evaluate")  # fmt: skip


def _check_metrics(s: Settings, where: str, errors: list[str]) -> None:
    if not s.metrics:
        errors.append(f"{where}.metrics: is empty; write METRIC: PATH IN {s.scores}")
    values = s.instances.values if s.instances else {}
    for name, metric in s.metrics.items():
        at = f"{where}.metrics.{name:.60}"
        for what, written in (("", name), (".benchmark", metric.benchmark), (".split", metric.split)):
            if written != clean(written) and (written or what == ".split"):
                errors.append(f"{at}{what}: {written!r:.60} is no name: letters, digits and ._- may stand in it; write "
                              f"{clean(written)!r:.60}")  # fmt: skip
        if metric.path is None and name not in values:
            errors.append(f"{at}.path: missing; only a metric of `instances.values` can do without")
        for key in ("path", "stderr", "n"):
            written = getattr(metric, key)
            if written is not None and not (key == "n" and literal(written)):
                _check_path(written, f"{at}.{key}", errors)
        if metric.n is not None and literal(metric.n) and int(metric.n) < 1:
            errors.append(f"{at}.n: must be 1 or more")


def _check_instances(s: Settings, where: str, errors: list[str]) -> None:
    _check_below(s.scores, f"{where}.scores", errors)
    if s.instances is None:
        return
    at = f"{where}.instances"
    _check_below(s.instances.file, f"{at}.file", errors)
    _check_path(s.instances.id, f"{at}.id", errors)
    if not s.instances.values:
        errors.append(f"{at}.values: is empty; write METRIC: PATH IN A ROW")
    for name, path in s.instances.values.items():
        if name not in s.metrics:
            errors.append(f"{at}.values.{name:.60}: is none of `metrics`{near(name, s.metrics)}")
        _check_path(path, f"{at}.values.{name:.60}", errors)


def _completed(s: Settings, where: str, errors: list[str]) -> Settings:
    """With a name, and each metric with its benchmark."""
    if s.name and s.name != clean(s.name):
        errors.append(f"{where}.name: {s.name!r:.60} is no benchmark's name: letters, digits and ._- may stand in it; "
                      f"write {clean(s.name)!r:.60}")  # fmt: skip
    name = s.name or clean(Path(s.program).stem)
    metrics = {key: replace(one, benchmark=one.benchmark or name) for key, one in s.metrics.items()}
    return replace(s, name=name, metrics=metrics)


def literal(n: str) -> bool:
    """Whether an `n` is the number itself; a key that looks like one is written ``["500"]``."""
    return re.fullmatch(r"-?[0-9]{1,18}", n) is not None


def _check_path(text: str, where: str, errors: list[str]) -> None:
    try:
        paths.parse(text)
    except ValueError as error:
        errors.append(f"{where}: {error}")


def _check_below(written: str, where: str, errors: list[str]) -> None:
    if not written or Path(written).is_absolute() or ".." in Path(written).parts or Path(written) == Path():
        errors.append(f"{where}: {written!r:.200}: expected the name of a file below {{output}}")
