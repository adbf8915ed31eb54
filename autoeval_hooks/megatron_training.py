"""A training with Megatron as the process that owns W&B sees it: what is handed over when, and what comes back.

It knows Megatron's directories and nothing of its modules. `megatron` tells it what Megatron does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from autoeval_hooks import layouts, manifest
from autoeval_hooks.config import HookConfig
from autoeval_hooks.delivery import Delivery, log
from autoeval_hooks.errors import AutoEvalError, IncompleteError
from autoeval_hooks.handover import (
    Handover,
    Save,
    began_ns,
    due,
    identity,
    remember,
    training_id,
)
from autoeval_hooks.manifest import MegatronRecord
from autoeval_hooks.queue import Queue
from autoeval_hooks.relay import Relay
from autoeval_hooks.retention import tidy_pins
from autoeval_hooks.run_identity import RunIdentity

SETTLE_S = 60.0
"""For so long after its save, a checkpoint may look incomplete: another node wrote what says that it is complete."""


class NotYet(AutoEvalError):
    """A checkpoint that was saved, and that the file system does not show whole yet. Delivery tries again."""


@dataclass(frozen=True)
class Facts:
    """What is known of a training when it begins, all of it from memory.

    `save_dir` is its absolute `--save`; `resumed_at` the iteration that was loaded, 0 for a fresh start; `resumed_here`
    says that it was loaded from `save_dir`; `record` describes its checkpoints, `with_files` adds the tokenizer's
    files to that (it reads them); `samples_at` estimates samples consumed at an iteration, or knows none; at every
    `row_every`-th iteration training begins a row in W&B, None: never by iteration.
    """

    save_dir: str
    resumed_at: int
    resumed_here: bool
    planned_last_step: int | None
    record: MegatronRecord
    with_files: Callable[[MegatronRecord], MegatronRecord]
    samples_at: Callable[[int], int | None]
    row_every: int | None


class Training:
    """One training, on the one process that owns W&B. Its methods belong to the training thread, read memory only, and
    return at once, but for `save_begins` and `ends`, which wait `hook.deadline` seconds at most."""

    def __init__(self, config: HookConfig, delivery: Delivery, facts: Facts) -> None:
        self.config, self.facts = config, facts
        self._queue, self._delivery = Queue(config.queue), delivery
        self._run = identity(config)        # `wandb.finish()` may come before the last save is complete
        self._begun: dict[int, tuple[int | None, float]] = {}
        self._handed_over: set[int] = set()
        self._known_since_ns: int | None = None
        self._id = ""
        self._record: MegatronRecord | None = None
        self._relay: Relay | None = None
        self._step = facts.resumed_at

    def begins(self) -> None:
        self._delivery.put(self._begin, f"starting in {self.facts.save_dir}")
        self._delivery.put(self._open, f"opening the queue {self.config.queue}")
        if self.config.hook.save_total_limit is not None:
            log.warning(
                "autoeval: hook.save_total_limit = %d of %s is not used: Megatron keeps its own checkpoints; see its "
                "--save-retain-interval", self.config.hook.save_total_limit, self.config.path,
            )  # fmt: skip

    def save_begins(self, step: int, samples: int | None) -> None:
        """Before a save, after which an earlier checkpoint may be deleted."""
        self._begun[step] = samples, time.time()
        self._delivery.flush(self.config.hook.deadline)

    def saved(self, path: str, step: int, samples: int | None) -> None:
        """A save is complete. `samples` are those consumed by now, for a save whose beginning was not seen."""
        samples, saved_at = self._begun.pop(step, (samples, time.time()))
        self._hand_over(Save(path, step, self._run, saved_at, samples, self._tokens(step, samples)), SETTLE_S)
        if any(later > step for later in self._begun):      # once that is complete, too, this one may be deleted
            self._delivery.flush(self.config.hook.deadline)

    def logged(self, step: int) -> None:
        """Training has logged an iteration, to W&B or not."""
        self._step = step
        relay, every = self._relay, self.facts.row_every
        if relay is None:
            return
        if every and step % every == 0:     # a new row is open (asking the W&B run for its step is no look into memory)
            relay.on_log()
        if self.facts.planned_last_step is not None and step >= self.facts.planned_last_step:
            relay.end(step, 0.0)        # Megatron may finish its W&B run before it is back from training

    def ends(self) -> None:
        """Training is over; a last save may still come."""
        if self._relay is not None:
            self._relay.end(self._step, self.config.hook.deadline)

    def deliver_the_rest(self) -> None:
        """The end of the process: waits for hand-overs as long as they go on, `hook.deadline` seconds for each step."""
        if not self._delivery.finish(self.config.hook.deadline):
            log.warning(
                "autoeval: not every checkpoint was handed over when training ended; see the warnings above, then run "
                "`python -m autoeval_hooks submit CHECKPOINT --step N --config %s`", self.config.path,
            )  # fmt: skip

    # ---------------------------------------------------------------- in the background

    def _hand_over(self, save: Save, settle_s: float, then: Callable[[], None] = lambda: None) -> None:
        """`then` comes after the first try, whatever came of it."""
        suites = due(self.config, save.step)
        if not suites:
            return
        handover, first_try = Handover(self.config, self._queue, save, suites), 0.0

        def run() -> None:
            nonlocal first_try
            first, first_try = not first_try, first_try or time.monotonic()
            try:
                handover.save = replace(save, run=self._named(), megatron=self._described())
                handover.run()
                self._handed_over.add(save.step)
            except IncompleteError as error:
                if time.monotonic() - first_try >= settle_s:
                    raise
                raise NotYet(str(error)) from error
            finally:
                if first:
                    then()

        self._delivery.put(run, f"handing over {save.path}", handover.abandon)

    def _begin(self) -> None:
        directory, resumed = self.facts.save_dir, self.facts.resumed_at > 0
        if not self._id:        # at another try, we would be known since now
            self._known_since_ns = began_ns(directory) if resumed else None
            self._id = training_id(directory, resumed=resumed)
        remember(directory, self._named())

    def _open(self) -> None:
        self._queue.create()
        run = self._named()
        if run.wandb_id and self._relay is None:
            relay = Relay(
                os.path.join(self.config.queue, "relay", run.key), run, logs_by_step=True,
                planned_last_step=self.facts.planned_last_step,
            )  # fmt: skip
            relay.start()
            self._relay = relay
        tidy_pins(self._queue, self.facts.save_dir)
        self._reconcile()

    def _reconcile(self) -> None:
        """Hand over complete checkpoints of this training that have no ticket: it may have died before delivery, and
        a killed asynchronous save has no event. What has its ticket is recognised by its id.

        Checkpoints from before we were first seen here may be another training's, but for the one resumed from."""
        first = 0 if self._known_since_ns is not None else self.facts.resumed_at
        if self.facts.resumed_at == 0 or (self._known_since_ns is None and not self.facts.resumed_here):
            return
        found = []
        for step, path in _iterations(self.facts.save_dir):
            wanted = first <= step <= self.facts.resumed_at and due(self.config, step)
            written_ns = manifest.written_ns(path) if wanted else None
            if written_ns is not None and written_ns >= (self._known_since_ns or 0):
                samples = self.facts.samples_at(step)
                found.append(Save(path, step, self._run, written_ns / 1e9, samples, self._tokens(step, samples)))
        self._one_by_one(found)

    def _one_by_one(self, saves: list[Save]) -> None:
        """The newest first, since the next save may delete it, and each behind what training has saved meanwhile."""
        while saves and saves[-1].step in self._handed_over:
            saves.pop()
        if saves:
            self._hand_over(saves.pop(), 0.0, lambda: self._one_by_one(saves))

    def _named(self) -> RunIdentity:
        if not self._id:
            raise NotYet(f"{self.facts.save_dir} could not be written yet")
        return replace(self._run, id=self._id, name=self._run.name or self._id)

    def _described(self) -> MegatronRecord:
        if self._record is None:
            self._record = self.facts.with_files(self.facts.record)
        return self._record

    def _tokens(self, step: int, samples: int | None) -> int | None:
        """Tokens consumed: nominal, as Megatron itself counts them; else by the configuration, else unknown."""
        if samples is not None and self.facts.record.seq_length:
            return samples * self.facts.record.seq_length
        per_step = self.config.run.tokens_per_step
        return None if per_step is None else per_step * step


def _iterations(save_dir: str) -> list[tuple[int, str]]:
    """(iteration, path) of the checkpoint directories, by iteration."""
    found = ((layouts.ITERATION.fullmatch(name), name) for name in os.listdir(save_dir))
    return sorted((int(m[1]), os.path.join(save_dir, name)) for m, name in found if m)
