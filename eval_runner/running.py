"""What a runner is at, as it stands in its heartbeat behind the count: for people to read, nothing depends on it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from autoeval_hooks import strict
from autoeval_hooks.queue import NOTE_BYTES
from eval_runner import secrets


@dataclass(frozen=True)
class Note:
    """`ticket` is the start of the ticket's id, `fraction` (0 to 1) how far its `evaluator` is, and `what` at what."""

    ticket: str
    evaluator: str
    fraction: float
    what: str


SHORT = 12
"""Characters of a ticket's id that a note has, as `status` shows it."""


def dump(note: Note | None) -> bytes:
    """As many bytes always, so that nothing of an earlier note is left in the file; blanks for None."""
    text = b""
    if note is not None:
        parts = asdict(note) | {"what": secrets.masked(note.what), "fraction": round(note.fraction, 3)}
        for length in (120, 30, 0):
            text = json.dumps(parts | {"what": str(parts["what"])[:length]}).encode()
            if len(text) < NOTE_BYTES:
                break
    return (b" " + text if len(text) < NOTE_BYTES else b"").ljust(NOTE_BYTES)


def load(text: bytes, ticket: str) -> Note | None:
    """The note about this ticket; None where there is none, as of a runner that is between two steps, or older."""
    found = strict.parse(Note, text.strip() or b"null", "note", [], max_bytes=NOTE_BYTES)
    return found if found is not None and ticket.startswith(found.ticket) and found.ticket else None
