"""What the judge is asked, and what its reply says."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt import prompts, template, verdict
from eval_runner.evaluators.gpt.records import Answer, Mode, Prompt, Question, Request, Reviewer
from eval_runner.evaluators.gpt.settings import JudgeSettings

PAIR = Prompt("general", "Be fair.", "Q {question} A {answer_1} B {answer_2} {task}", {"task": "Rate {{both}}."})
ONE = Prompt("general", "Be fair.", "Q {question} A {answer}")
REVIEWER = Reviewer("general", "judge-1", 0.2, 100, {"model": "judge-1", "temperature": 0.2, "max_tokens": 100})
QUESTION = Question(1, "Why?", "physics", "Because.")
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


def _check(
    *, made: list[Prompt] | None = None, reviewers: list[Reviewer] | None = None,
    questions: list[Question] | None = None, mode: Mode = "pairwise", judge: JudgeSettings | None = None,
) -> None:  # fmt: skip
    prompts.check(
        {p.category: p for p in ([PAIR] if made is None else made)},
        {r.category: r for r in ([REVIEWER] if reviewers is None else reviewers)},
        questions or [QUESTION], mode, judge or JudgeSettings(),
        prompt_file="p.jsonl", reviewer_file="r.jsonl", where="suites.quick.evaluators[0]",
    )  # fmt: skip


def _refused(**given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _check(**given)
    return str(caught.value)


def test_a_prompt_and_a_reviewer_are_each_of_the_category_else_general() -> None:
    of_math, judge_of_code = replace(PAIR, category="math"), replace(REVIEWER, category="coding")
    by_category = {"general": PAIR, "math": of_math}
    assert prompts.prompt_for(by_category, "math") is of_math
    assert prompts.prompt_for(by_category, "coding") is PAIR
    reviewers = {"general": REVIEWER, "coding": judge_of_code}
    assert prompts.reviewer_for(reviewers, "math", JudgeSettings()) == REVIEWER
    assert prompts.reviewer_for(reviewers, "coding", JudgeSettings()) == judge_of_code
    _check(made=[replace(PAIR, category="physics")])
    _check(reviewers=[replace(REVIEWER, category="physics")])


def test_a_category_without_either_is_named_with_the_file() -> None:
    assert _refused(made=[replace(PAIR, category="math")], reviewers=[replace(REVIEWER, category="math")]) == (
        "p.jsonl: no prompt for the category 'physics', and none for 'general'; add one of them; "
        "r.jsonl: no reviewer for the category 'physics', and none for 'general'; add one of them"
    )


def test_the_settings_replace_what_the_reviewer_file_says() -> None:
    def asked(judge: JudgeSettings) -> Reviewer:
        return prompts.reviewer_for({"general": REVIEWER}, "math", judge)

    assert asked(JudgeSettings()) == REVIEWER
    changed = asked(JudgeSettings(model="judge-2", temperature=0.0))
    assert (changed.model, changed.temperature, changed.max_tokens) == ("judge-2", 0.0, 100)
    assert changed.metadata == {"model": "judge-2", "temperature": 0.0, "max_tokens": 100}
    left_out = asked(JudgeSettings(omit=("temperature",)))
    assert (left_out.temperature, left_out.metadata["temperature"]) == (None, None)


def test_some_model_must_be_named() -> None:
    unnamed = [replace(REVIEWER, model="")]
    assert _refused(reviewers=unnamed) == (
        "suites.quick.evaluators[0].judge.model: missing, and r.jsonl names none for 'physics'"
    )
    _check(reviewers=unnamed, judge=JudgeSettings(model="judge-2"))


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("{question}{answer_1}{answer_2}{promt}", "pairwise", "unknown placeholder {promt}"),
        ("{question}{answer_1}{answer_2}{anser_1}", "pairwise", "unknown placeholder {anser_1}; did you mean 'answer_"),
        ("{question}{answer_1}{answer_2}{answer}", "pairwise", "unknown placeholder {answer}; did you mean 'answer_"),
        ("{question}{answer_1}{answer_2}{ question }", "pairwise", "unknown placeholder { question }; did you mean"),
        ("{question}{answer_1}{answer_2}{}", "pairwise", "{}: only a plain name may stand in braces; write {{ and }}"),
        ("{question}{answer_1}{answer_2}{0}", "pairwise", "{0}: only a plain name may stand in braces"),
        ("{question.__class__}{answer_1}{answer_2}", "pairwise", "{question.__class__}: only a plain name"),
        ("{question[0]}{answer_1}{answer_2}", "pairwise", "{question[0]}: only a plain name"),
        ("{question:>1000000000}{answer_1}{answer_2}", "pairwise", "{question:>1000000000}: only a plain name"),
        ("{question!r}{answer_1}{answer_2}", "pairwise", "{question!r}: only a plain name"),
        ("{question:{task}}{answer_1}{answer_2}", "pairwise", "{question:{task}}: only a plain name"),
        ('{question}{answer_1}{answer_2} as {"score": 1}', "pairwise", '{"score": 1}: only a plain name'),
        ("{question}{answer_1}{answer_2", "pairwise", "expected '}' before end of string; write {{ and }} for braces"),
        ("{question}{answer_1}{answer_2}}", "pairwise", "Single '}' encountered in format string; write {{ and }}"),
        ("{question}{answer_1}", "pairwise", "mode 'pairwise' needs {answer_2} in it"),
        ("{answer_1}{answer_2}", "pairwise", "mode 'pairwise' needs {question} in it"),
        ("{question}{answer_1}", "single", "unknown placeholder {answer_1}; did you mean 'answer'?"),
        ("{question}", "single", "mode 'single' needs {answer} in it"),
        ("{question}{answer}", "reference", "mode 'reference' needs {reference} in it"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit(text: str, mode: Mode, message: str) -> None:
    found = _refused(made=[replace(PAIR, template=text)], mode=mode)
    assert found.startswith(f"p.jsonl: category 'general': prompt_template: {message}")


def test_a_default_cannot_stand_for_an_answer() -> None:
    assert "`defaults` has 'answer_1', which the question and the answers fill" in _refused(
        made=[replace(PAIR, defaults={"task": "x", "answer_1": "y"})]
    )


def test_a_template_that_no_question_uses_is_checked_too() -> None:
    assert "p.jsonl: category 'math': prompt_template: unknown placeholder {x}" in _refused(
        made=[PAIR, replace(PAIR, category="math", template="{x}")]
    )


def test_a_reference_that_is_shown_must_be_there() -> None:
    shows = replace(PAIR, template=PAIR.template + "{reference}")
    questions = [replace(QUESTION, id=i, reference=" " * (i % 2)) for i in range(7)] + [replace(QUESTION, id="x")]
    assert _refused(made=[shows], questions=questions) == (
        "p.jsonl: {reference} is shown to the judge, and there is no reference for question 0, 1, 2, 3, 4 and 2 more"
    )
    _check(made=[shows])
    _check(made=[shows, replace(PAIR, category="physics")], questions=questions)
    _check(made=[replace(ONE, template=ONE.template + "{reference}")], mode="reference")
    _check(made=[ONE], mode="single")


def test_a_request_of_two_answers() -> None:
    request = prompts.render(PAIR, REVIEWER, QUESTION, Answer(1, "m", "one {x}"), Answer(1, "b", "{two}"))
    assert request == Request("/chat/completions", {
        "model": "judge-1",
        "messages": [{"role": "system", "content": "Be fair."},
                     {"role": "user", "content": "Q Why? A one {x} B {two} Rate {{both}}."}],
        "temperature": 0.2, "max_tokens": 100,
    })  # fmt: skip


def test_a_request_of_one_answer_says_only_what_it_must() -> None:
    shown = replace(ONE, system=" ", template="{{{question}}} {answer} {reference}")
    plain = replace(REVIEWER, temperature=None, max_tokens=None)
    request = prompts.render(shown, plain, QUESTION, Answer(1, "m", "one"))
    assert request.body == {
        "model": "judge-1", "messages": [{"role": "user", "content": "{Why?} one Because."}],
    }  # fmt: skip


def test_a_default_never_stands_for_an_answer() -> None:
    wrong = replace(ONE, defaults={"answer": "10"})
    assert "A one" in prompts.render(wrong, REVIEWER, QUESTION, Answer(1, "m", "one")).body["messages"][1]["content"]


def test_a_template_that_check_refuses_is_not_rendered() -> None:
    with pytest.raises(ConfigError, match=r"category 'general': prompt_template: unknown placeholder {answer_1}"):
        prompts.render(PAIR, REVIEWER, QUESTION, Answer(1, "m", "one"))


def test_structured_output_is_asked_of_a_prompt_for_json_only() -> None:
    answer = Answer(1, "m", "a")
    as_json = replace(ONE, output="json")
    assert "response_format" not in prompts.render(ONE, REVIEWER, QUESTION, answer, structured=True).body
    assert "response_format" not in prompts.render(as_json, REVIEWER, QUESTION, answer).body
    form = prompts.render(as_json, REVIEWER, QUESTION, answer, structured=True).body["response_format"]
    assert (form["type"], form["json_schema"]["strict"]) == ("json_schema", True)
    schema = form["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["explanation", "score"]
    assert schema["additionalProperties"] is False
    points = schema["properties"]["score"]["enum"]
    assert json.dumps(points[:4] + points[-2:]) == "[1, 1.5, 2, 2.5, 9.5, 10]"      # not 1.0: servers compare text
    assert schema["properties"]["score"]["type"] == "number"
    two = verdict.schema(2)["json_schema"]["schema"]
    assert two["required"] == ["explanation", "score_1", "score_2"]


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_every_text_is_put_in_as_it_is(question: str, first: str, second: str, task: str) -> None:
    prompt = replace(PAIR, template="<{question}|{answer_1}|{answer_2}|{task}>", defaults={"task": task})
    request = prompts.render(
        prompt, REVIEWER, Question(1, question, "x"), Answer(1, "m", first), Answer(1, "b", second)
    )
    assert request.body["messages"][-1]["content"] == f"<{question}|{first}|{second}|{task}>"


@settings(deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("{}{}{}!:.[]01aq "), st.characters())))
def test_any_template_is_filled_or_refused(text: str) -> None:
    stands_for = {"{{": "{", "}}": "}", "{a}": "{q}", "{q}": "{a}"}
    with contextlib.suppress(ValueError):
        found = template.fill(text, {"a": "{q}", "q": "{a}"})
        assert found == re.sub(r"\{\{|}}|\{a:?}|\{q:?}", lambda m: stands_for[m[0].replace(":", "")], text)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Both are good.\n8,9", (8, 9)),
        ("Both are good.\n 8.5 , 9 \n\n", (8.5, 9)),
        ("8，9", (8, 9)),  # noqa: RUF001  # the wide comma is the point
        ("[8, 10]", (8, 10)),
        ("x\r\n(1,10)\r\n", (1, 10)),
        ("", None),
        (" \n", None),
        ("I cannot judge these.", None),
        ("8,9\nI hope that helps.", None),
        ("Scores: 8, 9", None),
        ("8,9,7", None),
        ("8", None),
        ("8 9", None),
        ("8/10, 9/10", None),
        ("0,9", None),
        ("11,9", None),
        ("9,10.5", None),
        ("-8,9", None),
        ("nan,9", None),
        ("inf,9", None),
        ("1e1,9", None),
        ("08,9", None),
        ("٨,9", None),
        ("8,,9", None),
        ("[8,9)", None),
        ("[8,9", None),
        ("**8,9**", None),
        ("eight,nine", None),
    ],
)
def test_scores_of_a_line(reply: str, scores: tuple[float, ...] | None) -> None:
    assert verdict.parse(reply, PAIR, 2) == scores


@pytest.mark.parametrize(
    ("reply", "scores"),
    [("Good.\n8", (8,)), ("[7.5]", (7.5,)), ("8,5", None), ("8/10", None), ("0", None), ("10.1", None), ("x", None)],
)
def test_the_score_of_a_line(reply: str, scores: tuple[float, ...] | None) -> None:
    assert verdict.parse(reply, ONE, 1) == scores


VERDICT = '{"explanation": "a {b} \\"c\\"", "score_1": 8, "score_2": 9.5}'


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        (VERDICT, (8, 9.5)),
        (f"Here it is:\n```json\n{VERDICT}\n```\n", (8, 9.5)),
        (f"{VERDICT}\nAgain:\n{VERDICT}", (8, 9.5)),
        (f"the set {{x | x > 0}} and f() {{ return 1; }} {VERDICT}", (8, 9.5)),
        (f'it wrote {{"a": 1}} and {{}}. {VERDICT}', (8, 9.5)),
        ('{"score_1": 8, "score_2": 9, "winner": {"score_1": 1, "score_2": 1}}', (8, 9)),
        (f'{VERDICT} {{"score_1": 8, "score_2": 2}}', None),
        (f'{VERDICT} {{"score_1": 8}}', None),
        (f'{VERDICT} {{"score_1": "8", "score_2": 9.5}}', None),
        (f'{{"explanation": "it says {VERDICT}', None),
        (f'{VERDICT} {{"explanation": "cut', None),
        ('{"score_1": 8, "score_1": 2, "score_2": 9}', None),
        ('{"score_1": 8}', None),
        ('{"score": 8}', None),
        ('{"score_1": "8", "score_2": 9}', None),
        ('{"score_1": true, "score_2": 9}', None),
        ('{"score_1": null, "score_2": 9}', None),
        ('{"score_1": 0, "score_2": 9}', None),
        ('{"score_1": 10.5, "score_2": 9}', None),
        ('{"score_1": NaN, "score_2": 9}', None),
        ('{"score_1": 1e999, "score_2": 9}', None),
        ('{"score_1": [8], "score_2": 9}', None),
        ('{"result": {"score_1": 8, "score_2": 9}}', None),
        ('{"score_1": ' + "9" * 5000 + "}", None),
        ('{"a": ' * 100_000, None),
        ("8,9", None),
        ("{'score_1': 8, 'score_2': 9}", None),
        ("", None),
    ],
)  # fmt: skip
def test_scores_of_json(reply: str, scores: tuple[float, ...] | None) -> None:
    assert verdict.parse(reply, replace(PAIR, output="json"), 2) == scores


def test_the_score_of_json() -> None:
    as_json = replace(ONE, output="json")
    assert verdict.parse('{"explanation": "x", "score": 3}', as_json, 1) == (3,)
    assert verdict.parse('{"explanation": "x", "score_1": 3}', as_json, 1) is None


def test_an_endless_reply_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict.parse("x" * verdict.MAX_REPLY + "\n8,9", PAIR, 2) is None
    assert verdict.parse("x" * (verdict.MAX_REPLY - 4) + "\n8,9", PAIR, 2) == (8, 9)


_SCORE = st.one_of(st.integers(-2, 12), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
_VERDICTS = st.dictionaries(st.sampled_from(["score", "score_1", "score_2", "explanation", "x"]), _SCORE)
_REPLIES = st.one_of(
    st.text(), st.text(alphabet="{}[]()\"':,.0123456789 \nscore_1e-"), _VERDICTS.map(json.dumps),
    st.lists(_SCORE).map(lambda found: "\n" + ",".join(map(str, found))),
    st.lists(st.one_of(st.text(), _VERDICTS.map(json.dumps))).map("\n".join),
)  # fmt: skip


@settings(deadline=None)
@given(_REPLIES, st.sampled_from(["line", "json"]), st.sampled_from([1, 2]))
def test_no_reply_raises_or_gives_a_score_out_of_range(reply: str, output: Any, answers: int) -> None:
    found = verdict.parse(reply, replace(PAIR, output=output), answers)
    assert found is None or (len(found) == answers and all(type(x) is float and 1 <= x <= 10 for x in found))


@settings(deadline=None)
@given(st.floats(1, 10).map(lambda x: round(x, 6)), st.floats(1, 10).map(lambda x: round(x, 6)), ANY_TEXT)
def test_every_clear_verdict_is_read(first: float, second: float, explanation: str) -> None:
    assert verdict.parse(f"{explanation}\n{first:.6f}, {second:.6f}", PAIR, 2) == (first, second)
    reply = json.dumps({"explanation": explanation, "score_1": first, "score_2": second}, ensure_ascii=False)
    assert verdict.parse(reply, replace(PAIR, output="json"), 2) == (first, second)


def test_a_repair_goes_on_with_the_conversation() -> None:
    as_json = replace(PAIR, output="json")
    request = prompts.render(as_json, REVIEWER, QUESTION, Answer(1, "m", "a"), Answer(1, "b", "c"), structured=True)
    before = json.dumps(request.body)
    again = prompts.repair(request, "I like {both}.", as_json, 2)
    assert json.dumps(request.body) == before
    assert again.body["messages"][:2] == request.body["messages"]
    assert again.body["messages"][2] == {"role": "assistant", "content": "I like {both}."}
    assert again.body["messages"][3]["role"] == "user"
    assert '"explanation", "score_1", "score_2"' in again.body["messages"][3]["content"]
    assert {**again.body, "messages": 0} == {**request.body, "messages": 0}
    assert again.path == request.path


def test_a_repair_of_an_empty_reply_adds_to_what_was_asked() -> None:
    request = prompts.render(ONE, REVIEWER, QUESTION, Answer(1, "m", "a"))
    again = prompts.repair(request, " \n", ONE, 1)
    assert [m["role"] for m in again.body["messages"]] == ["system", "user"]
    assert again.body["messages"][1]["content"].startswith("Q Why? A a\n\nYour reply did not give clear scores.")
    assert "one line with one number" in again.body["messages"][1]["content"]
    assert "two numbers separated by a comma" in verdict.demand(PAIR, 2)
