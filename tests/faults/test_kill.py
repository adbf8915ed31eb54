"""A process that is killed, or stands still for long, before or after any call into the file system."""

from __future__ import annotations

import pytest

from tests.faults.harness import Lab
from tests.faults.points import KILLS, PAUSE
from tests.faults.scenarios import SCENARIOS, Scenario

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3600)]
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)


@every_scenario
def test_a_process_killed_at_any_call_loses_nothing_and_does_nothing_twice(lab: Lab, scenario: Scenario) -> None:
    lab.try_all(scenario, lambda i, point: [(fault, lab.kill) for fault in KILLS])


@every_scenario
def test_a_process_paused_at_any_call_for_longer_than_a_lease_does_no_harm(lab: Lab, scenario: Scenario) -> None:
    lab.try_all(scenario, lambda i, point: [(PAUSE, lab.pause)])
