"""On a real kernel NFS, in a guest of our own (lab.py): the queue's own tests, the storm, and the power cut.

`make test-nfs` runs this. Where the guest does not boot, the tests are skipped and say why. STORM_SECONDS (for each
version), STORM_SEED and POWER_CUTS are taken from the environment.
"""

from __future__ import annotations

import os
import random
import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults.nfs.lab import CannotBoot, GuestHung, Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]     # the lab has a limit of its own

ROOT = Path(__file__).parents[3]
SECONDS = float(os.environ.get("STORM_SECONDS", "210"))
SEED = int(os.environ.get("STORM_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
CUTS = int(os.environ.get("POWER_CUTS", "8"))
MOUNTS = {"4.2": ("/mnt/a", "/mnt/b"), "3": ("/mnt/a3", "/mnt/b3")}
OWN_TESTS = ("tests/unit/test_queue.py", "tests/unit/test_pin.py", "tests/unit/test_submit.py")


@pytest.fixture(scope="module")
def boots() -> None:
    """Skips what follows where no guest comes up. Once one has, one that does not is a failure."""
    try:
        with Lab() as trial:
            trial.run("true")
    except CannotBoot as error:
        pytest.skip(str(error))


@pytest.fixture
def lab(boots: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.chdir(ROOT)
    with Lab() as made:
        yield made


def run(lab: Lab, command: str) -> int:
    """The command's exit status. A guest whose kernel hangs tells nothing of the product: it is started anew, once."""
    try:
        return lab.run(command)
    except GuestHung as error:
        print(f"\nthe guest's kernel hangs; once more in a new guest, with STORM_SEED={SEED}\n{error}")
    lab.new_disk()
    try:
        return lab.run(command)
    except GuestHung as error:
        pytest.skip(f"NOT TESTED: the kernels of two guests hung; STORM_SEED={SEED}\n{error}")


def python(*argv: object) -> str:
    """A command of the guest's, in this very environment."""
    return shlex.join(["env", f"PYTHONPATH={ROOT}", sys.executable, *map(str, argv)])


def test_the_queues_own_tests_hold_on_nfs(lab: Lab) -> None:
    lines = [
        python("-m", "pytest", "-q", "-p", "no:cacheprovider", *OWN_TESTS, f"--basetemp={a}/tests-{version}")
        + f" || failed='{version} '$failed"
        for version, (a, _) in MOUNTS.items()
    ]
    script = [*lines, '[ -z "${failed:-}" ] || { echo "failed on NFS $failed"; exit 1; }']
    assert run(lab, "\n".join(script)) == 0


@pytest.mark.parametrize("version", MOUNTS)
def test_nothing_is_lost_or_shown_twice_in_a_storm(lab: Lab, version: str) -> None:
    storm = python("-m", "tests.faults.nfs.storm", version, *MOUNTS[version], "/mnt/exp", SECONDS, SEED)
    assert run(lab, storm) == 0, f"the same draws again: STORM_SEED={SEED}"


def test_what_was_acknowledged_survives_a_power_cut(lab: Lab) -> None:
    """The guest is killed with all that its memory held; the disk keeps what had been written to it."""
    rng = random.Random(SEED)
    acks = lab.directory / "acks"
    acks.touch()

    def acknowledged() -> int:
        return acks.stat().st_size

    def over(enough: int) -> bool:
        return acknowledged() >= enough or not lab.alive()

    for cut in range(CUTS):
        where = ("/mnt/exp", "/mnt/a", "/mnt/exp", "/mnt/a3")[cut % 4]
        lab.start(python("-m", "tests.faults.nfs.powercut", acks, SEED + cut, f"{where}/cut-{Path(where).name}"))
        lab.follow(partial(over, acknowledged() + 2000), acknowledged)
        time.sleep(rng.uniform(0, 3))
        assert lab.alive(), lab.output()
        lab.cut()
        print(lab.output(), end="")
        assert lab.output(), "the guest said nothing"
        print(f"cut {cut + 1}: seed {SEED}, on {where}, {acks.read_text().count(chr(10))} acknowledged so far")
    assert lab.run(python("-m", "tests.faults.nfs.powercut", acks, SEED, "")) == 0
