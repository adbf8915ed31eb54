"""What Megatron-LM's arguments say of the checkpoints that they lead to."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autoeval_hooks import manifest
from autoeval_hooks.delivery import log
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.manifest import FileRecord, MegatronRecord

_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file", "metadata_path", "tokenizer_metadata")
_TOKENIZER = (
    *_TOKENIZER_FILES, "vocab_size", "vocab_extra_ids", "special_tokens", "tokenizer_special_tokens",
    "tokenizer_prompt_format", "sft_tokenizer_prompt_format", "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens", "tokenizer_sentencepiece_legacy", "tiktoken_pattern",
    "tiktoken_num_special_tokens", "tiktoken_special_tokens", "null_tokenizer_eod_id", "null_tokenizer_pad_id",
)  # fmt: skip
_GROWING = ("rampup_batch_size", "step_batch_size_schedule", "decrease_batch_size_if_needed")
"""Arguments by which the global batch size changes as training goes on."""
_IN_A_DIRECTORY = (*manifest.TOKENIZER, "*.model", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template*")  # fmt: skip


def record(args: Any) -> MegatronRecord:
    """The record of the checkpoints that training with these arguments saves, without its tokenizer's files: only
    memory is read. What an argument does not say is 0 or ""."""
    core = sys.modules.get("megatron.core")
    return MegatronRecord(
        format=_text(getattr(args, "ckpt_format", None)),
        version=_text(getattr(core, "__version__", None)),
        world_size=_number(args, "world_size"),
        tensor_parallel=_number(args, "tensor_model_parallel_size"),
        pipeline_parallel=_number(args, "pipeline_model_parallel_size"),
        context_parallel=_number(args, "context_parallel_size"),
        expert_parallel=_number(args, "expert_model_parallel_size"),
        seq_length=_number(args, "seq_length"),
        padded_vocab_size=_number(args, "padded_vocab_size"),
        num_layers=_number(args, "num_layers"),
        hidden_size=_number(args, "hidden_size"),
        num_attention_heads=_number(args, "num_attention_heads"),
        tokenizer_type=_text(getattr(args, "tokenizer_type", None)),
        tokenizer={name: text for name in _TOKENIZER if (text := _text(getattr(args, name, None)))},
    )


def samples_at(args: Any, iteration: int, *, resumed_at: int, consumed: int) -> int | None:
    """Samples consumed at an iteration that nobody counted at, where `consumed` were at `resumed_at`; None where the
    batch size was not always the present one."""
    if iteration == resumed_at:
        return consumed
    size = _number(args, "global_batch_size")
    growing = any(getattr(args, name, None) for name in _GROWING)
    return None if not size or growing or consumed != resumed_at * size else iteration * size


def with_tokenizer_files(known: MegatronRecord, directory: str) -> MegatronRecord:
    """The record with the tokenizer's files digested, where its arguments name some; their paths start at `directory`,
    and are absolute in the end. One that cannot be read is a warning: training itself has read it. Reads files."""
    found: dict[str, FileRecord] = {}
    here: dict[str, str] = {}
    for name in _TOKENIZER_FILES:
        if not (written := known.tokenizer.get(name, "")):
            continue
        path = os.path.abspath(os.path.join(directory, os.path.expanduser(written)))
        if os.path.exists(path):        # else it is the name of something elsewhere, such as a hub
            here[name] = path
        for file in _files(path):
            try:
                found[file] = replace(manifest.record(os.path.dirname(file), os.path.basename(file)), path=file)
            except (OSError, CheckpointError) as error:
                log.warning("autoeval: --%s: %s; the manifest is without it", name.replace("_", "-"), error)
    files = tuple(found[path] for path in sorted(found))
    return replace(known, tokenizer=known.tokenizer | here, tokenizer_files=files)


def _files(path: str) -> Iterator[str]:
    """The file itself, or the tokenizer's files in a directory; none where it is the name of something elsewhere."""
    if os.path.isfile(path):
        yield os.path.abspath(path)
    elif os.path.isfile(os.path.join(path, "tokenizer_config.json")) or os.path.isfile(
        os.path.join(path, "tokenizer.json")
    ):
        for name in sorted(os.listdir(path)):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in _IN_A_DIRECTORY):
                yield os.path.abspath(os.path.join(path, name))


def _number(args: Any, name: str) -> int:
    value = getattr(args, name, None)
    return value if type(value) is int and value > 0 else 0


def _text(value: Any) -> str:
    """As it would stand on the command line; a flag that is set is "true", what is not given is ""."""
    if value is None or value is False:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "true" if value is True else str(value)
