"""GPU slots of this host: servers of several runners never share a GPU.

A slot is a file with a `flock`, one for each GPU, in a directory of this host and user. A server's supervisor holds
the lock's descriptor too, so that the slot is free exactly when nothing of the server is left, whatever kills the
runner. GPUs that other users or programs compute on are not known here: a batch system hands those out, and tells by
CUDA_VISIBLE_DEVICES which are ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.errors import ConfigError
from eval_runner.checkpoints.locks import Lock

ROOT = Path("/tmp")
"""On every host, the host's own, and the same for all runners of a user; TMPDIR may be a job's own."""
VARIABLE = "CUDA_VISIBLE_DEVICES"
LOOK_S = 60.0
"""Seconds that `nvidia-smi` may take; the first call after a boot takes long."""

_GPU = re.compile(r"^GPU (\d+): .*\(UUID: (GPU-[^)]+)\)", re.MULTILINE)

logger = logging.getLogger("autoeval")


@dataclass(frozen=True)
class Gpu:
    """`name` is what CUDA_VISIBLE_DEVICES takes; `identity` the same for every name of one GPU."""

    name: str
    identity: str


def visible(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else all of this host."""
    listed = _installed()
    if VARIABLE not in environ:
        return tuple(Gpu(uuid, uuid) for uuid in listed.values())
    names = []
    for name in (part.strip() for part in environ[VARIABLE].split(",")):
        if not name or name.startswith("-"):        # CUDA takes those before the first that is none
            break
        names.append(name)
    return tuple(Gpu(name, _identity(name, listed)) for name in dict.fromkeys(names))


def _identity(name: str, listed: dict[str, str]) -> str:
    """The UUID where it is known: by its number, or by its beginning, which CUDA takes too."""
    begins = [uuid for uuid in listed.values() if uuid.startswith(name)]
    return listed.get(name) or (begins[0] if len(begins) == 1 else name)


def _installed() -> dict[str, str]:
    """Number → UUID, as `nvidia-smi -L` lists them; nothing where there is no such program, or no driver."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LOOK_S)
        return dict(_GPU.findall(done.stdout)) if done.returncode == 0 else {}
    return {}


class Held:
    """GPUs that are ours. `descriptors` hold them; whoever inherits these holds them too."""

    def __init__(self, locks: dict[Gpu, Lock]) -> None:
        self.names = tuple(gpu.name for gpu in locks)
        self.descriptors = tuple(lock.fileno() for lock in locks.values())
        self._locks = contextlib.ExitStack()
        for lock in locks.values():
            self._locks.push(lock)

    def close(self) -> None:
        """Give them back, as soon as nobody else holds the descriptors. It may be called again."""
        self._locks.close()


def take(count: int, gpus: Sequence[Gpu], stopping: Callable[[], bool]) -> Held:
    """Wait until `count` of `gpus` are free, and hold them.

    Raises ConfigError where there are fewer at all, or the directory of the locks cannot be trusted, and
    `process.Stopped` once `stopping` is true.
    """
    if count > len(gpus):
        raise ConfigError(f"{count} GPUs are asked for, and there are {len(gpus)} here")
    if not count:
        return Held({})
    place, told = directory(), False
    with Lock(place / "choosing.lock") as choosing:        # one at a time: else two could hold half of theirs for ever
        while True:
            if choosing.alone():
                if held := _try(count, gpus, place):
                    return held
                if not told:
                    told = True
                    logger.info("waiting for %d of %d GPUs: servers of other runners hold them (%s)",
                                count, len(gpus), place)  # fmt: skip
            choosing.wait(stopping)


def _try(count: int, gpus: Sequence[Gpu], place: Path) -> Held | None:
    """The first `count` that are free; where there are fewer, none is held."""
    found: dict[Gpu, Lock] = {}
    with contextlib.ExitStack() as opened:
        for gpu in gpus:
            with contextlib.ExitStack() as one:
                lock = one.enter_context(Lock(place / f"{re.sub(r'[^A-Za-z0-9-]', '_', gpu.identity)}.lock"))
                if not lock.alone():
                    continue
                lock.touch()        # what looks old, /tmp may be cleaned of
                found[gpu] = lock
                opened.push(one.pop_all())
            if len(found) == count:
                opened.pop_all()
                return Held(found)
    return None


def directory() -> Path:
    """Where the locks of this user stand on this host. Raises ConfigError where somebody else could have made it."""
    path = ROOT / f"autoeval-gpus-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{path}: must be a directory of yours that nobody else can write to, for it tells which GPUs are in use; "
            "have it removed"
        )
    return path
