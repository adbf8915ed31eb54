"""One attempt at a ticket: from a checkpoint to its result, in memory. What becomes of the ticket is `runner`'s."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Token
from autoeval_hooks.ticket import Ticket
from eval_runner import scratch
from eval_runner.checkpoints import huggingface
from eval_runner.config.models import Config, Suite
from eval_runner.evaluators.base import Evaluator, Job
from eval_runner.lease import limits
from eval_runner.parts import Kept
from eval_runner.progress import Progress
from eval_runner.results.schema import VERSION, Evaluation, Instance, Result


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
    attempt: Attempt, evaluators: Sequence[Evaluator], config: Config, stopping: Callable[[], bool], show: Progress,
    ops: FileOps,
) -> tuple[Result, list[Instance]]:  # fmt: skip
    """Verify the checkpoint, evaluate it, verify it again. Raises what `huggingface.verify` and evaluators raise."""
    ticket, section = attempt.ticket, config.runner
    checkpoint = huggingface.verify(
        ticket, config.path_map, allow_pickled_weights=section.allow_pickled_weights,
        trust_remote_code=section.trust_remote_code,
    )  # fmt: skip
    evaluations: list[Evaluation] = []
    instances: list[Instance] = []
    for i, evaluator in enumerate(evaluators):
        kind = attempt.suite.evaluators[i]["type"]
        with scratch.directory() as work:
            job = Job(
                path=checkpoint.path, tokenizer=checkpoint.tokenizer, name=_model_name(ticket), work_dir=work,
                trust_remote_code=section.trust_remote_code,
                log=config.queue / "logs" / f"{attempt.token.result_name}.{i}-{kind}.log",
                stopping=stopping,
                progress=show.evaluation(ticket, kind),
                finished=Kept(
                    config.queue, i, lambda done: attempt.result("ok", evaluations=done), checkpoint.unchanged, ops
                ),
                limits=limits(section.lease, section.timeout),
            )  # fmt: skip
            outcome = evaluator.evaluate(job)
            evaluations.append(outcome.evaluation)
            instances.extend(outcome.instances)
    checkpoint.unchanged()
    return attempt.result("ok", evaluations=tuple(evaluations)), instances


def _model_name(ticket: Ticket) -> str:
    """Unique for the weights: no cache of any evaluator can take another checkpoint's answers for this one's."""
    m = ticket.manifest
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", Path(m.path).name).lstrip(".-")[:80]
    return f"{readable or 'checkpoint'}-{m.weights_digest[:16]}"
