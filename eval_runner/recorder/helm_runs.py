"""HELM's run directories, `runs/<suite>/<run>/`: what there is where helm-summarize was not run, or not again.

`run_spec.json` says whose run it is, of which groups and on which data; `stats.json` has its numbers. They are made
into what HELM's own tables would show (`presentation/summarize.py` of crfm-helm 0.5.16): a value is the sum over all
runs divided by their count, of the group's main split and without perturbations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import ConfigError
from eval_runner.recorder.helm_tables import Column, Values
from eval_runner.recorder.metrics import names

EXACT, QUASI = "exact_match", "quasi_exact_match"
SPEC, STATS, SCHEMA = "run_spec.json", "stats.json", "schema.json"

_MAIN_OF: dict[tuple[str, str], str] = {
    ("exact_match", "test"): "mmlu openbookqa blimp thai_exam",
    ("exact_match", "valid"): "hellaswag truthful_qa",
    ("quasi_exact_match", "test"): (
        "raft civil_comments wikifact babi_qa synthetic_reasoning legalbench legal_support lsat_qa med_qa "
        "entity_data_imputation entity_matching bbq"
    ),
    ("quasi_exact_match", "valid"): "boolq imdb",
    ("f1_score", "test"): "narrative_qa",
    ("f1_score", "valid"): "natural_qa_closedbook natural_qa_openbook_longans quac",
    ("rouge_2", "test"): "summarization_cnndm summarization_xsum",
    ("RR@10", "valid"): "msmarco_regular",
    ("NDCG@10", "valid"): "msmarco_trec",
    ("exact_match_indicator", "test"): "dyck_language gsm",
    ("f1_set_match", "test"): "synthetic_reasoning_natural",
    ("math_equiv", "test"): "math_regular",
    ("math_equiv_chain_of_thought", "test"): "math_chain_of_thought",
    ("bits_per_byte", "test"): "ice the_pile twitter_aae",
    ("pass", "test"): "code_humaneval",
    ("test_avg", "test"): "code_apps",
}
MAIN: dict[str, tuple[str, str]] = {group: main for main, groups in _MAIN_OF.items() for group in groups.split()}
"""The main metric and split of a group: `environment` in HELM's schema_classic.yaml, crfm-helm 0.5.16."""

ASIDE = {
    "ablation_in_context", "ablation_multiple_choice", "ablation_prompts", "robustness_contrast_sets",
    "robustness_individual",
}  # fmt: skip
"""Groups whose runs no other group's table shows (`visibility: this_group_only` in schema_classic.yaml)."""


@dataclass(frozen=True)
class Run:
    """One run directory. `part` is the title that HELM's tables give its data; `complete` is whether its numbers are
    there."""

    directory: Path
    model: str
    groups: tuple[str, ...]
    part: str
    complete: bool


@dataclass(frozen=True)
class Index:
    """The runs of a suite, by name; `unreadable` are directories whose specification HELM may be writing just now, and
    what is wrong with each."""

    runs: list[Run]
    unreadable: dict[Path, str]

    def of_group(self, group: str) -> list[Run]:
        """The runs that HELM would show for a group. An unreadable one that by its name, ``SPEC:ARGS,model=MODEL``, is
        of the same scenario and model as one of them may be a part of it: then there is no mean."""
        found = [run for run in self.runs if group in run.groups and not (ASIDE - {group}) & {*run.groups}]
        scenarios = {run.directory.name.partition(":")[0] for run in found}
        maybe = [
            Run(path, model, (group,), "", complete=False)
            for path in self.unreadable if path.name.partition(":")[0] in scenarios
            for model in sorted({run.model for run in found})
            if f"model={model.replace('/', '_')}" in path.name.partition(":")[2].split(",")
        ]  # fmt: skip
        return found + maybe


def index(suite: Path) -> Index:
    """What there is in a suite's directory."""
    runs, unreadable = [], {}
    for spec in sorted(suite.glob(f"*/{SPEC}")):
        try:
            runs.append(_run(spec.parent))
        except ConfigError as error:
            unreadable[spec.parent] = str(error)
    return Index(runs, unreadable)


def _run(directory: Path) -> Run:
    file = directory / SPEC
    try:
        spec = json.loads(file.read_bytes())
        data = spec.get("scenario_spec") or spec.get("scenario") or {}      # the second until HELM 0.2
        part = ", ".join(f"{key}: {value}" for key, value in (data.get("args") or {}).items())
        model = str(spec["adapter_spec"]["model"])
        return Run(directory, model, tuple(map(str, spec.get("groups", ()))), part, (directory / STATS).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: is no run of HELM's yet ({error}); if HELM is done, move it away") from error


def read(
    suite: Path, group: str, runs: Sequence[Run], metrics: Sequence[str], problems: list[str]
) -> tuple[dict[str, Values], dict[str, str]]:
    """The values of those of `metrics` that these runs of one group have, and of others why they have no value.

    A stats.json that cannot be read is told in `problems`, and its run is one without numbers.
    """
    rows = {run: _plain_rows(run, problems) if run.complete else [] for run in runs}
    known = {str(row["name"]["name"]) for some in rows.values() for row in some}
    main, split = _schema_main(suite, group) or MAIN.get(group, ("", ""))
    if not split:
        splits = {str(row["name"].get("split")) for some in rows.values() for row in some} - {"train", "None"}
        if len(splits) > 1:
            why = f"which of {', '.join(sorted(splits))} is its split is not known; run helm-summarize"
            return {}, dict.fromkeys(metrics, why)
        split = next(iter(splits), "test")
    found: dict[str, Values] = {}
    unclear: dict[str, str] = {}
    for metric in metrics:
        candidates = [name for name in names(metric) if name in known]
        if main in names(metric) and (main in candidates or (main == QUASI and EXACT in known)):
            candidates = [main]
        if len(candidates) == 1:
            found[metric] = _values(rows, candidates[0], split)
        elif candidates:
            unclear[metric] = f"may be {' or '.join(candidates)}; ask for one by that name, or run helm-summarize"
        else:
            unclear[metric] = "no run has such a metric"
    return found, unclear


def _values(rows: dict[Run, list[dict[str, Any]]], metric: str, split: str) -> Values:
    whole: dict[str, list[tuple[float, float]]] = {}
    parts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run, some in rows.items():
        added = _added(some, metric, split) if some or run.part else (math.nan, math.nan)   # so there is no mean
        whole.setdefault(run.model, []).append(added)
        parts.setdefault(run.part, {}).setdefault(run.model, []).append(added)
    return Values(_column(whole), {title: _column(part) for title, part in parts.items() if title})


def _column(sums: dict[str, list[tuple[float, float]]]) -> Column:
    out: Column = []
    for model, some in sums.items():
        count = math.fsum(n for _, n in some)
        mean = math.fsum(total for total, _ in some) / count if count else math.nan
        out.append((model, mean if math.isfinite(mean) else None))
    return out


def _added(rows: list[dict[str, Any]], metric: str, split: str) -> tuple[float, float]:
    """The sum and the count of a metric over its sub-splits; HELM takes the exact match where a quasi-exact one is
    wanted and there is none."""
    found = [row for row in rows if row["name"]["name"] == metric and row["name"].get("split") == split]
    if not found and metric == QUASI:
        return _added(rows, EXACT, split)
    return math.fsum(float(row["sum"]) for row in found), math.fsum(float(row["count"]) for row in found)


def _plain_rows(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    file = run.directory / STATS
    try:
        rows = json.loads(file.read_bytes())
        return [row for row in rows if row["name"].get("perturbation") is None and row["count"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{file}: cannot be read ({error}); if HELM is done, have it make the run again")
        return []


def _schema_main(suite: Path, group: str) -> tuple[str, str] | None:
    """The main metric and split by the schema that helm-summarize left in the suite; None where it names none."""
    try:
        schema = json.loads((suite / SCHEMA).read_bytes())
        found = {str(g["name"]): g.get("environment") or {} for g in schema["run_groups"]}.get(group, {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    main, split = found.get("main_name"), found.get("main_split")
    return (str(main), str(split)) if main and split and main != "none" else None
