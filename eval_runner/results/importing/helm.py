"""HELM's output: `benchmark_output`, a suite of its `runs/`, or one run, as `helm-run` left it, old or new.

Of each run `run_spec.json` says what was asked, `stats.json` and `per_instance_stats.json` what came out.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.helm import scores
from eval_runner.evaluators.written import clean
from eval_runner.results.importing import base, helm_metrics
from eval_runner.results.importing.base import Checkpoint, Found, Options, Pending, Tree
from eval_runner.results.schema import Instance, Score

SPEC, STATS, VALUES = "run_spec.json", "stats.json", "per_instance_stats.json"
LEAVE_OUT = frozenset({"scenarios", "scenario_instances", "eval_cache", "groups", "releases", "prod_env", "cache"})
FORK = "mymodel/"
"""What the older watcher puts before a model's name."""
NOT_THE_TASK = ("model", "model_deployment", "groups")
"""Arguments in a run's name that say nothing of what was asked."""
_MARK = re.compile(r"autoeval_[0-9]+")
"""The group by which our own evaluations tell a suite's entries apart."""


@dataclass(frozen=True)
class _Run:
    """A run of HELM. `definition` is its specification without the model; `settings` the parts of its name."""

    path: Path
    model: str
    benchmark: str
    groups: list[str]
    definition: dict[str, Any]


def find(directory: Path, options: Options) -> Tree:
    """The checkpoints that HELM's output at `directory` holds. Raises ConfigError for an option that does not fit."""
    passed_over: list[str] = []
    top = directory / "runs" if (directory / "runs").is_dir() else directory
    checkpoints: dict[tuple[str, Path], list[_Run]] = {}
    for here, files in base.walk(top, passed_over, LEAVE_OUT):
        if SPEC in files:
            try:
                run = _spec(here)
            except AutoEvalError as error:
                passed_over.append(str(error))
                continue
            if checkpoint(run.model).chosen(options):
                checkpoints.setdefault((run.model, here.parent), []).append(run)
        elif STATS in files or VALUES in files:
            passed_over.append(f"{here}: has no {SPEC}, so that nothing says what was asked")
    base.check({checkpoint(model) for model, _ in checkpoints}, options)
    pending = [
        Pending(f"{model} in {suite}", partial(_read, directory, model, suite, runs, options))
        for (model, suite), runs in sorted(checkpoints.items(), key=lambda item: _order(*item[0]))
    ]
    return Tree(tuple(pending), tuple(passed_over))


def checkpoint(model: str) -> Checkpoint:
    """What HELM's name of a model says."""
    name, step = base.model_and_step(model)
    return Checkpoint(model, name, name.removeprefix(FORK), step)


def _order(model: str, suite: Path) -> tuple[str, str, int]:
    name, step = base.model_and_step(model)
    return os.fspath(suite), name, step or 0


def _spec(path: Path) -> _Run:
    data = base.load(path / SPEC)
    try:
        name, adapter, groups = data["name"], data["adapter_spec"], data.get("groups") or []
        model = adapter["model"]
        if not all(isinstance(text, str) for text in (name, model, *groups)):
            raise TypeError("no text")
    except (KeyError, TypeError, AttributeError) as error:
        what = "its name, adapter_spec.model and groups are not what HELM writes"
        raise AutoEvalError(f"{path / SPEC}: not the specification of a run: {what}") from error
    ours = [group for group in groups if not _MARK.fullmatch(group)]
    asked = {key: value for key, value in adapter.items() if key not in NOT_THE_TASK}
    definition = {key: value for key, value in data.items() if key != "name"} | {"adapter_spec": asked, "groups": ours}
    scenario = data.get("scenario_spec")
    asked_of = scenario.get("args") if isinstance(scenario, dict) else None
    local = asked_of.get("path") if isinstance(asked_of, dict) else None
    return _Run(path, model, benchmark_name(name, ours, local), ours, definition)


def benchmark_name(name: str, groups: list[str], path: object = None) -> str:
    """Our name for a run by HELM's, as evaluations of ours are named: the run spec and its arguments, less the model.

    ``mmlu:subject=anatomy,method=multiple_choice_joint,model=x`` is ``mmlu.anatomy.multiple_choice_joint``. Where HELM
    joins an argument to the spec (``dyck_language_np=3:model=x``), the group tells them apart: ``dyck_language.3``. Of
    a path, the stem counts: it is `path` of the scenario, for the name has it without its slashes.
    """
    first, *rest = re.split(r"[:,]", name)
    spec, equals, value = first.partition("=")
    values = [value] if equals else []
    if equals:
        spec = next((group for group in groups if spec.startswith(group)), spec)
    arguments = [argument.split("=", 1) for argument in rest if "=" in argument]
    for key, written in arguments:
        if key not in NOT_THE_TASK:
            values.append(Path(str(path or written)).stem if key == "path" else written)
    if own := [written for key, written in arguments if key == "name"]:
        values = own
    return ".".join(clean(part) for part in [spec, *values])


def _read(directory: Path, model: str, suite: Path, runs: list[_Run], options: Options) -> Found:
    told = checkpoint(model)
    step = base.step_of(model, told.step, options)
    run_name = base.name_of(options.run or told.name)
    passed_over: list[str] = []
    schema = helm_metrics.read(suite, passed_over)
    found: list[Score] = []
    instances: list[Instance] = []
    definitions: dict[str, Any] = {}
    files: dict[str, str] = {}
    paths: list[Path] = []
    for run in sorted(runs, key=lambda run: run.benchmark):
        try:
            if run.benchmark in definitions:
                raise ConfigError(f"{run.path}: another run beside it has the benchmark name {run.benchmark}, too")
            own = [run.path / file for file in (SPEC, STATS, VALUES)]
            digests = {os.path.relpath(path, directory): base.digest(path) for path in own}
            values = _scores(run, schema, options)
        except AutoEvalError as error:
            passed_over.append(str(error) if str(run.path) in str(error) else f"{run.path}: {error}")
            continue
        for score, of_it in values:
            found.append(score)
            instances += of_it
        definitions[run.benchmark] = run.definition | ({"crfm-helm": options.version} if options.version else {})
        files |= digests
        paths += own
    if not found:
        raise AutoEvalError("; ".join(passed_over))
    return Found(
        "helm", model, run_name, step, options.suite or _suite_name(suite, run_name), tuple(found), instances,
        definitions, files, base.mtime(paths), {"crfm-helm": options.version or "not told by its files"},
        tuple(passed_over),
    )  # fmt: skip


def _scores(run: _Run, schema: helm_metrics.Schema, options: Options) -> list[tuple[Score, list[Instance]]]:
    """Raises AutoEvalError for a run that HELM did not finish, or that is not of its making."""
    main = schema.of(run.groups)
    names = (run.benchmark, *run.groups, run.benchmark.partition(".")[0])
    chosen = next((options.metrics[name] for name in names if name in options.metrics), None)
    if chosen is None and main is None:
        raise ConfigError(f"{run.path}: no main metric is known of {' or '.join(run.groups) or run.benchmark}; "
                          f"choose one by --metric {run.benchmark}=METRIC, or run helm-summarize first")  # fmt: skip
    metrics = chosen or (main[0],) if main else chosen or ()
    split = main[1] if main else None
    try:
        return [scores.read(run.path, run.benchmark, m, split, schema.lower_is_better(m)) for m in metrics]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise AutoEvalError(f"{run.path}: not HELM's results ({type(error).__name__}: {error})") from error


def _suite_name(suite: Path, run: str) -> str:
    """The name of HELM's suite; ``helm`` where it is called after the model, as the older watcher does: no two models
    share such a one."""
    name = clean(suite.name)[:64] if suite.parent.name == "runs" else "helm"
    return "helm" if name == clean(run)[:64] else name
