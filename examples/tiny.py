"""What the examples of training loops train: a model and a tokenizer made from nothing, on text that every machine with
Python has. No hub, no download, no GPU; a hundred steps take seconds. Nothing in it is about autoeval."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 128
"""Tokens that the model reads at once. Here a token is a byte."""
PARAGRAPHS = 20
"""Held out for the evaluation, each of `CONTEXT` bytes at most."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and one each for beginning and end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<bos>", "<eos>", *alphabet])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", model_max_length=CONTEXT
    )


def model() -> LlamaForCausalLM:
    """30,000 parameters, the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def texts() -> list[str]:
    """Sources of Python's own library, to train on."""
    return [inspect.getsource(argparse), inspect.getsource(json), inspect.getsource(json.decoder)]


def blocks() -> torch.Tensor:
    """The texts as rows of `CONTEXT` tokens."""
    ids = tokenizer()("".join(texts()), return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def write_held_out(path: Path) -> Path:
    """Paragraphs of a module that is not trained on, as the evaluation reads them."""
    lines = inspect.getsource(textwrap).splitlines()
    parts = ["\n".join(lines[i : i + 3])[: CONTEXT - 1] for i in range(0, len(lines), 3)]
    chosen = [part for part in parts if part.isascii() and len(part) > CONTEXT // 2][:PARAGRAPHS]
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ({"id": f"paragraph{i}", "text": part} for i, part in enumerate(chosen))
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def arguments(here: Path, description: str) -> argparse.ArgumentParser:
    """What all the loops can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=here / "out", help="where everything goes")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-steps", type=int, default=40)
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases (WANDB_MODE=offline works)")
    return parser
