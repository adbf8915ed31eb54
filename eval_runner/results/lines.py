"""What stands beside the record in a results directory: per-instance values, and texts, as packed lines of JSON."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError, CheckpointError
from eval_runner import secrets
from eval_runner.results.schema import Detail, Instance, Score

INSTANCES = "instances.jsonl.gz"
DETAILS = "details.jsonl.gz"
MAX_LINE_BYTES = 1 << 20
MAX_UNPACKED_BYTES = 1 << 30
"""Some ten million values. A few kilobytes of gzip can stand for gigabytes."""
MAX_TEXTS = 50
MAX_TEXT_CHARS = 20_000
"""What is longer is cut, and says so: nobody reads it, and a model that never ends must not fill the disk."""


class ResultError(AutoEvalError, ValueError):
    """A record on disk that is missing, torn, or written by a newer version."""

    kind = "configuration"


# ---------------------------------------------------------------------- writing


def _pack(lines: Iterable[bytes], what: str) -> bytes:
    """What `_lines` reads back. Raises ResultError for more than that would read."""
    buffer, size = io.BytesIO(), 0
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=6) as file:
        for line in lines:
            size += len(line) + 1
            if size > MAX_UNPACKED_BYTES or len(line) >= MAX_LINE_BYTES:
                raise ResultError(f"its {what} are too large: {size} bytes with the last one's {len(line)}")
            file.write(line + b"\n")
    return buffer.getvalue()


def dump_instances(instances: Iterable[Instance]) -> bytes:
    """The file of instances. Raises CheckpointError for a value that is no number."""
    return _pack(map(_dump_instance, instances), "instances")


def _dump_instance(i: Instance) -> bytes:
    if not math.isfinite(i.value):
        raise CheckpointError(f"instance {i.id!r} of {title(i)}: its value is {i.value}, which is no number")
    data = asdict(i) | {"value": float(i.value)}
    line = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    _instance(line, f"instance {i.id!r} of {title(i)}")
    return line


def dump_details(details: Iterable[Detail]) -> bytes:
    """The file of details; texts that are too long are cut."""
    return _pack(map(_dump_detail, details), "details")


def _dump_detail(d: Detail) -> bytes:
    texts = [[_shown(part) for part in pair] for pair in d.texts]
    data = {name: _shown(getattr(d, name)) for name in _DETAIL[:-1]} | {"texts": texts}
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    _detail(line, f"the detail of question {d.id!r} of {d.benchmark}")
    return line


def _shown(text: str) -> str:
    """Foreign text as a file may hold it: without our secrets, and no longer than anybody reads."""
    text = secrets.masked(plain(text))
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]} … [cut: {len(text):,} characters]"


def plain(text: str) -> str:
    """Text that any file can hold: a log's bytes that are no text, and NULs, are shown as replaced."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def title(s: Score | Instance) -> str:
    return f"{s.benchmark}/{s.metric} ({s.split})"


# ---------------------------------------------------------------------- reading


def instances(path: Path) -> Iterator[Instance]:
    """The per-instance values of the result directory `path`. Raises ResultError that names the file and line."""
    file = path / INSTANCES
    return (_instance(line, f"{file}: line {number}") for number, line in enumerate(_lines(file), 1))


def details(path: Path) -> Iterator[Detail]:
    """What people may want to read of the result directory `path`; nothing where no evaluator left any.

    Raises ResultError that names the file and line.
    """
    file = path / DETAILS
    if not os.path.lexists(file):
        return iter(())
    return (_detail(line, f"{file}: line {number}") for number, line in enumerate(_lines(file), 1))


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a packed file that somebody else may have written."""
    number = size = 0
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, "rb") as packed, gzip.open(packed, "rb") as lines:
            if os.fstat(fd).st_size == 0:       # which gzip takes for a file that holds nothing
                raise EOFError("it is empty")
            while line := lines.readline(MAX_LINE_BYTES):
                number += 1
                size += len(line)
                if size > MAX_UNPACKED_BYTES:
                    raise EOFError(f"it holds more than {MAX_UNPACKED_BYTES >> 20} MiB")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise ResultError(f"{file}: cannot be read after line {number} ({error}); it is torn or missing") from error


_FIELDS = {"benchmark": str, "metric": str, "split": str, "id": str, "value": float}


def _instance(line: bytes, where: str) -> Instance:
    """As `strict.parse` would, at a tenth of its time: a report reads hundreds of thousands of these."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{where}: not valid JSON ({error})") from error
    fits = isinstance(data, dict) and {k: type(v) for k, v in data.items()} == _FIELDS
    if not fits or not math.isfinite(data["value"]):
        raise ResultError(f"{where}: not a per-instance value")
    return Instance(**data)


_DETAIL = ("benchmark", "id", "category", "outcome", "texts")


def _detail(line: bytes, where: str) -> Detail:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{where}: not valid JSON ({error})") from error
    texts = data["texts"] if isinstance(data, dict) and data.keys() == set(_DETAIL) else None
    if not isinstance(texts, list) or len(texts) > MAX_TEXTS or not all(_is_pair(t) for t in texts):
        raise ResultError(f"{where}: not the detail of a question")
    if not all(_is_text(data[name]) for name in _DETAIL[:-1]):
        raise ResultError(f"{where}: not the detail of a question")
    return Detail(**data | {"texts": tuple((heading, text) for heading, text in texts)})


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_text(part) for part in value)


def _is_text(value: object) -> bool:
    """Whether it is text that any file can hold, and not longer than we write it."""
    return isinstance(value, str) and len(value) < MAX_TEXT_CHARS + 100 and value == plain(value)
