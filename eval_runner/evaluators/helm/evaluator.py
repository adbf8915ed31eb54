"""Evaluate a checkpoint with HELM: `helm-run` as a child in an environment of its own, then its result files."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.helm import deployment, plan, reason, scores
from eval_runner.evaluators.helm.kept import Place
from eval_runner.evaluators.helm.place import environment, has_data, share_data
from eval_runner.evaluators.helm.settings import Entry, Settings, parse
from eval_runner.evaluators.in_parts import InParts, tokenizer_content
from eval_runner.evaluators.written import clean, digest, interpreter, located, prefixed
from eval_runner.results.schema import Evaluation, Instance, Score

SUITE = "autoeval"
OUTPUT = "output"
LAST = "per_instance_stats.json"
"""What HELM writes last into a run's directory."""
THREADS = 2
"""Requests at once. HELM's local model answers one after the other; more threads only tokenize ahead. A server is
asked for one at a time: it would put those that come together into one batch, whose numbers depend on its size."""


class HelmEvaluator:
    """HELM on a local checkpoint. See `settings.Settings` for the keys."""

    def __init__(self, settings: dict[str, Any], context: Context):
        self._settings = parse(settings, context)
        self._context = context
        self._plans: dict[Path, plan.Plan] = {}

    def check(self) -> None:
        """Raise ConfigError unless the environment, the entries and the files that they name are there."""
        self._plan(interpreter(self._context, self._settings.env, "helm"))

    def evaluate(self, job: Job) -> Outcome:
        """Run every entry that no earlier attempt finished; the scores are complete or there are none. See the
        protocol for what it raises. A server is started only where an entry is left to run."""
        self._check_served(job)
        python = interpreter(self._context, self._settings.env, "helm")
        job.progress(0.0, "asking HELM for the runs")
        planned = self._plan(python)
        env, versions = environment(python, job.work_dir)
        versions = planned.versions | versions | job.facts
        if not job.loadable:
            versions |= job.server_facts
            versions.pop("device", None)  # HELM's, on which nothing is computed
        run = _Run(job, planned, deployment.model_name(job.name), versions, self._settings, self._place())
        if missing := run.parts.missing():
            self._prepare(job, run, missing)
            status = job.run(self._command(python, run.model, planned, job), env=env, on_tick=run.look)
            run.finish(status, self._context.where)
        job.progress(1.0, "HELM: all scores read")
        return run.parts.outcome("helm")

    def _prepare(self, job: Job, run: _Run, missing: list[int]) -> None:
        """Write what HELM is to read."""
        deployment.write(job.work_dir / "models", run.model, job, self._settings.torch_dtype)
        _write_entries(job.work_dir / "runs.conf", {i: run.planned.entries[i].entry for i in missing})
        share_data(job.work_dir / OUTPUT, self._data_dir())

    def _check_served(self, job: Job) -> None:
        if job.loadable:
            return
        if self._settings.torch_dtype:
            raise ConfigError(prefixed(self._context, f"{self._context.where}.torch_dtype: is for a checkpoint that "
                              "HELM loads, and this one is served; set it by the server's arguments"))  # fmt: skip
        if job.max_length is None:
            raise CheckpointError(
                f"{job.path}: nothing says how many tokens its model takes, so that no text can be cut to fit; hand it "
                "over from training, whose arguments tell its sequence length, or configure `convert`"
            )

    def _place(self) -> Place | None:
        """Where HELM's own output is kept; None where it is not."""
        s = self._settings
        return Place(located(self._context.base_dir, s.output_path), s.output_suite or "") if s.output_path else None

    def _plan(self, python: Path) -> plan.Plan:
        """Asked once for each environment, and again once a file that the plan was made from has changed."""
        known = self._plans.get(python)
        if known is None or not known.is_current():
            known = self._plans[python] = plan.make(self._settings, self._context, python, self._data_dir())
        return known

    def _data_dir(self) -> Path:
        """HELM's data sets: the user's own directory, else that of a HELM which wrote to `output_path` and left its
        data there, else one that all suites share."""
        s, base = self._settings, self._context.base_dir
        if s.data_dir:
            return located(base, s.data_dir)
        if s.output_path and has_data(output := located(base, s.output_path)):
            return output
        return self._context.environments / "helm-data"

    def _command(self, python: Path, name: str, planned: plan.Plan, job: Job) -> list[str]:
        s = self._settings
        return [
            str(python), "-m", "helm.benchmark.run",
            "--conf-paths", "runs.conf", "--local-path", "models", "--models-to-run", name, "--suite", SUITE,
            "--max-eval-instances", str(s.max_instances), "--num-train-trials", str(s.num_train_trials),
            "--num-threads", str(THREADS if job.loadable else 1), "--disable-cache", "--output-path", OUTPUT,
            "--plugins", *planned.plugins,
        ]  # fmt: skip


class _Run:
    """The entries of one checkpoint, each from its own runs of HELM or from an earlier attempt."""

    def __init__(
        self, job: Job, planned: plan.Plan, model: str, versions: dict[str, str], settings: Settings,
        place: Place | None,
    ) -> None:  # fmt: skip
        self._place = place
        self.planned = planned
        self.model = model
        self._job = job
        self._versions = versions
        self._runs = job.work_dir / OUTPUT / "runs" / SUITE
        self._since = time.monotonic()
        self._tried: set[int] = set()
        sources = {str(path): was for path, was in planned.sources.items()}
        data = {path: digest(path) for path in planned.files}
        self._provenance = [sources | {str(f): data[f] for f in one.entry.files} for one in planned.entries]
        tokenizer = tokenizer_content(job)
        asked = [settings.max_instances, settings.num_train_trials, settings.torch_dtype, job.trust_remote_code,
                 job.max_length]  # fmt: skip
        keys = [
            json.dumps([
                one.entry.description, one.entry.benchmark, one.split, one.lower_is_better,   # by metric
                asked, tokenizer, planned.plugins, versions, provenance,
            ])
            for one, provenance in zip(planned.entries, self._provenance, strict=True)
        ]  # fmt: skip
        self.parts = InParts(job, keys, "entries")

    def look(self) -> None:
        """Called while HELM works: keep what is finished, and show how far it is.

        HELM takes one entry after the other, and makes a run's directory when it begins.
        """
        total = len(self.parts)
        begun = [i for i in self.parts.missing() if _directories(self._runs, i)]
        for i in begun[:-1]:
            if i not in self._tried:
                self._tried.add(i)      # what cannot be read, or is no number, is told in the end
                self._keep(i, {}, tell=False)
        done = self.parts.earlier + sum(1 for _ in self._runs.glob(f"*/{LAST}"))
        self._job.progress(0.05 + 0.9 * min(done / total, 1), f"HELM: {done} of {total} runs")

    def finish(self, status: int, where: str) -> None:
        """HELM has ended with `status`: read the rest. Raises the reason why it failed, and what `scores.read` does."""
        if status != 0:
            failed = []
            for i in self.parts.missing():
                directories = _directories(self._runs, i)
                if len(directories) == self.planned.entries[i].runs and all((d / LAST).exists() for d in directories):
                    self._keep(i, {}, tell=False)
                else:
                    failed.append(self.planned.entries[i].entry)
            which = ", ".join(f"{e.where} ({e.description})" for e in failed[:3]) or where
            raise reason.failure(status, self._job.log, f"HELM failed at {which}")
        dropped = reason.dropped_nan(self._job.log)
        for i in self.parts.missing():
            self._keep(i, dropped, tell=True)

    def _keep(self, i: int, dropped: dict[str, set[str]], *, tell: bool) -> None:
        """Read the scores of an entry, and keep them for another attempt."""
        outcome = None
        with contextlib.nullcontext() if tell else contextlib.suppress(AutoEvalError):
            found, values = self._read(i, dropped)
            if self._place is not None:
                for directory in _directories(self._runs, i):
                    self._place.keep(directory, _mark(i), self.model, self._job.step)
            now = time.monotonic()
            part = Evaluation("helm", now - self._since, tuple(found), self._versions, self._provenance[i])
            self._since = now
            outcome = Outcome(part, values)
        if outcome is not None:     # a checkpoint that was changed is told in any case
            self.parts.put(i, outcome)

    def _read(self, i: int, dropped: dict[str, set[str]]) -> tuple[list[Score], list[Instance]]:
        one, directories = self.planned.entries[i], _directories(self._runs, i)
        if not directories:
            raise AutoEvalError(f"{one.entry.where} ({one.entry.description}): HELM left no run; log: {self._job.log}")
        found: list[Score] = []
        instances: list[Instance] = []
        for directory in directories:
            benchmark = one.entry.benchmark
            if len(directories) > 1:  # an argument that HELM expands to several runs
                benchmark += "." + clean(_without(directory.name, i, self.model))
            for metric in one.metrics:
                score, values = scores.read(
                    directory, benchmark, metric, one.split, one.lower_is_better.get(metric),
                    was_nan=metric in dropped.get(directory.name, ()),
                )  # fmt: skip
                found.append(score)
                instances += values
        return found, instances


def _write_entries(path: Path, chosen: dict[int, Entry]) -> None:
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
        for i, e in chosen.items()
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
