"""GPU slots, with GPUs that CUDA_VISIBLE_DEVICES makes up, or a stand-in for `nvidia-smi`."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner import process
from eval_runner.process import Stopped
from eval_runner.servers import gpus
from eval_runner.servers.gpus import Gpu, Held

FIRST, SECOND = "GPU-11111111-aaaa", "GPU-22222222-bbbb"
SMI = f"""#!/bin/sh
# a stand-in for nvidia-smi on a host with two GPUs
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: {FIRST})"
echo "  MIG 1g.10gb Device 0: (UUID: MIG-33333333-cccc)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: {SECOND})"
exit $SMI_STATUS
"""
TWO = (Gpu("0", "0"), Gpu("1", "1"))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    return tmp_path


def take(count: int, of: tuple[Gpu, ...] = TWO, stopping: Callable[[], bool] = lambda: False) -> Held:
    return gpus.take(count, of, stopping)


# ---------------------------------------------------------------------- which there are


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SMI_STATUS", "0")


def test_the_gpus_of_a_host(smi: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.visible({}) == (Gpu(FIRST, FIRST), Gpu(SECOND, SECOND))
    monkeypatch.setenv("SMI_STATUS", "9")       # no driver
    assert gpus.visible({}) == ()


@pytest.mark.parametrize(
    ("variable", "found"),
    [
        ("0,1", [Gpu("0", FIRST), Gpu("1", SECOND)]),
        (" 1 ", [Gpu("1", SECOND)]),
        ("1,1", [Gpu("1", SECOND)]),
        ("GPU-2222", [Gpu("GPU-2222", SECOND)]),
        ("GPU-", [Gpu("GPU-", "GPU-")]),
        ("MIG-33333333-cccc", [Gpu("MIG-33333333-cccc", "MIG-33333333-cccc")]),
        ("0,-1,1", [Gpu("0", FIRST)]),
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_that_a_variable_names(smi: None, variable: str, found: list[Gpu]) -> None:
    """One GPU has one slot, whichever name each runner knows it by."""
    assert list(gpus.visible({"CUDA_VISIBLE_DEVICES": variable})) == found


def test_a_host_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible({}) == ()
    assert gpus.visible({"CUDA_VISIBLE_DEVICES": "3"}) == (Gpu("3", "3"),)


# ---------------------------------------------------------------------- who has them


def test_what_is_held_is_given_to_nobody_else() -> None:
    first, second = take(1), take(1)
    assert (first.names, second.names) == (("0",), ("1",))
    first.close()
    third = take(1)
    assert third.names == ("0",)
    for held in (first, second, third):
        held.close()
    both = take(2)
    assert both.names == ("0", "1")
    both.close()
    assert take(0).names == ()


def test_a_second_one_waits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    first = take(1)
    got: list[Held] = []
    with caplog.at_level(logging.INFO, "autoeval"):
        waiting = threading.Thread(target=lambda: got.append(take(2)))
        waiting.start()
        time.sleep(0.7)
        assert got == []
        third = take(1, (TWO[1],))      # while it waits it holds none
        third.close()
        first.close()
        waiting.join(30)
    assert got[0].names == ("0", "1")
    got[0].close()
    assert [r.message for r in caplog.records] == [
        f"waiting for 2 of 2 GPUs: servers of other runners hold them ({gpus.directory()})"
    ]


def test_a_wait_heeds_that_it_is_to_stop() -> None:
    held = take(2)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        take(1, stopping=stop.is_set)
    held.close()


def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="3 GPUs are asked for, and there are 2 here"):
        take(3)


def test_no_descriptor_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    held = take(1)
    other = take(1)
    held.close()
    held.close()
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before


HOLDER = """
import sys, time
from pathlib import Path
from eval_runner import process
from eval_runner.servers import gpus
gpus.ROOT = Path(sys.argv[1])
held = gpus.take(1, (gpus.Gpu("0", "0"),), lambda: False)
process.run(["sh", "-c", "trap '' TERM; echo $$ > program; sleep 60"], log=Path("log"), env=None, cwd=Path("."),
            keep=held.descriptors)
"""


def test_a_runner_that_is_killed_frees_its_gpu_with_its_program(tmp_path: Path) -> None:
    """Not before: what it started may still compute."""
    repository = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(repository)}
    runner = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], env=env, cwd=tmp_path)
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "program").exists() or not (tmp_path / "program").read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        program = int((tmp_path / "program").read_text())
        with pytest.raises(Stopped):
            take(1, TWO[:1], stopping=lambda: True)
    finally:
        runner.kill()
        runner.wait()
    held = take(1, TWO[:1])
    assert not Path(f"/proc/{program}").exists()
    held.close()


def test_the_program_has_them_while_its_runner_does_not(tmp_path: Path) -> None:
    """The descriptors are the supervisor's too: closing them here is not enough."""
    held = take(1, TWO[:1])
    seen: list[str] = []

    def look() -> None:
        if not seen:
            held.close()
            try:
                take(1, TWO[:1], stopping=lambda: True).close()
                seen.append("free")
            except Stopped:
                seen.append("held")

    process.run(["sleep", "1"], log=tmp_path / "log", env=None, cwd=tmp_path, on_tick=look, keep=held.descriptors)
    assert seen == ["held"]
    take(1, TWO[:1]).close()


# ---------------------------------------------------------------------- where it is noted


def test_the_directory_is_ours_alone(tmp_path: Path) -> None:
    path = gpus.directory()
    assert path.parent == tmp_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o777)
    with pytest.raises(ConfigError, match="must be a directory of yours that nobody else can write to"):
        take(1)
    path.rmdir()
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="must be a directory of yours"):
        take(1)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    (gpus.directory() / "0.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        take(1)
    assert not (tmp_path / "target").exists()
