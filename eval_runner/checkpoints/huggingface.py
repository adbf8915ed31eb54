"""Hugging Face checkpoints: checked against their manifest before and after they are evaluated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks import manifest as manifests
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.ticket import Ticket


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


def verify(ticket: Ticket, path_map: dict[str, str], *, allow_pickled_weights: bool) -> Servable:
    """Find the ticket's checkpoint, its pin first, and check every file of the manifest.

    Raises CheckpointError when it is gone, incomplete, changed, pickled without leave, or has no tokenizer.
    """
    m = ticket.manifest
    path = Path(map_path(ticket.pin or m.path, path_map))
    if not path.is_dir():
        gone = "its pin is gone" if ticket.pin else "it was not pinned and is gone (deleted by retention?)"
        raise CheckpointError(f"{path}: {gone}; if the host names it otherwise, add it to `path_map`")
    if m.pickled and not allow_pickled_weights:
        raise CheckpointError(
            f"{path / m.pickled[0]}: pickled weights can run code when loaded; save safetensors, "
            "or set `runner.allow_pickled_weights: true`"
        )
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
    return Servable(path, _tokenizer(ticket, path, path_map), seen)


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
