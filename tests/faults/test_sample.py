"""A kill and one other fault at every second call into the file system. `make test-faults` has all faults at each."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoeval_hooks.fsio import FileOps
from tests.faults.harness import Lab, Trial
from tests.faults.points import ERRORS, KILLS, LASTING, PAUSE, REPLIES, Fault, Point
from tests.faults.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_a_kill_and_one_other_fault_at_every_second_call(lab: Lab, scenario: Scenario) -> None:
    def trials(i: int, point: Point) -> list[tuple[Fault, Trial]]:
        if i % 2:
            return []
        others = [(fault, lab.fault) for fault in (*ERRORS, *LASTING, *REPLIES) if fault.fits(point)]
        others.append((PAUSE, lab.pause))
        lost = [(fault, lab.fault) for fault in REPLIES[:1] if fault.fits(point)]
        return [(KILLS[i // 2 % 2], lab.kill), others[i // 2 % len(others)], *lost]

    lab.try_all(scenario, trials)


def test_every_operation_is_a_point_somewhere(lab: Lab, tmp_path: Path) -> None:
    met = {point.call for scenario in SCENARIOS for point in lab.points(scenario)}
    assert met == {name for name in vars(FileOps) if not name.startswith("_")}
