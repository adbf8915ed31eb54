"""Judge drift: frozen pairs of answers, judged once for each version of the judge.

A service may change the model behind a name. The pairs never change, so where their win rate does, the judge did, and
scores before and after are not the same thing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from autoeval_hooks import fsio
from autoeval_hooks.errors import ConfigError
from eval_runner.checkpoints.locks import Lock
from eval_runner.evaluators.gpt import prompts, reviews, scoring
from eval_runner.evaluators.gpt.lines import Problems, read_lines
from eval_runner.evaluators.gpt.records import ANCHORED, Answer, Judged, Question, Reviewer
from eval_runner.evaluators.gpt.reviews import Panel, Shown
from eval_runner.results.schema import Instance, Score

METRIC = "win_rate"


@dataclass(frozen=True)
class Anchor:
    """A question with two answers, the first of which is judged against the second."""

    question: Question
    answer: Answer
    other: Answer


@dataclass(frozen=True)
class Version:
    """A judge's name as it is asked for, and as it reports itself."""

    asked: str
    reported: str


def read(path: Path) -> tuple[Anchor, ...]:
    """Lines of `question_id`, `text`, `category`, `answer_1`, `answer_2`; other fields are passed over. Raises
    ConfigError for whatever does not fit."""
    problems, found, seen = Problems(path), [], set[str]()
    for line in read_lines(problems):
        identity = line.data.get("question_id")
        if type(identity) not in (int, str) or identity == "" or str(identity) in seen:
            line.problem("question_id: expected a whole number or a text that no other line has")
            continue
        seen.add(str(identity))
        question = Question(identity, line.text("text"), line.text("category"))  # type: ignore[arg-type]  # int or str
        answers = [Answer(question.id, f"anchor {i}", line.text(f"answer_{i}")) for i in (1, 2)]
        found.append(Anchor(question, *answers))
    problems.check()
    return tuple(found)


def first_look(panel: Panel, anchors: Sequence[Anchor], reviewer: Reviewer) -> Version:
    """The judge's version when it was first asked: one request, once for all evaluations. It tells that the judge works
    before anything else is spent."""
    ((found,), _) = reviews.review(panel, _shown(panel, anchors[:1], reviewer)[:1])
    return Version(reviewer.model, found.judge)


def judged(panel: Panel, anchors: Sequence[Anchor], reviewer: Reviewer, where: str) -> list[Judged]:
    """All pairs, in both orders. `panel` must ask with the version as its salt; `where` is the key path of the entry.
    Raises ConfigError where no pair was reviewed: another try would be given the same replies."""
    found, _ = reviews.review(panel, _shown(panel, anchors, reviewer))
    judged = [
        Judged(one.question, one.answer, one.other, tuple(found[2 * i : 2 * i + 2])) for i, one in enumerate(anchors)
    ]
    if not any(one.reviewed for one in judged):
        states = Counter(review.state for review in found)
        said = " ".join(next(review.text for review in found if review.state != "ok").split())
        raise ConfigError(
            f"{where}.anchors: none of the {len(judged)} anchor pairs was reviewed: {states['refused']} reviews "
            f"refused, {states['unparsable']} unparsable, such as {said[:120]!r}; write `anchors: none`, or choose "
            "another judge"
        )
    return judged


def _shown(panel: Panel, anchors: Sequence[Anchor], reviewer: Reviewer) -> list[Shown]:
    """In both orders. The categories are ours, and the reviewers' file need not know them."""
    return [
        Shown(one.question, first, second, prompts.prompt_for(panel.prompts, one.question.category), reviewer)
        for one in anchors
        for first, second in ((one.answer, one.other), (one.other, one.answer))
    ]


def main_version(judged: Sequence[Judged], asked: Sequence[str]) -> Version:
    """The version that gave most of the reviews; `asked` are the models that each question's were asked of."""
    counted = Counter(
        Version(model, review.judge)
        for one, model in zip(judged, asked, strict=True)
        for review in one.reviews
        if review.judge
    )
    found = counted or [Version(asked[0], "")]      # where every request was filtered, none is reported
    return max(found, key=lambda version: (counted[version], version.reported, version.asked))


def score(judged: Sequence[Judged], name: str) -> tuple[list[Score], list[Instance]]:
    """``NAME.judge_anchors``: the win rate of the first answers, with its interval; neither more nor less is better."""
    benchmark = f"{name}.{ANCHORED}"
    found, instances = scoring.scores(judged, benchmark, "pairwise")
    return (
        [replace(s, higher_is_better=None) for s in found if (s.benchmark, s.metric) == (benchmark, METRIC)],
        [i for i in instances if (i.benchmark, i.metric) == (benchmark, METRIC)],
    )


@contextmanager
def alone(directory: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """While what all evaluations share is asked for, so that no two runners pay for the same. Where the lock cannot be
    had (the file system has none, or it is another user's), they may."""
    with ExitStack() as stack:
        with suppress(OSError):
            fsio.make_dirs(fsio.FileOps(), str(directory))
            lock = stack.enter_context(Lock(directory / "lock"))
            while not lock.alone():
                waiting()
                lock.wait(lambda: False)       # told to stop, the worker is ended
        yield
