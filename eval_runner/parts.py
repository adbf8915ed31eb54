"""Finished parts of evaluations that were cut short: the next attempt at the ticket does not do them again.

    partial/TICKET/INDEX-KEY/     a record as in results/, of one part of the suite's evaluator INDEX

KEY is the sha256 of all that makes the answer what it is; ticket and evaluator fix the rest. A part counts for
nothing but its own ticket, is never changed, and goes once the ticket is done. What cannot be read is evaluated
again: losing a part costs time only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks import fsio
from autoeval_hooks.errors import QueueError
from autoeval_hooks.fsio import FileOps
from eval_runner.evaluators.base import Outcome, Parts
from eval_runner.results import store
from eval_runner.results.schema import Evaluation, Result

log = logging.getLogger("autoeval")

FOLDER = "partial"


@dataclass
class Kept(Parts):
    """The parts of one evaluator of one ticket.

    `record` makes a result out of evaluations, as this attempt would write it. `unchanged` raises CheckpointError
    where the checkpoint was changed: no part of such a one is kept.
    """

    root: Path
    index: int
    record: Callable[[tuple[Evaluation, ...]], Result]
    unchanged: Callable[[], None]
    ops: FileOps = field(default_factory=FileOps)

    def get(self, key: str) -> Outcome | None:
        path = self._path(key)
        try:
            if path.name not in self.ops.listdir(str(path.parent)):
                return None
            found, wanted = store.read(path, self.ops), self.record(())
            for name in ("ticket", "suite_digest", "checkpoint_digest", "status"):
                if getattr(found, name) != getattr(wanted, name):
                    raise store.ResultError(f"{path}: its {name} is that of another evaluation")
            if len(found.evaluations) != 1:
                raise store.ResultError(f"{path}: is not the record of one part")
            return Outcome(found.evaluations[0], list(store.instances(path)), list(store.details(path)))
        except FileNotFoundError:
            return None
        except (OSError, store.ResultError) as error:
            log.warning("%s; that part is evaluated again", error)
            with contextlib.suppress(OSError):
                _remove(self.root, path, self.ops)
            return None

    def put(self, key: str, outcome: Outcome) -> None:
        self.unchanged()
        path, result = self._path(key), self.record((outcome.evaluation,))
        try:
            for directory in (path.parent.parent, path.parent):
                with contextlib.suppress(FileExistsError):
                    self.ops.mkdir(str(directory))
            folder = os.path.join(FOLDER, path.parent.name)
            store.write(
                self.root, path.name, result, outcome.instances, details=outcome.details, ops=self.ops, folder=folder
            )
        except QueueError:
            log.debug("%s: another attempt has kept it", path)
        except OSError as error:
            log.warning("%s: a finished part could not be kept: %s", path, error)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.root / FOLDER / self.record(()).ticket / f"{self.index}-{digest}"


def remove(root: Path, ticket: str, ops: FileOps | None = None) -> None:
    """Delete the parts of a ticket. Raises OSError."""
    ops, directory = ops or FileOps(), str(root / FOLDER / ticket)
    with contextlib.suppress(FileNotFoundError):        # another is at it too, or there are none
        if os.path.islink(directory):
            ops.unlink(directory)
            return
        for name in ops.listdir(directory):
            _remove(root, Path(directory, name), ops)
        ops.rmdir(directory)


def _remove(root: Path, path: Path, ops: FileOps) -> None:
    """Delete a part, and nothing that a link leads to."""
    if path.parent.resolve() != root.resolve() / FOLDER / path.parent.name:
        raise OSError(errno.ELOOP, "is a link; not deleted", str(path.parent))
    if stat.S_ISDIR(os.lstat(path).st_mode):
        fsio.remove_flat(ops, str(path))
    else:
        ops.unlink(str(path))
