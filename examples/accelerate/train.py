"""Train a small language model with accelerate, on one process or several; its checkpoints are evaluated meanwhile.

An ordinary loop; autoeval is the lines with `autoeval` (and the import).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

sys.path.append(str(Path(__file__).parents[1]))
import tiny  # model, tokenizer and text: examples/tiny.py

from autoeval_hooks.accelerate import AutoEval

HERE = Path(__file__).parent


def main() -> None:
    args = tiny.arguments(HERE, __doc__.splitlines()[0]).parse_args()
    os.environ["EXAMPLE_OUT"] = str(args.output.absolute())
    accelerator = Accelerator(cpu=True, log_with="wandb" if args.wandb else None)
    if args.wandb:
        accelerator.init_trackers("autoeval-examples")
    if accelerator.is_main_process:
        tiny.write_held_out(args.output / "held_out.jsonl")

    model, tokenizer = tiny.model(), tiny.tokenizer()
    loader = torch.utils.data.DataLoader(tiny.blocks(), batch_size=8 // accelerator.num_processes, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    autoeval = AutoEval(HERE / "autoeval.yaml", accelerator, args.output / "run", last_step=args.steps)

    step = 0
    while step < args.steps:
        for batch in loader:
            step += 1
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({"loss": loss.item()}, step=step)
            if step % args.save_steps == 0:
                path = autoeval.save_and_submit(model, step=step, tokenizer=tokenizer)      # on every process
                accelerator.print(f"step {step}: loss {loss.item():.3f}, saved {path}")
            if step == args.steps:
                break
    autoeval.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
