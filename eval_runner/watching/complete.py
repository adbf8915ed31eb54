"""Whether the save of a checkpoint is over (`autoeval_hooks.complete`), and what its files look like meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable

from autoeval_hooks import layouts, manifest
from autoeval_hooks.complete import check
from autoeval_hooks.errors import IncompleteError

__all__ = ["check", "look"]


def look(path: str, names: Iterable[str]) -> tuple[str, int]:
    """A digest of the names, sizes, times and inodes of files, and the newest time (ns): equal where nothing was
    written meanwhile. Raises IncompleteError for a file that is gone."""
    rows, newest = [], 0
    for name in names:
        try:
            found = os.stat(layouts.place(path, name))
        except manifest.GONE as error:
            raise IncompleteError(f"{path}: {name} is gone: is it being deleted?") from error
        rows.append([name, found.st_size, found.st_mtime_ns, found.st_ino])
        newest = max(newest, found.st_mtime_ns)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest(), newest
