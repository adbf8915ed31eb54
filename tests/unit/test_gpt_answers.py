"""How a checkpoint and a baseline are asked for their answers, through the real client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import answers
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.journal import Journal
from eval_runner.evaluators.gpt.records import Question
from eval_runner.evaluators.gpt.settings import AnswerSettings, BaselineModel
from eval_runner.evaluators.gpt.settings import service as settings_service
from eval_runner.servers.base import Endpoint
from tests.gpt_lab import QUESTIONS, Judge
from tests.judge_stand_in import Body, JudgeStandIn

TEMPLATE = "{{ messages }}"


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ({}, False),
        ({"tokenizer_config.json": {}}, False),
        ({"tokenizer_config.json": {"chat_template": TEMPLATE}}, True),
        ({"tokenizer_config.json": {"chat_template": None}}, False),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": TEMPLATE}]}}, True),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}}, False),
        ({"chat_template.jinja": TEMPLATE}, True),
        ({"chat_template.json": {"chat_template": TEMPLATE}}, True),
        ({"chat_template.json": {"chat_template": {"default": TEMPLATE}}}, True),
        ({"additional_chat_templates/rag.jinja": TEMPLATE}, False),
    ],
)
def test_where_a_chat_template_stands(tmp_path: Path, files: dict[str, Any], has: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert answers.has_chat_template(tmp_path) is has
    assert answers.form("auto", tmp_path, {}, "here") == ("chat" if has else "plain")
    assert answers.form("plain", tmp_path, {}, "here") == "plain"
    assert answers.form("chat", tmp_path, {}, "here") == "chat"
    assert answers.form("auto", tmp_path, {"server": "megatron static"}, "here") == "plain"


def test_a_format_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^here\.answers\.format: Megatron-LM's static server completes text only"):
        answers.form("chat", tmp_path, {"server": "megatron static"}, "here")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: cannot be read .*Set answers\.format"):
        answers.form("auto", tmp_path, {}, "here")
    assert answers.form("plain", tmp_path, {}, "here") == "plain"


def test_what_a_checkpoint_is_asked() -> None:
    question = [Question(1, "Why?", "x")]
    (plain,) = answers.requests(question, AnswerSettings(), "plain", "w")
    assert (plain.path, plain.body) == ("/completions", {
        "model": "w", "prompt": "Question: Why?\n\nAnswer:", "max_tokens": 512, "temperature": 0.0,
        "stop": ["\nQuestion:"],
    })  # fmt: skip
    (chat,) = answers.requests(question, AnswerSettings(system="Be.", temperature=0.7, max_tokens=3), "chat", "w")
    assert (chat.path, chat.body) == ("/chat/completions", {
        "model": "w", "messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Why?"}],
        "max_tokens": 3, "temperature": 0.7, "seed": 0,
    })  # fmt: skip
    (told,) = answers.requests(question, AnswerSettings(system="Be.", stop=("###",)), "plain", "w")
    assert told.body["prompt"] == "Be.\n\nQuestion: Why?\n\nAnswer:"
    assert told.body["stop"] == ["###"]


@pytest.mark.parametrize(
    ("text", "is_"),
    [
        (" 4 \n", "4"), ("", ""), ("4\nQuestion: and", "4"), ("a\0b", "a\ufffdb"), ("a\ud800b", "a\ufffdb"),
        ("\ud83d\ude00", "\N{GRINNING FACE}"), ("四です。", "四です。"),
    ],
)  # fmt: skip
def test_an_answer_as_it_is_judged(text: str, is_: str) -> None:
    assert answers.trimmed(text, answers.STOP) == is_


def test_answers_are_the_checkpoints_and_not_the_ports() -> None:
    def service(url: str, name: str = "w", digest: str = "d", **facts: str) -> Any:
        endpoint = Endpoint(url, "openai", f"{name}@main", "KEY") if url else None
        return answers.service(endpoint, AnswerSettings(concurrency=3, timeout=5), name, digest, facts, "here")

    one, other = service("http://127.0.0.1:1"), service("http://127.0.0.1:2")
    assert one.identity == other.identity == service("").identity
    assert len({one.identity, service("", "v").identity, service("", server="vllm").identity}) == 3
    assert service("", digest="e").identity != one.identity     # a chat template that was mended
    assert (one.base_url, one.accept_models, one.api_key_env) == ("http://127.0.0.1:1/v1", ("w@main",), "KEY")
    assert (one.concurrency, one.timeout, one.where) == (3, 5, "here.answers")
    static = answers.service(
        Endpoint("http://127.0.0.1:1", "megatron", "w"), AnswerSettings(), "w", "d", {"server": "megatron static"}, ""
    )
    assert (static.base_url, static.api, static.accept_models) == ("http://127.0.0.1:1", "megatron", ("*",))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., answers.Served]]:
    def make(server: JudgeStandIn, name: str = "w") -> answers.Served:
        endpoint = Endpoint(server.url.removesuffix("/v1"), "openai", name)
        service = answers.service(endpoint, AnswerSettings(concurrency=2), "w", "d", {}, "here")
        made.append(answers.Served(service, Journal(tmp_path / "journal")))
        made[-1].name = name
        return made[-1]

    made: list[answers.Served] = []
    yield make
    for asker in made:
        asker.wire.client.close()
        asker.journal.close()


def test_a_question_is_asked_once_by_whatever_name_the_server_goes(served: Callable[..., answers.Served]) -> None:
    asked = answers.requests(QUESTIONS, AnswerSettings(), "plain", "w")
    with JudgeStandIn(lambda body: f" {len(body['prompt'])}\nQuestion: again") as server:
        answers.collect(served(server), QUESTIONS[:2], asked[:2], 500)
        answers.collect(served(server, "w@main"), QUESTIONS, asked, 500)
        assert [r.body["model"] for r in server.requests] == ["w", "w", "w@main", "w@main"]
        assert set(server.counts.values()) == {1}
        found = answers.answers(served(server), QUESTIONS, asked, "w", answers.STOP)
    assert [(a.question, a.model, a.text, a.finish) for a in found] == [
        (q.id, "w", str(len(r.body["prompt"])), "stop") for q, r in zip(QUESTIONS, asked, strict=True)
    ]


def test_an_answer_of_other_weights_is_none(served: Callable[..., answers.Served]) -> None:
    asked = answers.requests(QUESTIONS, AnswerSettings(), "plain", "w")
    with JudgeStandIn() as server:
        server.fault("wrong model", times=None)
        with pytest.raises(ConfigError, match="was asked for the model 'w' and answers as 'another-model'"):
            answers.collect(served(server), QUESTIONS, asked, None)
        assert [served(server).known(r) for r in asked] == [None] * 4


def test_a_prompt_that_the_server_refuses_names_its_question(served: Callable[..., answers.Served]) -> None:
    asked = answers.requests(QUESTIONS, AnswerSettings(), "plain", "w")
    with JudgeStandIn() as server:
        server.fault("400", times=None, when=lambda body: "3 and 3" in body["prompt"])
        with pytest.raises(ConfigError, match=r"^question 3 cannot be asked: .*not valid"):
            answers.collect(served(server), QUESTIONS, asked, None)
        assert all(n == 1 for content, n in server.counts.items() if "3 and 3" not in content)


def test_an_answer_beyond_the_models_window(served: Callable[..., answers.Served]) -> None:
    """Some servers go on past it, and answer nonsense."""
    asked = answers.requests(QUESTIONS, AnswerSettings(max_tokens=5), "plain", "w")
    with JudgeStandIn(tokens=lambda body, text: (60 if "2 and 2" in body["prompt"] else 59, 5)) as server:
        with pytest.raises(ConfigError, match=r"^question 2: its prompt has 60 tokens and its answer 5, .* 64 in all"):
            answers.collect(served(server), QUESTIONS, asked, 64)
        with pytest.raises(ConfigError, match=r"^question 2: its prompt has 60 tokens"):    # at another try, all known
            answers.answers(served(server), QUESTIONS, asked, "w", (), 64)
        answers.collect(served(server), QUESTIONS, asked, 65)


def test_an_empty_answer_is_one_and_an_answer_that_is_gone_is_not(served: Callable[..., answers.Served]) -> None:
    asked = answers.requests(QUESTIONS, AnswerSettings(), "plain", "w")
    with JudgeStandIn(lambda body: "") as server:
        answers.collect(served(server), QUESTIONS[1:], asked[1:], None)
        assert [a.text for a in answers.answers(served(server), QUESTIONS[1:], asked[1:], "w", ())] == [""] * 3
        with pytest.raises(AutoEvalError, match="question 1: its answer is gone from the cache") as caught:
            answers.answers(served(server), QUESTIONS, asked, "w", ())
        assert caught.value.kind == "transient"


# ---------------------------------------------------------------------- the baseline


def baseline(server: Judge, directory: Path) -> Asker:
    settings = BaselineModel(model="gpt", base_url=server.url, api_key_env=None)
    return server.asker(settings_service(settings, "the baseline", "here.baseline"), directory)


def test_a_baseline_of_an_api_is_asked_once_for_all_checkpoints(tmp_path: Path) -> None:
    answering = AnswerSettings(system="Be.", stop=("###",), max_tokens=9)
    asked = answers.baseline_requests(QUESTIONS, BaselineModel(model="gpt", base_url="http://x/v1"), answering)
    assert asked[0].body == {
        "model": "gpt", "max_tokens": 9, "temperature": 0.0, "stop": ["###"],
        "messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": QUESTIONS[0].text}],
    }  # fmt: skip
    unset = BaselineModel(model="gpt", temperature=None, max_tokens=7)
    bare = answers.baseline_requests(QUESTIONS[:1], unset, answering)
    assert bare[0].body.keys() == {"model", "max_tokens", "stop", "messages"}
    assert bare[0].body["max_tokens"] == 7

    def reply(body: Body) -> str:
        return f"{body['messages'][1]['content']} Yes.###no"

    with Judge(reply) as server:
        for _ in range(2):
            found = answers.baseline_answers(baseline(server, tmp_path), QUESTIONS, asked, answering.stop)
            assert [(a.model, a.text) for a in found] == [("gpt", f"{q.text} Yes.") for q in QUESTIONS]
        assert len(server.requests) == 4


@pytest.mark.parametrize(("fault", "why"), [("null", r" \(length\)"), ("content_filter", r" \(it refuses\)")])
def test_an_empty_answer_of_the_baseline_is_an_error(tmp_path: Path, fault: str, why: str) -> None:
    asked = answers.baseline_requests(QUESTIONS, BaselineModel(model="gpt"), AnswerSettings())
    with Judge() as server:
        server.fault(fault, when=lambda body: "2 and 2" in json.dumps(body))
        with pytest.raises(ConfigError, match=rf"^here\.baseline: gpt gives no answer to question 2{why}; raise its"):
            answers.baseline_answers(baseline(server, tmp_path), QUESTIONS, asked, ())
