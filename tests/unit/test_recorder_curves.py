"""What a run lacks of a curve, and what it is called."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.recorder.curves import Curve, latest, lines, missing
from eval_runner.recorder.wandb_curves import Place, alone

ROWS = {300: {"mmlu.EM": 0.3}, 100: {"mmlu.EM": 0.1, "boolq.EM": 0.0}, 200: {"mmlu.EM": 0.2}}


def curve(rows: dict[int, dict[str, float]] = ROWS, **more: object) -> Curve:
    return Curve("m", "summary", "summary", rows, **more)  # type: ignore[arg-type]


def test_a_run_that_holds_nothing_gets_all_in_order_of_steps() -> None:
    found = missing(curve(tokens={200: 0.8}), [])
    assert found.rows == (
        {"mmlu.EM": 0.1, "boolq.EM": 0.0, "bench/step": 100},
        {"mmlu.EM": 0.2, "bench/step": 200, "bench/tokens": 0.8},
        {"mmlu.EM": 0.3, "bench/step": 300},
    )
    assert (found.values, found.there, found.changed) == (4, 0, ())


def test_what_is_there_is_not_logged_again_in_whatever_order_it_came() -> None:
    held = [*missing(curve(), []).rows]
    random.Random(1).shuffle(held)
    again = missing(curve(), [*held, *held])
    assert (again.rows, again.there) == ((), 4)
    late = missing(curve({**ROWS, 150: {"mmlu.EM": 0.15}, 200: {"mmlu.EM": 0.2, "boolq.EM": 0.5}}), held)
    assert late.rows == ({"mmlu.EM": 0.15, "bench/step": 150}, {"boolq.EM": 0.5, "bench/step": 200})


def test_a_value_that_differs_is_said_and_logged_and_the_last_one_counts() -> None:
    held = [*missing(curve(), []).rows]
    newer = curve({**ROWS, 200: {"mmlu.EM": 0.25}})
    found = missing(newer, held)
    assert found.rows == ({"mmlu.EM": 0.25, "bench/step": 200},)
    assert found.changed == ("mmlu.EM at step 200: was 0.2, is now 0.25",)
    assert missing(newer, [*held, *found.rows]).rows == ()
    assert missing(curve(), [*held, *found.rows]).values == 1


def test_zero_is_a_value_and_not_what_is_near_it() -> None:
    assert missing(curve({1: {"a.b": 0.0}}), [{"bench/step": 1, "a.b": 1e-300}]).values == 1


def test_rows_of_the_older_recorder_have_no_axis_and_do_not_count() -> None:
    assert missing(curve(), [{"_step": 100, "mmlu.EM": 0.1}]).there == 0


def test_the_summary_is_that_of_the_greatest_step() -> None:
    assert latest(curve()) == {"mmlu.EM": 0.3, "boolq.EM": 0.0}


def test_a_run_has_the_older_id_where_that_is_one() -> None:
    assert curve().run_id("p") == "p-m-summary"
    assert Curve("org/m:7b", "boolq", "detail", {}).run_id("p") == "p-org-m-7b-boolq"
    long = [Curve("m" * 200 + end, "s", "summary", {}).run_id("p") for end in "ab"]
    assert [len(run) for run in long] == [128, 128]
    assert long[0] != long[1]


def test_a_line_is_model_step_metric_and_value() -> None:
    assert lines("m", ROWS) == [
        "m\t100\tmmlu.EM\t0.1", "m\t100\tboolq.EM\t0.0", "m\t200\tmmlu.EM\t0.2", "m\t300\tmmlu.EM\t0.3",
    ]  # fmt: skip


def test_one_recorder_at_a_time_writes_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with alone(Place("p"), "a"):
        with alone(Place("p"), "b"):
            pass
        with pytest.raises(AutoEvalError, match="another recorder on this host writes to a; try again"), \
                alone(Place("p"), "a"):
            pass
    with alone(Place("p"), "a"):
        pass


def test_a_place_for_locks_that_is_none_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="locks are kept there, so set XDG_CACHE_HOME"), alone(Place("p"), "a"):
        pass
