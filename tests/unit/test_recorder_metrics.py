"""Names of metrics: HELM's headings and its own, parts of a benchmark and their average."""

from __future__ import annotations

import pytest

from eval_runner.recorder import metrics
from eval_runner.recorder.metrics import CORE_METRICS, average, averages, matches
from eval_runner.results.schema import Score


def score(benchmark: str, value: float, metric: str = "exact_match", n: int = 10) -> Score:
    return Score(benchmark, metric, "test", value, n)


@pytest.mark.parametrize(
    ("wanted", "benchmark", "metric"),
    [
        ("mmlu.EM", "mmlu", "exact_match"),
        ("mmlu.EM", "mmlu.anatomy", "exact_match"),
        ("mmlu.exact_match", "mmlu.anatomy", "exact_match"),
        ("mmlu.anatomy.EM", "mmlu.anatomy.canonical", "quasi_exact_match"),
        ("boolq.EM", "boolq.canonical", "quasi_exact_match"),
        ("msmarco_regular.RR@10", "msmarco.canonical.regular.30", "RR@10"),
        ("natural_qa_closedbook.F1", "natural_qa.closedbook.canonical", "f1_score"),
        ("hellaswag.EM", "commonsense.hellaswag.multiple_choice_separate_original", "exact_match"),
        ("summarization_xsum.ROUGE-2", "summarization_xsum_sampled.0.3.cpu", "rouge_2"),
        ("b.Diff.", "b", "absolute_value_difference"),
        ("arc_easy.acc", "arc_easy", "acc"),
    ],
)
def test_what_is_asked_for_by_a_heading_is_found_by_its_own_name(wanted: str, benchmark: str, metric: str) -> None:
    assert matches(wanted, benchmark, metric)


@pytest.mark.parametrize(
    ("wanted", "benchmark", "metric"),
    [
        ("mmlu.EM", "mmlu_pro", "exact_match"),
        ("mmlu.EM", "mmlu", "f1_score"),
        ("mmlu.EM", "mmlu", "prefix_exact_match"),
        ("mmlu.anatomy.EM", "mmlu.virology", "exact_match"),
        ("mmlu.anatomy.EM", "mmlu", "exact_match"),
        ("msmarco_regular.RR@10", "msmarco.trec.30", "RR@10"),
        ("hellaswag.EM", "commonsense.openbookqa", "exact_match"),
        ("summarization_xsum.ROUGE-2", "summarization_cnndm.0.3.cpu", "rouge_2"),
        ("EM", "mmlu", "exact_match"),
    ],
)
def test_nothing_else_is(wanted: str, benchmark: str, metric: str) -> None:
    assert not matches(wanted, benchmark, metric)


def test_the_default_ones_are_the_sixteen_of_the_documentation() -> None:
    assert len(CORE_METRICS) == 16
    assert {"quac.F1", "mmlu.EM", "msmarco_trec.NDCG@10", "summarization_xsum.ROUGE-2"} < {*CORE_METRICS}


def test_parts_are_averaged_without_weights() -> None:
    found = average("mmlu.EM", [score("mmlu.a", 0.5, n=1), score("mmlu.b", 0.25, n=99), score("boolq", 1.0)])
    assert found == metrics.Average(0.375, "exact_match", ("mmlu.a", "mmlu.b"))


def test_a_whole_benchmark_is_not_averaged_with_its_parts() -> None:
    found = average("general.win_rate", [
        score("general", 0.5, "win_rate"), score("general.math", 0.1, "win_rate"),
    ])  # fmt: skip
    assert found == metrics.Average(0.5, "win_rate", ("general",))


def test_two_metrics_of_one_heading_are_not_mixed() -> None:
    both = [score("mmlu.a", 0.5), score("mmlu.a", 0.7, "quasi_exact_match"), score("mmlu.b", 0.1)]
    assert average("mmlu.EM", both) == metrics.Average(0.3, "exact_match", ("mmlu.a", "mmlu.b"))
    assert average("mmlu.quasi_exact_match", both) == metrics.Average(0.7, "quasi_exact_match", ("mmlu.a",))


def test_a_mean_without_all_parts_is_no_value_and_is_named() -> None:
    found, missing = averages("mmlu.EM", {
        100: [score("mmlu.a", 0.5), score("mmlu.b", 0.7)], 200: [score("mmlu.b", 0.9)], 300: [score("boolq", 0.9)],
    })  # fmt: skip
    assert {step: value.value for step, value in found.items()} == {100: 0.6}
    assert missing == {200: ("mmlu.a",)}


def test_of_several_scores_the_first_split_and_of_that_the_last_counts() -> None:
    scores = [score("mmlu", 0.1), Score("mmlu", "exact_match", "valid", 0.5, 10), score("mmlu", 0.2)]
    found = average("mmlu.EM", scores)
    assert found is not None
    assert found.value == 0.2
