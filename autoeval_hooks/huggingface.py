"""The adapter for Hugging Face Trainer (and what is built on it, such as TRL's trainers)."""

from __future__ import annotations

import glob
import json
import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from autoeval_hooks import config as configs
from autoeval_hooks.delivery import Delivery, log, never_raise
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.handover import Handover, Save, due, file_system_time, training_id
from autoeval_hooks.queue import Queue
from autoeval_hooks.relay import Relay
from autoeval_hooks.run_identity import RunIdentity, current

END_DEADLINE_S = 30.0
"""How long the end of training waits for what is still on its way."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class AutoEvalCallback(TrainerCallback):
    """Hands every checkpoint that a suite is due for to the evaluation queue, and brings its scores into the W&B run.

        trainer.add_callback(AutoEvalCallback("autoeval.yaml"))

    Only the process that `state.is_world_process_zero` names acts. The training thread reads memory and
    nothing else; all files are touched by a background thread. Before the next save, which may delete
    the checkpoint before, training waits for that thread to have pinned it, `hook.deadline` seconds at most.

    `overrides` replace top-level keys of the file, mappings key by key: ``AutoEvalCallback("autoeval.yaml",
    queue="/scratch/queue", run={"name": "trial-7"})``. Raises ConfigError, before training starts; later
    faults are warnings of the logger ``autoeval``, never exceptions.
    """

    def __init__(self, config: str | os.PathLike[str], **overrides: Any) -> None:
        self._config = configs.load(config, **overrides)
        self._queue = Queue(self._config.queue)
        self._delivery = Delivery()
        self._relay: Relay | None = None
        self._training: _Training | None = None

    @never_raise
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._training, self._relay = None, None
        output_dir, resumed_at, last_step = _output_dir(args), state.global_step, state.max_steps
        identity = self._identity()

        def begin() -> None:
            self._training = _Training(
                training_id(output_dir, resumed=resumed_at > 0), file_system_time(output_dir), last_step
            )

        def open_queue() -> None:
            self._queue.create()
            self._start_relay(identity)
            if resumed_at:
                self._reconcile(output_dir, identity, range(resumed_at + 1), since_ns=0)

        self._delivery.put(begin, f"starting in {output_dir}")
        self._delivery.put(open_queue, f"opening the queue {self._config.queue}")

    @never_raise
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save and state.is_world_process_zero:
            self._delivery.flush(self._config.hook.deadline)

    on_epoch_end = on_step_end

    @never_raise
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        step, output_dir = state.global_step, _output_dir(args)
        suites = due(self._config, step)
        if not suites:
            return
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        save = Save(
            path=os.path.join(output_dir, f"checkpoint-{step}"), step=step, run=self._identity(),
            saved_at=time.time(), samples=per_step * step,
            tokens=_tokens(state.num_input_tokens_seen, step, self._config.run.tokens_per_step),
        )  # fmt: skip
        self._hand_over(save, suites, search=bool(state.is_hyper_param_search))

    @never_raise
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._relay is not None:
            self._relay.on_log()

    @never_raise
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        output_dir, step = _output_dir(args), state.global_step
        identity = self._identity()

        def reconcile() -> None:
            self._reconcile(output_dir, identity, range(step + 1), since_ns=self._known().began_ns)

        self._delivery.put(reconcile, f"looking for checkpoints without a ticket in {output_dir}")
        if not self._delivery.flush(max(END_DEADLINE_S, self._config.hook.deadline), retries=True):
            log.warning(
                "autoeval: not every checkpoint was handed over when training ended; see the warnings above, then run "
                "`python -m autoeval_hooks submit CHECKPOINT --step N --config %s`", self._config.path,
            )  # fmt: skip
        if self._relay is not None:
            self._relay.end(step)

    # ---------------------------------------------------------------- in the training thread

    def _identity(self) -> RunIdentity:
        """The run as the configuration and W&B name it; the training's own id is added in the background."""
        section = self._config.run
        return current("", name=section.name or "", project=section.project or "", entity=section.entity or "")

    def _hand_over(self, save: Save, suites: tuple[str, ...], *, search: bool) -> None:
        handover = Handover(self._config, self._queue, save, suites)

        def run() -> None:
            path = _trial_checkpoint(save.path) if search else save.path
            handover.save = replace(save, path=path, run=self._named(save.run))
            handover.run()
            self._start_relay(save.run)

        self._delivery.put(run, f"handing over {save.path}", handover.abandon)

    # ---------------------------------------------------------------- in the background

    def _known(self) -> _Training:
        if self._training is None:
            raise RuntimeError("the training's directory could not be written yet")
        return self._training

    def _named(self, identity: RunIdentity) -> RunIdentity:
        run_id = self._known().id
        return replace(identity, id=run_id, name=identity.name or run_id)

    def _start_relay(self, identity: RunIdentity) -> None:
        """W&B may be there from the start, or from some later step on, or never."""
        if self._relay is not None or not identity.wandb_id:
            return
        run = self._named(identity)
        directory = os.path.join(self._config.queue, "relay", run.key)
        relay = Relay(directory, run, logs_by_step=False, planned_last_step=self._known().last_step)
        relay.start()
        self._relay = relay

    def _reconcile(self, output_dir: str, identity: RunIdentity, steps: range, *, since_ns: int) -> None:
        """Hand over complete checkpoints of this training that have no ticket: a save on SIGTERM has no event,
        and a crash may have come before delivery. What has its ticket already is recognised by its id."""
        for step, path in _checkpoints(output_dir):
            state_file = os.path.join(path, "trainer_state.json")
            suites, changed_ns = due(self._config, step), _changed_ns(state_file)
            if not suites or step not in steps or changed_ns is None or changed_ns < since_ns:
                continue
            save = Save(
                path=path, step=step, run=self._named(identity), saved_at=changed_ns / 1e9,
                tokens=_tokens(_tokens_seen(state_file), step, self._config.run.tokens_per_step),
            )  # fmt: skip
            try:
                Handover(self._config, self._queue, save, suites).run()
            except CheckpointError as error:
                log.warning("autoeval: passed over: %s", error)


@dataclass(frozen=True)
class _Training:
    """What is known of this training once its directory could be written: `began_ns` is the file system's time."""

    id: str
    began_ns: int
    last_step: int


def _output_dir(args: TrainingArguments) -> str:
    return os.path.abspath(args.output_dir or "")


def _tokens(seen: int, step: int, per_step: int | None) -> int | None:
    """Tokens consumed: as the Trainer counted them if it was asked to, else nominal, else unknown."""
    if seen:
        return seen
    return None if per_step is None else per_step * step


def _checkpoints(output_dir: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoint directories, by step."""
    found = ((_CHECKPOINT.fullmatch(name), name) for name in os.listdir(output_dir))
    return sorted((int(m[1]), os.path.join(output_dir, name)) for m, name in found if m)


def _changed_ns(path: str) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None


def _tokens_seen(state_file: str) -> int:
    try:
        with open(state_file, encoding="utf-8") as file:
            return int(json.load(file).get("num_input_tokens_seen") or 0)
    except (OSError, ValueError):
        return 0


def _trial_checkpoint(path: str) -> str:
    """Hyper-parameter search saves under `run-*`: the newest checkpoint of that name there."""
    output_dir, name = os.path.split(path)
    found = glob.glob(os.path.join(glob.escape(output_dir), "run-*", name))
    return max(found, key=lambda p: os.stat(p).st_mtime_ns, default=path)
