"""Say what lm_eval makes of some tasks' names; neither a model nor data are loaded.

    python autoeval_lm_eval_probe.py REQUEST ANSWER

Runs inside the environment of lm_eval, which has no autoeval. The answer has, for each name, either what is `wrong`
and the `near` names, or the `tasks` and `groups` that it stands for, those marked `unsafe`, and the local `files`
that they take their documents from.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Skipped(logging.Handler):
    """The definitions that lm_eval cannot read, which it passes over without a word."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Skip"):
            self.found.append(" ".join(record.getMessage().removeprefix("Skip ").split()))


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request of `directory`, `include_path` and `tasks`."""
    import torch
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    os.chdir(request["directory"])
    skipped, logger = Skipped(), logging.getLogger("lm_eval.tasks._index")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(skipped)
    manager = TaskManager(include_path=request["include_path"], metadata={})
    below = request["include_path"]
    return {
        "tasks": {name: _look(name, manager.task_index) for name in request["tasks"]},
        "skipped": [line for line in skipped.found if below and line.startswith(below)],
        "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")},
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }


def _look(name: str, index: dict[str, Any]) -> dict[str, Any]:
    if name not in index:
        return {"wrong": f"lm_eval has no task {name!r}", "near": difflib.get_close_matches(name, index, n=1)}
    found: dict[str, Any] = {"tasks": [], "groups": [], "unsafe": [], "files": []}
    for kind, one, config in _walk(name, index, ()):
        if kind == "wrong":
            return {"wrong": one, "near": difflib.get_close_matches(config["name"], index, n=1)}
        found[kind].append(one)
        if kind == "tasks":
            found["unsafe"] += [one] if config.get("unsafe_code") else []
            found["files"] += _files(config)
    return {key: list(dict.fromkeys(value)) for key, value in found.items()}


def _walk(name: str, index: dict[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The groups and tasks that a name stands for."""
    entry = index[name]
    config = entry.cfg or {}
    if name in above:
        yield "wrong", f"group {name!r} is a part of itself", {"name": name}
        return
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _walk(task, index, (*above, name))
    elif entry.kind.name == "GROUP":
        yield "groups", name, config
        for part in config.get("task") or []:
            yield from _part(part, name, index, above)
    else:
        yield "tasks", name, config


def _part(part: Any, group: str, index: dict[str, Any], above: tuple[str, ...]) -> Any:
    """A part of a group: a name, a task with changes, or a group or task that is defined right there."""
    named = part if isinstance(part, str) else part.get("group") or part.get("task") if isinstance(part, dict) else None
    if isinstance(named, str) and named in index:
        yield from _walk(named, index, (*above, group))
    elif isinstance(part, dict) and isinstance(part.get("task"), list):
        yield "groups", f"{group}::{named}", part
        for inner in part["task"]:
            yield from _part(inner, group, index, above)
    elif isinstance(part, dict) and part.get("dataset_path"):
        yield "tasks", f"{group}::{named}", part
    else:
        yield "wrong", f"group {group!r} names the task {named or part!r}, which there is not", {"name": str(named)}


def _files(config: dict[str, Any]) -> list[str]:
    """The local files and directories that a task takes its documents from."""
    options = config.get("dataset_kwargs") or {}
    given = [config.get("dataset_path"), options.get("data_dir")]
    files = options.get("data_files")
    given += list(files.values()) if isinstance(files, dict) else [files]
    flat = [one for item in given for one in (item if isinstance(item, list) else [item])]
    return [str(path.absolute()) for one in flat if isinstance(one, str) and (path := Path(one)).exists()]


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
