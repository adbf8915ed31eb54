"""The manifest: which files a checkpoint has, what is in them, and where in training it was saved.

A digest is taken without reading terabytes: a file up to `WHOLE` bytes is hashed in full, a larger one
by its size, its two ends and evenly spaced blocks between. A training step moves nearly every weight,
so two checkpoints differ in nearly every block; size and modification time are compared beside it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from autoeval_hooks import layouts
from autoeval_hooks.errors import CheckpointError, IncompleteError
from autoeval_hooks.fsio import hostname
from autoeval_hooks.run_identity import RunIdentity

VERSION = 1
WHOLE = 16 << 20
END = 1 << 20
BLOCK = 64 << 10
BLOCKS = 64

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
MODEL = (
    *WEIGHTS, *TOKENIZER, "config.json", "generation_config.json", "*.index.json", "adapter_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "*.model", "*.py",
)  # fmt: skip
"""What evaluating needs. The rest is neither pinned nor digested: the optimizer is large, another rank may still be
writing its random state, and a user may add notes of his own."""

GONE = (FileNotFoundError, NotADirectoryError)
"""What says that a file is not there; any other OSError may pass."""

INCOMPLETE = "checkpoint-is-incomplete.txt"
"""transformers leaves this file in a checkpoint that it was killed in (just-in-time checkpoints)."""


@dataclass(frozen=True)
class FileRecord:
    """One file: path relative to the checkpoint, bytes, modification time in ns, and digest (hex)."""

    path: str
    size: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True)
class MegatronRecord:
    """What Megatron-LM's arguments said at the save; 0 and "" where nothing did (a checkpoint given by hand).

    `format` is its `--ckpt-format`, `version` that of megatron.core, `seq_length` in tokens, the `*_parallel` sizes in
    ranks. `tokenizer` holds the arguments that name the tokenizer (`tokenizer_model`, `vocab_file`, …) as training
    gave them, `tokenizer_files` the files behind them, with absolute paths as training sees them.
    """

    format: str = ""
    version: str = ""
    world_size: int = 0
    tensor_parallel: int = 0
    pipeline_parallel: int = 0
    context_parallel: int = 0
    expert_parallel: int = 0
    seq_length: int = 0
    padded_vocab_size: int = 0
    num_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    tokenizer_type: str = ""
    tokenizer: dict[str, str] = field(default_factory=dict)
    tokenizer_files: tuple[FileRecord, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The record of one checkpoint.

    `path` is the directory as the training host names it, `kind` is ``huggingface`` or ``megatron``, `step` the
    optimizer step, `samples` and `tokens` what training had consumed (None: unknown). `weights_digest` covers the
    weight files alone, `digest` every file, the step and the run: it identifies the checkpoint. `saved_at` is in
    seconds since the epoch by the training host's clock, for people to read.
    """

    version: int
    path: str
    kind: str
    step: int
    samples: int | None
    tokens: int | None
    files: tuple[FileRecord, ...]
    weights_digest: str
    digest: str
    run: RunIdentity
    tokenizer: str
    host: str
    saved_at: float
    megatron: MegatronRecord | None = None

    @property
    def has_tokenizer(self) -> bool:
        return any(_matches(f.path, TOKENIZER) for f in self.files)

    @property
    def pickled(self) -> tuple[str, ...]:
        """Files that are pickles, or hold some: loading one can run code."""
        if self.kind == "megatron":
            return tuple(f.path for f in self.files if not f.path.endswith(".json"))
        return tuple(f.path for f in self.files if _matches(f.path, WEIGHTS) and not f.path.endswith(".safetensors"))


def build(
    directory: str, *, path: str, step: int, run: RunIdentity, samples: int | None = None,
    tokens: int | None = None, tokenizer: str = "", saved_at: float | None = None,
    megatron: MegatronRecord | None = None,
) -> Manifest:  # fmt: skip
    """The manifest of the checkpoint at `path`, read from `directory`: its pin, or itself. `megatron` is what training
    says of a checkpoint of Megatron's; one of those is recognised without, too.

    Raises CheckpointError where there are no weights, IncompleteError where the save is not over or was cut off, and
    OSError where the file system fails for now.
    """
    names = model_files(directory)
    if megatron is not None or layouts.is_megatron(_listed(directory)):
        known = megatron or MegatronRecord()
        ranks = (known.tensor_parallel, known.pipeline_parallel, known.expert_parallel)
        megatron = replace(known, format=layouts.check_complete(path, directory, names, known.format, ranks))
    elif not any(map(is_weights, names)):
        raise CheckpointError(
            f"{path}: no weights (*.safetensors or pytorch_model*.bin); a sharded FSDP or ZeRO-3 save holds none: "
            "save a full state dict (FSDP: SHARDED_STATE_DICT → FULL_STATE_DICT; ZeRO-3: "
            "stage3_gather_16bit_weights_on_model_save), or submit a converted copy: `python -m autoeval_hooks submit`"
        )
    files = tuple(record(directory, name) for name in names)
    draft = Manifest(
        version=VERSION, path=path, kind="megatron" if megatron else "huggingface", step=step, samples=samples,
        tokens=tokens, files=files,
        weights_digest=weights_digest_of(files), digest="", run=run, tokenizer=tokenizer, host=hostname(),
        saved_at=time.time() if saved_at is None else saved_at, megatron=megatron,
    )  # fmt: skip
    return replace(draft, digest=digest_of(draft))


def digest_of(manifest: Manifest) -> str:
    """The checkpoint's identity: its run, its step and its content. The path and the times are no part of it."""
    content: list[list[object]] = [[f.path, f.size, f.digest] for f in manifest.files]
    return _hash([["run", manifest.run.id], ["step", manifest.step], *content])


def weights_digest_of(files: Iterable[FileRecord]) -> str:
    """The digest of the weights alone: equal for two checkpoints that answer alike."""
    return _hash([f.path, f.size, f.digest] for f in files if _matches(f.path, WEIGHTS + layouts.WEIGHTS))


def model_files(directory: str) -> list[str]:
    """The files that evaluating needs, relative to the checkpoint and sorted, of the checkpoint or pin in `directory`.
    Sub-directories are not part of a Hugging Face checkpoint's model."""
    names = _listed(directory)
    if INCOMPLETE in names:
        raise IncompleteError(f"{directory}: {INCOMPLETE} says that its save was cut off")
    if layouts.is_megatron(names):
        return layouts.megatron_files(directory, names)
    return [n for n in names if _matches(n, MODEL) and _is_file(os.path.join(directory, n))]


def written_ns(path: str) -> int | None:
    """When the newest of a checkpoint's model files was written; None where it has none, or is gone."""
    try:
        times = [os.stat(layouts.place(path, name)).st_mtime_ns for name in model_files(path)]
    except (CheckpointError, *GONE):
        return None
    return max(times, default=None)


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except GONE as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error.strerror}); was it deleted?") from error


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of a Hugging Face checkpoint."""
    return _matches(name, WEIGHTS)


def _is_file(path: str) -> bool:
    """Raises CheckpointError for one that was deleted since it was listed: what is left would pass for the whole."""
    if os.path.isfile(path):
        return True
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: was deleted meanwhile")
    return False


def record(directory: str, name: str) -> FileRecord:
    """Size, time and digest of one file. Raises CheckpointError when it changes or vanishes meanwhile.

    A symbolic link is followed, wherever it leads: model caches are full of them, and it is the content that the
    digest is taken of. Only what the manifest's digests match is evaluated, and no content is published.
    """
    full = layouts.place(directory, name)
    try:
        if not stat.S_ISREG(os.stat(full).st_mode):     # opening a pipe waits, and a device may act on it
            raise CheckpointError(f"{full}: not a regular file")
        with open(os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            digest = _digest(file.fileno(), before.st_size)
            after = os.fstat(file.fileno())
    except GONE as error:
        raise CheckpointError(f"{full}: cannot be read ({error.strerror})") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{full}: changed while it was read")
    return FileRecord(name, before.st_size, before.st_mtime_ns, digest)


def _digest(fd: int, size: int) -> str:
    hasher = hashlib.sha256(str(size).encode())
    for offset, length in _spans(size):
        while length:
            data = os.pread(fd, min(length, 1 << 20), offset)
            if not data:
                break
            hasher.update(data)
            offset, length = offset + len(data), length - len(data)
    return hasher.hexdigest()


def _spans(size: int) -> list[tuple[int, int]]:
    """(offset, length) of what is hashed."""
    if size <= WHOLE:
        return [(0, size)]
    stride = (size - 2 * END) // BLOCKS
    return [(0, END), *((END + i * stride, BLOCK) for i in range(BLOCKS)), (size - END, END)]


def _hash(rows: Iterable[list[object]]) -> str:
    return hashlib.sha256(json.dumps(list(rows), separators=(",", ":")).encode()).hexdigest()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)
