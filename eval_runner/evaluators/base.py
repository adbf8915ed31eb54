"""What an evaluator is: it turns a checkpoint on disk into scores, in a child process that it can be robbed of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autoeval_hooks.errors import AutoEvalError
from eval_runner import process
from eval_runner.results.schema import Detail, Evaluation, Instance
from eval_runner.servers.base import Endpoint


@dataclass(frozen=True)
class Outcome:
    """The scores, every per-instance value that they were computed from, and what people may want to read of them."""

    evaluation: Evaluation
    instances: Iterable[Instance] = field(default=())
    details: Iterable[Detail] = field(default=())


class Parts:
    """Parts of an evaluation that outlive an attempt which is cut short. This one keeps nothing.

    `key` is text that says all which makes the answer what it is, beyond the checkpoint and the evaluator's place
    in the suite: what is asked, the programs' versions, the data's digests, the settings.
    """

    def get(self, key: str) -> Outcome | None:
        """A part that an earlier attempt at the same ticket finished."""
        return None

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep a part. Raises CheckpointError where the checkpoint was changed since it was verified."""


@dataclass(frozen=True)
class Limits:
    """How long a program may take, in seconds: `timeout` in all, `grace` to end by itself once it is told to,
    `silence` when its runner stands still."""

    timeout: float | None = None
    grace: float = process.GRACE_S
    silence: float = process.SILENCE_S


@dataclass(frozen=True)
class Job:
    """One checkpoint to evaluate.

    `path` is a verified directory in Hugging Face layout, `tokenizer` likewise; `name` is unique for
    these weights (it holds their digest), so that no cache of any evaluator can mistake them; `digest` stands for all
    files of the checkpoint, as what is answered depends on its configuration, tokenizer and chat template, too. `step`
    is the step of training.
    `endpoint` is None where nothing serves the checkpoint. Else calling it starts the ticket's one server, if it does
    not run yet, and says where it answers; `release` says that it is needed no more, and raises why it failed, if it
    did: it ends, unless another evaluator follows, and what becomes of it is no reason to stop. Without `loadable`,
    `path` is of no use to an evaluator, which must ask the server; `max_length` is how many tokens fit then.
    `facts` says by what the checkpoint was converted, `server_facts` by what it is served: they belong to the result's
    versions, and to the key of every part of it; `server_facts` only where the evaluator asks the server.
    `work_dir` is empty, private to this attempt, and removed after it.
    `trust_remote_code` says whether code that the checkpoint brings may run; without it none does.
    `stopping` is true once the evaluation must end (the lease was lost, the ticket cancelled, the runner stops).
    `progress` is called with a fraction from 0 to 1 and what is being done.
    `finished` keeps the parts of the evaluation for another attempt, should this one be cut short.
    """

    path: Path
    tokenizer: Path
    name: str
    work_dir: Path
    log: Path
    digest: str = ""
    step: int = 0
    endpoint: Callable[[], Endpoint] | None = None
    release: Callable[[], None] = lambda: None
    loadable: bool = True
    max_length: int | None = None
    facts: dict[str, str] = field(default_factory=dict)
    server_facts: dict[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False
    stopping: Callable[[], bool] = lambda: False
    progress: Callable[[float, str], None] = lambda fraction, what: None
    finished: Parts = field(default_factory=Parts)
    limits: Limits = field(default_factory=Limits)
    _started: float = field(default_factory=time.monotonic, init=False)

    def run(
        self, argv: list[str], *, env: dict[str, str] | None, cwd: Path | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:  # fmt: skip
        """`process.run` in `cwd`, by default `work_dir`, within the limits; what `limits.timeout` allows is for all
        runs of the job."""
        timeout = self.limits.timeout
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - self._started))
        try:
            return process.run(
                argv, log=self.log, env=env, cwd=cwd or self.work_dir, stopping=self.stopping, timeout=left,
                grace=self.limits.grace, silence=self.limits.silence, on_tick=on_tick,
            )  # fmt: skip
        except process.TimedOut as error:
            raise AutoEvalError(
                f"not done after {timeout:g} s, so it was ended: does it hang? See its log, or raise `runner.timeout`; "
                f"log: {self.log}"
            ) from error


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
    server: str = ""
    """The type of the configured `server:`; "" where there is none."""
    cache: Path | None = None
    """A directory that all runners of the queue share, for what must not be asked twice; None in tests."""
