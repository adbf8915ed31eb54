"""One attempt at a ticket: from a checkpoint to its result, in memory. What becomes of the ticket is `runner`'s."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Token
from autoeval_hooks.ticket import Ticket
from eval_runner import registry, scratch
from eval_runner.checkpoints.base import Prepare, Request, Servable
from eval_runner.config.models import Config, Suite
from eval_runner.evaluators.base import Evaluator, Job
from eval_runner.lease import limits
from eval_runner.parts import Kept
from eval_runner.progress import Progress
from eval_runner.results.schema import VERSION, Detail, Evaluation, Instance, Result
from eval_runner.servers.base import Server, Serving
from eval_runner.servers.shared import Shared


@dataclass(frozen=True)
class Attempt:
    """A ticket in hand, and what every record of it has in common. `suite` is the one of its name here."""

    ticket: Ticket
    token: Token
    suite: Suite
    started_at: float = field(default_factory=time.time)

    @property
    def ours(self) -> bool:
        """Whether the ticket is for the suite as it is defined here."""
        return self.suite.digest == self.ticket.suite_digest

    def result(self, status: Literal["ok", "failed", "refiled"], **outcome: Any) -> Result:
        m = self.ticket.manifest
        return Result(
            version=VERSION, ticket=self.ticket.id, generation=self.token.generation, runner=self.token.runner,
            status=status, suite=self.suite.name, suite_digest=self.ticket.suite_digest,
            suite_text=self.suite.text if self.ours else "",     # a definition that is not here cannot be told
            run=m.run, checkpoint=m.path, checkpoint_digest=m.digest, step=m.step, tokens=m.tokens,
            saved_at=m.saved_at, started_at=self.started_at, finished_at=time.time(), **outcome,
        )  # fmt: skip


def evaluate(
    attempt: Attempt, evaluators: Sequence[Evaluator], server: Server | None, config: Config,
    stopping: Callable[[], bool], show: Progress, ops: FileOps,
) -> tuple[Result, list[Instance], list[Detail]]:  # fmt: skip
    """Verify the checkpoint, evaluate it, verify it again. Raises what adapters, servers and evaluators raise."""
    ticket, section = attempt.ticket, config.runner
    log = f"{config.queue}/logs/{attempt.token.result_name}"
    prepare: Prepare = registry.get("checkpoints", ticket.manifest.kind, f"the manifest of {ticket.manifest.path}")
    if ticket.manifest.kind == "megatron" and server is None and config.convert is None:
        raise _no_server(config, ticket.manifest.path)      # before its files are read
    evaluations: list[Evaluation] = []
    instances: list[Instance] = []
    details: list[Detail] = []
    with scratch.directory() as work:
        request = Request(
            ticket, config, work, Path(f"{log}.{ticket.manifest.kind}.log"), stopping,
            partial(show.evaluation, ticket), limits(section.lease, section.timeout),
        )  # fmt: skip
        with prepare(request) as checkpoint, _served(attempt, server, checkpoint, config, work, stopping) as served:
            server_facts = server.facts(checkpoint) if server and served else {}
            record = checkpoint.megatron
            for i, evaluator in enumerate(evaluators):
                kind = attempt.suite.evaluators[i]["type"]
                own = work / f"{i}-{kind}"
                own.mkdir()
                job = Job(
                    path=checkpoint.path, tokenizer=checkpoint.tokenizer, name=_model_name(ticket), work_dir=own,
                    digest=ticket.manifest.digest, step=ticket.manifest.step,
                    trust_remote_code=section.trust_remote_code,
                    log=Path(f"{log}.{i}-{kind}.log"),
                    endpoint=served.endpoint if served else None,
                    release=partial(served.release, keep=i + 1 < len(evaluators)) if served else lambda: None,
                    loadable=record is None,
                    max_length=record.seq_length or None if record and served else None,
                    stopping=served.stopping if served else stopping,
                    progress=show.evaluation(ticket, kind),
                    finished=Kept(
                        config.queue, i, lambda done: attempt.result("ok", evaluations=done), checkpoint.unchanged, ops
                    ),
                    limits=limits(section.lease, section.timeout),
                    facts=checkpoint.facts, server_facts=server_facts,
                )  # fmt: skip
                with served.answering() if served else contextlib.nullcontext():
                    outcome = evaluator.evaluate(job)
                evaluations.append(outcome.evaluation)
                instances.extend(outcome.instances)
                details.extend(outcome.details)
                scratch.remove(own)
            checkpoint.unchanged()
    return attempt.result("ok", evaluations=tuple(evaluations)), instances, details


@contextlib.contextmanager
def _served(
    attempt: Attempt, server: Server | None, checkpoint: Servable, config: Config, work: Path,
    stopping: Callable[[], bool],
) -> Iterator[Shared | None]:  # fmt: skip
    """The ticket's server, which starts when it is first asked for; None where evaluators load the checkpoint."""
    if server is None or not server.serves(checkpoint):
        if checkpoint.megatron is not None:
            raise _no_server(config, attempt.ticket.manifest.path)
        yield None
        return
    own = work / "server"
    own.mkdir()
    serving = Serving(
        checkpoint, _model_name(attempt.ticket), attempt.ticket.manifest.step, own,
        config.queue / "logs" / f"{attempt.token.result_name}.server.log", stopping,
        limits(config.runner.lease, None), config.runner.trust_remote_code,
    )  # fmt: skip
    with Shared(server, serving) as shared:
        yield shared


def _no_server(config: Config, checkpoint: str) -> ConfigError:
    what = f"server: {config.server['type']} does not serve" if config.server else "nothing here serves or converts"
    return ConfigError(
        f"{config.path}: {what} checkpoints of Megatron-LM such as {checkpoint}; add "
        "`server: {type: megatron, checkout: DIRECTORY OF MEGATRON-LM}`, or `convert: {command: [PROGRAM, ARGUMENT…]}`"
    )


def _model_name(ticket: Ticket) -> str:
    """Unique for the weights; `Job.digest` is for the checkpoint with its configuration and tokenizer."""
    m = ticket.manifest
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", Path(m.path).name).lstrip(".-")[:80]
    return f"{readable or 'checkpoint'}-{m.weights_digest[:16]}"
