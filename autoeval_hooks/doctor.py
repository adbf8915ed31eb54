"""What a host finds when it looks at the queue's file system: what works, what does not, and what to do.

`check_queue` does the operations that the queue lives by, in a directory of its own that it removes. What only shows
between two hosts (a lock, a listing) is shown between two processes here, and the mount's options say the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable

from autoeval_hooks import fsio, pin, ticket
from autoeval_hooks.config import HookConfig
from autoeval_hooks.findings import Finding, Level, within
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import DIRECTORIES

DEADLINE_S = 8.0
"""How long a file system may take for all of it before it counts as one that does not answer."""
SEEN_S = 2.0
"""How long a change by another process may take to show."""
SPACE = (256 << 20, 5 << 30)
"""Free bytes below which there is a problem, and a warning. A ticket has some kilobytes, a log 64 MiB at most."""
INODES = (1_000, 100_000)
"""The same for free inodes. A ticket and its result need about ten."""
SLOW_S = 1.0
"""An fsync that takes longer is worth a warning."""
SKEW_S = 5.0
"""Difference of two clocks that is worth a warning."""


def check_queue(root: str) -> list[Finding]:
    """The findings about the file system that the queue `root` is on, or will be on. Raises nothing."""
    try:
        found = within(DEADLINE_S, lambda: _check(root))
    except Exception as error:      # what was not thought of is a finding too
        return [Finding("problem", "file system", f"{root}: {type(error).__name__}: {error}", "look at this directory")]
    if found is None:
        return [Finding("problem", "file system", f"{root}: does not answer within {DEADLINE_S:g} s",
                        "look for a hung mount (`df`, the file server), then run doctor again")]  # fmt: skip
    return found


def check_hook(config: HookConfig) -> list[Finding]:
    """What a training host can say: its configuration is right, and this is what the queue's file system does."""
    suites = ", ".join(config.suites)
    return [Finding("ok", "configuration", f"{config.path}: suites {suites}"), *check_queue(config.queue)]


def check_pinning(output_dir: str, way: str) -> Finding:
    """By which way checkpoints of `output_dir` are pinned, tried in our own directory there. Raises nothing."""
    hung = Finding("problem", "pins", f"{output_dir}: does not answer within {DEADLINE_S:g} s", "look for a hung mount")
    try:
        return within(DEADLINE_S, lambda: _pinning(output_dir, way)) or hung
    except Exception as error:
        return Finding("problem", "pins", f"{output_dir}: {type(error).__name__}: {error}", "look at this directory")


# ---------------------------------------------------------------------- the queue


def _check(root: str) -> list[Finding]:
    place, findings = root, []
    if os.path.lexists(root) and not os.path.isdir(root):
        return [Finding("problem", "queue", f"{root}: is no directory", "remove it, or set `queue`")]
    if not os.path.isdir(os.path.join(root, "pending")):
        while not os.path.isdir(place) and place != os.path.dirname(place):
            place = os.path.dirname(place)
        findings.append(
            Finding("warning", "queue", f"{root}: not there yet; looked at {place}, where it would be made",
                    "nothing, if nothing was submitted so far; else make `queue` the same for both sides")
        )  # fmt: skip
    probe = os.path.join(place, "tmp" if place == root and os.path.isdir(os.path.join(root, "tmp")) else "",
                         f".doctor-{fsio.unique()}")  # fmt: skip
    try:
        os.mkdir(probe)
    except OSError as error:
        return [*findings, Finding("problem", "queue", f"{place}: cannot be written ({error.strerror})",
                                   "give this user leave (chmod g+w, or the right group), or set `queue`")]  # fmt: skip
    try:
        findings += [_tried(check, probe) for check in (_create, _link, _rename, _sync)]
        findings += _tried_all(_between_processes, probe)
        findings.append(_tried(_clock, probe))
    finally:
        _remove(probe)
    findings.append(_tried(_one_file_system, root))
    findings += [_tried(check, place) for check in (_mount, _space, _inodes, _mode)]
    return findings


def _tried(check: Callable[[str], Finding], directory: str) -> Finding:
    try:
        return check(directory)
    except OSError as error:
        return _failed(check, error)


def _tried_all(check: Callable[[str], list[Finding]], directory: str) -> list[Finding]:
    try:
        return check(directory)
    except OSError as error:
        return [_failed(check, error)]


def _failed(check: Callable[[str], object], error: OSError) -> Finding:
    return Finding("problem", check.__name__.strip("_").replace("_", " "), f"fails here: {error}",
                   "use a file system that can do this, such as NFS, Lustre, GPFS, ext4 or XFS")  # fmt: skip


def _create(probe: str) -> Finding:
    ops, path = FileOps(), os.path.join(probe, "new")
    fsio.write_new(ops, path, b"x")
    try:
        ops.close(ops.create(path))
    except FileExistsError:
        return Finding("ok", "exclusive create", "a name is made by one process only")
    return Finding("problem", "exclusive create", "a file that was there was created again: two runners could hold "
                   "one name", "use another file system for the queue")  # fmt: skip


def _link(probe: str) -> Finding:
    ops, path = FileOps(), os.path.join(probe, "new")
    try:
        ops.link(path, path + ".link")
    except OSError as error:
        if error.errno not in fsio.NO_LINKS:
            raise
        return Finding("problem", "hard links", f"cannot be made here ({error.strerror}); the queue needs them",
                       "set `queue` to a directory on NFS, Lustre, GPFS, ext4 or XFS")  # fmt: skip
    if (names := ops.nlink(path)) != 2:
        return Finding("problem", "hard links", f"a file with two names has {names} by its count",
                       "use another file system for the queue")  # fmt: skip
    return Finding("ok", "hard links", "work, and are counted")


def _rename(probe: str) -> Finding:
    ops, path = FileOps(), os.path.join(probe, "new")
    ops.rename(path, path + ".moved")
    names = ops.listdir(probe)
    if "new" in names or "new.moved" not in names:
        return Finding("problem", "rename", f"after one, the directory lists {sorted(names)}",
                       "use another file system for the queue")  # fmt: skip
    return Finding("ok", "rename", "moves a name, and the listing shows it at once")


def _sync(probe: str) -> Finding:
    ops, started = FileOps(), time.monotonic()
    fsio.write_new(ops, os.path.join(probe, "synced"), b"x")
    ops.sync_dir(probe)
    took = (time.monotonic() - started) * 1000
    slow = took > SLOW_S * 1000
    return Finding("warning" if slow else "ok", "fsync", f"a file and its directory are durable in {took:.0f} ms",
                   "use a faster file system, if tickets are many: a submit takes several" if slow else "")  # fmt: skip


PEER = """
import fcntl, os, sys
where = sys.argv[1]
def locked():
    with open(os.path.join(where, "lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "busy"
        except OSError as error:
            return f"error {error.errno}"
    return "free"
print(locked(), flush=True)
sys.stdin.readline()
print(locked(), flush=True)
os.rename(os.path.join(where, "a"), os.path.join(where, "b"))
print("renamed", flush=True)
sys.stdin.readline()
"""
"""The other process: says whether it gets the lock while we hold it and when we do not, then renames a file."""


def _between_processes(probe: str) -> list[Finding]:
    fsio.write_new(FileOps(), os.path.join(probe, "a"), b"")
    release, why = _lock(os.path.join(probe, "lock"))
    before = fsio.gate(probe)
    peer = subprocess.Popen(
        [sys.executable, "-I", "-c", PEER, probe], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    try:
        while_held = peer.stdout.readline().strip()
        release()
        print(file=peer.stdin, flush=True)
        when_free = peer.stdout.readline().strip()
        renamed = peer.stdout.readline().strip() == "renamed"
        findings = [_lock_finding(why, while_held, when_free)]
        if not renamed:
            return [*findings, Finding("problem", "another process", "could not rename a file", "look at the mode")]
        listed = _seen(lambda: "b" in os.listdir(probe))
        gate = _seen(lambda: fsio.gate(probe) != before)
    finally:
        peer.kill()
        peer.communicate()
    findings.append(
        Finding("ok", "listing", f"shows another process's rename within {listed:.1f} s") if listed is not None
        else Finding("problem", "listing", f"does not show another process's rename within {SEEN_S:g} s: tickets would "
                     "be found late", "mount with a shorter directory cache (NFS: acdirmax)")
    )  # fmt: skip
    findings.append(
        Finding("ok", "change time", f"of a directory shows a change within {gate:.1f} s") if gate is not None
        else Finding("warning", "change time", "of a directory stands still while names change; scores reach training "
                     "a minute late at most", "nothing; or mount without `nodiratime`-like options of the client")
    )  # fmt: skip
    return findings


def _lock(path: str) -> tuple[Callable[[], None], str]:
    """Take the lock; how to release it, and why it could not be taken, or ""."""
    from filelock import UnixFileLock

    lock = UnixFileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        return (lambda: None), str(error) or type(error).__name__
    return lock.release, ""


def _lock_finding(why: str, while_held: str, when_free: str) -> Finding:
    do = "nothing is lost without; to do no work twice, mount with locks (NFS: a lock daemon; Lustre: -o flock)"
    if why or while_held.startswith("error"):
        text = why or os.strerror(int(while_held.split()[1]))
        return Finding("warning", "locks", f"are missing here ({text}): housekeeping may be done twice", do)
    if while_held != "busy":
        return Finding("warning", "locks", "do not keep another process out: housekeeping may be done twice", do)
    if when_free != "free":
        return Finding("warning", "locks", "are not given up when they are released", do)
    return Finding("ok", "locks", "keep another process of this host out, and are given up")


def _seen(look: Callable[[], bool]) -> float | None:
    """Seconds until `look` is true; None where it is not within `SEEN_S`."""
    started = time.monotonic()
    while not look():
        if time.monotonic() - started > SEEN_S:
            return None
        time.sleep(0.05)
    return time.monotonic() - started


def _clock(probe: str) -> Finding:
    path, before = os.path.join(probe, "time"), time.time()
    fsio.write_new(FileOps(), path, b"x")
    stamped, after = os.stat(path).st_mtime, time.time()
    off = max(before - stamped, stamped - after, 0.0)
    far = off > SKEW_S
    return Finding(
        "warning" if far else "ok", "clocks", f"the file server's differs from this host's by {off:.1f} s; nothing is "
        "decided by it", "synchronise them (NTP), or times in `explain` and lags mislead" if far else "",
    )  # fmt: skip


def _one_file_system(root: str) -> Finding:
    """What is written in tmp/ is renamed into the others: that works within one file system only."""
    there = [name for name in DIRECTORIES if os.path.isdir(os.path.join(root, name))]
    if "tmp" not in there:
        return Finding("ok", "one file system", "the directories of the queue will be made in one place")
    for name in (n for n in there if n != "tmp"):
        src = os.path.join(root, "tmp", f".doctor-{fsio.unique()}")
        dst = os.path.join(root, name, os.path.basename(src))
        fsio.write_new(FileOps(), src, b"")
        try:
            os.rename(src, dst)
        except OSError as error:
            why = "is on another file system" if error.errno == errno.EXDEV else f"takes no file ({error.strerror})"
            return Finding("problem", "one file system", f"{os.path.join(root, name)}: {why} than tmp/"
                           if error.errno == errno.EXDEV else f"{os.path.join(root, name)}: {why}",
                           "put all of the queue on one file system, writable by all who share it")  # fmt: skip
        finally:
            for path in (src, dst):
                with contextlib.suppress(OSError):
                    os.unlink(path)
    return Finding("ok", "one file system", f"tmp/ and {len(there) - 1} others; a file can be renamed between them")


LOCAL = {"tmpfs": "is gone when this host restarts", "ramfs": "is gone when this host restarts",
         "overlay": "is a container's own, and gone with it"}  # fmt: skip
LOCAL_LOCKS = ("nolock", "local_lock=all", "local_lock=flock", "localflock")


def _mount(directory: str) -> Finding:
    kind, options, where = _mounted(os.path.realpath(directory))
    if kind in LOCAL:
        return Finding("warning", "mount", f"{where} ({kind}) {LOCAL[kind]}, and no other host sees it",
                       "set `queue` to a shared directory, unless training and runner both run here")  # fmt: skip
    if local := [o for o in LOCAL_LOCKS if o in options]:
        return Finding("warning", "mount", f"{where} ({kind}, {local[0]}): locks keep out processes of this host only; "
                       "housekeeping may be done twice", "nothing is lost; or mount without it")  # fmt: skip
    if kind.startswith("nfs") and "soft" in options:
        return Finding("warning", "mount", f"{where} ({kind}, soft): a slow server makes operations fail, of which "
                       "some were done", "mount it hard")  # fmt: skip
    return Finding("ok", "mount", f"{where} ({kind or 'of unknown kind'})")


def _mounted(path: str) -> tuple[str, list[str], str]:
    """Kind, options and place of the mount that holds `path`, by /proc/self/mountinfo (man 5 proc)."""
    best = ("", list[str](), "/")
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            front, _, back = line.partition(" - ")
            where = front.split()[4].replace("\\040", " ")
            if (path == where or path.startswith(where.rstrip("/") + "/")) and len(where) >= len(best[2]):
                kind, _, rest = back.split(" ", 2)
                best = (kind, rest.strip().split(","), where)
    return best


def _space(directory: str) -> Finding:
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    level: Level = "problem" if free < SPACE[0] else "warning" if free < SPACE[1] else "ok"
    return Finding(level, "free space", f"{free / (1 << 30):.1f} GiB (a quota may be less)",
                   "" if level == "ok" else "free some: old logs in logs/, pins by `autoeval-runner gc`")  # fmt: skip


def _inodes(directory: str) -> Finding:
    found = os.statvfs(directory)
    if not found.f_files:
        return Finding("ok", "free inodes", "are not limited here")
    level: Level = "problem" if found.f_favail < INODES[0] else "warning" if found.f_favail < INODES[1] else "ok"
    return Finding(level, "free inodes", f"{found.f_favail}",
                   "" if level == "ok" else "remove small files that nobody needs on this file system")  # fmt: skip


def _mode(directory: str) -> Finding:
    found = os.stat(directory)
    mode, owner = found.st_mode & 0o7777, found.st_uid
    if mode & 0o002 and not mode & 0o1000:
        return Finding("warning", "mode", f"{mode:04o}: every user of this host can queue, cancel and remove tickets",
                       "chmod o-w, and give it to a group")  # fmt: skip
    if mode & 0o022:
        return Finding("ok", "mode", f"{mode:04o}: tickets of the group are taken")
    who = "this user" if owner == os.geteuid() else f"user {owner}"
    return Finding("ok", "mode", f"{mode:04o}: only tickets of {who} and of root are taken; others are refused")


def _remove(probe: str) -> None:
    with contextlib.suppress(OSError):
        fsio.remove_flat(FileOps(), probe)


# ---------------------------------------------------------------------- pins


def _pinning(output_dir: str, way: str) -> Finding:
    if way == "none":
        return Finding("warning", "pins", "`hook.pin: none`: a checkpoint that retention deletes is lost",
                       "keep checkpoints until they are evaluated, or let `hook.pin` be auto")  # fmt: skip
    ours = os.path.join(output_dir, os.path.dirname(ticket.PINS))
    ours = ours if os.path.isdir(ours) else output_dir
    if not os.path.isdir(ours):
        return Finding("warning", "pins", f"{output_dir}: not to be seen from this host",
                       "run `python -m autoeval_hooks doctor` on the training host, or mend `path_map`")  # fmt: skip
    probe = os.path.join(ours, f".doctor-{fsio.unique()}")
    try:
        os.mkdir(probe)
    except OSError as error:
        return Finding("warning", "pins", f"{ours}: cannot be written from here ({error.strerror}), so that pins are "
                       "freed by the training host only", "nothing; or mount it writable")  # fmt: skip
    try:
        return _pinned(probe, output_dir, way)
    finally:
        _remove(probe)


def _pinned(probe: str, output_dir: str, way: str) -> Finding:
    src, tried = os.path.join(probe, "weights"), []
    fsio.write_new(FileOps(), src, b"x" * 4096)
    for attempt in pin._ways(FileOps(), way):
        name = attempt.__name__
        try:
            attempt(src, os.path.join(probe, name))
        except OSError as error:
            tried.append(f"{name}: {error.strerror}")
            continue
        shared = {"reflink": "shares blocks until the trainer writes", "copy": "costs their whole size"}
        means = shared.get(name, "shares the file: a trainer that rewrites weights in place changes it, which is found")
        return Finding("ok", "pins", f"{output_dir}: by {name}, which {means}")
    return Finding("problem", "pins", f"{output_dir}: cannot be made by {way} ({'; '.join(tried)})",
                   "set `hook.pin: copy`, or let training keep its checkpoints")  # fmt: skip
