"""Why a server ended, out of its log."""

from __future__ import annotations

import os
import re
from pathlib import Path

from eval_runner import process

MAX_BYTES = 1 << 18
"""So much of the log's end is read."""
_LAST = re.compile(
    r"^(?:\[rank(?P<rank>\d+)\]: ?)?"
    r"(?:(?:[\w.]+\.)?(?P<said>\w*(?:Error|Exception|Interrupt|Failure)\b(?:: .+)?)|(?P<usage>[\w.-]+: error: .+))$"
)
"""The last line of a traceback, or of argparse; torch puts the rank before it."""
_LAUNCHER = ("ChildFailedError", "SignalException")
"""What torch.distributed.run raises itself: it says that a process failed, not why."""
_ROOT = re.compile(r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", re.DOTALL)
_LACKS = re.compile(
    r"ModuleNotFoundError|No module named|(?:is|are) not installed|: error: |CUDA driver|no NVIDIA driver"
)
"""What another try does not mend, and somebody can."""


def line(log: Path, start: int, status: int | None = None) -> str:
    """Why a program with `status` ended, in one line, out of what stands in its log from byte `start` on.

    Without a status it runs, and "" says that the log gives no reason.
    """
    if status is not None and status < 0:       # what the log says last is not why
        return process.reason(status)
    written = text(log, start).decode(errors="replace")
    root = _ROOT.findall(written)
    if root and int(root[-1][1]) < 0:
        return f"rank {root[-1][0]} was {process.reason(int(root[-1][1]))}"
    found = [m for m in map(_LAST.match, map(str.rstrip, re.split(r"[\r\n]+", written))) if m]
    reasons = [(m["rank"], m["said"] or m["usage"]) for m in found]
    reasons = [(rank, said) for rank, said in reasons if not said.startswith(_LAUNCHER)]
    first = [one for one in reasons if root and one[0] == root[-1][0]]      # the others failed because that one did
    if reasons:
        return (first or reasons)[-1][1][:300]
    return "" if status is None else f"{process.reason(status)}; it wrote last: {process.tail(log, 1)}"


def lacks(said: str) -> bool:
    """Whether the reason is that something is not installed, or an argument is wrong."""
    return bool(_LACKS.search(said))


def text(log: Path, start: int) -> bytes:
    """The end of what was written to `log` from byte `start` on; nothing where it cannot be read."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start if start <= size else 0, size - MAX_BYTES))     # a log that was cut is shorter
            return file.read()
    except OSError:
        return b""
