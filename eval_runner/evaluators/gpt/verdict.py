"""The judge's scores: the form that is asked for, and what a reply says. What is not clear is None, never a guess."""

from __future__ import annotations

import json
import re
from typing import Any

from eval_runner.evaluators.gpt.records import Prompt

LOWEST, HIGHEST = 1, 10
MAX_REPLY = 1 << 20
"""Characters; no judge writes more."""

_NUMBER = r"(?:10|[1-9])(?:\.[0-9]{1,6})?"
_LINES = {
    1: re.compile(rf"({_NUMBER})"),
    2: re.compile(rf"({_NUMBER})\s*[,\uff0c]\s*({_NUMBER})"),       # also the wide comma of Japanese and Chinese type
}
_BRACKETS = {"[": "]", "(": ")"}
_BEGIN = re.compile(r'\{\s*["}]')
"""What else begins with a brace, such as code or a set, is no JSON object."""


def fields(answers: int) -> tuple[str, ...]:
    """The names of the scores in a JSON reply for 1 or 2 answers."""
    return ("score",) if answers == 1 else ("score_1", "score_2")


def schema(answers: int) -> dict[str, Any]:
    """`response_format` of a request whose reply is to be JSON. The explanation comes first, to lead to the scores.

    An enumeration, of whole and half points, holds the scores in their range on every server; `minimum` does not.
    """
    points = [x // 2 if x % 2 == 0 else x / 2 for x in range(2 * LOWEST, 2 * HIGHEST + 1)]
    score = {"type": "number", "enum": points}
    properties = {"explanation": {"type": "string"}} | dict.fromkeys(fields(answers), score)
    form = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": form}}


def parse(text: str, prompt: Prompt, answers: int) -> tuple[float, ...] | None:
    """The scores in a reply, from 1 to 10, for 1 or 2 answers in the order shown; None where they are not clear."""
    if len(text) > MAX_REPLY:
        return None
    return _of_line(text, answers) if prompt.output == "line" else _of_json(text, answers)


def demand(prompt: Prompt, answers: int) -> str:
    """What the judge is told when its reply had no clear scores."""
    if prompt.output == "json":
        keys = ", ".join(f'"{name}"' for name in ("explanation", *fields(answers)))
        form = f"one JSON object with the keys {keys}, its explanation in one short sentence"
    elif answers == 1:
        form = "one line with one number"
    else:
        form = "one line with two numbers separated by a comma: the first assistant's score, then the second one's"
    return (f"Your reply did not give clear scores. Reply again with nothing but {form}. "
            f"Scores are numbers from {LOWEST} to {HIGHEST}.")  # fmt: skip


def _of_line(text: str, answers: int) -> tuple[float, ...] | None:
    """Of the last line that is not blank: ``8,9``, ``[8, 9.5]``, ``(8, 9)``."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    last = lines[-1]
    if last[0] in _BRACKETS and last[-1] == _BRACKETS[last[0]]:
        last = last[1:-1].strip()
    found = _LINES[answers].fullmatch(last)
    return _in_range([float(number) for number in found.groups()]) if found else None


def _of_json(text: str, answers: int) -> tuple[float, ...] | None:
    """Of the only JSON object with scores in it, wherever it stands; several with the same scores are as good."""
    try:
        found = [one for one in _objects(text) if any(name in one for name in fields(answers))]
    except (ValueError, RecursionError):
        return None
    verdicts = {_in_range([one.get(name) for name in fields(answers)]) for one in found}
    return verdicts.pop() if len(verdicts) == 1 else None


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, those inside of others left out. Raises ValueError where one begins and is cut or
    malformed: a reply that was cut may quote other scores than its own."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    found, at = [], 0
    while begin := _BEGIN.search(text, at):
        value, at = decoder.raw_decode(text, begin.start())
        found.append(value)
    return found


def _in_range(numbers: list[Any]) -> tuple[float, ...] | None:
    if all(type(number) in (int, float) and LOWEST <= number <= HIGHEST for number in numbers):
        return tuple(float(number) for number in numbers)
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out
