"""How answers are put before the judge, through the real client; the judge is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import details, reviews
from eval_runner.evaluators.gpt.records import Judged, Prompt, Question, Reply, Review
from eval_runner.evaluators.gpt.reviews import Panel
from eval_runner.evaluators.gpt.settings import JudgeSettings, service
from tests.gpt_lab import JSON, LINE, QUESTIONS, REVIEWER, Judge, answers, asked, points
from tests.judge_stand_in import Body

Make = Callable[..., Panel]


@pytest.fixture
def panel(tmp_path: Path) -> Make:
    def make(judge: Judge, prompt: Prompt = LINE, **settings: Any) -> Panel:
        told = JudgeSettings(base_url=judge.url, api_key_env=None, attempts=2, **settings)
        asker = judge.asker(service(told, "the judge", "here.judge"), tmp_path / "journal")
        return Panel(asker, asker, {"general": prompt}, {"general": REVIEWER}, told)

    return make


def better(question: str, answer: str) -> float:
    """The checkpoint wins where the number is odd, by one point."""
    return 8.0 if ("mine" in answer) == bool(int(answer.split()[-1]) % 2) else 7.0


def judged(panel: Panel) -> tuple[list[Judged], str]:
    return reviews.judge(panel, QUESTIONS, answers("mine"), answers("base"))


def test_both_orders_of_every_pair(panel: Make) -> None:
    with Judge(lambda body: points(better, body)) as judge:
        found, form = judged(panel(judge))
        assert form == "not asked for"
        shown = [asked(r.body) for r in judge.requests]
    assert sorted(shown) == sorted(
        (q.text, *order) for q in QUESTIONS
        for order in ((f"mine says {q.id}", f"base says {q.id}"), (f"base says {q.id}", f"mine says {q.id}"))
    )  # fmt: skip
    assert [[r.scores for r in j.reviews] for j in found] == [
        [(8.0, 7.0), (7.0, 8.0)] if int(q.id) % 2 else [(7.0, 8.0), (8.0, 7.0)] for q in QUESTIONS
    ]
    assert found[0].baseline is not None
    assert (found[0].question.id, found[0].answer.model, found[0].baseline.model) == (1, "mine", "base")
    assert {r.judge for j in found for r in j.reviews} == {"judge-1"}


def test_one_review_of_each_answer_alone(panel: Make) -> None:
    prompt = Prompt("general", "", "{question} {answer}")
    with Judge(lambda body: "Good.\n6") as judge:
        found, _ = reviews.judge(panel(judge, prompt), QUESTIONS, answers("mine"), None)
        assert len(judge.requests) == 4
    assert [[r.scores for r in j.reviews] for j in found] == [[(6.0,)]] * 4
    assert found[0].baseline is None


def test_what_was_reviewed_is_not_asked_again(panel: Make) -> None:
    with Judge(lambda body: points(better, body)) as judge:
        first, second = judged(panel(judge)), judged(panel(judge))
        assert len(judge.requests) == 8
    assert first == second


def test_a_reply_without_scores_is_asked_for_them_once(panel: Make) -> None:
    """The second demand stands in the same conversation. What gives none then is counted, and is no tie and no zero."""

    def reply(body: Body) -> str:
        question = asked(body)[0]
        if "2 and 2" in question:
            return "I like both."
        first = len(body["messages"]) == 2
        return "First, let me think." if first and "3 and 3" in question else points(better, body)

    with Judge(reply) as judge:
        found, _ = judged(panel(judge))
        repairs = [r.body["messages"] for r in judge.requests if len(r.body["messages"]) > 2]
        judged(panel(judge))
        assert len(judge.requests) == 8 + 4
    assert len(repairs) == 4
    assert sorted(m[2]["content"] for m in repairs) == ["First, let me think."] * 2 + ["I like both."] * 2
    assert all(m[:2] and [x["role"] for x in m] == ["system", "user", "assistant", "user"] for m in repairs)
    assert [[r.state for r in j.reviews] for j in found] == [
        ["ok", "ok"], ["unparsable", "unparsable"], ["ok", "ok"], ["ok", "ok"]
    ]  # fmt: skip
    assert found[1].reviews[0].scores == ()
    assert found[2].reviews[0].scores == (8.0, 7.0)
    assert found[2].reviews[0].text.startswith("First, let me think.\n\n[asked for the scores only]\n\nFine.\n8,7")


@pytest.mark.parametrize(("prompt", "text"), [(LINE, "Fine.\n3, 1"), (JSON, '{"explanation": "", "score_1": 3, "sc')])
def test_a_reply_that_was_cut_off_gives_no_scores(panel: Make, prompt: Prompt, text: str) -> None:
    """The last number may have been a 10."""
    with Judge(lambda body: "") as judge:
        shown = panel(judge, prompt).shown(QUESTIONS[0], answers("mine")[0], answers("base")[0])
    reply = Reply(text, refused=False, finish="length", model="judge-1", input_tokens=1, output_tokens=1)
    assert reviews._read(reply, shown).state == "unparsable"
    if prompt is LINE:
        assert reviews._read(replace(reply, finish="stop"), shown).scores == (3.0, 1.0)


def test_a_refusal_is_counted_and_not_asked_about(panel: Make) -> None:
    with Judge(lambda body: points(better, body)) as judge:
        judge.fault("refusal", when=lambda body: "2 and 2" in asked(body)[0])
        judge.fault("filtered", when=lambda body: "3 and 3" in asked(body)[0])
        found, _ = judged(panel(judge))
        assert len(judge.requests) == 8
    states = {j.question.id: sorted(r.state for r in j.reviews) for j in found}
    assert states == {1: ["ok", "ok"], 2: ["ok", "refused"], 3: ["ok", "refused"], 4: ["ok", "ok"]}
    assert [j.reviewed for j in found] == [True, False, False, True]


# ---------------------------------------------------------------------- structured outputs


def forms(judge: Judge) -> list[bool]:
    return ["response_format" in r.body for r in judge.requests]


def test_a_form_is_asked_for_where_the_server_takes_it(panel: Make) -> None:
    with Judge(lambda body: points(better, body)) as judge:
        found, form = judged(panel(judge, JSON))
        assert (form, forms(judge)) == ("true", [True] * 8)
        assert all(j.reviewed for j in found)
        assert judged(panel(judge, JSON)) == (found, "true")
        assert len(judge.requests) == 8


def test_a_server_that_takes_no_form_is_asked_without(panel: Make) -> None:
    """One refusal tells, and an attempt that goes on asks in the same way without another."""
    with Judge(lambda body: points(better, body, form=True)) as judge:
        judge.fault("response_format", times=None)
        judge.fault("401", when=lambda body: "4 and 4" in asked(body)[0])
        with pytest.raises(ConfigError, match="401"):
            judged(panel(judge, JSON, concurrency=1))
        found, form = judged(panel(judge, JSON))
        assert form == "false"
        assert forms(judge).count(True) == 1
        assert forms(judge)[0]
        assert all(j.reviewed for j in found)
        assert [n for n in judge.counts.values() if n > 1] == [2]       # that of the wrong key


def test_a_form_that_is_demanded_is_not_done_without(panel: Make) -> None:
    with Judge() as judge:
        judge.fault("response_format", times=None)
        with pytest.raises(ConfigError, match="refuses the parameter response_format"):
            judged(panel(judge, JSON, structured="true"))


def test_another_parameter_that_is_refused_is_an_error(panel: Make) -> None:
    with Judge() as judge:
        judge.fault("temperature", times=None)
        with pytest.raises(ConfigError, match=r"temperature.*set here\.judge\.temperature: null"):
            judged(panel(judge, JSON))
        assert len(judge.requests) == 1


def test_a_form_that_is_not_wanted(panel: Make) -> None:
    with Judge(lambda body: json.dumps({"explanation": "", "score_1": 4, "score_2": 5})) as judge:
        found, form = judged(panel(judge, JSON, structured="false"))
        assert (form, set(forms(judge))) == ("false", {False})
    assert found[0].reviews[0].scores == (4.0, 5.0)


def test_a_batch_is_for_all_but_the_first_look_and_the_repairs(panel: Make, tmp_path: Path) -> None:
    def reply(body: Body) -> str:
        repaired = len(body["messages"]) > 2
        return points(better, body) if repaired or "3 and 3" not in asked(body)[0] else "Well."

    with Judge(reply) as judge:
        direct = panel(judge, JSON)
        bulk = judge.asker(service(direct.settings, "the judge", "here.judge"), tmp_path / "journal", batch=True)
        found, _ = judged(replace(direct, bulk=bulk))
        how = [r.method for r in judge.requests]
    assert (how.count("BATCH"), how.count("POST")) == (7, 3)
    assert all(j.reviewed for j in found)


# ---------------------------------------------------------------------- what is left out


def some(*states: str) -> list[Judged]:
    made = []
    for i, state in enumerate(states):
        one = Review("ok", (7.0, 6.0), "fine", "judge-1")
        other = one if state == "ok" else Review(state, (), "I would\nrather not.", "judge-1")  # type: ignore[arg-type]
        question = Question(i, "?", "x", "4")
        made.append(Judged(question, answers("mine", [question])[0], answers("base", [question])[0], (one, other)))
    return made


def test_too_many_questions_without_scores_fail_the_evaluation() -> None:
    reviews.check_unreviewed(some("ok", "ok", "ok", "refused"), 0.25, "here")
    with pytest.raises(ConfigError) as caught:
        reviews.check_unreviewed(some("ok", "ok", "unparsable", "refused"), 0.25, "here")
    assert str(caught.value) == (
        "here.max_unreviewed: 2 of 4 questions have no scores (1 reviews refused, 1 unparsable), more than 0.25 of "
        "them, such as 2, 3: 'I would rather not.'; mend the prompts, choose another judge, or raise it"
    )


def test_what_people_read_of_a_question() -> None:
    good, bad = some("ok", "refused")
    told = details.of(good, "b", "pairwise")
    assert (told.benchmark, told.id, told.category, told.outcome) == ("b", "0", "x", "tie")
    assert told.texts == (
        ("Question", "?"), ("Answer of the checkpoint", "mine says 0"), ("Baseline (base)", "base says 0"),
        ("Reference", "4"), ("Review, checkpoint shown first: 7 : 6 (checkpoint : baseline)", "fine"),
        ("Review, baseline shown first: 7 : 6 (baseline : checkpoint)", "fine"),
    )  # fmt: skip
    told = details.of(bad, "b", "pairwise")
    assert told.outcome == "unreviewed"
    assert told.texts[-1] == ("Review, baseline shown first: refused", "I would\nrather not.")
    alone = replace(good, baseline=None, reviews=(Review("ok", (6.5,), "a\0b", "judge-1"),))
    assert (details.of(alone, "b", "single").outcome, details.of(alone, "b", "single").texts[-1]) == (
        "6.5", ("Review: 6.5", "a\ufffdb")
    )  # fmt: skip
