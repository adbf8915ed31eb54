"""What tests ask of real processes: which are there, and when something has come to pass."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

MARK = "AUTOEVAL_TEST_MARK"
"""A variable of the environment that all processes of one test bear, whatever session or parent they have."""


def marked(mark: str) -> list[int]:
    """The processes that bear the mark and have not ended, this one left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
