"""A ticket: one (checkpoint, suite) to evaluate, as data. Whoever reads one trusts nothing in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass

from autoeval_hooks import layouts, run_identity, strict
from autoeval_hooks import manifest as manifests
from autoeval_hooks.errors import TicketError
from autoeval_hooks.manifest import Manifest, MegatronRecord

VERSION = 1
MAX_BYTES = 8 << 20
PINS = os.path.join(".autoeval", "pins")
MAX_TEXT = 4096
"""Bytes of a path or a name, as PATH_MAX of Linux."""
MAX_FILE_NAME = 255
"""Bytes, as NAME_MAX of Linux."""
LATEST = 1e11
"""Seconds since the epoch; what lies beyond is no time that a program can show."""
_NAME = re.compile(r"(?!\.+\Z)[A-Za-z0-9_.-]{1,64}")
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Ticket:
    """`id` is `ticket_id(manifest.digest, suite_digest)`; `pin` is the directory of our links to the
    checkpoint's files ("" when there is none: the checkpoint itself is evaluated while it lives)."""

    version: int
    id: str
    suite: str
    suite_digest: str
    priority: int
    manifest: Manifest
    pin: str


def ticket_id(checkpoint_digest: str, suite_digest: str) -> str:
    """The key of the ticket and of its result."""
    return hashlib.sha256(f"{checkpoint_digest} {suite_digest}".encode()).hexdigest()


def new(manifest: Manifest, suite: str, suite_digest: str, priority: int, pin: str = "") -> Ticket:
    return Ticket(VERSION, ticket_id(manifest.digest, suite_digest), suite, suite_digest, priority, manifest, pin)


def dump(ticket: Ticket) -> bytes:
    return json.dumps(asdict(ticket), allow_nan=False, separators=(",", ":")).encode()


def load(text: bytes, where: str) -> Ticket:
    """The ticket in `text`. Raises TicketError for anything that this version would not have written."""
    errors: list[str] = []
    ticket = strict.parse(Ticket, text, where, errors, max_bytes=MAX_BYTES)
    if ticket is None:
        newer = _version(text)
        if newer is not None and newer > VERSION:
            raise TicketError(f"{where}: ticket version {newer} was written by a newer autoeval; upgrade this runner")
        raise TicketError("; ".join(errors[:5]))
    if problem := _problem(ticket):
        raise TicketError(f"{where}: {problem}")
    return ticket


def _version(text: bytes) -> int | None:
    """The version that a ticket claims to have, if it can be made out."""
    found = re.match(rb'\{"version":\s*(\d{1,9})\b', text)
    return int(found[1]) if found else None


def _problem(ticket: Ticket) -> str:
    """What is wrong with a well-formed ticket, or ""."""
    m = ticket.manifest
    if ticket.version != VERSION or m.version != manifests.VERSION:
        return f"version {ticket.version} (manifest {m.version}) is not {VERSION} ({manifests.VERSION})"
    if not _NAME.fullmatch(ticket.suite):
        return f"suite {ticket.suite!r:.80} is not a name"
    if not 0 <= ticket.priority <= 9:
        return f"priority {ticket.priority} is not within 0 to 9"
    if m.step < 0 or (m.tokens or 0) < 0 or (m.samples or 0) < 0 or any(f.size < 0 for f in m.files):
        return "a negative step, size, token or sample count"
    if not 0 <= m.saved_at < LATEST:
        return f"saved_at {m.saved_at} is no time"
    if problem := run_identity.problem(m.run):
        return problem
    if m.kind not in ("huggingface", "megatron") or (m.kind == "megatron") != (m.megatron is not None):
        return f"kind {m.kind!r:.80} is unknown, or not what the manifest describes; upgrade this runner"
    if m.megatron is not None and (problem := _megatron_problem(m.megatron)):
        return f"megatron: {problem}"
    if any(len(text.encode()) > MAX_TEXT for text in (m.path, ticket.pin, m.tokenizer, m.host)):
        return f"a path or name of more than {MAX_TEXT} bytes"
    if not all(_DIGEST.fullmatch(d) for d in (ticket.suite_digest, m.digest, m.weights_digest)):
        return "a digest that is not 64 hexadecimal digits"
    for path in (m.path, ticket.pin, m.tokenizer):
        if path and (not os.path.isabs(path) or ".." in path.split("/")):
            return f"path {path!r:.200} is not absolute and plain"
    if not m.path:
        return "no checkpoint path"
    if problem := _names_problem([f.path for f in m.files]):
        return problem
    if m.megatron is not None and (odd := [f.path for f in m.files if not layouts.is_file(f.path)]):
        return f"file {odd[0]!r:.200} is none of a checkpoint of Megatron's"
    if manifests.digest_of(m) != m.digest or manifests.weights_digest_of(m.files) != m.weights_digest:
        return "the manifest's digest is not that of its content"
    if ticket_id(m.digest, ticket.suite_digest) != ticket.id:
        return "the ticket's id is not that of its content"
    pins, name = os.path.split(ticket.pin)
    if ticket.pin and not (pins.endswith(os.path.join(os.sep, PINS)) and _DIGEST.fullmatch(name)):
        return f"pin {ticket.pin!r:.200} is not under {PINS}"
    return ""


def _names_problem(names: list[str]) -> str:
    """What is wrong with the names of a checkpoint's files, or ""."""
    if len(set(names)) != len(names):
        return "a file stands twice in the manifest"
    for name in names:
        if name.startswith("/") or any(part in ("", ".", "..") for part in name.split("/")):
            return f"file {name!r:.200} would escape the checkpoint"
        if any(len(part.encode()) > MAX_FILE_NAME for part in name.split("/")) or len(name) > MAX_TEXT:
            return f"file {name!r:.200} has a name that no file can have"
    return ""


def _megatron_problem(record: MegatronRecord) -> str:
    """What is wrong with what is said of a checkpoint of Megatron's, or ""."""
    texts = [record.format, record.version, record.tokenizer_type, *record.tokenizer, *record.tokenizer.values()]
    if record.format not in layouts.FORMATS:
        return f"format {record.format!r:.80} is unknown; upgrade this runner"
    if any(len(text.encode()) > MAX_TEXT or "\0" in text for text in texts) or len(record.tokenizer) > 32:
        return "a text that no argument can have"
    if any(not _OPTION.fullmatch(key) for key in record.tokenizer):
        return "tokenizer: a key that is no argument's name"
    if any(type(n) is int and not 0 <= n < 1 << 53 for n in vars(record).values()):
        return "a number out of range"
    for file in record.tokenizer_files:
        if not os.path.isabs(file.path) or ".." in file.path.split("/") or len(file.path.encode()) > MAX_TEXT:
            return f"tokenizer file {file.path!r:.200} is not absolute and plain"
        if file.size < 0 or not _DIGEST.fullmatch(file.digest):
            return f"tokenizer file {file.path!r:.200} has no size or digest"
    return ""
