"""Which files make a checkpoint of Megatron-LM, and when it is complete.

Formats are those of Megatron's `--ckpt-format`: ``torch`` has a directory `mp_rank_TT[_PPP][_EEE]` for each model
parallel rank; the others write all files into the iteration's own directory. What says that such a save is complete
is written last: `metadata.json` for ``torch_dist``, `.metadata` for ``torch_dcp`` and ``fsdp_dtensor``
(megatron/training/checkpointing.py and megatron/core/dist_checkpointing, 0.12 to 0.19). A directory `modelopt_state`,
of a quantized or pruned model, is a small ``torch_dist`` checkpoint within one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator

from autoeval_hooks.errors import CheckpointError, IncompleteError

FORMATS = ("torch", "torch_dist", "torch_dcp", "fsdp_dtensor")
ITERATION = re.compile(r"iter_(\d{7,18})")
"""The names of Megatron's checkpoint directories; the group is the iteration."""
BRIDGE = "run_config.yaml"
"""Megatron-Bridge writes it; it cannot load its own checkpoints without."""
WEIGHTS = ("*.distcp", "mp_rank_*/model_optim_rng.pt")
"""They hold the optimizer's state too: nothing tells its bytes from those of the weights."""

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_TORCH = "model_optim_rng.pt"
_MODELOPT = "modelopt_state"
_SHARDS = re.compile(rb"__\d{1,9}_\d{1,9}\.distcp")
_NAME_MAX = 32
"""Bytes; no name of a shard is longer."""
_ZIP_END, _ZIP_SEARCHED = b"PK\x05\x06", 1 << 16
"""What `torch.save` writes is a zip archive, whose list of contents comes last (APPNOTE.TXT of PKWARE, 4.3.16)."""
_FILE = re.compile(
    rf"{_RANK.pattern}/{re.escape(_TORCH)}|({_MODELOPT}/)?([\w.+-]{{1,200}}\.distcp|\.metadata|metadata\.json|common\.pt)"
    rf"|{re.escape(BRIDGE)}",
    re.ASCII,
)
_OTHERS = re.compile(r".*\.safetensors|(pytorch_model|adapter_model).*\.bin")
"""Weights as Megatron writes none: a directory with such files is no checkpoint of its."""
_SLASH = "%2F"


def flat(name: str) -> str:
    """The name that a file of a checkpoint has in a pin, which has no directories: deleting one stays simple."""
    return name.replace("/", _SLASH)


def place(directory: str, name: str) -> str:
    """The path of a checkpoint's file `name` in `directory`: the checkpoint itself or a pin of it."""
    nested = os.path.join(directory, name)
    return nested if "/" not in name or os.path.lexists(nested) else os.path.join(directory, flat(name))


def iteration(path: str) -> int | None:
    """The iteration that Megatron would find under the name of the directory `path`; None where it would find none."""
    found = ITERATION.fullmatch(os.path.basename(path))
    return int(found[1]) if found and found[0] == f"iter_{int(found[1]):07d}" else None


def is_file(name: str) -> bool:
    """Whether `name`, relative to a checkpoint of Megatron's, is that of a file which evaluating may need."""
    return _FILE.fullmatch(name) is not None


def is_megatron(names: Iterable[str]) -> bool:
    """Whether a directory with these names is a checkpoint of Megatron's, or a pin of one."""
    known = set(names)
    if any(_OTHERS.fullmatch(n) for n in known):
        return False
    return {"common.pt", "metadata.json"} <= known or any(
        n == ".metadata" or n.endswith(".distcp") or _RANK.fullmatch(n.partition(_SLASH)[0]) for n in known
    )


def megatron_files(directory: str, names: Iterable[str]) -> list[str]:
    """The files that evaluating needs, relative to the checkpoint and sorted; `names` is the directory's listing.
    The optimizer's own files (``torch`` with a distributed optimizer) and a data loader's are not among them."""
    found = set()
    for name in names:
        nested = os.path.join(directory, name)
        if (_RANK.fullmatch(name) or name == _MODELOPT) and os.path.isdir(nested):
            found |= {f"{name}/{below}" for below in os.listdir(nested)}
        else:
            found.add(name.replace(_SLASH, "/", 1))
    return sorted(n for n in found if is_file(n) and os.path.isfile(place(directory, n)))


def check_complete(
    path: str, directory: str, files: Iterable[str], written: str, ranks: tuple[int, int, int] = (0, 0, 0)
) -> str:
    """The format of the checkpoint at `path`, whose model files `files` were found in `directory`: itself or its pin.

    `written` is the format that training says it writes, `ranks` its tensor, pipeline and expert parallel sizes; ""
    and 0 where that is not known. Raises IncompleteError where its save is not over or was cut off, CheckpointError
    for a format that nothing reads.
    """
    names = set(files)
    shards = any(n.endswith(".distcp") for n in names)
    said = _backend(path, directory, "") if "metadata.json" in names else ""
    early = "torch_dist" if "common.pt" in names else "torch_dcp"       # torch_dcp and fsdp_dtensor look the same
    kind = said or written or (early if shards or not any("/" in n for n in names) else "torch")
    if kind not in FORMATS:
        raise CheckpointError(
            f"{path}: is in the format {kind!r:.60}; let the Megatron that wrote it write it as another "
            f"(--ckpt-convert-format torch_dist --ckpt-convert-save DIR) and submit that; save as {', '.join(FORMATS)}"
        )
    if kind == "torch":
        _check_ranks(path, directory, sorted(n for n in names if "/" in n), ranks)
        return kind
    if not shards:
        raise IncompleteError(f"{path}: holds no weights (*.distcp or mp_rank_*/{_TORCH})")
    parts = ["", f"{_MODELOPT}/"] if any(n.startswith(f"{_MODELOPT}/") for n in names) else [""]
    for part in parts:
        for last in (".metadata", "metadata.json") if kind == "torch_dist" else (".metadata",):
            if part + last not in names:
                raise IncompleteError(f"{path}: has no {part + last}, so its save in the format {kind} is not complete")
        if part and kind == "torch_dist":
            _backend(path, directory, part)
        _check_shards(path, directory, part, names)
    return kind


def _backend(path: str, directory: str, part: str) -> str:
    """The format that a `metadata.json` names. It is written in place, so that it may be there and empty."""
    name = f"{part}metadata.json"
    try:
        return str(json.loads(b"".join(_chunks(path, place(directory, name))))["sharded_backend"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise IncompleteError(f"{path}: its {name} does not say how it was saved, so its save was cut off") from error


def _check_shards(path: str, directory: str, part: str, names: set[str]) -> None:
    """Raise IncompleteError where `.metadata`, a pickle, names a file that is not there. It is searched, not loaded."""
    own = {n.removeprefix(part) for n in names if n.startswith(part) and "/" not in n.removeprefix(part)}
    there = {found[0] for n in own for found in _SHARDS.finditer(n.encode())}
    last = b""
    for data in _chunks(path, place(directory, f"{part}.metadata")):
        for found in _SHARDS.finditer(last + data):
            if found[0] not in there:
                shard = part + found[0].decode()
                raise IncompleteError(f"{path}: has no {shard}, which its {part}.metadata names: is it being deleted?")
        last = data[-_NAME_MAX:]


def _check_ranks(path: str, directory: str, files: list[str], ranks: tuple[int, int, int]) -> None:
    """Raise IncompleteError unless every model parallel rank has its file, as far as it can be known which there are:
    by `ranks`, else by the directories that are there."""
    found = [_RANK.match(name) for name in files]
    places = [tuple(int(n) for n in match.groups() if n) for match in found if match]
    if not places:
        raise IncompleteError(f"{path}: holds no weights (*.distcp or mp_rank_*/{_TORCH})")
    for missing in _missing(places, ranks):
        raise IncompleteError(f"{path}: has no {missing}: it is being saved or deleted, or its save was cut off")
    for name in os.listdir(directory):
        if _RANK.fullmatch(name) and f"{name}/{_TORCH}" not in files and os.path.isdir(os.path.join(directory, name)):
            raise IncompleteError(f"{path}: has no {name}/{_TORCH}: it is being saved, or its save was cut off")
    for name in files:
        if _ZIP_END not in _end_of(path, place(directory, name)):
            raise IncompleteError(f"{path}: {name} has no end, so its save is not over or was cut off")


def _chunks(path: str, file: str) -> Iterator[bytes]:
    """The content of a file of the checkpoint at `path`. It is read, not mapped: where another save cuts a mapped file
    short, the process that looks at it dies."""
    try:
        with open(file, "rb") as opened:
            while data := opened.read(1 << 20):
                yield data
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IncompleteError(f"{path}: {os.path.basename(file)} is gone: is it being deleted?") from error


def _end_of(path: str, file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, opened.seek(0, os.SEEK_END) - _ZIP_SEARCHED))
            return opened.read(_ZIP_SEARCHED)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IncompleteError(f"{path}: {os.path.basename(file)} is gone: is it being deleted?") from error


def _missing(places: list[tuple[int, ...]], ranks: tuple[int, int, int]) -> Iterator[str]:
    """Directories that must be there and are not. The second number is the pipeline's rank where there is more than
    one, the last the expert's likewise; where both are, not every pair of tensor and expert rank has a directory."""
    tensor, pipeline, expert = ranks
    there = set(places)
    if tensor and pipeline:
        model = [(t, p) if pipeline > 1 else (t,) for t in range(tensor) for p in range(pipeline)]
        width = len(model[0])
        yield from (_rank(r) for r in model if not any(p[:width] == r for p in there))
        yield from (f"mp_rank_*_{e:03d}" for e in range(expert) if expert > 1 and not any(p[-1] == e for p in there))
        return
    for i in range(max(map(len, there))):
        numbers = {p[i] for p in there if len(p) > i}
        yield from (f"mp_rank_* directory with {n} in place {i + 1}" for n in range(max(numbers)) if n not in numbers)


def _rank(numbers: tuple[int, ...]) -> str:
    return "_".join(["mp_rank", f"{numbers[0]:02d}", *(f"{n:03d}" for n in numbers[1:])])
