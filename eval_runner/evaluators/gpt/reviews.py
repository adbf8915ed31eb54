"""Put answers before the judge, and read its verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import prompts, verdict
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.records import Answer, Judged, Prompt, Question, Reply, Request, Review, Reviewer
from eval_runner.evaluators.gpt.service import ParameterRefused
from eval_runner.evaluators.gpt.settings import JudgeSettings

FORMAT = "response_format"


@dataclass(frozen=True)
class Shown:
    """What one review is of: an answer, or two in this order. `judge` says who is asked, and how."""

    question: Question
    first: Answer
    second: Answer | None
    prompt: Prompt
    judge: Reviewer

    @property
    def answers(self) -> int:
        return 1 if self.second is None else 2

    def request(self, structured: bool) -> Request:
        return prompts.render(
            self.prompt, self.judge, self.question, self.first, self.second, structured=structured
        )


@dataclass(frozen=True)
class Panel:
    """Who judges. `direct` asks at once; `bulk` may take its time, as a batch does. `prompts` and `reviewers` are by
    category, `settings` replaces what the latter say."""

    direct: Asker
    bulk: Asker
    prompts: Mapping[str, Prompt]
    reviewers: Mapping[str, Reviewer]
    settings: JudgeSettings

    def shown(self, question: Question, first: Answer, second: Answer | None = None) -> Shown:
        return Shown(
            question, first, second, prompts.prompt_for(self.prompts, question.category),
            prompts.reviewer_for(self.reviewers, question.category, self.settings),
        )  # fmt: skip


def judge(
    panel: Panel, questions: Sequence[Question], answers: Sequence[Answer], baseline: Sequence[Answer] | None
) -> tuple[list[Judged], str]:
    """Every question with its reviews: of both orders where there is a baseline, else of the answer alone. The text
    says whether the judge was bound to a form (`structured`). Raises what `Asker.ask` does."""
    shown: list[Shown] = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if baseline is None:
            shown.append(panel.shown(question, answer))
        else:
            shown += [panel.shown(question, answer, baseline[i]), panel.shown(question, baseline[i], answer)]
    found, form = review(panel, shown)
    each = 1 if baseline is None else 2
    judged = [
        Judged(question, answer, baseline[i] if baseline else None, tuple(found[each * i : each * (i + 1)]))
        for i, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    return judged, form


def review(panel: Panel, shown: Sequence[Shown]) -> tuple[list[Review], str]:
    """The reviews, in this order, and whether their judge was bound to a form. A reply without clear scores is asked
    for them once more, in the same conversation."""
    replies: dict[int, Reply] = {}
    bound = _bound(panel, shown, replies)
    requests = [one.request(bound.get(one.judge.model, False)) for one in shown]
    left = [i for i in range(len(shown)) if i not in replies]
    replies |= dict(zip(left, panel.bulk.ask([requests[i] for i in left]), strict=True))
    reviews = [_read(replies[i], one) for i, one in enumerate(shown)]
    unclear = [i for i, one in enumerate(reviews) if one.state == "unparsable"]
    again = [prompts.repair(requests[i], replies[i].text, shown[i].prompt, shown[i].answers) for i in unclear]
    for i, reply in zip(unclear, panel.direct.ask(again), strict=True):
        second = _read(reply, shown[i])
        reviews[i] = replace(second, text=f"{reviews[i].text}\n\n[asked for the scores only]\n\n{second.text}")
    return reviews, " and ".join(sorted({str(b).lower() for b in bound.values()})) or "not asked for"


def _read(reply: Reply, shown: Shown) -> Review:
    if reply.refused:
        return Review("refused", (), reply.text, reply.model)
    cut = reply.finish == "length" and shown.prompt.output == "line"    # 10 may stand there as 1
    scores = None if cut else verdict.parse(reply.text, shown.prompt, shown.answers)
    state: Literal["ok", "unparsable"] = "unparsable" if scores is None else "ok"
    return Review(state, scores or (), reply.text, reply.model)


def _bound(panel: Panel, shown: Sequence[Shown], replies: dict[int, Reply]) -> dict[str, bool]:
    """By the judge's model, whether its server is asked to keep to a form (structured outputs); only where a prompt
    wants JSON. With ``auto``, one request tells, whose reply is put into `replies`; what was asked in an earlier
    attempt decides for the rest."""
    found: dict[str, bool] = {}
    for model in sorted({one.judge.model for one in shown if one.prompt.output == "json"}):
        places = [i for i, one in enumerate(shown) if one.judge.model == model and one.prompt.output == "json"]
        if panel.settings.structured != "auto":
            found[model] = panel.settings.structured == "true"
        elif any(panel.direct.known(shown[i].request(True)) for i in places):
            found[model] = True
        elif any(panel.direct.known(shown[i].request(False)) for i in places):
            found[model] = False
        else:
            found[model] = _takes_form(panel.direct, shown[places[0]], places[0], replies)
    return found


def _takes_form(asker: Asker, shown: Shown, place: int, replies: dict[int, Reply]) -> bool:
    try:
        (replies[place],) = asker.ask([shown.request(True)])
    except ParameterRefused as refused:
        if not refused.parameter.startswith(FORMAT):
            raise
        return False
    return True


def check_unreviewed(judged: Sequence[Judged], most: float, where: str) -> None:
    """Raise ConfigError where the judge left out more than this share of the questions: what is left would be scored
    as if it were all. Another try would be given the same replies."""
    left = [one for one in judged if not one.reviewed]
    if not judged or len(left) / len(judged) <= most:
        return
    states = [review.state for one in left for review in one.reviews]
    raise ConfigError(
        f"{where}.max_unreviewed: {len(left)} of {len(judged)} questions have no scores ({states.count('refused')} "
        f"reviews refused, {states.count('unparsable')} unparsable), more than {most:g} of them, such as "
        f"{', '.join(repr(one.question.id) for one in left[:3])}: {_short(left[0])}; mend the prompts, choose "
        "another judge, or raise it"
    )


def _short(judged: Judged) -> str:
    text = next(" ".join(review.text.split()) for review in judged.reviews if review.state != "ok")
    return repr(text if len(text) <= 120 else text[:120] + "…")
