"""Read the files of a GPT evaluation, and write its answers and reviews; the formats are the older toolkit's.

All of them are JSON lines in UTF-8. Ids 1 and "1" are the same question: the older files have whole numbers, other
tools write text, and scores are kept by text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autoeval_hooks import fsio
from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt.lines import SHOWN, Line, Problems, kind, read_lines
from eval_runner.evaluators.gpt.records import ANCHORED, Answer, Judged, Mode, Prompt, Question, Reviewer
from eval_runner.evaluators.gpt.settings import Located
from eval_runner.evaluators.written import label

T = TypeVar("T")
N = TypeVar("N", int, float)

MAX_ID = 200
"""Characters: an id stands in every row of a question."""
_PROMPT_FIELDS = ("category", "system_prompt", "prompt_template", "defaults", "output", "description", "prompt_id")
_REVIEWER_FIELDS = ("category", "metadata", "description", "reviewer_id")
_METADATA = ("model", "temperature", "max_tokens", "description")


@dataclass(frozen=True)
class Inputs:
    """What the files say. `baseline` has one answer for each question, in the questions' order, where a file gives it.
    `prompts` and `reviewers` are by category."""

    questions: tuple[Question, ...]
    baseline: tuple[Answer, ...] | None
    prompts: Mapping[str, Prompt]
    reviewers: Mapping[str, Reviewer]


def read_inputs(located: Located, mode: Mode) -> Inputs:
    """Read all files. Raises ConfigError, the errors of all files at once."""
    errors: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except ConfigError as error:
            errors.append(str(error))
            return None

    questions = attempt(lambda: read_questions(located.questions, mode))
    baseline = None
    if (path := located.baseline) is not None:
        baseline = attempt(lambda: read_answers(path, questions or ()))
    prompts = attempt(lambda: read_prompts(located.prompts))
    reviewers = attempt(lambda: read_reviewers(located.reviewers))
    if errors or questions is None or prompts is None or reviewers is None:
        raise ConfigError("; ".join(errors))
    return Inputs(questions, baseline, prompts, reviewers)


def read_questions(path: Path, mode: Mode) -> tuple[Question, ...]:
    """`question_id` (whole number or text), `text`, `category`, optional `reference`; other fields are passed over.
    Raises ConfigError for whatever does not fit, and in mode ``reference`` for a question without one."""
    problems = Problems(path)
    questions, at, names = [], dict[str, int](), dict[str, str]()
    for line in read_lines(problems):
        category = line.text("category")
        if (other := names.setdefault(label(category), category)) != category:
            line.problem(f"category {category!r:.60}: has the name {label(category)!r:.60} among the scores, as "
                         f"{other!r:.60} has; use letters, digits, `.`, `_` and `-`")  # fmt: skip
        if label(category) == ANCHORED:
            line.problem(f"category {category!r}: is the name of the judge's anchors among the scores; choose another")
        reference = line.text("reference") if mode == "reference" or "reference" in line.data else ""
        questions.append(Question(_id(line, at), line.text("text"), category, reference))
    problems.check()
    return tuple(questions)


def read_answers(path: Path, questions: Sequence[Question]) -> tuple[Answer, ...]:
    """The answer to each question, in the questions' order and with their ids: `question_id`, `model_id`, `text`;
    other fields, and answers to other questions, are passed over. Raises ConfigError for whatever does not fit:
    a question without an answer, an empty answer, two answers to one question, answers of two models."""
    problems = Problems(path)
    given, at = dict[str, Answer](), dict[str, int]()
    for line in read_lines(problems):
        identity = _id(line, at)
        given.setdefault(str(identity), Answer(identity, line.text("model_id"), line.text("text", blank=True)))
    problems.check()
    found = [(q, given[str(q.id)]) for q in questions if str(q.id) in given]
    if len(found) < len(questions):
        problems.add("no answer to " + _ids(q for q in questions if str(q.id) not in given))
    if empty := [q for q, answer in found if not answer.text.strip()]:
        problems.add("every answer is empty" if len(empty) == len(questions) else "an empty answer to " + _ids(empty))
    if len(models := sorted({answer.model for _, answer in found})) > 1:
        problems.add(f"the answers are of {len(models)} models ({', '.join(map(repr, models[:SHOWN]))}); "
                     "keep one's")  # fmt: skip
    problems.check()
    return tuple(Answer(q.id, answer.model, answer.text) for q, answer in found)


def read_prompts(path: Path) -> dict[str, Prompt]:
    """By category: `category`, `system_prompt`, `prompt_template`, and optional `defaults`, `output`, `description`.
    Raises ConfigError for whatever does not fit. Templates are checked by `prompts.check`."""
    problems = Problems(path)
    prompts: dict[str, Prompt] = {}
    for line in read_lines(problems):
        line.only(_PROMPT_FIELDS)
        category = _category(line, prompts)
        defaults = line.data.get("defaults", {})
        if not isinstance(defaults, dict):
            line.problem(f"`defaults`: expected an object, found {kind(defaults)}")
            defaults = {}
        values = Line(line.number, defaults, problems)
        output = line.data.get("output", "line")
        if output not in ("line", "json"):
            line.problem(f"`output`: {output!r:.60} is neither 'line' nor 'json'")
        system, template = line.text("system_prompt", blank=True), line.text("prompt_template")
        texts = {name: values.text(name, blank=True) for name in defaults}
        prompts[category] = Prompt(category, system, template, texts, "json" if output == "json" else "line")
    problems.check()
    return prompts


def read_reviewers(path: Path) -> dict[str, Reviewer]:
    """By category: `category`, `metadata` with optional `model`, `temperature`, `max_tokens`; a model that is not named
    is "". Raises ConfigError for whatever does not fit; a field that would not be sent to the judge does not."""
    problems = Problems(path)
    reviewers: dict[str, Reviewer] = {}
    for line in read_lines(problems):
        line.only(_REVIEWER_FIELDS)
        category = _category(line, reviewers)
        metadata = line.data["metadata"] if line.has("metadata") else {}
        if not isinstance(metadata, dict):
            line.problem(f"`metadata`: expected an object, found {kind(metadata)}")
            metadata = {}
        values = Line(line.number, metadata, problems)
        values.only(_METADATA)
        model = values.text("model") if "model" in metadata else ""
        if "description" in metadata:
            values.text("description", blank=True)
        tokens = _number(values, "max_tokens", int, 1, 1 << 31)
        reviewers[category] = Reviewer(category, model, _number(values, "temperature", float, 0, 2), tokens, metadata)
    problems.check()
    return reviewers


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Replace `path` by lines ``{"question_id", "model_id", "text"}``; directories above it are made. Raises
    AutoEvalError where that is not possible."""
    _write(path, ({"question_id": a.question, "model_id": a.model, "text": a.text} for a in answers))


def write_results(path: Path, judged: Sequence[Judged], metadata: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace `path` by a line for each question and a last one of averages; `metadata` is the reviewer's by category
    of the question. Directories above it are made. Raises AutoEvalError where that is not possible.

    With a baseline: ``{"question_id", "metadata", "model1", "model2", "review1", "score1", "review2", "score2"}``;
    scores are ``[a, b]`` in the order shown (model1 first in review1, model2 first in review2), or null where a review
    gave none. Then ``{model1: average, model2: average}`` over both orders of the questions that are reviewed, null
    where none is. Should both have one name, the second is marked `` (baseline)``.
    Without: ``{"question_id", "metadata", "model", "review", "score"}``, and ``{model: average}``.
    """
    _write(path, [*(_result(j, metadata[j.question.category]) for j in judged), _averages(judged)])


def _result(judged: Judged, metadata: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"question_id": judged.question.id, "metadata": dict(metadata)}
    scores = [list(review.scores) if review.state == "ok" else None for review in judged.reviews]
    if judged.baseline is None:
        (review,), (points,) = judged.reviews, scores
        return line | {"model": judged.answer.model, "review": review.text, "score": points and points[0]}
    first, second = judged.reviews
    return line | {
        "model1": judged.answer.model, "model2": judged.baseline.model,
        "review1": first.text, "score1": scores[0], "review2": second.text, "score2": scores[1],
    }  # fmt: skip


def _averages(judged: Sequence[Judged]) -> dict[str, float | None]:
    if not judged:
        return {}
    done = [j for j in judged if j.reviewed]
    answer, baseline = judged[0].answer.model, judged[0].baseline
    if baseline is None:
        return {answer: _mean([j.reviews[0].scores[0] for j in done])}
    second = baseline.model if baseline.model != answer else f"{baseline.model} (baseline)"
    return {
        answer: _mean([points for j in done for points in (j.reviews[0].scores[0], j.reviews[1].scores[1])]),
        second: _mean([points for j in done for points in (j.reviews[0].scores[1], j.reviews[1].scores[0])]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _write(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(one, ensure_ascii=False, allow_nan=False) + "\n" for one in objects)
    try:
        fsio.make_dirs(fsio.FileOps(), str(path.parent))
        fsio.replace(str(path), text.encode("utf-8", "backslashreplace"))   # of half a character: its JSON escape
    except OSError as error:
        raise AutoEvalError(f"{path}: cannot be written ({error.strerror})") from error


def _id(line: Line, at: dict[str, int]) -> int | str:
    """The line's id; `at` holds the lines of those before it."""
    value = line.data["question_id"] if line.has("question_id") else line.number
    if type(value) is not int and not isinstance(value, str):
        line.problem(f"`question_id`: expected a whole number or text, found {kind(value)}")
        return line.number
    shown = str(value)
    if not shown.isprintable() or shown != shown.strip() or not 1 <= len(shown) <= MAX_ID:
        line.problem(f"`question_id`: expected 1 to {MAX_ID} characters that can be shown, no space at the ends")
    elif (first := at.setdefault(shown, line.number)) != line.number:
        line.problem(f"`question_id`: {shown!r:.80} stands in line {first}, too")
    return value


def _category(line: Line, known: Mapping[str, object]) -> str:
    category = line.text("category")
    if category in known:
        line.problem(f"category {category!r:.60} stands in an earlier line, too")
    return category


def _ids(questions: Iterable[Question]) -> str:
    ids = [str(question.id) for question in questions]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"question{'s' if len(ids) > 1 else ''} {', '.join(ids[:SHOWN])}{more}"


def _number(line: Line, name: str, of: type[N], least: int, most: int) -> N | None:
    """A number in a range, None where there is none or null."""
    value = line.data.get(name)
    if value is None:
        return None
    if type(value) not in (int, of) or not least <= value <= most:
        words = "a whole number" if of is int else "a number"
        line.problem(f"`{name}`: expected {words} from {least} to {most}, or null")
        return None
    return of(value)
