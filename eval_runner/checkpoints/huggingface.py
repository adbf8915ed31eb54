"""Hugging Face checkpoints: checked against their manifest before and after they are evaluated."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks import manifest as manifests
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.ticket import Ticket
from eval_runner.checkpoints import trust

log = logging.getLogger("autoeval")


@dataclass(frozen=True)
class Servable:
    """A verified checkpoint: its directory and its tokenizer's, and what its files looked like when verified."""

    path: Path
    tokenizer: Path
    seen: dict[str, tuple[int, int, int]]

    def unchanged(self) -> None:
        """Raise CheckpointError if a file was changed since it was verified."""
        for name, before in self.seen.items():
            if _look(self.path / name) != before:
                raise CheckpointError(f"{self.path / name}: changed while it was evaluated; nothing is published")


def verify(
    ticket: Ticket, path_map: dict[str, str], *, allow_pickled_weights: bool, trust_remote_code: bool
) -> Servable:
    """Find the ticket's checkpoint and check every file of the manifest: in its pin first, then, where that is lost,
    in the checkpoint itself while it lives.

    Raises CheckpointError when it is gone, incomplete or changed, has no tokenizer, or when loading it would run code
    without leave.
    """
    m = ticket.manifest
    places = [Path(map_path(place, path_map)) for place in (ticket.pin, m.path) if place]
    path, seen = places[0], {}
    try:
        seen = _checked(ticket, path)
    except CheckpointError as error:
        path = places[-1]
        with contextlib.suppress(CheckpointError):
            seen = _checked(ticket, path) if ticket.pin else {}
        if not seen:
            raise
        log.warning("%s; the checkpoint itself is as it was, and is evaluated: %s", error, path)
    tokenizer = _tokenizer(ticket, path, path_map)
    trust.check_weights(path, m, pickles=allow_pickled_weights)
    for directory in {path, tokenizer}:
        trust.check_code(directory, allowed=trust_remote_code)
    return Servable(path, tokenizer, seen)


def _checked(ticket: Ticket, path: Path) -> dict[str, tuple[int, int, int]]:
    """What the files in the directory `path` look like, each of which is what the manifest says."""
    m = ticket.manifest
    if not path.is_dir():
        gone = "its pin is gone" if ticket.pin else "it was not pinned and is gone (deleted by retention?)"
        raise CheckpointError(f"{path}: {gone}; if the host names it otherwise, add it to `path_map`")
    added = set(manifests.model_files(str(path))) - {f.path for f in m.files}
    if added:
        raise CheckpointError(f"{path / min(added)}: came after the manifest was taken; submit the checkpoint again")
    seen = {}
    for expected in m.files:
        before = _look(path / expected.path)
        found = manifests.record(str(path), expected.path)
        if found != expected:
            what = "size" if found.size != expected.size else "time" if found.digest == expected.digest else "content"
            raise CheckpointError(f"{path / expected.path}: its {what} is not that of the manifest; it was rewritten")
        seen[expected.path] = before
    return seen


def _tokenizer(ticket: Ticket, path: Path, path_map: dict[str, str]) -> Path:
    if ticket.manifest.has_tokenizer:
        return path
    if not ticket.manifest.tokenizer:
        raise CheckpointError(
            f"{ticket.manifest.path}: no tokenizer; pass `processing_class=tokenizer` to the Trainer, "
            "or set `run.tokenizer` to a tokenizer's directory"
        )
    directory = Path(map_path(ticket.manifest.tokenizer, path_map))
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: the tokenizer that `run.tokenizer` names is not here")
    return directory


def _look(path: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(path)
    except manifests.GONE as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns, found.st_ino
