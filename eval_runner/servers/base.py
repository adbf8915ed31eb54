"""What a server is: one process group that answers for one checkpoint, shared by all evaluators of a ticket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from autoeval_hooks.errors import AutoEvalError

if TYPE_CHECKING:       # both import this module
    from eval_runner.checkpoints.base import Servable
    from eval_runner.evaluators.base import Limits


@dataclass(frozen=True)
class Endpoint:
    """Where a served checkpoint answers. `url` is without a slash at its end.

    `api` is ``megatron`` (Megatron-LM's static server: `PUT /api`, `POST /completions`) or ``openai``
    (`POST /v1/completions` below `url`, with `model` as the model's name; it answers with the same name).
    `api_key_env` is the variable of the environment that holds its key, None where it asks for none.
    """

    url: str
    api: Literal["megatron", "openai"]
    model: str
    api_key_env: str | None = None


@dataclass(frozen=True)
class Serving:
    """A checkpoint to be served. `name` is the model's name, unique for the weights; `step` the training step.

    `work_dir` is empty, private to this server, and removed after it; `log` takes what the server writes.
    `stopping` is true once the server must end; `limits` as in `evaluators.base.Job`, but without a timeout.
    `trust_remote_code` says whether code that the checkpoint brings may run.
    """

    checkpoint: Servable
    name: str
    step: int
    work_dir: Path
    log: Path
    stopping: Callable[[], bool]
    limits: Limits
    trust_remote_code: bool = False


class Running(Protocol):
    """A server that answers."""

    endpoint: Endpoint

    def failure(self, wait: float = 0.0) -> AutoEvalError | None:
        """Why it answers no more, though nobody ended it; None while it does. Answers at once; where the server looks
        as if it were ending, or only the server itself can tell, up to `wait` seconds are taken to know."""

    def close(self) -> None:
        """End it, with all that it started. It may be called again."""


class Server(Protocol):
    """Built once from the `server:` section (less `type`), used for many tickets.

    `__init__(self, settings: dict, context: evaluators.base.Context)` raises ConfigError that names the key.
    """

    def check(self) -> None:
        """Raise ConfigError unless everything that does not depend on a checkpoint is in place."""

    def serves(self, checkpoint: Servable) -> bool:
        """Whether checkpoints of this kind are served; evaluators load others themselves, where they can."""

    def facts(self, checkpoint: Servable) -> dict[str, str]:
        """By what the checkpoint is served: all that can change an answer. Known before anything is started. Raises
        ConfigError where this server, as it is configured, cannot serve this checkpoint."""

    def start(self, serving: Serving) -> Running:
        """Start it, and return once it answers. Raises ConfigError for what another try will not mend, any other
        AutoEvalError for what it may, and `eval_runner.process.Stopped` when told to stop; nothing is left then."""
