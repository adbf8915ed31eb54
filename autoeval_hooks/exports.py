"""Models that are written for evaluation alone, where a trainer's own checkpoints are no directories in Hugging Face
layout: `<output_dir>/autoeval-exports/step-N`, complete once they have that name.

They are ours: one goes once no ticket needs it, which is as soon as its tickets have their pins.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection

from autoeval_hooks import fsio, pin
from autoeval_hooks.queue import Queue
from autoeval_hooks.retention import ENDED, unended

EXPORT = re.compile(r"step-(\d{1,18})")
"""Their names; the group is the step. No trainer's glob matches them."""

_UNFINISHED = ".new-"
"""What passing names begin with, as those of pins do."""


def directory(output_dir: str) -> str:
    """Where the exports of an output directory stand."""
    return os.path.join(output_dir, "autoeval-exports")


def path_of(exports: str, step: int) -> str:
    """The path of the export of a step."""
    return os.path.join(exports, f"step-{step}")


def write(path: str, export: Callable[[str], None]) -> None:
    """Have `export` write a model into an empty directory, and give that the name `path`. Raises what `export` raises,
    and OSError; then nothing is left."""
    passing = os.path.join(os.path.dirname(path), _UNFINISHED + fsio.unique())
    os.makedirs(passing)
    try:
        export(passing)
        if os.path.lexists(path):       # of a training that came to this step before
            shutil.rmtree(path)
        os.rename(passing, path)
    except BaseException:
        shutil.rmtree(passing, ignore_errors=True)
        raise


def tidy(queue: Queue, exports: str, spared: Callable[[], Collection[str]]) -> list[str]:
    """Remove the exports that no ticket without a pin waits for, and what processes of this host died over; the names
    of what went. Spared are the paths that `spared` gives, which is asked after looking. Raises TicketError where what
    waits cannot be told, OSError when the file system fails."""
    if not os.path.isdir(exports) or os.path.islink(exports):
        return []
    paths = [os.path.join(exports, name) for name in sorted(os.listdir(exports))]
    keep = spared()
    paths = [path for path in paths if path not in keep and not os.path.islink(path) and _may_go(path)]
    if not paths:
        return []
    waiting = {t.manifest.path for t in unended(queue, *ENDED) if not (t.pin and os.path.isdir(t.pin))}
    gone = [path for path in paths if path not in waiting]
    for path in gone:
        shutil.rmtree(path)
    return [os.path.basename(path) for path in gone]


def _may_go(path: str) -> bool:
    return EXPORT.fullmatch(os.path.basename(path)) is not None or pin.orphaned(path)
