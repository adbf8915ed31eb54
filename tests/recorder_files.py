"""HELM's tables and run directories as their documentation has them, for tests of the recorder: ours, not HELM's.

tests/recorded/helm is what HELM 0.5.16 itself wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Table = tuple[str, Sequence[str], Mapping[str, Sequence[float | None]]]
"""A title, the headings of the columns, and the values by model."""

BENCHMARKS = """
    benchmarks:
      - name: mmlu
        metrics:
          - EM
      - name: boolq
        metrics:
          - EM
      - name: narrative_qa
        metrics:
          - F1
"""


def write_tables(output: Path, suite: str, benchmark: str, *tables: Table, metadata: bool = False) -> None:
    """`groups/<benchmark>.json` as HELM 0.2 wrote it, or, with `metadata`, as it does since 0.4."""
    more: dict[str, Any] = {"markdown": False, "metadata": {}}
    file = output / "runs" / suite / "groups" / f"{benchmark}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([
        {
            "title": title,
            "header": [
                {"value": "Model" if metadata else "Model/adapter", **(more if metadata else {})},
                *(
                    {"value": h, **({**more, "metadata": {"metric": h, "run_group": benchmark}} if metadata else {})}
                    for h in headings
                ),
            ],
            "rows": [
                [{"value": model}, *({} if v is None else {"value": v} for v in values)]
                for model, values in rows.items()
            ],
            "links": [],
        }
        for title, headings, rows in tables
    ]))  # fmt: skip


def write_run(
    output: Path, suite: str, model: str, group: str, stats: Mapping[str, float], *, split: str = "test",
    args: Mapping[str, object] | None = None, complete: bool = True, older: bool = False,
    groups: Sequence[str] = (),
) -> Path:  # fmt: skip
    """A run directory with the numbers `stats` of `split`, and others that must not be taken for them. `older`: with
    the key that HELM 0.1 had for the scenario."""
    told = ",".join(f"{k}={v}" for k, v in (args or {}).items())
    path = output / "runs" / suite / f"{group}:{told},model={model.replace('/', '_')}"
    path.mkdir(parents=True)
    scenario = {"class_name": "helm.benchmark.scenarios.x.X", "args": dict(args or {})}
    (path / "run_spec.json").write_text(json.dumps({
        "name": path.name, "scenario" if older else "scenario_spec": scenario,
        "adapter_spec": {"model": model, "method": "generation"}, "groups": [group, *groups],
    }))  # fmt: skip
    rows = []
    for name, value in stats.items():
        rows.append({"name": {"name": name, "split": split}, "count": 1, "sum": value, "mean": value})
        rows.append({"name": {"name": name, "split": "train"}, "count": 1, "sum": 9.0, "mean": 9.0})
        perturbed = {"name": name, "split": split, "perturbation": {"name": "robustness"}}
        rows.append({"name": perturbed, "count": 1, "sum": 8.0, "mean": 8.0})
    if complete:
        (path / "stats.json").write_text(json.dumps(rows))
    return path


def old_suite(output: Path, name: str = "mymodel/demo/{}") -> None:
    """Three benchmarks of three checkpoints of one model, `name` with the iteration in it."""
    models = [name.format(step) for step in (1000, 3000, 2000)]

    def rows(*values: float) -> dict[str, list[float | None]]:
        return {model: [value, 0.5] for model, value in zip(models, values, strict=True)}

    write_tables(
        output, "demo", "mmlu",
        ("MMLU (Massive Multitask Language Understanding)", ["EM", "ECE (10-bin)"], rows(0.25, 0.75, 0.5)),
        ("subject: anatomy, data: x", ["EM", "ECE (10-bin)"], rows(0.0, 0.5, 0.25)),
        ("subject: virology", ["EM", "ECE (10-bin)"], rows(0.5, 1.0, 0.75)),
    )  # fmt: skip
    write_tables(output, "demo", "boolq", ("", ["EM", "EM (Robustness)"], rows(0.1, 0.3, 0.2)))
    write_tables(output, "demo", "narrative_qa", ("", ["F1", "ROUGE-L"], rows(0.125, 0.375, 0.0)))


SUMMARY = {
    1000: {"mmlu.EM": 0.25, "boolq.EM": 0.1, "narrative_qa.F1": 0.125},
    2000: {"mmlu.EM": 0.5, "boolq.EM": 0.2, "narrative_qa.F1": 0.0},
    3000: {"mmlu.EM": 0.75, "boolq.EM": 0.3, "narrative_qa.F1": 0.375},
}
"""What `old_suite` holds, by hand."""


def recorder_yaml(
    directory: Path, output: Path, *, model: str = "mymodel", more: str = "", benchmarks: str = BENCHMARKS,
    url: str = "http://127.0.0.1:9", suite: str = "demo",
) -> Path:  # fmt: skip
    """The older recorder's file for HELM's output."""
    file = directory / "recorder.yaml"
    file.write_text(f"""project: board
base_url: {url}
evals:
  - eval_type: helm
    model_name: {model}
    source: helm
    helm_output_dir: {output}
    helm_suite_name: {suite}
    token_per_iteration: 0.004
{more}{benchmarks}""")
    return file
