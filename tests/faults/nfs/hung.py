"""What hangs? Run inside the lab's guest once its command has been silent for too long; lab.py hands on what it prints.

It touches NFS in children only, which it does not wait for in vain. A line that begins with `HANGS` names a thing that
hangs without any process of ours: something in the guest's kernel, which says nothing about the product.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HANGS = "HANGS in the kernel: "
PATIENCE_S = 40.0
"""For one operation, which may have to wait for the server's grace of 10 s and for its client to connect again."""
MOUNTS = ("/mnt/a", "/mnt/b", "/mnt/a3", "/mnt/b3")
OURS = ("python", "python3", "rpc.nfsd", "ip", "pytest")
SCHEDULER = ("__switch_to", "__schedule", "schedule", "userspace", "fork_handler", "new_thread_handler")
"""Ends of every stack."""


@dataclass(frozen=True)
class Task:
    name: str
    state: str
    stack: str
    ours: bool

    def interesting(self) -> bool:
        return self.state in "DR" or self.ours


def tasks() -> dict[int, Task]:
    """Every process and thread of the guest but this one: what it is, its state and where it is in the kernel."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with suppress(OSError):
            comm, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            files = [os.readlink(f) for f in (entry / "fd").iterdir()]
            log = next((Path(f).stem for f in files if f.startswith("/run/storm/") and f.endswith(".log")), "")
            calls = [line.split()[1].partition("+")[0] for line in (entry / "stack").read_text().splitlines()]
            stack = " < ".join(c for c in calls if c not in SCHEDULER)
            found[int(entry.name)] = Task(f"{comm} {log}".strip(), rest.split()[0], stack, comm in OURS)
    found.pop(os.getpid(), None)
    return found


def show(before: dict[int, Task], after: dict[int, Task]) -> None:
    alike: dict[Task, list[int]] = defaultdict(list)
    for pid, task in after.items():
        if task.interesting():
            alike[task].append(pid)
    for task, pids in alike.items():
        stuck = sum(before.get(pid) == task for pid in pids)
        say(f"  {task.name} ({task.state}), pid {' '.join(map(str, pids))}, {stuck} as before: {task.stack}")


def probe(acts: dict[str, Callable[[], str]]) -> dict[str, str | None]:
    """What new processes say, each of its thing; None for one that hangs."""
    begin, answers, pids = time.monotonic(), Path(tempfile.mkdtemp()), {}
    for number, act in enumerate(acts.values()):
        pid = os.fork()
        if pid == 0:
            try:
                (answers / str(number)).write_text(_said(act))
            finally:
                os._exit(0)
        pids[pid] = number
    while pids and time.monotonic() < begin + PATIENCE_S:
        pids.pop(os.waitpid(-1, os.WNOHANG)[0], None)
        time.sleep(0.1)
    stacks = {pids[pid]: task.stack for pid, task in tasks().items() if pid in pids}
    found: dict[str, str | None] = {}
    for number, what in enumerate(acts):
        found[what] = None if number in stacks else (answers / str(number)).read_text().strip()
        say(f"  {what}: {found[what] or f'hangs for {PATIENCE_S:.0f} s at {stacks[number]}'}")
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    return found


def _said(act: Callable[[], str]) -> str:
    try:
        return act()
    except OSError as error:
        return str(error)


def use(directory: str) -> str:
    """Look a name up that no cache knows, make it and remove it."""
    path = Path(directory) / f"asked-{os.getpid()}"
    found = "made a file" if not path.exists() else "?"
    path.touch()
    path.unlink()
    return found


def say(text: str) -> None:
    print(text, flush=True)
    os.fsync(sys.stdout.fileno())


def main() -> None:
    say("what waits:")
    begin, before = time.monotonic(), tasks()
    show({}, before)
    say("what a new process can do:")
    found = probe({
        "threads of the server": Path("/proc/fs/nfsd/threads").read_text,
        "host b's link": Path("/sys/class/net/net-a/operstate").read_text,
        **{directory: partial(use, directory) for directory in ("/mnt/exp", *MOUNTS)},
    })  # fmt: skip
    after = tasks()
    say("what waits now:")
    show(before, after)
    for file in sorted(Path("/run/storm").glob("*/*.log")):
        with suppress(OSError, IndexError):
            say(f"  {file.name}: {file.read_text().splitlines()[-1][:200]}")
    for pid, task in after.items():
        if task.ours and task.name.startswith("python "):
            with suppress(OSError):
                os.kill(pid, signal.SIGUSR1)        # the storm answers it: see `storm.main`
    time.sleep(3.0)
    for file in Path("/run/storm").glob("*/stacks"):
        say(f"Python's own stacks:\n{file.read_text()}")
    served = found["threads of the server"] not in (None, "0") and found["host b's link"] == "up"
    for directory in ("/mnt/exp", *(MOUNTS if served else ())):
        if found[directory] is None:
            say(f"{HANGS}{directory}, for a new process")
    for pid, task in after.items():
        if task.name in ("rpc.nfsd", "ip") and task.state == "D" and before.get(pid) == task:
            say(f"{HANGS}{task.name}, for {time.monotonic() - begin:.0f} s at least, at {task.stack}")
    # To the console: blocked tasks and memory.
    Path("/proc/sys/kernel/printk").write_text("8")
    for key in "wm":
        Path("/proc/sysrq-trigger").write_text(key)


if __name__ == "__main__":
    main()
