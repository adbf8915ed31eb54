from __future__ import annotations

import csv
import dataclasses
import io
import random
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks import fsio
from eval_runner.results import scores_csv
from eval_runner.results.schema import Evaluation, Failure, Result
from eval_runner.results.series import definition, rows
from eval_runner.results.statistics import Z95, wilson
from tests.results_samples import T0, digest, result, score

HEADER = "run,step,suite,benchmark,metric,split,value,stderr,n,low,high\n"


def text_of(tmp_path: Path, *results: Result) -> str:
    path = tmp_path / "new" / "scores.csv"
    scores_csv.write(results, path)
    return path.read_text()


def test_the_file_to_the_letter(tmp_path: Path) -> None:
    bpb = score(1 / 3, 0.1 + 0.2, n=7, benchmark="text", metric="bits_per_byte", higher=False)
    judged = dataclasses.replace(score(0.25), low=0.125, high=0.5)
    found = text_of(
        tmp_path,
        result(200, score(0.5, 0.25), bpb),
        result(100, judged, suite="deep"),
        result(1000, score(0.0, 0.0, n=3), run="alpha"),
        result(100, score(1e-17), bpb),
        result(300, failure=Failure("transient", "died")),
    )
    low, high = (repr(1 / 3 + sign * Z95 * (0.1 + 0.2)) for sign in (-1, 1))
    assert found == HEADER + (
        f"alpha,1000,quick,mcqa,exact_match,test,0.0,0.0,3,0.0,{wilson(0, 3)[1]!r}\n"
        "demo,100,deep,mcqa,exact_match,test,0.25,,100,0.125,0.5\n"
        "demo,100,quick,mcqa,exact_match,test,1e-17,,100,,\n"
        f"demo,200,quick,mcqa,exact_match,test,0.5,0.25,100,{0.5 - Z95 / 4!r},{0.5 + Z95 / 4!r}\n"
        f"demo,100,quick,text,bits_per_byte,test,0.3333333333333333,0.30000000000000004,7,{low},{high}\n"
        f"demo,200,quick,text,bits_per_byte,test,0.3333333333333333,0.30000000000000004,7,{low},{high}\n"
    )


def test_steps_are_sorted_as_numbers_and_the_order_given_does_not_matter(tmp_path: Path) -> None:
    results = [result(step, score(step / 1e4, split=split)) for step in (1000, 200, 30, 4) for split in ("b", "a")]
    results = [dataclasses.replace(r, ticket=digest(i)) for i, r in enumerate(results)]
    wanted = text_of(tmp_path, *results)
    random.Random(0).shuffle(results)
    assert text_of(tmp_path, *results) == wanted
    steps = [line.split(",")[1] for line in wanted.splitlines()[1:]]
    assert steps == ["4", "30", "200", "1000"] * 2


def test_metrics_are_sorted_here_and_stand_as_they_were_given_elsewhere(tmp_path: Path) -> None:
    """By the last result, whatever order they are read in; what it lacks comes after."""
    old = result(1, *(score(0.5, metric=m) for m in ("gone", "length", "rate")))
    new = result(2, *(score(0.5, metric=m) for m in ("rate", "score", "length")))
    table = list(csv.DictReader(io.StringIO(text_of(tmp_path, old, new))))
    assert [(r["metric"], r["step"]) for r in table] == [
        ("gone", "1"), ("length", "1"), ("length", "2"), ("rate", "1"), ("rate", "2"), ("score", "2"),
    ]  # fmt: skip
    for given in ([old, new], [new, old]):
        found = [(r.score.metric, r.result.step) for r in rows(given)]
        assert found == [("rate", 1), ("rate", 2), ("score", 2), ("length", 1), ("length", 2), ("gone", 1)]


def test_names_that_csv_must_quote_come_back(tmp_path: Path) -> None:
    name = 'a,"b"\n\N{SNOWMAN}'
    (row,) = csv.DictReader(io.StringIO(text_of(tmp_path, result(1, score(0.5, benchmark=name), run=name))))
    assert (row["run"], row["benchmark"]) == (name, name)


def test_no_results_give_the_columns(tmp_path: Path) -> None:
    assert text_of(tmp_path) == HEADER


def test_the_file_is_replaced_at_once_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text_of(tmp_path, result(1, score(0.5)))

    def full(self: fsio.FileOps, fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fsio.FileOps, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        text_of(tmp_path, result(1, score(0.7)))
    assert (tmp_path / "new" / "scores.csv").read_text() == before
    assert len(list((tmp_path / "new").iterdir())) == 1


# ---------------------------------------------------------------------- names


def names(*results: Result) -> list[tuple[str, str, int, float]]:
    return [(row.run, row.suite, row.result.step, row.score.value) for row in rows(results)]


def test_a_changed_suite_has_two_names_and_loses_nothing() -> None:
    old, new = digest("old"), digest("new")
    found = names(
        result(1, score(0.1), suite_digest=old, finished=T0 + 1),
        result(2, score(0.2), suite_digest=old, finished=T0 + 2),
        result(2, score(0.7), suite_digest=new, finished=T0 + 3),
    )
    assert found == [
        ("demo", "quick", 2, 0.7),
        ("demo", f"quick@{old[:8]}", 1, 0.1),
        ("demo", f"quick@{old[:8]}", 2, 0.2),
    ]


def test_a_step_that_was_written_again_has_two_names_and_loses_nothing() -> None:
    first, again = digest("first"), digest("again")
    found = rows(
        [
            result(2, score(0.7), checkpoint_digest=again, finished=T0 + 9),
            result(2, score(0.2), checkpoint_digest=first, finished=T0 + 5),
            result(1, score(0.1), finished=T0 + 3),
        ]
    )
    assert [(r.run, r.result.step, r.score.value, r.superseded) for r in found] == [
        ("demo", 1, 0.1, False),
        ("demo", 2, 0.7, False),
        (f"demo@{first[:8]}", 2, 0.2, True),
    ]


def test_of_two_checkpoints_of_a_step_the_one_saved_last_has_the_plain_name() -> None:
    first, again = digest("first"), digest("again")
    found = rows(
        [
            replace(result(2, score(0.7), checkpoint_digest=again, finished=T0 + 300), saved_at=T0 + 200),
            replace(result(2, score(0.2), checkpoint_digest=first, finished=T0 + 400), saved_at=T0 + 100),
        ]
    )
    assert [(r.run, r.score.value, r.superseded) for r in found] == [
        ("demo", 0.7, False), (f"demo@{first[:8]}", 0.2, True),
    ]  # fmt: skip


def test_scores_over_other_files_are_another_definition() -> None:
    old, new = (
        replace(result(step, score(value), finished=T0 + step), evaluations=(
            Evaluation("helm", 1.0, (score(value),), provenance={"/data/questions.jsonl": content}),))
        for step, value, content in ((1, 0.1, "a" * 64), (2, 0.9, "b" * 64))
    )  # fmt: skip
    found = {r.result.step: r.suite for r in rows([old, new])}
    assert found[2] == "quick"
    assert found[1].startswith("quick@")
    assert definition(old) != definition(new)


def test_two_runs_of_one_name_are_told_apart() -> None:
    same = [result(1, score(0.1), run_id=run_id) for run_id in ("x", "y")]
    found = names(*same, result(1, score(0.3), run="other"))
    assert [name for name, *_ in found] == ["demo (x)", "demo (y)", "other"]


def test_a_run_without_a_name_goes_by_its_id() -> None:
    assert names(result(1, score(0.1), run="", run_id="x"))[0][0] == "x"
