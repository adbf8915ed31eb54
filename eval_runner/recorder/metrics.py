"""Names of metrics: HELM's display names, by which recorders and leaderboards ask, and its own, which results hold.

``mmlu.EM`` asks for the benchmark `mmlu` and the metric that HELM's tables head "EM". Several of HELM's metrics share
a heading, and which one a benchmark has is its schema's choice; so a heading stands for all of them, likeliest first.
Where a benchmark was evaluated in parts (subjects of MMLU), its value is the mean over them, as in HELM's first table.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from eval_runner.results.schema import Score

K = TypeVar("K", bound=Hashable)

DISPLAY: dict[str, tuple[str, ...]] = {
    "EM": (
        "exact_match", "quasi_exact_match", "exact_match_indicator", "final_number_exact_match", "exact_set_match",
        "quasi_leave_articles_exact_match",
    ),
    "PEM": ("prefix_exact_match", "quasi_prefix_exact_match"),
    "EM@5": ("exact_match@5", "quasi_exact_match@5"),
    "PEM@5": ("prefix_exact_match@5", "quasi_prefix_exact_match@5"),
    "F1": ("f1_score", "f1_set_match"),
    "Macro-F1": ("classification_macro_f1",),
    "Micro-F1": ("classification_micro_f1",),
    "ROUGE-1": ("rouge_1",),
    "ROUGE-2": ("rouge_2",),
    "ROUGE-L": ("rouge_l",),
    "BLEU": ("bleu", "cleva_machine_translation_bleu"),
    "BLEU-1": ("bleu_1",),
    "BLEU-4": ("bleu_4",),
    "BPB": ("bits_per_byte",),
    "PPL": ("perplexity",),
    "Logprob": ("logprob",),
    "Logprob/byte": ("logprob_per_byte",),
    "IoU": ("iou_set_match",),
    "Diff.": ("absolute_value_difference",),
    "Dist.": ("distance",),
    "Valid": ("percent_valid",),
    "Equivalent": ("math_equiv",),
    "Equivalent (CoT)": ("math_equiv_chain_of_thought",),
    "Equivalent (chain of thought)": ("math_equiv_chain_of_thought",),
    "Correctness": ("code_eval_acc",),
    "pass@1": ("pass",),
    "Toxic fraction": ("toxic_frac",),
    "ECE (1-bin)": ("ece_1_bin",),
    "ECE (10-bin)": ("ece_10_bin",),
}  # fmt: skip
"""A heading in HELM's tables, and the metrics of HELM under it: `short_display_name`, else `display_name`, of the
schema files of crfm-helm 0.5.16 (`helm/benchmark/static/schema_*.yaml`). A metric that is not here, such as
``RR@10``, is headed by its own name."""

CORE: dict[str, tuple[str, ...]] = {
    "mmlu": ("EM",),
    "raft": ("EM",),
    "imdb": ("EM",),
    "truthful_qa": ("EM",),
    "summarization_cnndm": ("ROUGE-2",),
    "summarization_xsum": ("ROUGE-2",),
    "boolq": ("EM",),
    "msmarco_trec": ("NDCG@10",),
    "msmarco_regular": ("RR@10",),
    "narrative_qa": ("F1",),
    "natural_qa_closedbook": ("F1",),
    "natural_qa_openbook_longans": ("F1",),
    "quac": ("F1",),
    "civil_comments": ("EM",),
    "hellaswag": ("EM",),
    "openbookqa": ("EM",),
}
"""HELM's sixteen core scenarios with the metric of each: what is recorded where a configuration names no benchmarks."""

CORE_METRICS: tuple[str, ...] = tuple(f"{name}.{metric}" for name, metrics in CORE.items() for metric in metrics)


@dataclass(frozen=True)
class Average:
    """The value of a benchmark: the mean over `parts`, the names of our benchmarks; one where it has no parts."""

    value: float
    metric: str
    parts: tuple[str, ...]


def names(display: str) -> tuple[str, ...]:
    """What a metric may be called in results when it is asked for as `display`: HELM's names, or the name itself."""
    return (display, *DISPLAY.get(display, ()))


def belongs(wanted: str, benchmark: str) -> bool:
    """Whether our `benchmark` is the benchmark `wanted` or a part of it.

    Ours are named after HELM's run spec and its arguments: ``mmlu.anatomy`` is a part of ``mmlu``. HELM names some of
    its groups by an argument too: ``msmarco.regular.30`` is of ``msmarco_regular``, and ``commonsense.hellaswag`` is of
    ``hellaswag`` (`helm/benchmark/run_specs/classic_run_specs.py` of crfm-helm 0.5.16).
    """
    if benchmark == wanted or benchmark.startswith(f"{wanted}."):
        return True
    first, *rest = benchmark.split(".")
    prefix = {"commonsense": ""}.get(first, f"{first}_")
    return wanted in {prefix + part for part in rest} or first == _SAMPLED.get(wanted)


_SAMPLED = {"summarization_xsum": "summarization_xsum_sampled"}
"""The run spec of a group that HELM gives another name."""


def matches(wanted: str, benchmark: str, metric: str) -> bool:
    """Whether a score of ours is, or is a part of, what ``benchmark.METRIC`` asks for."""
    return any(metric in names(display) and belongs(name, benchmark) for name, display in _split(wanted))


def average(wanted: str, scores: Iterable[Score]) -> Average | None:
    """The value of ``benchmark.METRIC`` in the scores of one result; None where there is none.

    A benchmark of exactly that name is the value, else it is the plain mean over its parts, whatever the number of
    their instances, as in HELM's tables. All parts are of one metric: that which the most parts have, and of several
    the first of `names`. Of a benchmark's several splits the first counts, and of several scores of that the last.
    """
    found = [score for score in scores if matches(wanted, score.benchmark, score.metric)]
    whole = [s for s in found if s.benchmark in {name for name, _ in _split(wanted)}]
    by_metric: dict[str, dict[str, Score]] = {}
    for score in whole or found:
        of_metric = by_metric.setdefault(score.metric, {})
        if score.benchmark not in of_metric or of_metric[score.benchmark].split == score.split:
            of_metric[score.benchmark] = score
    if not by_metric:
        return None
    order = [name for _, display in _split(wanted) for name in names(display)]
    metric = max(by_metric, key=lambda m: (len(by_metric[m]), -order.index(m)))
    parts = by_metric[metric]
    return Average(math.fsum(part.value for part in parts.values()) / len(parts), metric, tuple(sorted(parts)))


def averages(wanted: str, scores: Mapping[K, Iterable[Score]]) -> tuple[dict[K, Average], dict[K, tuple[str, ...]]]:
    """The value of ``benchmark.METRIC`` at each key (a step, say), and the parts that are missing where some are.

    The mean over some of the parts is no value to compare with a mean over all: where a part is missing that another
    key has, there is no value. Keys without any part are in neither.
    """
    found = {key: value for key, some in scores.items() if (value := average(wanted, some)) is not None}
    parts = {part for value in found.values() for part in value.parts}
    missing = {key: tuple(sorted(parts - {*value.parts})) for key, value in found.items()}
    return (
        {key: value for key, value in found.items() if not missing[key]},
        {key: lacking for key, lacking in missing.items() if lacking},
    )


def _split(wanted: str) -> list[tuple[str, str]]:
    """The ways to read ``benchmark.METRIC``: both may hold dots. The metric is first taken as short as it can be."""
    dots = [i for i, c in enumerate(wanted) if c == "."]
    return [(wanted[:i], wanted[i + 1 :]) for i in reversed(dots)]
