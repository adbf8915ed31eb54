"""What was asked of a service and what it answered, on disk, so that nothing is asked twice.

`<cache>/gpt/<scope>/<writer>.jsonl`: only its writer appends to a file, and every reader reads all files of the scope,
so that neither locks nor mapped memory are needed, which shared file systems have only in part. A line is one write,
and durable before anybody acts on it; one that is torn, foreign or hostile is passed over. Kinds of lines:

| kind | says |
|---|---|
| asked | a paid request is sent now; it costs at most `bound` USD |
| settled | the one of that `asked` cost `cost` USD |
| reply | a request with its reply; it settles `asked`, unless that is empty |
| batch, batch_done | what `batch` keeps of its batches |
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from autoeval_hooks import fsio
from autoeval_hooks.config import canonical
from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt.records import Reply, Request

MAX_LINE = 32 << 20
"""Bytes. A longer line is none of ours."""
MAX_REQUEST = 6 << 20
"""Bytes of a request as JSON, so that it fits a line with its reply, whatever that is (`wire.MOST_BYTES`)."""
SUFFIX = ".jsonl"
_LASTING = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Where another try will not mend it."""


def key_of(identity: str, request: Request, salt: str = "") -> str:
    """What stands for a request: sha256, in hex, of the canonical JSON of service, path, body and salt.

    Raises ConfigError for a body that JSON cannot hold, and for one that is too long.
    """
    try:
        told = canonical([identity, request.path, request.body, salt])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"a request that JSON cannot hold: {error}") from error
    if len(told) > MAX_REQUEST:
        raise ConfigError(f"a request of {len(told)} bytes as JSON; at most {MAX_REQUEST} are kept, so shorten it")
    return hashlib.sha256(told.encode()).hexdigest()


def new_name() -> str:
    """For an `asked` line or a batch."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Entry:
    """A reply in the journal: of which evaluation it was asked first, and what it cost there in USD, if known."""

    reply: Reply
    evaluation: str
    cost: float | None


class Journal:
    """The requests of one scope. May be used by many threads, and by many processes at once.

    `directory` is the scope's; it and the file are made by the first write.
    """

    def __init__(self, directory: Path, writer: str = "") -> None:
        """Reads what is there. `writer` must be nobody else's; without one, a unique name is made. Raises ConfigError
        for a directory that cannot be read."""
        self.directory = directory
        self.writer = writer or fsio.unique()
        self._file = directory / (self.writer + SUFFIX)
        self._fd = -1
        self._broken = ""
        self._lock = threading.RLock()
        self._read: dict[str, int] = {}
        self._entries: dict[str, Entry] = {}
        self._asked: dict[str, tuple[str, float]] = {}
        self._costs: dict[str, float] = {}
        self._batches: dict[str, dict[str, Any]] = {}
        self._batches_done: set[str] = set()
        self.refresh()

    def get(self, key: str) -> Reply | None:
        """The reply to an earlier request, with `cached` set."""
        entry = self.entry(key)
        return entry.reply if entry else None

    def entry(self, key: str) -> Entry | None:
        """The reply to an earlier request, and whose it was."""
        with self._lock:
            return self._entries.get(key)

    def spent(self, evaluation: str) -> Iterator[tuple[str, float]]:
        """For `Budget.recall`: name and USD of all that was asked for `evaluation`, at its upper bound where nobody
        knows what it cost."""
        with self._lock:
            found = [(n, self._costs.get(n, bound)) for n, (who, bound) in self._asked.items() if who == evaluation]
        return iter(found)

    def batches(self) -> list[dict[str, Any]]:
        """The last line of every batch that is not done."""
        with self._lock:
            return [line for name, line in sorted(self._batches.items()) if name not in self._batches_done]

    def refresh(self) -> None:
        """Read what other writers have appended since. Raises ConfigError for a directory that cannot be read."""
        with self._lock:
            try:
                names = sorted(os.listdir(self.directory))
            except FileNotFoundError:
                return
            except OSError as error:
                raise _failure("read", self.directory, error) from error
            for name in names:
                if name.endswith(SUFFIX) and name != self._file.name:
                    self._follow(name)

    def asked(self, name: str, evaluation: str, bound: float) -> None:
        """A paid request is sent now, which costs at most `bound` USD. `name` is unique (`new_name`)."""
        self.append({"kind": "asked", "asked": name, "evaluation": evaluation, "bound": bound})

    def settled(self, name: str, cost: float) -> None:
        """The request `name` cost this many USD."""
        self.append({"kind": "settled", "asked": name, "cost": cost})

    def replied(
        self,
        identity: str,
        request: Request,
        salt: str,
        reply: Reply,
        *,
        evaluation: str = "",
        asked: str = "",
        cost: float | None = None,
    ) -> None:
        """Keep a reply; it settles what was `asked`, if that is given."""
        line = {
            "kind": "reply", "key": key_of(identity, request, salt), "service": identity, "path": request.path,
            "request": request.body, "salt": salt, "reply": asdict(replace(reply, cached=False)),
            "evaluation": evaluation, "asked": asked, "cost": cost,
        }  # fmt: skip
        self.append(line)

    def open(self) -> None:
        """Make the file, so that a journal that cannot be written is known before anything is asked."""
        with self._lock:
            if self._fd < 0:
                self.append({"kind": "journal", "version": 1})

    def append(self, line: dict[str, Any]) -> None:
        """Write one line, durable when this returns. Raises ConfigError or AutoEvalError where it cannot be; then
        nothing is written any more, since the next line would follow a torn one."""
        data = json.dumps(line, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if len(data) > MAX_LINE:
            raise AssertionError(f"a line of {len(data)} bytes, which nobody would read")
        with self._lock:
            if self._broken:
                raise AutoEvalError(self._broken)
            try:
                if self._fd < 0:
                    self._fd = self._create()
                if (written := os.write(self._fd, data)) != len(data):
                    raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were taken")
                os.fsync(self._fd)
            except OSError as error:
                failure = _failure("write", self._file, error)
                self._broken = str(failure)
                raise failure from error
            self._take(line)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._broken = -1, self._broken or f"{self._file}: the journal is closed"

    def _create(self) -> int:
        fsio.make_dirs(fsio.FileOps(), str(self.directory))
        # Append: should two writers ever have one name, their lines still do not overwrite each other.
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._file, flags, 0o664)
        try:
            self._mend(fd)
            fsio.FileOps().sync_dir(str(self.directory))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _mend(self, fd: int) -> None:
        """A file of an earlier process of this name may end in a torn line; ours is not to follow it. What it holds is
        read now."""
        if os.fstat(fd).st_size:
            os.write(fd, b"\n")
            self._follow(self._file.name)

    def _follow(self, name: str) -> None:
        """Read on where the last look ended; a line without its end is left for the next look."""
        path = self.directory / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(fd, "rb") if stat.S_ISREG(os.fstat(fd).st_mode) else _closing(fd) as file:
                file.seek(self._read.get(name, 0))
                for size, data in _lines(file):
                    self._read[name] = self._read.get(name, 0) + size
                    self._take_text(data)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise _failure("read", path, error) from error

    def _take_text(self, data: bytes) -> None:
        try:
            line = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(line, dict):
            with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError, ConfigError):
                self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        """Remember what a line says. Raises for one that is not as we write it."""
        kind = line.get("kind")
        if kind == "asked":
            self._asked[_text(line["asked"])] = (_text(line["evaluation"]), _amount(line["bound"]))
        elif kind == "settled":
            self._costs[_text(line["asked"])] = _amount(line["cost"])
        elif kind == "reply":
            self._take_reply(line)
        elif kind == "batch":
            self._batches[_text(line["name"])] = line
        elif kind == "batch_done":
            self._batches_done.add(_text(line["name"]))

    def _take_reply(self, line: dict[str, Any]) -> None:
        cost = None if line["cost"] is None else _amount(line["cost"])
        request = Request(line["path"], line["request"])
        reply = _reply(line["reply"])
        key = key_of(_text(line["service"]), request, _text(line["salt"]))
        if key != line["key"]:      # another's line, or one that was changed
            raise ValueError("not the key of its request")
        if line["asked"] and cost is not None:
            self._costs[_text(line["asked"])] = cost
        self._entries.setdefault(key, Entry(reply, _text(line["evaluation"]), cost))


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that have their end, and how many bytes they take; one that is too long is empty."""
    size = 0
    while data := file.readline(MAX_LINE):
        size += len(data)
        if data.endswith(b"\n"):
            yield size, data if len(data) == size else b""
            size = 0
        elif len(data) < MAX_LINE:
            return


def _closing(fd: int) -> IO[bytes]:
    """What is no file has no lines."""
    os.close(fd)
    return io.BytesIO()


def _reply(data: dict[str, Any]) -> Reply:
    types = {"str": str, "bool": bool, "int": int}
    found = {f.name: data[f.name] for f in fields(Reply) if f.name != "cached"}
    for f in fields(Reply):
        if f.name in found and type(found[f.name]) is not types[str(f.type)]:
            raise TypeError(f.name)
    if min(found["input_tokens"], found["output_tokens"]) < 0:
        raise ValueError("a negative count")
    return Reply(**found, cached=True)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _amount(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError("no amount")
    return float(value)


def _failure(what: str, path: Path, error: OSError) -> AutoEvalError:
    message = f"{path}: cannot {what} the cache of the GPT evaluator: {error.strerror or error}"
    if error.errno in _LASTING:
        return ConfigError(f"{message}; let the runner's user write there")
    return AutoEvalError(f"{message}; what was answered before is kept")
