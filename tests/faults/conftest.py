"""The laboratory of the fault tests, and the line on it in the summary."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoeval_hooks import manifest
from eval_runner import publisher, runner
from eval_runner.progress import Progress
from tests.faults.harness import COUNTS, SEEN, Lab, load


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(runner, "RETRY_S", 0.001)
    monkeypatch.setattr(runner, "IDLE_S", (0.001, 0.01))
    monkeypatch.setattr(runner, "SETTLE_S", 60.0)
    fast = SimpleNamespace(time=time.time, monotonic=lambda: 60 * time.monotonic())     # its housekeeping is due sooner
    monkeypatch.setattr(runner, "time", fast)
    monkeypatch.setattr(publisher, "PERIOD_S", 0.005)
    # A file of 200 bytes is large: it is linked into a pin, and digested by its ends and blocks.
    for name, value in (("WHOLE", 64), ("END", 16), ("BLOCK", 4), ("BLOCKS", 4)):
        monkeypatch.setattr(manifest, name, value)
    with Progress() as progress:
        yield Lab(tmp_path, *load(tmp_path / "autoeval.yaml"), progress)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        tried = ", ".join(f"{n} {what}" for what, n in COUNTS.items())
        terminalreporter.write_line(f"faults: {sum(SEEN.values())} points in {len(SEEN)} scenarios: {tried}")
