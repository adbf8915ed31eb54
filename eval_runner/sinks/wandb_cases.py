"""Who logs the waiting points of a run, by what is seen of its training process.

While the training process is alive, its own writer logs them (autoeval_hooks.relay). Once it is gone `TABLE` says who
does: this runner as the run's only writer (wandb_writer, in a child process), or nobody yet. W&B's row counter moves
on with each row, so a run whose trainer logs with `step=` (Megatron) is written to only when it is over for good.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from autoeval_hooks import fsio
from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import AutoEvalError, TicketError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.sinks import wandb_lease
from eval_runner.sinks.wandb_writer import heartbeat

T = TypeVar("T")

Hook = Literal["none", "alive", "unclear", "gone"]
Way = Literal["relay", "wait", "write", "companion"]


@dataclass(frozen=True)
class Case:
    """A row of `TABLE`; None fits anything. `free`: a row of ours takes no step of the trainer's, since it does
    not log by step or ended at its planned last step. `closed`: the user says the run is over."""

    hook: Hook
    closed: bool | None
    free: bool | None
    late: str | None
    way: Way
    why: str


TABLE = (
    Case("alive", None, None, None, "relay", "the training process is alive and logs them"),
    Case("unclear", None, None, None, "wait", "watching whether the training process is alive"),
    Case("gone", None, True, None, "write", "the training process is gone"),
    Case("gone", True, None, None, "write", "the run is closed"),
    Case("gone", None, None, "companion", "companion", "the training process is gone and may come back"),
    Case("gone", None, None, "wait", "wait", "training may resume, and its next step must be free; if it will not: "
         "`autoeval-runner close RUN`"),
    Case("none", True, None, None, "write", "the run is closed"),
    Case("none", None, None, "companion", "companion", "whether the run has a writer is unknown"),
    Case("none", None, None, "wait", "wait", "no training process has shown itself, so the run may have a writer; "
         "if it has none any more: `autoeval-runner close RUN`"),
)  # fmt: skip
"""The first row that fits counts."""


def decide(hook: Hook, *, closed: bool, free: bool, late: str) -> Case:
    """The row of `TABLE` for this case."""
    return next(
        c for c in TABLE
        if c.hook == hook and c.closed in (None, closed) and c.free in (None, free) and c.late in (None, late)
    )  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What is known of a run now. `beat` is its heartbeat's content, `relay` how the names begin under which its
    present training process takes points ("" if none has shown itself)."""

    case: Case
    run: RunIdentity
    by_step: bool
    beat: str
    relay: str


def unseen(run: RunIdentity, late: str, *, closed: bool = False, beat: str = "") -> Seen:
    """A run of which no training process has shown itself."""
    return Seen(decide("none", closed=closed, free=False, late=late), run, False, beat, "")


class Watch:
    """What one process has seen of many runs, on its own clock. It must live as long as its runner: that a process is
    gone is what has been seen of it for a while."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Path, str], tuple[str, float, bool]] = {}

    def look(self, directory: Path, late: str) -> Seen:
        """Raises AutoEvalError where nothing says which run this is, and OSError."""
        announced = read(files.Announcement, directory / "run.json")
        # The end is read before the heartbeat: a process that says it ended was alive when it said so.
        ended = read(files.Ended, directory / "ended.json")
        beat = heartbeat(str(directory / "heartbeat"))
        still, changed = self._still(directory, "heartbeat", beat)
        closed = (directory / "closed").exists()
        if announced is None:
            identity = read(RunIdentity, directory / "identity.json")
            if identity is None:
                raise AutoEvalError(f"{directory}: neither run.json nor identity.json says which run this is")
            return unseen(identity, late, closed=closed, beat=beat)
        ended = ended if ended is not None and ended.incarnation == announced.incarnation else None
        limit = files.ENDED_STALE_S if ended else files.STALE_S
        gone = still > limit or audited(directory, beat)    # the second: another runner has seen it for that long
        hook: Hook = "gone" if gone else "alive" if changed else "unclear"
        free = not announced.logs_by_step or (ended is not None and ended.complete)
        case = decide(hook, closed=closed, free=free, late=late)
        return Seen(case, announced.run, announced.logs_by_step, beat, f"{files.RELAY}{announced.incarnation}-")

    def broken(self, directory: Path) -> str:
        """What the holder of the run's lease has shown for so long that it counts as dead; "" if there is none."""
        _, shown = wandb_lease.seen(directory / "writer")
        still, _ = self._still(directory, "writer", shown)
        return shown if still > wandb_lease.STALE_S else ""

    def owner_lives(self, directory: Path, owner: str, seen: Seen) -> bool:
        """Whether who took a point may still log it, or send what it logged."""
        if owner.startswith(files.RELAY):
            if seen.relay and owner.startswith(seen.relay):
                return seen.case.hook != "gone"
            still, _ = self._still(directory, owner, seen.relay)    # an earlier process, which may still be sending
            return still <= files.STALE_S
        return owner == wandb_lease.seen(directory / "writer")[0] and not self.broken(directory)

    def _still(self, directory: Path, what: str, content: str) -> tuple[float, bool]:
        """For how long this has been seen so, and whether it was ever seen to change."""
        now = files.clock()
        before = self._seen.get((directory, what))
        if before is None or before[0] != content:
            before = self._seen[directory, what] = (content, now, before is not None)
        return now - before[1], before[2]


def audited(directory: Path, beat: str) -> bool:
    """Whether the process of this heartbeat was found gone, and all points that it logged were looked for."""
    with contextlib.suppress(FileNotFoundError):
        return bool(beat) and fsio.FileOps().read(str(directory / "audited"), 256).decode(errors="replace") == beat
    return False


def names(directory: Path) -> set[str]:
    """By what names a user may call the run of this directory."""
    with contextlib.suppress(TicketError):
        announced = read(files.Announcement, directory / "run.json")
        run = announced.run if announced else read(RunIdentity, directory / "identity.json")
        return {run.id, run.wandb_id, run.name, directory.name} - {""} if run else {directory.name}
    return {directory.name}


def read(cls: type[T], path: Path) -> T | None:
    """The record in this file; None if it is not there. Raises TicketError."""
    try:
        data = fsio.FileOps().read(str(path), files.POINT_BYTES)
    except FileNotFoundError:
        return None
    return files.parse(cls, data, str(path))
