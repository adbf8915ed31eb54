"""The evaluator's child: ``python -m eval_runner.evaluators.gpt.worker PHASE SPEC``.

| phase | does |
|---|---|
| prepare | looks whether the judge can be asked, and asks for what all checkpoints share: anchors and the baseline |
| answers | asks the checkpoint's server what the checkpoint has not answered yet |
| review | has the answers judged, and writes the outcome |

It may be ended at any time, by SIGTERM or SIGKILL: every reply that it acts on is in the journal.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from autoeval_hooks import fsio
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.strict import near
from eval_runner.evaluators.base import Context, Outcome
from eval_runner.evaluators.gpt import anchors, answers, details, files, prompts, reviews, scoring, settings, spec
from eval_runner.evaluators.gpt.budget import Budget
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.journal import SUFFIX, Journal
from eval_runner.evaluators.gpt.rates import AllRates
from eval_runner.evaluators.gpt.records import Answer, Judged, Request, Reviewer
from eval_runner.evaluators.gpt.service import Service, Usage
from eval_runner.evaluators.gpt.spec import Spec
from eval_runner.evaluators.written import clean
from eval_runner.results.schema import Evaluation

ANCHORS, BASELINE = "anchors", "baseline"
"""Scopes of the journal that all checkpoints share; a checkpoint's own bears its name."""
ATTEMPT = "answers"
"""The scope of what is not proven yet; it goes with the attempt's directory."""
RATES = "rates.json"
"""In the attempt's directory: what was sent in the last minute."""
UNPROVEN = "external"
"""A server of this type may be swapped while it is asked, and that is seen when it is looked at again: what it answered
is not kept before."""


@dataclass
class Work:
    """What a phase works with. Journals are read when they are first needed."""

    spec: Spec
    directory: Path
    usages: list[Usage] = field(default_factory=list)
    _askers: list[Asker] = field(default_factory=list)
    _journals: dict[str, Journal] = field(default_factory=dict)

    @cached_property
    def chosen(self) -> settings.Settings:
        return settings.parse(self.spec.settings, self.context)

    @cached_property
    def context(self) -> Context:
        return self.spec.context

    @cached_property
    def located(self) -> settings.Located:
        return settings.locate(self.chosen, self.context)

    @cached_property
    def inputs(self) -> files.Inputs:
        return files.read_inputs(self.located, self.chosen.mode)

    @cached_property
    def pairs(self) -> tuple[anchors.Anchor, ...]:
        return anchors.read(self.located.anchors) if self.located.anchors else ()

    @cached_property
    def reviewers(self) -> list[Reviewer]:
        """By question."""
        s = self.inputs
        return [prompts.reviewer_for(s.reviewers, q.category, self.chosen.judge) for q in s.questions]

    @cached_property
    def budget(self) -> Budget | None:
        """Of all that is asked for this evaluation, in whichever attempt and scope."""
        if self.chosen.budget_usd is None:
            return None
        budget = Budget(self.chosen.budget_usd, f"{self.spec.where}.budget_usd")
        for scope in (clean(self.spec.name), ANCHORS, BASELINE):
            budget.recall(self.journal(scope).spent(self.spec.evaluation))
        return budget

    @cached_property
    def rates(self) -> AllRates:
        """Of all services, with what the phase before this one sent."""
        return AllRates(self.directory / RATES)

    def journal(self, scope: str) -> Journal:
        if scope not in self._journals:
            self._journals[scope] = Journal(self.directory_of(scope))
        return self._journals[scope]

    def directory_of(self, scope: str) -> Path:
        return self.directory / scope if scope == ATTEMPT else Path(self.spec.cache) / "gpt" / scope

    def asker(
        self, service: Service, scope: str, *, salt: str = "", what: str = "", part: tuple[float, float] = (0.0, 1.0),
        batch: bool = False,
    ) -> Asker:  # fmt: skip
        """For what is paid for. `part` is which part of the phase its requests are, from one fraction to another, and
        `what` is done."""

        def progress(done: int, total: int) -> None:
            fraction = part[0] + (part[1] - part[0]) * done / max(total, 1)
            self.tell(fraction, f"{what}: {done} of {total}")

        made = Asker(
            service, self.journal(scope), salt=salt, evaluation=self.spec.evaluation,
            budget=self.budget, batch=batch, progress=progress,
            rates=self.rates.of(
                service.base_url, service.api_key_env, service.requests_per_minute, service.tokens_per_minute
            ),
        )  # fmt: skip
        self.usages.append(made.usage)
        self._askers.append(made)
        return made

    def close(self) -> None:
        self.rates.save()
        for asker in self._askers:
            asker.wire.client.close()
        for journal in self._journals.values():
            journal.close()

    def tell(self, fraction: float, what: str) -> None:
        spec.tell(self.directory / spec.PROGRESS, fraction, what)

    # ------------------------------------------------------------------ the checkpoint

    @cached_property
    def style(self) -> answers.Format:
        s = self.spec
        return answers.form(self.chosen.answers.format, Path(s.tokenizer), s.facts, s.where)

    @cached_property
    def asked(self) -> list[Request]:
        return answers.requests(self.inputs.questions, self.chosen.answers, self.style, self.spec.name)

    def checkpoint(self, scope: str) -> Asker:
        s = self.spec
        service = answers.service(s.served, self.chosen.answers, s.name, s.digest, s.facts, s.where)

        def progress(done: int, total: int) -> None:
            self.tell(done / max(total, 1), f"answers: {done} of {total}")

        asker = answers.Served(service, self.journal(scope), progress=progress)
        asker.name = s.served.model if s.served else ""
        self._askers.append(asker)
        return asker

    @property
    def unknown(self) -> list[int]:
        """Which questions the checkpoint has not answered yet."""
        known = self.checkpoint(clean(self.spec.name)).known
        return [i for i, request in enumerate(self.asked) if known(request) is None]

    def keep(self) -> None:
        """What was not proven is so by now. Raises AutoEvalError where it cannot be written."""
        target = self.directory_of(clean(self.spec.name))
        for path in self.directory_of(ATTEMPT).glob(f"*{SUFFIX}"):
            try:
                fsio.make_dirs(fsio.FileOps(), str(target))
                fsio.replace(str(target / path.name), path.read_bytes())    # never seen in part
            except OSError as error:
                raise AutoEvalError(f"{target}: cannot keep the answers: {error.strerror or error}") from error

    def answered(self) -> list[Answer]:
        """The checkpoint's, all of which are known by now."""
        stop = answers.stops(self.chosen.answers, self.style)
        s = self.spec
        asker = self.checkpoint(clean(s.name))
        return answers.answers(asker, self.inputs.questions, self.asked, s.name, stop, s.window)

    # ------------------------------------------------------------------ judge and baseline

    @property
    def judge(self) -> Service:
        return settings.service(self.chosen.judge, "the judge", f"{self.spec.where}.judge")

    def baseline_service(self, chosen: settings.BaselineModel) -> Service:
        return settings.service(chosen, "the baseline", f"{self.spec.where}.baseline")

    def panel(
        self, scope: str, what: str, part: tuple[float, float], *, salt: str = "", batch: bool = False
    ) -> reviews.Panel:
        """With our own prompts for the anchors, so that all suites share their reviews."""
        direct = self.asker(self.judge, scope, salt=salt, what=what, part=part)
        bulk = self.asker(self.judge, scope, salt=salt, what=what, part=part, batch=True) if batch else direct
        asked = self.inputs.prompts
        if scope == ANCHORS:
            asked = files.read_prompts(settings.built_in("prompts-pairwise.jsonl"))
        return reviews.Panel(direct, bulk, asked, self.inputs.reviewers, self.chosen.judge)

    def baseline(self, part: tuple[float, float]) -> Sequence[Answer] | None:
        """The file's, or the API model's, asked at most once."""
        chosen, questions = self.chosen.baseline, self.inputs.questions
        if chosen is None:
            return self.inputs.baseline
        asked = answers.baseline_requests(questions, chosen, self.chosen.answers)
        service = self.baseline_service(chosen)
        with anchors.alone(self.directory_of(BASELINE), lambda: self.tell(part[0], "waits for another runner")):
            self.journal(BASELINE).refresh()
            asker = self.asker(service, BASELINE, what="baseline", part=part)
            return answers.baseline_answers(asker, questions, asked, self.chosen.answers.stop)

    def anchored(self, at: anchors.Version | None, part: tuple[float, float]) -> list[Judged]:
        """The anchors as this version judges them; without one, as the judge's first did."""
        with anchors.alone(self.directory_of(ANCHORS), lambda: self.tell(part[0], "waits for another runner")):
            self.journal(ANCHORS).refresh()
            first = self.first_look(part)
            at = at or first
            panel = self.panel(ANCHORS, "anchors", part, salt=at.reported)
            return anchors.judged(panel, self.pairs, self._usual(at.asked), self.spec.where)

    def first_look(self, part: tuple[float, float]) -> anchors.Version:
        """One request to the judge, once for all evaluations; about a pair of ours where the suite has no anchors."""
        pairs = self.pairs or anchors.read(settings.built_in("anchors.jsonl"))
        return anchors.first_look(self.panel(ANCHORS, "judge", part), pairs, self._usual(None))

    def _usual(self, model: str | None) -> Reviewer:
        """The reviewer of most questions, or of most of those that this model judges."""
        chosen = [r for r in self.reviewers if model in (None, r.model)]
        name, _ = Counter(r.category for r in chosen).most_common(1)[0]
        return next(r for r in chosen if r.category == name)


# ---------------------------------------------------------------------- the phases


def prepare(work: Work) -> None:
    listed = _look(work.asker(work.judge, ANCHORS), {r.model for r in work.reviewers}, work.chosen.judge.accept_models)
    if (chosen := work.chosen.baseline) is not None:
        _look(work.asker(work.baseline_service(chosen), BASELINE), {chosen.model}, chosen.accept_models)
    if work.pairs:
        work.anchored(None, (0.1, 0.5))
    elif not listed:        # nothing tells so far that there is a judge at all
        work.first_look((0.1, 0.5))
    work.baseline((0.5, 1.0))
    spec.write(work.directory / spec.PREPARED, spec.Prepared(len(work.unknown)))


def _look(asker: Asker, models: set[str], accepted: Sequence[str]) -> bool:
    """Whether the service lists its models. Raises ConfigError where those asked for are not among them."""
    listed = asker.models() or []
    for model in sorted(models) if listed else ():
        if model not in accepted and not any(_is(name, model) for name in listed):
            where = asker.service.where
            raise ConfigError(
                f"{where}.model: {asker.service.base_url} lists no model {model!r}{near(model, listed[:100])}; if it "
                f"has it all the same, write it into {where}.accept_models, too"
            )
    return bool(listed)


def _is(listed: str, model: str) -> bool:
    """Some services list what they are asked for as ``models/NAME``, or its dated snapshots only."""
    return listed == model or listed.endswith(f"/{model}") or listed.startswith(f"{model}-")


def answer(work: Work) -> None:
    s, left = work.spec, work.unknown
    asker = work.checkpoint(ATTEMPT if s.facts.get("server") == UNPROVEN else clean(s.name))
    answers.collect(asker, [work.inputs.questions[i] for i in left], [work.asked[i] for i in left], s.window)


def review(work: Work) -> None:
    s, chosen = work.spec, work.chosen
    work.keep()
    baseline, answered = work.baseline((0.0, 0.05)), work.answered()
    panel = work.panel(clean(s.name), "reviews", (0.05, 0.85), batch=chosen.judge.batch)
    judged, form = reviews.judge(panel, work.inputs.questions, answered, baseline)
    _write_files(work, judged)
    reviews.check_unreviewed(judged, chosen.max_unreviewed, s.where)
    scores, instances = scoring.scores(judged, chosen.name, chosen.mode)
    if work.pairs:
        main = anchors.main_version(judged, [r.model for r in work.reviewers])
        extra = anchors.score(work.anchored(main, (0.85, 1.0)), chosen.name)
        scores, instances = [*scores, *extra[0]], [*instances, *extra[1]]
    versions = s.facts | {
        "judge": " and ".join(sorted({r.judge for j in judged for r in j.reviews if r.judge})),
        "judge asked": " and ".join(sorted({r.model for r in work.reviewers})),
        "openai": version("openai"), "structured outputs": form, "answers": work.style,
    }  # fmt: skip
    evaluation = Evaluation("gpt", 0.0, tuple(scores), versions, s.provenance, _sum(work.usages))
    outcome = Outcome(evaluation, instances, [details.of(j, chosen.name, chosen.mode) for j in judged])
    spec.write_outcome(work.directory / spec.OUTCOME, outcome)


def _write_files(work: Work, judged: Sequence[Judged]) -> None:
    """In the older formats, where the settings ask for them."""
    reviewers = {q.category: r.metadata for q, r in zip(work.inputs.questions, work.reviewers, strict=True)}
    writers: dict[str, Callable[[Path], None]] = {
        "answer_file": lambda path: files.write_answers(path, [j.answer for j in judged]),
        "result_file": lambda path: files.write_results(path, judged, reviewers),
    }
    for key, write in writers.items():
        if (written := getattr(work.chosen, key)) is not None:
            write(settings.output_path(written, work.context, step=work.spec.step, model=work.spec.name))


def _sum(usages: Sequence[Usage]) -> dict[str, float]:
    names = ("requests", "cached", "input_tokens", "output_tokens")
    total: dict[str, float] = {name: sum(getattr(usage, name) for usage in usages) for name in names}
    costs = [usage.cost_usd for usage in usages if usage.requests]
    if costs and None not in costs:
        total["cost_usd"] = sum(cost for cost in costs if cost is not None)
    return total


PHASES: dict[str, Callable[[Work], None]] = {"prepare": prepare, "answers": answer, "review": review}


def main(argv: Sequence[str]) -> int:
    phase, path = argv[0], Path(argv[1])
    try:
        with closing(Work(spec.read_spec(path), path.parent)) as work:
            PHASES[phase](work)
    except AutoEvalError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        spec.write(path.parent / spec.ERROR, spec.Failed(error.kind, str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
