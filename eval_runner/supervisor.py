"""Stands between the runner and a program that it runs, so that nothing of the program outlives its use.

A program of its own (``python -I -S supervisor.py REPORT SILENCE PROGRAM ARGUMENT…``), started by `process.run`:

    standard input      a byte, now and then, says that the runner lives and still wants the program; the pipe's end,
                        or SILENCE seconds without a byte (a runner that is stopped or starved), ends everything
    descriptor REPORT   what becomes of it, a line each: ``started PID``, ``failed ERRNO``, ``silent``,
                        ``ended WAIT-STATUS`` once nothing of it is left

Linux gives it every orphan below it (PR_SET_CHILD_SUBREAPER), so that also a grandchild which left its parent's
session and process group is found, and killed. It imports nothing of ours and nothing large.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05


def main(report: int, silence: float, argv: list[str]) -> None:
    """Run `argv`; return when nothing below this process is left."""
    os.set_inheritable(report, False)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    asked: list[int] = []
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # ignored, as some inherit it, no end of a child is told
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    quiet = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    try:
        child = os.posix_spawnp(
            argv[0], argv, os.environ, file_actions=quiet, setsid=True,
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
        )  # fmt: skip
    except OSError as error:
        _tell(report, f"failed {error.errno}")
        return
    _tell(report, f"started {child}")
    heard = time.monotonic()
    ended: dict[int, int] = {}
    while child not in ended and not asked:
        if time.monotonic() - heard > silence:
            _tell(report, "silent")
            break
        if select.select([0], [], [], POLL_S)[0]:
            if not os.read(0, 4096):
                break
            heard = time.monotonic()
        ended |= _reap()
    while below := descendants(os.getpid()):
        for pid in below:
            with contextlib.suppress(OSError):      # it is gone, or runs as another user
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S / 5)
        ended |= _reap()
    if child in ended:
        _tell(report, f"ended {ended[child]}")


def _reap() -> dict[int, int]:
    """The wait statuses, by process, of those that have ended since the last call."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status


def descendants(root: int) -> list[int]:
    """The processes below `root`, the nearest first."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat", "rb") as file:  # it may end
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    found: list[int] = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _tell(report: int, line: str) -> None:
    with contextlib.suppress(OSError):      # nobody is left to hear it
        os.write(report, line.encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
