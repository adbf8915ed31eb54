"""`autoeval-runner leaderboard` over results on disk: what is ranked, and the four files."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import ConfigError
from eval_runner.cli import cli
from eval_runner.results import board_files, board_source, store
from eval_runner.results.leaderboard import Column, Entry, Value, make
from eval_runner.results.page import board as pages
from eval_runner.results.schema import Evaluation, Failure
from eval_runner.results.statistics import Z95, wilson
from tests.results_samples import publish, queue, result, score
from tests.unit.test_report import Page


@pytest.fixture
def config(tmp_path: Path) -> Path:
    queue(tmp_path / "queue")
    path = tmp_path / "autoeval.yaml"
    path.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")
    return path


def run(config: Path, *args: str, status: int = 0) -> str:
    done = CliRunner().invoke(cli, ["leaderboard", "--config", str(config), "--out", str(config.parent / "out"), *args])
    if status == 2:
        assert isinstance(done.exception, ConfigError), done.output
        return str(done.exception)
    assert done.exit_code == status, done.output
    return done.output


def three_models(config: Path) -> None:
    root = config.parent / "queue"
    for name, right, bpb in (("<b>small</b>", 0.2, 1.4), ("large", 0.8, 1.0), ("middle", 0.5, 1.2)):
        for step in (100, 200):
            scores = [
                score(right + step / 10_000, 0.01),
                score(bpb - step / 10_000, 0.01, benchmark="web", metric="bits_per_byte", higher=False),
                score(12.0, 0.1, metric="length", higher=None),
            ]
            publish(root, result(step, *scores, run=name, tokens=step * 10**9))


def test_the_page_and_the_tables(config: Path) -> None:
    three_models(config)
    out = run(config)
    folder = config.parent / "out"
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [["1", "(1"], ["2", "(2"], ["3", "(3"]]
    assert str(folder / "leaderboard.html") in out
    with (folder / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["step"], row["rank"], row["mean_win_rate"]) for row in rows] == [
        ("large", "200", "1", "1.0"), ("middle", "200", "2", "0.5"), ("<b>small</b>", "200", "3", "0.0")
    ]  # fmt: skip
    assert rows[0]["mcqa.exact_match"] == "0.8200000000000001"
    assert rows[0]["tokens_billions"] == "200.0"
    assert "mcqa.length" not in rows[0]     # the first metric with a direction stands for its benchmark
    data = json.loads((folder / "leaderboard.json").read_text())
    assert [entry["rank_low"] for entry in data["entries"]] == [1, 2, 3]
    assert data["entries"][0]["scores"]["web.bits_per_byte"] == {"value": 0.98, "stderr": pytest.approx(0.01)}
    assert [column["higher_is_better"] for column in data["columns"]] == [True, False]
    # 0.22, 0.52, 0.82 and, lower being better, 1.38, 1.18, 0.98: min and max begin at 1 and 0
    assert [entry["min_max_sum"] for entry in data["entries"]] == pytest.approx([2, 0.5 + 0.5, 0])
    text = (folder / "leaderboard.md").read_text()
    assert "| 3 (3 to 3) | \\<b\\>small\\</b\\> | 200 | 0.000 |" in text
    page = Page((folder / "leaderboard.html").read_text())
    assert [row[1] for row in page.tables[0][1:]] == ["large", "middle", "<b>small</b>"]
    assert page.tables[0][1][0] == "1 (1 to 1)"


def test_all_steps_and_the_best(config: Path) -> None:
    three_models(config)
    run(config, "--steps", "all")
    assert len((config.parent / "out" / "leaderboard.csv").read_text().splitlines()) == 7
    out = run(config, "--steps", "best", "--exclude", "middle")
    assert [line.split()[4:6] for line in out.splitlines()[1:3]] == [["large", "200"], ["<b>small</b>", "200"]]


def test_print_only_writes_nothing(config: Path) -> None:
    three_models(config)
    assert "large" in run(config, "--print-only")
    assert not (config.parent / "out").exists()


def test_no_results_make_an_empty_page(config: Path) -> None:
    assert "no scores to rank" in run(config)
    assert "No scores yet" in (config.parent / "out" / "leaderboard.html").read_text()


def test_mistakes(config: Path) -> None:
    three_models(config)
    assert "no run is called so; did you mean 'middle'" in run(config, "--exclude", "midle", status=2)
    assert "is not benchmark.METRIC" in run(config, "--metric", "mmlu", status=2)
    assert "it is for W&B runs only" in run(config, "--lower-is-better", "a.b", status=2)
    assert "is not [ENTITY/]PROJECT" in run(config, "--wandb", "a/b/c", status=2)


def test_failures_are_told(config: Path) -> None:
    three_models(config)
    publish(config.parent / "queue", result(300, run="large", failure=Failure("checkpoint", "torn")), state="failed")
    assert "1 failed tickets have no scores" in run(config)


# ---------------------------------------------------------------------- what counts


def names(read: board_source.Read) -> list[str]:
    return [column.name for column in read.columns]


def test_the_mean_over_parts_and_a_part_that_is_missing() -> None:
    whole = [score(0.2, 0.03, benchmark="mmlu.law"), score(0.6, 0.04, benchmark="mmlu.art")]
    results = [result(1, *whole), result(2, whole[0])]
    read = board_source.read(results, wanted=["mmlu.EM"])
    assert read.entries[0].values == {"mmlu.EM": Value(pytest.approx(0.4), pytest.approx(0.025))}
    assert read.entries[1].values == {}
    assert read.notes == ["demo at step 2 has no value of mmlu.EM, since parts are missing: mmlu.art"]
    assert names(board_source.read(results)) == ["mmlu.law.exact_match", "mmlu.art.exact_match"]


def test_categories_and_anchors_are_no_columns_of_their_own() -> None:
    scores = [score(0.5, benchmark=name, metric="win_rate") for name in ("set", "set.math", "set.judge_anchors")]
    assert names(board_source.read([result(1, *scores)])) == ["set.win_rate"]


def test_suites_stand_in_front_where_there_are_several() -> None:
    results = [result(1, score(0.5)), result(1, score(0.6), suite="long")]
    assert sorted(names(board_source.read(results))) == ["long/mcqa.exact_match", "quick/mcqa.exact_match"]
    assert names(board_source.read(results, wanted=["long/mcqa.EM"])) == ["long/mcqa.EM"]
    assert len(names(board_source.read(results, wanted=["mcqa.EM"]))) == 2


def test_scores_of_an_earlier_definition_or_checkpoint_are_left_out() -> None:
    old = result(1, score(0.1), suite_digest="a" * 64, finished=1.8e9)
    again = result(2, score(0.2), suite_digest="b" * 64, checkpoint_digest="c" * 64, finished=1.9e9)
    last = replace(result(2, score(0.3), suite_digest="b" * 64, finished=2e9), saved_at=1.95e9)
    read = board_source.read([old, again, last])
    assert [(entry.step, [v.value for v in entry.values.values()]) for entry in read.entries] == [(2, [0.3])]
    assert read.notes == ["1 scores by earlier definitions of a suite are left out"]


def test_two_judges_are_two_columns() -> None:
    def judged(step: int, name: str) -> object:
        made = result(step, score(0.5, metric="win_rate"))
        evaluation = Evaluation("gpt", 1.0, made.scores, {"judge": name})
        return replace(made, evaluations=(evaluation,))

    read = board_source.read([judged(1, "gpt-4o"), judged(2, "gpt-5")])  # type: ignore[list-item]
    assert sorted(names(read)) == ["mcqa.win_rate (gpt-4o)", "mcqa.win_rate (gpt-5)"]


def test_a_proportion_of_nothing_right_is_not_sure() -> None:
    """0 of 20 has the standard error 0; its interval knows better."""
    low, high = wilson(0.0, 20)
    assert board_source.value(score(0.0, 0.0, n=20)) == Value(0.0, pytest.approx((high - low) / 2 / Z95))


def test_an_unknown_metric_is_named() -> None:
    read = board_source.read([result(1, score(0.5))], wanted=["mcqa.exact_mach"])
    assert read.notes == [
        "no entry has a value, so this is no column: mcqa.exact_mach; did you mean 'mcqa.exact_match'?"
    ]


def test_a_page_of_many_lines_shows_some_and_holds_all() -> None:
    entries = [Entry(f"model-{i}", i, {"a.EM": Value(i / 1000, 0.01)}) for i in range(1000)]
    page = Page(pages.page(make(entries, [Column("a.EM")]), "leaderboard.csv"))
    assert len(page.tables[0]) == 1 + pages.PAGE
    held = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "data"))
    assert len(held["lines"]) == 1000
    assert held["lines"][0][1][:3] == [1, "model-999", 999]
    assert "800 more lines need JavaScript" in page.text


def test_of_two_results_at_one_step_the_last_counts_everywhere() -> None:
    first, last = result(1, score(0.1)), replace(result(1, score(0.9), finished=3e9), ticket="b" * 64)
    for results in ([first, last], [last, first]):
        for wanted in ([], ["mcqa.EM"]):
            (entry,) = board_source.read(results, wanted=wanted).entries
            assert [value.value for value in entry.values.values()] == [0.9]


def test_a_models_name_is_no_formula_in_a_spreadsheet() -> None:
    entries = [Entry(name, 1, {"a.EM": Value(-0.5)}) for name in ("=1+1", "+1", "-1", "@a", "a=1")]
    rows = list(csv.DictReader(board_files.as_csv(make(entries, [Column("a.EM")])).splitlines()))
    assert sorted(row["model"] for row in rows) == ["'+1", "'-1", "'=1+1", "'@a", "a=1"]
    assert {row["a.EM"] for row in rows} == {"-0.5"}     # a number stays one


def test_terminals_are_safe_from_problems(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_models(config)
    collect = store.collect
    monkeypatch.setattr(store, "collect", lambda queue: replace(collect(queue), problems=["a\x1b[2Jb"]))
    assert "warning: a\\x1b[2Jb" in run(config, "--print-only")
