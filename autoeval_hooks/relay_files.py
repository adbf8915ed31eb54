"""The files by which scores reach the training process, one directory for each run.

`<queue>/relay/<RunIdentity.key>/`:

    run.json         the hook, at the start: an `Announcement`
    heartbeat        the hook, while it can log: `<incarnation> <counter>`, rewritten every few seconds
    ended.json       the hook, when training ended in order: an `Ended`
    identity.json    the runner: the RunIdentity of the tickets, used where no hook announced itself
    closed           the user: this run will not go on. A training that goes on all the same removes it
    points/ID.json   the runner: a `Point`, linked into place, never overwritten; ID is the ticket's. No one logged it
    taken/ID~WHO     a point that WHO has taken: it may have been logged, by WHO and by nobody else
    logged/ID~WHO    a point that WHO delivered
    given/ID         the runner: this point was once in points/
    refused/         what stood in points/ and is no point, each with a `.reason`
    writer/          the right of a runner to log them itself (eval_runner.sinks.wandb_lease); writer.log is its output
    audited          the runner: the heartbeat of a process that is gone, and whose points were looked for since
    why              the runner: why points wait

A point is one file that is renamed: points → taken → logged. It is in taken/ before it is logged, and WHO names one
attempt only. So what a process leaves in taken/ when it dies is what may be in W&B or not: nobody logs it again
before somebody has looked for it in the run, and then it moves on, or back to points/.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from typing import TypeVar

from autoeval_hooks import fsio, run_identity, strict
from autoeval_hooks.errors import TicketError
from autoeval_hooks.run_identity import RunIdentity

VERSION = 1
POINT_BYTES = 1 << 20
AXIS, TOKENS_AXIS = "bench/step", "bench/tokens"
STALE_S, ENDED_STALE_S = 120.0, 15.0
"""How long a heartbeat must stand still before its process counts as gone; the second after its `ended.json`."""
LEASE_S, ENDED_LEASE_S = 60.0, 5.0
"""How old its own last heartbeat may be for a process to log: well below the above."""

STAGES = ("points", "taken", "logged")
RELAY = "relay-"
"""How WHO begins where it is a training process; its incarnation follows."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
T = TypeVar("T")


@dataclass(frozen=True)
class Announcement:
    """`run.json`. `logs_by_step`: the trainer logs with `step=`, so that a row of ours could take its next step."""

    version: int
    run: RunIdentity
    incarnation: str
    logs_by_step: bool
    planned_last_step: int | None


@dataclass(frozen=True)
class Ended:
    """`ended.json`: the end of training was reached in order. `complete`: at the step that was planned."""

    version: int
    incarnation: str
    last_step: int
    complete: bool


@dataclass(frozen=True)
class Point:
    """`points/ID.json`: the metrics of one ticket, by names as ``bench/<suite>/<benchmark>/<metric>``.

    `step` goes to ``bench/step``, `tokens` (in billions, None if unknown) to ``bench/tokens``.
    """

    version: int
    ticket: str
    step: int
    tokens: float | None
    metrics: dict[str, float]

    def row(self) -> dict[str, float]:
        """What is logged."""
        axes = {AXIS: self.step} if self.tokens is None else {AXIS: self.step, TOKENS_AXIS: self.tokens}
        return {**self.metrics, **axes}


def parse(cls: type[T], data: bytes, where: str) -> T:
    """One of the records above. Raises TicketError that says what is wrong."""
    errors: list[str] = []
    record = strict.parse(cls, data, where, errors, max_bytes=POINT_BYTES, max_depth=4)
    version = getattr(record, "version", VERSION)
    if version != VERSION:
        errors.append(f"{where}: version {version}, this autoeval knows {VERSION}; update it")
    run = record if isinstance(record, RunIdentity) else getattr(record, "run", None)
    if run is not None and (problem := run_identity.problem(run)):
        errors.append(f"{where}: {problem}")
    if errors or record is None:
        raise TicketError(errors[0])
    return record


def parse_point(data: bytes, name: str) -> Point:
    """The point in the file `name`. Only names below ``bench/`` are taken: no point can touch a training metric."""
    point = parse(Point, data, name)
    bad = [key for key in point.metrics if not key.startswith("bench/") or key in (AXIS, TOKENS_AXIS) or len(key) > 400]
    wrong = {
        f"ticket {point.ticket!r:.80} is not what the file name says": name != f"{point.ticket}.json",
        "no metrics": not point.metrics,
        f"step {point.step} is negative": point.step < 0,
        f"{', '.join(f'{key!r:.80}' for key in bad[:3])}: not a name for a score": bool(bad),
    }
    for reason, is_so in wrong.items():
        if is_so:
            raise TicketError(f"{name}: {reason}")
    return point


def read_point(directory: str, name: str, stage: str = "points") -> Point:
    """The point `<stage>/<name>`. OSError where it is gone or cannot be read now; TicketError where it is none."""
    ticket = ticket_of(name)
    if not _ID.fullmatch(ticket) or name != (f"{ticket}.json" if stage == "points" else taken(ticket, owner_of(name))):
        raise TicketError(f"{name}: not the name of a point")
    try:
        data = fsio.FileOps().read(os.path.join(directory, stage, name), POINT_BYTES)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise TicketError(f"{name}: not a regular file") from None
        raise
    return parse_point(data, f"{ticket}.json")


def taken(ticket: str, who: str) -> str:
    """The name of a point in taken/ and logged/."""
    return f"{ticket}~{who}"


def ticket_of(name: str) -> str:
    return name.removesuffix(".json").partition("~")[0]


def owner_of(name: str) -> str:
    return name.partition("~")[2]


def move(directory: str, src: str, dst: str, ops: fsio.FileOps | None = None) -> bool:
    """Move a point, durably: `src` and `dst` are ``<stage>/<name>``. False when another has moved it."""
    ops = ops or fsio.FileOps()
    done = fsio.moved(ops, os.path.join(directory, src), os.path.join(directory, dst))
    if done:
        ops.sync_dir(os.path.join(directory, os.path.dirname(dst)))
    return done


def set_aside(directory: str, name: str, reason: str, stage: str = "points") -> None:
    """Move `<stage>/<name>` to `refused/`, beside the reason. Raises OSError."""
    refused = os.path.join(directory, "refused")
    os.makedirs(refused, exist_ok=True)
    kept = os.path.join(refused, f"{name[:60]}.{fsio.unique()}")    # a name of 255 bytes leaves no room for ours
    os.rename(os.path.join(directory, stage, name), kept)
    fsio.write_new(fsio.FileOps(), f"{kept}.reason", reason.encode(errors="replace") + b"\n")


def encode(record: Announcement | Ended | Point | RunIdentity) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode()


def waiting(directory: str, stage: str = "points") -> list[str]:
    """The names in `<stage>/`, but for those of files that are being written."""
    try:
        return sorted(n for n in os.listdir(os.path.join(directory, stage)) if not n.startswith("."))
    except FileNotFoundError:
        return []


def clock() -> float:
    """Seconds on a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
