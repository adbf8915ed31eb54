"""Working directories: gone after use, also after the use of a process that was killed; and only those."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval_runner import scratch
from tests.processes import wait_for

HOLD = """
import time
from eval_runner import scratch
with scratch.directory() as path:
    (path / "work").write_text("x")
    time.sleep(300)
"""


@pytest.fixture
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


def test_it_is_empty_and_removed_whatever_happens(tmp: Path) -> None:
    def use() -> None:
        with scratch.directory() as path:
            assert list(path.iterdir()) == []
            assert path.parent == tmp
            assert scratch.sweep() == []        # it is in use, if only by ourselves
            (path / "deep" / "er").mkdir(parents=True)
            (path / "deep" / "er" / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert list(tmp.iterdir()) == []


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], env=env)
    try:
        wait_for(lambda: list(tmp.glob("autoeval-work-*/work")))
        (held,) = tmp.iterdir()
        precious = tmp.parent / "precious"
        precious.mkdir()
        (precious / "file").write_text("x")
        others = ["autoeval-work-0123456789ab.bak", "autoeval-work-XYZ", "autoeval-demo", "autoeval-new-0123"]
        for name in others:
            (tmp / name).mkdir()
        (tmp / "autoeval-work-aaaaaaaaaaaa").symlink_to(precious)
        (tmp / "autoeval-work-bbbbbbbbbbbb").write_text("a file")
        assert scratch.sweep() == []
        (held / "link").symlink_to(precious)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert scratch.sweep() == [held]
        left = [*others, "autoeval-work-aaaaaaaaaaaa", "autoeval-work-bbbbbbbbbbbb"]
        assert sorted(os.listdir(tmp)) == sorted(left)
        assert (precious / "file").exists()
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_directory_of_another_user_is_left_alone(tmp: Path) -> None:
    (tmp / "autoeval-work-cccccccccccc").mkdir()
    os.chown(tmp / "autoeval-work-cccccccccccc", 65534, 65534)
    assert scratch.sweep() == []


def test_two_runners_that_sweep_while_others_start_take_nothing_in_use(tmp: Path) -> None:
    """Four processes make directories and use them, and sweep all the time."""
    code = """
import sys, time
from eval_runner import scratch
end = time.monotonic() + 2
count = 0
while time.monotonic() < end:
    with scratch.directory() as path:
        scratch.sweep()
        (path / "file").write_text("x")
        count += 1
assert count
"""
    env = {**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": str(Path(__file__).parents[2])}
    four = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(4)]
    assert [process.wait(120) for process in four] == [0] * 4
    assert list(tmp.iterdir()) == []
