"""Fine-tune a small language model with TRL's SFTTrainer; its checkpoints are evaluated while it trains.

An ordinary script plus one line, the one with AutoEvalCallback (and its import): TRL's trainers are built on Hugging
Face's. With `--lora` only an adapter is trained and saved, which the runner merges; see README.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

sys.path.append(str(Path(__file__).parents[1]))
import tiny  # model, tokenizer and text: examples/tiny.py

from autoeval_hooks import AutoEvalCallback

HERE = Path(__file__).parent


def main() -> None:
    parser = tiny.arguments(HERE, __doc__.splitlines()[0])
    parser.add_argument("--lora", action="store_true", help="train an adapter (needs peft)")
    args = parser.parse_args()
    os.environ["EXAMPLE_OUT"] = str(args.output.absolute())
    tiny.write_held_out(args.output / "held_out.jsonl")

    base = args.output / "base"     # an adapter names the model that it belongs to
    tiny.model().save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    lora = None
    if args.lora:
        from peft import LoraConfig

        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    length = tiny.CONTEXT - 1      # the trainer adds the end
    rows = [{"text": text[i : i + length]} for text in tiny.texts() for i in range(0, len(text), length)]
    trainer = SFTTrainer(
        model=str(base),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        args=SFTConfig(
            output_dir=str(args.output / "run"),
            max_length=tiny.CONTEXT,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=10,
            save_steps=args.save_steps,
            save_total_limit=1,     # a checkpoint is deleted at the next save, evaluated or not
            report_to="wandb" if args.wandb else "none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    trainer.add_callback(AutoEvalCallback(HERE / "autoeval.yaml"))
    trainer.train()


if __name__ == "__main__":
    main()
