"""What is given up so that something else can be kept: pins that no ticket needs, tickets that make room for newer
ones, and, where the configuration asks for it, checkpoints beyond a limit.

Pins are deleted by `pin.release` alone, checkpoints by `rotate` alone; both check real paths.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator

from autoeval_hooks import pin
from autoeval_hooks.errors import CheckpointError, TicketError
from autoeval_hooks.queue import STATES, Queue, Token
from autoeval_hooks.ticket import Ticket

log = logging.getLogger("autoeval")

ENDED = ("done", "cancelled", "quarantine")
"""States whose tickets need nothing any more. A failed one may be retried."""

CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
"""The names of a Trainer's checkpoint directories; the group is the step."""

_RECORD_BYTES = 16 << 20


# ---------------------------------------------------------------------- pins that no ticket needs


def unended(queue: Queue, *ended: str) -> Iterator[Ticket]:
    """The tickets that are in none of the states `ended`, those whose enqueueing was cut off included.

    Nothing that moves meanwhile is missed: a ticket counts unless it was seen ended, and who files one again under
    another suite enqueues the new before the old one ends. Raises TicketError for one that cannot be read.
    """
    over = {t.ticket for t in queue.tokens(*ended)}
    over -= {t.ticket for t in queue.tokens(*(s for s in STATES if s not in ended))}        # retried meanwhile
    for ticket_id in queue.ops.listdir(os.path.join(queue.root, "tickets")):
        if ticket_id not in over:
            with contextlib.suppress(FileNotFoundError):
                yield queue.ticket(ticket_id)


def needless(queue: Queue, names: Iterable[str], *states: str) -> set[str]:
    """Which of the pins of these names (ticket ids) belong to a ticket in one of `states`, while no ticket that may
    still be evaluated lives on them. Raises TicketError where that cannot be told."""
    free = {t.ticket for t in queue.tokens(*states)}.intersection(names)
    if free:
        # By name and not by path: a name is unique, and hosts may mount a path differently.
        free -= {os.path.basename(ticket.pin) for ticket in unended(queue, *ENDED, *states)}
        free -= {t.ticket for t in queue.tokens(*(s for s in STATES if s not in (*ENDED, *states)))}
    return free


def tidy_pins(queue: Queue, output_dir: str) -> None:
    """Free pins that were left behind: those whose ticket is done or cancelled while no other lives on them, and
    unfinished ones of processes of this host that are gone."""
    pins = {os.path.basename(p): p for p in pin.existing(os.path.join(output_dir, "checkpoint"))}
    free = {name for name, path in pins.items() if pin.orphaned(path)}
    try:
        free |= needless(queue, pins, "done", "cancelled")
    except TicketError as error:
        log.warning("autoeval: pins in %s are left alone: %s", pin.pins_dir(os.path.join(output_dir, "x")), error)
    for name in free:
        _free(queue, pins[name])


def _free(queue: Queue, path: str) -> bool:
    """Release a pin; False where something in it keeps it there."""
    try:
        pin.release(path, queue.ops)
    except (OSError, CheckpointError) as error:
        log.warning("autoeval: a pin could not be freed: %s", error)
        return False
    return True


# ---------------------------------------------------------------------- room for a newer checkpoint


def make_room(queue: Queue, checkpoint: str, step: int, *, wanted: int, limit: int) -> bool:
    """Make room for `wanted` pins beside `checkpoint` of `step`; whether there is room for at least one.

    The oldest waiting tickets of the same output directory are cancelled, with the reason beside them, and their
    pins released: failed ones first, then pending ones by step. A claimed one, or one of this step or a later, never
    is; nor is any where that would not make room.
    """
    pins = {os.path.basename(path): path for path in pin.existing(checkpoint)}
    older = _older(queue, pins, step)
    if len(pins) - len(older) >= limit:
        return False
    held = f"{pin.pins_dir(checkpoint)} held hook.max_pins = {limit} pins"
    for name, waiting in older:
        if len(pins) + min(wanted, limit) <= limit:
            break
        reason = f"superseded by step {step}: {held}"
        gone = [ticket for token, ticket in waiting if queue.cancel(token, reason + _why(queue, token))]
        for ticket in gone:
            log.warning(
                "autoeval: suite %s of step %d will not be evaluated: superseded by step %d, since %s; "
                "raise hook.max_pins, set a wider every_steps, or start more runners",
                ticket.suite, ticket.manifest.step, step, held,
            )  # fmt: skip
        if len(gone) < len(waiting):
            continue        # a runner was faster
        if not _free(queue, pins[name]):
            break
        del pins[name]
    return len(pins) < limit


def _older(queue: Queue, pins: Collection[str], step: int) -> list[tuple[str, list[tuple[Token, Ticket]]]]:
    """The pins that may be given up for `step`, the first to go first, each with the waiting tickets on it."""
    users: dict[str, list[tuple[Token | None, Ticket]]] = {}
    waiting = {t.ticket: t for t in queue.tokens("pending", "failed")}
    try:
        for ticket in unended(queue, *ENDED):
            if os.path.basename(ticket.pin) in pins:
                users.setdefault(os.path.basename(ticket.pin), []).append((waiting.get(ticket.id), ticket))
    except TicketError as error:        # it may live on any of the pins
        log.warning("autoeval: no ticket is superseded: %s", error)
        return []
    found = []
    for name, on_it in users.items():
        given_up = [(token, t) for token, t in on_it if token is not None and t.manifest.step < step]
        if len(given_up) == len(on_it):
            order = (any(token.state != "failed" for token, _ in given_up), max(t.manifest.step for _, t in given_up))
            found.append((order, name, given_up))
    return [(name, given_up) for _, name, given_up in sorted(found, key=lambda f: f[:2])]


def _why(queue: Queue, token: Token) -> str:
    """What a ticket failed of, as the end of a reason; "" for one that did not."""
    if token.state != "failed":
        return ""
    record = os.path.join(queue.root, "results", token.result_name, "result.json")
    with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        message = str(json.loads(queue.ops.read(record, _RECORD_BYTES))["failure"]["message"])
        return f"; it had failed: {message[:1000]}"
    return "; it had failed, and left no record why"


# ---------------------------------------------------------------------- rotation, by opt-in


def rotate(queue: Queue, output_dir: str, keep: int, *, since_ns: int, spared: Collection[str]) -> list[str]:
    """Delete the checkpoints in `output_dir` beyond the `keep` newest, as `hook.save_total_limit` asks for: the one
    thing besides pins that autoeval ever deletes. The names of those that went.

    Spared are those named in `spared`, those that a ticket without a pin (or whose pin is lost) waits for, and
    whatever this training did not write: without `trainer_state.json`, or with one from before `since_ns` (file
    system's time, ns). Raises TicketError where what waits cannot be told, OSError when the file system fails.
    """
    written = []
    for name in os.listdir(output_dir):
        found, path = CHECKPOINT.fullmatch(name), os.path.join(output_dir, name)
        with contextlib.suppress(FileNotFoundError):
            if found and _is_directly_in(output_dir, path):
                written.append((os.stat(os.path.join(path, "trainer_state.json")).st_mtime_ns, int(found[1]), name))
    ours = [name for changed_ns, _, name in sorted(written) if changed_ns >= since_ns]
    old = [name for name in ours[:-keep] if name not in spared]
    if not old:
        return []
    waiting = {t.manifest.path for t in unended(queue, *ENDED) if not (t.pin and os.path.isdir(t.pin))}
    gone = [name for name in old if not any(_same(path, os.path.join(output_dir, name)) for path in waiting)]
    for name in gone:
        shutil.rmtree(os.path.join(output_dir, name))
    return gone


def _is_directly_in(output_dir: str, path: str) -> bool:
    """Whether `path` is a directory that lies in `output_dir` itself, and not a link to one elsewhere."""
    return os.path.isdir(path) and os.path.realpath(path) == os.path.join(
        os.path.realpath(output_dir), os.path.basename(path)
    )


def _same(path: str, ours: str) -> bool:
    """Whether a ticket's path may be our checkpoint `ours`; a host that mounts it elsewhere names its end alike."""
    return os.path.realpath(path) == os.path.realpath(ours) or path.split(os.sep)[-2:] == ours.split(os.sep)[-2:]
