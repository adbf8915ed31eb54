"""A pretraining script as a user of Megatron-LM has it, but for its size: two layers, a data set of its own, no GPU.

    torchrun … pretrain_tiny.py FLAGS…          without autoeval
    torchrun … -m autoeval_hooks.megatron pretrain_tiny.py FLAGS… --autoeval-config autoeval.yaml

It is run, never imported, but by children of its process that import their parent's script again. TINY_PAUSE_S makes
each batch take so many seconds more.
"""

from __future__ import annotations

import os
import time
from typing import Any

import shim  # found beside the script: its directory comes first in the module path

shim.install()

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

shim.after_import()


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The same random rows in every run, in the shape that Megatron's GPT wants."""

    def __init__(self, length: int, sequence: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(0, vocabulary, (length, sequence + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.rows[i, :-1], "labels": self.rows[i, 1:]}


def datasets(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    args = get_args()
    return tuple(Rows(max(n or 0, 1), args.seq_length, args.padded_vocab_size) for n in samples)  # type: ignore[return-value]


datasets.is_distributed = True  # type: ignore[attr-defined]  # on every rank, so that nothing needs broadcasting


def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    count = torch.tensor(output.numel(), dtype=torch.int)
    total = output.float().sum()
    return total, count, {"lm loss": torch.cat([total.detach().view(1), count.view(1)])}


def forward(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    time.sleep(float(os.environ.get("TINY_PAUSE_S", "0")))
    batch = next(iterator)
    tokens, labels = batch["tokens"], batch["labels"]
    length = tokens.shape[1]
    mask = torch.tril(torch.ones(1, 1, length, length)) < 0.5
    positions = torch.arange(length).expand_as(tokens)
    return model(tokens, positions, mask, labels=labels), loss


if __name__ == "__main__":
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward)
