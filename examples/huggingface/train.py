"""Train a small causal language model with Hugging Face Trainer; its checkpoints are evaluated while it trains.

This is an ordinary Trainer script plus one line, the one with AutoEvalCallback (and its import).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from autoeval_hooks import AutoEvalCallback

HERE = Path(__file__).parent


class Blocks(torch.utils.data.Dataset):
    """One long row of tokens, cut into blocks of `length`."""

    def __init__(self, path: Path, length: int) -> None:
        tokens = np.load(path)
        self.blocks = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": block, "labels": block}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "out/data", help="what data.py wrote")
    parser.add_argument("--output", type=Path, default=HERE / "out/run", help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--save-steps", type=int, default=150)
    args = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
    config = LlamaConfig(      # 0.66 M parameters: they learn something in 90 seconds on one core
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=341,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        processing_class=tokenizer,
        train_dataset=Blocks(args.data / "train.npy", tokenizer.model_max_length),
        data_collator=default_data_collator,
        args=TrainingArguments(
            output_dir=str(args.output),
            run_name="python-sources",
            report_to="wandb",
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=1.5e-3,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=10,
            save_steps=args.save_steps,
            save_total_limit=1,     # a checkpoint is deleted at the next save, evaluated or not
        ),
    )
    trainer.add_callback(AutoEvalCallback(HERE / "autoeval.yaml"))
    trainer.train()


if __name__ == "__main__":
    main()
