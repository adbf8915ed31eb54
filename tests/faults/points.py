"""Points and faults: which calls into the file system there are, and what can go wrong at each.

A scenario is run once to record its calls. Each of them is a point, so that a new operation adds points by itself.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio
from autoeval_hooks.fsio import FileOps


@dataclass(frozen=True)
class Point:
    """A call into the file system: its name, the file with what differs between runs made alike, and which time."""

    call: str
    where: str
    nth: int

    def __str__(self) -> str:
        return f"{self.call} {self.where}" + (f" (time {self.nth + 1})" if self.nth else "")


@dataclass(frozen=True)
class Fault:
    """What happens in place of a call: `do(call, name)`. `then` fails the next calls of these names as well."""

    name: str
    do: Callable[[Callable[[], Any], str], Any]
    calls: frozenset[str] = frozenset()
    """The calls that it can happen to; empty: any."""
    then: frozenset[str] = frozenset()


    def fits(self, point: Point) -> bool:
        return not self.calls or point.call in self.calls


ALLOCATING = frozenset({"create", "write", "pwrite", "fsync", "link", "reflink", "copy", "rename", "mkdir"})
CHANGING = ALLOCATING | {"unlink", "rmdir"}
LOST = {
    "rename": errno.ENOENT, "link": errno.EEXIST, "mkdir": errno.EEXIST, "unlink": errno.ENOENT, "rmdir": errno.ENOENT,
}  # fmt: skip
"""What an NFS client reports when the call was done, its reply was lost, and it asked again. (An exclusive create
carries a verifier, by which the server knows it again.)"""
LASTS = 12
"""Calls for which a fault lasts that lasts."""


def _kill(call: Callable[[], Any], name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _done_and_kill(call: Callable[[], Any], name: str) -> None:
    try:
        call()
    finally:
        _kill(call, name)


def _lost(call: Callable[[], Any], name: str) -> None:
    call()
    raise OSError(LOST[name], f"{os.strerror(LOST[name])} (done, and the reply was lost)")


def _fails(number: int) -> Callable[[Callable[[], Any], str], Any]:
    def do(call: Callable[[], Any], name: str) -> None:
        raise OSError(number, os.strerror(number))

    return do


def _done_and_fails(call: Callable[[], Any], name: str) -> None:
    call()
    raise OSError(errno.EIO, "Input/output error (and yet it was done)")


KILLS = (Fault("killed before", _kill), Fault("killed after", _done_and_kill))
ERRORS = tuple(
    Fault(errno.errorcode[n], _fails(n)) for n in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE)
)
LASTING = (
    Fault("ENOSPC for a while", _fails(errno.ENOSPC), ALLOCATING, ALLOCATING),
    Fault("EROFS for a while", _fails(errno.EROFS), CHANGING, CHANGING),
)
REPLIES = (
    Fault("reply lost", _lost, frozenset(LOST)),
    Fault("done and EIO", _done_and_fails, CHANGING | {"sync_dir"}),
)


PAUSE = Fault("paused", _kill)
"""What is done meanwhile is the trial's own."""


class Faulty(FileOps):
    """Numbers every call, and does `fault` at the point `at`, once."""

    def __init__(self, base: Path, at: Point | None = None, fault: Fault | None = None) -> None:
        self.base = str(base)
        self.at, self.fault = at, fault
        self.points: list[Point] = []
        self.met = False
        self.lasting = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._paths: dict[int, str] = {}
        self._lock = threading.Lock()

    def _call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        def call() -> Any:
            result = real(self, *args)
            if name == "create":
                self._paths[result] = args[0]
            return result

        with self._lock:
            where = self._where(args)
            point = Point(name, where, self._counts[name, where])
            self._counts[name, where] += 1
            self.points.append(point)
            now = not self.met and self.fault is not None and point == self.at
            again = self.lasting > 0 and self.fault is not None and name in self.fault.then
            self.lasting = LASTS if now and self.fault and self.fault.then else self.lasting - 1
            self.met = self.met or now
        if now or again:
            assert self.fault is not None
            return self.fault.do(call, name)
        return call()

    def _where(self, args: tuple[Any, ...]) -> str:
        paths = [self._paths.get(a, "?") if isinstance(a, int) else a for a in args if isinstance(a, int | str)]
        text = " → ".join(os.path.relpath(p, self.base) for p in paths if isinstance(p, str) and p.startswith("/"))
        for pattern, alike in _ALIKE:
            text = pattern.sub(alike, text)
        return text


_ALIKE = (
    (re.compile(re.escape(fsio.hostname()) + r"-\d+-[0-9a-f]{8}"), "UNIQUE"),
    (re.compile(r"[0-9a-f]{64}"), "ID"),
    (re.compile(r"\d-\d{10,}"), "ORDER"),
    (re.compile(r"w1-[0-9a-f]+"), "RUN"),
)

for _name, _real in vars(FileOps).items():
    if not _name.startswith("_"):
        setattr(Faulty, _name, functools.partialmethod(Faulty._call, _name, _real))
