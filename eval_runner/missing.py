"""Why there is no ticket for a step: no suite is due, no checkpoint was handed over, or none was saved."""

from __future__ import annotations

import contextlib
import os

from autoeval_hooks import relay_files
from autoeval_hooks.config import Cadence, map_path
from autoeval_hooks.errors import TicketError
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from eval_runner.config.models import Config
from eval_runner.sinks import wandb_cases


def why(config: Config, tickets: list[Ticket], step: int, suite: str) -> str:
    """One sentence for a suite of the configuration that has no ticket at `step`; `tickets` are those that are known
    of the run or runs that are meant."""
    return _not_due(step, suite, config.suites[suite].cadence) or _never_handed_over(config, tickets, step, suite)


def _not_due(step: int, suite: str, c: Cadence) -> str:
    if c.due(step):
        return ""
    span = f"from step {c.begin_step}" if c.begin_step else ""
    if c.end_step is not None:
        span = f"{span} to step {c.end_step}".strip()
    below = step - step % c.every_steps
    near_by = [s for s in (below, below + c.every_steps) if s and c.due(s)]
    nearest = f"; due near it: {' and '.join(map(str, near_by))}" if near_by else ""
    return (
        f"suite {suite} is not due at step {step}: every {c.every_steps} step(s) {span}".rstrip() + nearest
        + f"; to evaluate it all the same: `python -m autoeval_hooks submit PATH --step {step} --suite {suite}`"
    )  # fmt: skip


def _never_handed_over(config: Config, tickets: list[Ticket], step: int, suite: str) -> str:
    """A suite is due, but no ticket came: was the checkpoint ever saved, is it still there?"""
    submit = f"`python -m autoeval_hooks submit {{}} --step {step} --suite {suite} --config {config.path}`"
    if not tickets:
        return "no ticket was ever queued here: is the callback in the training script, with the same `queue`?"
    same = next((t for t in tickets if t.manifest.step == step), None)
    if same is not None:
        return (
            f"the checkpoint was queued for suite {same.suite}, and not for {suite}, which came to the configuration "
            f"later or was not asked for; queue it: {submit.format(same.manifest.path)}"
        )
    outputs = dict.fromkeys(os.path.dirname(t.manifest.path) for t in tickets)
    for output in outputs:
        path = os.path.join(output, f"checkpoint-{step}")
        if os.path.isdir(map_path(path, config.path_map)):
            return f"{path} is there and was never handed over; see training's log, and queue it: {submit.format(path)}"
    ended = _last_step(config, tickets)
    if ended is not None and step > ended:
        return f"training ended at step {ended}"
    steps = sorted({t.manifest.step for t in tickets})
    if step > steps[-1]:
        return f"no checkpoint of this step was handed over so far; the last one is of step {steps[-1]}"
    around = [s for s in (max((s for s in steps if s < step), default=None), min(s for s in steps if s > step)) if s]
    return (
        f"no checkpoint of this step was ever handed over, and {' and '.join(outputs)} holds none (never saved, or "
        f"deleted before it was); handed over near it: {' and '.join(map(str, around))}"
    )


def _last_step(config: Config, tickets: list[Ticket]) -> int | None:
    """The step that training ended at; None where it has not, or several trainings are meant."""
    runs: set[RunIdentity] = {t.manifest.run for t in tickets}
    steps = []
    for run in runs:
        directory = config.queue / "relay" / run.key
        with contextlib.suppress(TicketError, OSError):
            announced = wandb_cases.read(relay_files.Announcement, directory / "run.json")
            ended = wandb_cases.read(relay_files.Ended, directory / "ended.json")
            if announced and ended and announced.incarnation == ended.incarnation:
                steps.append(ended.last_step)
    return steps[0] if len(steps) == 1 == len(runs) else None
