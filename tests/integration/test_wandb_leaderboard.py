"""The leaderboard of a W&B project, with the real wandb client and the shipped stand-in for the service."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.wandb_backend import Backend, Run, backend, environment

ROOT = Path(__file__).parents[2]
SETTINGS = """
project: p
base_url: {url}
leaderboard: True
leaderboard_metrics: [mmlu.EM, boolq.EM, web.BPB]
excluded_runs: [left-out]
"""
COMMAND = [sys.executable, "-c", "from eval_runner.cli import main; main()", "leaderboard"]


@pytest.fixture
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


def hold(service: Backend, model: str, rows: list[dict[str, Any]], **config: Any) -> Run:
    """A model's summary run, as the service keeps it after a recorder wrote it."""
    name = f"p-{model}-summary"
    run = Run("tester", "p", name, len(service.runs) + 1, display_name="summary", group=model, state="finished")
    run.tags, run.config = ["evalate", "summary"], {key: {"value": value} for key, value in config.items()}
    run.rows = dict(enumerate(rows))
    service.runs[f"tester/p/{name}"] = run
    return run


def fill(service: Backend) -> None:
    """Three models: of the older recorder with nested rows, of ours with an axis, and one that is left out."""
    hold(service, "old", [
        {"_step": 10, "mmlu": {"EM": 0.2}, "boolq": {"EM": 0.5}, "web": {"BPB": 1.2}},
        {"_step": 20, "mmlu": {"EM": 0.3}, "boolq": {"EM": 0.6}},
    ], token_per_iteration=0.5)  # fmt: skip
    hold(service, "new", [
        {"_step": 0, "bench/step": 200, "mmlu.EM": 0.4, "boolq.EM": 0.55, "web.BPB": 1.0},
        {"_step": 1, "bench/step": 100, "mmlu.EM": 0.1, "boolq.EM": "NaN"},
        {"_step": 2, "bench/step": 200, "mmlu.EM": 0.5},
    ], token_num=1000)  # fmt: skip
    hold(service, "left-out", [{"_step": 0, "mmlu": {"EM": 0.9}}])
    service.run("p", "p-old-summary").number = 1
    other = hold(service, "detail", [{"_step": 0, "mmlu": {"EM": 0.9}}])
    other.tags = ["evalate", "detail"]


def command(tmp_path: Path, service: Backend, *args: str, status: int = 0) -> str:
    config = tmp_path / "leaderboard.yaml"
    config.write_text(SETTINGS.format(url=service.url))
    env = environment(tmp_path / "w", "online", service.url)
    done = subprocess.run(
        [*COMMAND, "--config", str(config), "--out", str(tmp_path / "out"), *args],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr


def shown(run: Run, key: str) -> dict[str, Any]:
    """The table that the run's last row has under this key, as its file was uploaded."""
    table = run.history()[-1][key]
    found: dict[str, Any] = json.loads(run.files[table["path"]])
    assert (table["_type"], table["nrows"]) == ("table-file", len(found["data"]))
    return found


def test_the_board_of_a_project_and_its_run(tmp_path: Path, service: Backend) -> None:
    fill(service)
    out = command(tmp_path, service)
    with (tmp_path / "out" / "leaderboard.csv").open() as file:
        rows = {(row["model"], row["step"]): row for row in csv.DictReader(file)}
    # The later of two rows at a step counts, and a row's other metrics stay.
    assert {key: row["mmlu.EM"] for key, row in rows.items()} == {
        ("old", "10"): "0.2", ("old", "20"): "0.3", ("new", "100"): "0.1", ("new", "200"): "0.5"
    }  # fmt: skip
    best = rows["new", "200"]
    assert (best["boolq.EM"], best["web.BPB"], best["tokens_billions"]) == ("0.55", "1.0", "1000.0")
    assert rows["old", "20"]["tokens_billions"] == "10.0"
    # mmlu: 3 of 3; boolq: 1 of 2; web, where lower is better: 1 of 1
    assert float(best["mean_win_rate"]) == pytest.approx((1 + 0.5 + 1) / 3)
    # of the two with all three, mmlu 0.2 to 0.5: 1; boolq 0.5 to 0.55: 1; web 1.0 to 1.2: 1, as lower is better
    assert float(best["min_max_sum"]) == pytest.approx(1 + 1 + 1)
    assert rows["old", "20"]["missing"] == "web.BPB"
    assert rows["old", "20"]["min_max_sum"] == ""
    assert "new at step 100: boolq.EM is 'NaN', which is no number" in out
    assert f"shown in W&B, {service.url}" in out

    board = service.run("p", "p-leaderboard")
    assert (board.display_name, board.group, board.tags) == ("leaderboard", "leaderboard", ["leaderboard"])
    table = shown(board, "benchmark_score_table")
    assert table["columns"][:3] == ["model", "token_num", "score"]
    assert table["data"][0][:5] == ["new", 1000.0, pytest.approx(3), pytest.approx(2.5 / 3), 1]
    assert table["data"][0][-1] == "new, step 200"
    assert {*board.config["_wandb"]["value"]["visualize"]} == {"benchmark_score", "mean_win_rate"}
    assert shown(board, "leaderboard")["columns"][3:] == ["mmlu.EM", "boolq.EM", "web.BPB"]


@pytest.mark.slow
def test_again_replaces_what_is_shown(tmp_path: Path, service: Backend) -> None:
    fill(service)
    command(tmp_path, service)
    service.run("p", "p-new-summary").put(3, ['{"_step": 3, "bench/step": 300, "mmlu.EM": 0.9}'])
    command(tmp_path, service, "--steps", "last", "--exclude", "old")
    board = service.run("p", "p-leaderboard")
    assert board.overwritten == 0
    assert board.summary["benchmark_score_table"]["path"] == board.history()[-1]["benchmark_score_table"]["path"]
    assert [row[-1] for row in shown(board, "benchmark_score_table")["data"]] == ["new"]


def test_what_record_prints_of_it(tmp_path: Path, service: Backend) -> None:
    fill(service)
    config = tmp_path / "leaderboard.yaml"
    config.write_text(SETTINGS.format(url=service.url))
    code = "import sys; from eval_runner.recorder import board_wandb as b, settings as s; " \
           "print(*b.make(s.load(sys.argv[1]), print_only=True), sep='\\n')"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)], env=environment(tmp_path / "w", "online", service.url), cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "leaderboard: 1 new step 200: mean win rate 0.833, min-max sum 3.000", done.stderr
    # mmlu: 2 of 3; boolq: 2 of 2
    assert "leaderboard: 1 old step 20: mean win rate 0.833, min-max sum \N{EN DASH}, without web.BPB" in lines
    assert any("rank without an interval: 4 of 4" in line for line in lines)
    assert "tester/p/p-leaderboard" not in service.runs


def test_print_only_writes_nothing(tmp_path: Path, service: Backend) -> None:
    fill(service)
    before = [*service.runs]
    out = command(tmp_path, service, "--print-only", "--metric", "mmlu.EM", "--metric", "mine.points")
    assert [line.split()[:3] for line in out.splitlines()[1:3]] == [["1", "new", "200"], ["2", "old", "20"]]
    assert "mine.points: taken as better where it is higher" in out
    assert [*service.runs] == before
    assert "UpsertBucket" not in service.operations
    assert not (tmp_path / "out").exists()


def test_no_such_project_and_no_service(tmp_path: Path, service: Backend) -> None:
    out = command(tmp_path, service, "--print-only", status=2)
    assert "error: W&B, project p: Could not find project p; check project, entity" in out
    service.refuses = 403
    assert "check project, entity, base_url and WANDB_API_KEY" in command(tmp_path, service, "--print-only", status=2)
