"""Files for a GPT evaluation, written by tests: questions, a baseline, prompts, a reviewer, anchors. No real judge."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.journal import Journal
from eval_runner.evaluators.gpt.records import Answer, Prompt, Question, Reviewer
from eval_runner.evaluators.gpt.service import Service
from tests.judge_stand_in import Body, JudgeStandIn

PAIR = "Q: {question}\n<1>{answer_1}</1>\n<2>{answer_2}</2>\nScores as `a,b` in the last line."
SHOWN = re.compile(r"Q: (.*)\n<1>(.*)</1>\n<2>(.*)</2>", re.DOTALL)
OURS = re.compile(
    r"<<<QUESTION\n(.*)\nQUESTION>>>.*<<<ANSWER 1\n(.*)\nANSWER 1>>>.*<<<ANSWER 2\n(.*)\nANSWER 2>>>", re.DOTALL
)
"""The prompt of the package, in which anchors are shown."""
LINE = Prompt("general", "You judge.", PAIR)
JSON = Prompt("general", "You judge.", PAIR, output="json")
REVIEWER = Reviewer("general", "judge-1", 0.0, 256)
QUESTIONS = [Question(i, f"What is {i} and {i}?", "sums" if i % 2 else "words") for i in range(1, 5)]


def answers(model: str, questions: Iterable[Question] = QUESTIONS) -> list[Answer]:
    return [Answer(q.id, model, f"{model} says {q.id}") for q in questions]


def lines(path: Path, objects: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects), encoding="utf-8")
    return path


def asked(body: Body) -> tuple[str, str, str]:
    """What the judge is shown: the question and the two answers."""
    text = body["messages"][1]["content"]
    found = SHOWN.search(text) or OURS.search(text)
    assert found is not None
    return found[1], found[2], found[3]


def points(score: Callable[[str, str], float], body: Body, *, form: bool = False) -> str:
    """A judge's reply that gives each answer what `score` makes of the question and it; JSON where that is wanted."""
    question, first, second = asked(body)
    one, two = score(question, first), score(question, second)
    if form or "response_format" in body:
        return json.dumps({"explanation": "", "score_1": one, "score_2": two})
    return f"Fine.\n{one:g},{two:g}"


class Judge(JudgeStandIn):
    """With `version`, the name that it reports in place of the one that it is asked by. It closes what asked it."""

    version = ""

    def asker(self, service: Service, directory: Path, **options: Any) -> Asker:
        self._askers = [*getattr(self, "_askers", []), Asker(service, Journal(directory), **options)]
        return self._askers[-1]

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        for asker in getattr(self, "_askers", []):
            asker.wire.client.close()
            asker.journal.close()

    def answer(self, path: str, body: Body, fault: Any) -> tuple[int, Any]:
        status, told = super().answer(path, body, fault)
        return status, told | {"model": self.version} if self.version and "model" in told else told


def write_files(directory: Path, questions: Sequence[Question] = QUESTIONS, *, anchors: int = 2) -> None:
    """`questions.jsonl`, `baseline.jsonl`, `prompts.jsonl`, `reviewers.jsonl` and `anchors.jsonl`."""
    lines(directory / "questions.jsonl", (
        {"question_id": q.id, "text": q.text, "category": q.category} for q in questions
    ))  # fmt: skip
    lines(directory / "baseline.jsonl", (
        {"question_id": a.question, "model_id": "base", "text": a.text} for a in answers("base", questions)
    ))  # fmt: skip
    lines(directory / "prompts.jsonl", [{
        "category": "general", "system_prompt": LINE.system, "prompt_template": PAIR, "defaults": {},
    }])  # fmt: skip
    lines(directory / "reviewers.jsonl", [{
        "category": "general", "metadata": {"model": "judge-1", "temperature": 0.0, "max_tokens": 256},
    }])  # fmt: skip
    lines(directory / "anchors.jsonl", (
        {"question_id": f"a{i}", "text": f"Say {i}.", "category": "general", "answer_1": f"{i}", "answer_2": "no"}
        for i in range(anchors)
    ))  # fmt: skip


def entry(url: str, **more: Any) -> dict[str, Any]:
    """An entry of a suite for these files, with the judge at this URL."""
    return {
        "question_file": "questions.jsonl", "baseline_file": "baseline.jsonl", "prompt_file": "prompts.jsonl",
        "reviewer_file": "reviewers.jsonl", "anchors": "anchors.jsonl", "answers": {"max_tokens": 16},
        "judge": {"base_url": url, "api_key_env": None},
    } | more  # fmt: skip
