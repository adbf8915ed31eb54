"""Loops with the real wandb client: `python -m tests.wandb_loops accelerate|lightning|plain OUT CONFIG relay|without`.

It plays the runner, too: points come out of order while training goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoeval_hooks import relay as relays
from tests.processes import wait_for
from tests.wandb_trainer import drop

STEPS = 12
POINTS = {4: [30], 6: [10, 20]}


def points(queue: Path, step: int) -> None:
    """After a step: what a runner has by then, and time for the relay to take it."""
    if (new := POINTS.get(step)) and queue.exists():
        wait_for(lambda: list(queue.glob("relay/*/run.json")))
        (directory,) = (queue / "relay").iterdir()
        drop(directory, new)
    time.sleep(0.05)


def plain(out: Path, config: Path, queue: Path, relay: bool) -> None:
    import wandb

    from autoeval_hooks import AutoEval

    wandb.init(project="p", id="r1")
    autoeval = AutoEval(config, out, last_step=STEPS) if relay else None
    for step in range(1, STEPS + 1):
        wandb.log({"loss": 1 / step}, step=step)
        if autoeval:
            autoeval.logged(step)
        points(queue, step)
    if autoeval:
        autoeval.close()
    wandb.finish()


def accelerate(out: Path, config: Path, queue: Path, relay: bool) -> None:
    from accelerate import Accelerator

    from autoeval_hooks.accelerate import AutoEval

    accelerator = Accelerator(cpu=True, log_with="wandb")
    accelerator.init_trackers("p", init_kwargs={"wandb": {"id": "r1"}})
    if relay:
        AutoEval(config, accelerator, out, last_step=STEPS)
    for step in range(1, STEPS + 1):
        accelerator.log({"loss": 1 / step}, step=step)
        points(queue, step)
    accelerator.end_training()


def lightning(out: Path, config: Path, queue: Path, relay: bool) -> None:
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import WandbLogger

    from autoeval_hooks.lightning import AutoEvalCallback
    from tests.trainer import trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.w = trainer(out / "unused").model, torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("loss", 1 / (batch_idx + 1))
            return self.w.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Points(Callback):
        def on_train_batch_end(self, trainer: Trainer, *given: Any) -> None:
            points(queue, trainer.global_step)

    ours = [AutoEvalCallback(config)] if relay else []
    Trainer(
        accelerator="cpu", max_steps=STEPS, logger=WandbLogger(project="p", id="r1"), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[ModelCheckpoint(dirpath=out, every_n_train_steps=4), Points(), *ours],
    ).fit(Module(), torch.utils.data.DataLoader(torch.zeros(64, 1)))  # fmt: skip


if __name__ == "__main__":
    relays.POLL_S, relays.BEAT_S, relays.GRACE_S = 0.01, 0.05, 0.05
    kinds: dict[str, Callable[[Path, Path, Path, bool], None]] = {
        "accelerate": accelerate, "lightning": lightning, "plain": plain,
    }  # fmt: skip
    kind, out, config, relay = sys.argv[1:]
    kinds[kind](Path(out), Path(config), Path(config).parent / "queue", relay == "relay")
