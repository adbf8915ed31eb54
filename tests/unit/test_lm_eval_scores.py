"""Scores out of what lm_eval wrote: recorded output (see tests/recorded/lm_eval), and what older versions leave out."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError
from eval_runner.evaluators.lm_eval import samples, scores
from eval_runner.results.statistics import ratio_stderr

RECORDED = Path(__file__).parents[1] / "recorded" / "lm_eval"


@pytest.fixture
def output(tmp_path: Path) -> Callable[..., Path]:
    """A copy of recorded output; `edit` changes its results, `rows` each samples file's rows."""

    def make(
        which: str,
        edit: Callable[[dict[str, Any]], object] = lambda data: None,
        rows: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    ) -> Path:
        directory = tmp_path / which
        shutil.copytree(RECORDED / which, directory)
        (results,) = directory.glob("results_*.json")
        data = json.loads(results.read_text())
        edit(data)
        results.write_text(json.dumps(data))
        for path in directory.glob("samples_*.jsonl"):
            found = [json.loads(line) for line in path.read_text().splitlines()]
            rows(found)
            path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return directory

    return make


def test_every_metric_of_tasks_and_groups() -> None:
    found = scores.read(RECORDED / "group")
    told = [(s.benchmark, s.metric, s.split, s.value, s.n, s.higher_is_better) for s in found.scores]
    assert told == [
        ("tiny_choice", "acc", "test", 0.25, 12, True),
        ("tiny_choice", "acc_norm", "test", 1 / 3, 12, True),
        ("tiny_gen", "exact_match.number", "validation", 0.0, 5, True),
        ("tiny_gen", "exact_match.whole", "validation", 0.0, 5, True),
        ("tiny", "acc", "test", 0.25, 12, True),
    ]
    assert [s.stderr for s in found.scores] == pytest.approx(
        [math.sqrt(0.25 * 0.75 / 11), math.sqrt(2 / 9 / 11), 0, 0, math.sqrt(0.25 * 0.75 / 11)]
    )
    assert found.tasks == ("tiny_choice", "tiny_gen")
    assert found.gaps == ()
    assert found.versions == {
        "lm_eval": "0.4.13", "transformers": "5.23.0", "torch": "2.13.0+cpu", "task tiny": "1.0, 0-shot",
        "task tiny_choice": "1.5, 0-shot", "task tiny_gen": "Yaml, 0-shot", "group tiny acc": "without tiny_gen",
    }  # fmt: skip
    assert found.model == "/base/checkpoint-100"
    assert found.date == pytest.approx(1795345600, abs=3600)
    assert json.loads(found.arguments["model_args"])["pretrained"] == "/base/checkpoint-100"


def test_the_documents_values_give_the_scores() -> None:
    for which in ("group", "text"):
        found = scores.read(RECORDED / which)
        for score in found.scores:
            key = (score.benchmark, score.metric)
            own = [i for i in found.instances if (i.benchmark, i.metric) == key]
            assert len({i.id for i in own}) == len(own) == score.n
            assert {i.split for i in own} == {score.split}
            assert statistics.fmean(i.value for i in own) == pytest.approx(score.value)
            assert statistics.stdev(i.value for i in own) / math.sqrt(score.n) == pytest.approx(score.stderr)


def test_bits_per_byte_and_perplexity_have_the_error_of_a_ratio() -> None:
    """By hand from the recorded log-likelihoods; lm_eval gives none."""
    found = {s.metric: s for s in scores.read(RECORDED / "text").scores}
    (path,) = (RECORDED / "text").glob("samples*")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bits = ratio_stderr([-r["bits_per_byte"][0] / math.log(2) for r in rows], [r["bits_per_byte"][1] for r in rows])
    assert (found["bits_per_byte"].value, found["bits_per_byte"].stderr) == pytest.approx(bits)
    value, stderr = ratio_stderr([-r["word_perplexity"][0] for r in rows], [r["word_perplexity"][1] for r in rows])
    assert stderr is not None
    assert found["word_perplexity"].value == pytest.approx(math.exp(value))
    assert found["word_perplexity"].stderr == pytest.approx(math.exp(value) * stderr)
    assert found["bits_per_byte"].higher_is_better is False


def test_a_document_has_one_id_in_any_order_and_two_where_it_stands_twice(output: Callable[..., Path]) -> None:
    plain = scores.read(RECORDED / "group")
    ids = [i.id for i in plain.instances if (i.benchmark, i.metric) == ("tiny_choice", "acc")]
    assert sum(i.endswith(".2") for i in ids) == 1
    assert next(i for i in ids if i.endswith(".2")).removesuffix(".2") in ids
    other = scores.read(output("group", rows=lambda rows: rows.reverse()))
    assert sorted(other.instances, key=str) == sorted(plain.instances, key=str)


def test_the_second_of_two_equal_documents_is_the_later_one() -> None:
    rows: list[dict[str, Any]] = [{"doc_id": i, "doc": 1, "doc_hash": "a" * 64, "acc": i} for i in (2, 0, 1)]
    found = samples.by_filter(rows, ["none"])["none"]
    assert {key: row["acc"] for key, row in found.items()} == {"a" * 16: 0, f"{'a' * 16}.2": 1, f"{'a' * 16}.3": 2}


def older(data: dict[str, Any]) -> None:
    """As before 0.4.3, by what its results lacked: a stand-in, changed from today's."""
    for key in ("higher_is_better", "n-samples", "model_name", "lm_eval_version"):
        del data[key]
    data["config"]["model_args"] = "pretrained=/models/a,dtype=float32"


def unmarked(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for key in ("filter", "metrics", "doc_hash"):
            del row[key]


def test_older_results_say_the_same_where_they_can(output: Callable[..., Path]) -> None:
    found, plain = scores.read(output("group", older, unmarked)), scores.read(RECORDED / "group")
    assert found.scores == plain.scores
    assert [(i.benchmark, i.metric, i.value) for i in found.instances] == [
        (i.benchmark, i.metric, i.value) for i in plain.instances
    ]
    assert found.model == "/models/a"
    assert "lm_eval" not in found.versions


def test_the_oldest_layout(output: Callable[..., Path]) -> None:
    """`results.json`, and samples as a JSON array in a file that bears the model's arguments."""
    directory = output("text", older, unmarked)
    for path in list(directory.iterdir()):
        if path.suffix == ".json":
            path.rename(directory / "results.json")
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            (directory / "pretrained__models__a_tiny_text.jsonl").write_text(json.dumps(rows, indent=2))
            path.unlink()
    assert scores.read(directory).scores[0].n == 3
    assert len(scores.read(directory / "results.json").instances) == 6


def test_without_samples_numbers_are_those_of_the_results(output: Callable[..., Path]) -> None:
    directory = output("group")
    for path in directory.glob("samples*"):
        path.unlink()
    found = scores.read(directory)
    assert found.scores == scores.read(RECORDED / "group").scores
    assert found.instances == ()
    directory = output("text", older)
    for path in directory.glob("samples*"):
        path.unlink()
    data = json.loads(next(directory.iterdir()).read_text())
    del data["results"]["tiny_text"]["sample_len"]
    next(directory.iterdir()).write_text(json.dumps(data))
    found = scores.read(directory)
    assert found.scores == ()
    assert str(found.gaps[0]) == "tiny_text: word_perplexity is of an unknown number of documents, or of none"


def test_a_metric_that_no_mean_gives_has_no_instances(output: Callable[..., Path]) -> None:
    directory = output("group", lambda data: data["results"]["tiny_choice"].update({"acc,none": 0.7}))
    found = scores.read(directory)
    assert {i.metric for i in found.instances if i.benchmark == "tiny_choice"} == {"acc_norm"}


def test_a_model_whose_log_likelihoods_are_no_numbers_has_no_scores(output: Callable[..., Path]) -> None:
    """lm_eval makes an accuracy of them."""

    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[1]["resps"][0][0] = ["nan", "False"] if isinstance(rows[1]["resps"][0][0], list) else "nan"

    found = scores.read(output("group", rows=spoil))
    assert {s.benchmark for s in found.scores} == {"tiny_gen"}      # where a text may say nan
    assert [(g.benchmark, g.broken) for g in found.gaps] == [("tiny_choice", True), ("tiny", False)]
    assert "not a number; the model's outputs are broken" in str(found.gaps[0])


def test_a_score_that_is_no_number(output: Callable[..., Path]) -> None:
    directory = output("text", lambda data: data["results"]["tiny_text"].update({"word_perplexity,none": math.inf}))
    found = scores.read(directory)
    assert [s.metric for s in found.scores] == ["bits_per_byte"]
    assert found.gaps[0].broken
    assert str(found.gaps[0]).startswith("tiny_text: word_perplexity is inf")


def test_a_group_that_lacks_a_task_names_it(output: Callable[..., Path]) -> None:
    found = scores.read(output("group", lambda data: data["results"].pop("tiny_gen")))
    assert "tiny" not in {s.benchmark for s in found.scores}
    assert [str(g) for g in found.gaps] == ["tiny lacks its tasks tiny_gen"]


def test_a_task_without_metrics_is_named(output: Callable[..., Path]) -> None:
    found = scores.read(output("text", lambda data: data["results"].update({"tiny_text": {"alias": "tiny_text"}})))
    assert str(found.gaps[0]) == "tiny_text has no metric: did it yield any sample?"


def test_a_group_that_weighs_its_tasks_alike_has_no_instances(output: Callable[..., Path]) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["results"]["tiny"]["acc,none"] = 0.4

    found = scores.read(output("group", edit))
    assert next(s for s in found.scores if s.benchmark == "tiny").value == 0.4
    assert "tiny" not in {i.benchmark for i in found.instances}


def test_a_perplexity_is_the_exponential_of_a_mean() -> None:
    rows = {f"d{i}": {"perplexity": -nats} for i, nats in enumerate((1.0, 2.0, 4.5))}
    values, stderr = samples.instances(rows, "perplexity", math.exp(2.5))
    assert statistics.fmean(values.values()) == pytest.approx(math.exp(2.5))
    assert stderr == pytest.approx(math.exp(2.5) * statistics.stdev([1.0, 2.0, 4.5]) / math.sqrt(3))


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "JSONDecodeError"), ("[]", "no `results`"), ('{"results": 3}', "no `results`"),
     ('{"results": {"a": 3}}', "no results file of lm_eval"),
     ('{"results": {}, "group_subtasks": {"g": ["g"]}}', "a part of itself")],
)  # fmt: skip
def test_what_is_no_results_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(AutoEvalError, match=says) as caught:
        scores.read(tmp_path)
    assert str(tmp_path / "results.json") in str(caught.value)


def test_one_results_file_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(AutoEvalError, match="no results file"):
        scores.read(tmp_path)
    for name in ("results_2026-01-02T00-00-00.json", "results_2025-01-02T00-00-00.json", "results_of_us.json"):
        (tmp_path / name).write_text('{"results": {}}')
    assert [p.name[8:12] for p in scores.files(tmp_path)] == ["2025", "2026"]
    with pytest.raises(AutoEvalError, match="2 results files, read one of them"):
        scores.read(tmp_path)


def test_samples_that_cannot_be_read(output: Callable[..., Path]) -> None:
    directory = output("text")
    (path,) = directory.glob("samples*")
    path.write_text('{"no": "doc_id"}\n')
    with pytest.raises(AutoEvalError, match=f"{path}: no readable samples"):
        scores.read(directory)
