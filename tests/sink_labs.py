"""A lab for each sink: where it writes in a test, and what the tracker's own reader finds there afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoeval_hooks.relay_files import AXIS
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import registry
from eval_runner.results.schema import Result
from eval_runner.sinks.base import Context, Sink
from tests import wandb_log
from tests.results_samples import result, score

KEY = "bench/quick/mcqa/exact_match"
RUN = RunIdentity(id="ours", name="the training", project="p", wandb_id="r1", wandb_mode="offline")

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Lab:
    """`settings` of a target below a directory, and of one that cannot be written to; `read` gives (step, value) of
    `KEY` as the tracker's own reader finds them, in its order."""

    type: str
    settings: Callable[[Path], dict[str, Any]]
    dead: Callable[[Path], dict[str, Any]]
    read: Callable[[Path], Curve]

    def sink(self, root: Path, *, dead: bool = False) -> Sink:
        """A sink object of the queue `root/queue`."""
        context = Context(queue=root / "queue", runner="r", where="sinks[0]", config_file=str(root / "autoeval.yaml"))
        made: Sink = registry.get("sinks", self.type, "here")((self.dead if dead else self.settings)(root), context)
        return made


def scored(step: int, value: float | None = None, *, run: RunIdentity = RUN, **more: Any) -> Result:
    """A result whose `KEY` is a thousandth of its step, unless told."""
    return replace(result(step, score(step / 1000 if value is None else value, 0.01), **more), run=run)


def expected(*steps: int) -> Curve:
    return [(step, step / 1000) for step in steps]


def wandb_rows(root: Path) -> Curve:
    """Of the run beside the training's: nobody says that this one has no writer."""
    found = [row for path in wandb_log.logs(root / "wandb", "r1-eval") for row in wandb_log.rows(path)]
    return wandb_log.series(found, KEY, AXIS)


def mlflow_client(uri: str) -> Any:
    """MLflow's own, which tells nobody that it was used."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")     # before it is imported
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def mlflow_history(uri: str) -> Curve:
    """Of the one run of the one experiment that there is beside MLflow's own."""
    client = mlflow_client(uri)
    experiments = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    (run,) = client.search_runs(experiments)
    assert run.info.run_name == "the training"
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, KEY))


_TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs("p"))
print(json.dumps([SQLiteStorage.get_logs("p", run.name, run_id=run.id) for run in runs], default=str))
"""


def trackio_logs(root: Path) -> Curve:
    """Of all runs of the project."""
    return [(row["step"], row[KEY]) for rows in _trackio(root) for row in rows if KEY in row]


def trackio_runs(root: Path) -> list[dict[str, list[int]]]:
    """Which steps each run has of the loss and of `KEY`; the run with most first."""
    runs = [{key: [row["step"] for row in rows if key in row] for key in ("loss", KEY)} for rows in _trackio(root)]
    return sorted(({key: steps for key, steps in run.items() if steps} for run in runs), key=len, reverse=True)


def _trackio(root: Path) -> list[list[dict[str, Any]]]:
    """The rows of each run; in a process of its own, since trackio notes its directory while it is imported."""
    env = {**os.environ, "TRACKIO_DIR": str(root / "trackio"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", _TRACKIO], env=env, check=True, capture_output=True, text=True).stdout
    found: list[list[dict[str, Any]]] = json.loads(out.splitlines()[-1])
    return found


def tensorboard_events(root: Path, suite: str = "quick") -> Curve:
    """Rounded to what 32 bits hold of a thousandth."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (path for path in (root / "tb").glob(f"*/{suite}") if path.is_dir())
    events = EventAccumulator(str(directory)).Reload()
    return [(e.step, round(e.value, 6)) for e in events.Scalars(KEY)]


def _file(root: Path) -> str:
    """Where a directory should be, there is a file."""
    (root / "file").touch()
    return str(root / "file" / "below")


LABS = {
    lab.type: lab
    for lab in (
        Lab("wandb", lambda root: {"late": "companion", "dir": str(root / "wandb")},
            lambda root: {"late": "companion", "dir": _file(root)}, wandb_rows),
        Lab("mlflow", lambda root: {"tracking_uri": "sqlite:///mlflow.db"},
            lambda root: {"tracking_uri": "http://127.0.0.1:9"},
            lambda root: mlflow_history(f"sqlite:///{root}/mlflow.db")),
        Lab("trackio", lambda root: {"dir": "trackio"}, lambda root: {"dir": _file(root)}, trackio_logs),
        Lab("tensorboard", lambda root: {"log_dir": "tb"}, lambda root: {"log_dir": _file(root)}, tensorboard_events),
    )
}  # fmt: skip
