"""What a ticket's record of a Megatron checkpoint becomes on a server's command line.

A ticket carries data only: what is not in these tables never becomes an argument.
"""

from __future__ import annotations

from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.manifest import MegatronRecord

FORMATS = ("torch", "torch_dist", "torch_dcp", "fsdp_dtensor")
DEFAULT_LENGTH = 2560
"""Tokens, prompt and answer, that the servers take unless they are told otherwise."""
TOKENIZER_VALUES = {
    name: f"--{name.replace('_', '-')}" for name in (
        "tokenizer_model", "vocab_file", "merge_file", "vocab_size", "vocab_extra_ids", "tiktoken_pattern",
        "tiktoken_num_special_tokens", "tokenizer_metadata", "null_tokenizer_eod_id", "null_tokenizer_pad_id",
    )
} | {"metadata_path": "--tokenizer-metadata"}  # fmt: skip
"""Names in `MegatronRecord.tokenizer`, and the arguments that take their values."""
TOKENIZER_FLAGS = {
    name: f"--{name.replace('_', '-')}" for name in (
        "tokenizer_sentencepiece_legacy", "tokenizer_hf_no_use_fast", "tokenizer_hf_no_include_special_tokens",
    )
}  # fmt: skip
TOKENIZER_LISTS = {
    "tiktoken_special_tokens": "--tiktoken-special-tokens", "tokenizer_special_tokens": "--tokenizer-special-tokens",
    "special_tokens": "--tokenizer-special-tokens",
}  # fmt: skip


def layout(record: MegatronRecord, tensor: int, pipeline: int) -> list[str]:
    """Format, parallel sizes (those of training are not asked for), and the length that requests may have."""
    argv = ["--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size", str(pipeline)]
    if record.format in FORMATS:
        argv += ["--ckpt-format", record.format]
    if record.seq_length >= DEFAULT_LENGTH:
        argv += ["--inference-max-seq-length", str(record.seq_length + 1)]      # a full prompt, and one token of answer
    return argv


def tokenizer(record: MegatronRecord) -> list[str]:
    """Without a type nothing is known, and the server takes what the checkpoint holds. Otherwise ours is meant, whose
    paths are those of this host. Joined by "=", no value can pass for an argument."""
    if not record.tokenizer_type:
        return []
    argv = [f"--tokenizer-type={record.tokenizer_type}", "--no-use-tokenizer-model-from-checkpoint-args"]
    given = {name: value for name, value in record.tokenizer.items() if value}
    argv += [f"{option}={given[name]}" for name, option in TOKENIZER_VALUES.items() if name in given]
    argv += [option for name, option in TOKENIZER_FLAGS.items() if given.get(name) == "true"]
    for name, option in TOKENIZER_LISTS.items():
        words = given.get(name, "").split()
        if any(word.startswith("-") for word in words):
            raise CheckpointError(f"the manifest's {name} holds {given[name]!r:.80}, which reads as an argument")
        argv += [option, *words] if words else []
    return argv
