"""TensorBoard's event files as a store of `tracked`; runs in a process of its own (`tracker`).

    <log_dir>/<run>/autoeval-run.txt                                  the id of the training that it shows
    <log_dir>/<run>/<suite>/events.out.tfevents.0000000001.autoeval   a session start, and records in order of steps
    <log_dir>/.autoeval-writer/                                       the right to write below log_dir (wandb_lease)

TensorBoard takes values in the order of the file: its Rust reader drops what has a step at or beyond that of a value
that comes later (data/server/reservoir.rs), its Python readers draw a line back. So only values beyond all others are
appended to the last file. Else the whole series is made a next file, which appears complete, by one rename. Readers go
on to it, and at its session start forget what they hold (event_accumulator.py: SessionLog.START). So it is, too, after
a record that was cut off: it can never be mended under a reader that has seen its beginning. Whenever the writer dies,
what was shown stays shown.

The framing of records is TensorFlow's (tensorboard/summary/writer/record_writer.py).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.sinks.tracked import Entry, Missing, Refused, Value

OURS = re.compile(r"events\.out\.tfevents\.(\d{10})\.autoeval")
OWNER = "autoeval-run.txt"
VERSION = "brain.Event:2"
"""Without it readers guess at restarts from the steps."""


def make(settings: dict[str, str]) -> TensorboardStore:
    """The store; nothing is made."""
    return TensorboardStore(Path(settings["log_dir"]), settings["run"])


@dataclass
class _Series:
    """What one directory holds. `files` are ours; `whole`: the last one ends with a whole record."""

    files: list[Path] = field(default_factory=list)
    values: dict[tuple[str, int], Value] = field(default_factory=dict)
    whole: bool = True


class TensorboardStore:
    """See `tracked.Store`."""

    newest_wins = True

    def __init__(self, log_dir: Path, run: str) -> None:
        self._log_dir = log_dir
        self._run = run

    def wanted(self, entry: Entry) -> list[Value]:
        """See tracked.Store."""
        return [Value(k, entry.point.step, entry.at, _single(v)) for k, v in entry.metrics().items()]

    def held(self, entries: Sequence[Entry], *, all_of_it: bool) -> list[Value]:
        """See tracked.Store. The directories of suites of which there is no entry are looked at with `all_of_it`."""
        directory = self._directory(entries[0].run)
        suites = {directory / _safe(one.suite) for one in entries}
        if all_of_it and directory.is_dir():
            suites |= {path for path in directory.iterdir() if path.is_dir() and _ours(path)}
        return [value for path in sorted(suites) for value in _read(path).values.values()]

    def add(self, missing: Missing) -> None:
        """See tracked.Store."""
        directory = self._directory(missing[0][0].run)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / OWNER).exists():
            fsio.replace(str(directory / OWNER), f"{missing[0][0].run.id}\n".encode())
        suites: dict[str, list[Value]] = {}
        for one, values in missing:
            suites.setdefault(_safe(one.suite), []).extend(values)
        for suite, values in suites.items():
            _write(directory / suite, values)

    def probe(self) -> str:
        """See tracked.Store."""
        above = next(p for p in (self._log_dir, *self._log_dir.parents) if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise Refused(f"{above} is no directory that this user can write to")
        return "can be written to"

    def _directory(self, identity: RunIdentity) -> Path:
        """The run's. Raises Refused where another training stands in it."""
        directory = self._log_dir / (self._run or f"{_safe(identity.name or identity.id)}-{_digest(identity.id)}")
        try:
            owner = (directory / OWNER).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return directory
        if owner != identity.id.strip():
            raise Refused(f"{directory} shows the training {owner}, not {identity.id}: without `run`, each has its own")
        return directory


def _read(directory: Path) -> _Series:
    """What readers make of our files there. Raises Refused where somebody else's event file is among them."""
    from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]  # it has no types

    series = _Series(files=_ours(directory))
    for path in series.files:
        records, series.whole = _records(path)
        for record in records:
            event = event_pb2.Event.FromString(record)
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                series.values = {k: v for k, v in series.values.items() if k[1] < event.step}
            at = round(event.wall_time * 1000)
            for item in event.summary.value:
                series.values[item.tag, event.step] = Value(item.tag, event.step, at, item.simple_value)
    return series


def _ours(directory: Path) -> list[Path]:
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    strange = [name for name in names if "tfevents" in name and not OURS.fullmatch(name)]
    if strange:
        raise Refused(f"{directory} holds an event file of another writer ({strange[0]}), which TensorBoard would no "
                      "longer read; set the sink's `run` or `log_dir`")  # fmt: skip
    return [directory / name for name in names if OURS.fullmatch(name)]


def _records(path: Path) -> tuple[list[bytes], bool]:
    """The whole records of a file, and whether nothing follows them."""
    from tensorboard.compat.tensorflow_stub import errors  # type: ignore[import-untyped]
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import (  # type: ignore[import-untyped]
        PyRecordReader_New,
    )

    reader, records = PyRecordReader_New(str(path)), []
    try:
        while True:
            reader.GetNext()
            records.append(reader.record())
    except errors.OutOfRangeError:
        return records, True
    except errors.DataLossError:
        return records, False


def _write(directory: Path, values: Iterable[Value]) -> None:
    """Let these values be part of what the directory shows. Raises Refused and OSError."""
    series = _read(directory)
    new = sorted(values, key=lambda v: v.at)        # none is older than what is there (`tracked.absent`)
    first = min(v.step for v in new)
    if series.files and series.whole and all(step < first for _, step in series.values):
        _append(series.files[-1], _encoded(new, head=False))
        return
    series.values |= {(v.key, v.step): v for v in new}
    number = int(OURS.fullmatch(series.files[-1].name)[1]) + 1 if series.files else 1  # type: ignore[index]  # they fit
    directory.mkdir(parents=True, exist_ok=True)
    ops, tmp = fsio.FileOps(), directory / ".next"      # a name that no reader takes for an event file
    tmp.unlink(missing_ok=True)
    fsio.write_new(ops, str(tmp), _encoded(series.values.values(), head=True))
    ops.rename(str(tmp), str(directory / f"events.out.tfevents.{number:010d}.autoeval"))
    ops.sync_dir(str(directory))


def _encoded(values: Iterable[Value], *, head: bool) -> bytes:
    """Records: the head of a file, if wanted, with a session start; the values in the order of their steps."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    ordered = sorted(values, key=lambda v: (v.step, v.at, v.key))
    events: list[Any] = []
    if head:
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first, at = ordered[0].step, ordered[0].at / 1000
        events = [event_pb2.Event(file_version=VERSION, wall_time=at),
                  event_pb2.Event(session_log=started, step=first, wall_time=at)]  # fmt: skip
    for (step, at), some in groupby(ordered, key=lambda v: (v.step, v.at)):
        items = [summary_pb2.Summary.Value(tag=v.key, simple_value=v.value) for v in some]
        events.append(event_pb2.Event(step=step, wall_time=at / 1000, summary=summary_pb2.Summary(value=items)))
    out = io.BytesIO()
    writer = RecordWriter(out)
    for event in events:
        writer.write(event.SerializeToString())
    return out.getvalue()


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _single(value: float) -> float:
    """The nearest number of 32 bits."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _safe(name: str) -> str:
    """A directory's name."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:80]
    return plain if plain == name else f"{plain}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
