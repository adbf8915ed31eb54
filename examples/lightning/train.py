"""Train a small language model with Lightning; its checkpoints are evaluated while it trains.

An ordinary script plus one line, the one with AutoEvalCallback (and its import).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

sys.path.append(str(Path(__file__).parents[1]))
import tiny  # model, tokenizer and text: examples/tiny.py

from autoeval_hooks.lightning import AutoEvalCallback

HERE = Path(__file__).parent


class LanguageModel(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.tokenizer = tiny.model(), tiny.tokenizer()     # found and exported at each save

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    args = tiny.arguments(HERE, __doc__.splitlines()[0]).parse_args()
    os.environ["EXAMPLE_OUT"] = str(args.output.absolute())
    tiny.write_held_out(args.output / "held_out.jsonl")
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.output,
        logger=WandbLogger(project="autoeval-examples", save_dir=args.output) if args.wandb else False,
        callbacks=[
            ModelCheckpoint(dirpath=args.output / "run", every_n_train_steps=args.save_steps),   # keeps the newest
            AutoEvalCallback(HERE / "autoeval.yaml"),
        ],
    )
    trainer.fit(LanguageModel(), torch.utils.data.DataLoader(tiny.blocks(), batch_size=8, shuffle=True))


if __name__ == "__main__":
    main()
