"""The adapter for Lightning 2.x: `lightning.pytorch`, and `pytorch_lightning` where that is what training imported.

    trainer = Trainer(callbacks=[AutoEvalCallback("autoeval.yaml"), ModelCheckpoint(dirpath="out", …)])

A `.ckpt` file is no model that could be evaluated. So at each save that a suite is due for, the module's Hugging Face
model is exported, from memory and in the training thread: that is what autoeval costs training here, the time that
`save_pretrained` takes.

A callback's `on_save_checkpoint` comes before the write. What comes after it, on rank 0, is `after_save_checkpoint` of
the loggers: so there is a logger of ours behind the trainer's own, which also hears of each row and of the end. It
comes once training starts, when all directories are found, and goes with its end.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from autoeval_hooks import config as configs
from autoeval_hooks import exports
from autoeval_hooks.delivery import log, never_raise
from autoeval_hooks.errors import ConfigError, TicketError
from autoeval_hooks.handover import due
from autoeval_hooks.loop import Loop, uncompiled

if not TYPE_CHECKING and "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers.logger import DummyLogger
else:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger

Export = Callable[[Any, str], None]
"""Writes a LightningModule's model in Hugging Face layout, with its tokenizer, into an empty directory."""
Weights = Mapping[str, Any]
"""Of a LightningModule: name, as in its state dict → tensor."""

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
"""Strategies under which no process holds the model: it could be exported only by all together."""
TOKENIZERS = ("tokenizer", "processing_class", "processor")


class AutoEvalCallback(Callback):
    """Hands every checkpoint that a suite is due for to the evaluation queue, and brings its scores into the W&B run.

    `export` writes the model: ``export(module, directory)``. The default saves the module's one attribute that has
    `save_pretrained`, and the `tokenizer` of the module or of its datamodule. The weights are those that the
    checkpoint has: where a callback put others there than training's (`WeightAveraging`), `export` gets a copy of the
    module that has them, one more model in memory; the default needs none.

    `output_dir` holds `autoeval-exports`, and there `.autoeval`; the default is the directory of the first
    ModelCheckpoint. An export goes once its tickets have their pins, or, where there are none, once they are done.

    Only rank 0 acts, and no collective is used; sharded models (FSDP, DeepSpeed, tensor parallel) are refused with a
    warning. Training waits for the export and for no file of the queue; at its end, `hook.deadline` seconds for each
    step that the hand-overs take.

    `overrides` replace top-level keys of the file, mappings key by key. Raises ConfigError, here or before training's
    first step; later faults are warnings of the logger ``autoeval``, never exceptions.
    """

    def __init__(
        self, config: str | os.PathLike[str], *, export: Export | None = None,
        output_dir: str | os.PathLike[str] | None = None, **overrides: Any,
    ) -> None:  # fmt: skip
        self._config = configs.load(config, **overrides)
        self._export = export
        self._output_dir = None if output_dir is None else os.path.abspath(output_dir)
        self._fit: _Fit | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit = None
        output_dir = self._output_dir or _checkpoints_at(trainer)
        if problem := _problem(trainer, output_dir):
            if trainer.is_global_zero:
                log.warning("autoeval: nothing is handed over: %s", problem)
            return
        if self._export is None:
            model_of(pl_module)     # on every rank: all end, or none
        if trainer.is_global_zero and output_dir is not None:
            self._start(trainer, pl_module, output_dir)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._fit is not None:
            self._fit.checkpoint = checkpoint       # other callbacks may still change it

    @never_raise
    def _start(self, trainer: Trainer, module: LightningModule, output_dir: str) -> None:
        if self._config.hook.save_total_limit is not None:
            log.warning(
                "autoeval: hook.save_total_limit = %d of %s is not used: Lightning keeps its own checkpoints; see "
                "ModelCheckpoint's save_top_k", self._config.hook.save_total_limit, self._config.path,
            )  # fmt: skip
        directory, last_step = exports.directory(output_dir), trainer.max_steps
        loop = Loop(
            self._config, directory, resumed_at=trainer.global_step, last_step=last_step if last_step > 0 else None,
            logs_by_step=False, names=exports.EXPORT,
        )  # fmt: skip
        loop.begins()
        self._fit = _Fit(loop, trainer, module, self._export, directory)
        loop.later(self._fit.tidy, f"tidying {directory}")
        trainer.loggers = [*trainer.loggers, _Listener(self._fit)]


class _Fit:
    """One call of `Trainer.fit`, on rank 0."""

    def __init__(self, loop: Loop, trainer: Any, module: Any, export: Export | None, directory: str) -> None:
        self.loop, self.trainer, self.module, self.directory = loop, trainer, module, directory
        self.own_export = export
        self.checkpoint: dict[str, Any] = {}
        """What was saved last, but where no callback is asked (`save_weights_only`): into that, nothing else gets."""
        self.exported = -1
        self.writing = ""

    @never_raise
    def saved(self) -> None:
        """A checkpoint was written, or is being written in the background: what is in memory is that one."""
        checkpoint, self.checkpoint, step = self.checkpoint, {}, self.trainer.global_step
        if step == self.exported or not due(self.loop.config, step):
            return      # one save may be told of twice: several ModelCheckpoints, and `save_last`
        weights = checkpoint["state_dict"] if checkpoint.get("global_step") == step else {}
        self.writing = exports.path_of(self.directory, step)
        exports.write(self.writing, lambda to: self.export(to, weights))
        self.exported = step
        self.loop.saved(self.writing, step, then=self.tidy)
        self.writing = ""       # it is on its way by now

    def export(self, directory: str, weights: Weights) -> None:
        other = not _in_memory(self.module, weights)
        if self.own_export is None:
            save_pretrained(self.module, directory, self.trainer, weights if other else {})
        else:
            self.own_export(_with(self.module, weights) if other else self.module, directory)

    @never_raise
    def logged(self) -> None:
        self.loop.logged()

    @never_raise
    def ends(self) -> None:
        self.loop.ends()
        self.trainer.loggers = [each for each in self.trainer.loggers if not isinstance(each, _Listener)]

    def tidy(self) -> None:
        """In the background: remove the exports that nobody needs."""
        if not self.loop.opened:
            return      # what an earlier training left may have no ticket yet
        try:
            exports.tidy(self.loop.queue, self.directory, lambda: {self.writing} | self.loop.on_the_way)
        except (OSError, TicketError) as error:
            log.warning("autoeval: exports in %s are left alone this time: %s", self.directory, error)


class _Listener(DummyLogger):
    """Hears what loggers are told, and logs nothing. Whatever else it is asked for does nothing, as Lightning's own
    stand-in for a logger: it is the only one where the trainer has none."""

    def __init__(self, fit: _Fit) -> None:
        super().__init__()
        self._fit = fit

    @property
    def save_dir(self) -> str:
        return str(self._fit.trainer.default_root_dir)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self._fit.saved()

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._fit.logged()

    def finalize(self, status: str) -> None:
        self._fit.ends()


def save_pretrained(module: Any, directory: str, trainer: Any = None, weights: Weights | None = None) -> None:
    """The default export: the module's model, and the tokenizer if the module or its datamodule has one. `weights`, of
    the module, are saved in place of the model's own, as far as they go. Raises ConfigError where there is not exactly
    one model."""
    model = model_of(module)
    prefix = next((f"{name}." for name, child in module.named_children() if child is model), "")
    own = model.state_dict()
    state = uncompiled({name: (weights or {}).get(prefix + name, tensor) for name, tensor in own.items()})
    model.save_pretrained(directory, **({"state_dict": state} if weights or state.keys() != own.keys() else {}))
    for owner in (module, getattr(trainer, "datamodule", None)):
        for name in TOKENIZERS:
            tokenizer: Any = getattr(owner, name, None)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(directory)
                return


def _in_memory(module: Any, weights: Weights) -> bool:
    """Whether `weights` are those of `module`, and no others: the same memory. A name that it lacks counts for
    nothing: trainings leave frozen parts out of their checkpoints."""
    own = {name: tensor for name, tensor in module.state_dict().items() if hasattr(tensor, "data_ptr")}
    return all(name not in own or tensor.data_ptr() == own[name].data_ptr() for name, tensor in weights.items())


def _with(module: Any, weights: Weights) -> Any:
    """A copy of `module` with these weights."""
    other = copy.deepcopy(module)
    other.load_state_dict(weights, strict=False)
    other.trainer = module.trainer
    return other


def model_of(module: Any) -> Any:
    """The one Hugging Face model of a LightningModule: itself, or a direct attribute of it. Raises ConfigError."""
    if hasattr(module, "save_pretrained"):
        return module
    found = {name: child for name, child in module.named_children() if hasattr(child, "save_pretrained")}
    if len(found) != 1:
        what = f"several attributes with save_pretrained ({', '.join(found)})" if found else "no attribute with one"
        raise ConfigError(
            f"{type(module).__name__} has {what}: pass AutoEvalCallback(…, export=…), a function of the module and a "
            "directory that writes the model and its tokenizer there in Hugging Face layout"
        )
    return next(iter(found.values()))


def _checkpoints_at(trainer: Any) -> str | None:
    """The directory of the first ModelCheckpoint that has one."""
    found = (getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks)
    return next((str(path) for path in found if path), None)


def _problem(trainer: Any, output_dir: str | None) -> str:
    """Why this training's checkpoints cannot be handed over, or ""."""
    if trainer.fast_dev_run:
        return "fast_dev_run saves no checkpoint"
    if not trainer.checkpoint_callbacks:
        return "the Trainer has no ModelCheckpoint"
    strategy = next((c.__name__ for c in type(trainer.strategy).__mro__ if c.__name__ in SHARDED), "")
    if strategy:
        return (
            f"under {strategy} no process holds the whole model; submit converted checkpoints by hand: "
            "`python -m autoeval_hooks submit`"
        )
    if output_dir is None or "://" in output_dir:
        return f"checkpoints go to {output_dir}, no directory of a file system: pass AutoEvalCallback(…, output_dir=…)"
    return ""
