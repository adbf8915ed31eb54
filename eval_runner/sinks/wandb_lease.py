"""The right to be the only writer of a W&B run: one token for each run, in `relay/<run>/writer/`.

The token is a file; its name says who holds it, ``free`` if nobody does, and each change is one rename. A name other
than ``free`` is used once, so whoever renames it away wins, and a holder whose name is gone has lost. It works on any
file system that renames atomically: a lock of the kernel's is not asked for, since some file servers have none, and
some give the same one to two hosts.

The holder rewrites the file's content every `BEAT_S`. Another may take the token from it once it has seen the content
unchanged for `STALE_S` on its own clock; the holder lets go of it, and ends, after half of that on its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from autoeval_hooks import fsio
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.relay_files import clock

FREE = "free"
BEAT_S, STALE_S = 2.0, 60.0
_OPS = FileOps()


def seen(root: Path) -> tuple[str, str]:
    """Who holds the token, and a text that changes while the holder lives; ("", "") while nobody does."""
    for name in _names(root):
        if name != FREE:
            with contextlib.suppress(FileNotFoundError):
                return name, f"{name} {_OPS.read(str(root / name), 256).decode(errors='replace')}"
    return "", ""


def release(root: Path, who: str) -> None:
    """Give the token back for `who`, a process that is gone, if it holds it."""
    with contextlib.suppress(FileNotFoundError):
        _OPS.rename(str(root / who), str(root / FREE))


class Lease:
    """Held while the context is open. `acquire` first."""

    def __init__(self, root: Path, who: str) -> None:
        self._path = root / who
        self._over = threading.Event()
        self._shown_at = clock()

    def acquire(self, broken: str = "") -> bool:
        """Take the token if it is free, or if its holder still shows the text `broken`, which the caller has seen
        unchanged for `STALE_S`. Raises OSError."""
        root = self._path.parent
        if not _names(root):
            _create(root)
        for name in _names(root):
            if name == FREE or (broken and seen(root) == (name, broken)):
                return fsio.moved(_OPS, str(root / name), str(self._path))
        return False

    def held(self) -> bool:
        """Whether it is ours still, for certain."""
        return clock() - self._shown_at < STALE_S / 2 and self._path.name in _names(self._path.parent)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Show that we live; give the token back at the end. A process that has lost it is ended at once."""
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._beat(fd, 0)
        thread = threading.Thread(target=self._loop, args=(fd,), name="autoeval-writer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            os.close(fd)
            release(self._path.parent, self._path.name)

    def _loop(self, fd: int) -> None:
        count = 0
        while not self._over.wait(BEAT_S):
            count += 1
            try:
                self._beat(fd, count)
                held = self.held()
            except OSError:     # it may pass; if it does not, we are thought dead before long
                held = clock() - self._shown_at < STALE_S / 2
            if not held:
                print("another writer was let into this run, since no sign of life of ours was seen", flush=True)
                os._exit(75)

    def _beat(self, fd: int, count: int) -> None:
        now = clock()
        _OPS.pwrite(fd, f"{count:020d}\n".encode(), 0)
        _OPS.fsync(fd)
        self._shown_at = now


def _names(root: Path) -> list[str]:
    try:
        return sorted(name for name in _OPS.listdir(str(root)) if not name.startswith("."))
    except FileNotFoundError:
        return []


def _create(root: Path) -> None:
    """Make the directory with the token in it by one rename, so that there is never a second token."""
    tmp = root.parent / f".writer.{fsio.unique()}"
    _OPS.mkdir(str(tmp))
    fsio.write_new(_OPS, str(tmp / FREE), b"")
    try:
        _OPS.rename(str(tmp), str(root))
    except OSError:     # another was first: the directory is not empty
        fsio.remove_flat(_OPS, str(tmp))
        if not _names(root):
            raise
