"""What passes between the parts of the GPT evaluator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

QuestionId = int | str

ANCHORED = "judge_anchors"
"""What the anchors' benchmark has in the place of a category."""

Mode = Literal["pairwise", "single", "reference"]
"""Two answers side by side, against a baseline's; one answer, from 1 to 10; one answer, beside a reference answer."""


@dataclass(frozen=True)
class Question:
    """A line of a question file. `reference` is an answer known to be right, "" where none is given."""

    id: QuestionId
    text: str
    category: str
    reference: str = ""


@dataclass(frozen=True)
class Answer:
    """A line of an answer file. `finish` is why the model ended, as the server says: ``stop``, ``length`` …; "" where
    that is not known."""

    question: QuestionId
    model: str
    text: str
    finish: str = ""


@dataclass(frozen=True)
class Prompt:
    """How the judge is asked about the questions of one category.

    `output` says how it is to answer: ``line`` is the older toolkit's, a last line with the scores separated by a
    comma; ``json`` is an object with an explanation and the scores.
    """

    category: str
    system: str
    template: str
    defaults: dict[str, str] = field(default_factory=dict)
    output: Literal["line", "json"] = "line"


@dataclass(frozen=True)
class Reviewer:
    """Which model judges the questions of one category, and how it is asked; None is what the server takes itself.
    `metadata` is the file's own, for the result file."""

    category: str
    model: str
    temperature: float | None = None
    max_tokens: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Review:
    """One reply of the judge. `scores` are from 1 to 10 in the order in which the answers were shown, and empty unless
    `state` is ``ok``. `judge` is the model's name as the server reports it."""

    state: Literal["ok", "unparsable", "refused"]
    scores: tuple[float, ...]
    text: str
    judge: str


@dataclass(frozen=True)
class Judged:
    """A question with all that belongs to it. With a `baseline`, the first review was shown the checkpoint's answer
    first, the second one the baseline's first; without, there is one review."""

    question: Question
    answer: Answer
    baseline: Answer | None
    reviews: tuple[Review, ...]

    @property
    def reviewed(self) -> bool:
        """Whether every review gave scores; else the question counts as not reviewed, and for nothing else."""
        return all(review.state == "ok" for review in self.reviews)


@dataclass(frozen=True)
class Request:
    """One request to a server that speaks OpenAI's API: `body` goes to ``POST <base URL><path>``."""

    path: Literal["/chat/completions", "/completions"]
    body: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a server answered. `model` is the model's name as it reports it, `cached` whether an earlier request was
    answered so; tokens are 0 where the server does not count them."""

    text: str
    refused: bool
    finish: str
    model: str
    input_tokens: int
    output_tokens: int
    cached: bool = False
