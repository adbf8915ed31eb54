"""A runner over a real queue, with a stand-in for its evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eval_runner import config as configs
from eval_runner import runner as runners
from eval_runner.evaluators.base import Evaluator
from eval_runner.progress import Progress
from eval_runner.runner import Runner
from tests.stand_ins import Shown


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        "queue: queue\nrunner: {lease: 6.0}\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n"
    )
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "RETRY_S", 0.01)
    monkeypatch.setattr("eval_runner.publisher.PERIOD_S", 0.05)


@pytest.fixture
def run(config_file: Path, quick: None) -> Iterator[Callable[..., Runner]]:
    """Run until the queue is empty (or `mode`), with these parts."""
    with Progress() as progress:

        def go(evaluator: Evaluator, *, sink: Shown | None = None, mode: str = "drain", name: str = "r1") -> Runner:
            config = configs.load(str(config_file))
            runner = Runner(config, {"quick": [evaluator]}, {"shown": sink} if sink else {}, progress, name=name)
            assert runner.run(mode)  # type: ignore[arg-type]
            return runner

        yield go
