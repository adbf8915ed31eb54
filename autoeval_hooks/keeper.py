"""Housekeeping of the queue: what dead runners hold is given back, what dead submitters left is finished.

Staleness is what an observer sees unchanged on its own clock; no two hosts' clocks are compared.
A lock (filelock) keeps two runners from doing the same at once. Losing it is harmless, and it is not waited for
longer than a lease: who holds it may stand still.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator

from autoeval_hooks import fsio
from autoeval_hooks.queue import Queue, Token

ORPHAN_S = 3600.0
"""How long what seems to be nobody's is left alone: a file in tmp/ without a ticket, a heartbeat that stands still
and holds nothing, a ticket without a token."""


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
        self._counted_at = float("-inf")
        self._kept_out_since: float | None = None

    def sweep(self) -> list[tuple[Token, str]]:
        """Reap and tidy once, unless another runner is at it. The tokens reaped, and what became of each."""
        with _alone(self.queue.root) as alone:
            if not alone and not self._kept_out():
                return []
            claimed = list(self.queue.tokens("claimed"))
            orphans, hearts = self._names("tmp"), self._names("hb")
            reaped = self._reap(claimed)
            self._tidy(orphans)
            self._bury(set(hearts) - {t.runner for t in claimed} - {self.queue.runner})
            kept = {f"hb/{t.runner}" for t in claimed} | {f"hb/{name}" for name in hearts}
            kept |= {f"tmp/{name}" for name in orphans} | self._restore()
            self._seen = {key: value for key, value in self._seen.items() if key in kept}
            self._beating &= kept
            self._kept_out_since = None
            return reaped

    def _kept_out(self) -> bool:
        """Whether another has kept us from it for so long that it must be standing still."""
        if self._kept_out_since is None:
            self._kept_out_since = self.clock()
        return self.clock() - self._kept_out_since > self.lease

    def unsure(self) -> bool:
        """Whether another runner that holds a ticket may be dead: we have not seen it beat so far."""
        runners = {t.runner for t in self.queue.tokens("claimed")} - {self.queue.runner}
        for runner in runners:
            self._still(runner)
        return any(f"hb/{runner}" not in self._beating for runner in runners)

    def _reap(self, claimed: list[Token]) -> list[tuple[Token, str]]:
        """Give back what runners hold whose heartbeat has not changed for the length of a lease."""
        runners = {t.runner for t in claimed} - {self.queue.runner}
        dead = {r for r in runners if self._still(r) > self.lease}
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
                elif self._unchanged(f"tmp/{name}") > ORPHAN_S:
                    self._remove(path)

    def _remove(self, path: str) -> None:
        """Remove a file, or a directory with all in it: half a result, or what `gc` left. A link is a file."""
        try:
            fsio.remove(self.queue.ops, path)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):
                raise
            for name in self.queue.ops.listdir(path):
                self._remove(os.path.join(path, name))
            self.queue.ops.rmdir(path)

    def _bury(self, runners: set[str]) -> None:
        """Remove the heartbeats of runners that are gone and hold nothing. One that was only paused beats anew."""
        for runner in runners:
            with contextlib.suppress(OSError):
                if self._still(runner) > max(ORPHAN_S, self.lease):
                    fsio.remove(self.queue.ops, os.path.join(self.queue.root, "hb", runner))

    def _restore(self) -> set[str]:
        """Bring tickets back that have no token. Looked for once in `ORPHAN_S`: it lists the whole queue. What was
        seen of it so far."""
        if self.clock() - self._counted_at > ORPHAN_S:
            self._counted_at = self.clock()
            known = self._names("tickets")
            held = {token.ticket for token in self.queue.tokens()}
            for ticket in [name for name in known if name not in held]:
                with contextlib.suppress(OSError):
                    alone = self.queue.ops.nlink(os.path.join(self.queue.root, "tickets", ticket)) == 1
                    if alone and self._unchanged(f"tickets/{ticket}") > ORPHAN_S:
                        self.queue.restore(ticket)
        return {key for key in self._seen if key.startswith("tickets/")}

    def _names(self, directory: str) -> list[str]:
        """What stands in a directory of the queue, but for the names that NFS gives to removed files (`.nfs…`)."""
        names = self.queue.ops.listdir(os.path.join(self.queue.root, directory))
        return [name for name in names if not name.startswith(".")]

    def _still(self, runner: str) -> float:
        return self._unchanged(f"hb/{runner}", lambda: self.queue.heartbeat(runner))

    def _unchanged(self, key: str, read: Callable[[], bytes] = bytes) -> float:
        """For how many seconds at least `key` has been seen with the content that it has now. This process may be
        paused at any moment: the time of a sight is taken before it, and the time of a first sight after it."""
        before = self.clock()
        content = read()
        last, since = self._seen.get(key, (None, 0.0))
        if last != content:
            since = self.clock()
            if last is not None:
                self._beating.add(key)
        self._seen[key] = (content, since)
        return before - since


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
