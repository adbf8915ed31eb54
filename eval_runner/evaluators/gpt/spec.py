"""What passes between the evaluator, in the runner's process, and its worker, a child: files in the working directory.

    spec.json       what the worker is to do; no secret stands in it, since the worker has the runner's environment
    progress.jsonl  a line now and then: how far the phase is
    error.json      why the worker failed
    prepared.json   what `prepare` found
    outcome.json    what `review` found
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from autoeval_hooks import strict
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.fsio import replace
from eval_runner.evaluators.base import Context, Outcome
from eval_runner.results.schema import Detail, Evaluation, Instance
from eval_runner.servers.base import Endpoint

T = TypeVar("T")
Phase = Literal["prepare", "answers", "review"]

SPEC, PROGRESS, ERROR, PREPARED, OUTCOME = (
    "spec.json", "progress.jsonl", "error.json", "prepared.json", "outcome.json"
)  # fmt: skip
MAX_BYTES = 1 << 30
_KINDS: dict[str, type[AutoEvalError]] = {"configuration": ConfigError, "checkpoint": CheckpointError}


@dataclass(frozen=True)
class Spec:
    """One checkpoint and one entry of a suite. `settings` is the entry as it is written; `name`, `digest`, `step`,
    `tokenizer`, `window` (tokens that fit the model, None where nothing says it) and `facts` are the checkpoint's.
    `evaluation` stands for this evaluation of this checkpoint in all its attempts, `provenance` for the files."""

    settings: dict[str, Any]
    base_dir: str
    environments: str
    where: str
    config_file: str
    server: str
    cache: str
    name: str
    digest: str
    step: int
    tokenizer: str
    window: int | None
    facts: dict[str, str]
    evaluation: str
    provenance: dict[str, str]
    endpoint: dict[str, str | None] | None = None

    @property
    def context(self) -> Context:
        return Context(
            Path(self.base_dir), Path(self.environments), self.where, self.config_file, self.server, Path(self.cache)
        )

    @property
    def served(self) -> Endpoint | None:
        return Endpoint(**self.endpoint) if self.endpoint else None  # type: ignore[arg-type]  # as `write` found it


@dataclass(frozen=True)
class Prepared:
    """What `prepare` found: how many questions the checkpoint has not answered yet."""

    missing: int


@dataclass(frozen=True)
class _Told:
    evaluation: Evaluation
    instances: tuple[Instance, ...] = ()
    details: tuple[Detail, ...] = ()


@dataclass(frozen=True)
class Failed:
    kind: str
    message: str


@dataclass(frozen=True)
class Progress:
    fraction: float
    what: str = field(default="")


def write(path: Path, content: Any) -> None:
    """A dataclass of this module; the directory is private to the evaluation."""
    replace(str(path), json.dumps(asdict(content), allow_nan=False).encode())


def read_spec(path: Path) -> Spec:
    return Spec(**json.loads(path.read_bytes()))


def write_outcome(path: Path, outcome: Outcome) -> None:
    write(path, _Told(outcome.evaluation, tuple(outcome.instances), tuple(outcome.details)))


def read_outcome(path: Path) -> Outcome:
    """Raises AutoEvalError where it is not what the worker writes."""
    told = _read(_Told, path)
    return Outcome(told.evaluation, told.instances, told.details)


def read_prepared(path: Path) -> Prepared:
    """Raises AutoEvalError where it is not what the worker writes."""
    return _read(Prepared, path)


def error_of(path: Path) -> AutoEvalError | None:
    """The error that the worker ended with; None where it left none, as when it was killed."""
    if not path.exists():
        return None
    failed = _read(Failed, path)
    return _KINDS.get(failed.kind, AutoEvalError)(failed.message)


def tell(path: Path, fraction: float, what: str) -> None:
    """Add a line of progress."""
    line = json.dumps(asdict(Progress(min(max(fraction, 0.0), 1.0), what))).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line)


def last_progress(path: Path) -> Progress | None:
    """The last whole line; None where there is none yet."""
    with contextlib.suppress(OSError, ValueError, TypeError), path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().split(b"\n")
        if len(lines) > 1:
            return Progress(**json.loads(lines[-2]))
    return None


def _read(cls: type[T], path: Path) -> T:
    errors: list[str] = []
    try:
        found = strict.parse(cls, path.read_bytes(), path.name, errors, max_bytes=MAX_BYTES)
    except OSError as error:
        raise AutoEvalError(f"the worker left no {path.name} ({error.strerror})") from error
    if found is None:
        raise AutoEvalError(f"the worker wrote what it does not read: {'; '.join(errors[:3])}")
    return found
