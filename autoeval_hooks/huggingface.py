"""The adapter for Hugging Face Trainer (and what is built on it, such as TRL's trainers)."""

from __future__ import annotations

import functools
import glob
import json
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from autoeval_hooks import config as configs
from autoeval_hooks.delivery import Delivery, log, never_raise
from autoeval_hooks.errors import CheckpointError, TicketError
from autoeval_hooks.handover import (
    Handover,
    Save,
    abandoned_on_failure,
    began_ns,
    due,
    file_system_time,
    identity,
    remember,
    training_id,
)
from autoeval_hooks.queue import Queue
from autoeval_hooks.relay import Relay
from autoeval_hooks.retention import CHECKPOINT, rotate, tidy_pins
from autoeval_hooks.run_identity import RunIdentity


class AutoEvalCallback(TrainerCallback):
    """Hands every checkpoint that a suite is due for to the evaluation queue, and brings its scores into the W&B run.

        trainer.add_callback(AutoEvalCallback("autoeval.yaml"))

    Only the process that `state.is_world_process_zero` names acts. The training thread reads memory and
    nothing else; all files are touched by a background thread. Before the next save and before its end, either of
    which may delete a checkpoint, training waits for that thread to have pinned it, `hook.deadline` seconds at most.

    Of the Trainer's files it deletes none, unless `hook.save_total_limit` asks it to rotate checkpoints in the
    Trainer's place; then those beyond that number go, but for the best one, those that are not evaluated yet and not
    pinned, and whatever this training did not write.

    `overrides` replace top-level keys of the file, mappings key by key: ``AutoEvalCallback("autoeval.yaml",
    queue="/scratch/queue", run={"name": "trial-7"})``. Raises ConfigError, before training starts; later
    faults are warnings of the logger ``autoeval``, never exceptions.
    """

    def __init__(self, config: str | os.PathLike[str], **overrides: Any) -> None:
        self._arguments = (os.path.abspath(config), overrides)
        self._config = configs.load(config, **overrides)
        self._queue = Queue(self._config.queue)
        self._delivery = Delivery()
        self._training: _Training | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by its arguments, as hyper-parameter search does with a Trainer's callbacks."""
        path, overrides = self._arguments
        return functools.partial(AutoEvalCallback, **overrides), (path,)

    @never_raise
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        training = self._training = _Training(_output_dir(args), state.global_step, state.max_steps)
        training.keep = self._rotation(args, state)
        run = identity(self._config)
        self._delivery.put(lambda: training.begin(run), f"starting in {training.output_dir}")
        self._delivery.put(lambda: self._open(training, run), f"opening the queue {self._config.queue}")

    @never_raise
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (control.should_save or control.should_training_stop) and state.is_world_process_zero:
            self._delivery.flush(self._config.hook.deadline)

    on_epoch_end = on_step_end

    @never_raise
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, training = state.global_step, self._training
        if training is None or not state.is_world_process_zero:
            return
        training.best = os.path.basename(state.best_model_checkpoint or "")
        if suites := due(self._config, step):
            self._hand_over(training, self._save(args, state, training), suites, bool(state.is_hyper_param_search))
        if training.keep is not None:
            self._delivery.put(lambda: self._rotate(training), f"rotating checkpoints in {training.output_dir}")
        if control.should_training_stop:
            # With save_total_limit=1 and a best model, the Trainer deletes this one before it tells of the end.
            self._delivery.flush(self._config.hook.deadline)

    def _save(self, args: TrainingArguments, state: TrainerState, training: _Training) -> Save:
        step = state.global_step
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return Save(
            path=os.path.join(training.output_dir, f"checkpoint-{step}"), step=step, run=identity(self._config),
            saved_at=time.time(), samples=per_step * step,
            tokens=_tokens(state.num_input_tokens_seen, step, self._config.run.tokens_per_step),
        )  # fmt: skip

    @never_raise
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training is not None and self._training.relay is not None:
            self._training.relay.on_log()

    @never_raise
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        training, step, patience = self._training, state.global_step, self._config.hook.deadline
        if training is None or not state.is_world_process_zero:
            return
        run = identity(self._config)
        self._delivery.put(
            lambda: self._reconcile(training, run, range(step + 1), since_ns=training.began_ns),
            f"looking for checkpoints without a ticket in {training.output_dir}",
        )
        finished = self._delivery.finish(patience)
        if not finished:
            log.warning(
                "autoeval: not every checkpoint was handed over when training ended; see the warnings above, then run "
                "`python -m autoeval_hooks submit CHECKPOINT --step N --config %s`", self._config.path,
            )  # fmt: skip
        if training.relay is not None:
            training.relay.end(step, patience if finished else 0.0)

    # ---------------------------------------------------------------- in the background, but for the first line

    def _hand_over(self, training: _Training, save: Save, suites: tuple[str, ...], search: bool) -> None:
        handover = Handover(self._config, self._queue, save, suites)
        training.on_the_way.add(name := os.path.basename(save.path))

        def run() -> None:
            nonlocal save, search
            if search:      # once: by the next try, another trial may have saved a checkpoint of that name
                save, search = replace(save, path=_trial_checkpoint(save.path)), False
            handover.save = replace(save, run=training.named(save.run))
            handover.run()
            training.on_the_way.discard(name)
            training.handed_over.add(name)
            self._start_relay(training, save.run)

        def abandon() -> None:
            training.on_the_way.discard(name)
            handover.abandon()

        self._delivery.put(run, f"handing over {save.path}", abandon)

    def _rotation(self, args: TrainingArguments, state: TrainerState) -> int | None:
        """How many checkpoints the hook is to keep; None: it leaves them alone."""
        limit, theirs = self._config.hook.save_total_limit, args.save_total_limit or 0
        if limit is not None and (theirs > 0 or state.is_hyper_param_search):
            log.warning(
                "autoeval: hook.save_total_limit = %d of %s is not used: %s", limit, self._config.path,
                f"the Trainer rotates by its own save_total_limit = {theirs}; unset one of them" if theirs > 0
                else "a hyper-parameter search keeps its checkpoints elsewhere",
            )  # fmt: skip
            return None
        return limit

    def _rotate(self, training: _Training) -> None:
        if training.keep is None or not training.opened:
            return      # it is not known so far which older checkpoints have no ticket yet
        try:
            gone = rotate(
                self._queue, training.output_dir, training.keep,
                since_ns=training.known_since_ns or training.began_ns,
                spared={training.best, *training.on_the_way},
            )  # fmt: skip
        except (OSError, TicketError) as error:
            log.warning("autoeval: checkpoints are not rotated this time: %s", error)
        else:
            log.debug("autoeval: deleted by hook.save_total_limit: %s", ", ".join(gone))

    def _open(self, training: _Training, run: RunIdentity) -> None:
        self._queue.create()
        self._start_relay(training, run)
        tidy_pins(self._queue, training.output_dir)
        if training.resumed_at:
            # Checkpoints from before we were first seen here may be another training's, but for the one resumed from.
            first = 0 if training.known_since_ns is not None else training.resumed_at
            steps = range(first, training.resumed_at + 1)
            self._reconcile(training, run, steps, since_ns=training.known_since_ns or 0)
        training.opened = True

    def _start_relay(self, training: _Training, run: RunIdentity) -> None:
        """W&B may be there from the start, or from some later step on, or never."""
        if training.relay is not None or not run.wandb_id:
            return
        named = training.named(run)
        directory = os.path.join(self._config.queue, "relay", named.key)
        relay = Relay(directory, named, logs_by_step=False, planned_last_step=training.last_step)
        relay.start()
        training.relay = relay
        remember(training.output_dir, named)

    def _reconcile(self, training: _Training, run: RunIdentity, steps: range, *, since_ns: int) -> None:
        """Hand over complete checkpoints of this training that have no ticket: a save on SIGTERM has no event,
        and a crash may have come before delivery. What has its ticket already is recognised by its id."""
        for step, path in _checkpoints(training.output_dir):
            state_file = os.path.join(path, "trainer_state.json")
            suites, changed_ns = due(self._config, step), _changed_ns(state_file)
            if not suites or step not in steps or os.path.basename(path) in training.handed_over:
                continue
            if changed_ns is None or changed_ns < since_ns:
                continue
            save = Save(
                path=path, step=step, run=training.named(run), saved_at=changed_ns / 1e9,
                tokens=_tokens(_tokens_seen(state_file), step, self._config.run.tokens_per_step),
            )  # fmt: skip
            handover = Handover(self._config, self._queue, save, suites)
            try:
                with abandoned_on_failure(handover):
                    handover.run()
            except CheckpointError as error:
                log.warning("autoeval: passed over: %s", error)


@dataclass
class _Training:
    """One call of `Trainer.train`. What stands below `on_the_way` is known once `begin` was done.

    `began_ns` is the file system's time at its start, `known_since_ns` that of the first training that it resumes;
    `opened` says that the queue was there and that what that training had left has its tickets.
    """

    output_dir: str
    resumed_at: int
    last_step: int
    keep: int | None = None
    """Checkpoints to keep, where the hook rotates them."""
    best: str = ""
    """Name of the best checkpoint, as of the last save."""
    handed_over: set[str] = field(default_factory=set)
    """Names of checkpoints whose hand-over is done: reading all of them once more would hold training's end."""
    on_the_way: set[str] = field(default_factory=set)
    """Names of those whose hand-over is not."""
    opened: bool = False
    id: str = ""
    began_ns: int = 0
    known_since_ns: int | None = None
    relay: Relay | None = None

    def begin(self, run: RunIdentity) -> None:
        resumed = self.resumed_at > 0
        self.known_since_ns = began_ns(self.output_dir) if resumed else None
        own = training_id(self.output_dir, resumed=resumed)
        self.began_ns = file_system_time(self.output_dir)
        self.id = own
        remember(self.output_dir, self.named(run))

    def named(self, run: RunIdentity) -> RunIdentity:
        if not self.id:
            raise RuntimeError(f"{self.output_dir} could not be written yet")
        return replace(run, id=self.id, name=run.name or self.id)


def _output_dir(args: TrainingArguments) -> str:
    return os.path.abspath(args.output_dir or "")


def _tokens(seen: int, step: int, per_step: int | None) -> int | None:
    """Tokens consumed: as the Trainer counted them if it was asked to, else nominal, else unknown."""
    if seen:
        return seen
    return None if per_step is None else per_step * step


def _checkpoints(output_dir: str) -> list[tuple[int, str]]:
    """(step, path) of the checkpoint directories, by step."""
    found = ((CHECKPOINT.fullmatch(name), name) for name in os.listdir(output_dir))
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
