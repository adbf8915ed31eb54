"""The files by which scores reach the training process, one directory for each run.

`<queue>/relay/<RunIdentity.key>/`:

    run.json         the hook, at the start: an `Announcement`
    heartbeat        the hook, while it can log: `<incarnation> <counter>`, rewritten every few seconds
    ended.json       the hook, when training ended in order: an `Ended`
    identity.json    the runner: the RunIdentity of the tickets, used where no hook announced itself
    closed           the user: this run will not go on. A training that goes on all the same removes it
    points/ID.json   the runner: a `Point`, linked into place, never overwritten; ID is the ticket's
    taken/, writer.* the runner, where it logs the points itself (eval_runner.sinks.wandb)
    logged/ID.json   points that were delivered
    refused/         what stood in points/ and is no point, each with a `.reason`
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from typing import TypeVar

from autoeval_hooks import fsio, strict
from autoeval_hooks.errors import TicketError
from autoeval_hooks.run_identity import RunIdentity

VERSION = 1
POINT_BYTES = 1 << 20
AXIS, TOKENS_AXIS = "bench/step", "bench/tokens"
STALE_S, ENDED_STALE_S = 120.0, 15.0
"""How long a heartbeat must stand still before its process counts as gone; the second after its `ended.json`."""
LEASE_S, ENDED_LEASE_S = 60.0, 5.0
"""How old its own last heartbeat may be for a process to log: well below the above."""

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
    """`points/ID.json`: the metrics of one ticket. `tokens` is in billions."""

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
    if errors or record is None:
        raise TicketError(errors[0])
    return record


def parse_point(data: bytes, name: str) -> Point:
    """The point in the file `name`. Only names below ``bench/`` are taken: no point can touch a training metric."""
    point = parse(Point, data, name)
    bad = [key for key in point.metrics if not key.startswith("bench/") or key in (AXIS, TOKENS_AXIS) or len(key) > 400]
    wrong = {
        f"ticket {point.ticket!r} is not what the file name says": name != f"{point.ticket}.json",
        "no metrics": not point.metrics,
        f"step {point.step} is negative": point.step < 0,
        f"{', '.join(map(repr, bad[:3]))}: not a name for a score": bool(bad),
    }
    for reason, is_so in wrong.items():
        if is_so:
            raise TicketError(f"{name}: {reason}")
    return point


def read_point(directory: str, name: str) -> Point:
    """The point `points/name`. OSError where it is gone or cannot be read now; TicketError where it is none."""
    path = os.path.join(directory, "points", name)
    if not _ID.fullmatch(name.removesuffix(".json")) or not name.endswith(".json"):
        raise TicketError(f"{name}: not the name of a point")
    try:
        data = fsio.FileOps().read(path, POINT_BYTES)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise TicketError(f"{name}: not a regular file") from None
        raise
    return parse_point(data, name)


def set_aside(directory: str, name: str, reason: str) -> None:
    """Move `points/name` to `refused/`, beside the reason. Raises OSError."""
    refused = os.path.join(directory, "refused")
    os.makedirs(refused, exist_ok=True)
    kept = os.path.join(refused, f"{name}.{fsio.unique()}")
    os.rename(os.path.join(directory, "points", name), kept)
    fsio.write_new(fsio.FileOps(), f"{kept}.reason", reason.encode() + b"\n")


def encode(record: Announcement | Ended | Point | RunIdentity) -> bytes:
    return json.dumps(asdict(record), sort_keys=True).encode()


def waiting(directory: str) -> list[str]:
    """The names in `points/`, but for those of files that are being written."""
    try:
        return sorted(n for n in os.listdir(os.path.join(directory, "points")) if not n.startswith("."))
    except FileNotFoundError:
        return []


def clock() -> float:
    """Seconds on a clock that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
