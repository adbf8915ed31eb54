"""What doctor says of a file system, of a healthy one and of each fault. The faults are put into real operations."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoeval_hooks import doctor, findings, fsio
from autoeval_hooks.__main__ import main
from autoeval_hooks.findings import Finding
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Queue


@pytest.fixture
def look(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Finding]:
    """The finding about one thing."""
    monkeypatch.setattr(doctor, "SEEN_S", 0.5)
    monkeypatch.setattr(doctor, "DEADLINE_S", 60.0)

    def one(what: str) -> Finding:
        (found,) = (f for f in doctor.check_queue(queue.root) if f.what == what)
        return found

    return one


def everything(root: str) -> set[str]:
    return {str(p) for p in Path(root).rglob("*")}


def test_a_healthy_queue(queue: Queue) -> None:
    before = everything(queue.root)
    found = doctor.check_queue(queue.root)
    assert [f for f in found if f.level == "problem"] == []
    assert {f.what for f in found} >= {
        "exclusive create", "hard links", "rename", "fsync", "locks", "listing", "change time", "clocks", "mount",
        "one file system", "free space", "free inodes", "mode",
    }  # fmt: skip
    assert all(f.level == "ok" for f in found if f.what not in ("mount", "free space", "free inodes"))
    assert everything(queue.root) == before


def test_a_queue_that_is_not_there_yet(tmp_path: Path) -> None:
    found = doctor.check_queue(str(tmp_path / "a" / "b"))
    assert found[0].level == "warning"
    assert f"looked at {tmp_path}, where it would be made" in found[0].means
    assert [f for f in found if f.level == "problem"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_queue_that_cannot_be_written(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, *args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refused)
    found = doctor.check_queue(queue.root)[-1]
    assert (found.level, found.what) == ("problem", "queue")
    assert "chmod g+w" in found.do


def test_no_hard_links(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: FileOps, src: str, dst: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(FileOps, "link", no)
    found = look("hard links")
    assert found.level == "problem"
    assert "set `queue` to a directory on NFS" in found.do


def test_links_that_are_not_counted(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileOps, "nlink", lambda self, path: 1)
    assert look("hard links").level == "problem"


def test_create_that_is_not_exclusive(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileOps, "create", lambda self, path: os.open(path, os.O_CREAT | os.O_RDWR))
    assert look("exclusive create").level == "problem"


def test_a_rename_that_leaves_the_old_name(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileOps, "rename", lambda self, src, dst: shutil.copy(src, dst))
    assert look("rename").level == "problem"


def test_fsync_that_fails_and_one_that_is_slow(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    assert look("fsync").level == "ok"
    with monkeypatch.context() as patched:
        patched.setattr(doctor, "SLOW_S", 0.0)
        assert look("fsync").level == "warning"

    def no(self: FileOps, path: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileOps, "sync_dir", no)
    assert "Input/output error" in look("sync").means


def test_no_locks(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    def no(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no)
        found = look("locks")
    assert found.level == "warning"
    assert "are missing here" in found.means
    monkeypatch.setattr(doctor, "_lock", lambda path: ((lambda: None), ""))       # taken, and kept nobody out
    assert "do not keep another process out" in look("locks").means


def test_a_listing_that_lags(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda p: [n for n in listdir(p) if n != "b"])
    assert look("listing").level == "problem"


def test_a_change_time_that_stands_still(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsio, "gate", lambda path: 7)
    assert look("change time").level == "warning"


def test_two_file_systems(queue: Queue, look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def other(src: str, dst: str) -> None:
        if os.path.dirname(dst).endswith("/results"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(src, dst)

    before = everything(queue.root)
    monkeypatch.setattr(os, "rename", other)
    found = look("one file system")
    assert found.level == "problem"
    assert f"{queue.root}/results: is on another file system than tmp/" in found.means
    assert everything(queue.root) == before


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "problem"), (1 << 30, "warning"), (1 << 40, "ok")])
def test_space(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch, free: int, level: str) -> None:
    found = SimpleNamespace(f_bavail=free, f_frsize=1, f_files=1 << 40, f_favail=free >> 17)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    assert look("free space").level == level
    assert look("free inodes").level == {"problem": "problem", "warning": "warning", "ok": "ok"}[level]
    found.f_files = 0
    assert "not limited" in look("free inodes").means


MOUNTS = {
    "tmpfs rw": "is gone when this host restarts",
    "overlay rw": "is a container's own",
    "nfs4 rw,local_lock=all,vers=4.2": "locks keep out processes of this host only",
    "nfs rw,nolock,vers=3": "locks keep out processes of this host only",
    "lustre rw,localflock": "locks keep out processes of this host only",
    "nfs4 rw,soft": "some were done",
    "nfs4 rw,hard,local_lock=none": "",
    "lustre rw,flock": "",
}


@pytest.mark.parametrize("kind", MOUNTS)
def test_mounts(queue: Queue, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    name, options = kind.split()
    monkeypatch.setattr(doctor, "_mounted", lambda path: (name, options.split(","), "/q"))
    found = doctor._mount(queue.root)
    assert found.level == ("warning" if MOUNTS[kind] else "ok")
    assert MOUNTS[kind] in found.means


def test_the_mount_is_found_by_the_longest_prefix(tmp_path: Path) -> None:
    kind, options, where = doctor._mounted("/proc/self")
    assert (kind, where) == ("proc", "/proc")
    assert options
    assert doctor._mounted("/procession")[2] == doctor._mounted("/")[2]


@pytest.mark.parametrize(("mode", "says"), [(0o755, "only tickets of this user"), (0o775, "of the group are taken"),
                                            (0o777, "every user of this host"), (0o1777, "of the group")])  # fmt: skip
def test_modes(queue: Queue, look: Callable[[str], Finding], mode: int, says: str) -> None:
    Path(queue.root).chmod(mode)
    found = look("mode")
    assert says in found.means
    assert found.level == ("warning" if mode == 0o777 else "ok")


def test_a_file_server_with_another_clock(look: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() + 100)
    found = look("clocks")
    assert found.level == "warning"
    assert "by 100.0 s" in found.means or "by 99.9 s" in found.means


def test_a_file_system_that_hangs(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(doctor, "DEADLINE_S", 0.2)
    monkeypatch.setattr(doctor, "_check", lambda root: over.wait())
    (found,) = doctor.check_queue(queue.root)
    over.set()
    assert found.level == "problem"
    assert "does not answer within 0.2 s" in found.means


def test_what_nobody_thought_of_is_a_finding(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_space", lambda path: 1 // 0)
    (found,) = doctor.check_queue(queue.root)
    assert "ZeroDivisionError" in found.means
    monkeypatch.setattr(doctor, "_pinning", lambda path, way: 1 // 0)
    assert "ZeroDivisionError" in doctor.check_pinning("/x", "auto").means
    with pytest.raises(TimeoutError, match="its own"):
        findings.within(5.0, lambda: (_ for _ in ()).throw(TimeoutError("its own")))


# ---------------------------------------------------------------------- pins


def test_how_checkpoints_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".autoeval").mkdir()
    found = doctor.check_pinning(str(tmp_path), "auto")
    assert found.level == "ok"
    assert "by hardlink" in found.means or "by reflink" in found.means
    assert list((tmp_path / ".autoeval").iterdir()) == []

    def no(self: FileOps, src: str, dst: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    for way in ("link", "reflink"):
        monkeypatch.setattr(FileOps, way, no)
    assert "by copy" in doctor.check_pinning(str(tmp_path), "copy").means
    found = doctor.check_pinning(str(tmp_path), "auto")
    assert (found.level, found.do[:24]) == ("problem", "set `hook.pin: copy`, or")
    assert list((tmp_path / ".autoeval").iterdir()) == []
    assert doctor.check_pinning(str(tmp_path), "none").level == "warning"
    assert "not to be seen from this host" in doctor.check_pinning(str(tmp_path / "gone"), "auto").means


# ---------------------------------------------------------------------- the command


def test_the_command_on_a_training_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: q\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\n")
    assert main(["doctor", "--config", str(config), "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "ok       versions: autoeval" in out
    assert "suites quick" in out
    assert "pins:" in out
    assert main(["doctor", "--config", str(config), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["problems"] == 0
    assert {"level", "what", "means", "do"} == set(data["findings"][0])
    (tmp_path / "q").write_text("a file")
    assert main(["doctor", "--config", str(config)]) == 1
    assert main(["doctor", "--config", str(tmp_path / "none.yaml")]) == 2


def test_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "wandb", "click", "pydantic", "eval_runner")
    code = f"import sys, autoeval_hooks.__main__; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
