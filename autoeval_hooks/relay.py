"""Scores come back: the training process's own W&B writer logs them into the run that is open in it.

A second W&B writer beside a live one overwrites its rows, so the runner leaves each result as a file
(relay_files) and this process logs it.

The right to log is a lease: the hook logs only while its last heartbeat is younger than `LEASE_S`
(`ENDED_LEASE_S` after the end) on its own clock; the runner acts on its own only after it saw the heartbeat
unchanged for much longer (`STALE_S`, `ENDED_STALE_S`) on its own. No two hosts' clocks are compared.

A point is logged once. It is moved to `taken/` under this relay's name before the training thread may log it, and to
`logged/` only `GRACE_S` after its row was complete, which is longer than W&B takes to write or send a row. The end of
the process or of the W&B run moves nothing earlier: W&B has yet to send then, and nothing says whether it could. What
a process leaves in `taken/` no later relay logs: a runner looks for its row in the run first (eval_runner.sinks.wandb).
The runner also looks, once the process is gone, for what is in `logged/`. What remains:

- The training process is suspended (SIGSTOP) between `log` and the sending of the row, for longer than `STALE_S`: the
  runner finds no row and logs the point; it stands there twice once the process goes on.
- A second process trains the same W&B run at the same time: W&B itself overwrites rows then. The runner finds what was
  lost of ours once both are gone.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections import deque
from typing import Any, NamedTuple

from autoeval_hooks import fsio
from autoeval_hooks.delivery import log, never_raise
from autoeval_hooks.errors import TicketError
from autoeval_hooks.relay_files import (
    AXIS,
    ENDED_LEASE_S,
    LEASE_S,
    RELAY,
    TOKENS_AXIS,
    VERSION,
    Announcement,
    Ended,
    Point,
    clock,
    encode,
    move,
    read_point,
    set_aside,
    taken,
    waiting,
)
from autoeval_hooks.run_identity import RunIdentity, wandb_run

POLL_S = 1.0
BEAT_S = 2.0
GRACE_S = 40.0
"""W&B writes its log and sends rows every 15 s; twice that, and a little for a slow network."""
RELIST_S = 60.0
"""`points/` is listed again after this time even where its change time says that nothing came."""
AHEAD = 16
"""At most so many points are taken before they are logged: if this process is killed, a runner must look for them."""
END_WAIT_S = 5.0
"""How long the end of training waits for the last points and the marker."""

_active: dict[str, Relay] = {}
_active_lock = threading.Lock()


class _Taken(NamedTuple):
    name: str
    """In taken/, as long as it is ours."""
    point: Point


class Relay:
    """Brings the points of one run into the W&B run that is open in this process.

    A framework's adapter calls `start` once W&B is up, `on_log` after each row that the trainer logged,
    and `end` when training ended, whether or not its last step was reached. None of them raises, and the
    training thread touches no file. `identity.wandb_id` says which W&B run is ours: with no such run open
    in this process nothing is done.
    """

    def __init__(
        self, directory: str, identity: RunIdentity, *, logs_by_step: bool, planned_last_step: int | None
    ) -> None:
        self._dir = directory
        self._logs_by_step = logs_by_step
        self._planned = planned_last_step
        self._incarnation = uuid.uuid4().hex
        self._announcement = Announcement(VERSION, identity, self._incarnation, logs_by_step, planned_last_step)
        self._run: Any = None
        self._pid = 0
        self._lock = threading.Lock()  # held while logging, never while a file is touched
        self._ready: deque[_Taken] = deque()
        self._open: _Taken | None = None
        self._complete: list[tuple[float, _Taken]] = []
        self._known: set[str] = set()  # tickets in `_ready`, and all that this process has ever logged
        self._read: dict[str, Point] = {}  # what stands in points/, by name: a point never changes
        self._lapses = 0
        self._defined: set[str] = set()
        self._stopped = False
        self._ended: Ended | None = None
        self._marked = False
        self._wake = threading.Event()
        self._done = threading.Event()
        self._heartbeat = -1
        self._beats = 0
        self._beat_at = 0.0
        self._gate = (0, 0.0)
        self._said: set[str] = set()

    @never_raise
    def start(self) -> None:
        """Begin in the background; the W&B run must be open. A relay of an earlier training of the same W&B run in
        this process hands over to this one."""
        run = wandb_run()
        if run is None or run.id != self._announcement.run.wandb_id or self._run is not None:
            return
        self._run, self._pid = run, os.getpid()
        with _active_lock:
            before, _active[self._dir] = _active.get(self._dir), self
        if before is not None:
            self._take_over(before)
        threading.Thread(target=self._loop, name="autoeval-relay", daemon=True).start()

    @never_raise
    def on_log(self) -> None:
        """Training thread, after a row of the trainer's. What joined the row before is now complete; at most
        one point joins the row that is open (for a trainer that logs by step) or comes next."""
        if self._run is None or os.getpid() != self._pid or not self._lock.acquire(blocking=False):
            return
        try:
            if self._open is not None:
                self._complete.append((clock(), self._open))
                self._open = None
            if self._ready and self._ended is None and self._may_log():
                self._run.log(self._ready[0].point.row(), commit=False)
                self._open = self._ready.popleft()
        finally:
            self._lock.release()

    @never_raise
    def end(self, last_step: int, wait: float = END_WAIT_S) -> None:
        """Training ended. Waits at most `wait` seconds for the last points and the marker. The heartbeat goes on, and
        late points are still logged while the W&B run is open, unless the trainer logs by step: its next step must
        stay free."""
        if self._run is None:
            return
        complete = self._planned is not None and last_step >= self._planned
        self._ended = Ended(VERSION, self._incarnation, last_step, complete)
        self._wake.set()
        self._done.wait(min(wait, END_WAIT_S))

    # ---------------------------------------------------------------- memory only

    def _may_log(self) -> bool:
        lease = LEASE_S if self._ended is None else ENDED_LEASE_S
        return not self._stopped and wandb_run() is self._run and clock() - self._beat_at < lease

    def _take_over(self, before: Relay) -> None:
        with before._lock:
            before._stopped = True
            self._open, before._open = before._open, None
            self._complete, before._complete = before._complete, []
            self._known = before._known - {item.point.ticket for item in before._ready}

    @property
    def _who(self) -> str:
        """Whose points in taken/ are ours. A name that was used before a lapse of the lease is not used again."""
        return f"{RELAY}{self._incarnation}-{self._lapses}"

    # ---------------------------------------------------------------- the background thread

    def _loop(self) -> None:
        while not self._stopped and wandb_run() is self._run:
            try:
                self._turn()
            except Exception as error:
                self._say(f"{self._dir}: {error}")
            self._wake.wait(POLL_S)
            self._wake.clear()
        self._stopped = True
        self._done.set()
        with contextlib.suppress(Exception):  # what stays in taken/ is looked for by a runner
            self._hand_back()
        with _active_lock:
            if _active.get(self._dir) is self:
                del _active[self._dir]
        if self._heartbeat >= 0:
            os.close(self._heartbeat)

    def _turn(self) -> None:
        ending = self._ended
        self._beat()
        if self._stopped:
            return
        if ending is None or not self._logs_by_step:
            self._load()
        if ending is not None:
            if self._logs_by_step:
                self._hand_back()
            else:
                self._log_rows()
            if not self._marked:
                fsio.replace(os.path.join(self._dir, "ended.json"), encode(ending))
                self._marked = True
        self._settle()
        if ending is not None:
            self._done.set()

    def _beat(self) -> None:
        now = clock()
        if self._heartbeat >= 0:
            if now - self._beat_at < BEAT_S * 0.9:
                return
            if os.fstat(self._heartbeat).st_nlink == 0:
                if os.path.lexists(os.path.join(self._dir, "heartbeat")):
                    self._stopped = True
                    self._say(f"{self._dir}: another process trains this W&B run now; scores go to that one")
                    return
                os.close(self._heartbeat)  # it was removed, perhaps with all that stood beside it
                self._heartbeat, self._marked = -1, False
        if self._heartbeat < 0:
            self._announce()
        self._beats += 1
        os.pwrite(self._heartbeat, f"{self._incarnation} {self._beats:020d}\n".encode(), 0)
        os.fsync(self._heartbeat)
        lease = LEASE_S if self._ended is None else ENDED_LEASE_S
        if clock() - self._beat_at >= lease:
            self._hand_back()  # what somebody else has not taken meanwhile
            self._lapses += 1
        self._beat_at = now

    def _announce(self) -> None:
        for name in ("", "points", "taken", "logged"):
            os.makedirs(os.path.join(self._dir, name), exist_ok=True)
        self._adopt()
        # Our own file under the name: the descriptor tells us when another process puts its file there.
        path = os.path.join(self._dir, "heartbeat")
        fd = fsio.FileOps().create(f"{path}.{self._incarnation}")
        try:
            os.pwrite(fd, f"{self._incarnation} {0:020d}\n".encode(), 0)
            os.fsync(fd)
            os.rename(f"{path}.{self._incarnation}", path)
            fsio.replace(os.path.join(self._dir, "run.json"), encode(self._announcement))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._dir, "closed"))  # it goes on after all
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(f"{path}.{self._incarnation}")
            raise
        self._heartbeat = fd

    def _adopt(self) -> None:
        """Put our name on what the relay before us had logged: it is not ours to be looked for."""
        with self._lock:
            mine = [item for _, item in self._complete] + ([self._open] if self._open else [])
        for item in mine:
            name = taken(item.point.ticket, self._who)
            with contextlib.suppress(OSError):
                move(self._dir, f"taken/{item.name}", f"taken/{name}")
        with self._lock:
            self._complete = [(at, self._renamed(item)) for at, item in self._complete]
            self._open = self._renamed(self._open) if self._open else None

    def _renamed(self, item: _Taken) -> _Taken:
        return item._replace(name=taken(item.point.ticket, self._who))

    def _load(self) -> None:
        """Take new points and bring them into memory, their metrics defined: neither a file nor a definition costs
        training."""
        changed, now = fsio.gate(os.path.join(self._dir, "points")), clock()
        seen, listed_at = self._gate
        room = AHEAD - len(self._ready)
        # Within 2 s of a listing, a coarse change time may not tell a later change.
        if room <= 0 or (changed == seen and 2.0 < now - listed_at < RELIST_S):
            return
        names = [name for name in waiting(self._dir) if name.removesuffix(".json") not in self._known]
        self._read = {name: self._read[name] for name in names if name in self._read}
        for name in names:
            if name in self._read:
                continue
            try:
                self._read[name] = read_point(self._dir, name)
            except FileNotFoundError:
                continue
            except OSError as error:  # it may be readable later, and must not hold up the others
                self._say(f"{self._dir}: {name} cannot be read now: {error}")
            except TicketError as error:
                self._say(f"refused a point in {self._dir}: {error}")
                with contextlib.suppress(OSError):
                    set_aside(self._dir, name, str(error))
        for point in sorted(self._read.values(), key=lambda p: (p.step, p.ticket))[:room]:
            define(self._run, point.metrics, self._defined)
            item = _Taken(taken(point.ticket, self._who), point)
            try:
                if not move(self._dir, f"points/{point.ticket}.json", f"taken/{item.name}"):
                    continue
            except OSError:
                with contextlib.suppress(OSError):
                    move(self._dir, f"taken/{item.name}", f"points/{point.ticket}.json")
                raise
            with self._lock:
                self._known.add(point.ticket)
                self._ready.append(item)
        if len(self._read) <= room and (changed != seen or now - listed_at >= RELIST_S):
            self._gate = (changed, now)

    def _hand_back(self) -> None:
        """Put what was taken and not logged back into points/."""
        with self._lock:
            items = list(self._ready)
            self._ready.clear()
            self._known -= {item.point.ticket for item in items}
            self._gate = (0, 0.0)
        for item in items:
            move(self._dir, f"taken/{item.name}", f"points/{item.point.ticket}.json")

    def _log_rows(self) -> None:
        """After the end: each point a row of its own."""
        while self._ready:
            with self._lock:
                if not self._ready or not self._may_log():
                    return
                if self._open is not None:
                    self._run.log({}, commit=True)
                    self._complete.append((clock(), self._open))
                    self._open = None
                self._run.log(self._ready[0].point.row(), commit=True)
                self._complete.append((clock(), self._ready.popleft()))

    def _settle(self) -> None:
        """Move what was complete for `GRACE_S` to `logged/`."""
        with self._lock:
            old = [item for item in self._complete if clock() - item[0] >= GRACE_S]
        for item in old:
            move(self._dir, f"taken/{item[1].name}", f"logged/{item[1].name}")  # or a runner did, which thought us dead
            with self._lock:
                if item in self._complete:
                    self._complete.remove(item)

    def _say(self, text: str) -> None:
        if text not in self._said and len(self._said) < 100:
            self._said.add(text)
            log.warning("autoeval: relay: %s", text)


def define(run: Any, metrics: dict[str, float], defined: set[str]) -> None:
    """Give each metric its axis, by its exact name (a pattern's order against the trainer's own is not defined)."""
    for name in (AXIS, TOKENS_AXIS, *metrics):
        if name not in defined:
            run.define_metric(name, step_metric=None if name == AXIS else AXIS)
            defined.add(name)
