"""How far a program is, where it says so: the last line of the file `progress` in {output}, like ``0.3 arc_easy``."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError
from eval_runner import secrets
from eval_runner.evaluators.command import files

FILE = "progress"
PERIOD_S = 1.0
TAIL = 1024
_LINE = re.compile(rb"\s*(?P<fraction>[0-9]{1,9}(?:\.[0-9]{0,20})?)(?:[ \t]+(?P<what>.*))?")


class Told:
    """`look` is called now and then, and passes on what the file says; whatever else stands there is nothing."""

    def __init__(self, output: Path, progress: Callable[[float, str], None]) -> None:
        self._output = output
        self._progress = progress
        self._next = time.monotonic() + PERIOD_S

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PERIOD_S
        if (line := self._last_line()) is None or (found := _LINE.fullmatch(line)) is None:
            return
        fraction, what = float(found["fraction"]), secrets.masked((found["what"] or b"").decode(errors="replace"))
        self._progress(min(fraction, 1.0), "".join(c if c.isprintable() else "?" for c in what)[:80])

    def _last_line(self) -> bytes | None:
        """The last line that was finished."""
        try:
            with files.open_below(self._output, FILE, 1 << 40) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                *lines, _ = file.read(TAIL).split(b"\n")
        except (OSError, AutoEvalError):
            return None
        return lines[-1] if lines else None
