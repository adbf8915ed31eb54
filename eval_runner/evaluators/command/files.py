"""Files that a program left in its output directory, which may be anything: links, pipes, gigabytes, no text."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from autoeval_hooks.errors import AutoEvalError, ConfigError

MAX_WHOLE = 32 << 20
"""Bytes of a file that is read as a whole."""
MAX_LINES = 512 << 20
"""Bytes of a JSONL file that is read row by row."""
MAX_LINE = 1 << 20
SHOWN = 10
"""Names that a message lists."""


def rows(root: Path, name: str, limit: int = MAX_LINES) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL file, or of a JSON file that holds a list, each with its place for messages. As `load`."""
    if not is_lines(name):
        data = load(root, name)
        if not isinstance(data, list):
            raise ConfigError(f"{name}: expected a list of rows; for one row a line call it .jsonl")
        yield from ((f"{name}[{i}]", row) for i, row in enumerate(data))
        return
    with open_below(root, name, limit) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise ConfigError(f"{name}:{number}: is longer than {MAX_LINE} bytes")
            if line.strip():
                yield f"{name}:{number}", _parsed(line, f"{name}:{number}")


def load(root: Path, name: str) -> Any:
    """What a JSON file holds; of a JSONL file, the list of its rows. Raises what `open_below` does, and AutoEvalError
    for what is no JSON: the program may have been cut short."""
    if is_lines(name):
        return [row for _, row in rows(root, name, MAX_WHOLE)]
    with open_below(root, name, MAX_WHOLE) as file:
        return _parsed(file.read(MAX_WHOLE), name)


def is_lines(name: str) -> bool:
    return name.lower().endswith((".jsonl", ".ndjson"))


def open_below(root: Path, name: str, limit: int) -> BinaryIO:
    """A regular file of `limit` bytes at most, below `root`, which is a directory that holds no link to itself.

    Raises ConfigError that says what is there instead, and AutoEvalError where it cannot be read.
    """
    real = os.path.realpath(root / name)
    if not Path(real).is_relative_to(root):
        raise ConfigError(f"{name}: leads out of {{output}}; have the program leave a copy")
    try:
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: the program left no such file in {{output}}; {_there(root)}") from error
    except OSError as error:
        raise AutoEvalError(f"{name}: cannot be read ({error.strerror})") from error
    found = os.fstat(fd)
    regular = stat.S_ISREG(found.st_mode)
    if not regular or found.st_size > limit:
        os.close(fd)
        what = f"has {found.st_size} bytes, the limit is {limit}" if regular else "is no regular file"
        raise ConfigError(f"{name}: {what}")
    return os.fdopen(fd, "rb")


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AutoEvalError(f"{where}: is no JSON ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _there(root: Path) -> str:
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return "it is gone"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"it holds {', '.join(f'{n:.80}' for n in names[:SHOWN])}{more}" if names else "it is empty"
