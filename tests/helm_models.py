"""Tiny Hugging Face checkpoints with a tokenizer, built on the spot: real files, weights of chance."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

START, END = "<s>", "<|endoftext|>"
TEXT = [Path(__file__).read_text(encoding="utf-8")]


def tiny_tokenizer(
    path: Path, text: list[str] = TEXT, size: int = 400, adds_start: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `size` entries on `text` and save it to the directory `path`.

    As that of GPT-2 it has one special token and adds none by itself; with `adds_start`, it puts a
    token of its own before every text, as those of Llama and Gemma do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=START if adds_start else END
    )
    fast.save_pretrained(str(path))
    return fast


def tiny_model(path: Path | str, seed: int, length: int = 64, adds_start: bool = False) -> Path:
    """A GPT-2 of two narrow layers and a window of `length` tokens, its weights drawn from `seed`."""
    path = Path(path)
    tokenizer = tiny_tokenizer(path, adds_start=adds_start)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=length, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(str(path))
    return path
