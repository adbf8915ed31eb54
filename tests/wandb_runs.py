"""Helpers of the W&B tests: run a stand-in trainer, make results, and read a run back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoeval_hooks.relay_files import AXIS
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.results.schema import Evaluation, Result, Score
from tests import wandb_log
from tests.wandb_backend import API_KEY, ENTITY, Backend, backend, environment

__all__ = ["API_KEY", "Backend", "backend", "environment"]
ROOT = Path(__file__).parents[1]
SCORE = "bench/s/arc/acc"
IDENTITY = RunIdentity(id="ours", name="the training", project="p", entity=ENTITY, wandb_id="r1", wandb_group="g")


def train(env: dict[str, str], queue: Path, steps: int, *, status: int = 0, **spec: Any) -> dict[str, Any]:
    """Run tests/wandb_trainer.py to its end; what it printed."""
    spec = {"queue": str(queue), "steps": steps, **spec}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "wandb_trainer.py"), json.dumps(spec)],
        env=env, cwd=queue.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:]
    assert "autoeval" not in done.stderr, done.stderr  # no warning of ours
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def result(step: int, run: RunIdentity = IDENTITY) -> Result:
    """The result whose point the stand-in trainer drops for the same step."""
    score = Score("arc", "acc", "test", step / 1000, 100)
    return Result(
        version=1, ticket=f"{step:064x}", generation=0, runner="r", status="ok", suite="s", suite_digest="",
        suite_text="", run=run, checkpoint="", checkpoint_digest="", step=step, tokens=None, saved_at=0.0,
        started_at=0.0, finished_at=step + 0.123456789, evaluations=(Evaluation("fake", 1.0, (score,)),),
    )  # fmt: skip


def rows(where: Backend | Path) -> list[dict[str, Any]]:
    """The history of run r1, without W&B's clock: as the service has it, or of the first offline directory."""
    if isinstance(where, Path):
        return wandb_log.rows(wandb_log.logs(where, "r1")[0])
    found = where.run("p", "r1").history()
    return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in found]


def scores(found: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """(bench/step, score) in order of the rows."""
    return wandb_log.series(found, SCORE, AXIS)


def expected(*steps: int) -> list[tuple[int, float]]:
    return [(step, step / 1000) for step in steps]


def training_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that training logged, less what is ours in them."""
    own = [{k: v for k, v in row.items() if not k.startswith("bench/")} for row in found]
    return [row for row in own if "loss" in row]


def with_mode(mode: str) -> RunIdentity:
    return replace(IDENTITY, wandb_mode=mode, entity="" if mode == "offline" else ENTITY)
