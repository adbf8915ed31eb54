"""What the files that a server reads hold, beside the checkpoint's: a path stays the same when its content changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoeval_hooks import manifest
from autoeval_hooks.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken", "chat_template*",
)  # fmt: skip
"""What makes a tokenizer, where it is another directory's than the checkpoint's."""


def digest(told: Any) -> str:
    """Of what JSON can hold; short, for a server's facts."""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def of_arguments(arguments: Sequence[str], where: str) -> str:
    """A digest of the arguments, and of every file that one names, or the part of one after ``=``. A relative path is
    no file's: servers run in a directory of their own. Raises ConfigError for a file that cannot be read."""
    found = []
    for i, argument in enumerate(arguments):
        for path in map(Path, (argument, argument.partition("=")[2])):
            try:
                if path.is_absolute() and path.is_file():
                    found.append([i, manifest.record(str(path.parent), path.name).digest])
            except OSError as error:
                raise ConfigError(f"{where}.arguments[{i}]: {path}: cannot be read ({error.strerror})") from error
    return digest([list(arguments), found])


def of_tokenizer(directory: Path) -> list[list[str]]:
    """Names and digests of a tokenizer's files. Raises CheckpointError where they cannot be read."""
    names = filter(is_tokenizers, manifest.model_files(str(directory)))
    return [[name, manifest.record(str(directory), name).digest] for name in names]


def is_tokenizers(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in TOKENIZER_FILES)
