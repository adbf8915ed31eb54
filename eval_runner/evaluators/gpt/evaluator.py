"""Evaluate a checkpoint with a judge: its server answers the questions, the judge compares, all of it in a child."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from dataclasses import asdict, fields, replace
from typing import Any

from autoeval_hooks.config import canonical
from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner import process, secrets
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.gpt import anchors, files, prompts, settings, spec
from eval_runner.evaluators.gpt.records import Answer, Reviewer
from eval_runner.evaluators.gpt.spec import Phase, Spec
from eval_runner.evaluators.written import digest, prefixed

WORKER = "eval_runner.evaluators.gpt.worker"
PARTS: dict[Phase, tuple[float, float]] = {"prepare": (0.0, 0.1), "answers": (0.1, 0.5), "review": (0.5, 1.0)}
"""Which part of an evaluation a phase is, from one fraction to another."""
WINDOWS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""Where a model's configuration says how many tokens it takes."""


class GptEvaluator:
    """A judge over a served checkpoint. See `settings.Settings` for the keys."""

    def __init__(self, raw: dict[str, Any], context: Context) -> None:
        self._raw = raw
        self._context = context
        self._settings = settings.parse(raw, context)
        self.benchmark = self._settings.name

    def check(self) -> None:
        """Raise one ConfigError with all that is missing or does not fit: the files, the key, the client, a server.
        Nothing is asked of anybody."""
        errors = []
        for look in (self._check_files, self._check_keys, self._check_place):
            try:
                look()
            except ConfigError as error:
                errors.append(str(error))
        if errors:
            raise ConfigError("; ".join(errors))

    def evaluate(self, job: Job) -> Outcome:
        """Ask the judge whether it is there, the checkpoint's server for what it has not answered yet, then the judge
        for its reviews. See the protocol for what it raises."""
        began = time.monotonic()
        if job.endpoint is None:
            raise ConfigError(self._said(f"{self._context.where}: {job.path} is served by nothing here; {_SERVER}"))
        self.check()
        task = self._spec(job)
        self._run(job, "prepare", task)
        if spec.read_prepared(job.work_dir / spec.PREPARED).missing:
            job.progress(PARTS["answers"][0], "GPT: waits for the checkpoint's server")
            self._run(job, "answers", replace(task, endpoint=asdict(job.endpoint())))
        job.release()       # the judge may take long, and holds no GPU meanwhile
        self._run(job, "review", task)
        outcome = spec.read_outcome(job.work_dir / spec.OUTCOME)
        self._check_unchanged(task)
        job.progress(1.0, "GPT: judged")
        return replace(outcome, evaluation=replace(outcome.evaluation, seconds=time.monotonic() - began))

    # ------------------------------------------------------------------ what does not depend on a checkpoint

    def _check_files(self) -> None:
        """The files, and everything that could be asked made of them once."""
        s, where = self._settings, self._context.where
        located = settings.locate(s, self._context)
        inputs = files.read_inputs(located, s.mode)
        prompts.check(
            inputs.prompts, inputs.reviewers, inputs.questions, s.mode, s.judge, prompt_file=str(located.prompts),
            reviewer_file=str(located.reviewers), where=self._said(where),
        )  # fmt: skip
        chosen = [prompts.reviewer_for(inputs.reviewers, q.category, s.judge) for q in inputs.questions]
        if s.budget_usd is not None and any(r.max_tokens is None for r in chosen):
            raise ConfigError(self._said(f"{where}.judge.max_tokens: missing; budget_usd needs it"))
        _render_all(s, inputs, chosen)
        if located.anchors:
            found = anchors.read(located.anchors)
            ours = files.read_prompts(settings.built_in("prompts-pairwise.jsonl"))
            for one in found:
                prompts.render(prompts.prompt_for(ours, one.question.category), chosen[0], one.question, one.answer,
                               one.other)  # fmt: skip

    def _check_keys(self) -> None:
        where = self._context.where
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(self._said(
                f"{where}: {sys.executable} has no openai; run `{sys.executable} -m pip install 'autoeval-hooks[gpt]'`"
            ))  # fmt: skip
        missing = []
        for name, service in (("judge", self._settings.judge), ("baseline", self._settings.baseline)):
            for key in ("api_key_env", "organization_env"):
                variable = getattr(service, key, None)
                if variable and (why := secrets.withheld(variable)):
                    missing.append(why)
                elif variable and not secrets.value(variable).strip():
                    shown = f"${variable}" if variable.isupper() else "the variable that it names"    # no key itself
                    remedy = ", or write null for a service that takes none" if key == "api_key_env" else ""
                    missing.append(f"{where}.{name}.{key}: {shown} is not set; export it{remedy}")
        if missing:
            raise ConfigError(self._said("; ".join(missing)))

    def _check_place(self) -> None:
        where = self._context.where
        if not self._context.server:
            raise ConfigError(self._said(f"{where}: the checkpoint's answers are asked of a server; {_SERVER}"))
        if self._context.cache is None:
            raise ConfigError(self._said(f"{where}: there is no directory for what must not be asked twice"))

    def _said(self, message: str) -> str:
        return prefixed(self._context, message)

    def _provenance(self) -> dict[str, str]:
        """Digests of the files; those of the package bear a name that is the same everywhere."""
        located, ours = settings.locate(self._settings, self._context), settings.built_in("").resolve()
        found = [getattr(located, one.name) for one in fields(located)]
        if located.anchors:
            found.append(settings.built_in("prompts-pairwise.jsonl"))
        paths = [path for path in found if path is not None]
        try:
            return {f"autoeval/{p.name}" if p.resolve().parent == ours else str(p): digest(p) for p in paths}
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error

    # ------------------------------------------------------------------ one checkpoint

    def _spec(self, job: Job) -> Spec:
        provenance = self._provenance()
        # A budget that is raised goes on with what was spent; whatever else changes is another evaluation.
        asked = asdict(replace(self._settings, budget_usd=None))
        told = canonical([job.name, job.digest, self._context.where, asked, provenance])
        c = self._context
        return Spec(
            settings=self._raw, base_dir=str(c.base_dir), environments=str(c.environments), where=c.where,
            config_file=c.config_file, server=c.server, cache=str(c.cache), name=job.name, digest=job.digest,
            step=job.step, tokenizer=str(job.tokenizer), window=_window(job), facts=job.facts | job.server_facts,
            evaluation=hashlib.sha256(told.encode()).hexdigest()[:32], provenance=provenance,
        )  # fmt: skip

    def _run(self, job: Job, phase: Phase, task: Spec) -> None:
        """One phase in a child. Raises the error that it ended with."""
        path, progress, error = (job.work_dir / name for name in (spec.SPEC, spec.PROGRESS, spec.ERROR))
        for old in (progress, error):
            old.unlink(missing_ok=True)
        spec.write(path, task)
        first, last = PARTS[phase]
        job.progress(first, f"GPT: {phase}")

        def look() -> None:
            if (told := spec.last_progress(progress)) is not None:
                job.progress(first + (last - first) * told.fraction, f"GPT: {told.what}")

        env = secrets.environment([self._settings.judge.api_key_env, self._settings.judge.organization_env])
        status = job.run([sys.executable, "-m", WORKER, phase, str(path)], env=env, on_tick=look)
        if error.exists() or status != 0:
            self._check_unchanged(task)
        if (failed := spec.error_of(error)) is not None:
            raise type(failed)(f"{failed}; log: {job.log}") from None
        if status != 0:
            said = process.tail(job.log, 1)
            raise AutoEvalError(f"the GPT evaluator's {phase} failed: {process.reason(status)}: {said}; log: {job.log}")


    def _check_unchanged(self, task: Spec) -> None:
        """What a phase made of files that were changed is no mistake of anybody's: another try reads the new ones."""
        try:
            same = self._provenance() == task.provenance
        except ConfigError:     # gone
            same = False
        if not same:
            raise AutoEvalError(f"{self._context.where}: its files were changed while it was evaluated")


_SERVER = "configure `server:`, such as `server: {type: transformers}`"


def _render_all(s: settings.Settings, inputs: files.Inputs, chosen: list[Reviewer]) -> None:
    """Every request for the judge, with stand-ins for the answers that are not there so far."""
    for i, (question, reviewer) in enumerate(zip(inputs.questions, chosen, strict=True)):
        answer, other = Answer(question.id, "", "answer"), None
        if s.mode == "pairwise":
            other = inputs.baseline[i] if inputs.baseline else answer
        prompts.render(prompts.prompt_for(inputs.prompts, question.category), reviewer, question, answer, other)


def _window(job: Job) -> int | None:
    """How many tokens the model takes: what training says, else its configuration; None where neither does."""
    if job.max_length is not None or not job.loadable:
        return job.max_length
    try:
        config = json.loads((job.path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None     # it is the server's to complain of
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        for name in WINDOWS:
            if isinstance(part, dict) and type(value := part.get(name)) is int and value > 0:
                return value
    return None
