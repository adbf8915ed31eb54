"""The sinks against real servers on loopback: MLflow's, and TensorBoard's own, which reads while the sink writes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode

import pytest

from eval_runner.sinks.base import Sink
from tests.sink_labs import KEY, LABS, RUN, Lab, expected, mlflow_history, scored

pytestmark = pytest.mark.slow      # `-k sinks`


@contextlib.contextmanager
def server(argv: list[str], log: Path, url: str) -> Iterator[str]:
    """A server of these arguments, once it answers; it is gone when the block ends."""
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=env, cwd=log.parent, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.URLError, http.client.HTTPException, OSError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)      # a session of its own
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def flush(sink: Sink) -> None:
    end = time.monotonic() + 240
    while not sink.flush():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root, port = tmp_path_factory.mktemp("mlflow"), free_port()
    argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{root}/mlflow.db"]  # fmt: skip
    with server(argv, root / "log", f"http://127.0.0.1:{port}/health") as url:
        yield url.removesuffix("/health")


def test_mlflow_by_its_server(tmp_path: Path, mlflow_server: str) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    lab = replace(LABS["mlflow"], settings=lambda root: {"tracking_uri": mlflow_server, "experiment": "e"})
    sink = lab.sink(tmp_path)
    for step in (30, 10):
        sink.publish(scored(step))
    flush(sink)
    assert mlflow_history(mlflow_server) == expected(10, 30)
    client = MlflowClient(tracking_uri=mlflow_server)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.status == "FINISHED"
    # A client that looked before another had written logs the same: the store has one row of it.
    at = round(scored(10).finished_at * 1000)
    client.log_batch(run.info.run_id, metrics=[Metric(KEY, 0.01, at, 10)])
    assert mlflow_history(mlflow_server) == expected(10, 30)
    assert [s.state for s in sink.compare([scored(10), scored(30)], repair=False)] == ["shown", "shown"]
    client.log_metric(run.info.run_id, KEY, 0.5, timestamp=at + 1, step=10)
    assert {s.state for s in sink.compare([scored(10), scored(30)], repair=False)} == {"shown", "unknown"}


def test_mlflow_joins_the_run_of_the_training(tmp_path: Path, mlflow_server: str) -> None:
    """Which goes on, and whose own metrics stay as they are; a second training is refused there."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=mlflow_server)
    run = client.create_run(client.create_experiment("training")).info.run_id
    client.log_metric(run, "loss", 2.5, step=7)
    lab = replace(LABS["mlflow"], settings=lambda root: {"tracking_uri": mlflow_server, "run": run})
    sink = lab.sink(tmp_path)
    sink.publish(scored(10))
    flush(sink)
    found = client.get_run(run)
    assert (found.info.status, found.data.metrics["loss"], found.data.metrics[KEY]) == ("RUNNING", 2.5, 0.01)
    sink.publish(scored(10, run=replace(RUN, id="another", wandb_id="r2")))
    assert not sink.flush()
    why = next((tmp_path / "queue" / "sinks").glob("mlflow-*/why")).read_text()
    assert f"the MLflow run {run} shows the training ours, not another" in why
    assert client.get_run(run).data.metrics[KEY] == 0.01


@pytest.mark.parametrize("fast", ["true", "false"])
def test_tensorboard_reads_late_values_while_they_come(tmp_path: Path, fast: str) -> None:
    """By its data server, which is in Rust, and by its readers in Python."""
    lab: Lab = LABS["tensorboard"]
    sink = lab.sink(tmp_path)
    for step in (20, 40):
        sink.publish(scored(step))
    flush(sink)
    argv = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "tb"), "--host", "127.0.0.1",
            "--port", str(port := free_port()), "--reload_interval", "1", f"--load_fast={fast}"]  # fmt: skip
    with server(argv, tmp_path / "log", f"http://127.0.0.1:{port}/data/environment"):
        wait(port, expected(20, 40))
        for late in (30, 10, 50):
            sink.publish(scored(late))
            flush(sink)
        wait(port, expected(10, 20, 30, 40, 50))
        file = max((tmp_path / "tb").glob("*/quick/events*"))
        with file.open("ab") as torn:       # a writer dies amid a record, and the reader sees its beginning
            torn.write(b"\x10\0\0\0\0\0\0\0\1\2")
        time.sleep(2.5)
        sink.publish(scored(5))
        flush(sink)
        wait(port, expected(5, 10, 20, 30, 40, 50))


def wait(port: int, curve: list[tuple[int, float]]) -> None:
    """Until TensorBoard shows this curve, in this order."""
    found: object = None
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.HTTPError):
            runs = json.loads(get(port, "data/runs"))
            query = urlencode({"run": runs[0] if runs else "", "tag": KEY})
            scalars = json.loads(get(port, f"data/plugin/scalars/scalars?{query}"))
            found = [(step, round(value, 6)) for _, step, value in scalars]
            if found == curve:
                return
        time.sleep(0.3)
    raise AssertionError(f"TensorBoard shows {found}, not {curve}")


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
        data: bytes = answer.read()
        return data
