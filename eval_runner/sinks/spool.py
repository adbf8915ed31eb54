"""What waits for a tracker: one file for each result, in `<queue>/sinks/<type>-<digest of the entry as written>/`.

    waiting/ID~gN     an `Entry`, written whole or not at all; removed once the tracker holds it
    writer/           the right to write to the target (wandb_lease); TensorBoard's is in its directory
    log               what the processes that wrote said
    why               why something waits

Nothing is remembered of what was shown: the tracker itself is asked before anything is logged.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from autoeval_hooks import fsio, strict
from autoeval_hooks.errors import TicketError
from autoeval_hooks.relay_files import POINT_BYTES
from eval_runner.sinks.tracked import Entry


class Spool:
    """The files of one target."""

    def __init__(self, root: Path, ops: fsio.FileOps) -> None:
        self.root = root
        self._waiting = root / "waiting"
        self._ops = ops

    def put(self, entry: Entry) -> None:
        """Keep the entry, durably. Raises OSError, and TicketError for one that no tracker could be given."""
        data = json.dumps(asdict(entry), sort_keys=True).encode()
        _parse(data, entry.name)
        fsio.make_dirs(self._ops, str(self._waiting))
        fsio.replace(str(self._waiting / entry.name), data, self._ops)
        self._ops.sync_dir(str(self._waiting))

    def names(self) -> list[str]:
        """Of what waits. Raises OSError."""
        try:
            return sorted(n for n in self._ops.listdir(str(self._waiting)) if not n.startswith("."))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> Entry | None:
        """None where another runner has brought it meanwhile. Raises OSError and TicketError."""
        try:
            return _parse(self._ops.read(str(self._waiting / name), POINT_BYTES), name)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """It is shown, or it is no entry. Raises OSError."""
        fsio.remove(self._ops, str(self._waiting / name))

    def say(self, why: str) -> None:
        """Leave why something waits; "" if nothing does."""
        path = self.root / "why"
        with contextlib.suppress(OSError):      # it is only said
            if not why:
                path.unlink(missing_ok=True)
            elif not path.exists() or path.read_text(encoding="utf-8") != why:
                fsio.replace(str(path), why.encode("utf-8", "replace"))

    def why(self) -> str:
        with contextlib.suppress(OSError):
            return (self.root / "why").read_text(encoding="utf-8", errors="replace")[:4096]
        return ""


def _parse(data: bytes, name: str) -> Entry:
    errors: list[str] = []
    entry = strict.parse(Entry, data, name, errors, max_bytes=POINT_BYTES, max_depth=5)
    if entry is None:
        raise TicketError(errors[0])
    if entry.name != name or os.sep in name:
        raise TicketError(f"{name:.200}: holds the entry {entry.name!r:.200}")
    return entry
