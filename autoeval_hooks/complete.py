"""Whether the save of a checkpoint is over, told from its files alone.

Files are read as far as their ends must be known: of safetensors, whose header says how long the file is
(github.com/huggingface/safetensors, "Format"), only that.
"""

from __future__ import annotations

import json
import os
import re
import struct

from autoeval_hooks import layouts, manifest
from autoeval_hooks.errors import CheckpointError, IncompleteError

STATE = "trainer_state.json"
"""transformers writes it after the weights."""
_HEADER_MAX = 100 << 20
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(safetensors|bin)")
_ZIP_END, _ZIP_SEARCHED = b"PK\x05\x06", 1 << 16
"""As in `autoeval_hooks.layouts`."""


def check(path: str) -> list[str]:
    """The model files of the checkpoint at `path`. Raises IncompleteError while its save is not over, CheckpointError
    for what can never be evaluated, OSError where the file system fails for now."""
    names = manifest.model_files(path)
    listed = os.listdir(path)
    try:
        if layouts.is_megatron(listed):
            layouts.check_complete(path, path, names, "")
        else:
            _check_huggingface(path, names, STATE in listed)
    except manifest.GONE as error:
        raise IncompleteError(f"{path}: changes or is deleted at this moment ({error.strerror})") from error
    return names


def _check_huggingface(path: str, names: list[str], over: bool) -> None:
    """`over`: the trainer has written what comes after the weights."""
    weights = [name for name in names if manifest.is_weights(name)]
    if not weights and not over:
        raise IncompleteError(f"{path}: holds no weights so far")
    if weights and not {"config.json", "adapter_config.json"} & set(names):
        raise IncompleteError(f"{path}: has no config.json so far")
    indexes = [name for name in names if name.endswith(".index.json")]
    for index in indexes:
        if missing := sorted(_shards(path, index) - set(names)):
            raise IncompleteError(f"{path}: has no {missing[0]} so far, which {index} names")
    if not indexes and (shards := [name for name in weights if _SHARD.fullmatch(name)]):
        raise IncompleteError(f"{path}: has {shards[0]}, and no index so far")
    for name in weights:
        if name.endswith(".safetensors"):
            _check_length(path, name)
        elif not over and not _has_zip_end(os.path.join(path, name)):
            raise IncompleteError(f"{path}: {name} has no end, so its save is not over or was cut off")


def _shards(path: str, index: str) -> set[str]:
    try:
        with open(os.path.join(path, index), "rb") as file:
            shards = set(json.loads(file.read())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise IncompleteError(f"{path}: {index} cannot be read so far ({error})") from error
    return {shard for shard in shards if isinstance(shard, str)}


def _check_length(path: str, name: str) -> None:
    """Raise IncompleteError unless a safetensors file is as long as its header says."""
    try:
        with open(os.path.join(path, name), "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _HEADER_MAX:
                raise CheckpointError(f"{path}: {name} is no safetensors file; save it again")
            header = json.loads(file.read(size))
            ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
            wanted = 8 + size + max(ends, default=0)
            there = os.fstat(file.fileno()).st_size
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise IncompleteError(f"{path}: {name} has no whole header so far") from error
    if there < wanted:
        raise IncompleteError(f"{path}: {name} has {there} of {wanted} bytes so far")


def _has_zip_end(file: str) -> bool:
    with open(file, "rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - _ZIP_SEARCHED))
        return _ZIP_END in opened.read(_ZIP_SEARCHED)
