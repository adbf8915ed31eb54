"""Results of lm-evaluation-harness: `results_DATE.json`, and the samples beside it, at any depth below a directory."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError
from eval_runner.evaluators.lm_eval import scores
from eval_runner.evaluators.written import clean
from eval_runner.results.importing import base
from eval_runner.results.importing.base import Checkpoint, Found, Options, Pending, Tree

_RESULTS = re.compile(r"results(_\d.*)?\.json")
_CHECKPOINT = re.compile(r"(?:checkpoint|iter|step|global_step)[_-]?([0-9]{1,15})")
OF_THE_CALL = ("limit", "gen_kwargs", "fewshot_seed")
"""What `config` says of the task; all else there is of the model and the machine."""


def find(directory: Path, options: Options) -> Tree:
    """The results files at and below `directory`. Raises ConfigError for an option that does not fit."""
    passed_over: list[str] = []
    pending, checkpoints = [], set()
    for here, files in base.walk(directory, passed_over):
        for path in (here / name for name in files if _RESULTS.fullmatch(name)):
            try:
                found = _checkpoint(base.load(path), path)
            except AutoEvalError as error:
                passed_over.append(str(error))
                continue
            if found.chosen(options):
                checkpoints.add(found)
                pending.append(Pending(os.fspath(path), partial(_read, directory, path, options)))
    base.check(checkpoints, options)
    return Tree(tuple(pending), tuple(passed_over))


def _checkpoint(data: Any, path: Path) -> Checkpoint:
    """What lm_eval was told to load. Raises AutoEvalError for what is no results file."""
    if not isinstance(data, dict) or not isinstance(data.get("results"), dict):
        raise AutoEvalError(f"{path}: no results file of lm_eval: it has no `results`")
    return checkpoint(*scores.model_of(data))


def checkpoint(model: str, revision: str = "") -> Checkpoint:
    """What a model's name says: of a path, ``…/RUN/checkpoint-N`` or ``…/RUN/iter_N``, and ``name/ITER`` else. Of a
    revision, ``stepN`` is a step, and any other is a part of the name."""
    path, after = Path(model), f"@{revision}" if revision else ""
    if found := _CHECKPOINT.fullmatch(revision):
        return Checkpoint(model + after, model, path.name if path.is_absolute() else model, int(found[1]))
    step: int | None
    if found := _CHECKPOINT.fullmatch(path.name):
        stem, name, step = os.fspath(path.parent), path.parent.name or path.name, int(found[1])
    elif path.is_absolute():
        name, step = base.model_and_step(path.name)
        stem = os.fspath(path.parent / name)
    else:
        stem, step = base.model_and_step(model)
        name = stem
    return Checkpoint(model + after, stem + after, name + after, step)


def _read(directory: Path, path: Path, options: Options) -> Found:
    try:
        data, read = base.load(path), scores.read(path)
        told = _checkpoint(data, path)
        chosen = tuple(scores.chosen(read.scores, options.metrics))
        defined = _definitions(data, options.version or read.versions.get("lm_eval", ""))
    except (ArithmeticError, RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AutoEvalError(f"{path}: no results file of lm_eval ({type(error).__name__}: {error})") from error
    gaps = tuple(f"{path}: {gap}" for gap in read.gaps)
    if not chosen:
        raise AutoEvalError("; ".join((f"{path}: has no score", *gaps)))
    kept = {(s.benchmark, s.metric) for s in chosen}
    samples = [file for task in read.tasks if (file := path.with_name(_samples_name(path, task))).is_file()]
    return Found(
        "lm_eval", told.model, base.name_of(options.run or clean(told.name)),
        base.step_of(told.model or str(path), told.step, options), options.suite or "lm_eval", chosen,
        [i for i in read.instances if (i.benchmark, i.metric) in kept],
        {s.benchmark: defined[s.benchmark] for s in chosen},
        {os.path.relpath(file, directory): base.digest(file) for file in (path, *samples)},
        base.mtime([path]) if read.date is None else read.date,
        read.versions | ({"lm_eval": options.version} if options.version else {}), gaps,
    )  # fmt: skip


def _samples_name(results: Path, task: str) -> str:
    return f"samples_{task}_{results.stem.removeprefix('results').removeprefix('_')}.jsonl"


def _definitions(data: dict[str, Any], version: str) -> dict[str, Any]:
    """How each task and group was evaluated: its configuration, version and shots, the digest of what was asked (where
    samples were kept), the program's version, and what of the call decides it."""
    config, configs = data.get("config") or {}, data.get("configs") or {}
    call = {key: config.get(key) for key in OF_THE_CALL} | {
        "lm_eval": version, "system_instruction": data.get("system_instruction_sha"),
        "chat": bool(data.get("chat_template_sha")), "multiturn": data.get("fewshot_as_multiturn"),
    }  # fmt: skip

    def own(task: str) -> dict[str, Any]:
        told = {key: value for key, value in configs.get(task, {}).items() if key != "metadata"}   # it names the model
        facts = {key: (data.get(key) or {}).get(task) for key in ("versions", "n-shot", "task_hashes")}
        below = {part: own(part) for part in (data.get("group_subtasks") or {}).get(task) or ()}
        return call | {"task": told, "tasks": below} | facts

    return {clean(task): own(task) for task in data["results"]}
