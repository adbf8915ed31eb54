"""Frees what no ticket needs: pins of tickets that ended, passing pins of hand-overs that died, results that lost, and
what is left in the queue of interrupted evaluations. Everything else stays.

A pin is deleted by `pin.release` alone; in the queue, what goes is moved to `tmp/` first, so that half of it is
never seen.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks import fsio, pin
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import TicketError
from autoeval_hooks.handover import file_system_time
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.retention import ENDED, needless
from autoeval_hooks.ticket import PINS
from eval_runner.parts import FOLDER
from eval_runner.results import store

DEAD_S = 600.0
"""A passing pin of a process of this host that is gone is left alone for so long: where a container shares the host's
name, its processes cannot be seen from outside."""
REASON_S = 3600.0
"""A reason stands for a moment before its token does."""


@dataclass(frozen=True)
class Thing:
    """A directory or file that no ticket needs: `kind` is ``pin``, ``result``, ``partial`` or ``reason``, and `why`
    says why it may go. `bytes` is what deleting all of them frees: a file that has another name frees nothing.

    `token` is the ended ticket's: while it stands, the ticket is not retried.
    """

    kind: str
    path: str
    why: str
    bytes: int = 0
    token: Token | None = None


@dataclass
class Found:
    """What `find` found. `strangers` are pins of tickets that this queue does not know, `problems` a line each."""

    free: list[Thing] = field(default_factory=list)
    strangers: list[Thing] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find(
    queue: Queue, path_map: Mapping[str, str], directories: Iterable[str] = (), *,
    failed: bool = False, orphans: bool = False,
) -> Found:  # fmt: skip
    """What may be freed in the queue and in the output directories of its tickets, and in `directories`.

    `failed` counts failed tickets as ended; `orphans` frees the pins of tickets that this queue does not know, which
    another may. Raises OSError where the queue cannot be read.
    """
    found = Found()
    states = (*ENDED, "failed") if failed else ENDED
    results = queue.ops.listdir(os.path.join(queue.root, "results"))      # before the tokens: see `_results`
    known = frozenset(queue.ops.listdir(os.path.join(queue.root, "tickets")))
    for output_dir in sorted({*_output_dirs(queue, known, path_map), *map(os.path.realpath, directories)}):
        try:
            _pins(queue, output_dir, known, states, orphans, found)
        except (OSError, TicketError) as error:
            found.problems.append(f"{output_dir}: its pins are left alone: {error}")
    ended = {t.ticket: t for t in queue.tokens(*ENDED, "failed")}
    for things in (_results(queue, results, ended), _partial(queue, states), _reasons(queue)):
        found.free += things
    found.free = _with_bytes(found.free)
    found.strangers = _with_bytes(found.strangers)
    return found


def free(queue: Queue, thing: Thing) -> bool:
    """Delete it; False where its ticket was retried in the meantime. Raises OSError, or AutoEvalError that says why
    it was left."""
    if thing.token is not None and not queue.holds(thing.token):
        return False
    if thing.kind == "pin":
        pin.release(thing.path, queue.ops)
        return True
    aside = os.path.join(queue.root, "tmp", f"gc-{thing.kind}~{fsio.unique()}")
    if fsio.moved(queue.ops, thing.path, aside):
        if thing.kind == "reason":
            queue.ops.unlink(aside)
        else:
            shutil.rmtree(aside)        # where this is cut off, a runner's housekeeping finishes it
    return True


# ---------------------------------------------------------------------- pins


def _output_dirs(queue: Queue, known: Iterable[str], path_map: Mapping[str, str]) -> Iterator[str]:
    """Where the tickets' checkpoints and pins lie, as this host names it."""
    for ticket_id in known:
        with contextlib.suppress(TicketError, OSError):
            ticket = queue.ticket(ticket_id)
            yield os.path.realpath(os.path.dirname(map_path(ticket.manifest.path, path_map)))
            if ticket.pin:
                yield os.path.realpath(str(Path(map_path(ticket.pin, path_map)).parents[2]))


def _pins(
    queue: Queue, output_dir: str, known: frozenset[str], states: tuple[str, ...], orphans: bool, found: Found
) -> None:
    pins = {os.path.basename(p): p for p in pin.existing(os.path.join(output_dir, "checkpoint"))}
    if not pins:
        return
    directory = os.path.join(output_dir, PINS)
    if not os.path.realpath(directory).endswith(os.sep + PINS):
        found.problems.append(f"{directory}: lies elsewhere, behind a link; what it holds is left alone")
        return
    over = needless(queue, pins, *states)
    tokens = {t.ticket: t for t in queue.tokens(*states) if t.ticket in over}
    now_ns = file_system_time(output_dir) if set(pins) - known else 0
    for name, path in sorted(pins.items()):
        try:
            age = (now_ns - os.lstat(path).st_mtime_ns) / 1e9
        except FileNotFoundError:       # its runner was faster
            continue
        if os.path.islink(path):
            found.problems.append(f"{path}: a link in the place of a pin; it is left alone")
        elif token := tokens.get(name):
            found.free.append(Thing("pin", path, f"its ticket is {_is(token.state)}", token=token))
        elif name.startswith(".new-"):
            theirs = pin.process(path) is None
            if (theirs and age > pin.STALE_S) or (pin.orphaned(path) and age > DEAD_S):
                found.free.append(Thing("pin", path, "its hand-over died"))
        elif name not in known:
            stranger = Thing("pin", path, "its ticket is not of this queue")
            (found.free if orphans and age > pin.STALE_S else found.strangers).append(stranger)


def _is(state: str) -> str:
    return "in quarantine" if state == "quarantine" else state


# ---------------------------------------------------------------------- the queue's own directories


def _results(queue: Queue, names: list[str], ended: Mapping[str, Token]) -> Iterator[Thing]:
    """Results of attempts that lost, of tickets that ended. `names` were listed before `ended`: what a runner was about
    to commit is named by its token by now, or its ticket has not ended."""
    counting = {token.result_name for token in ended.values() if token.state in ("done", "failed")}
    for name in sorted(names):
        path, token = os.path.join(queue.root, "results", name), ended.get(name.split("~")[0])
        if token is None or name in counting or os.path.islink(path):
            continue
        with contextlib.suppress(store.ResultError):
            if store.read(Path(path)).status == "ok":
                yield Thing("result", path, "another attempt counts", token=token)


def _partial(queue: Queue, states: tuple[str, ...]) -> Iterator[Thing]:
    """What interrupted evaluations left for their next attempt, which will not come."""
    directory = os.path.join(queue.root, FOLDER)
    with contextlib.suppress(FileNotFoundError):
        names = queue.ops.listdir(directory)
        ended = {t.ticket: t for t in queue.tokens(*states)}
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name in ended and not os.path.islink(path) and os.path.isdir(path):
                yield Thing("partial", path, f"its ticket is {_is(ended[name].state)}", token=ended[name])


def _reasons(queue: Queue) -> Iterator[Thing]:
    """Why a ticket was cancelled or in quarantine that is no longer."""
    for state in ("cancelled", "quarantine"):
        directory = os.path.join(queue.root, state)
        names = [n for n in sorted(queue.ops.listdir(directory)) if n.startswith("reason-")]
        standing = {f"reason-{token.name}" for token in queue.tokens(state)}
        idle = [os.path.join(directory, n) for n in names if n not in standing]
        now_ns = _now_ns(queue) if idle else 0
        for path in idle:
            with contextlib.suppress(FileNotFoundError):
                seen = os.lstat(path)
                if stat.S_ISREG(seen.st_mode) and now_ns - seen.st_mtime_ns > REASON_S * 1e9:
                    yield Thing("reason", path, f"its ticket is not {_is(state)} any longer")


def _now_ns(queue: Queue) -> int:
    """Now, by the clock that stamps the queue's files."""
    path = os.path.join(queue.root, "tmp", f"time-{fsio.unique()}")
    fsio.write_new(queue.ops, path, b"")
    try:
        return os.stat(path).st_mtime_ns
    finally:
        queue.ops.unlink(path)


# ---------------------------------------------------------------------- bytes


def _with_bytes(things: list[Thing]) -> list[Thing]:
    """The things with the bytes that the last name of each file frees, when they are deleted in this order."""
    names: Counter[tuple[int, int]] = Counter()
    out = []
    for thing in things:
        size = 0
        for path in _files(thing.path):
            with contextlib.suppress(FileNotFoundError):
                seen = os.lstat(path)
                names[seen.st_dev, seen.st_ino] += 1
                if names[seen.st_dev, seen.st_ino] == seen.st_nlink:
                    size += seen.st_size
        out.append(Thing(thing.kind, thing.path, thing.why, size, thing.token))
    return out


def _files(path: str) -> Iterator[str]:
    if os.path.isdir(path):
        for root, _, names in os.walk(path):
            yield from (os.path.join(root, name) for name in names)
    else:
        yield path
