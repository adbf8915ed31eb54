"""For a training loop of one's own: checkpoints are handed over in the background, and scores come back.

    autoeval = AutoEval("autoeval.yaml", "out/run", last_step=steps)
    …
    model.save_pretrained(path); tokenizer.save_pretrained(path)
    autoeval.saved(path, step)
    …
    wandb.log({"loss": loss}, step=step)
    autoeval.logged(step)
    …
    autoeval.close()

`Loop` is what this and the adapters for accelerate and Lightning share: one training, on the one process that owns it.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from autoeval_hooks import complete, layouts, manifest
from autoeval_hooks import config as configs
from autoeval_hooks.config import HookConfig
from autoeval_hooks.delivery import Delivery, log, never_raise
from autoeval_hooks.errors import AutoEvalError, CheckpointError
from autoeval_hooks.handover import (
    Handover,
    Save,
    abandoned_on_failure,
    began_ns,
    due,
    identity,
    remember,
    remembered,
    training_id,
)
from autoeval_hooks.queue import Queue
from autoeval_hooks.relay import Relay
from autoeval_hooks.retention import CHECKPOINT, tidy_pins
from autoeval_hooks.run_identity import RunIdentity, wandb_run


class AutoEval:
    """Hands the checkpoints of a loop over for evaluation, and brings their scores into the open W&B run.

    `output_dir` is the directory that the checkpoints stand in; `.autoeval` in it is ours. `resumed_at` is the step
    that training was resumed from, 0 for a fresh one: a fresh training is another run, a resumed one the same.
    `last_step` is the step that it is planned to end at. `logs_by_step` says that the loop calls `wandb.log(…, step=)`:
    then the runner writes late scores once `last_step` was reached, and otherwise after `autoeval-runner close`, since
    a resumed training must find its next step free. A loop that logs its step as a key says False, and all come.

    Every process may make one; only the main one acts (`main_process`; default: rank 0 of torch.distributed, or of
    what launched the process: torchrun, mpirun or srun. Trainings of one process each that share a launch say True).
    No collective is used. The training thread reads memory and nothing else, all files are touched by a background
    thread, and `saved` and `settle` wait for that one `hook.deadline` seconds at most.

    `overrides` replace top-level keys of the file, as AutoEvalCallback's do. Raises ConfigError here, before training
    starts; later faults are warnings of the logger ``autoeval``, never exceptions.
    """

    def __init__(
        self, config: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, resumed_at: int = 0,
        last_step: int | None = None, logs_by_step: bool = True, main_process: bool | None = None, **overrides: Any,
    ) -> None:  # fmt: skip
        settings = configs.load(config, **overrides)
        self._loop: Loop | None = None
        if is_main() if main_process is None else main_process:
            self._loop = Loop(
                settings, os.path.abspath(output_dir), resumed_at=resumed_at, last_step=last_step,
                logs_by_step=logs_by_step,
            )  # fmt: skip
            self._loop.begins()

    @never_raise
    def saved(
        self, path: str | os.PathLike[str], step: int, *, samples: int | None = None, tokens: int | None = None
    ) -> None:
        """A checkpoint in Hugging Face layout is complete at `path`. `samples` and `tokens` are what training had
        consumed; without `tokens` it is `run.tokens_per_step` times `step`. Before this returns, the checkpoint before
        has its pin, so that the loop may delete it."""
        if self._loop is not None:
            self._loop.settles()
            self._loop.saved(os.path.abspath(path), step, samples=samples, tokens=tokens)

    @never_raise
    def settle(self) -> None:
        """Before the newest checkpoint is deleted or written again: wait until it has its pin."""
        if self._loop is not None:
            self._loop.settles()

    @never_raise
    def logged(self, step: int | None = None) -> None:
        """The loop has just logged to W&B, at `step`: scores that wait join its rows, one at most for each call."""
        if self._loop is not None:
            self._loop.logged(step)

    @never_raise
    def close(self) -> None:
        """The loop is over; call it before `wandb.finish()`. Waits for hand-overs as long as they go on,
        `hook.deadline` seconds for each step. May be called again."""
        if self._loop is not None:
            self._loop.ends()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
"""What launchers name a process's rank in the whole job by, the innermost first: torchrun, accelerate and DeepSpeed;
Open MPI's mpirun; what speaks PMIx; MPICH's and Intel's; srun. A launcher's processes inherit the variables of the one
around it: mpirun in a batch script those of Slurm, where the script itself, as an salloc shell, has SLURM_PROCID=0."""


def is_main() -> bool:
    """Whether this is rank 0: as torch.distributed says where it is initialized, else as the first of `RANKS` that is
    set does. A process that nothing launched is. Nothing is imported."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return next((os.environ[name] for name in RANKS if os.environ.get(name)), "0") == "0"


def uncompiled(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by the names that the model has without torch.compile, which puts `_orig_mod.` before them: saved
    as they are, nothing would be found at loading, and a model of random weights evaluated."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


class Loop:
    """One training, on its main process. Its methods belong to the training thread, read memory only, and return at
    once, but for `settles` and `ends`, which wait `hook.deadline` seconds at most (`ends`: as long as things go on).

    `names` matches the names of its checkpoints, its group the step: what a training that was killed left without a
    ticket is handed over when it resumes.
    """

    def __init__(
        self, config: HookConfig, output_dir: str, *, resumed_at: int, last_step: int | None, logs_by_step: bool,
        names: re.Pattern[str] = CHECKPOINT,
    ) -> None:  # fmt: skip
        self.config, self.output_dir, self.queue = config, output_dir, Queue(config.queue)
        self._resumed_at, self._last_step, self._logs_by_step = resumed_at, last_step, logs_by_step
        self._names = names
        self._delivery = Delivery()
        self._id = ""
        self._known_since_ns: int | None = None
        self._on_the_way: set[str] = set()
        self._handed_over: set[str] = set()
        self._relay: Relay | None = None
        self._asked_for_relay = False
        self._step = resumed_at
        self._closed = False
        self.opened = False
        """The queue is there, and what a training before this one left has its tickets."""

    def begins(self) -> None:
        run = identity(self.config)
        self._delivery.put(lambda: self._begin(run), f"starting in {self.output_dir}")
        self._delivery.put(lambda: self._open(run), f"opening the queue {self.config.queue}")
        atexit.register(self._at_exit, os.getpid())

    def saved(
        self, path: str, step: int, *, samples: int | None = None, tokens: int | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`then` is called in the background once the checkpoint is handed over."""
        if tokens is None:
            tokens = self._nominal(step)
        self._closed = False
        if suites := due(self.config, step):
            save = Save(path, step, identity(self.config), time.time(), samples, tokens)
            self._hand_over(save, suites, then)
        self._reached(step)

    def settles(self) -> None:
        self._delivery.flush(self.config.hook.deadline)

    def logged(self, step: int | None = None) -> None:
        relay = self._relay
        if relay is not None:
            relay.on_log()
        elif not self._asked_for_relay and wandb_run() is not None:     # W&B came after us
            self._asked_for_relay = True
            run = identity(self.config)
            self._delivery.put(lambda: self._start_relay(run), f"announcing the W&B run {run.wandb_id}")
        if step is not None:
            self._reached(step)

    def later(self, work: Callable[[], None], what: str) -> None:
        """Have `work` done in the background, behind what is on its way."""
        self._delivery.put(work, what)

    def ends(self) -> None:
        finished, self._closed = self._finish(), True
        if self._relay is not None:
            self._relay.end(self._step, self.config.hook.deadline if finished else 0.0)

    @property
    def on_the_way(self) -> frozenset[str]:
        """Paths of the checkpoints whose hand-over is not done."""
        return frozenset(self._on_the_way)

    def _reached(self, step: int) -> None:
        """The end is told as soon as it is reached: W&B may be finished before we are closed. Only who logs by step
        can do without the relay from then on."""
        self._step = max(self._step, step)
        planned = self._last_step is not None and step >= self._last_step
        if planned and self._logs_by_step and self._relay is not None:
            self._relay.end(step, 0.0)

    def _finish(self) -> bool:
        finished = self._delivery.finish(self.config.hook.deadline)
        if not finished:
            log.warning(
                "autoeval: not every checkpoint was handed over when training ended; see the warnings above, then run "
                "`python -m autoeval_hooks submit CHECKPOINT --step N --config %s`", self.config.path,
            )  # fmt: skip
        return finished

    @never_raise
    def _at_exit(self, pid: int) -> None:
        if os.getpid() == pid and not self._closed:
            self._finish()

    # ---------------------------------------------------------------- in the background

    def _hand_over(self, save: Save, suites: tuple[str, ...], then: Callable[[], None]) -> None:
        handover = Handover(self.config, self.queue, save, suites)
        self._on_the_way.add(save.path)

        def run() -> None:
            _check_layout(save.path)
            handover.save = replace(save, run=self._named(save.run))
            handover.run()
            self._handed_over.add(save.path)
            self._on_the_way.discard(save.path)
            self._start_relay(save.run)
            then()

        def abandon() -> None:
            self._on_the_way.discard(save.path)
            handover.abandon()

        self._delivery.put(run, f"handing over {save.path}", abandon)

    def _begin(self, run: RunIdentity) -> None:
        if not self._id:        # at another try, we would be known since now
            known = remembered(self.output_dir)
            same = bool(run.wandb_id) and known is not None and known.wandb_id == run.wandb_id
            resumed = self._resumed_at > 0 or same
            self._known_since_ns = began_ns(self.output_dir) if resumed else None
            self._id = training_id(self.output_dir, resumed=resumed)
        remember(self.output_dir, self._named(run))

    def _open(self, run: RunIdentity) -> None:
        self.queue.create()
        self._start_relay(run)
        tidy_pins(self.queue, self.output_dir)
        if self._known_since_ns is not None:
            self._reconcile(run, self._known_since_ns)
        self.opened = True

    def _start_relay(self, run: RunIdentity) -> None:
        """W&B may be there from the start, or from some later step on, or never."""
        if self._relay is not None or not run.wandb_id:
            return
        named = self._named(run)
        relay = Relay(
            os.path.join(self.config.queue, "relay", named.key), named, logs_by_step=self._logs_by_step,
            planned_last_step=self._last_step,
        )  # fmt: skip
        relay.start()
        self._relay = relay
        remember(self.output_dir, named)

    def _reconcile(self, run: RunIdentity, since_ns: int) -> None:
        """Hand over complete checkpoints of this training that have no ticket: it may have died before delivery, or in
        a save, of which its files must tell. What has its ticket already is recognised by its id."""
        for name in sorted(os.listdir(self.output_dir)):
            found, path = self._names.fullmatch(name), os.path.join(self.output_dir, name)
            written_ns = manifest.written_ns(path) if found else None
            if found is None or written_ns is None or written_ns < since_ns or path in self._handed_over:
                continue
            step = int(found[1])
            if step > self._resumed_at or not (suites := due(self.config, step)):
                continue
            save = Save(path, step, self._named(run), written_ns / 1e9, tokens=self._nominal(step))
            handover = Handover(self.config, self.queue, save, suites)
            try:
                with abandoned_on_failure(handover):
                    _check_layout(path)
                    complete.check(path)
                    handover.run()
            except CheckpointError as error:
                log.warning("autoeval: passed over: %s", error)

    def _named(self, run: RunIdentity) -> RunIdentity:
        if not self._id:
            raise AutoEvalError(f"{self.output_dir} could not be written yet")
        return replace(run, id=self._id, name=run.name or self._id)

    def _nominal(self, step: int) -> int | None:
        per_step = self.config.run.tokens_per_step
        return None if per_step is None else per_step * step


def _check_layout(path: str) -> None:
    """Raise CheckpointError for weights that nothing says the model of, as accelerate's `save_state` writes them."""
    try:
        names = set(os.listdir(path))
    except manifest.GONE as error:
        raise CheckpointError(f"{path}: cannot be listed ({error.strerror}); was it deleted?") from error
    if not names & {"config.json", "adapter_config.json"} and not layouts.is_megatron(sorted(names)):
        raise CheckpointError(
            f"{path}: no config.json, so it is no Hugging Face checkpoint (accelerate's save_state writes none); "
            "save it with the model's and the tokenizer's save_pretrained"
        )
