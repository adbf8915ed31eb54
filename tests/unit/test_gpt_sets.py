"""The question sets, prompts, reviewers and anchors that come with the GPT evaluator: their form."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import eval_runner
from eval_runner.evaluators.gpt import files, prompts
from eval_runner.evaluators.gpt.records import Mode
from eval_runner.evaluators.gpt.settings import JudgeSettings

SETS = Path(eval_runner.__file__).parent / "evaluators" / "gpt" / "sets"
PER_CATEGORY = {"general-en": 10, "general-ja": 5, "general-ko": 5}
COMMON = {"writing", "reasoning", "math", "coding", "extraction", "knowledge", "advice"}
CATEGORIES = {"general-en": COMMON | {"roleplay"}, "general-ja": COMMON | {"language"},
              "general-ko": COMMON | {"language"}}
QUESTION_DIGESTS = {
    "general-en": "f136be5f3718a21acd932f47f50865f2bece0d48d1050734d78e7228b523c470",
    "general-ja": "5b27e810ed03fe4581ac47bada94ff95ad1e32b860d94200bc873eef61d8f560",
    "general-ko": "adc23eab887cc1d2ad88ecf3142150abfb0677fe497403f38987c60c563312e1",
}
ANCHORS_DIGEST = "ae41312c1de630843b08a8bfa4447ac4a224920648a24aa570970e323294b5f1"


def read(name: str) -> list[dict[str, Any]]:
    text = (SETS / f"{name}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n")
    assert "\ufeff" not in text
    assert "\ufffd" not in text
    return [json.loads(line) for line in text.splitlines()]


# --- form -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(PER_CATEGORY))
def test_a_set_has_the_same_number_of_questions_in_each_category(name: str) -> None:
    rows = read(name)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(CATEGORIES[name], PER_CATEGORY[name])
    for row in rows:
        assert list(row) == ["question_id", "text", "category", "reference"]
        assert type(row["question_id"]) is int
        assert row["text"].strip() == row["text"] != "", row["question_id"]
        assert row["reference"].strip() == row["reference"] != "", row["question_id"]


def test_ids_are_sorted_and_unique_and_no_text_occurs_twice_even_among_the_anchors() -> None:
    names = [*PER_CATEGORY, "anchors"]
    for name in names:
        ids = [row["question_id"] for row in read(name)]
        assert ids == sorted(ids)
    rows = [row for name in names for row in read(name)]
    for field in ("question_id", "text"):
        assert [value for value, count in Counter(row[field] for row in rows).items() if count > 1] == []


@pytest.mark.parametrize(("name", "letters"), [("general-ja", r"[ぁ-んァ-ヶ]"), ("general-ko", r"[가-힣]")])
def test_questions_and_references_are_in_the_language_of_their_set(name: str, letters: str) -> None:
    for row in read(name):
        assert len(re.findall(letters, row["text"])) > 15, row["question_id"]
        assert re.search(letters, row["reference"]), row["question_id"]
        other = r"[가-힣]" if name == "general-ja" else r"[ぁ-んァ-ヶ]"
        assert not re.search(other, row["text"] + row["reference"]), row["question_id"]


def test_the_english_set_is_in_english() -> None:
    for row in read("general-en"):
        assert not re.search(r"[ぁ-んァ-ヶ가-힣一-龥]", row["text"] + row["reference"]), row["question_id"]


@pytest.mark.parametrize("name", sorted(PER_CATEGORY))
def test_a_changed_question_is_noticed(name: str) -> None:
    """Scores of a changed set are not those of the old one. And `test_gpt_references.py` states the conditions of the
    questions by hand: change both."""
    texts = "\n".join(f"{row['question_id']} {row['category']} {row['text']}" for row in read(name))
    assert hashlib.sha256(texts.encode()).hexdigest() == QUESTION_DIGESTS[name]


def test_the_anchors_are_frozen() -> None:
    """Their verdicts are compared over years: a changed text would read as a changed judge. Add a new file instead."""
    rows = read("anchors")
    assert len(rows) >= 12
    for row in rows:
        assert list(row) == ["question_id", "category", "text", "answer_1", "answer_2"]
        assert row["answer_1"] != row["answer_2"]
    assert hashlib.sha256((SETS / "anchors.jsonl").read_bytes()).hexdigest() == ANCHORS_DIGEST


def test_the_readme_gives_the_margin_of_each_anchor() -> None:
    listed = re.findall(r"^\| (9\d{3}) \| \w+ \| (?:clear|moderate|subtle|none) \| (?:1|2|neither) \|",
                        (SETS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(number) for number in listed] == [row["question_id"] for row in read("anchors")]


# --- prompts and reviewers --------------------------------------------------------------------------------------------

SHOWN = {"pairwise": ["question", "answer_1", "answer_2"], "single": ["question", "answer"],
         "reference": ["question", "reference", "answer"]}


@pytest.mark.parametrize("mode", sorted(SHOWN))
def test_prompts_show_the_material_once_and_ask_for_the_explanation_before_the_scores(mode: str) -> None:
    rows = read(f"prompts-{mode}")
    assert [row["category"] for row in rows] == ["general", "coding", "math", "reasoning"]
    scores = ["score_1", "score_2"] if mode == "pairwise" else ["score"]
    for row in rows:
        assert set(row) == {"category", "description", "output", "system_prompt", "prompt_template", "defaults"}
        assert row["output"] == "json"
        fields = [name for _, name, _, _ in string.Formatter().parse(row["prompt_template"]) if name is not None]
        assert fields[:len(SHOWN[mode])] == SHOWN[mode]
        assert sorted(fields[len(SHOWN[mode]):]) == sorted(row["defaults"])
        material = {name: f"{{{name}}} {{}} %s" for name in SHOWN[mode]}
        text = row["prompt_template"].format(**material, **row["defaults"])
        assert all(text.count(shown) == 1 for shown in material.values())
        last = text.splitlines()[-1]
        keys = re.findall(r'"(\w+)":', last)
        assert keys == ["explanation", *scores]
        assert json.loads(re.sub(r"<score[^>]*>", "7", last)) == {"explanation": "<explanation>",
                                                                 **dict.fromkeys(scores, 7)}


def test_questions_about_code_and_mathematics_have_criteria_of_their_own() -> None:
    for mode in SHOWN:
        assert len({row["defaults"]["criteria"] for row in read(f"prompts-{mode}")}) == 4


def test_the_reviewer_serves_every_category() -> None:
    assert read("reviewers") == [{"category": "general", "metadata": {"temperature": 0, "max_tokens": 1024,
                                                                      "model": "gpt-4o-mini"}}]


@pytest.mark.parametrize("mode", ["pairwise", "single", "reference"])
@pytest.mark.parametrize("name", sorted(PER_CATEGORY))
def test_each_set_can_be_judged_in_each_mode(name: str, mode: Mode) -> None:
    questions = files.read_questions(SETS / f"{name}.jsonl", mode)
    assert len(questions) == len(read(name))
    asked = files.read_prompts(SETS / f"prompts-{mode}.jsonl")
    prompts.check(asked, files.read_reviewers(SETS / "reviewers.jsonl"), questions, mode, JudgeSettings(),
                  prompt_file="prompts", reviewer_file="reviewers", where="evaluators[0]")
