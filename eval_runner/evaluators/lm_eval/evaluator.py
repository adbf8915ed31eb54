"""Evaluate a checkpoint with lm-evaluation-harness, as a child in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.strict import near
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.in_parts import InParts, tokenizer_content
from eval_runner.evaluators.lm_eval import command, plan, reason, scores
from eval_runner.evaluators.lm_eval.settings import Settings, parse
from eval_runner.evaluators.written import clean, digest, interpreter, prefixed
from eval_runner.results.schema import Evaluation

LOOK_S = 1.0
"""Seconds between two looks at what the child has finished."""
_PERCENT = re.compile(rb"(?:Running \w+ requests|Requesting API)\D*(\d+)%")


class LmEvalEvaluator:
    """lm_eval on a checkpoint. See `settings.Settings` for the keys."""

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        self._settings = parse(settings, context)
        self._context = context
        self._plans: dict[Path, plan.Plan] = {}
        if self._settings.through in ("server", "chat") and not context.server:
            raise ConfigError(prefixed(context, f"{context.where}.through: no server is configured; add `server:`"))

    def check(self) -> None:
        """Raise ConfigError unless the environment, the tasks and their local files are there."""
        self._plan(interpreter(self._context, self._settings.env, "lm_eval"))

    def evaluate(self, job: Job) -> Outcome:
        """Run every task that no earlier attempt finished; the scores are complete or there are none. See the protocol
        for what it raises. A server is started only where a task is left to run.

        One process runs all tasks, so that the model is loaded once; each task's result is written, and kept, as soon
        as it is done.
        """
        way = command.through(self._settings, self._context, job)
        python = interpreter(self._context, self._settings.env, "lm_eval")
        job.progress(0.0, "asking lm_eval for the tasks")
        planned = self._plan(python)
        versions = planned.versions | job.facts
        if way != "model":
            versions |= job.server_facts
            versions.pop("device", None)        # lm_eval's, on which nothing is computed
        run = _Run(job, planned, versions, self._settings, way)
        if missing := run.parts.missing():
            told, left = job.work_dir / "plan.json", job.work_dir / "failure.json"
            entries = [planned.entries[i] for i in missing]
            asked = command.plan(self._settings, self._context, job, way, entries)
            told.write_text(json.dumps(asked), encoding="utf-8")
            env = plan.environment(self._settings)
            if way != "model" and job.endpoint is not None:
                env |= command.key_for(job.endpoint())
            program = plan.INSIDE / "autoeval_lm_eval.py"
            status = job.run([str(python), str(program), str(told), str(left)], env=env, on_tick=run.look)
            run.finish(status, left, self._context.where)
        job.progress(1.0, "lm_eval: all scores read")
        return run.parts.outcome("lm_eval")

    def _plan(self, python: Path) -> plan.Plan:
        """Asked once for each environment, and again once the definitions have changed."""
        known = self._plans.get(python)
        if known is None or not known.is_current():
            known = self._plans[python] = plan.make(self._settings, self._context, python)
        return known


class _Run:
    """The tasks of one checkpoint, each from this run of lm_eval or from an earlier attempt."""

    def __init__(
        self, job: Job, planned: plan.Plan, versions: dict[str, str], settings: Settings, way: command.Through
    ) -> None:
        self._job = job
        self._entries = planned.entries
        self._versions = versions
        self._settings = settings
        self._since = self._looked = time.monotonic()
        self._tried: set[int] = set()
        source = {str(planned.include): planned.source} if planned.include else {}
        data = {str(file): digest(file) for entry in self._entries for file in entry.files}
        self._provenance = [source | {str(f): data[str(f)] for f in entry.files} for entry in self._entries]
        tokenizer = tokenizer_content(job)
        asked = {key: value for key, value in vars(settings).items() if key not in ("tasks", "env", "include_path")}
        keys = [
            json.dumps([entry.name, entry.tasks, asked, way, tokenizer, job.trust_remote_code, job.max_length, versions,
                        provenance])
            for entry, provenance in zip(self._entries, self._provenance, strict=True)
        ]  # fmt: skip
        self.parts = InParts(job, keys, "tasks")

    def look(self) -> None:
        """Called while lm_eval works: keep what is finished, and show how far it is."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        self._keep_finished()
        total, missing = len(self.parts), set(self.parts.missing())
        done = total - len(missing - self._tried)
        share = min((done + _percent(self._job.log)) / total, 1.0)
        self._job.progress(0.05 + 0.9 * share, f"lm_eval: {done} of {total} tasks")

    def finish(self, status: int, left: Path, where: str) -> None:
        """lm_eval has ended with `status`: read the rest. Raises the reason why it failed, and what is missing."""
        if status != 0:
            self._keep_finished()
            raise reason.failure(status, left, self._job.log, where)
        for i in self.parts.missing():
            self._keep(i)

    def _keep_finished(self) -> None:
        for i in self.parts.missing():
            if i not in self._tried and (command.output(self._job, self._entries[i]) / "done").exists():
                self._tried.add(i)      # what is missing in it is told in the end
                with contextlib.suppress(ConfigError, CheckpointError):
                    self._keep(i)

    def _keep(self, i: int) -> None:
        """Read the scores of a task, and keep them for another attempt."""
        self.parts.put(i, self._read(i))

    def _read(self, i: int) -> Outcome:
        entry, settings = self._entries[i], self._settings
        where = f"{entry.where} ({entry.name})"
        try:
            found = scores.read(command.output(self._job, entry))
        except AutoEvalError as error:
            raise AutoEvalError(f"{where}: {error}; log: {self._job.log}") from error
        wanted = {clean(key): metrics for key, metrics in settings.metrics.items()}
        gaps = [g for g in found.gaps if not g.metric or g.metric in wanted.get(g.benchmark, (g.metric,))]
        if gaps:
            kind = CheckpointError if any(gap.broken for gap in gaps) else ConfigError
            raise kind(f"{where}: {'; '.join(map(str, gaps[:3]))}; log: {self._job.log}")
        chosen = [s for s in found.scores if s.metric in wanted.get(s.benchmark, (s.metric,))]
        for key in {clean(name) for name in (*entry.tasks, *entry.groups)} & wanted.keys():
            known = {s.metric for s in found.scores if s.benchmark == key}
            if lost := [metric for metric in wanted[key] if metric not in known]:
                raise ConfigError(f"{where}: {key} has no metric {lost[0]!r}{near(lost[0], known)}")
        if absent := [name for name in entry.tasks if clean(name) not in {s.benchmark for s in chosen}]:
            raise ConfigError(f"{where}: lm_eval left no score of {', '.join(absent[:3])}; log: {self._job.log}")
        now = time.monotonic()
        versions = self._versions | found.versions
        if dtype := found.arguments.get("model_dtype"):
            versions["dtype"] = dtype
        kept = {(s.benchmark, s.metric) for s in chosen}
        part = Evaluation(
            "lm_eval", now - self._since,
            tuple(replace(s, benchmark=settings.benchmark(s.benchmark)) for s in chosen),
            versions, self._provenance[i],
        )  # fmt: skip
        self._since = now
        return Outcome(part, [replace(one, benchmark=settings.benchmark(one.benchmark)) for one in found.instances
                              if (one.benchmark, one.metric) in kept])  # fmt: skip


def _percent(log: Path) -> float:
    """How much of the task at work is done, by the last line of its progress bar."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 2048))
        if found := _PERCENT.findall(file.read()):
            return min(int(found[-1]), 99) / 100
    return 0.0
