"""What an evaluator is: it turns a checkpoint on disk into scores, in a child process that it can be robbed of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from eval_runner.results.schema import Evaluation, Instance


@dataclass(frozen=True)
class Job:
    """One checkpoint to evaluate.

    `path` is a verified directory in Hugging Face layout, `tokenizer` likewise; `name` is unique for
    these weights (it holds their digest), so that no cache of any evaluator can mistake them.
    `work_dir` is empty, private to this attempt, and kept beside the result as long as `keep_work` says.
    `stopping` is true once the evaluation must end (the lease was lost, the runner stops).
    `progress` is called with a fraction from 0 to 1 and what is being done.
    """

    path: Path
    tokenizer: Path
    name: str
    work_dir: Path
    log: Path
    stopping: Callable[[], bool] = lambda: False
    progress: Callable[[float, str], None] = lambda fraction, what: None


@dataclass(frozen=True)
class Outcome:
    """The scores, and every per-instance value that they were computed from."""

    evaluation: Evaluation
    instances: Iterable[Instance] = field(default=())


class Evaluator(Protocol):
    """Built once from its `evaluators:` entry in the suite (less `type`), used for many checkpoints.

    `__init__(self, settings: dict, context: Context)` raises ConfigError that names the key.
    """

    def check(self) -> None:
        """Raise ConfigError unless everything that does not depend on a checkpoint is in place."""

    def evaluate(self, job: Job) -> Outcome:
        """Evaluate. Raises CheckpointError or ConfigError for what another try will not mend,
        any other AutoEvalError for what it may, and `eval_runner.process.Stopped` when told to stop.
        A score that was asked for and is missing is an error, never a gap and never a zero."""


@dataclass(frozen=True)
class Context:
    """What an evaluator may know of its runner; every path is one of this host."""

    base_dir: Path
    """The directory of autoeval.yaml."""
    environments: Path
    """The directory of managed virtual environments."""
    where: str
    """The key path of the settings, for messages: ``suites.quick.evaluators[0]``."""
    config_file: str = ""
    """The file that the settings stand in, for messages."""
