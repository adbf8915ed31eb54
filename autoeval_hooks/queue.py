"""The ticket queue: a directory on a shared file system, and nothing else.

Each ticket has one inode, the token. `tickets/ID` is its first name and says that the ticket exists;
its second name stands in the directory that is its state, and every change of state is one rename of
that name. Names are used once: a claim's name holds its generation and its runner, so whoever renames
it away wins, and a runner whose name is gone has lost (the fence).

    tmp/ → tickets/ + pending/PRIO-ORDER-ID~gNfM          enqueue (no lock)
    pending/… → claimed/…~gNfM~RUNNER                      claim (no lock)
    claimed/… → done/… | failed/… | quarantine/…           complete, fail, quarantine
    claimed/… → pending/…~g(N+1)f(M or M+1)                release, and reap for a dead runner
    pending/…, claimed/… → cancelled/…~gNfM~WHO            cancel, with the reason beside it
    what was ended → pending/…~g(N+1)f0                    retry

N counts how often the ticket was handed out, M how many of those ended badly: a runner that is told to
stop gives its ticket back without using up an attempt. PRIO is 9 minus the priority and ORDER the
submitter's clock in µs: they sort the listing, nothing is decided by them.

`keeper` frees what dead runners hold.

A power cut loses nothing that was acknowledged. A file is synced before it is named; a directory is synced
once a name came into it that was promised: `tickets/` and `pending/` before a submit returns, `results/`
before its token goes to `done/`, `done/` before the commit is told. What a rename leaves is not synced: on a
journaling file system (ext4, XFS, btrfs, ZFS, Lustre, GPFS) a rename is done wholly or not at all, so the
token stands under one of its two names. A claim is not synced either: undone, the ticket is pending again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from autoeval_hooks import fsio
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import QueueError, TicketError
from autoeval_hooks.fsio import FileOps, moved
from autoeval_hooks.ticket import Ticket

STATES = ("pending", "claimed", "done", "failed", "quarantine", "cancelled")
DIRECTORIES = ("tmp", "tickets", *STATES, "results", "hb", "locks")
FRONT = 16
"""Runners that lost a race spread over this many tickets at the front of the listing."""
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
"""What reading a link, a directory or a socket answers."""
LISTING_S = 2.0
"""How long a listing of pending/ serves. Evaluations take minutes: every one of them starts from a fresh listing."""
NOTE_BYTES = 256
"""Length of what a heartbeat's file holds behind the count."""
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
        token = cls(state, m["sort"], m["ticket"], int(m["generation"]), int(m["failures"]), m["runner"] or "")
        return token if token.name == name else None    # `g007`, digits of another script

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
            for name in DIRECTORIES:
                fsio.make_dirs(self.ops, self._at(name))
            probe = self._at("tmp", f"probe-{fsio.unique()}")
            fsio.write_new(self.ops, probe, b"")
        except OSError as error:
            raise QueueError(
                f"queue {self.root}: cannot be written ({error.strerror}); create it, or fix its mode, or set `queue`"
            ) from error
        try:
            with contextlib.suppress(FileExistsError):      # done, and the reply was lost
                self.ops.link(probe, probe + ".link")
            fsio.remove(self.ops, probe + ".link")
        except OSError as error:
            if error.errno in fsio.NO_LINKS:
                raise _no_links(self.root, error) from error
            raise
        finally:
            fsio.remove(self.ops, probe)

    # ------------------------------------------------------------------ submitter

    def known(self, ticket_id: str) -> bool:
        """Whether this ticket was ever enqueued. Then it survives a power cut."""
        try:
            self.ops.nlink(self._at("tickets", ticket_id))
        except FileNotFoundError:
            return False
        self.ops.sync_dir(self._at("tickets"))      # its submitter may have died before it could
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
            fsio.remove(self.ops, tmp)
            self.ops.sync_dir(self._at("tickets"))      # its submitter may have died before it could
            return False
        self.admit(tmp, token.name)
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

    def admit(self, tmp: str, name: str) -> None:
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
            text = self.ops.read(path, tickets.MAX_BYTES, self._writers())
        except fsio.ForeignFile as error:
            raise TicketError(
                f"{path}: {error.strerror}, whom the mode of {self.root} lets not write there; submit the checkpoint "
                "as the queue's owner, or, where a group shares the queue, give its directory to the group (chmod g+w)"
            ) from error
        except OSError as error:
            if error.errno in _NO_FILE:
                raise TicketError(f"{path}: not a regular file") from error
            raise
        found = tickets.load(text, path)
        if found.id != ticket_id:
            raise TicketError(f"{path}: holds ticket {found.id}")
        return found

    def _writers(self) -> frozenset[int] | None:
        """The users (uid) whose tickets are taken; None: anybody's, since the queue's mode lets others write."""
        root = os.stat(self.root)
        return None if root.st_mode & 0o022 else frozenset((0, os.geteuid(), root.st_uid))

    def complete(self, token: Token) -> bool:
        """Commit the result that stands in `results/`; False when the claim was lost, and the result is garbage."""
        return self._close(token, "done")

    def fail(self, token: Token) -> bool:
        """End the ticket without a result; `retry` brings it back. False when the claim was lost."""
        return self._close(token, "failed")

    def quarantine(self, token: Token, reason: str) -> bool:
        """Put a ticket that must not be executed aside, with the reason beside it."""
        return self._put_aside(token, replace(token, state="quarantine"), reason)

    def cancel(self, token: Token, reason: str) -> bool:
        """End a ticket that nobody needs any more, with the reason beside it; `retry` brings it back. A runner that
        holds it cannot commit. False when it moved on meanwhile."""
        return self._put_aside(token, replace(token, state="cancelled", runner=self.runner), reason)

    def _put_aside(self, token: Token, aside: Token, reason: str) -> bool:
        fsio.replace(self._reason(aside), reason.encode(errors="replace") + b"\n", self.ops)
        if not moved(self.ops, self._path(token), self._path(aside)):
            return False
        self.ops.sync_dir(self._at(aside.state))
        return True

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

    def restore(self, ticket_id: str) -> None:
        """Give a ticket that has lost its token a second name again; the janitor admits it. A power cut on a file
        system that does renames by halves takes one, or a user's hand. Its generation is one that no result has."""
        names = [name.split("~") for name in self.ops.listdir(self._at("results"))]
        past = [int(n[1][1:]) for n in names if n[0] == ticket_id and len(n) == 3 and n[1][1:].isdecimal()]
        token = Token("pending", "4-0", ticket_id, max(past, default=-1) + 1, 0)
        self.ops.link(self._at("tickets", ticket_id), self._at("tmp", f"{token.name}~{fsio.unique()}"))

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

    def beat(self, fd: int, count: int, note: bytes = b"") -> None:
        """Show that this runner lives, and what it is at (`NOTE_BYTES`, or nothing). Raises OSError when it could not
        be shown.

        A file that was removed as a dead runner's, while this one was paused for long, is made anew.
        """
        if self._removed(fd):
            fresh = self.start_heart()
            try:
                os.dup2(fresh, fd, inheritable=False)
            finally:
                self.ops.close(fresh)
        self.ops.pwrite(fd, b"%020d" % count + note, 0)
        self.ops.fsync(fd)

    def _removed(self, fd: int) -> bool:
        try:
            return not self.ops.stands_at(fd, self._at("hb", self.runner))
        except OSError as error:
            if error.errno != errno.ESTALE:     # NFS's word for a file that another host removed
                raise
            return True

    def stop_heart(self, fd: int) -> None:
        self.ops.close(fd)
        fsio.remove(self.ops, self._at("hb", self.runner))

    def heartbeat(self, runner: str) -> bytes:
        """What a runner's heartbeat file holds now; nothing when there is none."""
        try:
            return self.ops.read(self._at("hb", runner), 64)
        except OSError as error:
            if error.errno in (errno.ENOENT, *_NO_FILE):
                return b""
            raise

    def note(self, runner: str) -> bytes:
        """What a runner says that it is at; nothing when it cannot be known."""
        try:
            return self.ops.read(self._at("hb", runner), 20 + NOTE_BYTES)[20:]
        except OSError:
            return b""

    # ------------------------------------------------------------------ looking

    def tokens(self, *states: str) -> Iterator[Token]:
        """The tokens of these states (all by default), in listing order of priority and age."""
        for state in states or STATES:
            for name in sorted(self.ops.listdir(self._at(state))):
                token = Token.parse(state, name)
                if token is not None:
                    yield token

    def holds(self, token: Token) -> bool:
        """Whether a claim stands: nobody reaped or cancelled it so far."""
        try:
            self.ops.nlink(self._path(token))
        except FileNotFoundError:
            return False
        return True

    def reason(self, token: Token) -> str:
        """Why a token is in quarantine or cancelled."""
        try:
            return self.ops.read(self._reason(token), 4096).decode(errors="replace").strip()
        except OSError:
            return ""

    # ------------------------------------------------------------------ names

    def _reason(self, token: Token) -> str:
        return self._at(token.state, f"reason-{token.name}")

    def _path(self, token: Token) -> str:
        return self._at(token.state, token.name)

    def _at(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)


def _ordered(names: list[str], newest_first: bool) -> list[str]:
    """By priority, then by order; a name that is no token's goes where it may."""
    by_order = sorted(names, reverse=newest_first)
    return sorted(by_order, key=lambda name: name[:1])      # stable: within one priority the order stays


def _no_links(root: str, error: OSError) -> QueueError:
    return QueueError(
        f"queue {root}: its file system has no hard links ({error.strerror}); set `queue` to a directory on one "
        "that has (ext4, XFS, NFS, Lustre and GPFS do; FAT, some FUSE and object-store mounts do not)"
    )
