"""Merge an adapter (LoRA) into its base model: `python merge.py CHECKPOINT OUTPUT`. Needs peft."""

from __future__ import annotations

import sys

import torch
from peft import AutoPeftModelForCausalLM


def main(checkpoint: str, output: str) -> None:
    """`CHECKPOINT` is a directory that PEFT wrote; its `adapter_config.json` names the base model."""
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, is_trainable=False)
    model.merge_and_unload().save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
