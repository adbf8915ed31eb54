"""Directories that are costly to make, kept for those to come: each is made once, however many ask for it.

`<root>/<key>/model` is what was made, with a record of its files beside it. A directory has its name once it is
complete, and is made in `.new-<key>`. `<key>.lock` is held alone by who makes or removes it, and by all who use it
together: nothing that is in use is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from autoeval_hooks import fsio, strict
from autoeval_hooks import manifest as manifests
from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.manifest import FileRecord
from eval_runner import process, scratch
from eval_runner.checkpoints.base import Verified, log, look
from eval_runner.checkpoints.locks import Lock

_KEY = re.compile(r"[0-9a-f]{64}")
_RECORD = "autoeval-kept.json"
_MODEL = "model"
_MAX_RECORD = 8 << 20


@dataclass(frozen=True)
class _Record:
    """What was made: its files, relative to `model`, and of what, for people to read."""

    version: int
    source: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class Made:
    """A directory in use, until the lock is released. `files` are those that evaluating needs."""

    found: Verified
    files: tuple[FileRecord, ...]


def obtain(
    root: Path, key: str, lock: Lock, make: Callable[[Path], None], *, source: str, keep: int,
    stopping: Callable[[], bool], waits: Callable[[], None],
) -> Made:  # fmt: skip
    """The directory of this key, made by `make` unless it is there and as it was left; `lock` is `<root>/<key>.lock`.

    `make` is given a path that does not exist, and leaves a directory there. `source` says of what, for people.
    `keep` directories stay, those used last. `waits` is called once if another makes it now. Raises what `make` does,
    `process.Stopped` once `stopping` is true, and OSError.
    """
    path, spoilt, made, told = root / key, -1, -1, False
    while True:
        if stopping():
            raise process.Stopped(f"{path}: told to stop")
        inode = _inode(path)
        if inode not in (0, spoilt) and lock.shared():
            if kept := _verified(path):
                lock.touch()
                _tidy(root, keep - 1, key)
                return kept
            spoilt = inode
            if spoilt == made:      # nor would it be the next time
                raise ConfigError(f"{source}: what was made of it is not as it was left once it stands at {path}")
        elif inode in (0, spoilt) and lock.alone():
            if _inode(path) == spoilt:
                _remove(path)
                if os.path.lexists(path):
                    raise ConfigError(f"{path}: is none of the directories that autoeval made; remove it yourself")
            if not path.exists():
                _make(path, make, source)
                made = _inode(path)
            spoilt = -1
        else:
            if not told:
                waits()
            told = True
            lock.wait(stopping)


def _inode(path: Path) -> int:
    """The directory's inode; 0 where there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _make(path: Path, make: Callable[[Path], None], source: str) -> None:
    work = path.parent / f".new-{path.name}"
    if work.exists():       # of one that was killed
        scratch.remove(work)
    work.mkdir()
    try:
        make(work / _MODEL)
        record = _Record(1, source, tuple(_records(work / _MODEL)))
        fsio.replace(str(work / _RECORD), json.dumps(asdict(record)).encode())
        work.rename(path)
    except BaseException:
        scratch.remove(work)
        raise


def _records(model: Path) -> list[FileRecord]:
    return [manifests.record(str(model), name) for name in manifests.model_files(str(model))]


def _verified(path: Path) -> Made | None:
    """The directory, if it is what was left there; None, with a warning, where it was changed since."""
    model, errors = path / _MODEL, list[str]()
    try:
        text = fsio.FileOps().read(str(path / _RECORD), _MAX_RECORD)
        record = strict.parse(_Record, text, _RECORD, errors, max_bytes=_MAX_RECORD)
        if record is None or record.version != 1:
            raise CheckpointError(f"{path / _RECORD}: is not what this version wrote")
        seen = {file.path: look(model, file.path) for file in record.files}
        there = [(f.path, f.size, f.digest) for f in _records(model)]
        if there != [(f.path, f.size, f.digest) for f in record.files]:
            raise CheckpointError(f"{model}: was changed")
        return Made(Verified(model, seen), record.files)
    except (CheckpointError, FileNotFoundError) as error:
        if path.exists():       # else it was removed before it was ours
            log.warning("%s since it was made; it is made anew", error)
        return None


def _tidy(root: Path, keep: int, own: str) -> None:
    """Remove what was used longest ago, beyond `keep`, and what a process that was killed left half-made; nothing that
    is in use, nor `own`."""
    names = [n for n in os.listdir(root) if _KEY.fullmatch(n.removeprefix(".new-")) and n.removeprefix(".new-") != own]
    by_use = sorted((n for n in names if not n.startswith(".")), key=lambda n: _used(root, n), reverse=True)
    for name in set(names) - set(by_use[:keep]):
        key = name.removeprefix(".new-")
        with contextlib.suppress(OSError), Lock(root / f"{key}.lock") as lock:
            if lock.alone():
                _remove(root / name)
                if not (root / key).exists():
                    lock.remove()


def _used(root: Path, key: str) -> int:
    with contextlib.suppress(OSError):
        return (root / f"{key}.lock").stat().st_mtime_ns
    return 0


def _remove(path: Path) -> None:
    """Delete a directory of ours, held alone; anything else stays, with a warning."""
    half = path.name.startswith(".new-")
    if path.is_symlink() or not path.is_dir() or not (half or (path / _RECORD).is_file()):
        log.warning("%s: is none of the directories that autoeval made; it is left alone", path)
        return
    aside = path if half else path.parent / f".new-{path.name}"
    if aside != path:       # half of it is never seen under its name
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    scratch.remove(aside)
