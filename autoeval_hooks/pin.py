"""Pins: our own links to a checkpoint's model files, so that they outlive the trainer's retention.

A pin is made in a directory of its own beside the checkpoints, `<output_dir>/.autoeval/pins/<ticket>/`:
nothing is written inside a checkpoint (rotation sorts by the directory's time), and no name matches
`checkpoint-*`. Small files are copied; large ones are cloned (reflink) or linked. A link shares the
file's content: where a trainer rewrites a file in place, as `torch.save` does, the pin changes with it,
which verification against the manifest finds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable

from autoeval_hooks import fsio, layouts, manifest, ticket
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.fsio import FileOps

_NAME = re.compile(r"[0-9a-f]{64}|\.new-[A-Za-z0-9-]+")
_CANNOT = fsio.NO_LINKS | {errno.EINVAL, errno.ENOTTY}
"""What a way of pinning answers where it cannot be done; then the next way is tried."""
STALE_S = 6 * 3600.0
"""After so many seconds (of the file system's clock) without a sign of life, a pin that no ticket names is nobody's.
A hand-over that is tried again gives one every minute."""


def pins_dir(checkpoint: str) -> str:
    """The directory of pins that belongs to a checkpoint's output directory."""
    return os.path.join(os.path.dirname(checkpoint), ticket.PINS)


def existing(checkpoint: str) -> list[str]:
    """The paths of the pins that the output directory of a checkpoint holds, unfinished ones included."""
    directory = pins_dir(checkpoint)
    try:
        return [os.path.join(directory, name) for name in os.listdir(directory) if _NAME.fullmatch(name)]
    except FileNotFoundError:
        return []


def keep(path: str) -> None:
    """Show that a pin that no ticket names yet is in use: `gc` frees such a one once nobody did so for `STALE_S`."""
    with contextlib.suppress(OSError):
        os.utime(path)


def process(path: str) -> int | None:
    """The process of this host that a pin under its passing name is named for; None for another host's, or no such."""
    found = re.fullmatch(rf"\.new-{re.escape(fsio.hostname())}-(\d+)-[0-9a-f]+", os.path.basename(path))
    return int(found[1]) if found else None


def orphaned(path: str) -> bool:
    """Whether this is a pin under its passing name that a process of this host began and did not live to finish."""
    pid = process(path)
    if pid is None or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def make(source: str, pins: str, way: str, ops: FileOps | None = None) -> str:
    """Pin the model files of the directory `source` under a passing name in `pins`; `adopt` gives the final one.

    `way` is ``auto``, ``reflink``, ``hardlink`` or ``copy``. Raises CheckpointError when the source
    vanishes, PinImpossible when the file system can do none of it, OSError when it fails.
    """
    ops = ops or FileOps()
    os.makedirs(pins, exist_ok=True)
    target = os.path.join(pins, f".new-{fsio.unique()}")
    try:
        ops.mkdir(target)
        for name in manifest.model_files(source):
            _pin_file(ops, layouts.place(source, name), os.path.join(target, layouts.flat(name)), way)
        ops.sync_dir(target)
    except BaseException as error:
        with contextlib.suppress(OSError):      # one that cannot be removed now is an orphan's for `tidy_pins` and `gc`
            release(target, ops)
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{source}: deleted before it could be pinned") from error
        raise
    return target


def adopt(passing: str, ticket_id: str, ops: FileOps | None = None) -> str:
    """Give a pin its ticket's name. A pin of that name is complete and of the same content: then it is kept.

    Raises FileNotFoundError when the pin is gone: no ticket may name one that is not there.
    """
    ops = ops or FileOps()
    final = os.path.join(os.path.dirname(passing), ticket_id)
    try:
        if not fsio.moved(ops, passing, final):
            raise FileNotFoundError(errno.ENOENT, "deleted before a ticket could name it", passing)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        release(passing, ops)
        keep(final)
    ops.sync_dir(os.path.dirname(final))
    return final


def release(pin: str, ops: FileOps | None = None) -> None:
    """Delete a pin, and only a pin: a directory, not a link, with a pin's name under `.autoeval/pins`.

    One that is gone already is as good. Raises CheckpointError for any other path, and for a pin with a directory in
    it, which is none of ours: then nothing is deleted.
    """
    real = os.path.realpath(pin)
    inside = os.path.dirname(real).endswith(os.path.join(os.sep, ticket.PINS))
    if not inside or not _NAME.fullmatch(os.path.basename(real)) or os.path.islink(pin):
        raise CheckpointError(f"{pin}: not a pin; not deleted")
    with contextlib.suppress(FileNotFoundError), os.scandir(real) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                raise CheckpointError(f"{entry.path}: a directory, which is none of ours, in a pin; move it away")
    fsio.remove_flat(ops or FileOps(), real)


class PinImpossible(CheckpointError):
    """The file system offers none of the ways to pin that were allowed."""


def _pin_file(ops: FileOps, src: str, dst: str, way: str) -> None:
    small = os.stat(src).st_size <= manifest.WHOLE
    for attempt in (ops.copy,) if small else _ways(ops, way):
        try:
            return attempt(src, dst)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            with contextlib.suppress(FileNotFoundError):
                ops.unlink(dst)
            reason = error.strerror
    raise PinImpossible(f"{src}: cannot be pinned here by {way} ({reason})")


def _ways(ops: FileOps, way: str) -> tuple[Callable[[str, str], None], ...]:
    def hardlink(src: str, dst: str) -> None:
        ops.link(os.path.realpath(src), dst)

    return {
        "auto": (ops.reflink, hardlink),
        "reflink": (ops.reflink,),
        "hardlink": (hardlink,),
        "copy": (ops.copy,),
    }[way]
