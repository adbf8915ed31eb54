"""Housekeeping of the queue: what dead runners hold is given back, what dead submitters left is finished.

Staleness is what an observer sees unchanged on its own clock; no two hosts' clocks are compared.
A lock (filelock) keeps two runners from doing the same at once. Losing it is harmless.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator

from autoeval_hooks.queue import Queue, Token

ORPHAN_S = 3600.0
"""How long a submitter's temporary file without a ticket is left alone."""


class Keeper:
    """Housekeeping, done by whichever runner gets to it: it frees what the dead hold and mends what they left.

    It remembers since when, on this host's own clock, it has seen each thing unchanged. `clock` counts
    seconds and goes on while the host is suspended.
    """

    def __init__(
        self, queue: Queue, *, lease: float, max_failures: int, clock: Callable[[], float] | None = None
    ) -> None:
        self.queue = queue
        self.lease = lease
        self.max_failures = max_failures
        self.clock = clock or boottime
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._beating: set[str] = set()

    def sweep(self) -> list[tuple[Token, str]]:
        """Reap and tidy once, unless another runner is at it. The tokens reaped, and what became of each."""
        with _alone(self.queue.root) as alone:
            if not alone:
                return []
            claimed = list(self.queue.tokens("claimed"))
            orphans = self.queue.ops.listdir(os.path.join(self.queue.root, "tmp"))
            reaped = self._reap(claimed)
            self._tidy(orphans)
            kept = {f"hb/{t.runner}" for t in claimed} | {f"tmp/{name}" for name in orphans}
            self._seen = {key: value for key, value in self._seen.items() if key in kept}
            self._beating &= kept
            return reaped

    def unsure(self) -> bool:
        """Whether another runner that holds a ticket may be dead: we have not seen it beat so far."""
        runners = {t.runner for t in self.queue.tokens("claimed")} - {self.queue.runner}
        for runner in runners:
            self._unchanged(f"hb/{runner}", self.queue.heartbeat(runner))
        return any(f"hb/{runner}" not in self._beating for runner in runners)

    def _reap(self, claimed: list[Token]) -> list[tuple[Token, str]]:
        """Give back what runners hold whose heartbeat has not changed for the length of a lease."""
        runners = {t.runner for t in claimed} - {self.queue.runner}
        dead = {r for r in runners if self._unchanged(f"hb/{r}", self.queue.heartbeat(r)) > self.lease}
        return [
            (t, self.queue.release(t, failed=True, max_failures=self.max_failures)) for t in claimed if t.runner in dead
        ]

    def _tidy(self, names: list[str]) -> None:
        """Finish what a submitter registered and then died; remove what nobody registered, such as half a result."""
        for name in names:
            token = Token.parse("pending", name.rpartition("~")[0])
            path = os.path.join(self.queue.root, "tmp", name)
            with contextlib.suppress(OSError):      # what cannot be tidied keeps nobody from the rest
                if token is not None and self.queue.ops.nlink(path) == 2:
                    self.queue.admit(path, token.name)
                elif self._unchanged(f"tmp/{name}", b"") <= ORPHAN_S:
                    continue
                elif os.path.isdir(path):
                    shutil.rmtree(path)
                else:
                    self.queue.ops.unlink(path)

    def _unchanged(self, key: str, content: bytes) -> float:
        """For how many seconds `key` has been seen with this content."""
        now = self.clock()
        last, since = self._seen.get(key, (None, now))
        if last != content:
            since = now
            if last is not None:
                self._beating.add(key)
        self._seen[key] = (content, since)
        return now - since


@contextlib.contextmanager
def _alone(root: str) -> Iterator[bool]:
    """Whether nobody else does the housekeeping; True also where the file system cannot lock, which is harmless."""
    from filelock import Timeout, UnixFileLock

    lock = UnixFileLock(
        os.path.join(root, "locks", "housekeeping.lock"), timeout=0, thread_local=False, fallback_to_soft=False
    )
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


def boottime() -> float:
    """Seconds since this host booted, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
