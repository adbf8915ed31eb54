"""A file system that fails at any call, or does it and reports something else."""

from __future__ import annotations

import pytest

from tests.faults.harness import Lab
from tests.faults.points import ERRORS, LASTING, REPLIES
from tests.faults.scenarios import SCENARIOS, Scenario

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3600)]
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)


@every_scenario
def test_an_error_at_any_call_is_told_or_harmless_and_calling_again_heals(lab: Lab, scenario: Scenario) -> None:
    lab.try_all(scenario, lambda i, point: [(fault, lab.fault) for fault in ERRORS])


@every_scenario
def test_an_error_that_lasts_is_survived(lab: Lab, scenario: Scenario) -> None:
    lab.try_all(scenario, lambda i, point: [(fault, lab.fault) for fault in LASTING if fault.fits(point)])


@every_scenario
def test_what_was_done_and_reported_as_failed_is_found_out(lab: Lab, scenario: Scenario) -> None:
    lab.try_all(scenario, lambda i, point: [(fault, lab.fault) for fault in REPLIES if fault.fits(point)])
