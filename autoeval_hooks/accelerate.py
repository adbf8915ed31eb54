"""The adapter for loops built on accelerate. Neither accelerate nor torch is imported with this module.

    autoeval = AutoEval("autoeval.yaml", accelerator, "out/run", last_step=steps)     # after init_trackers
    …
    autoeval.save_and_submit(model, step=step, tokenizer=tokenizer)                   # on every process
    …
    accelerator.end_training()

accelerate has no event after a save, and what its `save_state` writes, with the optimizer, is no model that could be
evaluated: weights without config and tokenizer. So the model is saved in Hugging Face layout, beside that.
"""

from __future__ import annotations

import os
from typing import Any, Self

from autoeval_hooks import config as configs
from autoeval_hooks import manifest
from autoeval_hooks.delivery import log, never_raise
from autoeval_hooks.errors import ConfigError
from autoeval_hooks.loop import Loop, uncompiled


class AutoEval:
    """Saves the models of an accelerate loop for evaluation, hands them over, and brings scores into its W&B run.

    `output_dir` is the directory that `checkpoint-STEP` and `.autoeval` go to; it must not be one that accelerate
    rotates (`automatic_checkpoint_naming` with `total_limit`). `resumed_at`, `last_step` and `logs_by_step` (here:
    `accelerator.log(…, step=)`) are those of `autoeval_hooks.AutoEval`. Scores join the rows that `accelerator.log`
    writes to W&B, and `accelerator.end_training` closes this; loops that call `wandb.log` themselves call `logged`
    after it, and `close` at the end.

    Every process makes one; only the main one hands over. Raises ConfigError here, before training starts; of what
    comes later only the saving itself raises, as `save_pretrained` does.
    """

    def __init__(
        self, config: str | os.PathLike[str], accelerator: Any, output_dir: str | os.PathLike[str], *,
        resumed_at: int = 0, last_step: int | None = None, logs_by_step: bool = True, **overrides: Any,
    ) -> None:  # fmt: skip
        settings = configs.load(config, **overrides)
        self._accelerator, self._output_dir = accelerator, os.path.abspath(output_dir)
        _check_place(accelerator, self._output_dir)
        self._loop: Loop | None = None
        if accelerator.is_main_process:
            self._loop = Loop(
                settings, self._output_dir, resumed_at=resumed_at, last_step=last_step, logs_by_step=logs_by_step
            )
            self._loop.begins()
        self._tracker = _Tracker(self)
        self._listen()

    def save_and_submit(
        self, model: Any, *, step: int, tokenizer: Any = None, samples: int | None = None, tokens: int | None = None,
        **save_pretrained: Any,
    ) -> str:  # fmt: skip
        """Save `model`, prepared or not, as `output_dir/checkpoint-STEP`, and hand it over; the path.

        All processes call it: sharded weights are gathered here (`accelerator.get_state_dict`), and nowhere else.
        Only the main one writes. `samples` and `tokens` are what training had consumed; the rest goes to the
        model's `save_pretrained`. What saving raises is raised; what comes after it is a warning at most. The
        checkpoint before has its pin by then, so that the loop may delete it.
        """
        if self._loop is not None:
            self._settle(self._loop)
        path = save(
            self._accelerator, model, os.path.join(self._output_dir, f"checkpoint-{step}"), tokenizer,
            **save_pretrained,
        )  # fmt: skip
        self._submit(path, step, samples, tokens)
        return path

    @never_raise
    def logged(self, step: int | None = None) -> None:
        """The loop has just logged to W&B by other means than `accelerator.log`."""
        if self._loop is not None:
            self._loop.logged(step)

    @never_raise
    def close(self) -> None:
        """The loop is over. May be called again."""
        if self._loop is not None:
            self._loop.ends()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    @never_raise
    def _settle(self, loop: Loop) -> None:
        loop.settles()

    @never_raise
    def _submit(self, path: str, step: int, samples: int | None, tokens: int | None) -> None:
        self._listen()
        if self._loop is not None:
            self._loop.saved(path, step, samples=samples, tokens=tokens)

    def _listen(self) -> None:
        """`init_trackers`, which may come after us, makes a new list."""
        trackers = self._accelerator.trackers
        if self._loop is not None and trackers and self._tracker not in trackers:
            trackers.append(self._tracker)


def save(accelerator: Any, model: Any, path: str, tokenizer: Any = None, **save_pretrained: Any) -> str:
    """Save `model` and `tokenizer` in Hugging Face layout; all processes call it, the main one writes. While it does, a
    file says that the save is not over (`manifest.INCOMPLETE`): where training is killed, or this raises, it stays, and
    the checkpoint is refused. Raises TypeError for a model without `save_pretrained`, and what that raises."""
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not hasattr(unwrapped, "save_pretrained"):
        raise TypeError(f"{type(unwrapped).__name__} has no save_pretrained; only such models can be evaluated")
    state = uncompiled(accelerator.get_state_dict(model))
    main, marker = accelerator.is_main_process, os.path.join(path, manifest.INCOMPLETE)
    if main:
        os.makedirs(path, exist_ok=True)
        with open(marker, "w", encoding="utf-8") as file:
            file.write("Being saved for evaluation, or cut off in it.\n")
    unwrapped.save_pretrained(path, is_main_process=main, state_dict=state, **save_pretrained)
    if main:
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        os.unlink(marker)
    return path


_opened: dict[tuple[str, str], AutoEval | None] = {}
"""What `save_and_submit` opened: by configuration and output directory. None: that one cannot be read."""


def save_and_submit(
    accelerator: Any, model: Any, output_dir: str | os.PathLike[str], *, step: int,
    config: str | os.PathLike[str] = "autoeval.yaml", tokenizer: Any = None, samples: int | None = None,
    tokens: int | None = None, resumed_at: int = 0, last_step: int | None = None, logs_by_step: bool = True,
) -> str:  # fmt: skip
    """`AutoEval.save_and_submit` in one call, for a loop that has no other place for it; every process calls it.

    A configuration that cannot be read costs one warning, and the model is saved all the same. `resumed_at`,
    `last_step` and `logs_by_step` count at the first call.
    """
    key = os.path.abspath(config), os.path.abspath(output_dir)
    if key not in _opened:
        try:
            _opened[key] = AutoEval(
                key[0], accelerator, key[1], resumed_at=resumed_at, last_step=last_step, logs_by_step=logs_by_step
            )
        except ConfigError as error:
            _opened[key] = None
            if accelerator.is_main_process:
                log.warning("autoeval: nothing is handed over: %s", error)
    autoeval = _opened[key]
    if autoeval is None:
        return save(accelerator, model, os.path.join(key[1], f"checkpoint-{step}"), tokenizer)
    return autoeval.save_and_submit(model, step=step, tokenizer=tokenizer, samples=samples, tokens=tokens)


def _check_place(accelerator: Any, output_dir: str) -> None:
    """Raise ConfigError for a directory that accelerate rotates: it takes every name there for one of its own, fails
    at one without a number, such as `.autoeval`, and would delete our pins in one of its checkpoints."""
    project = accelerator.project_configuration
    if not project.automatic_checkpoint_naming or project.project_dir is None:
        return
    rotated = os.path.realpath(os.path.join(project.project_dir, "checkpoints"))
    place = os.path.realpath(output_dir)
    if os.path.commonpath([rotated, place]) == rotated:
        raise ConfigError(
            f"output_dir: {output_dir} lies where accelerate rotates its own checkpoints ({rotated}); name another, "
            f"such as {os.path.join(project.project_dir, 'models')}"
        )


class _Tracker:
    """In `accelerator.trackers`, behind W&B's: it hears of each row, and of the end. One of accelerate's trackers by
    what it offers; it logs nothing."""

    name = "autoeval"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, autoeval: AutoEval) -> None:
        self._autoeval = autoeval

    @property
    def tracker(self) -> AutoEval:
        return self._autoeval

    def start(self) -> None: ...

    def store_init_configuration(self, values: Any) -> None: ...

    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
        self._autoeval.logged(step)

    def finish(self) -> None:
        self._autoeval.close()
