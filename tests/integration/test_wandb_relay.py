"""The relay in a process with the real wandb client, offline and online: scores arrive, training rows stay."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoeval_hooks import relay_files as files
from autoeval_hooks.relay_files import AXIS
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import WandbSink
from tests import wandb_log
from tests.wandb_runs import ROOT, Backend, backend, environment, expected, rows, scores, train, training_rows


@pytest.fixture(scope="module")
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("by_step", [False, True], ids=["huggingface", "by_step"])
def test_points_join_the_run_and_no_training_row_changes(
    tmp_path: Path, service: Backend, mode: str, by_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.runs.clear()
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    train(environment(plain, mode, service.url), plain / "q", 15, relay=False, by_step=by_step)
    without = rows(service if mode == "online" else plain)
    service.runs.clear()

    points = {"2": [30], "4": [10, 20]} if by_step else {"2": [30], "4": [10, 20], "end": [40, 50], "after": [15, 60]}
    done = train(environment(scored, mode, service.url), scored / "q", 15, by_step=by_step, planned=15, points=points)
    found = rows(service if mode == "online" else scored)

    assert training_rows(found) == without  # every key, `_step` included
    order = [30, 10, 20] if by_step else [30, 10, 20, 40, 50, 15, 60]  # as they came, not as they count
    assert scores(found) == expected(*order)
    assert all(row["bench/tokens"] == row[AXIS] / 8 for row in found if AXIS in row)
    if by_step:
        assert len(found) == 15  # no row of ours: the next step is free
    # A wandb call takes 0.15 ms. The bound is loose for a machine with neighbours.
    assert statistics.median(done["costs"]) < 0.001

    # The last points wait until the runner has seen their rows, and are not logged again.
    for key, value in environment(tmp_path / "runner", "online", service.url).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(files, "ENDED_STALE_S", 0.1)
    sink = WandbSink({}, Context(queue=scored / "q", runner="r-1", where="sinks[0]"))
    end = time.monotonic() + 20
    while not sink.flush() and time.monotonic() < end:
        time.sleep(0.05)
    assert sink.waiting == []
    assert rows(service if mode == "online" else scored) == found
    assert len(wandb_log.logs(scored, "r1")) == 1  # nor is there another log beside the training's
    assert len(os.listdir(scored / "q" / "relay" / done["key"] / "logged")) == len(order)


def test_each_metric_has_its_axis_and_the_trainers_definitions_stay(tmp_path: Path) -> None:
    env = environment(tmp_path, "offline")
    train(env, tmp_path / "q", 6, points={"1": [30]})
    axes = wandb_log.definitions(wandb_log.logs(tmp_path)[0])
    assert axes["*"] == "train/global_step"
    assert axes["bench/s/arc/acc"] == axes["bench/lag_s"] == AXIS
    assert axes[AXIS] == ""


def test_points_that_a_by_step_run_cannot_take_wait(tmp_path: Path) -> None:
    env = environment(tmp_path, "offline")
    done = train(env, tmp_path / "q", 8, by_step=True, planned=8, points={"2": [5], "end": [6, 7]})
    assert scores(rows(tmp_path)) == expected(5)
    directory = tmp_path / "q" / "relay" / done["key"]
    assert len(os.listdir(directory / "points")) == 2
    assert '"complete": true' in (directory / "ended.json").read_text()


def test_disabled_mode_has_no_relay(tmp_path: Path) -> None:
    done = train(environment(tmp_path, "disabled"), tmp_path / "q", 3)
    assert done["mode"] == ""
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path: Path) -> None:
    """Bit-identical weights, the same training rows, and every score once, against the Trainer's own W&B callback."""
    printed, found = {}, {}
    for kind in ("plain", "relay"):
        env = environment(tmp_path / kind, "offline") | {"WANDB_RUN_ID": "r1", "WANDB_PROJECT": "p"}
        done = subprocess.run(
            [sys.executable, "-m", "tests.wandb_hf_trainer", str(tmp_path / "out"), str(tmp_path / "q"), kind],
            env=env, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "autoeval" not in done.stderr, done.stderr
        printed[kind] = done.stdout.splitlines()[-1]
        found[kind] = rows(tmp_path / kind)
    assert printed["relay"] == printed["plain"]
    assert scores(found["relay"]) == expected(2, 4, 8, 6)
    timed = ("train/train_runtime", "train/train_samples_per_second", "train/train_steps_per_second")
    trained = {
        kind: [
            {k: v for k, v in row.items() if not k.startswith("bench/") and k not in timed}
            for row in rows_
            if "train/global_step" in row
        ]
        for kind, rows_ in found.items()
    }
    assert trained["relay"] == trained["plain"]
    assert len(trained["plain"]) == 9  # 8 losses and the summary of the training
    assert all("train/global_step" not in row for row in found["relay"][-2:])  # ours alone never have it
