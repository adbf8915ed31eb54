"""The ticket queue: a directory on a shared file system, and nothing else.

Each ticket has one inode, the token. `tickets/ID` is its first name and says that the ticket exists;
its second name stands in the directory that is its state, and every change of state is one rename of
that name. Names are used once: a claim's name holds its generation and its runner, so whoever renames
it away wins, and a runner whose name is gone has lost (the fence).

    tmp/ → tickets/ + pending/PRIO-ORDER-ID~gNfM          enqueue (no lock)
    pending/… → claimed/…~gNfM~RUNNER                      claim (no lock)
    claimed/… → done/… | failed/… | quarantine/…           complete, fail, quarantine
    claimed/… → pending/…~g(N+1)f(M or M+1)                release, retry, and reap for a dead runner

N counts how often the ticket was handed out, M how many of those ended badly: a runner that is told to
stop gives its ticket back without using up an attempt. PRIO is 9 minus the priority and ORDER the
submitter's clock in µs: they sort the listing, nothing is decided by them.

Staleness is what an observer sees unchanged on its own clock; no two hosts' clocks are compared.
Locks (filelock) keep two runners from doing the same housekeeping at once. Losing one is harmless.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from autoeval_hooks import fsio
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import QueueError, TicketError
from autoeval_hooks.fsio import FileOps, moved
from autoeval_hooks.ticket import Ticket

STATES = ("pending", "claimed", "done", "failed", "quarantine")
DIRECTORIES = ("tmp", "tickets", *STATES, "results", "hb", "locks")
FRONT = 16
"""Runners that lost a race spread over this many tickets at the front of the listing."""
LISTING_S = 2.0
"""How long a listing of pending/ serves. Evaluations take minutes: every one of them starts from a fresh listing."""
ORPHAN_S = 3600.0
"""How long a submitter's temporary file without a ticket is left alone."""

_TOKEN = re.compile(
    r"(?P<sort>\d-\d{1,20})-(?P<ticket>[0-9a-f]{64})~g(?P<generation>\d{1,9})f(?P<failures>\d{1,9})"
    r"(?:~(?P<runner>[A-Za-z0-9._-]{1,100}))?"
)


@dataclass(frozen=True)
class Token:
    """A token's name, taken apart. `runner` is "" while nobody holds it."""

    state: str
    sort: str
    ticket: str
    generation: int
    failures: int
    runner: str = ""

    @classmethod
    def parse(cls, state: str, name: str) -> Token | None:
        """None for a name that no token has, such as a silly-renamed `.nfs…` file."""
        m = _TOKEN.fullmatch(name)
        if m is None or (m["runner"] is None) != (state == "pending"):
            return None
        return cls(state, m["sort"], m["ticket"], int(m["generation"]), int(m["failures"]), m["runner"] or "")

    @property
    def name(self) -> str:
        tail = f"~{self.runner}" if self.runner else ""
        return f"{self.sort}-{self.ticket}~g{self.generation}f{self.failures}{tail}"

    @property
    def result_name(self) -> str:
        """The name of this attempt's directory under `results/`."""
        return f"{self.ticket}~g{self.generation}~{self.runner}"


class Queue:
    """Both sides of the queue at `root`: submitters enqueue; runners claim, complete, retry and tidy up.

    `runner` is this process's name in claims. One thread claims; all else may be called from several.
    """

    def __init__(self, root: str, *, runner: str = "", ops: FileOps | None = None) -> None:
        self.root = root
        self.runner = runner or fsio.unique()
        self.ops = ops or FileOps()
        self._listing: list[str] = []
        self._listed_at = 0.0
        self._listed_newest = True

    # ------------------------------------------------------------------ set-up

    def create(self) -> None:
        """Make the directories and see that the file system can hold a queue. Raises QueueError."""
        try:
            os.makedirs(self.root, exist_ok=True)
            for name in DIRECTORIES:
                with contextlib.suppress(FileExistsError):
                    self.ops.mkdir(self._at(name))
            probe = self._at("tmp", f"probe-{fsio.unique()}")
            fsio.write_new(self.ops, probe, b"")
        except OSError as error:
            raise QueueError(
                f"queue {self.root}: cannot be written ({error.strerror}); create it, or fix its mode, or set `queue`"
            ) from error
        try:
            with contextlib.suppress(FileExistsError):      # done, and the reply was lost
                self.ops.link(probe, probe + ".link")
            self.ops.unlink(probe + ".link")
        except OSError as error:
            if error.errno in fsio.NO_LINKS:
                raise _no_links(self.root, error) from error
            raise
        finally:
            self.ops.unlink(probe)

    # ------------------------------------------------------------------ submitter

    def known(self, ticket_id: str) -> bool:
        """Whether this ticket was ever enqueued."""
        try:
            self.ops.nlink(self._at("tickets", ticket_id))
        except FileNotFoundError:
            return False
        return True

    def enqueue(self, ticket: Ticket) -> bool:
        """Hand a ticket over. True when it is new; False when it was known, in whatever state.

        When this returns, the ticket survives a power cut. Raises QueueError without hard links,
        OSError when the file system fails; it may then be called again.
        """
        token = Token("pending", f"{9 - ticket.priority}-{time.time_ns() // 1000}", ticket.id, 0, 0)
        tmp = self._at("tmp", f"{token.name}~{fsio.unique()}")
        fsio.write_new(self.ops, tmp, tickets.dump(ticket))
        if not self._register(tmp, ticket.id):
            self.ops.unlink(tmp)
            return False
        self._admit(tmp, token.name)
        return True

    def _register(self, tmp: str, ticket_id: str) -> bool:
        """Give the token its first name; False when another token has it."""
        try:
            self.ops.link(tmp, self._at("tickets", ticket_id))
        except FileExistsError:
            return self.ops.nlink(tmp) == 2     # NFS lost the reply to our own link
        except OSError as error:
            if error.errno not in fsio.NO_LINKS:
                raise       # it may have been done: the janitor looks, and admits the token or removes the file
            with contextlib.suppress(OSError):
                self.ops.unlink(tmp)
            raise _no_links(self.root, error) from error
        return True

    def _admit(self, tmp: str, name: str) -> None:
        """Give a registered token its second name, in pending/. Enqueue and janitor may both do it."""
        # Gone from tmp/ means that another did it, and then it may be claimed by now.
        moved(self.ops, tmp, self._at("pending", name))
        self.ops.sync_dir(self._at("tickets"))
        self.ops.sync_dir(self._at("pending"))

    # ------------------------------------------------------------------ runner

    def claim(self, *, newest_first: bool = True, wanted: Callable[[Token], bool] = lambda token: True) -> Token | None:
        """Take the first pending ticket by priority and order that is `wanted`; None when there is none."""
        names, raced = self._front(newest_first), False
        while names:
            name = names.pop(random.randrange(min(FRONT, len(names))) if raced else 0)
            token = Token.parse("pending", name)
            if token is None or not wanted(token):
                continue
            claimed = replace(token, state="claimed", runner=self.runner)
            if moved(self.ops, self._path(token), self._path(claimed)):
                return claimed
            raced = True
        return None

    def _front(self, newest_first: bool) -> list[str]:
        """Pending names in order of claiming. A listing serves for `LISTING_S`: it is slow where tickets are many."""
        now = time.monotonic()
        if not self._listing or now - self._listed_at > LISTING_S or newest_first != self._listed_newest:
            self._listing = _ordered(self.ops.listdir(self._at("pending")), newest_first)
            self._listed_at, self._listed_newest = now, newest_first
        return self._listing

    def read(self, token: Token) -> Ticket:
        """The ticket of a token. Raises TicketError for one to quarantine, FileNotFoundError once it moved on."""
        return self._read(self._path(token), token.ticket)

    def ticket(self, ticket_id: str) -> Ticket:
        """A ticket by its id, whatever its state."""
        return self._read(self._at("tickets", ticket_id), ticket_id)

    def _read(self, path: str, ticket_id: str) -> Ticket:
        try:
            text = self.ops.read(path, tickets.MAX_BYTES)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise TicketError(f"{path}: not a regular file") from error
            raise
        found = tickets.load(text, path)
        if found.id != ticket_id:
            raise TicketError(f"{path}: holds ticket {found.id}")
        return found

    def complete(self, token: Token) -> bool:
        """Commit the result that stands in `results/`; False when the claim was lost, and the result is garbage."""
        return self._close(token, "done")

    def fail(self, token: Token) -> bool:
        """End the ticket without a result; `retry` brings it back. False when the claim was lost."""
        return self._close(token, "failed")

    def quarantine(self, token: Token, reason: str) -> bool:
        """Put a ticket that must not be executed aside, with the reason beside it."""
        path = self._reason(token)
        with contextlib.suppress(FileExistsError):
            fsio.write_new(self.ops, path, reason.encode(errors="replace") + b"\n")
        return self._close(token, "quarantine")

    def release(self, token: Token, *, failed: bool, max_failures: int | None = None) -> str:
        """Give a claimed ticket back: ``pending``, ``failed`` once it failed `max_failures` times, or ``lost``."""
        failures = token.failures + failed
        if max_failures is not None and failures >= max_failures:
            return "failed" if self.fail(token) else "lost"
        back = replace(token, state="pending", runner="", generation=token.generation + 1, failures=failures)
        if not moved(self.ops, self._path(token), self._path(back)):
            return "lost"
        self.ops.sync_dir(self._at("pending"))
        return "pending"

    def retry(self, token: Token) -> bool:
        """Bring a ticket that was ended back, with a fresh count of failures."""
        back = replace(token, state="pending", runner="", generation=token.generation + 1, failures=0)
        if not moved(self.ops, self._path(token), self._path(back)):
            return False
        self.ops.sync_dir(self._at("pending"))
        return True

    def _close(self, token: Token, state: str) -> bool:
        if not moved(self.ops, self._path(token), self._path(replace(token, state=state))):
            return False
        self.ops.sync_dir(self._at(state))
        return True

    # ------------------------------------------------------------------ heartbeat

    def start_heart(self) -> int:
        """Create this runner's heartbeat file; the descriptor is for `beat` and `stop_heart`."""
        return self.ops.create(self._at("hb", self.runner))

    def beat(self, fd: int, count: int) -> None:
        """Show that this runner lives. Raises OSError when it could not be shown."""
        self.ops.pwrite(fd, b"%020d" % count, 0)
        self.ops.fsync(fd)

    def stop_heart(self, fd: int) -> None:
        self.ops.close(fd)
        self.ops.unlink(self._at("hb", self.runner))

    def heartbeat(self, runner: str) -> bytes:
        """What a runner's heartbeat file holds now; nothing when there is none."""
        try:
            return self.ops.read(self._at("hb", runner), 64)
        except FileNotFoundError:
            return b""

    # ------------------------------------------------------------------ looking

    def tokens(self, *states: str) -> Iterator[Token]:
        """The tokens of these states (all by default), in listing order of priority and age."""
        for state in states or STATES:
            for name in sorted(self.ops.listdir(self._at(state))):
                token = Token.parse(state, name)
                if token is not None:
                    yield token

    def reason(self, token: Token) -> str:
        """Why a token is in quarantine."""
        try:
            return self.ops.read(self._reason(token), 4096).decode(errors="replace").strip()
        except OSError:
            return ""

    # ------------------------------------------------------------------ names

    def _reason(self, token: Token) -> str:
        return self._at("quarantine", f"reason-{token.name}")

    def _path(self, token: Token) -> str:
        return self._at(token.state, token.name)

    def _at(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)


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
                    self.queue._admit(path, token.name)
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


def _ordered(names: list[str], newest_first: bool) -> list[str]:
    """By priority, then by order; a name that is no token's goes where it may."""
    by_order = sorted(names, reverse=newest_first)
    return sorted(by_order, key=lambda name: name[:1])      # stable: within one priority the order stays


def _no_links(root: str, error: OSError) -> QueueError:
    return QueueError(
        f"queue {root}: its file system has no hard links ({error.strerror}); set `queue` to a directory on one "
        "that has (ext4, XFS, NFS, Lustre and GPFS do; FAT, some FUSE and object-store mounts do not)"
    )
