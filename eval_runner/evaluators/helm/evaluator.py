"""Evaluate a checkpoint with HELM: `helm-run` as a child in an environment of its own, then its result files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner import environments, process
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.helm import deployment, plan, reason, scores
from eval_runner.evaluators.helm.place import environment, share_data
from eval_runner.evaluators.helm.settings import clean, digest, located, parse, prefixed
from eval_runner.results.schema import Evaluation, Instance, Score

SUITE = "autoeval"
THREADS = 2
"""Requests at once. HELM's local model answers one after the other; more threads only tokenize ahead."""


class HelmEvaluator:
    """HELM on a local checkpoint. See `settings.Settings` for the keys."""

    def __init__(self, settings: dict[str, Any], context: Context):
        self._settings = parse(settings, context)
        self._context = context
        self._plans: dict[Path, plan.Plan] = {}

    def check(self) -> None:
        """Raise ConfigError unless the environment, the entries and the files that they name are there."""
        self._plan(self._python())

    def evaluate(self, job: Job) -> Outcome:
        """Run every entry; the scores are complete or there are none. See the protocol for what it raises."""
        started = time.monotonic()
        python = self._python()
        job.progress(0.0, "asking HELM for the runs")
        planned = self._plan(python)
        provenance = {str(path): was for path, was in (planned.sources | {p: digest(p) for p in planned.files}).items()}
        name = deployment.model_name(job.name)
        output = job.work_dir / "output"
        deployment.write(job.work_dir / "models", name, job.path, job.tokenizer, self._settings.torch_dtype)
        _write_entries(job.work_dir / "runs.conf", planned)
        share_data(output, self._data_dir())
        env, versions = environment(python, job.work_dir)
        runs = output / "runs" / SUITE
        total = len(planned.entries)

        def tick() -> None:
            done = sum(1 for _ in runs.glob("*/per_instance_stats.json"))
            job.progress(0.05 + 0.9 * min(done / total, 1), f"HELM: {done} of {total} runs")

        status = process.run(
            self._command(python, name, planned), log=job.log, env=env, cwd=job.work_dir, stopping=job.stopping,
            on_tick=tick,
        )  # fmt: skip
        found = {i: _directories(runs, i) for i in range(total)}
        if status != 0:
            unfinished = [
                planned.entries[i].entry for i, dirs in found.items()
                if not dirs or not all((d / "per_instance_stats.json").exists() for d in dirs)
            ]  # fmt: skip
            which = ", ".join(f"{e.where} ({e.description})" for e in unfinished[:3]) or self._context.where
            raise reason.failure(status, job.log, f"HELM failed at {which}")
        dropped = reason.dropped_nan(job.log)
        all_scores: list[Score] = []
        instances: list[Instance] = []
        for i, one in enumerate(planned.entries):
            if not found[i]:
                raise AutoEvalError(f"{one.entry.where} ({one.entry.description}): HELM left no run; log: {job.log}")
            for directory in found[i]:
                benchmark = one.entry.benchmark
                if len(found[i]) > 1:  # an argument that HELM expands to several runs
                    benchmark += "." + clean(_without(directory.name, i, name))
                for metric in one.metrics:
                    score, values = scores.read(
                        directory, benchmark, metric, one.split, one.lower_is_better.get(metric),
                        was_nan=metric in dropped.get(directory.name, ()),
                    )  # fmt: skip
                    all_scores.append(score)
                    instances += values
        job.progress(1.0, "HELM: all scores read")
        evaluation = Evaluation(
            "helm", time.monotonic() - started, tuple(all_scores), planned.versions | versions, provenance
        )
        return Outcome(evaluation, instances)

    def _python(self) -> Path:
        env = self._settings.env
        if env and not env.startswith("conda:"):
            env = str(self._context.base_dir / Path(env).expanduser())
        try:
            return environments.find(env, "helm", self._context.environments)
        except ConfigError as error:
            raise ConfigError(prefixed(self._context, f"{self._context.where}.env: {error}")) from error

    def _plan(self, python: Path) -> plan.Plan:
        """Asked once for each environment, and again once a file that the plan was made from has changed."""
        known = self._plans.get(python)
        if known is None or not known.is_current():
            known = self._plans[python] = plan.make(self._settings, self._context, python, self._data_dir())
        return known

    def _data_dir(self) -> Path:
        """HELM's data sets: the user's own directory, else one that all suites share."""
        if self._settings.data_dir:
            return located(self._context.base_dir, self._settings.data_dir)
        return self._context.environments / "helm-data"

    def _command(self, python: Path, name: str, planned: plan.Plan) -> list[str]:
        s = self._settings
        return [
            str(python), "-m", "helm.benchmark.run",
            "--conf-paths", "runs.conf", "--local-path", "models", "--models-to-run", name, "--suite", SUITE,
            "--max-eval-instances", str(s.max_instances), "--num-train-trials", str(s.num_train_trials),
            "--num-threads", str(THREADS), "--disable-cache", "--output-path", "output",
            "--plugins", *planned.plugins,
        ]  # fmt: skip


def _write_entries(path: Path, planned: plan.Plan) -> None:
    """HELM's run entries; JSON is HOCON. The group marks each run directory with the entry it belongs to.

    Without the mark, two entries that differ in an argument which HELM leaves out of a run's name would
    overwrite each other.
    """
    entries = [
        {
            "description": f"{e.description}{',' if ':' in e.description else ':'}model=text",
            "priority": 1,
            "groups": [_mark(i)],
        }
        for i, e in enumerate(p.entry for p in planned.entries)
    ]
    path.write_text(json.dumps({"entries": entries}), encoding="utf-8")


def _mark(index: int) -> str:
    return f"autoeval_{index}"


def _directories(runs: Path, index: int) -> list[Path]:
    if not runs.is_dir():
        return []
    return sorted(d for d in runs.iterdir() if d.name.endswith(f",groups={_mark(index)}"))


def _without(run_name: str, index: int, model: str) -> str:
    return run_name.removesuffix(f",groups={_mark(index)}").replace(f"model={model.replace('/', '_')}", "")
