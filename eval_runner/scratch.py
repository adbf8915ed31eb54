"""Working directories on local disk, which do not outlive their use: not when it ends, nor when it is killed.

Each is locked (flock) for as long as its process lives, and bears its name only once it is. Whoever can take the
lock of one knows that its user is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("autoeval")

_NAME = re.compile(r"autoeval-work-[0-9a-f]{12}")


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A new, empty directory of our own; removed in the end, whatever stands in it by then."""
    new = Path(tempfile.mkdtemp(prefix="autoeval-new-"))
    fd = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):      # no locks here: then nobody finds it abandoned, either
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = new.rename(new.parent / f"autoeval-work-{uuid.uuid4().hex[:12]}")
        try:
            yield path
        finally:
            remove(path)
    finally:
        os.close(fd)


def sweep() -> list[Path]:
    """Remove the working directories of processes of this user that died. Those removed."""
    base, removed = Path(tempfile.gettempdir()), []
    for name in os.listdir(base):
        if _NAME.fullmatch(name) and _abandoned(base / name):
            remove(base / name)
            removed.append(base / name)
    if removed:
        log.info("%d working director%s of killed runners removed", len(removed), "ies" if len(removed) > 1 else "y")
    return removed


def remove(path: Path) -> None:
    """Delete a directory, also what forbids it by its mode. What stays is said, and kept."""

    def retry(function: Callable[[str], Any], name: str, error: object) -> None:
        for place in (os.path.dirname(name), name):
            with contextlib.suppress(OSError):
                if not stat.S_ISLNK(os.lstat(place).st_mode):
                    os.chmod(place, 0o700)
        with contextlib.suppress(OSError):
            function(name)

    for _ in range(3):      # a directory whose mode was mended on the way is looked into at the next turn
        shutil.rmtree(path, onerror=retry)
        if not os.path.lexists(path):
            return
    log.warning("%s: could not be removed", path)


def _abandoned(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False        # it is in use, or cannot be known
    finally:
        os.close(fd)
    return True
