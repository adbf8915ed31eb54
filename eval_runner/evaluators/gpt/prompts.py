"""What the judge is asked, and what its reply says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import template, verdict
from eval_runner.evaluators.gpt.lines import SHOWN
from eval_runner.evaluators.gpt.records import Answer, Mode, Prompt, Question, Request, Reviewer
from eval_runner.evaluators.gpt.settings import JudgeSettings

GENERAL = "general"
"""The category that stands in for those without a prompt, or a reviewer, of their own."""
_NEEDED: dict[Mode, frozenset[str]] = {
    "pairwise": frozenset({"question", "answer_1", "answer_2"}),
    "single": frozenset({"question", "answer"}),
    "reference": frozenset({"question", "answer", "reference"}),
}
"""The placeholders that a template must have, or the judge does not see what it is to judge."""


def check(
    prompts: Mapping[str, Prompt], reviewers: Mapping[str, Reviewer], questions: Sequence[Question], mode: Mode,
    judge: JudgeSettings, *, prompt_file: str, reviewer_file: str, where: str,
) -> None:  # fmt: skip
    """Raise ConfigError, all errors at once, unless every question can be put to a judge: a prompt and a reviewer for
    its category, a template that fits the mode, a model, and a reference where the template shows one. The files'
    names, and `where` (the evaluator's key path), are for messages."""
    errors = []
    shows = set()
    for prompt in prompts.values():
        try:
            if "reference" in _names(prompt, mode):
                shows.add(prompt.category)
        except ValueError as error:
            errors.append(f"{prompt_file}: category {prompt.category!r}: prompt_template: {error}")
    lacking = []
    for category in dict.fromkeys(question.category for question in questions):
        try:
            prompt = prompt_for(prompts, category)
            if prompt.category in shows:
                lacking += [q.id for q in questions if q.category == category and not q.reference.strip()]
        except ConfigError as error:
            errors.append(f"{prompt_file}: {error}")
        try:
            if not reviewer_for(reviewers, category, judge).model:
                errors.append(f"{where}.judge.model: missing, and {reviewer_file} names none for {category!r}")
        except ConfigError as error:
            errors.append(f"{reviewer_file}: {error}")
    if lacking:
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        errors.append(f"{prompt_file}: {{reference}} is shown to the judge, and there is no reference for question "
                      f"{', '.join(map(str, lacking[:SHOWN]))}{more}")  # fmt: skip
    if errors:
        raise ConfigError("; ".join(errors))


def prompt_for(prompts: Mapping[str, Prompt], category: str) -> Prompt:
    """The prompt of a category, or the one for `general`. Raises ConfigError that names the category."""
    if prompt := prompts.get(category, prompts.get(GENERAL)):
        return prompt
    raise ConfigError(f"no prompt for the category {category!r}, and none for {GENERAL!r}; add one of them")


def reviewer_for(reviewers: Mapping[str, Reviewer], category: str, judge: JudgeSettings) -> Reviewer:
    """The reviewer of a category, or the one for `general`, with what `judge` replaces; `metadata` then says what is
    really asked for. Its model is "" where nothing names one. Raises ConfigError that names the category."""
    reviewer = reviewers.get(category, reviewers.get(GENERAL))
    if reviewer is None:
        raise ConfigError(f"no reviewer for the category {category!r}, and none for {GENERAL!r}; add one of them")
    asked: dict[str, Any] = {}
    for name in ("model", "temperature", "max_tokens"):
        replaced = getattr(judge, name)
        asked[name] = None if name in judge.omit else getattr(reviewer, name) if replaced is None else replaced
    return dataclasses.replace(reviewer, **asked, metadata=reviewer.metadata | asked)


def render(
    prompt: Prompt, reviewer: Reviewer, question: Question, first: Answer, second: Answer | None = None, *,
    structured: bool = False,
) -> Request:  # fmt: skip
    """The request for a review of one answer, or of two in the order shown. With `structured`, a prompt whose output is
    ``json`` asks the server for that form (``response_format``); one whose output is ``line`` never does.

    What is put in stands there character by character. Raises ConfigError for a template that `check` refuses.
    """
    texts = {"answer": first.text} if second is None else {"answer_1": first.text, "answer_2": second.text}
    values = {**prompt.defaults, "question": question.text, "reference": question.reference, **texts}
    try:
        shown = template.fill(prompt.template, values)
    except ValueError as error:
        raise ConfigError(f"category {prompt.category!r}: prompt_template: {error}") from None
    messages = [{"role": "system", "content": prompt.system}] if prompt.system.strip() else []
    body: dict[str, Any] = {"model": reviewer.model, "messages": [*messages, {"role": "user", "content": shown}]}
    for name in ("temperature", "max_tokens"):
        if (value := getattr(reviewer, name)) is not None:
            body[name] = value
    if structured and prompt.output == "json":
        body["response_format"] = verdict.schema(len(texts))
    return Request("/chat/completions", body)


def repair(request: Request, reply: str, prompt: Prompt, answers: int) -> Request:
    """The conversation so far, and a demand for the scores only; all else is as in `request`."""
    demand = verdict.demand(prompt, answers)
    *before, last = request.body["messages"]
    if reply.strip():
        messages = [*before, last, {"role": "assistant", "content": reply}, {"role": "user", "content": demand}]
    else:       # servers refuse an empty message, and some two of a user in a row
        messages = [*before, last | {"content": f"{last['content']}\n\n{demand}"}]
    return dataclasses.replace(request, body=request.body | {"messages": messages})


def _names(prompt: Prompt, mode: Mode) -> set[str]:
    """The placeholders of a template. Raises ValueError for one that does not fit the mode."""
    ours = _NEEDED[mode] | {"reference"}
    if taken := sorted(ours & prompt.defaults.keys()):
        raise ValueError(f"`defaults` has {', '.join(map(repr, taken))}, which the question and the answers fill")
    found = template.names(prompt.template, ours | prompt.defaults.keys())
    if missing := sorted(_NEEDED[mode] - found):
        raise ValueError(f"mode {mode!r} needs {', '.join('{' + name + '}' for name in missing)} in it")
    return found
