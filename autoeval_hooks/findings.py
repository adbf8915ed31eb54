"""What a doctor finds: one line each, with what to do about it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, TypeVar

Level = Literal["ok", "warning", "problem"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was seen and what that means, and what to do about it ("" if nothing)."""

    level: Level
    what: str
    means: str
    do: str = ""


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """What `work` returns or raises, or None where it takes longer: a hung file system is left hanging."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():
            raise       # its own
        return None


def show(finding: Finding) -> str:
    """For a terminal."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in f"{finding.what}: {finding.means}")
    return f"{finding.level:8} {text}" + (f"\n{'':8} → {finding.do}" if finding.do else "")
