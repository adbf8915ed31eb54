"""Which run a checkpoint belongs to: our own id, and the W&B run of the process that trains it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunIdentity:
    """A training run. The W&B fields are empty where training does not use W&B.

    `id` is ours and stays the same when training resumes in the same output directory, whatever W&B
    run it reports to. `wandb_mode` is W&B's word: ``online``, ``offline``, ``shared``, ``disabled`` or "".
    """

    id: str
    name: str = ""
    project: str = ""
    entity: str = ""
    wandb_id: str = ""
    wandb_group: str = ""
    wandb_base_url: str = ""
    wandb_mode: str = ""
    wandb_dir: str = ""
    """The directory that W&B's own `offline-run-*` and `run-*` directories stand in, as training sees it."""

    @property
    def key(self) -> str:
        """The name of this run's directory under `relay/`."""
        own = [self.wandb_base_url, self.entity, self.project, self.wandb_id] if self.wandb_id else [self.id]
        readable = re.sub(r"[^A-Za-z0-9._-]", "-", self.wandb_id or self.id).lstrip(".-")[:80]
        return f"{readable}-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:12]}"


MAX_TEXT = 4096
"""Bytes of one field."""
_NO_WANDB_ID = re.compile(r"[:;,#?/']|\A\s|\s\Z|\A\.+\Z")
"""What W&B refuses in a run's id (`wandb.Settings.run_id`), and dots: it becomes part of a directory's name."""


def problem(run: RunIdentity) -> str:
    """What is wrong with an identity that somebody else wrote, or ""."""
    texts = asdict(run)
    if long := [key for key, text in texts.items() if len(text.encode()) > MAX_TEXT]:
        return f"run.{long[0]} has more than {MAX_TEXT} bytes"
    if len(run.wandb_id) > 128 or _NO_WANDB_ID.search(run.wandb_id):
        return f"run.wandb_id {run.wandb_id!r:.80} is none that W&B takes"
    if run.wandb_dir and (not os.path.isabs(run.wandb_dir) or ".." in run.wandb_dir.split("/")):
        return f"run.wandb_dir {run.wandb_dir!r:.200} is not absolute and plain"
    return ""


def current(run_id: str, *, name: str = "", project: str = "", entity: str = "") -> RunIdentity:
    """The identity of the run that this process trains, from the W&B run that is open in it, if any.

    Only memory is read: neither the network nor a file. `name`, `project` and `entity` come from the
    configuration and fill what W&B does not know (offline, it does not know the entity).
    """
    run = wandb_run()
    if run is None:
        return RunIdentity(id=run_id, name=name or run_id, project=project, entity=entity)
    settings = run.settings
    directory = getattr(run, "dir", "") or ""      # …/wandb/offline-run-DATE-ID/files
    return RunIdentity(
        id=run_id,
        name=name or run.name or run.id,
        project=run.project or project or os.environ.get("WANDB_PROJECT", ""),
        entity=run.entity or entity or os.environ.get("WANDB_ENTITY", ""),
        wandb_id=run.id,
        wandb_group=run.group or "",
        wandb_base_url=settings.base_url or "",
        wandb_mode=settings.mode or "online",
        wandb_dir=os.path.dirname(os.path.dirname(os.path.abspath(directory))) if directory else "",
    )


def wandb_run() -> Any | None:
    """The W&B run open in this process, without importing wandb; None when there is none or it is disabled."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is None or run.disabled:     # `run.settings` would copy them all: 0.1 ms of the training thread's
        return None
    return run
