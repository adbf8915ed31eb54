"""`autoeval-runner record` with the real W&B client, against the loopback stand-in for the service."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import wandb_backend, wandb_log
from tests.recorder_files import BENCHMARKS, SUMMARY, old_suite, recorder_yaml
from tests.wandb_backend import Backend, backend, environment

MAIN = "from eval_runner.cli import main; main()"
EACH = """
import contextlib, sys
from eval_runner.cli import main
for file in sys.argv[1:]:
    sys.argv = ["autoeval-runner", "record", "--config", file]
    with contextlib.suppress(SystemExit):
        main()
"""


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


def record(
    file: Path, env: dict[str, str], *options: str, status: int = 0, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "record", "--config", str(file), *options], env=env, cwd=file.parent,
        capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def record_each(files: list[Path], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Record the files one after the other in one process, which is quicker."""
    done = subprocess.run(
        [sys.executable, "-c", EACH, *map(str, files)], env=env, cwd=files[0].parent, capture_output=True, text=True,
        timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "error" not in done.stderr, done.stderr
    return done


def values_file(directory: Path, url: str, steps: dict[int, dict[str, float]], name: str = "recorder.yaml") -> Path:
    """A recorder's file whose values stand in it, an entry for each step, in the order of `steps`."""
    entries = ""
    for step, row in steps.items():
        values = "".join(f"      {key.partition('.')[0]}: {{{key.partition('.')[2]}: {v}}}\n" for key, v in row.items())
        entries += (
            f"  - eval_type: helm\n    model_name: m\n    source: file\n    token_per_iteration: 0.004\n"
            f"    default_iteration: {step}\n    eval_result:\n{values}"
        )
    file = directory / name
    file.write_text(f"project: board\nbase_url: {url}\nevals:\n{entries}")
    return file


def curve(b: Backend, key: str, run: str = "board-m-summary") -> dict[int, float]:
    """What a chart over bench/step shows: the last value at each step."""
    rows = b.run("board", run).history()
    assert all("bench/step" in row for row in rows)
    return {row["bench/step"]: row[key] for row in rows if key in row}


def test_helm_output_makes_a_run_for_each_benchmark_and_a_summary(
    tmp_path: Path, service: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    upsert = wandb_backend._OPERATIONS["UpsertBucket"]
    monkeypatch.setitem(wandb_backend._OPERATIONS, "UpsertBucket", lambda b, v: asked.append(v) or upsert(b, v))
    old_suite(tmp_path / "out")
    file = recorder_yaml(tmp_path, tmp_path / "out", url=service.url)
    env = environment(tmp_path / "wandb", "online")     # the address is that of the file
    done = record(file, env)
    names = ("mmlu", "boolq", "narrative_qa", "summary")
    assert done.stdout.splitlines() == [
        f"board/board-mymodel-{name}\t{n}\t0" for name, n in zip(names, (9, 3, 3, 9), strict=True)
    ]
    summary = service.run("board", "board-mymodel-summary")
    assert [{k: row[k] for k in row if not k.startswith("_")} for row in summary.history()] == [
        {**row, "bench/step": step, "bench/tokens": step * 0.004} for step, row in SUMMARY.items()
    ]
    assert (summary.display_name, summary.group, summary.state) == ("summary", "mymodel", "finished")
    assert summary.config["token_per_iteration"]["value"] == 0.004
    assert {k: summary.summary[k] for k in SUMMARY[3000]} == SUMMARY[3000]
    definitions = summary.config["_wandb"]["value"]["m"]
    assert {d["1"] for d in definitions} == {"bench/step", "bench/tokens", *SUMMARY[1000]}
    axes = {d["1"]: definitions[d["5"] - 1]["1"] for d in definitions if "5" in d}
    assert axes == dict.fromkeys(["bench/tokens", *SUMMARY[1000]], "bench/step")
    tags = {v["name"]: set(v["tags"]) for v in asked if v.get("tags")}
    assert tags["board-mymodel-summary"] == {"evalate", "autoeval", "summary"}
    assert tags["board-mymodel-mmlu"] == {"evalate", "autoeval", "detail"}
    assert curve(service, "mmlu.subject: anatomy.EM", "board-mymodel-mmlu") == {1000: 0.0, 2000: 0.25, 3000: 0.5}
    again = record(file, env, "--summary-only")
    assert again.stdout == "board/board-mymodel-summary\t0\t9\n"
    assert len(summary.history()) == 3


def test_late_out_of_order_and_repeated_records_give_one_right_curve(tmp_path: Path, service: Backend) -> None:
    env = environment(tmp_path / "wandb", "online", service.url)
    wanted = {step: {"mmlu.EM": step / 1000, "boolq.EM": 1 - step / 1000} for step in range(100, 700, 100)}
    order = [*wanted]
    random.Random(5).shuffle(order)
    assert order != sorted(order)
    parts = [order[:2], order[2:4], order[:4], order, order[3:]]
    files = [
        values_file(tmp_path, service.url, {s: wanted[s] for s in steps}, f"r{i}.yaml") for i, steps in enumerate(parts)
    ]
    late = {**wanted, 150: {"mmlu.EM": 0.15}}
    done = record_each([*files, values_file(tmp_path, service.url, late)], env)
    assert [line.split("\t")[1:] for line in done.stdout.splitlines()] == [
        ["4", "0"], ["4", "0"], ["0", "8"], ["4", "8"], ["0", "6"], ["1", "12"],
    ]  # fmt: skip
    assert curve(service, "mmlu.EM") == {step: row["mmlu.EM"] for step, row in late.items()}
    assert curve(service, "boolq.EM") == {step: row["boolq.EM"] for step, row in wanted.items()}
    run = service.run("board", "board-m-summary")
    assert (len(run.history()), run.overwritten) == (7, 0)
    assert run.summary["mmlu.EM"] == 0.6
    assert [d["1"] for d in run.config["_wandb"]["value"]["m"]].count("mmlu.EM") == 1


def test_a_value_that_differs_is_said_and_the_newer_one_counts(tmp_path: Path, service: Backend) -> None:
    env = environment(tmp_path / "wandb", "online", service.url)
    first = values_file(tmp_path, service.url, {100: {"mmlu.EM": 0.1}, 200: {"mmlu.EM": 0.2}})
    newer = values_file(tmp_path, service.url, {100: {"mmlu.EM": 0.125}, 200: {"mmlu.EM": 0.2}}, "newer.yaml")
    done = record_each([first, newer, newer], env)
    assert "mmlu.EM at step 100: was 0.1, is now 0.125" in done.stderr
    assert curve(service, "mmlu.EM") == {100: 0.125, 200: 0.2}
    assert service.run("board", "board-m-summary").overwritten == 0


@pytest.mark.slow
def test_a_run_that_is_being_written_to_is_left_alone(tmp_path: Path, service: Backend) -> None:
    env = environment(tmp_path / "wandb", "online", service.url)
    record(values_file(tmp_path, service.url, {100: {"mmlu.EM": 0.1}}), env)
    run = service.run("board", "board-m-summary")
    run.state = "running"
    more = values_file(tmp_path, service.url, {100: {"mmlu.EM": 0.1}, 200: {"mmlu.EM": 0.2}})
    assert "is running: somebody writes to it" in record(more, env, status=75).stderr
    assert len(run.history()) == 1
    run.state = "finished"
    record(more, env)
    assert curve(service, "mmlu.EM") == {100: 0.1, 200: 0.2}


@pytest.mark.slow
def test_two_recorders_at_once_lose_nothing(tmp_path: Path, service: Backend) -> None:
    env = environment(tmp_path / "wandb", "online", service.url)
    files = [values_file(tmp_path, service.url, {s: {"mmlu.EM": s / 1000}}, f"{s}.yaml") for s in (100, 200)]
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", MAIN, "record", "--config", str(file)], env=env, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for file in files
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in begun]
    codes = sorted(process.returncode for process in begun)
    assert codes in ([0, 0], [0, 75]), said
    for file in files:
        record(file, env)
    assert curve(service, "mmlu.EM") == {100: 0.1, 200: 0.2}
    run = service.run("board", "board-m-summary")
    assert (len(run.history()), run.overwritten) == (2, 0)


@pytest.mark.slow
def test_what_the_service_loses_is_not_called_recorded(
    tmp_path: Path, service: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = environment(tmp_path / "wandb", "online", service.url)
    file = values_file(tmp_path, service.url, {100: {"mmlu.EM": 0.1}})
    service.loses_rows = True
    program = "from eval_runner.recorder import wandb_curves as w; w.SHOWN_S = 1.0; " + MAIN
    monkeypatch.setattr("tests.integration.test_record_wandb.MAIN", program)
    done = record(file, env, status=75)
    assert "1 of 1 values that were logged are not in the run; record again" in done.stderr
    assert done.stdout == ""
    service.loses_rows = False
    record(file, env)
    assert curve(service, "mmlu.EM") == {100: 0.1}


@pytest.mark.slow
def test_a_service_that_refuses_or_is_away_is_one_clear_line(tmp_path: Path, service: Backend) -> None:
    file = values_file(tmp_path, service.url, {100: {"mmlu.EM": 0.1}})
    env = environment(tmp_path / "wandb", "online", service.url)
    keyless = {k: v for k, v in env.items() if k != "WANDB_API_KEY"} | {"HOME": str(tmp_path), "NETRC": "/nowhere"}
    assert "no key for W&B: export WANDB_API_KEY, or `wandb login --host" in record(file, keyless, status=2).stderr
    service.refuses = 401
    assert "refuses the key or the project" in record(file, env, status=2).stderr
    service.refuses = 0
    service.go_away()
    said = record(file, env, status=75).stderr
    service.come_back()
    assert "gives no answer: it is away, slow, or refuses" in said
    assert len(said.strip().splitlines()) == 1
    assert service.runs == {}
    record(file, env)
    assert curve(service, "mmlu.EM") == {100: 0.1}


@pytest.mark.slow
def test_an_error_says_how_many_runs_are_recorded(tmp_path: Path, service: Backend) -> None:
    old_suite(tmp_path / "out")
    file = recorder_yaml(tmp_path, tmp_path / "out", url=service.url, benchmarks=BENCHMARKS)
    env = environment(tmp_path / "wandb", "online")
    record(file, env)
    service.run("board", "board-mymodel-boolq").state = "running"
    service.run("board", "board-mymodel-boolq").rows.clear()
    assert "1 of 4 runs are recorded; record again for the others" in record(file, env, status=75).stderr


@pytest.mark.slow
def test_offline_records_stand_in_local_directories_and_are_not_repeated(tmp_path: Path) -> None:
    env = environment(tmp_path / "wandb", "offline")
    first = values_file(tmp_path, "http://127.0.0.1:9", {300: {"mmlu.EM": 0.3}, 100: {"mmlu.EM": 0.1}})
    more = {100: {"mmlu.EM": 0.1}, 200: {"mmlu.EM": 0.2, "boolq.EM": 0.5}, 300: {"mmlu.EM": 0.3}}
    later = values_file(tmp_path, "http://127.0.0.1:9", more, "later.yaml")
    done = record_each([first, later, later], env)
    assert [line.split("\t")[1:] for line in done.stdout.splitlines()] == [["2", "0"], ["2", "2"], ["0", "4"]]
    assert done.stderr.count("an offline run: wandb sync") == 2
    logs = wandb_log.logs(tmp_path / "wandb", "board-m-summary")
    assert len(logs) == 2
    found = [row for log in logs for row in wandb_log.rows(log)]
    assert wandb_log.series(found, "mmlu.EM", "bench/step") == [(100, 0.1), (300, 0.3), (200, 0.2)]
    assert wandb_log.definitions(logs[1])["mmlu.EM"] == "bench/step"


@pytest.mark.slow
def test_wandb_that_is_switched_off_records_nothing(tmp_path: Path) -> None:
    file = values_file(tmp_path, "http://127.0.0.1:9", {1: {"mmlu.EM": 0.1}})
    assert "WANDB_MODE is `disabled`" in record(file, environment(tmp_path / "w", "disabled"), status=2).stderr


@pytest.mark.slow
def test_an_offline_directory_of_the_same_second_is_not_written_over(tmp_path: Path) -> None:
    now, empty = time.time(), struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
    made = []
    for second in range(15):
        stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(now + second))
        log = tmp_path / "wandb" / "wandb" / f"offline-run-{stamp}-board-m-summary" / "run-board-m-summary.wandb"
        log.parent.mkdir(parents=True)
        log.write_bytes(empty)
        made.append(log)
    file = values_file(tmp_path, "http://127.0.0.1:9", {100: {"mmlu.EM": 0.1}})
    record(file, environment(tmp_path / "wandb", "offline"))
    assert [log.read_bytes() for log in made] == [empty] * 15
