"""Whether a judge drifts: frozen pairs are judged once for each version of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import anchors
from eval_runner.evaluators.gpt.anchors import Version
from eval_runner.evaluators.gpt.records import Answer, Judged, Question, Review
from eval_runner.evaluators.gpt.reviews import Panel
from eval_runner.evaluators.gpt.settings import JudgeSettings, built_in, service
from tests.gpt_lab import LINE, REVIEWER, Judge, lines, points, write_files

GOOD = {"question_id": 1, "text": "Why?", "category": "x", "answer_1": "So.", "answer_2": "No."}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer_2": None}, "line 1: `answer_2`: expected text"),
        ({"question_id": True}, "line 1: question_id: expected a whole number"),
        ({"text": ""}, "line 1: `text`: is empty"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        anchors.read(lines(tmp_path / "a.jsonl", [GOOD | changes]))


def test_a_pair_stands_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 2: question_id: .* that no other line has"):
        anchors.read(lines(tmp_path / "a.jsonl", [GOOD, GOOD | {"question_id": "1"}]))


def test_our_own_pairs_can_be_read() -> None:
    found = anchors.read(built_in("anchors.jsonl"))
    assert len(found) >= 10
    assert all(one.answer.text != one.other.text for one in found)


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[anchors.Anchor, ...]:
    write_files(tmp_path, anchors=4)
    return anchors.read(tmp_path / "anchors.jsonl")


@pytest.fixture
def panel(tmp_path: Path) -> Callable[..., Panel]:
    def make(judge: Judge, salt: str = "") -> Panel:
        settings = JudgeSettings(base_url=judge.url, api_key_env=None)
        asker = judge.asker(service(settings, "the judge", "here.judge"), tmp_path / "journal", salt=salt)
        return Panel(asker, asker, {"general": LINE}, {"general": REVIEWER}, settings)

    return make


def first_two(question: str, answer: str) -> float:
    """Half of the pairs go to the first answer, and half are tied."""
    return 9.0 if answer in ("0", "1") else 5.0


def test_once_for_each_version(pairs: tuple[anchors.Anchor, ...], panel: Callable[..., Panel]) -> None:
    with Judge(lambda body: points(first_two, body)) as judge:
        judge.version = "judge-1-2026-01-01"
        for _ in range(2):
            version = anchors.first_look(panel(judge), pairs, REVIEWER)
            assert version == Version("judge-1", "judge-1-2026-01-01")
            found = anchors.judged(panel(judge, version.reported), pairs, REVIEWER, "here")
        assert len(judge.requests) == 1 + 8
        judge.version = "judge-1-2026-02-02"
        assert anchors.first_look(panel(judge), pairs, REVIEWER) == version     # no more than a first look
        again = anchors.judged(panel(judge, "judge-1-2026-02-02"), pairs, REVIEWER, "here")
        assert len(judge.requests) == 1 + 8 + 8
    assert {r.judge for j in again for r in j.reviews} == {"judge-1-2026-02-02"}
    ((score,), instances) = anchors.score(found, "set")
    assert (score.benchmark, score.metric, score.value, score.n) == ("set.judge_anchors", "win_rate", 0.75, 4)
    assert score.higher_is_better is None
    assert score.low is not None
    assert score.high is not None
    assert score.low < 0.75 < score.high
    assert [i.value for i in instances] == [1.0, 1.0, 0.5, 0.5]


def test_pairs_that_nobody_reviewed_are_a_mistake(
    pairs: tuple[anchors.Anchor, ...], panel: Callable[..., Panel]
) -> None:
    said = r"here\.anchors: none of the 4 anchor pairs was reviewed: 0 reviews refused, 8 unparsable, such as 'no idea "
    with Judge(lambda body: "no idea") as judge, pytest.raises(ConfigError, match=said) as caught:
        anchors.judged(panel(judge), pairs, REVIEWER, "here")
    assert str(caught.value).endswith("; write `anchors: none`, or choose another judge")
    with Judge(lambda body: points(first_two, body) if "Say 1." in str(body) else "no idea") as judge:
        found = anchors.judged(panel(judge, "another version"), pairs, REVIEWER, "here")
    assert [one.reviewed for one in found] == [False, True, False, False]


def test_the_version_of_most_reviews_counts() -> None:
    def one(*judges: str) -> Judged:
        reviewed = tuple(Review("ok", (1.0, 2.0), "", judge) for judge in judges)
        return Judged(Question(1, "?", "x"), Answer(1, "m", ""), Answer(1, "b", ""), reviewed)

    judged = [one("a-1", "a-2"), one("a-2", "a-2"), one("b-1", "b-1"), one("", "")]
    assert anchors.main_version(judged, ["a", "a", "b", "b"]) == Version("a", "a-2")
    assert anchors.main_version([one("a-1", "a-2")], ["a"]) == Version("a", "a-2")      # neither, so always the same
    assert anchors.main_version([one("", ""), one("", "a-1")], ["a", "a"]) == Version("a", "a-1")     # where it is told
    assert anchors.main_version([one("", "")], ["a"]) == Version("a", "")


def test_two_runners_do_not_ask_for_the_same_at_once(tmp_path: Path) -> None:
    inside, waited = [], threading.Event()

    def second() -> None:
        with anchors.alone(tmp_path / "scope", waited.set):
            inside.append(2)

    other = threading.Thread(target=second)
    with anchors.alone(tmp_path / "scope", lambda: None):
        other.start()
        assert waited.wait(30)
        time.sleep(0.3)
        inside.append(1)
    other.join(30)
    assert inside == [1, 2]


def test_where_no_lock_can_be_had_they_may(tmp_path: Path) -> None:
    (tmp_path / "scope").write_text("no directory")
    with anchors.alone(tmp_path / "scope", lambda: None):
        pass
