"""examples/huggingface: the stand-in judge, asked as a real one is, and the settings that lead to it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import yaml

from autoeval_hooks.yamlfile import expand
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.gpt import settings
from eval_runner.evaluators.gpt.budget import Price

EXAMPLE = Path(__file__).parents[2] / "examples/huggingface"
CODE = "import os\n\ndef size(path):\n   "
RIGHT = "return os.path.getsize(path)"
WRONG = "yield from self.children"
PROMPT = json.loads((EXAMPLE / "prompts.jsonl").read_text(encoding="utf-8"))


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_judge", EXAMPLE / "judge.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


score: Callable[[str, str], float] = load().score


@pytest.fixture(autouse=True)
def no_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *a, **k: None)   # slow, and no TLS here
    for name in ("OPENAI_BASE_URL", "JUDGE_URL", "JUDGE_MODEL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


# --- its scores -------------------------------------------------------------------------------------------------------

def test_only_the_right_line_gets_ten_and_no_line_gets_one() -> None:
    assert score(f" {RIGHT} ", RIGHT) == 10
    assert score("return None", "return None") == 10
    assert score("path(path.getsize, os)", RIGHT) == 9
    assert score("os.remove(path)", RIGHT) == 2 + 7 * 2 * 2 / (3 + 4)
    assert score("", RIGHT) == score("  ", RIGHT) == 1


@pytest.mark.parametrize("constant", ["return None", "return self", "e s t a r n", "( ) . , = :", "1 2 3", WRONG])
def test_keywords_letters_and_punctuation_are_nothing_in_common(constant: str) -> None:
    assert score(constant, RIGHT) == score("x = 1", RIGHT) == 2
    assert score(constant, "return self") in (2, 10)


# --- over HTTP --------------------------------------------------------------------------------------------------------

@contextmanager
def running(questions: Path) -> Iterator[openai.OpenAI]:
    command = [sys.executable, str(EXAMPLE / "judge.py"), "--port", "0", "--questions", str(questions)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            said = process.stdout.readline()
            assert said.startswith("stand-in-judge (no model")
            with openai.OpenAI(base_url=said.split()[-1], api_key="none", max_retries=0, timeout=10) as client:
                yield client
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    questions = tmp_path_factory.mktemp("judge") / "questions.jsonl"
    question = {"question_id": 0, "text": CODE, "category": "code", "reference": RIGHT}
    questions.write_text(json.dumps(question) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl.SSLContext.load_verify_locations", lambda *a, **k: None)
        with running(questions) as found:
            yield found


def reviewed(client: openai.OpenAI, code: str, first: str, second: str) -> str:
    material = {"question": code, "answer_1": first, "answer_2": second}
    reply = client.chat.completions.create(model="stand-in-judge", messages=[
        {"role": "system", "content": PROMPT["system_prompt"]},
        {"role": "user", "content": PROMPT["prompt_template"].format(**material, **PROMPT["defaults"])},
    ])
    assert reply.model == "stand-in-judge"
    assert reply.usage
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 50
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize(("first", "second", "scores"), [
    (RIGHT, WRONG, (10, 2)), (WRONG, RIGHT, (2, 10)), ("", WRONG, (1, 2)), (WRONG, "", (2, 1)),
    (WRONG, "return None", (2, 2)),
])  # fmt: skip
def test_the_better_line_wins_in_both_orders(
    client: openai.OpenAI, first: str, second: str, scores: tuple[float, float]
) -> None:
    review = json.loads(reviewed(client, CODE, first, second))
    assert list(review) == ["explanation", "score_1", "score_2"]
    assert (review["score_1"], review["score_2"]) == scores
    assert RIGHT in review["explanation"]
    assert "stand-in-judge" in review["explanation"]


def test_it_says_of_a_question_that_it_does_not_know_it(client: openai.OpenAI) -> None:
    text = reviewed(client, "import sys\n   ", RIGHT, WRONG)
    assert text == "stand-in-judge: this is no question of the file that it knows the answers of"


def test_it_lists_itself_as_the_only_model_and_refuses_any_other(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stand-in-judge"]
    with pytest.raises(openai.NotFoundError, match="there is only stand-in-judge here"):
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "?"}])
    with pytest.raises(openai.NotFoundError, match="no such path"):
        client.files.list()


# --- autoeval.yaml ----------------------------------------------------------------------------------------------------

def entry(text: str | None = None) -> settings.Settings:
    """The judge's entry of autoeval.yaml, or of `text`, as the runner reads it."""
    content: Any = yaml.safe_load(text or (EXAMPLE / "autoeval.yaml").read_text(encoding="utf-8"))
    [written] = content["suites"]["judge"]["evaluators"]
    data = expand(written, "autoeval.yaml")
    del data["type"]
    return settings.parse(data, Context(base_dir=EXAMPLE, environments=EXAMPLE, where="judge"))


def test_the_judge_is_openai_s_unless_the_environment_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (entry().judge.base_url, entry().judge.model) == ("https://api.openai.com/v1", "gpt-4o-mini")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert entry().judge.base_url == "http://127.0.0.1:1/v1"
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:2/v1")
    monkeypatch.setenv("JUDGE_MODEL", "stand-in-judge")
    assert (entry().judge.base_url, entry().judge.model) == ("http://127.0.0.1:2/v1", "stand-in-judge")


def test_price_and_budget_are_right_once_their_comments_are_taken_off() -> None:
    text = (EXAMPLE / "autoeval.yaml").read_text(encoding="utf-8")
    assert (entry(text).judge.price, entry(text).budget_usd) == (None, None)
    found = entry(text.replace("# budget_usd:", "budget_usd:").replace("# price:", "price:"))
    assert found.budget_usd == 0.2
    assert found.judge.price == Price(input=0.15, output=0.6)
