"""What a checkpoint adapter is: it verifies the checkpoint of a ticket and makes it servable.

Adapters are plain functions, found by the manifest's kind among the entry points `autoeval.checkpoints`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks import layouts
from autoeval_hooks import manifest as manifests
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.manifest import MegatronRecord
from autoeval_hooks.ticket import Ticket
from eval_runner.config.models import Config
from eval_runner.evaluators.base import Limits

log = logging.getLogger("autoeval")


@dataclass(frozen=True)
class Request:
    """The checkpoint of one ticket, to be made servable. `work_dir` is empty and private to this attempt; `log` takes
    what programs write; `stopping` is true once the attempt must end; `progress`, called with the name of a step,
    begins to show it and gives what is told how far it is (a fraction, and what is being done)."""

    ticket: Ticket
    config: Config
    work_dir: Path
    log: Path
    stopping: Callable[[], bool] = lambda: False
    progress: Callable[[str], Callable[[float, str], None]] = lambda step: lambda fraction, what: None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Servable:
    """A verified checkpoint.

    `path` is a directory in Hugging Face layout, which evaluators may load themselves, or, where `megatron` is given,
    one for Megatron's `--load`, which needs a server. `tokenizer` is a directory in Hugging Face layout.
    `unchanged` raises CheckpointError if a file was changed since it was verified. `facts` goes into the result's
    versions: how it was made servable.
    """

    path: Path
    tokenizer: Path
    unchanged: Callable[[], None]
    megatron: MegatronRecord | None = None
    facts: dict[str, str] = field(default_factory=dict)


Prepare = Callable[[Request], AbstractContextManager[Servable]]
"""An adapter. Entering raises CheckpointError when the checkpoint is gone, incomplete or changed, has no tokenizer, or
when loading it would run code without leave."""


@dataclass(frozen=True)
class Verified:
    """A directory whose files are those of the manifest, and what they looked like when that was found."""

    path: Path
    seen: dict[str, tuple[int, int, int]]

    def unchanged(self) -> None:
        """Raise CheckpointError if a file was changed since it was verified."""
        for name, before in self.seen.items():
            if look(self.path, name) != before:
                raise CheckpointError(f"{self.path / name}: changed while it was evaluated; nothing is published")


def find(ticket: Ticket, path_map: dict[str, str]) -> Verified:
    """The ticket's checkpoint, every file of the manifest checked: in its pin first, then, where that is lost, in the
    checkpoint itself while it lives. Raises CheckpointError when it is gone, incomplete or changed."""
    places = [Path(map_path(place, path_map)) for place in (ticket.pin, ticket.manifest.path) if place]
    try:
        return Verified(places[0], _checked(ticket, places[0]))
    except CheckpointError as error:
        seen: dict[str, tuple[int, int, int]] = {}
        with contextlib.suppress(CheckpointError):
            seen = _checked(ticket, places[-1]) if ticket.pin else {}
        if not seen:
            raise
        log.warning("%s; the checkpoint itself is as it was, and is evaluated: %s", error, places[-1])
        return Verified(places[-1], seen)


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
        before = look(path, expected.path)
        found = manifests.record(str(path), expected.path)
        if found != expected:
            what = "size" if found.size != expected.size else "time" if found.digest == expected.digest else "content"
            raise CheckpointError(f"{path / expected.path}: its {what} is not that of the manifest; it was rewritten")
        seen[expected.path] = before
    return seen


def look(directory: Path, name: str) -> tuple[int, int, int]:
    """Size, modification time in ns and inode of a file. Raises CheckpointError if it is gone."""
    path = layouts.place(str(directory), name)
    try:
        found = os.stat(path)
    except manifests.GONE as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns, found.st_ino
