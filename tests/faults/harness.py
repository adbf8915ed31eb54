"""Faults at every call into the file system: a scenario is run for each point and fault, a fresh runner drains the
queue, and `World.check` asserts the outcome. fsync does nothing here: what a killed process wrote stays in the page
cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoeval_hooks import config as hook_configs
from autoeval_hooks.config import HookConfig
from autoeval_hooks.errors import AutoEvalError
from eval_runner import config as configs
from eval_runner.config.models import Config
from eval_runner.progress import Progress
from tests.faults.points import Fault, Faulty, Point
from tests.faults.scenarios import Scenario
from tests.faults.world import LEASE, SUITES, World

COUNTS: Counter[str] = Counter()
"""How often each fault was tried, for the line in the test summary."""
SEEN: dict[str, int] = {}
"""Scenario → its points."""


class NotMet(Exception):
    """The call was not made this time: which there are depends on time where several threads run."""


Trial = Callable[["Scenario", Point, Fault], None]


@dataclass
class Lab:
    """Makes worlds in `base`, each used once."""

    base: Path
    config: Config
    hook_config: HookConfig
    progress: Progress
    made: int = 0

    @contextlib.contextmanager
    def world(self, scenario: Scenario) -> Iterator[World]:
        self.made += 1
        base = self.base / str(self.made)
        base.mkdir()
        world = World(base, self.config, self.hook_config, self.progress, ends=scenario.ends)
        scenario.prepare(world)
        yield world
        shutil.rmtree(base)     # kept where the check failed

    def points(self, scenario: Scenario) -> list[Point]:
        """The calls that a scenario makes, without faults."""
        with self.world(scenario) as world:
            ops = Faulty(world.base)
            scenario.act(world, ops)
            self.finish(scenario, world)
        return [p for p in ops.points if p.nth == 0 or not scenario.threads]

    def try_all(self, scenario: Scenario, trials: Callable[[int, Point], list[tuple[Fault, Trial]]]) -> None:
        """These trials at each point, which the function is given by number and content; all that went wrong, at once.
        """
        points = self.points(scenario)
        wrong, unmet = [], []
        for i, point in enumerate(points):
            for fault, trial in trials(i, point):
                try:
                    trial(scenario, point, fault)
                except NotMet:
                    unmet.append(str(point))
                    continue
                except Exception as error:
                    wrong.append(f"{fault.name} at {i}, {point}: {type(error).__name__}: {error} ({self.made})")
                COUNTS[fault.name] += 1
        SEEN[scenario.name] = len(points)
        assert not wrong, f"{len(wrong)} at {len(points)} points\n" + "\n".join(wrong)
        assert len(unmet) <= scenario.threads * len(points) // 10, f"not met: {unmet}"

    def finish(self, scenario: Scenario, world: World) -> None:
        """A fresh runner drains, and everything must hold."""
        scenario.meanwhile(world)
        world.drain()
        world.check()
        scenario.after(world)
        world.drain()
        world.check()

    def kill(self, scenario: Scenario, point: Point, fault: Fault) -> None:
        """In a child process, which dies there."""
        with self.world(scenario) as world:
            ops, said = Faulty(world.base, point, fault), world.base / "said"

            def act() -> None:
                scenario.act(world, ops)
                said.write_text("not met" if not ops.met else "not killed")

            if not os.WIFSIGNALED(_in_child(act, said)):
                raise NotMet if said.read_text() == "not met" else AssertionError(said.read_text())
            self.finish(scenario, world)

    def fault(self, scenario: Scenario, point: Point, fault: Fault) -> None:
        """In this process, whose caller is told of it, or is not, and may try again."""
        with self.world(scenario) as world:
            self._act(scenario, world, Faulty(world.base, point, fault))
            self.finish(scenario, world)

    def pause(self, scenario: Scenario, point: Point, fault: Fault) -> None:
        """The process stands still before the call, for so long that all it holds is taken over; then it goes on."""

        def stand_still(call: Callable[[], Any], name: str) -> Any:
            world.drain()
            return call()

        with self.world(scenario) as world:
            ops = Faulty(world.base, point, replace(fault, do=stand_still))
            self._act(scenario, world, ops)
            self.finish(scenario, world)

    def _act(self, scenario: Scenario, world: World, ops: Faulty) -> None:
        """As a caller that may be told of an error, and then tries again."""
        for _ in range(3):
            try:
                scenario.act(world, ops)
            except (OSError, AutoEvalError):
                ops.lasting = 0
                if scenario.again:
                    continue
            if not ops.met:
                raise NotMet
            return
        raise AssertionError("calling again does not help")


def _in_child(act: Callable[[], object], said: Path) -> int:
    """The wait status of a child process that did this; an error goes to the file."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            said.write_text(traceback.format_exc())
        finally:
            os._exit(3)
    return os.waitpid(pid, 0)[1]


def load(path: Path) -> tuple[Config, HookConfig]:
    """One configuration for both sides."""
    path.write_text(
        f"queue: queue\nrunner: {{lease: {LEASE}}}\nsinks: []\nsuites:\n"
        + "".join(f"  {s}: {{evaluators: [{{type: helm, entries: [{s}]}}]}}\n" for s in SUITES)
    )
    return configs.load(str(path)), hook_configs.load(path)
