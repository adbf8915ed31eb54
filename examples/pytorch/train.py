"""Train a small language model in a plain PyTorch loop; its checkpoints are evaluated while it trains.

With `--wait`, each checkpoint is handed over by `submit()`, which waits for the file system and raises; otherwise in
the background, and scores come back into the W&B run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
import tiny  # model, tokenizer and text: examples/tiny.py

from autoeval_hooks import AutoEval, submit

HERE = Path(__file__).parent


def main() -> None:
    parser = tiny.arguments(HERE, __doc__.splitlines()[0])
    parser.add_argument("--wait", action="store_true", help="hand over by submit()")
    args = parser.parse_args()
    os.environ["EXAMPLE_OUT"] = str(args.output.absolute())
    tiny.write_held_out(args.output / "held_out.jsonl")
    if args.wandb:
        import wandb

        wandb.init(project="autoeval-examples", name="pytorch")

    model, tokenizer, rows = tiny.model(), tiny.tokenizer(), tiny.blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    autoeval = None if args.wait else AutoEval(HERE / "autoeval.yaml", args.output / "run", last_step=args.steps)
    for step in range(1, args.steps + 1):
        batch = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.wandb:
            wandb.log({"loss": loss.item()}, step=step)
            if autoeval:
                autoeval.logged(step)       # scores that wait join the row
        if step % args.save_steps == 0:
            path = args.output / "run" / f"checkpoint-{step}"
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            print(f"step {step}: loss {loss.item():.3f}, saved {path}")
            if autoeval:
                autoeval.saved(path, step)
            else:
                submit(path, step=step, config=HERE / "autoeval.yaml")
    if autoeval:
        autoeval.close()


if __name__ == "__main__":
    main()
