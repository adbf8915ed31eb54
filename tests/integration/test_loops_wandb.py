"""Scores come back into the W&B run of a loop, through the real client: all of them, and no training row moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loops import offline
from tests.wandb_runs import expected, rows, scores, training_rows

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("accelerate", "lightning")]


@pytest.mark.parametrize("kind", ["plain", *SLOW])
def test_points_join_the_rows_of_a_loop(tmp_path: Path, kind: str) -> None:
    config, found = tmp_path / "autoeval.yaml", {}
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\n")
    for how in ("without", "relay"):
        env = offline(tmp_path / how, "offline")
        argv = [sys.executable, "-m", "tests.wandb_loops", kind, str(tmp_path / how / "out"), str(config), how]
        done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "autoeval:" not in done.stderr, done.stderr
        found[how] = rows(tmp_path)
        if how == "without":
            assert not (tmp_path / "queue").exists()
            (log,) = tmp_path.rglob("run-r1.wandb")
            log.unlink()        # `rows` reads the first that is there
            log.parent.rename(log.parent.with_name("read"))
    assert scores(found["relay"]) == expected(30, 10, 20)
    assert len(found["without"]) == 12
    assert training_rows(found["relay"]) == training_rows(found["without"])    # every key, `_step` included
    (ended,) = (tmp_path / "queue/relay").glob("*/ended.json")
    assert json.loads(ended.read_text())["complete"] is True
