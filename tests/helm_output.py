"""A HELM output directory of real runs: `python -m tests.helm_output HELM_PYTHON DIR`.

Two checkpoints of one run, tiny models of chance weights, answer two subjects of
MMLU (eight questions each, our own, none of MMLU's) and Dyck words; then `helm-summarize` makes its tables. DIR gets
the output in HELM's layout. `trim` leaves what a recorder reads, cut down to be kept beside the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from eval_runner.evaluators.base import Job
from eval_runner.evaluators.helm import deployment, place

SUITE, MODEL, STEPS = "demo-tiny", "demo-tiny", (100, 200)      # more than one slash is too much for this HELM
SUBJECTS = ("anatomy", "virology")
LETTERS = "ABCD"


def make(python: Path, output: Path) -> None:
    """Run HELM on all checkpoints, and summarize. Raises RuntimeError with HELM's words in it."""
    from tests.helm_models import tiny_model

    with tempfile.TemporaryDirectory(prefix="autoeval-test-") as scratch:
        work = Path(scratch)
        questions(work / "data" / "scenarios" / "mmlu" / "data")
        place.share_data(output, work / "data")
        names = [f"{MODEL}/{step}" for step in STEPS]
        for step, name in zip(STEPS, names, strict=True):
            path = tiny_model(work / str(step), step)
            deployment.write(work / f"models-{step}", name, Job(path, path, str(step), work, work / "log"), None)
            method = "method=multiple_choice_separate_original"
            entries = [f"mmlu:model=text,subject={subject},{method}" for subject in SUBJECTS]
            entries.append("dyck_language:model=text,num_parenthesis_pairs=2")
            conf = work / f"{step}.conf"
            conf.write_text(json.dumps({"entries": [{"description": e, "priority": 1} for e in entries]}))
            _helm(
                python, work, "helm.benchmark.run", "--conf-paths", str(conf), "--local-path", f"models-{step}",
                "--models-to-run", name, "--suite", SUITE, "--max-eval-instances", "8", "--num-train-trials", "1",
                "--num-threads", "1", "--disable-cache", "--output-path", str(output), "--plugins", "autoeval_helm",
            )  # fmt: skip
        (output / "scenarios").unlink()
        # helm-summarize imports Pillow for tables of pictures, which the managed environment lacks: a stand-in.
        (work / "PIL").mkdir()
        (work / "PIL" / "__init__.py").write_text("")
        (work / "PIL" / "Image.py").write_text("class Image: ...\n")
        _helm(
            python, work, "helm.benchmark.presentation.summarize", "--suite", SUITE, "--output-path", str(output),
            "--local-path", f"models-{STEPS[0]}",
        )  # fmt: skip


def trim(output: Path, kept: Path) -> None:
    """Copy what a recorder reads: the runs' specifications, those rows of stats.json that a table shows, and the tables
    of our benchmarks."""
    for directory in sorted(p.parent for p in (output / "runs" / SUITE).glob("*/stats.json")):
        target = kept / "runs" / SUITE / directory.name
        target.mkdir(parents=True)
        spec = json.loads((directory / "run_spec.json").read_text())
        keep = {"name": spec["name"], "groups": spec["groups"], "scenario_spec": spec["scenario_spec"]}
        keep["adapter_spec"] = {k: spec["adapter_spec"][k] for k in ("method", "model", "model_deployment")}
        _dump(target / "run_spec.json", keep)
        wanted = ("exact_match", "exact_match_indicator", "num_instances", "quasi_exact_match")
        rows = json.loads((directory / "stats.json").read_text())
        _dump(target / "stats.json", [row for row in rows if row["name"]["name"] in wanted])
    for name in ("mmlu", "dyck_language"):
        target = kept / "runs" / SUITE / "groups" / f"{name}.json"
        target.parent.mkdir(exist_ok=True)
        tables = json.loads((output / "runs" / SUITE / "groups" / f"{name}.json").read_text())
        _dump(target, [
            {
                "title": table["title"], "name": table["name"],
                "header": [{k: cell[k] for k in ("value", "metadata")} for cell in table["header"]],
                "rows": [[{k: cell[k] for k in ("value",) if k in cell} for cell in row] for row in table["rows"]],
            }
            for table in tables
        ])  # fmt: skip
    schema = json.loads((output / "runs" / SUITE / "schema.json").read_text())
    names = {"exact_match", "exact_match_indicator"}
    _dump(kept / "runs" / SUITE / "schema.json", {
        "metrics": [
            {key: m[key] for key in ("name", "display_name", "short_display_name")}
            for m in schema["metrics"] if m["name"] in names
        ],
        "run_groups": [
            {"name": group["name"], "environment": group["environment"]}
            for group in schema["run_groups"] if group["name"] in ("mmlu", "dyck_language")
        ],
    })  # fmt: skip


def _dump(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def questions(root: Path) -> None:
    for split, count in (("dev", 5), ("val", 0), ("test", 8)):
        (root / split).mkdir(parents=True)
        for subject in SUBJECTS:
            rows = [f"Which letter of {subject} is {i}?,a,b,c,d,{LETTERS[i % 4]}" for i in range(count)]
            (root / split / f"{subject}_{split}.csv").write_text("".join(f"{row}\n" for row in rows))


def _helm(python: Path, work: Path, module: str, *arguments: str) -> None:
    env = place.environment(python, work)[0]
    done = subprocess.run(
        [str(python), "-m", module, *arguments], cwd=work, env=env, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-4000:]}")


if __name__ == "__main__":
    made = Path(sys.argv[2])
    made.mkdir()
    make(Path(os.path.abspath(sys.argv[1])), made)
    if len(sys.argv) > 3:
        shutil.rmtree(sys.argv[3], ignore_errors=True)
        trim(made, Path(sys.argv[3]))
