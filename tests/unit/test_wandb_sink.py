"""The W&B sink's decisions and files, without W&B: a stand-in takes the place of the writer process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import relay_files as files
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.sinks import wandb as sinks
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb import TABLE, WandbSink, close_run, decide
from eval_runner.sinks.wandb_writer import BUSY, Request, Target, _from_config
from tests.wandb_runs import IDENTITY, result
from tests.wandb_trainer import drop, point

BEAT = "a 00000000000000000001\n"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sink's clock; set now[0]."""
    time = [1000.0]
    monkeypatch.setattr(files, "clock", lambda: time[0])
    return time


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the writer process: it delivers all, or ends with the status that is put in `writer[0]`.
    The requests it was given follow."""
    calls: list[Any] = [0]

    def run(argv: list[str], **kwargs: Any) -> int:
        calls.append((files.parse(Request, Path(argv[-1]).read_bytes(), "request"), kwargs))
        kwargs["log"].write_text("it said this\n")
        if isinstance(calls[0], Exception):
            raise calls[0]
        for path in calls[-1][0].points if calls[0] == 0 else ():
            os.rename(path, Path(calls[-1][0].logged) / f"{Path(path).name.split('~')[0]}.json")
        return int(calls[0])

    monkeypatch.setattr(sinks.process, "run", run)
    return calls


@pytest.fixture
def make_sink(tmp_path: Path) -> Callable[..., WandbSink]:
    def make(**settings: Any) -> WandbSink:
        return WandbSink(settings, Context(queue=tmp_path, runner="r-1", where="sinks[0]", config_file="a.yaml"))

    return make


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run's directory with one point and a heartbeat, as the hook and a runner leave it."""
    path = tmp_path / "relay" / IDENTITY.key
    for part in ("points", "taken", "logged"):
        (path / part).mkdir(parents=True)
    drop(path, [5])
    (path / "heartbeat").write_text(BEAT)
    announce(path)
    return path


def announce(path: Path, *, by_step: bool = False, ended: bool | None = None, of: str = "a") -> None:
    record = files.Announcement(files.VERSION, IDENTITY, "a", by_step, 10)
    (path / "run.json").write_bytes(files.encode(record))
    if ended is not None:
        (path / "ended.json").write_bytes(files.encode(files.Ended(files.VERSION, of, 10, ended)))


# hook, closed, free, late → what is done
EXPECTED = {
    ("alive", False, False, "wait"): "relay", ("alive", False, False, "companion"): "relay",
    ("alive", False, True, "wait"): "relay", ("alive", False, True, "companion"): "relay",
    ("alive", True, False, "wait"): "relay", ("alive", True, False, "companion"): "relay",
    ("alive", True, True, "wait"): "relay", ("alive", True, True, "companion"): "relay",
    ("unclear", False, False, "wait"): "wait", ("unclear", False, False, "companion"): "wait",
    ("unclear", False, True, "wait"): "wait", ("unclear", False, True, "companion"): "wait",
    ("unclear", True, False, "wait"): "wait", ("unclear", True, False, "companion"): "wait",
    ("unclear", True, True, "wait"): "wait", ("unclear", True, True, "companion"): "wait",
    ("gone", False, False, "wait"): "wait", ("gone", False, False, "companion"): "companion",
    ("gone", False, True, "wait"): "write", ("gone", False, True, "companion"): "write",
    ("gone", True, False, "wait"): "write", ("gone", True, False, "companion"): "write",
    ("gone", True, True, "wait"): "write", ("gone", True, True, "companion"): "write",
    ("none", False, False, "wait"): "wait", ("none", False, False, "companion"): "companion",
    ("none", False, True, "wait"): "wait", ("none", False, True, "companion"): "companion",
    ("none", True, False, "wait"): "write", ("none", True, False, "companion"): "write",
    ("none", True, True, "wait"): "write", ("none", True, True, "companion"): "write",
}  # fmt: skip


def test_every_case_has_its_way() -> None:
    cases = itertools.product(("alive", "unclear", "gone", "none"), (False, True), (False, True), ("wait", "companion"))
    found = {(h, c, f, late): decide(h, closed=c, free=f, late=late) for h, c, f, late in cases}  # type: ignore[arg-type]
    assert {case: found[case].way for case in found} == EXPECTED
    assert set(map(id, found.values())) == set(map(id, TABLE))  # no row of the table is dead
    assert all(case.why for case in TABLE)


@pytest.mark.parametrize(
    ("ended", "of", "by_step", "still"),
    [
        (None, "a", False, files.STALE_S),
        (True, "a", False, files.ENDED_STALE_S),
        (True, "a", True, files.ENDED_STALE_S),
        (True, "another", False, files.STALE_S),  # the end of an earlier training says nothing of this one
    ],
)
def test_only_a_heartbeat_that_stands_still_for_long_enough_is_a_dead_hook(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any],
    ended: bool | None, of: str, by_step: bool, still: float,
) -> None:  # fmt: skip
    announce(directory, by_step=by_step, ended=ended, of=of)
    sink = make_sink()
    assert not sink.flush()  # the first sight proves nothing
    now[0] += still - 1
    assert not sink.flush()
    (directory / "heartbeat").write_text(BEAT.replace("1", "2"))
    assert not sink.flush()
    assert "alive" in sink.waiting[0].why
    now[0] += still - 1
    assert not sink.flush()
    assert writer[1:] == []
    now[0] += 2
    assert sink.flush()
    request = writer[1][0]
    assert request.heartbeat_seen == BEAT.replace("1", "2")
    assert not request.companion
    assert os.listdir(directory / "logged") == [f"{point(5).ticket}.json"]
    drop(directory, [6])
    assert sink.flush()  # still dead, and no new wait for what is known


@pytest.mark.parametrize("ended", [None, False])
def test_by_step_and_not_over_waits(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any], ended: bool | None
) -> None:
    announce(directory, by_step=True, ended=ended)
    sink, beside = make_sink(), make_sink(late="companion")
    for s in (sink, beside):
        s.flush()
    now[0] += 10 * files.STALE_S
    assert not sink.flush()
    assert "close RUN" in sink.waiting[0].why
    assert (sink.waiting[0].run, sink.waiting[0].points) == (IDENTITY.key, 1)
    assert writer[1:] == []
    assert beside.flush()
    assert writer[1][0].companion
    drop(directory, [6])
    assert close_run(directory.parents[1], "the training") == IDENTITY.key
    assert sink.flush()
    assert not writer[2][0].companion


def test_a_resumed_training_gets_what_a_dead_runner_held(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any]
) -> None:
    """But not what a runner holds that lives: it has the lock."""
    name = f"{point(5).ticket}.json"
    os.rename(directory / "points" / name, directory / "taken" / f"{point(5).ticket}~dead")
    sink = make_sink()
    with sinks._alone(directory / "writer.lock") as alone:
        assert alone
        assert not sink.flush()
        assert os.listdir(directory / "points") == []
    (directory / "heartbeat").write_text(BEAT.replace("1", "2"))
    assert not sink.flush()
    assert "alive" in sink.waiting[0].why
    assert os.listdir(directory / "points") == [name]
    assert os.listdir(directory / "taken") == []
    assert writer[1:] == []


def test_a_run_that_no_hook_announced_waits_for_the_user(
    tmp_path: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any]
) -> None:
    sink = make_sink()
    sink.publish(result(5))
    assert not sink.flush()
    now[0] += 10 * files.STALE_S
    assert not sink.flush()
    assert "no training process has shown itself" in sink.waiting[0].why
    close_run(tmp_path, IDENTITY.key)
    assert sink.flush()
    assert writer[1][0].run == IDENTITY


def test_publish_is_idempotent_wherever_the_point_stands(tmp_path: Path, make_sink: Callable[..., WandbSink]) -> None:
    sink = make_sink()
    directory, name = tmp_path / "relay" / IDENTITY.key, f"{5:064x}.json"
    sink.publish(result(5))
    first = (directory / "points" / name).read_bytes()
    for src, dst in ((f"points/{name}", f"taken/{5:064x}~r"), (f"taken/{5:064x}~r", f"logged/{name}")):
        os.rename(directory / src, directory / dst)
        sink.publish(result(5))
        assert os.listdir(directory / "points") == []
    os.rename(directory / "logged" / name, directory / "points" / name)
    sink.publish(replace(result(5), finished_at=9.0))
    assert os.listdir(directory / "points") == [name]
    assert (directory / "points" / name).read_bytes() == first
    assert files.parse_point(first, name).row()["bench/s/arc/acc"] == 0.005


def test_nothing_for_a_run_without_wandb(tmp_path: Path, make_sink: Callable[..., WandbSink]) -> None:
    sink = make_sink()
    sink.publish(result(5, RunIdentity(id="ours")))
    assert not (tmp_path / "relay").exists()
    assert sink.flush()


@pytest.mark.parametrize("status", [1, BUSY, AutoEvalError("python took longer than 300 s")])
def test_a_writer_that_fails_gives_the_points_back_and_is_not_hurried(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any], status: Any
) -> None:
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    writer[0] = status
    assert not sink.flush()
    assert sink.waiting[0].why in ("it said this", "python took longer than 300 s")
    assert os.listdir(directory / "points") == [f"{point(5).ticket}.json"]
    assert os.listdir(directory / "taken") == []
    now[0] += sinks.PAUSE_S - 1
    assert not sink.flush()
    assert len(writer) == 2
    now[0] += 2
    assert not sink.flush()
    assert len(writer) == 3
    now[0] += sinks.PAUSE_S + 1
    assert not sink.flush()
    assert len(writer) == 3  # the pause has doubled
    writer[0] = 0
    now[0] += sinks.PAUSE_S
    assert sink.flush()


def test_one_broken_run_does_not_hold_up_another(
    tmp_path: Path, directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any]
) -> None:
    broken = tmp_path / "relay" / "a-broken-one"
    (broken / "points").mkdir(parents=True)
    (broken / "run.json").write_text("{torn")
    drop(broken, [5])
    (directory / "points" / "evil.json").write_text('{"call": "os.system"}')
    sink = make_sink()
    sink.flush()
    now[0] += files.STALE_S + 1
    assert not sink.flush()
    assert [w.run for w in sink.waiting] == ["a-broken-one"]
    assert "not valid JSON" in sink.waiting[0].why
    assert os.listdir(directory / "logged") == [f"{point(5).ticket}.json"]
    assert any(name.startswith("evil.json") for name in os.listdir(directory / "refused"))
    assert close_run(tmp_path, "r1") == IDENTITY.key


def test_the_writer_gets_no_other_runs_settings(
    directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for key in ("WANDB_RUN_ID", "WANDB_MODE", "WANDB_RESUME", "WANDB_SERVICE", "WANDB_TAGS"):
        monkeypatch.setenv(key, "of another run")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("OTHER_KEY", "o" * 40)
    sink = make_sink(api_key_env="OTHER_KEY", base_url="http://127.0.0.1:1")
    sink.flush()
    now[0] += files.STALE_S + 1
    assert sink.flush()
    env = writer[1][1]["env"]
    assert {k: v for k, v in env.items() if v == "of another run"} == {}
    assert (env["WANDB_API_KEY"], env["WANDB_BASE_URL"]) == ("o" * 40, "http://127.0.0.1:1")
    for path in directory.rglob("*"):
        assert not path.is_file() or b"o" * 40 not in path.read_bytes()  # no secret in the queue


@pytest.mark.parametrize("there", [True, False])
def test_offline_scores_go_beside_the_run_or_to_our_own_directory(
    tmp_path: Path, directory: Path, make_sink: Callable[..., WandbSink], now: list[float], writer: list[Any],
    there: bool,
) -> None:  # fmt: skip
    """The path in the identity is data: it is used, mapped, only where the run's own directory is found in it."""
    own = tmp_path / "mnt" / "out" / "wandb"
    log = own / "offline-run-20260101_000000-r1" / "run-r1.wandb"
    log.parent.mkdir(parents=True)
    if there:
        log.touch()
    run = replace(IDENTITY, wandb_mode="offline", wandb_dir="/train/out/wandb")
    (directory / "run.json").write_bytes(files.encode(files.Announcement(files.VERSION, run, "a", False, 10)))
    sink = make_sink()
    sink._context = replace(sink._context, path_map={"/train": str(tmp_path / "mnt")})
    sink.flush()
    now[0] += files.STALE_S + 1
    assert sink.flush()
    request = writer[1][0]
    assert request.offline
    assert request.logs == ((str(log),) if there else ())
    assert Path(request.directory) == (own.parent if there else tmp_path)
    assert (tmp_path / "wandb").is_dir() is not there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"late": "soon"}, "sinks[0].late: 'soon' is not one of"),
        ({"lat": "wait"}, "sinks[0].lat: unknown key; did you mean 'late'?"),
        ({"api_key_env": "NO_SUCH_KEY"}, "sinks[0].api_key_env: the environment has no NO_SUCH_KEY"),
        ({"dir": 3}, "sinks[0].dir: expected text"),
    ],
)
def test_settings_that_are_wrong(make_sink: Callable[..., WandbSink], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_sink(**settings)
    assert str(error.value).startswith("a.yaml: ")
    assert message in str(error.value)


def test_closing_a_run_that_is_not_or_is_two(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run called 'the trainin'; did you mean"):
        close_run(tmp_path, "the trainin")
    other = tmp_path / "relay" / "other"
    other.mkdir()
    (other / "identity.json").write_bytes(files.encode(replace(IDENTITY, wandb_id="r2")))
    with pytest.raises(ConfigError, match=f"2 runs called 'the training'; name one of other, {IDENTITY.key}"):
        close_run(tmp_path, "the training")
    assert close_run(tmp_path, "r2") == "other"
    assert (other / "closed").exists()


def test_definitions_from_a_config() -> None:
    stored = [
        {"1": "train/global_step", "6": [3], "7": []},
        {"2": "*", "5": 1, "6": [1], "7": []},
        {"1": "loss", "4": "epoch", "6": [2, 3], "7": [1, 5]},
    ]
    plain = {"step_metric": None, "step_sync": None, "hidden": None, "summary": None}
    assert list(_from_config(stored)) == [
        {**plain, "name": "train/global_step"},
        {**plain, "name": "*", "step_metric": "train/global_step", "step_sync": True},
        {"name": "loss", "step_metric": "epoch", "step_sync": False, "hidden": True, "summary": "min,last"},
    ]
    assert Target([], {}, []).state == ""
