"""The board of W&B runs: whose values may share a column, and when the board may be shown. The service is made up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.recorder import board_wandb
from eval_runner.recorder.settings import Settings
from eval_runner.recorder.wandb_curves import Place, alone
from eval_runner.results.leaderboard import Board

FULL, QUICK, QUICKER = ({"suite": s, "definition": d * 64} for s, d in (("full", "f"), ("quick", "a"), ("quick", "b")))
Rows = list[dict[str, Any]]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[SimpleNamespace]:
    """The runs that the service has; who looks for one by its path gets the last."""
    runs: list[SimpleNamespace] = []
    api = SimpleNamespace(runs=lambda path, filters: runs, run=lambda path: runs[-1])
    errors = SimpleNamespace(CommError=OSError, AuthenticationError=OSError)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda **how: api, errors=errors))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs


def hold(held: list[SimpleNamespace], run: str, rows: Rows, config: Mapping[str, Any] | None = None) -> None:
    held.append(SimpleNamespace(
        id=run, name=run, group="m", config=dict(config or {}), state="running", scan_history=lambda use_cache: rows,
    ))  # fmt: skip


def read(*wanted: str) -> Board:
    return board_wandb.read(Settings(Path("r.yaml"), "p"), wanted=wanted or ["mmlu.EM"])


def cells(board: Board) -> dict[str, float]:
    (line,) = board.lines
    return {c.name: v.value for c, v in zip(board.columns, line.values, strict=True) if v is not None}


def at(step: int, value: float, **more: float) -> dict[str, Any]:
    return {"bench/step": step, "mmlu.EM": value, **{key.replace("_", "/"): v for key, v in more.items()}}


def test_each_suite_and_each_definition_of_one_has_columns_of_its_own(held: list[SimpleNamespace]) -> None:
    hold(held, "1", [at(100, 0.9)], FULL)
    hold(held, "2", [at(100, 0.1)], QUICK)
    assert cells(read()) == {"full/mmlu.EM": 0.9, "quick/mmlu.EM": 0.1}
    assert cells(read("quick/mmlu.EM")) == {"quick/mmlu.EM": 0.1}
    assert [column.name for column in read("mmlu.EM", "quick/mmlu.EM").columns] == ["full/mmlu.EM", "quick/mmlu.EM"]
    hold(held, "3", [at(100, 0.2)], QUICKER)
    assert cells(read()) == {"full/mmlu.EM": 0.9, "quick@aaaaaaaa/mmlu.EM": 0.1, "quick@bbbbbbbb/mmlu.EM": 0.2}
    assert not [note for note in read().notes if "counts" in note]


def test_one_suite_shares_its_columns_with_runs_that_name_none(held: list[SimpleNamespace]) -> None:
    hold(held, "older", [{"_step": 100, "boolq.EM": 0.5}])
    hold(held, "ours", [at(100, 0.1)], QUICK)
    assert cells(read("mmlu.EM", "boolq.EM")) == {"mmlu.EM": 0.1, "boolq.EM": 0.5}


def test_a_second_value_that_differs_is_named_and_the_later_run_counts(held: list[SimpleNamespace]) -> None:
    hold(held, "a", [at(100, 0.8), at(100, 0.9)])     # within a run, the later row is a correction
    hold(held, "b", [at(100, 0.9)])
    assert not [note for note in read().notes if "counts" in note]
    hold(held, "c", [at(100, 0.1)])
    board = read()
    assert cells(board) == {"mmlu.EM": 0.1}
    assert "m at step 100: mmlu.EM is 0.9 in run b, and 0.1 in the later run c, which counts" in board.notes


def test_a_rows_own_tokens_come_before_those_of_the_run(held: list[SimpleNamespace]) -> None:
    hold(held, "a", [at(100, 0.1, bench_tokens=4.0), at(200, 0.2), at(200, 0.3, bench_tokens=8.0), at(300, 0.2)],
         {"token_num": 1000})  # fmt: skip
    assert {line.step: line.tokens for line in read().lines} == {100: 4.0, 200: 8.0, 300: 1000.0}


def publish(project: str = "p") -> str:
    return board_wandb.publish(Board(), "", project, "")


def test_the_board_is_not_said_to_be_shown_where_wandb_is_switched_off(
    held: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ConfigError, match="WANDB_MODE is `disabled`"):
        publish()


def test_a_board_that_somebody_writes_is_left_alone(held: list[SimpleNamespace]) -> None:
    hold(held, "p-leaderboard", [])
    with pytest.raises(AutoEvalError, match="W&B says that p/p-leaderboard is running"):
        publish()
    with alone(Place("p"), "p-leaderboard"), pytest.raises(AutoEvalError, match="another recorder on this host"):
        publish()
    with pytest.raises(AutoEvalError, match=r"p p/p-p-leaderboard is running"):     # an id takes no blank
        publish("p p")
