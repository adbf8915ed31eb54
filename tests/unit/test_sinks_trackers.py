"""What the MLflow, trackio and TensorBoard sinks have in common, and the edges of each; no service is asked."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError, TicketError
from autoeval_hooks.fsio import FileOps
from eval_runner.sinks import mlflow, tensorboard, trackers, trackio
from eval_runner.sinks.base import Context
from eval_runner.sinks.mlflow_store import name
from eval_runner.sinks.tensorboard_store import TensorboardStore
from eval_runner.sinks.tracked import Entry, Missing, Refused, Value, absent, entry, standings
from eval_runner.sinks.tracker import Request, said, work
from tests.sink_labs import KEY, LABS, RUN, expected, scored, tensorboard_events

KINDS = {"mlflow": mlflow.MlflowSink, "trackio": trackio.TrackioSink, "tensorboard": tensorboard.TensorboardSink}


class Memory:
    """A stand-in for a tracker: a list."""

    newest_wins = False

    def __init__(self, *values: Value) -> None:
        self.values = list(values)

    def wanted(self, entry: Entry) -> list[Value]:
        return [Value(key, entry.point.step, entry.at, value) for key, value in entry.metrics().items()]

    def held(self, entries: Sequence[Entry], *, all_of_it: bool) -> list[Value]:
        if entries[0].run.id == "away":
            raise OSError("no route to host")
        return self.values

    def add(self, missing: Missing) -> None:
        self.values += [value for _, values in missing for value in values]

    def probe(self) -> str:
        return "is a list"


def states(store: Memory, *entries: Entry) -> list[str]:
    return [s.state for s in standings(entries, store, store.values)]


def test_what_was_cut_off_is_completed_and_no_more() -> None:
    store, one = Memory(), entry(scored(10))
    store.values = store.wanted(one)[:2]
    assert states(store, one) == ["missing"]
    (_, values), = absent([one], store, store.values)
    assert values == store.wanted(one)[2:]
    store.add([(one, values)])
    assert states(store, one) == ["shown"]
    assert absent([one], store, store.values) == []


def test_what_two_results_share_is_logged_once() -> None:
    one, two = entry(scored(10)), entry(replace(scored(10), suite="other"))
    shared = {*Memory().wanted(one)} & {*Memory().wanted(two)}
    assert {v.key for v in shared} == {"bench/lag_s", "bench/eval_s"}
    logged = [v for _, values in absent([one, two], Memory(), ()) for v in values]
    assert len(logged) == len(set(logged))


def test_other_values_and_values_of_nobody_are_told() -> None:
    one, stray = entry(scored(10)), Value("bench/quick/x/y", 7, 5, 1.0)
    wanted = Memory().wanted(one)
    other = Memory(wanted[0]._replace(value=0.5), *wanted[1:], stray)
    assert states(other, one) == ["different", "unknown"]
    assert standings([one], other, other.values)[0].says == f"{KEY} is 0.5, not 0.01"
    assert states(Memory(*wanted, wanted[0]), one) == ["twice"]


class Deaf(Memory):
    """Takes everything, and keeps what is of step 20."""

    def add(self, missing: Missing) -> None:
        super().add([(one, values) for one, values in missing if one.point.step == 20])


def test_what_is_not_there_after_it_was_logged_is_an_error() -> None:
    one, two = entry(scored(10)), entry(scored(20))
    answer = work(Request("write", "", {}, (one, two), "", "", "", ""), Deaf())
    assert answer.shown == [two.name]
    assert answer.errors == {RUN.key: f"1 result(s) were logged and are not there, such as {KEY} at step 10"}


def test_an_error_is_one_line_without_a_password() -> None:
    """In the process that logs, too."""
    assert said(OSError("no\nroute to http://me:abcdefgh@host/x")) == "OSError: no route to http://***@host/x"


def test_one_run_that_fails_does_not_hold_up_the_others() -> None:
    away = entry(scored(10, run=replace(RUN, id="away", wandb_id="")))
    request = Request("write", "", {}, (away, entry(scored(20))), "", "", "", "")
    answer = work(request, Memory())
    assert answer.shown == [entry(scored(20)).name]
    assert answer.errors == {away.run.key: "OSError: no route to host"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_is_missing_is_named_with_its_extra(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"sinks\[0\]: the Python package {kind} is not .*autoeval-hooks\[{kind}\]"):
        LABS[kind].sink(tmp_path)


def make(kind: str, tmp_path: Path, **settings: object) -> trackers.TrackerSink:
    where = Context(tmp_path / "queue", "r", "sinks[2]", config_file=str(tmp_path / "autoeval.yaml"))
    return KINDS[kind](settings, where)


def test_where_mlflow_is_must_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"autoeval.yaml: sinks\[2\].tracking_uri: missing.*MLFLOW_TRACKING_URI"):
        make("mlflow", tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:5000/x")
    assert make("mlflow", tmp_path)._target() == "MLflow at http://127.0.0.1:5000/x"
    monkeypatch.setattr(mlflow, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a database needs the whole of MLflow: pip install mlflow"):
        make("mlflow", tmp_path, tracking_uri="sqlite:///mlflow.db")


def test_doctor_makes_no_database_and_names_a_directory_that_is_not_there(tmp_path: Path) -> None:
    found = make("mlflow", tmp_path, tracking_uri="sqlite:///mlflow.db").findings()
    assert [f.level for f in found] == ["ok", "ok"]
    found = make("mlflow", tmp_path, tracking_uri="sqlite:///no/mlflow.db").findings()
    assert (found[1].level, found[1].what) == ("problem", "sinks[2]")
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_that_a_target_is_closed_and_what_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sink = make("tensorboard", tmp_path, log_dir="file/below")
    sink.publish(scored(10))
    found = sink.findings()
    assert [f.level for f in found] == ["ok", "warning", "warning"]
    assert f"{tmp_path}/file is no directory that this user can write to" in found[1].means
    assert found[2].means.startswith("1 result(s) wait for TensorBoard's")
    assert make("tensorboard", tmp_path).findings()[1].level == "ok"


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("bench/quick/mcqa/f1 @ 3:x-y_z.w", "bench/quick/mcqa/f1 _ 3:x-y_z.w-"),
        ("bench/quick/mmlu:subject=anatomy/em", "bench/quick/mmlu:subject_anatomy-"),
        ("bench/quick/a:b_c.d-e/em", "bench/quick/a:b_c.d-e/em"),
        ("bench/quick/../em", "bench/quick/-"),
        (f"bench/{'x' * 300}", f"bench/{'x' * 237}-"),
    ],
)
def test_names_that_mlflow_takes(key: str, wanted: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert name(key).startswith(wanted)
    _validate_metric_name(name(key))


def test_no_two_scores_share_a_name_in_mlflow() -> None:
    keys = ["a=b", "a,b", "a_b", "a(b", ".", "..", "", f"{'x' * 300}", f"{'x' * 301}"]
    assert len({name(f"bench/{key}/em") for key in keys}) == len(keys)


def test_a_value_beyond_32_bits_is_refused_by_tensorboard_alone(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match=rf"{KEY} is 1e\+39, which is more"):
        make("tensorboard", tmp_path).publish(scored(10, 1e39))
    make("trackio", tmp_path).publish(scored(10, 1e39))


def show(root: Path, *steps: int, run: str = "") -> None:
    """By the store itself, in this process."""
    store = TensorboardStore(root / "tb", run)
    entries = [entry(scored(step)) for step in steps]
    if missing := absent(entries, store, store.held(entries, all_of_it=False)):
        store.add(missing)


def test_a_record_of_tensorboards_that_was_cut_off_is_left_behind(tmp_path: Path) -> None:
    show(tmp_path, 20, 10)
    (file,) = (tmp_path / "tb").glob("*/quick/events*")
    whole = file.read_bytes()
    for cut in range(1, 60, 7):     # the last event is of step 20
        file.write_bytes(whole[:-cut])
        show(tmp_path, 20)
        assert tensorboard_events(tmp_path) == [(10, 0.01), (20, 0.02)]
        assert file.read_bytes() == whole[:-cut]
        (second,) = (path for path in file.parent.iterdir() if path != file)
        second.unlink()


def test_tensorboards_files_grow_only_where_something_is_new(tmp_path: Path) -> None:
    show(tmp_path, 30)
    show(tmp_path, 10)
    show(tmp_path, 50)
    files = sorted((tmp_path / "tb").glob("*/quick/*"))
    assert [path.name[-10:] for path in files] == ["1.autoeval", "2.autoeval"]      # 50 is no late one
    before = [path.read_bytes() for path in files]
    show(tmp_path, 10, 30, 50)
    assert [path.read_bytes() for path in files] == before
    assert tensorboard_events(tmp_path) == [(10, 0.01), (30, 0.03), (50, 0.05)]


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """A write is cut off at so many bytes of a file, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [10, 25, 50])
def test_tensorboard_loses_nothing_that_is_shown_wherever_a_write_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(FileOps, "unlink", lambda ops, path: None)      # who is killed removes nothing
    before = [20, 30, 40]
    show(tmp_path / "old", *before)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    show(tmp_path / "new", step)
    new = max((tmp_path / "new").glob("tb/*/quick/*"))
    grown = new.name.endswith("1.autoeval")
    (old,) = (tmp_path / "old").glob("tb/*/quick/*")
    root, everything = tmp_path / "cut", sorted([*before, step])
    # At every byte; of a file that appears by a rename, at every tenth.
    for cut in range(old.stat().st_size if grown else 0, new.stat().st_size, 1 if grown else 10):
        shutil.copytree(tmp_path / "old", root)
        with pytest.raises(OSError), no_file_beyond(cut):  # noqa: PT011  # which one, is the system's
            show(root, step)
        assert tensorboard_events(root) == expected(*before)
        show(root, step)        # what waits is this one alone
        assert tensorboard_events(root) == expected(*everything)
        entries = [entry(scored(one)) for one in everything]
        store = TensorboardStore(root / "tb", "")
        assert {s.state for s in standings(entries, store, store.held(entries, all_of_it=True))} == {"shown"}
        shutil.rmtree(root)


def test_tensorboard_writes_beside_no_other_writer_and_for_no_other_training(tmp_path: Path) -> None:
    show(tmp_path, 10, run="mine")
    other = tmp_path / "tb" / "mine" / "quick" / "events.out.tfevents.1700000000.host.1.0"
    other.touch()
    with pytest.raises(Refused, match="holds an event file of another writer"):
        show(tmp_path, 20, run="mine")
    other.unlink()
    (tmp_path / "tb" / "mine" / "autoeval-run.txt").write_text("another\n")
    with pytest.raises(Refused, match="shows the training another, not ours"):
        show(tmp_path, 20, run="mine")
    with pytest.raises(ConfigError, match=r"sinks\[2\].run: '../x' is not a name in log_dir"):
        make("tensorboard", tmp_path, run="../x")


def test_what_waits_and_cannot_be_read_is_left_to_sync(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = make("tensorboard", tmp_path)
    sink.publish(scored(10))
    (file,) = sink.spool.root.glob("waiting/*")
    file.write_text(json.dumps({"step": 1}))
    with caplog.at_level(logging.WARNING):
        assert sink.flush()
    assert "`autoeval-runner sync` brings it" in caplog.text
    assert [s.state for s in sink.compare([scored(10)], repair=True)] == ["missing"]
    assert sink.flush()
    assert [s.state for s in sink.compare([scored(10)], repair=True)] == ["shown"]


def test_a_target_that_another_runner_writes_to_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until nothing is seen of that one for a while; nothing is said of it."""
    sink = make("tensorboard", tmp_path)
    sink.publish(scored(10))
    writer = tmp_path / "queue" / "tensorboard" / ".autoeval-writer"
    writer.mkdir(parents=True)
    (writer / "somebody").write_text("1\n")
    monkeypatch.setattr(trackers, "BUSY_S", 0.0)
    with caplog.at_level(logging.WARNING):
        assert not sink.flush()
    assert caplog.records == []
    monkeypatch.setattr(trackers.wandb_lease, "STALE_S", 0.0)
    assert sink.flush()
