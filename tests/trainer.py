"""A real Hugging Face Trainer on a tiny model, as tests need it: a second for a dozen steps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket

VOCABULARY = 64


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The same 64 random rows every time."""

    def __init__(self) -> None:
        self.rows = torch.randint(0, VOCABULARY, (64, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def trainer(
    output_dir: Path, *callbacks: TrainerCallback, steps: int = 6, width: int = 16, **arguments: Any
) -> Trainer:
    """A Trainer that saves every second step. With a `width` of 600 the weights are so large that a pin links them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=width, n_layer=1, n_head=2))
    settings: dict[str, Any] = {
        "output_dir": str(output_dir), "max_steps": steps, "save_steps": 2, "logging_steps": 1, "report_to": "none",
        "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "seed": 0, "learning_rate": 1e-2,
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**settings | arguments), train_dataset=Tokens(), eval_dataset=Tokens(),
        callbacks=[*callbacks],
    )  # fmt: skip


def handed_over(queue_root: Path, *states: str) -> dict[tuple[str, int], Ticket]:
    """(suite, step) → the ticket, of the tickets in these states (pending by default)."""
    queue = Queue(str(queue_root))
    found = [queue.read(token) for token in queue.tokens(*(states or ("pending",)))]
    out = {(t.suite, t.manifest.step): t for t in found}
    assert len(out) == len(found), "a checkpoint was handed over twice"
    return out


def weights_digest(trained: Trainer) -> str:
    """Of every bit of the model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trained.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
