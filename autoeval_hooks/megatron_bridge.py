"""The adapter for Megatron-Bridge 0.5 and later, whose `pretrain` and `finetune` take callbacks.

    pretrain(config, forward_step, callbacks=[AutoEvalCallback("autoeval.yaml")])

Bridge fires `on_checkpoint_save` on every rank once a save is complete, a passing (non-persistent) one too. It does not
say which save it was, and after an asynchronous one training has moved on meanwhile. Just before, on the last rank, it
gives the checkpoint's path to `wandb_utils.on_save_checkpoint_success`, with W&B or without: the path is taken from
there. Neither torch nor Megatron is imported with this module: training has done so.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
from typing import Any

from autoeval_hooks import config as configs
from autoeval_hooks import layouts
from autoeval_hooks.delivery import Delivery, log, never_raise
from autoeval_hooks.megatron_record import record, samples_at, with_tokenizer_files
from autoeval_hooks.megatron_training import Facts, Training

REMEMBERED = 10_000
"""So many steps back the samples consumed are known: an asynchronous save takes fewer."""

_newest: tuple[str, str] | None = None
"""The last complete save of this process: the directory of its kind, and the checkpoint in it."""


class AutoEvalCallback:
    """Hands every checkpoint that a suite is due for to the evaluation queue, and brings its scores into the W&B run.

    Only the last rank acts, the one that owns W&B. The training thread reads memory and nothing else; all files are
    touched by a background thread. After a save and before `most_recent_k` deletes an earlier checkpoint, training
    waits for that one's pin, `hook.deadline` seconds at most.

    `overrides` replace top-level keys of the file, mappings key by key: ``AutoEvalCallback("autoeval.yaml",
    queue="/scratch/queue")``. Raises ConfigError, before training starts; later faults are warnings of the logger
    ``autoeval``, never exceptions. It is no subclass of Bridge's `Callback`, which Bridge does not ask for.
    """

    def __init__(self, config: str | os.PathLike[str], **overrides: Any) -> None:
        self._config = configs.load(config, **overrides)
        self._delivery = Delivery()
        self._training: Training | None = None
        self._samples: dict[int, int] = {}
        self._seen: tuple[str, str] | None = None
        self._process = 0

    @never_raise
    def on_train_start(self, context: Any) -> None:
        self._training = None
        rank, world_size = _place()
        if rank != world_size - 1:
            return
        save = context.state.cfg.checkpoint.save
        if not save or "://" in str(save):
            log.warning("autoeval: nothing is handed over: checkpoint.save names no directory of a file system")
            return
        _watch_saves()
        self._seen = _newest
        training = Training(self._config, self._delivery, _facts(context.state, world_size))
        training.begins()
        if self._process != os.getpid():
            self._process = os.getpid()
            atexit.register(self._deliver_the_rest, self._process)
        self._training = training

    @never_raise
    def on_train_step_start(self, context: Any) -> None:
        """What the step before logged is complete by now; a save after it had consumed what is consumed by now."""
        if self._training is None:
            return
        now = context.state.train_state
        self._samples[now.step] = now.consumed_train_samples
        if len(self._samples) > REMEMBERED:
            del self._samples[next(iter(self._samples))]
        self._training.logged(now.step)

    @never_raise
    def on_checkpoint_save(self, context: Any) -> None:
        training, save = self._training, _newest
        if training is None or save is None or save is self._seen:
            return      # a local save, which other nodes cannot see
        self._seen = save
        directory, path = map(os.path.abspath, save)
        named = layouts.ITERATION.fullmatch(os.path.basename(path))
        if directory != training.facts.save_dir or named is None:
            return      # a passing save, which Bridge replaces
        step, now = int(named[1]), context.state.train_state
        samples = now.consumed_train_samples if now.step == step else self._samples.get(step)
        training.save_begins(step, training.facts.samples_at(step) if samples is None else samples)
        training.saved(path, step, None)

    @never_raise
    def on_train_end(self, context: Any) -> None:
        """Bridge leaves without it when a signal, a time limit or an exit interval ends training."""
        if self._training is not None:
            self._training.deliver_the_rest()
            self._training.ends()

    @never_raise
    def _deliver_the_rest(self, pid: int) -> None:
        if self._training is not None and os.getpid() == pid:
            self._training.deliver_the_rest()


def _watch_saves() -> None:
    """Have Bridge tell the path of each complete save; done once a process."""
    wandb_utils: Any = importlib.import_module("megatron.bridge.training.utils.wandb_utils")
    original = wandb_utils.on_save_checkpoint_success
    if hasattr(original, "autoeval"):
        return

    @functools.wraps(original)
    def noted(checkpoint_path: str, save_dir: str, *args: Any, **kwargs: Any) -> Any:
        global _newest
        _newest = (save_dir, checkpoint_path)
        return original(checkpoint_path, save_dir, *args, **kwargs)

    noted.autoeval = True  # type: ignore[attr-defined]
    wandb_utils.on_save_checkpoint_success = noted


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _facts(state: Any, world_size: int) -> Facts:
    cfg, here = state.cfg, os.getcwd()
    save_dir, load = os.path.abspath(cfg.checkpoint.save), cfg.checkpoint.load
    now, logger = state.train_state, getattr(cfg, "logger", None)
    resumed_at, consumed = now.step, now.consumed_train_samples     # these move on
    args = _Arguments(world_size, cfg.tokenizer, cfg.model, cfg.checkpoint, cfg.train)
    return Facts(
        save_dir=save_dir, resumed_at=resumed_at,
        resumed_here=bool(load) and os.path.abspath(load) == save_dir,
        planned_last_step=cfg.train.train_iters, record=record(args),
        with_files=lambda known: with_tokenizer_files(known, here),
        samples_at=lambda step: samples_at(args, step, resumed_at=resumed_at, consumed=consumed),
        row_every=getattr(logger, "tensorboard_log_interval", None),    # W&B's rows, too, with or without TensorBoard
    )  # fmt: skip


class _Arguments:
    """Bridge's sections as Megatron-LM's arguments: they have the same names, and each name's first section counts."""

    def __init__(self, world_size: int, *sections: Any) -> None:
        self.world_size = world_size
        self._sections = sections

    def __getattr__(self, name: str) -> Any:
        for section in self._sections:
            if hasattr(section, name):
                return getattr(section, name)
        raise AttributeError(name)
