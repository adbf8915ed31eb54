"""What a checkpoint of Megatron-LM's says of its training: the arguments that it keeps, without loading it.

The arguments stand in a pickle. Every class and function that it names is taken for one that does nothing
(docs.python.org/3/library/pickle.html, "Restricting Globals"), so that reading it runs no code.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from autoeval_hooks import layouts
from autoeval_hooks.manifest import MegatronRecord
from autoeval_hooks.megatron_record import with_tokenizer_files
from eval_runner.config.legacy_schema import Megatron
from eval_runner.watching.complete import check

OLD_WINDOW = 2048
"""Tokens that fit a model of the older tool's, whatever its length: as its patch of HELM had it."""
_PICKLE_MAX = 64 << 20
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_NUMBERS = {
    "tensor_parallel": "tensor_model_parallel_size", "pipeline_parallel": "pipeline_model_parallel_size",
    "expert_parallel": "expert_model_parallel_size", "seq_length": "seq_length",
    "padded_vocab_size": "padded_vocab_size", "num_layers": "num_layers", "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
}  # fmt: skip
"""Fields of the record, and Megatron's names for them."""


class Inert:
    """Stands for whatever a pickle names: takes anything, does nothing."""

    state: object = None

    def __init__(self, *args: object, **options: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return Inert

    def persistent_load(self, pid: object) -> object:     # a tensor's storage
        return None


def describe(path: str, old: Megatron | None, tokenizer: dict[str, str]) -> tuple[MegatronRecord, int | None]:
    """The record of the checkpoint at `path`, and the samples consumed where it tells. What it does not tell comes from
    the older file's section, where there is one, whose `tokenizer` arguments name files by absolute paths."""
    said = arguments(path, check(path))
    numbers: dict[str, Any] = {ours: _number(said, theirs) for ours, theirs in _NUMBERS.items()}
    record = MegatronRecord(**numbers)
    if old is not None:
        tensor, pipeline = record.tensor_parallel, record.pipeline_parallel
        if not (tensor and pipeline):
            tensor, pipeline = _split(os.listdir(path), old.process_num)
        kind = {"gpt2": "GPT2BPETokenizer", "sentencepiece": "SentencePieceTokenizer"}[old.tokenizer_type]
        record = replace(
            record, tensor_parallel=tensor, pipeline_parallel=pipeline, tokenizer_type=kind, tokenizer=tokenizer,
            seq_length=old.seq_length or record.seq_length or OLD_WINDOW,
        )  # fmt: skip
        record = with_tokenizer_files(record, os.sep)
    samples = said.get("consumed_train_samples")
    return record, samples if type(samples) is int and samples > 0 else None


def arguments(path: str, files: Iterable[str]) -> dict[str, Any]:
    """Megatron's arguments as the checkpoint keeps them; empty where it keeps none that can be found: `torch_dist` of
    0.19 and later has no common.pt. Raises OSError."""
    for name in files:
        if name.rpartition("/")[2] in ("common.pt", "model_optim_rng.pt"):
            return _of(layouts.place(path, name))
    return {}


def _of(file: str) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            member = next(m for m in archive.infolist() if m.filename.endswith("/data.pkl"))
            if member.file_size > _PICKLE_MAX:
                return {}
            found = _Reader(io.BytesIO(archive.read(member))).load()
    except OSError:
        raise
    except Exception:       # a pickle that is none can raise anything; then nothing is known
        return {}
    args = found.get("args") if isinstance(found, dict) else None
    state = args.state if isinstance(args, Inert) else None
    return state if isinstance(state, dict) else {}


def _split(names: Iterable[str], processes: int) -> tuple[int, int]:
    """Tensor and pipeline parallel sizes: by the directories of the format ``torch``, where they fit the number of
    processes; the other formats can be served with any, and tensor parallelism takes them all."""
    ranks = [found for name in names if (found := _RANK.fullmatch(name))]
    if not ranks:
        return processes, 1
    tensor, pipeline = len({rank[1] for rank in ranks}), len({rank[2] for rank in ranks})
    return (tensor, pipeline) if tensor * pipeline in (processes, len(ranks)) else (0, 0)


def _number(said: dict[str, Any], name: str) -> int:
    value = said.get(name)
    return value if type(value) is int and value > 0 else 0
