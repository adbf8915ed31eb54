"""HELM's main metrics: which score of a run counts, and on which split, where the tree itself does not say.

`runs/SUITE/schema.json`, which `helm-summarize` leaves, says it; this table serves trees that have none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError
from eval_runner.results.importing import base

MAIN: dict[tuple[str, str], tuple[str, ...]] = {
    ("exact_match", "test"): ("mmlu", "openbookqa", "blimp", "thai_exam", "custom"),
    ("exact_match", "valid"): ("hellaswag", "truthful_qa"),
    ("quasi_exact_match", "test"): (
        "raft", "civil_comments", "wikifact", "babi_qa", "synthetic_reasoning", "legalbench", "legal_support",
        "lsat_qa", "med_qa", "entity_data_imputation", "entity_matching", "bbq",
    ),
    ("quasi_exact_match", "valid"): ("boolq", "imdb"),
    ("exact_match_indicator", "test"): ("dyck_language", "gsm"),
    ("f1_score", "test"): ("narrative_qa",),
    ("f1_score", "valid"): ("natural_qa_closedbook", "natural_qa_openbook_longans", "quac"),
    ("f1_set_match", "test"): ("synthetic_reasoning_natural",),
    ("classification_macro_f1", "test"): ("lextreme", "lex_glue"),
    ("RR@10", "valid"): ("msmarco_regular",),
    ("NDCG@10", "valid"): ("msmarco_trec",),
    ("rouge_2", "test"): (
        "summarization_cnndm", "summarization_xsum", "billsum_legal_summarization", "multilexsum_legal_summarization",
        "eurlexsum_legal_summarization",
    ),
    ("bleu_4", "test"): ("wmt_14",),
    ("bits_per_byte", "test"): (
        "ice", "the_pile", "twitter_aae", "twitter_aae_aa", "twitter_aae_white", "autoeval_bpb",
    ),
    ("math_equiv", "test"): ("math_regular",),
    ("math_equiv_chain_of_thought", "test"): ("math_chain_of_thought",),
    ("test_avg", "test"): ("code_apps",),
    ("pass", "test"): ("code_humaneval",),
}  # fmt: skip
"""(main metric, main split): the groups of HELM that have it, by schema_classic.yaml of crfm-helm 0.5.16; and
`custom` and `autoeval_bpb`, which no schema of HELM has."""

LOWER = frozenset({"bits_per_byte"})
"""Of the metrics above, those that are better when lower."""

_BY_GROUP = {group: main for main, groups in MAIN.items() for group in groups}


@dataclass(frozen=True)
class Schema:
    """What a suite's schema.json says: main metric and split by group, and which metrics are better when lower."""

    main: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    lower: dict[str, bool] = field(default_factory=dict)

    def of(self, groups: list[str]) -> tuple[str, str | None] | None:
        """Main metric and split of a run that is of these groups; None where nothing says them."""
        for known in (self.main, _BY_GROUP):
            for group in groups:
                if found := known.get(group):
                    return found[0], found[1]
        return None

    def lower_is_better(self, metric: str) -> bool | None:
        """None where nothing says it."""
        if metric in self.lower:
            return self.lower[metric]
        return metric in LOWER if metric in {name for name, _ in MAIN} else None


def read(suite: Path, passed_over: list[str]) -> Schema:
    """The schema of a suite's directory, if it has one; `passed_over` gets a line for one that cannot be read."""
    path = suite / "schema.json"
    if not path.is_file():
        return Schema()
    try:
        data = base.load(path)
        groups, metrics = _named(data["run_groups"]), _named(data["metrics"])
    except (AutoEvalError, KeyError, TypeError, AttributeError) as error:
        passed_over.append(f"{path}: not a schema of HELM ({error}); the built-in table serves instead")
        return Schema()
    main: dict[str, tuple[str, str | None]] = {}
    for name, group in groups.items():
        where = group.get("environment") or {}
        metric, split = where.get("main_name"), where.get("main_split")
        if isinstance(metric, str) and metric not in ("", "none"):
            main[name] = (metric, split if isinstance(split, str) else None)
    lower = {name: m["lower_is_better"] for name, m in metrics.items() if isinstance(m.get("lower_is_better"), bool)}
    return Schema(main, lower)


def _named(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in items}
