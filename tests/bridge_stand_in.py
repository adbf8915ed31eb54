"""A stand-in for Megatron-Bridge's training, for tests of the callback.

The order of events, of what a save does and of its names is that of Megatron-Bridge 0.6.2 (training/train.py,
checkpointing.py). It trains nothing: a checkpoint's weights are a few bytes. The modules of Bridge that the callback
meets, `callbacks` and `utils.wandb_utils`, are stand-ins here as well; tests/megatron gives Bridge's own.
"""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WANDB_UTILS = "megatron.bridge.training.utils.wandb_utils"


class Manager:
    """As far as Bridge's `CallbackManager` matters here: it asks a callback for the methods that it has."""

    EVENTS = ("on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end", "on_checkpoint_save")

    def __init__(self) -> None:
        self.called: dict[str, list[Callable[[Any], None]]] = {event: [] for event in self.EVENTS}
        self.user_state: dict[str, Any] = {}

    def add(self, callback: object) -> None:
        for event, methods in self.called.items():
            method = getattr(callback, event, None)
            if method is not None and method.__func__ is not None:      # Bridge, too, asks for a bound method
                methods.append(method)

    def fire(self, event: str, context: Any) -> None:
        for method in self.called[event]:
            method(context)


def modules(monkeypatch: pytest.MonkeyPatch, wandb_utils: types.ModuleType | None = None) -> types.ModuleType:
    """Have `megatron.bridge.training.utils.wandb_utils` be there, with its parents."""
    if wandb_utils is None:
        wandb_utils = types.ModuleType(WANDB_UTILS)
        wandb_utils.on_save_checkpoint_success = nothing  # type: ignore[attr-defined]
    names = WANDB_UTILS.split(".")
    for depth in range(1, len(names)):
        parent = types.ModuleType(".".join(names[:depth]))
        parent.__path__ = []
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
    monkeypatch.setitem(sys.modules, WANDB_UTILS, wandb_utils)
    return wandb_utils


def nothing(checkpoint_path: str, save_dir: str, iteration: int, wandb_writer: Any) -> None: ...


def configuration(save: Path, **changes: Any) -> types.SimpleNamespace:
    """Bridge's `ConfigContainer`, as far as it is read. `changes` are those of `checkpoint`."""
    checkpoint = {
        "save": str(save), "load": str(save), "save_interval": 2, "ckpt_format": "torch_dist", "async_save": False,
        "most_recent_k": -1,
    }  # fmt: skip
    return types.SimpleNamespace(
        checkpoint=types.SimpleNamespace(**checkpoint | changes),
        logger=types.SimpleNamespace(tensorboard_log_interval=1),
        train=types.SimpleNamespace(train_iters=6, global_batch_size=4, micro_batch_size=2, rampup_batch_size=None),
        model=types.SimpleNamespace(
            tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1, seq_length=16,
            expert_model_parallel_size=1, num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=128,
        ),
        tokenizer=types.SimpleNamespace(tokenizer_type="NullTokenizer", tokenizer_model=None, vocab_size=127),
    )  # fmt: skip


@dataclass
class Bridge:
    """One training. `kinds` says of a step that its save is a passing one: "global" or "local"; `leaves_at` is where
    a signal ends it; `behind` how many steps an asynchronous save takes."""

    manager: Any
    wandb_utils: Any
    cfg: types.SimpleNamespace
    kinds: dict[int, str] = field(default_factory=dict)
    leaves_at: int | None = None
    behind: int = 1
    log: Callable[[int], None] = lambda step: None
    step: int = 0
    _pending: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.train_state = types.SimpleNamespace(step=self.step, consumed_train_samples=4 * self.step)
        self.state = types.SimpleNamespace(cfg=self.cfg, train_state=self.train_state)

    def fire(self, event: str) -> None:
        self.manager.fire(event, types.SimpleNamespace(state=self.state, user_state=self.manager.user_state))

    def train(self) -> None:
        now, interval = self.train_state, self.cfg.checkpoint.save_interval
        self.fire("on_train_start")
        while now.step < self.cfg.train.train_iters:
            self._finalize(now.step - self.behind)
            self.fire("on_train_step_start")
            self.fire("on_train_step_end")
            now.step += 1
            now.consumed_train_samples += 4
            self.log(now.step)
            if now.step == self.leaves_at:
                self.save()
                break
            if now.step % interval == 0 or now.step in self.kinds:
                self.save(self.kinds.get(now.step, ""))
        self._finalize(now.step)
        if now.step == self.leaves_at:
            sys.exit(0)
        self.fire("on_train_end")

    def save(self, kind: str = "") -> None:
        checkpoint, step = self.cfg.checkpoint, self.train_state.step
        save_dir = Path(checkpoint.save) / ("non_persistent" if kind == "global" else "")
        path = save_dir / f"iter_{step:07d}"

        def finalize() -> None:
            if kind != "local":
                write(path, f"weights of {step}")
                # Its third argument is the step by now, in 0.6.2, not that of the save.
                self.wandb_utils.on_save_checkpoint_success(
                    str(path), str(save_dir), self.train_state.step, wandb_writer=None
                )
            self.fire("on_checkpoint_save")
            if kind == "" and checkpoint.most_recent_k > -1:
                for old in sorted(save_dir.rglob("iter_*"))[: -checkpoint.most_recent_k or None]:
                    shutil.rmtree(old)

        if checkpoint.async_save:
            self._pending.append((step, finalize))
        else:
            finalize()

    def _finalize(self, until: int) -> None:
        while self._pending and self._pending[0][0] <= until:
            self._pending.pop(0)[1]()


def write(path: Path, weights: str) -> None:
    """A complete checkpoint as `torch_dist` leaves it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "__0_0.distcp").write_text(weights)
    (path / "common.pt").write_text("common")
    (path / "run_config.yaml").write_text("model: {}\n")
    (path / ".metadata").write_text("metadata")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
