"""The files of a GPT evaluation: the older toolkit's formats, and whatever else somebody may put there."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import lines
from eval_runner.evaluators.gpt.files import (
    read_answers,
    read_inputs,
    read_prompts,
    read_questions,
    read_reviewers,
    write_answers,
    write_results,
)
from eval_runner.evaluators.gpt.records import Answer, Judged, Prompt, Question, Review, Reviewer
from eval_runner.evaluators.gpt.settings import Located

QUESTION = {"question_id": 1, "text": "Why is snow white?", "category": "physics"}
ANSWER = {"question_id": 1, "model_id": "older/model", "text": "It scatters all light."}
PROMPT = {"category": "general", "system_prompt": "Be fair.",
          "prompt_template": "{question}|{answer_1}|{answer_2}|{task}",
          "defaults": {"task": "Rate both."}, "description": "for everything"}  # fmt: skip
REVIEWER = {"category": "general", "metadata": {"temperature": 0.2, "max_tokens": 1024, "model": "judge-1"}}
ASKED = (Question(1, "a", "x"), Question("two", "b", "x"), Question(3, "c", "y"))

Reader = Callable[[Path], object]
READERS: list[tuple[Reader, dict[str, Any]]] = [
    (lambda path: read_questions(path, "pairwise"), QUESTION),
    (lambda path: read_answers(path, ()), ANSWER),
    (read_prompts, PROMPT),
    (read_reviewers, REVIEWER),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some file.jsonl"


def _text(*objects: object) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def _refused(read: Callable[[], object], path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_the_older_toolkits_files(path: Path) -> None:
    """Ids are whole numbers there; FastChat's answers have more fields than the ones that count."""
    path.write_text(_text(QUESTION, {"question_id": 2, "text": "2+2?", "category": "math"}))
    questions = read_questions(path, "pairwise")
    assert questions == (Question(1, "Why is snow white?", "physics"), Question(2, "2+2?", "math"))
    path.write_text(_text(
        {"answer_id": "x", "question_id": 2, "model_id": "m", "text": "4", "metadata": {"a": [1]}},
        {"answer_id": "y", "question_id": 1, "model_id": "m", "text": "Light.", "metadata": {}},
        {"answer_id": "z", "question_id": 9, "model_id": "another", "text": ""},
    ))  # fmt: skip
    assert read_answers(path, questions) == (Answer(1, "m", "Light."), Answer(2, "m", "4"))
    path.write_text(_text(PROMPT, PROMPT | {"category": "math", "output": "json"}))
    general = Prompt("general", "Be fair.", PROMPT["prompt_template"], {"task": "Rate both."})
    assert read_prompts(path)["general"] == general
    assert read_prompts(path)["math"].output == "json"
    path.write_text(_text(REVIEWER))
    assert read_reviewers(path) == {"general": Reviewer("general", "judge-1", 0.2, 1024, REVIEWER["metadata"])}


def test_marks_blank_lines_and_line_ends_are_no_matter(path: Path) -> None:
    plain = _text(QUESTION | {"text": "雪は\u2028なぜ白い"}, QUESTION | {"question_id": 2})
    path.write_bytes(codecs.BOM_UTF8 + b"\n \r\n" + plain.replace("\n", "\r\n\n").encode().rstrip())
    questions = read_questions(path, "single")
    assert [q.id for q in questions] == [1, 2]
    assert questions[0].text == "雪は\u2028なぜ白い"


def test_ids_of_a_number_and_of_its_text_are_the_same(path: Path) -> None:
    path.write_text(_text(*(ANSWER | {"question_id": i} for i in ("1", "two", 3))))
    assert [a.question for a in read_answers(path, ASKED)] == [1, "two", 3]
    path.write_text(_text(QUESTION, QUESTION | {"question_id": "1"}))
    assert _refused(lambda: read_questions(path, "single"), path) == "line 2: `question_id`: '1' stands in line 1, too"


@pytest.mark.parametrize(
    ("codec", "text", "name"),
    [
        ("cp932", "雪はなぜ白いのですか", "CP932"),
        ("euc_jp", "雪はなぜ白いのですか", "EUC-JP"),
        ("euc_kr", "눈은 왜 하얀가요", "EUC-KR"),
        ("cp949", "눈은 왜 똠방각하인가요", "CP949"),
        ("cp949", "궆하하하하하", "CP949"),     # CP932 would read a kana in it, and ten others
        ("latin_1", "Où est la forêt ?", "LATIN1"),
        ("utf_16", "Why?", "UTF-16"),
        ("utf_16_le", "Why?", "UTF-16LE"),
        ("utf_16_be", "Why?", "UTF-16BE"),
        ("utf_32", "Why?", "UTF-32"),
    ],
)
@pytest.mark.parametrize("reader", range(len(READERS)))
def test_another_encoding_is_named_with_its_remedy(path: Path, reader: int, codec: str, text: str, name: str) -> None:
    read, good = READERS[reader]
    wide = codec.startswith("utf_")
    path.write_bytes(_text(good | {"question_id": 0, "category": text}, good).encode(codec) if wide
                     else _text(good).encode() + _text(good | {"category": text}).encode(codec))  # fmt: skip
    message = _refused(lambda: read(path), path)
    assert message.startswith(f"line {1 if wide else 2}: is not UTF-8")
    assert f"iconv -f {name} -t UTF-8 '{path}' > NEW_FILE" in message


def test_an_encoding_that_none_would_guess(path: Path) -> None:
    path.write_bytes(b'{"text": "' + b"\xfe\xff\x81" * 40 + b'"}')
    assert "iconv -f ITS_ENCODING " in _refused(lambda: read_questions(path, "single"), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (codecs.BOM_UTF8 + b"\n \n", "is empty"),
        (b"[\n", "line 1: not valid JSON (Expecting value at column 2); one object a line is expected"),
        (b"\n[1]\n", "line 2: expected one object, found a list"),
        (b"null", "line 1: expected one object, found null"),
        (b'{"a": 1, "a": 2}', "line 1: not valid JSON (a field stands twice)"),
        (b'{"a": NaN}', "line 1: not valid JSON (NaN is not a number)"),
        (b"[" * 100_000, "line 1: not valid JSON (maximum recursion depth exceeded"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 1: not valid JSON (Exceeds the limit"),
        (b'{"a": "\0"}', "line 1: not valid JSON (Invalid control character"),
    ],
)
@pytest.mark.parametrize("reader", range(len(READERS)))
def test_what_is_no_json_lines(path: Path, reader: int, content: bytes, message: str) -> None:
    path.write_bytes(content)
    assert _refused(lambda: READERS[reader][0](path), path).startswith(message)


def test_what_is_no_file(path: Path, tmp_path: Path) -> None:
    def read() -> object:
        return read_questions(path, "single")

    assert _refused(read, path) == "there is no such file"
    path.mkdir()
    assert _refused(read, path) == "is a directory; a file of JSON lines is expected"
    path.rmdir()
    os.mkfifo(path)
    assert _refused(read, path) == "is no regular file; a file of JSON lines is expected"
    path.unlink()
    path.symlink_to(path)
    assert "cannot be read (Too many levels of symbolic links)" in _refused(read, path)
    path.unlink()
    (tmp_path / "real.jsonl").write_text(_text(QUESTION))
    path.symlink_to("real.jsonl")
    assert read()


def test_a_fault_of_the_disk_may_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(lines.os, "open", fail)
    with pytest.raises(AutoEvalError, match="Input/output error") as caught:
        read_questions(path, "single")
    assert caught.value.kind == "transient"


def test_sizes_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(_text(QUESTION, QUESTION | {"question_id": 2, "text": "x" * 300}))
    monkeypatch.setattr(lines, "MAX_LINE", 200)
    assert _refused(lambda: read_questions(path, "single"), path).endswith("bytes, the limit is 200")
    monkeypatch.setattr(lines, "MAX_LINE", 400)
    monkeypatch.setattr(lines, "MAX_OBJECTS", 1)
    assert _refused(lambda: read_questions(path, "single"), path) == "line 2: more than 1 lines with an object"
    monkeypatch.setattr(lines, "MAX_FILE", 300)
    assert _refused(lambda: read_questions(path, "single"), path) == "more than 300 bytes, which is the limit"


def _without(one: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key not in names}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (_without(QUESTION, "question_id"), "line 1: `question_id`: missing"),
        (_without(QUESTION, "text") | {"txt": "?"}, "line 1: `text`: missing; is 'txt' meant for it?"),
        (_without(QUESTION, "category"), "line 1: `category`: missing"),
        (QUESTION | {"question_id": True}, "line 1: `question_id`: expected a whole number or text, found true"),
        (QUESTION | {"question_id": 1.0}, "line 1: `question_id`: expected a whole number or text, found a number"),
        (QUESTION | {"question_id": None}, "line 1: `question_id`: expected a whole number or text, found null"),
        (QUESTION | {"question_id": ""}, "line 1: `question_id`: expected 1 to 200 characters"),
        (QUESTION | {"question_id": " 1"}, "line 1: `question_id`: expected 1 to 200 characters"),
        (QUESTION | {"question_id": "a\tb"}, "line 1: `question_id`: expected 1 to 200 characters"),
        (QUESTION | {"question_id": 10**201}, "line 1: `question_id`: expected 1 to 200 characters"),
        (QUESTION | {"text": 5}, "line 1: `text`: expected text, found a number"),
        (QUESTION | {"text": " \n"}, "line 1: `text`: is empty"),
        (QUESTION | {"category": ""}, "line 1: `category`: is empty"),
        (QUESTION | {"reference": ["a"]}, "line 1: `reference`: expected text, found a list"),
    ],
)
def test_questions_that_do_not_fit(path: Path, line: dict[str, Any], message: str) -> None:
    path.write_text(_text(line))
    assert _refused(lambda: read_questions(path, "pairwise"), path).startswith(message)


def test_half_a_character_is_refused(path: Path) -> None:
    path.write_text(json.dumps(QUESTION | {"text": "\ud83d"}))
    assert _refused(lambda: read_questions(path, "single"), path).startswith("line 1: `text`: holds half a character")


def test_mode_reference_needs_references(path: Path) -> None:
    path.write_text(_text(QUESTION | {"reference": "All light."}, QUESTION | {"question_id": 2},
                          QUESTION | {"question_id": 3, "reference": ""}))  # fmt: skip
    assert _refused(lambda: read_questions(path, "reference"), path) == (
        "line 2: `reference`: missing; line 3: `reference`: is empty"
    )
    path.write_text(_text(QUESTION | {"reference": "All light."}))
    assert read_questions(path, "reference")[0].reference == "All light."


def test_categories_have_scores_of_their_own(path: Path) -> None:
    path.write_text(_text(QUESTION | {"category": "数学"}, QUESTION | {"question_id": 2, "category": "物理"}))
    assert [q.category for q in read_questions(path, "single")] == ["数学", "物理"]
    path.write_text(_text(QUESTION | {"category": "a/b"}, QUESTION | {"question_id": 2, "category": "a b"}))
    assert "line 2: category 'a b': has the name 'a_b' among the scores, as 'a/b' has" in _refused(
        lambda: read_questions(path, "single"), path
    )
    path.write_text(_text(QUESTION | {"category": "judge_anchors"}))
    assert "category 'judge_anchors': is the name of the judge's anchors" in _refused(
        lambda: read_questions(path, "single"), path
    )


def test_many_errors_are_cut_short(path: Path) -> None:
    path.write_text(_text(*({"question_id": i, "text": "", "category": "x"} for i in range(40))))
    message = _refused(lambda: read_questions(path, "single"), path)
    assert message.count("is empty") == 5
    assert message.endswith("line 5: `text`: is empty; and 35 more")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(1, "m", "a"), (1, "m", "b")], "line 2: `question_id`: '1' stands in line 1, too"),
        ([(1, "m", "a"), (7, "m", "b")], "no answer to questions two, 3"),
        ([(1, "m", "a"), ("two", "m", " "), (3, "m", "c")], "an empty answer to question two"),
        ([(1, "m", ""), ("two", "m", " "), (3, "m", "\n")], "every answer is empty"),
        ([(1, "m", ""), ("two", "m", "b")], "no answer to question 3; an empty answer to question 1"),
        ([(1, "m", "a"), ("two", "n", "b"), (3, "m", "c")], "the answers are of 2 models ('m', 'n'); keep one's"),
        ([(1, "", "a")], "line 1: `model_id`: is empty"),
        ([(1, "m", None)], "line 1: `text`: expected text, found null"),
        ([([], "m", "a")], "line 1: `question_id`: expected a whole number or text, found a list"),
    ],
)
def test_answers_that_do_not_fit(path: Path, answers: list[tuple[Any, ...]], message: str) -> None:
    path.write_text(_text(*({"question_id": q, "model_id": m, "text": t} for q, m, t in answers)))
    assert _refused(lambda: read_answers(path, ASKED), path) == message


def test_many_missing_answers_are_cut_short(path: Path) -> None:
    path.write_text(_text(ANSWER))
    asked = [Question(i, "a", "x") for i in range(1, 21)]
    assert _refused(lambda: read_answers(path, asked), path) == "no answer to questions 2, 3, 4, 5, 6 and 14 more"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (PROMPT | {"prompt_templat": "x"}, "'prompt_templat': unknown field; did you mean 'prompt_template'?"),
        (_without(PROMPT, "system_prompt"), "`system_prompt`: missing"),
        (PROMPT | {"prompt_template": ""}, "`prompt_template`: is empty"),
        (PROMPT | {"defaults": ["x"]}, "`defaults`: expected an object, found a list"),
        (PROMPT | {"defaults": {"task": 5}}, "`task`: expected text, found a number"),
        (PROMPT | {"output": "xml"}, "`output`: 'xml' is neither 'line' nor 'json'"),
        (PROMPT | {"output": []}, "`output`: [] is neither 'line' nor 'json'"),
        (PROMPT | {"category": None}, "`category`: expected text, found null"),
    ],
)
def test_prompts_that_do_not_fit(path: Path, line: dict[str, Any], message: str) -> None:
    path.write_text(_text(line))
    assert _refused(lambda: read_prompts(path), path) == f"line 1: {message}"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"modell": "m"}, "'modell': unknown field; did you mean 'model'?"),
        ({"top_p": 0.1}, "'top_p': unknown field; known: "),
        ({"model": ""}, "`model`: is empty"),
        ({"model": 4}, "`model`: expected text, found a number"),
        ({"temperature": "0.2"}, "`temperature`: expected a number from 0 to 2, or null"),
        ({"temperature": 2.1}, "`temperature`: expected a number from 0 to 2, or null"),
        ({"temperature": True}, "`temperature`: expected a number from 0 to 2, or null"),
        ({"temperature": 10**400}, "`temperature`: expected a number from 0 to 2, or null"),
        ({"max_tokens": 0}, "`max_tokens`: expected a whole number from 1 to"),
        ({"max_tokens": 5.0}, "`max_tokens`: expected a whole number from 1 to"),
        ({"description": 1}, "`description`: expected text, found a number"),
        ([], "`metadata`: expected an object, found a list"),
    ],
)
def test_reviewers_that_do_not_fit(path: Path, metadata: object, message: str) -> None:
    path.write_text(_text({"category": "general", "metadata": metadata}))
    assert _refused(lambda: read_reviewers(path), path).startswith(f"line 1: {message}")


def test_what_a_reviewer_leaves_open(path: Path) -> None:
    path.write_text(_text({"category": "x", "metadata": {"temperature": 0, "max_tokens": None}}))
    reviewer = read_reviewers(path)["x"]
    assert (reviewer.model, reviewer.temperature, reviewer.max_tokens) == ("", 0.0, None)
    assert type(reviewer.temperature) is float
    path.write_text(_text({"category": "x"}))
    assert _refused(lambda: read_reviewers(path), path) == "line 1: `metadata`: missing"
    path.write_text(_text(REVIEWER | {"model": "m"}))
    assert _refused(lambda: read_reviewers(path), path).startswith("line 1: 'model': unknown field")


@pytest.mark.parametrize(("read", "line"), [(read_prompts, PROMPT), (read_reviewers, REVIEWER)])
def test_a_category_has_one_line(path: Path, read: Reader, line: dict[str, Any]) -> None:
    path.write_text(_text(line, line))
    assert _refused(lambda: read(path), path) == "line 2: category 'general' stands in an earlier line, too"


def test_the_errors_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("q", "b", "p", "r")]
    located = Located(*files, anchors=None)
    for file, (_, good) in zip(files, READERS, strict=True):
        file.write_text(_text(good))
    found = read_inputs(located, "pairwise")
    assert found.baseline == (Answer(1, "older/model", "It scatters all light."),)
    assert read_inputs(Located(files[0], None, files[2], files[3], None), "single").baseline is None
    for file in files:
        file.write_text("{")
    with pytest.raises(ConfigError) as caught:
        read_inputs(located, "pairwise")
    for file in files:
        assert f"{file}: line 1: not valid JSON" in str(caught.value)


def _judged(identity: int | str, *scores: tuple[float, ...] | None, baseline: str = "theirs") -> Judged:
    reviews = tuple(Review("ok", s, f"{s}", "j") if s else Review("unparsable", (), "?", "j") for s in scores)
    other = Answer(identity, baseline, "c") if baseline else None
    return Judged(Question(identity, "a", "general"), Answer(identity, "ours", "b"), other, reviews)


def _written(path: Path, judged: Sequence[Judged]) -> list[dict[str, Any]]:
    write_results(path, judged, {"general": {"model": "judge", "temperature": 0.2}})
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_in_the_older_format(path: Path) -> None:
    judged = [_judged(1, (8, 6), (5, 9)), _judged("b", (2, 3), None), _judged(3, None, None),
              _judged(4, (1, 1), (2, 4))]  # fmt: skip
    first, second, third, _, last = _written(path, judged)
    assert list(first) == ["question_id", "metadata", "model1", "model2", "review1", "score1", "review2", "score2"]
    assert first == {
        "question_id": 1, "metadata": {"model": "judge", "temperature": 0.2}, "model1": "ours", "model2": "theirs",
        "review1": "(8, 6)", "score1": [8, 6], "review2": "(5, 9)", "score2": [5, 9],
    }  # fmt: skip
    assert (second["score1"], second["score2"], second["review2"]) == ([2, 3], None, "?")
    assert (third["score1"], third["score2"]) == (None, None)
    assert last == {"ours": (8 + 9 + 1 + 4) / 4, "theirs": (6 + 5 + 1 + 2) / 4}     # of 1 and 4, the reviewed ones


def test_results_without_a_review_have_no_average(path: Path) -> None:
    assert _written(path, [_judged(1, None, (1, 2))])[-1] == {"ours": None, "theirs": None}
    assert _written(path, [_judged(1, (1, 3), (5, 7), baseline="ours")])[-1] == {"ours": 4, "ours (baseline)": 4}


def test_results_of_one_answer(path: Path) -> None:
    first, second, last = _written(path, [_judged(1, (8,), baseline=""), _judged(2, None, baseline="")])
    assert list(first) == ["question_id", "metadata", "model", "review", "score"]
    assert (first["score"], second["score"], last) == (8, None, {"ours": 8})


def test_answers_are_read_as_they_were_written(path: Path) -> None:
    answers = [Answer(1, "m", "雪\n{}\u2028\0"), Answer("two", "m", " b "), Answer(3, "m", "c")]
    write_answers(path, answers)
    assert path.read_text(encoding="utf-8").split("\n")[1] == '{"question_id": "two", "model_id": "m", "text": " b "}'
    assert read_answers(path, ASKED) == tuple(answers)


@settings(max_examples=25, deadline=None)       # each is an fsync
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5))
def test_any_text_can_be_written(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    write_answers(path, [Answer(i, "m", text) for i, text in enumerate(texts)])
    found = [json.loads(line)["text"] for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]
    assert found == texts


def test_half_a_character_is_written_as_its_escape(path: Path) -> None:
    write_answers(path, [Answer(1, "m", "\ud83d!")])
    assert json.loads(path.read_bytes().decode("utf-8"))["text"] == "\ud83d!"


def test_a_file_is_replaced_whole_and_its_directories_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b" / "answers.jsonl"
    write_answers(path, [Answer(1, "m", "old")])
    assert stat.S_IMODE(path.stat().st_mode) & 0o444
    before = path.stat().st_ino
    write_answers(path, [Answer(1, "m", "new")])
    assert path.stat().st_ino != before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "x.jsonl", tmp_path / "a"):
        with pytest.raises(AutoEvalError, match=f"{wrong}: cannot be written") as caught:
            write_answers(wrong, [])
        assert caught.value.kind == "transient"
