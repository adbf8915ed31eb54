"""Read what an offline W&B run holds: its transaction log, `offline-run-DATE-ID/run-ID.wandb`.

A second offline directory of the same run is merged by `wandb sync`, but its summary and its metric definitions
then replace the first one's. So whoever adds a directory must know them.

The file has a header of 7 bytes (``:W&B``, magic 0xBEE1, version 0) and then the framing of LevelDB's log
(https://github.com/google/leveldb/blob/main/doc/log_format.md) with zlib's CRC-32; each record is a
`wandb_internal.Record` message of the wandb package.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class Content:
    """`rows` as logged, with `_step`; `summary` by key; `definitions` by name or pattern, as MetricRecord messages;
    `exit_code` of the last log, None if its process was killed."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    definitions: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def add(self, path: Path) -> None:
        """Add what one log holds to what earlier ones held."""
        self.exit_code = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {_name(item): json.loads(item.value_json) for item in record.history.item}
                self.rows.append({**row, "_step": record.history.step.num})
            elif kind == "summary":
                for item in record.summary.update:
                    _put(self.summary, _path(item), json.loads(item.value_json))
                for item in record.summary.remove:
                    self.summary.pop(_name(item), None)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code
            elif kind == "metric":
                self.definitions[record.metric.name or record.metric.glob_name] = record.metric


def records(path: Path) -> Iterator[Any]:
    """The records of one log, up to a last one that is torn. Raises ValueError for what is no such log."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    with path.open("rb") as file:
        if file.read(7) != struct.pack("<4sHB", b":W&B", 0xBEE1, 0):
            raise ValueError(f"{path}: not a W&B transaction log of a version that is known")
        body = b""
        for kind, part in _parts(file, path):
            body = part if kind in (_FULL, _FIRST) else body + part
            if kind in (_FULL, _LAST):
                yield Record.FromString(body)


def _parts(file: Any, path: Path) -> Iterator[tuple[int, bytes]]:
    at = 7
    while True:
        if (left := _BLOCK - at % _BLOCK) < 7:
            file.read(left)
            at += left
        head = file.read(7)
        if len(head) < 7:
            return
        checksum, size, kind = struct.unpack("<IHB", head)
        part = file.read(size)
        if kind == 0 or len(part) < size:
            return
        if checksum != zlib.crc32(head[6:] + part):
            raise ValueError(f"{path}: wrong checksum at byte {at}")
        at += 7 + size
        yield kind, part


def _path(item: Any) -> list[str]:
    return list(item.nested_key) or [item.key]


def _name(item: Any) -> str:
    return ".".join(_path(item))


def _put(summary: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = summary.get(part)
        summary[part] = inner if isinstance(inner, dict) else {}
        summary = summary[part]
    summary[path[-1]] = value
