"""Which target is given what, and in which turn: MLflow, trackio and TensorBoard sinks; no service is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import process, registry
from eval_runner.publisher import Publisher
from eval_runner.sinks import trackers
from eval_runner.sinks.base import Context, Sink, named
from eval_runner.sinks.mlflow import MlflowSink
from eval_runner.sinks.mlflow_store import MlflowStore
from eval_runner.sinks.tensorboard import TensorboardSink
from eval_runner.sinks.tracked import Entry, Value, entry
from tests import results_samples
from tests.sink_labs import RUN, scored


def sinks(root: Path, *entries: dict[str, Any]) -> dict[str, Sink]:
    """Of a configuration file in `root`, which is made where it is not there."""
    root.mkdir(exist_ok=True)
    file = root / "autoeval.yaml"
    text = {"queue": "queue", "suites": {"quick": {"evaluators": [{"type": "helm"}]}}, "sinks": entries}
    file.write_text(json.dumps(text))
    config = configs.load(file)
    return named((one["type"] for one in config.sinks), registry.build_sinks(config))


def test_a_target_is_known_by_what_the_file_says_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"type": "tensorboard", "log_dir": "${MOUNT}/tb"}
    names, leases = [], []
    for host in ("a", "b"):     # the same file, where the shared file system is mounted elsewhere
        monkeypatch.setenv("MOUNT", str(tmp_path / host))
        found = sinks(tmp_path / host, {"type": "wandb"}, one)
        names.append(list(found))
        leases.append(found[names[0][1]]._lease())  # type: ignore[attr-defined]
    assert names[0] == names[1]
    assert names[0][0] == "0-wandb"
    assert leases == [tmp_path / host / "tb" / ".autoeval-writer" for host in "ab"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret12@a:5000")
    others = sinks(tmp_path, {"type": "tensorboard", "log_dir": "other"}, {"type": "wandb"}, {"type": "mlflow"}, one)
    assert [*others][1] == "1-wandb"
    assert [*others][3] == names[0][1]
    assert len({*others, *names[0]}) == 5
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:another1@a:5000")
    assert [*sinks(tmp_path, {"type": "mlflow"})] == [[*others][2]]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:another1@b:5000")
    assert [*sinks(tmp_path, {"type": "mlflow"})] != [[*others][2]]


def test_a_new_target_is_given_what_was_evaluated_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorboardSink, "flush", lambda sink: False)
    root = results_samples.queue(tmp_path / "queue")
    results_samples.publish(root, scored(10))
    for log_dir in ("a", "b"):
        found = sinks(tmp_path, {"type": "tensorboard", "log_dir": log_dir})
        publisher = Publisher(Queue(str(root)), found)
        for name in found:
            (root / "published" / name).mkdir(parents=True)
        publisher.look()
        (sink,) = found.values()
        assert isinstance(sink, TensorboardSink)
        assert len(sink.spool.names()) == 1


def tensorboard(root: Path) -> TensorboardSink:
    return TensorboardSink({}, Context(root / "queue", "r", "sinks[0]", config_file=str(root / "autoeval.yaml")))


def test_what_cannot_be_shown_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a round in which nothing moved is followed by a pause."""
    monkeypatch.setattr(trackers, "BATCH", 3)
    now = [1000.0]
    monkeypatch.setattr(trackers, "clock", lambda: now[0])
    sink = tensorboard(tmp_path)
    for step in range(10, 110, 10):
        sink.publish(scored(step))
    names = sink.spool.names()
    bad = {*names[:5]}

    def bring(entries: Sequence[Entry]) -> str:
        for one in entries:
            if one.name not in bad:
                sink.spool.remove(one.name)
        return "it is refused" if {one.name for one in entries} & bad else ""

    monkeypatch.setattr(sink, "_bring", bring)
    assert not sink.flush()
    assert not sink.flush()         # a pause: the first three are all refused
    assert sink.spool.names() == names
    now[0] += trackers.PAUSE_S + 1
    for _ in range(4):
        assert not sink.flush()
    assert {*sink.spool.names()} == bad
    assert sink.spool.why() == "it is refused"


def test_after_one_that_took_too_long_fewer_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def slow(argv: list[str], **more: object) -> int:
        asked = json.loads(Path(argv[-1]).read_bytes())
        given.append(len(asked["entries"]))
        if given[-1] > 2:
            raise process.TimedOut("it took longer")
        answer = {"shown": [f"{e['point']['ticket']}~g{e['generation']}" for e in asked["entries"]], "standings": [],
                  "errors": {}, "probed": "", "holder": ""}  # fmt: skip
        Path(asked["answer"]).write_text(json.dumps(answer))
        return 0

    monkeypatch.setattr(process, "run", slow)
    monkeypatch.setattr(trackers, "PAUSE_S", 0.0)
    sink = tensorboard(tmp_path)
    for step in range(10, 110, 10):
        sink.publish(scored(step))
    while not sink.flush():
        assert len(given) < 20
    assert given == [10, 2, 4, 1, 2, 4, 1, 2, 2]


class Client:
    """A stand-in for MLflow's client: one run, and what was asked of it."""

    def __init__(self, *rows: Value) -> None:
        self.rows = [SimpleNamespace(key=v.key, step=v.step, timestamp=v.at, value=v.value) for v in rows]
        self.asked: list[str] = []

    def get_run(self, run: str) -> Any:
        latest = {m.key: m for m in sorted(self.rows, key=lambda m: (m.step, m.timestamp, m.value))}
        data = SimpleNamespace(tags={}, to_proto=lambda: SimpleNamespace(metrics=latest.values()))
        return SimpleNamespace(info=SimpleNamespace(run_id=run), data=data)

    def get_metric_history(self, run: str, key: str) -> list[Any]:
        self.asked.append(key)
        return [m for m in self.rows if m.key == key]


def test_mlflow_is_asked_for_a_history_only_where_the_latest_value_does_not_tell() -> None:
    ten, twenty, thirty = (entry(scored(step)) for step in (10, 20, 30))
    here = {step: MlflowStore(Client(), {}).wanted(one) for step, one in ((10, ten), (20, twenty), (30, thirty))}
    settings = {"run": "r", "experiment": ""}
    for rows, wanted, histories, held in (
        ((), [ten], 0, set()),
        (here[10], [ten], 0, {*here[10]}),
        (here[10], [ten, twenty], 0, {*here[10]}),
        (here[20], [ten], len(here[10]), {*here[20]}),
        ([*here[10], *here[20]], [ten], len(here[10]), {*here[10], *here[20]}),
        ([*here[10], *here[30]], [ten, thirty], len(here[10]), {*here[10], *here[30]}),
    ):
        client = Client(*rows)
        found = MlflowStore(client, settings).held(wanted, all_of_it=False)
        assert (len(client.asked), {*found}, len(found)) == (histories, held, len(held))


@pytest.mark.parametrize("by", ["environment", "file"])
def test_no_password_of_an_address_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    """Nor where the client names it in an error, which the queue then keeps."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = "http://bob:hunter2secret@127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI" if by == "environment" else "TRACKER", uri)
    (sink,) = sinks(tmp_path, {"type": "mlflow", **({"tracking_uri": "${TRACKER}"} if by == "file" else {})}).values()
    assert isinstance(sink, MlflowSink)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)        # what was there is known still
    monkeypatch.delenv("TRACKER", raising=False)
    told = f"BadError: {uri}/api, and bob:hunter2secret, hunter2secret"

    def fails(argv: list[str], *, log: Path, **more: object) -> int:
        asked = json.loads(Path(argv[-1]).read_bytes())
        if asked["what"] == "probe":
            log.write_text(f"{told}\n")
            return 1
        answer = {"shown": [], "standings": [], "errors": {RUN.key: told}, "probed": "", "holder": ""}
        Path(asked["answer"]).write_text(json.dumps(answer))
        return 0

    monkeypatch.setattr(process, "run", fails)
    sink.publish(scored(10))
    with caplog.at_level(logging.WARNING):
        assert not sink.flush()
    says = [sink.spool.why(), caplog.text, sink.compare([scored(10)], repair=False)[0].says]
    says += [finding.means for finding in sink.findings()[1:]]
    for one in says:
        assert "BadError: http://***" in one
        assert "hunter2" not in one
    for path in (tmp_path / "queue").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()
