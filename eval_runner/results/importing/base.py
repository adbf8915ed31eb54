"""What the readers of foreign results have in common: what they find, and how they read files that anybody wrote."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.results.schema import Instance, Score

MAX_FILE_BYTES = 512 << 20
"""Of one file. HELM writes some 4 KB for each instance."""
MAX_NAME = 200
MAX_DEPTH = 6
"""How deep below the directory that is imported files are looked for; links to directories are not followed."""


@dataclass(frozen=True)
class Options:
    """What the user says of the results. `run` names their run, where it is not to be the model's; only results of the
    model `model` are taken, where it is given; `step` is the checkpoint's, where the files do not tell it; `version` is
    the evaluator's likewise; `metrics` has the metrics to read by benchmark."""

    run: str = ""
    model: str = ""
    step: int | None = None
    suite: str = ""
    version: str = ""
    metrics: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """The scores of one checkpoint, as another program wrote them.

    `definitions` says of each benchmark, by its name, how it was evaluated: what has another definition is not compared
    with it. `files` has the digests of the files that were read, by their path below the directory that is imported;
    `written_at` is when the scores were written, in seconds since the epoch. `passed_over` has a line for each part
    that could not be read.
    """

    evaluator: str
    model: str
    run: str
    step: int
    suite: str
    scores: tuple[Score, ...]
    instances: list[Instance]
    definitions: dict[str, Any]
    files: dict[str, str]
    written_at: float
    versions: dict[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """What a program's files call a checkpoint: `model` in full, `base` without its step, `name` the run's; `step` is
    None where the name tells none."""

    model: str
    base: str
    name: str
    step: int | None

    def chosen(self, options: Options) -> bool:
        """Whether the user wants its results."""
        return not options.model or options.model in (self.model, self.base, self.name)


@dataclass(frozen=True)
class Pending:
    """A checkpoint's results that are still to be read. `read` raises AutoEvalError for what cannot be taken."""

    title: str
    read: Callable[[], Found]


@dataclass(frozen=True)
class Tree:
    """What a directory holds: `passed_over` has a line for each thing in it that is no result and should be one."""

    pending: tuple[Pending, ...]
    passed_over: tuple[str, ...] = ()


# ---------------------------------------------------------------------- files


def regular(path: Path) -> int:
    """The size of a file in bytes. Raises AutoEvalError for what is none, or is too large to be read."""
    try:
        seen = os.stat(path)
    except OSError as error:
        raise AutoEvalError(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(seen.st_mode):
        raise AutoEvalError(f"{path}: is no file")
    if seen.st_size > MAX_FILE_BYTES:
        raise AutoEvalError(f"{path}: has {seen.st_size} bytes, the limit is {MAX_FILE_BYTES}")
    return seen.st_size


def digest(path: Path) -> str:
    """sha256 (hex) of a file. Raises AutoEvalError as `regular` does."""
    regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AutoEvalError(f"{path}: cannot be read ({error.strerror})") from error


def load(path: Path) -> Any:
    """JSON that somebody else wrote. Raises AutoEvalError that names the file."""
    regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AutoEvalError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise AutoEvalError(f"{path}: not valid JSON ({error}); is it torn?") from error


def walk(
    directory: Path, passed_over: list[str], leave_out: frozenset[str] = frozenset()
) -> Iterator[tuple[Path, list[str]]]:
    """The directories at and below `directory` with the names of their files, sorted. Links to directories, hidden ones
    and those named in `leave_out` are not entered; `passed_over` gets a line for each that cannot be listed.

    Raises ConfigError where `directory` cannot be listed.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: not a directory; name the one that holds the results")

    def failed(error: OSError) -> None:
        if error.filename == os.fspath(directory):
            raise ConfigError(f"{directory}: cannot be listed ({error.strerror})") from error
        passed_over.append(f"{error.filename}: cannot be listed ({error.strerror})")

    start = len(directory.parts)
    for root, directories, files in os.walk(directory, onerror=failed):
        here = Path(root)
        deep = len(here.parts) - start >= MAX_DEPTH
        directories[:] = [] if deep else sorted(d for d in directories if d not in leave_out and not d.startswith("."))
        yield here, sorted(files)


def mtime(paths: list[Path]) -> float:
    """When the last of these files was written, in seconds since the epoch."""
    return max(0.0, *(os.stat(path).st_mtime for path in paths))


# ---------------------------------------------------------------------- names

_STEP = re.compile(r"(?P<a>.+)/(?:(?:iter|step|checkpoint)[_-])?(?P<x>[0-9]{1,15})|(?P<b>.+)[_](?P<y>[0-9]{1,15})")


def model_and_step(name: str) -> tuple[str, int | None]:
    """A model's name without its step, and the step: ``name/ITER`` or ``name_ITER``; None where it tells none."""
    found = _STEP.fullmatch(name.rstrip("/"))
    if found is None:
        return name, None
    return (found["a"], int(found["x"])) if found["a"] else (found["b"], int(found["y"]))


def step_of(model: str, step: int | None, options: Options) -> int:
    """The step that the user or the model's name tells. Raises ConfigError where neither does."""
    known = step if options.step is None else options.step
    if known is None:
        raise ConfigError(f"{model}: its name tells no step; say it by --step N")
    return known


def name_of(run: str, what: str = "the run's name") -> str:
    """The name, if it is one that people can read. Raises ConfigError."""
    if not run or len(run) > MAX_NAME or not run.isprintable():
        raise ConfigError(f"{what} {run!a:.80} is none that people can read; give another by --run NAME")
    return run


def check(checkpoints: set[Checkpoint], options: Options) -> None:
    """Raise ConfigError where one step would stand for several checkpoints, or one run for several models."""
    choose = "choose by --model, or import their directories one by one"
    steps = {f"{c.base}{'' if c.step is None else f' at {c.step}'}" for c in checkpoints}
    if options.step is not None and len(steps) > 1:
        raise ConfigError(f"--step is for the results of one checkpoint, and there are {_some(steps)}; {choose}")
    models: dict[str, set[str]] = {}
    for checkpoint in checkpoints:
        models.setdefault(options.run or checkpoint.name, set()).add(checkpoint.base)
    for run, several in sorted(models.items()):
        if len(several) > 1 and options.run:
            raise ConfigError(f"--run is for the results of one model, and there are {_some(several)}; {choose}")
        if len(several) > 1:
            raise ConfigError(f"the run {run} would be of several models, {_some(several)}; "
                              "import them one by one, by --model MODEL --run NAME")  # fmt: skip


def _some(names: set[str]) -> str:
    return f"{len(names)}: {', '.join(sorted(names)[:4])}"
