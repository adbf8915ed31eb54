"""Scores out of the files of a program: what is missing, or is no number, is an error that names it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner.evaluators.command import files, scores
from eval_runner.evaluators.command.settings import parse
from eval_runner.results.schema import Instance, Score
from tests.unit.test_command_settings import GOOD, context


@pytest.fixture
def output(tmp_path: Path) -> Path:
    path = tmp_path.resolve() / "output"
    path.mkdir()
    return path


def read(output: Path, metrics: dict[str, Any], data: object = None, **settings: Any) -> list[Score]:
    if data is not None:
        (output / "scores.json").write_text(data if isinstance(data, str) else json.dumps(data))
    made = parse(GOOD | {"metrics": metrics, "name": "mine"} | settings, context())
    return scores.read(made, output, "here")[0]


def test_scores_by_path(output: Path) -> None:
    data = {"results": [{"f1": 0.5, "se": 0.1, "size": 20.0}], "loss": 3, "unknown": None}
    metrics = {
        "f1": {"path": "results[0].f1", "stderr": "results[-1].se", "n": "results[0].size", "higher_is_better": True,
               "benchmark": "other", "split": "valid"},
        "loss": {"path": "loss", "stderr": "unknown", "n": 7, "higher_is_better": False},
        "alone": "loss",
    }  # fmt: skip
    assert read(output, metrics, data) == [
        Score("other", "f1", "valid", 0.5, 20, 0.1, True),
        Score("mine", "loss", "test", 3.0, 7, None, False),
        Score("mine", "alone", "test", 3.0, 1, None, None),
    ]


def test_scores_in_json_lines(output: Path) -> None:
    (output / "log.jsonl").write_bytes(b'\xef\xbb\xbf{"acc": 0.1}\n\n{"acc": 0.2}\n')
    assert [s.value for s in read(output, {"a": "[-1].acc", "b": "[0].acc"}, scores="log.jsonl")] == [0.2, 0.1]


@pytest.mark.parametrize(
    ("metric", "data", "error", "says"),
    [
        ("a.acc", {"a": {"accu": 1, "b": 2}}, ConfigError, "`a` has no key 'acc'; did you mean 'accu'"),
        ("a.b", {"a": [1, 2]}, ConfigError, "`a` is a list of 2, which has no key 'b'"),
        ("a[2]", {"a": [1, 2]}, ConfigError, r"`a` has no \[2\]: its length is 2"),
        ("a[0]", {"a": {}}, ConfigError, r"`a` is a mapping, which has no \[0\]"),
        ("[0]", {"a": 1}, ConfigError, r"the top is a mapping, which has no \[0\]"),
        ("a", {"a": "0.5"}, ConfigError, 'a is "0.5"; expected a number'),
        ("a", {"a": True}, ConfigError, "a is true; expected a number"),
        ("a", {"a": {"b": 1}}, ConfigError, "a is a mapping; expected a number"),
        ("a", {"a": 10**400}, ConfigError, "a is too large a number"),
        ("a", {"a": None}, CheckpointError, "a is null; are the model's outputs broken"),
        ("a", {"a": math.nan}, CheckpointError, "a is nan, which is no number; are the model's"),
        ("a", '{"a": -Infinity}', CheckpointError, "a is -inf, which is no number"),
        ({"path": "a", "n": "n"}, {"a": 1, "n": 0}, ConfigError, r"\.n: n is 0; a score has 1 or more instances"),
        ({"path": "a", "n": "n"}, {"a": 1, "n": 1.5}, ConfigError, r"\.n: n is 1\.5; a score has"),
        ({"path": "a", "n": "n"}, {"a": 1, "n": None}, ConfigError, r"\.n: n is null"),
        ({"path": "a", "n": "n"}, {"a": 1}, ConfigError, r"\.n: the top has no key 'n'; known: a"),
        ({"path": "a", "stderr": "e"}, {"a": 1, "e": -1}, ConfigError, r"\.stderr: e is -1, and no standard error"),
        ({"path": "a", "stderr": "e"}, {"a": 1, "e": math.nan}, ConfigError, r"e is nan.*; write null where no"),
        ("a", '{"a": 1, "a": 2}', AutoEvalError, r"scores\.json: is no JSON \(a key stands twice\)"),
        ("a", "[" * 100_000, AutoEvalError, "is no JSON"),
        ("a", '{"a": 1', AutoEvalError, "is no JSON"),
        ("a", "\0\1\2", AutoEvalError, "is no JSON"),
        ("a", None, ConfigError, r"scores\.json: the program left no such file in \{output\}; it is empty"),
    ],
)
def test_what_is_missing_or_no_number_is_named(
    output: Path, metric: object, data: object, error: type[AutoEvalError], says: str
) -> None:
    with pytest.raises(AutoEvalError, match=says) as caught:
        read(output, {"m": metric}, data)
    assert type(caught.value) is error
    assert str(caught.value).startswith("here: scores.json: ")
    if error is not AutoEvalError and data is not None:
        assert "scores.json: metrics.m" in str(caught.value)


def test_all_metrics_that_are_missing_are_named(output: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.a: .*metrics\.b: .*metrics\.d: "):
        read(output, {"a": "x", "b": "y", "c": "z", "d": "null"}, {"z": 1, "null": None})


def test_a_file_of_another_name_is_told_of(output: Path) -> None:
    for i in range(12):
        (output / f"result{i:02}.json").touch()
    with pytest.raises(ConfigError, match=r"it holds result00\.json, .*result09\.json and 2 more$"):
        read(output, {"a": "x"})


def rows(output: Path, *values: object, path: str | None = "acc", acc: float = 0.5, **more: Any) -> Any:
    lines = [v if isinstance(v, str) else json.dumps({"id": i, "ok": v}) for i, v in enumerate(values)]
    (output / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (output / "scores.json").write_text(json.dumps({"acc": acc, "n": 4, "se": 0.3}))
    metric = {key: value for key, value in {"path": path, **more}.items() if value is not None}
    instances = {"file": "samples.jsonl", "values": {"accuracy": "ok"}}
    made = parse(GOOD | {"metrics": {"accuracy": metric}, "name": "mine", "instances": instances}, context())
    return scores.read(made, output, "here")


def test_n_and_standard_error_come_from_the_instances(output: Path) -> None:
    (score,), instances = rows(output, True, False, 1, 0.0)
    assert (score.value, score.n) == (0.5, 4)
    assert score.stderr == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))       # by hand: s² = Σ(v - 0.5)² / 3
    assert instances[0] == Instance("mine", "accuracy", "test", "0", 1.0)
    assert [i.value for i in instances] == [1.0, 0.0, 1.0, 0.0]


def test_a_metric_may_be_its_instances_alone(output: Path) -> None:
    (score,), _ = rows(output, 1, 1, 0, path=None)
    assert score.value == pytest.approx(2 / 3, abs=1e-15)


def test_a_rounded_value_is_the_mean_that_it_was_rounded_from(output: Path) -> None:
    (score,), _ = rows(output, 1, 1, 0, acc=0.6667)
    assert score.value == pytest.approx(2 / 3, abs=1e-15)
    for acc in (0.6662, 0.67, 66.67, 1.0):
        with pytest.raises(ConfigError, match=r"accuracy: acc is .*, and the mean over its 3 instances is 0\.6"):
            rows(output, 1, 1, 0, acc=acc)


def test_a_given_standard_error_is_taken_and_a_given_n_must_agree(output: Path) -> None:
    (score,), _ = rows(output, 1, 1, 0, 0, stderr="se", n="n")
    assert score.stderr == 0.3
    with pytest.raises(ConfigError, match=r"\.n: n is 4, and there are 2 instances"):
        rows(output, 1, 0, n="n")


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ([], ConfigError, r"samples\.jsonl: has no rows: nothing was evaluated"),
        (["{}"], ConfigError, r"samples\.jsonl:1: the top has no key 'id'"),
        ([1, '{"id": 0, "ok": 1}'], ConfigError, r"samples\.jsonl:2: its id 0 is another row's, too"),
        ([1, '{"id": "0", "ok": 1}'], ConfigError, r"samples\.jsonl:2: its id '0' is another row's, too"),
        (['{"id": true, "ok": 1}'], ConfigError, r"its id id is true; expected text or a whole number"),
        (["3"], ConfigError, r"samples\.jsonl:1: the top is 3, which has no key 'id'"),
        ([1, "yes"], AutoEvalError, r"samples\.jsonl:2: is no JSON"),
        (['{"id": 1}'], ConfigError, r"samples\.jsonl:1: the top has no key 'ok'"),
        ([1, math.nan], CheckpointError, r"samples\.jsonl:2: ok is nan"),
        ([1, None], CheckpointError, r"samples\.jsonl:2: ok is null"),
        (['"' + "x" * (1 << 20) + '"'], ConfigError, r"samples\.jsonl:1: is longer than"),
        (["{}"] * 100_000, ConfigError, "and 1 more like these"),
    ],
)
def test_rows_that_do_not_fit_are_named(
    output: Path, values: list[object], error: type[AutoEvalError], says: str
) -> None:
    with pytest.raises(AutoEvalError, match=says) as caught:
        rows(output, *values)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 2000


def test_rows_of_a_list(output: Path) -> None:
    (output / "rows.json").write_text('[{"a": 1}, {"a": 2}]')
    assert list(files.rows(output, "rows.json")) == [("rows.json[0]", {"a": 1}), ("rows.json[1]", {"a": 2})]
    (output / "rows.json").write_text("{}")
    with pytest.raises(ConfigError, match="expected a list of rows"):
        list(files.rows(output, "rows.json"))


def test_only_a_file_below_the_output_is_read(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    (output / "real.json").write_text('{"a": 1}')
    for name, target in (("in", "real.json"), ("out", outside), ("loop", "loop"), ("dir", tmp_path)):
        (output / name).symlink_to(target)
    os.mkfifo(output / "pipe")
    (output / "folder").mkdir()
    assert files.load(output, "in") == {"a": 1}
    for name, says in (
        ("out", r"leads out of \{output\}"), ("dir/secret.json", r"leads out of \{output\}"),
        ("loop", "cannot be read"),
        ("pipe", "is no regular file"), ("folder", "is no regular file"), ("real.json/x", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(AutoEvalError, match=rf"^{name}: {says}"):
            files.load(output, name)
    monkeypatch.setattr(files, "MAX_WHOLE", 7)
    with pytest.raises(ConfigError, match=r"^real\.json: has 8 bytes, the limit is 7"):
        files.load(output, "real.json")
