"""What every sink must do with results that come late, out of order, again, from two runners, and after a kill.

Each sink is the real one, with the tracker's real client and its real storage; what it shows is read back with the
tracker's own reader (tests/sink_labs.py). W&B is offline here; test_wandb_*.py has it with a stand-in for the service.
MLflow takes seconds to be imported by each process: but for one test it is for `-m slow -k sinks`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks.queue import Queue
from eval_runner.cli import cli
from eval_runner.publisher import Publisher
from eval_runner.sinks import trackers
from eval_runner.sinks.base import Sink
from tests import results_samples
from tests.sink_labs import KEY, LABS, RUN, Lab, expected, mlflow_client, scored, tensorboard_events, trackio_runs
from tests.stand_ins import Shown
from tests.wandb_backend import environment

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("lab", LABS.values(), ids=LABS)


def labs(*, quick: tuple[str, ...], slow: tuple[str, ...]) -> pytest.MarkDecorator:
    """These by default, those where slow tests are wanted."""
    slowly = [pytest.param(LABS[name], id=name, marks=pytest.mark.slow) for name in slow]
    return pytest.mark.parametrize("lab", [*(pytest.param(LABS[name], id=name) for name in quick), *slowly])


@pytest.fixture(autouse=True)
def no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the caller's trackers, and no network."""
    for key, value in environment(tmp_path / "runner", "offline").items():
        monkeypatch.setenv(key, value)
    for key in ("MLFLOW_TRACKING_URI", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(trackers, "BUSY_S", 1.0)


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without a run: to make one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, lab: Lab, request: pytest.FixtureRequest) -> Path:
    """The directory of a lab."""
    if lab.type == "mlflow":
        shutil.copy(request.getfixturevalue("empty_mlflow"), tmp_path / "mlflow.db")
    return tmp_path


def flush(sink: Sink, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not sink.flush():
        assert time.monotonic() < end
        time.sleep(0.05)


@each
def test_late_out_of_order_repeated_and_from_two_at_once(root: Path, lab: Lab) -> None:
    sink = lab.sink(root)
    sink.publish(scored(30, tokens=30_000_000))
    flush(sink)
    assert lab.read(root) == expected(30)
    sinks = [lab.sink(root), lab.sink(root)]
    for one in sinks:
        for step in (40, 10, 20, 30):
            one.publish(scored(step, tokens=step * 1_000_000))
    threads = [threading.Thread(target=flush, args=(one,)) for one in sinks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = lab.read(root)
    # W&B's rows and trackio's stand in the order in which they came, or were evaluated; their charts sort by step.
    assert (found if lab.type == "tensorboard" else sorted(found)) == expected(10, 20, 30, 40)


_KILLED = """
import os, signal, sys
from pathlib import Path
from eval_runner import process
from tests.sink_labs import LABS, scored

real = process.run
def run(*args, **more):
    status = real(*args, **more)
    os.kill(os.getpid(), signal.SIGKILL)        # it is written, and nothing is marked
process.run = run
sink = LABS[sys.argv[1]].sink(Path(sys.argv[2]))
for step in (20, 10):
    sink.publish(scored(step))
sink.flush()
"""


@labs(quick=("wandb", "tensorboard"), slow=("mlflow", "trackio"))
def test_a_runner_that_is_killed_between_write_and_mark(root: Path, lab: Lab) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, lab.type, str(root)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -9, killed.stderr
    assert sorted(lab.read(root)) == expected(10, 20)
    sink = lab.sink(root)
    for step in (10, 20):
        sink.publish(scored(step))
    flush(sink)
    assert sorted(lab.read(root)) == expected(10, 20)


@labs(quick=("wandb", "trackio", "tensorboard"), slow=("mlflow",))
def test_a_target_that_is_away_stops_no_other_sink(
    tmp_path: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    root = results_samples.queue(tmp_path / "queue")
    results_samples.publish(root, scored(10))
    dead, shown = lab.sink(tmp_path, dead=True), Shown()
    publisher = Publisher(Queue(str(root)), {"0-dead": dead, "1-shown": shown})
    for name in ("0-dead", "1-shown"):
        (root / "published" / name).mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert not publisher.look()
    assert [r.step for r in shown.results] == [10]
    assert len([r for r in caplog.records if "not in" in r.message and "yet" in r.message]) == 1
    began = time.monotonic()
    assert not publisher.look()     # it is a time of pause: nothing is tried, and nothing is said again
    assert time.monotonic() - began < 1.0


@labs(quick=("tensorboard",), slow=("mlflow", "trackio"))
def test_sync_brings_back_what_is_missing(tmp_path: Path, lab: Lab) -> None:
    """Of W&B: test_wandb_sync.py."""
    root = results_samples.queue(tmp_path / "queue")
    for step in (10, 20):
        results_samples.publish(root, scored(step))
    sink = lab.sink(tmp_path)
    sink.publish(scored(20))
    flush(sink)
    config = tmp_path / "autoeval.yaml"
    entry = json.dumps({"type": lab.type, **lab.settings(tmp_path)})
    config.write_text(f"queue: queue\nsuites: {{quick: {{evaluators: [{{type: helm}}]}}}}\nsinks: [{entry}]\n")

    def sync(*options: str) -> tuple[int, dict[int, tuple[str, str]]]:
        done = CliRunner().invoke(cli, ["sync", "--config", str(config), "--json", *options], catch_exceptions=False)
        points = json.loads(done.stdout)["points"]
        return done.exit_code, {p["step"]: (p["was"], p["state"]) for p in points}

    assert sync("--dry-run") == (75, {10: ("missing", "missing"), 20: ("shown", "shown")})
    assert sync() == (0, {10: ("missing", "shown"), 20: ("shown", "shown")})
    assert lab.read(tmp_path) == expected(10, 20)


def test_a_step_that_was_evaluated_again(tmp_path: Path) -> None:
    """TensorBoard, which has one value at a step, shows the newer one, whichever comes first."""
    old, new = scored(10, 0.1), scored(10, 0.2, suite_digest="d" * 64, finished=scored(10).finished_at + 100)
    for order, root in (((old, new), tmp_path / "a"), ((new, old), tmp_path / "b")):
        (root / "at once").mkdir(parents=True)
        sink = LABS["tensorboard"].sink(root)
        for one in order:
            sink.publish(one)
            flush(sink)
        assert tensorboard_events(root) == [(10, 0.2)]
        sink = LABS["tensorboard"].sink(root / "at once")
        for one in order:
            sink.publish(one)
        flush(sink)
        assert tensorboard_events(root / "at once") == [(10, 0.2)]
        assert [(s.state, s.says) for s in sink.compare([old, new], repair=True)] == [
            ("shown", "a later result of this step stands in its place"), ("shown", ""),
        ]  # fmt: skip


_TRAINS = """
import trackio
trackio.init(project="p", name="the training", auto_log_cpu=False, auto_log_gpu=False)
for step in (1, 2, 3):
    trackio.log({"loss": 1.0}, step=step)
trackio.finish()
"""


@pytest.mark.slow
def test_trackio_joins_the_run_of_the_training_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    subprocess.run([sys.executable, "-c", _TRAINS], check=True, capture_output=True, timeout=120)
    sink = LABS["trackio"].sink(tmp_path)
    for run in (RUN, replace(RUN, id="another of that name", wandb_id="r2")):
        sink.publish(scored(10, run=run))
        sink.publish(scored(20, run=run))
        flush(sink)
    assert trackio_runs(tmp_path) == [
        {"loss": [1, 2, 3], KEY: [10, 20]},
        {KEY: [10, 20]},
    ]


def test_a_target_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file on a file server that is away; and the next one may write."""
    monkeypatch.setattr(trackers, "WRITE_S", 2.0)
    monkeypatch.setattr(trackers, "PAUSE_S", 0.0)
    sink = LABS["tensorboard"].sink(tmp_path)
    sink.publish(scored(10))
    flush(sink)
    (owner,) = (tmp_path / "tb").glob("*/autoeval-run.txt")
    owner.unlink()
    os.mkfifo(owner)        # to open it takes for ever
    sink.publish(scored(20))
    assert not sink.flush()
    (why,) = (tmp_path / "queue" / "sinks").glob("tensorboard-*/why")
    assert "gives no answer within 2 s" in why.read_text()
    assert os.listdir(tmp_path / "tb" / ".autoeval-writer") == ["free"]
    owner.unlink()
    monkeypatch.setattr(trackers, "WRITE_S", 60.0)
    flush(sink)
    assert tensorboard_events(tmp_path) == expected(10, 20)


@pytest.mark.slow
def test_a_service_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WRITE_S", 30.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
    with socket.create_server(("127.0.0.1", 0)) as listener:       # it takes connections, and never answers
        port = listener.getsockname()[1]
        hanging = replace(LABS["mlflow"], settings=lambda root: {"tracking_uri": f"http://127.0.0.1:{port}"})
        sink = hanging.sink(tmp_path)
        sink.publish(scored(10))
        assert not sink.flush()
        listener.settimeout(0.0)
        listener.accept()[0].close()        # it was asked
    (why,) = (tmp_path / "queue" / "sinks").glob("mlflow-*/why")
    assert "gives no answer within 30 s" in why.read_text()
