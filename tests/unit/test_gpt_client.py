"""Asking a service: faults, retries, what is asked twice and what is not, secrets, against a stand-in over HTTP."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import retry
from eval_runner.evaluators.gpt.budget import Budget, BudgetReached, Price
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.journal import Journal
from eval_runner.evaluators.gpt.records import Reply, Request
from eval_runner.evaluators.gpt.service import ParameterRefused, Service
from tests.judge_stand_in import Fault, JudgeStandIn

KEY = "sk-test-0123456789abcdefghij"
WHERE = "suites.quick.evaluators[0].judge"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("JUDGE_AUTH", KEY)
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *a, **k: None)   # slow, and no TLS here
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def judge() -> Iterator[JudgeStandIn]:
    with JudgeStandIn(lambda body: f"評価: {body['messages'][-1]['content']}", key=KEY) as running:
        yield running


def service(judge: JudgeStandIn, **more: Any) -> Service:
    told: dict[str, Any] = {"api_key_env": "JUDGE_AUTH", "where": WHERE, "timeout": 10.0, "concurrency": 4}
    return Service(**{"name": "the judge", "base_url": judge.url, "identity": "judge"} | told | more)


def question(i: int, **more: Any) -> Request:
    body = {"model": "judge-1", "messages": [{"role": "user", "content": f"質問 {i}"}], "max_tokens": 50, **more}
    return Request("/chat/completions", body)


@pytest.fixture
def asker(judge: JudgeStandIn, tmp_path: Path) -> Iterator[Callable[..., Asker]]:
    """A new process's asker of the same journal."""
    made: list[Asker] = []

    def make(*, salt: str = "", evaluation: str = "e", budget: Budget | None = None, **more: Any) -> Asker:
        journal = Journal(tmp_path / "scope")
        made.append(Asker(service(judge, **more), journal, salt=salt, evaluation=evaluation, budget=budget))
        return made[-1]

    yield make
    for one in made:
        one.wire.client.close()


def test_answers_come_in_order_and_are_asked_once(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    requests = [question(i) for i in (*range(10), 3)]
    seen: list[int] = []
    first = asker()
    told: list[tuple[int, int]] = []
    first._progress = lambda done, total: told.append((done, total))
    replies = first.ask(requests, lambda i, reply: seen.append(i))
    assert [r.text for r in replies] == [f"評価: 質問 {i}" for i in (*range(10), 3)]
    assert sorted(seen) == list(range(11))
    assert told[-1] == (11, 11)
    assert len(judge.requests) == 10
    assert (first.usage.requests, first.usage.cached) == (10, 0)
    tokens = judge.tokens(requests[0].body, replies[0].text)
    assert replies[0] == Reply("評価: 質問 0", False, "stop", "judge-1", *tokens)
    again = asker(evaluation="another")
    assert [r.text for r in again.ask(requests)] == [r.text for r in replies]
    assert all(r.cached for r in again.ask(requests))
    assert again.known(requests[0]) == Reply(**vars(replies[0]) | {"cached": True})
    assert again.known(question(99)) is None
    assert (again.usage.requests, again.usage.cached, again.usage.input_tokens) == (0, 10, 0)
    assert len(judge.requests) == 10
    asker(salt="drift").ask(requests[:1])
    assert len(judge.requests) == 11


def test_many_at_once_and_not_more(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.delay = 0.05
    asker(concurrency=3).ask([question(i) for i in range(9)])
    assert judge.most_at_once == 3


@pytest.mark.parametrize(
    "kind", ["429", "500", "502", "503", "reset", "cut", "invalid", "html", "no choices", "error in 200"]
)
def test_what_another_try_mends_is_tried_again(judge: JudgeStandIn, asker: Callable[..., Asker], kind: str) -> None:
    judge.fault(kind, times=2)
    [reply] = asker().ask([question(1)])
    assert reply.text == "評価: 質問 1"
    assert len(judge.requests) == 3


@pytest.mark.parametrize("kind", ["500", "reset", "invalid", "429"])
def test_attempts_end(judge: JudgeStandIn, asker: Callable[..., Asker], kind: str) -> None:
    judge.fault(kind, times=None)
    with pytest.raises(AutoEvalError, match="after 3 attempts") as raised:
        asker(attempts=3).ask([question(1)])
    assert raised.value.kind == "transient"
    assert len(judge.requests) == 3


@pytest.mark.parametrize("kind", ["timeout", "trickle", "trickle headers"])
def test_timeout(judge: JudgeStandIn, asker: Callable[..., Asker], kind: str) -> None:
    judge.fault(kind, seconds=2.0)
    began = time.monotonic()
    asker(timeout=0.3).ask([question(1)])
    assert 0.3 <= time.monotonic() - began < 1.5


def exchanges() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "exchange"]


def test_a_list_of_models_that_never_ends(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("trickle", when=lambda body: not body, seconds=5.0)
    before, began = exchanges(), time.monotonic()
    with pytest.raises(AutoEvalError, match=r"no whole answer within 0.3 s"):
        asker(timeout=0.3, attempts=1).models()
    assert time.monotonic() - began < 1.5
    while set(exchanges()) - set(before):       # the connection is closed, and nobody reads on
        assert time.monotonic() - began < 3
        time.sleep(0.01)


def test_a_list_of_models_that_is_too_long(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval_runner.evaluators.gpt.wire.MOST_BYTES", 50)
    with pytest.raises(AutoEvalError, match="more than 50 bytes"):
        asker(attempts=1).models()


class Limited(JudgeStandIn):
    """Lets one request in `every` seconds through, and tells the others when the next one may come."""

    every = 0.1
    last = float("-inf")

    def due(self, body: dict[str, Any]) -> Fault | None:
        with self.lock:
            if (wait := self.last + self.every - time.monotonic()) > 0:
                return Fault("429", headers={"retry-after-ms": str(int(wait * 1000) + 5)})
            self.last = time.monotonic()
            return None


def test_a_429_that_says_when_to_come_back_is_no_attempt(asker: Callable[..., Asker]) -> None:
    with Limited() as limited:
        began = time.monotonic()
        limited_asker = asker(base_url=limited.url, api_key_env=None, concurrency=8, attempts=2)
        assert len(limited_asker.ask([question(i) for i in range(40)])) == 40
        assert time.monotonic() - began < 12
        assert len(limited.requests) < 80       # not all of them at once after every pause: then it is 200


def test_a_service_that_only_ever_says_when_to_come_back(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.1)
    judge.fault("429", times=None, headers={"retry-after-ms": "20"})
    began = time.monotonic()
    with pytest.raises(AutoEvalError, match="after 3 attempts"):
        asker(attempts=3).ask([question(1)])
    assert 0.3 <= time.monotonic() - began < 2


@pytest.mark.parametrize("headers", [{"retry-after-ms": "600", "Retry-After": "30"}, {"Retry-After": "1"}])
def test_429_makes_all_wait_for_as_long_as_it_says(
    judge: JudgeStandIn, asker: Callable[..., Asker], headers: dict[str, str]
) -> None:
    judge.fault("429", headers=headers, when=lambda body: "質問 0" in str(body))
    times: list[float] = []

    def reply(body: dict[str, Any]) -> str:
        if "質問 1" in str(body):
            time.sleep(0.3)     # in flight while the other is refused
        times.append(time.monotonic())
        return "x"

    judge.reply = reply
    began = time.monotonic()
    asker(concurrency=2).ask([question(i) for i in range(4)])
    asked = float(headers.get("retry-after-ms", "1000")) / 1000
    assert all(asked <= t - began < 10 for t in times[1:])


def test_a_wait_without_end_is_left_to_a_later_attempt(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("429", headers={"Retry-After": "86400"})
    with pytest.raises(AutoEvalError, match="asks to wait 86400 s"):
        asker().ask([question(1)])
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("400", "suites.quick"), ("401", r"\$JUDGE_AUTH \(suites.quick.evaluators\[0\].judge.api_key_env"),
        ("403", "api_key_env"), ("404", "judge.model and"), ("422", "HTTP 422"), ("quota", "no credit left"),
        ("wrong model", r"'judge-1' and answers as 'another-model'; .*accept_models"),
        ("temperature", r"judge.temperature: null"), ("redirect", "redirect to http://127.0.0.2"),
    ],
)  # fmt: skip
def test_what_no_try_mends_is_final(judge: JudgeStandIn, asker: Callable[..., Asker], kind: str, told: str) -> None:
    judge.fault(kind, times=None, text="http://127.0.0.2:9/v1")
    with pytest.raises(ConfigError, match=told):
        asker().ask([question(1, temperature=0.0)])
    assert len(judge.requests) == 1


def test_after_a_final_error_what_is_in_flight_is_kept(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("400", when=lambda body: "質問 0" in str(body))
    judge.delay = 0.1
    with pytest.raises(ConfigError):
        asker(concurrency=4).ask([question(i) for i in range(30)])
    assert len(judge.requests) <= 8
    asked = judge.counts
    replies = asker().ask([question(i) for i in range(30)])
    assert len(replies) == 30
    assert [content for content, n in judge.counts.items() if n > 1] == [c for c in asked if "\\u554f 0" in c]


@pytest.mark.parametrize(
    ("kind", "text", "refused", "finish"),
    [
        ("refusal", "I cannot help with that.", True, "stop"), ("content_filter", "", True, "content_filter"),
        ("filtered", "The response was filtered", True, "content_filter"), ("null", "", False, "length"),
        ("parts", "評価: 質問 1", False, "stop"),
    ],
)  # fmt: skip
def test_odd_answers(
    judge: JudgeStandIn, asker: Callable[..., Asker], kind: str, text: str, refused: bool, finish: str
) -> None:
    judge.fault(kind)
    [reply] = asker().ask([question(1)])
    assert (reply.text, reply.refused, reply.finish) == (text, refused, finish)
    assert asker().ask([question(1)])[0].text == text       # an answer all the same
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    ("reported", "right"),
    [
        ("judge-1", True), ("judge-1-2025-01-31", True), ("judge-1-0613", True), ("judge-1-mini", False),
        ("judge-1-32k", False), ("judge", False), ("judge-10", False), ("allowed", True), ("", True),
    ],
)  # fmt: skip
def test_the_reported_model(asker: Callable[..., Asker], reported: str, right: bool) -> None:
    assert asker(accept_models=("allowed",))._is_asked("judge-1", reported) is right
    assert asker(accept_models=("*",))._is_asked("judge-1", reported)


def test_max_tokens_is_renamed_once_for_all(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("max_tokens", times=None)
    requests = [question(i) for i in range(5)]
    asker(concurrency=1, attempts=1).ask(requests)
    assert [("max_tokens" in r.body, "max_completion_tokens" in r.body) for r in judge.requests] == [
        (True, False), *[(False, True)] * 5
    ]  # fmt: skip
    asker().ask(requests)       # the journal knows the request as it was asked
    assert len(judge.requests) == 6


def test_a_refused_parameter_is_named(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("response_format", times=None)
    structured = question(1, response_format={"type": "json_schema", "json_schema": {}})
    with pytest.raises(ParameterRefused) as raised:
        asker().ask([structured])
    assert raised.value.parameter == "response_format"
    assert raised.value.kind == "configuration"


def test_completions(asker: Callable[..., Asker], judge: JudgeStandIn) -> None:
    judge.reply = lambda body: body["prompt"] + "!"
    request = Request("/completions", {"model": "judge-1", "prompt": "昔々", "max_tokens": 5})
    assert asker().ask([request])[0].text == "昔々!"


def test_megatrons_static_server(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.reply = lambda body: body["prompt"] + " answer END more"
    body = {"model": "m", "prompt": "ask END", "max_tokens": 5, "temperature": 0.0, "stop": ["END"], "n": None}
    megatron = {"api": "megatron", "api_key_env": None}
    judge.key = ""
    [reply] = asker(**megatron).ask([Request("/completions", body)])
    assert (reply.text, reply.finish) == (" answer ", "stop")
    sent = {"model": "", "prompt": "ask END", "max_tokens": 5, "temperature": 0.0, "echo": True}
    assert judge.requests[0].body == sent
    judge.reply = lambda body: "sk END answer"
    with pytest.raises(ConfigError, match="does not start with the prompt"):
        asker(**megatron).ask([Request("/completions", body | {"max_tokens": 6})])


def test_the_list_of_models(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    assert asker().models() == ["judge-1"]
    judge.fault("500", times=2)
    assert asker().models() == ["judge-1"]
    judge.fault("403", when=lambda body: not body)      # a key may be for asking only
    assert asker().models() is None
    judge.fault("html", when=lambda body: not body)
    assert asker().models() is None
    judge.models = None
    assert asker().models() is None
    judge.key = "another"
    with pytest.raises(ConfigError, match="api_key_env"):
        asker().models()
    with pytest.raises(AutoEvalError, match="after 2 attempts") as raised:
        asker(base_url="http://127.0.0.1:9", attempts=2).models()
    assert raised.value.kind == "transient"


def test_usage_counts_the_evaluations_own_over_its_attempts(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    price = Price(2.0, 10.0)
    asker(price=price).ask([question(1)])
    asker(price=price, evaluation="other").ask([question(2)])
    last = asker(price=price)
    last.ask([question(i) for i in (1, 2, 3)])
    last.ask([question(i) for i in (1, 2, 3)])
    used = [judge.spent[0], judge.spent[2]]
    assert (last.usage.requests, last.usage.cached) == (2, 1)
    assert (last.usage.input_tokens, last.usage.output_tokens) == (sum(u[0] for u in used), sum(u[1] for u in used))
    assert last.usage.cost_usd == pytest.approx(sum(price.of(*u) for u in used))
    assert asker().usage.cost_usd is None


def test_a_budget_holds_over_attempts_and_counts_what_was_in_doubt(
    judge: JudgeStandIn, asker: Callable[..., Asker]
) -> None:
    price = Price(0.0, 1e6)     # a dollar a token, 50 a request at most
    judge.tokens = lambda body, text: (10, 20)
    with pytest.raises(BudgetReached, match="budget_usd: 75 USD are not enough: 40 are spent"):
        asker(price=price, budget=Budget(75)).ask([question(i) for i in range(9)])
    assert len(judge.requests) == 2
    with pytest.raises(BudgetReached):
        asker(price=price, budget=Budget(75)).ask([question(i) for i in range(9)])
    assert len(judge.requests) == 2
    asker(price=price, evaluation="other", budget=Budget(75)).ask([question(i) for i in range(3)])
    judge.fault("cut")
    third = asker(price=price, budget=(budget := Budget(159)))
    with pytest.raises(BudgetReached):
        third.ask([question(i) for i in range(3, 9)])
    assert budget.spent == 40 + 50 + 20
    asker(price=price, budget=(budget := Budget(500)))
    assert budget.spent == 110
    judge.fault("500", times=2)     # these cost nothing
    asker(price=price, budget=budget).ask([question(20)])
    assert budget.spent == 130


def test_what_never_reached_a_service_costs_nothing(asker: Callable[..., Asker]) -> None:
    unreachable = {"base_url": "http://127.0.0.1:9", "attempts": 2, "price": Price(0.0, 1e6)}
    with pytest.raises(AutoEvalError, match="after 2 attempts"):
        asker(budget=(budget := Budget(500)), **unreachable).ask([question(1)])
    asker(budget=(later := Budget(500)), **unreachable)
    assert (budget.spent, later.spent) == (0, 0)


def test_a_failure_behind_a_gateway_is_told(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("error in 200")
    with pytest.raises(AutoEvalError, match=r"upstream failed \(HTTP 502\)"):
        asker(attempts=1).ask([question(1)])


def test_a_body_without_end(asker: Callable[..., Asker], judge: JudgeStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval_runner.evaluators.gpt.wire.MOST_BYTES", 50)
    with pytest.raises(AutoEvalError, match="more than 50 bytes"):
        asker(attempts=1).ask([question(1)])


def test_what_the_client_does_not_know_is_sent_as_it_is(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    odd = question(1, top_k=5, chat_template_kwargs={"enable_thinking": False}, temperature=None)
    asker().ask([odd])
    assert judge.requests[0].body == odd.body


def test_text_that_no_file_could_hold(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("surrogate")
    assert asker().ask([question(1)])[0].text.encode() == b"half ?"


def test_a_tight_budget_waits_for_what_is_in_flight(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.tokens = lambda body, text: (10, 20)
    judge.delay = 0.05
    asker(price=Price(0.0, 1e6), budget=Budget(150)).ask([question(i) for i in range(6)])
    assert len(judge.requests) == 6


def test_a_budget_wants_price_and_limit(asker: Callable[..., Asker], judge: JudgeStandIn) -> None:
    with pytest.raises(ConfigError, match=r"judge.price: missing"):
        asker(budget=Budget(1))
    with pytest.raises(ConfigError, match=r"judge.max_tokens: missing"):
        asker(price=Price(1, 1), budget=Budget(1)).ask([Request("/chat/completions", {"model": "m", "messages": []})])
    assert not judge.requests


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"api_key_env": "NO_SUCH"}, r"\$NO_SUCH is not set"), ({"base_url": "127.0.0.1:80"}, "base_url"),
        ({"base_url": "https://user:secret-word@host/v1"}, "a user or a password"),
        ({"base_url": "http://[::1"}, "no URL"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_before_anything_is_asked(
    asker: Callable[..., Asker], more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        asker(**more)
    assert "secret-word" not in str(raised.value)


def test_a_key_that_no_header_can_hold(asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_AUTH", "キー-with-secret")
    with pytest.raises(ConfigError, match="cannot be a key") as raised:
        asker()
    assert "with-secret" not in str(raised.value)


@pytest.mark.parametrize("shown", [KEY, f"{KEY[:8]}{'*' * 12}{KEY[-4:]}"])
def test_the_key_is_nowhere(
    judge: JudgeStandIn, asker: Callable[..., Asker], tmp_path: Path, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    """Servers repeat it in their messages, and here even in an answer."""
    caplog.set_level(logging.DEBUG)
    judge.fault("echo key")
    asker().ask([question(1)])
    judge.fault("403", text=shown)
    errors = []
    for _ in range(2):
        with pytest.raises(ConfigError) as raised:
            asker().ask([question(2)])
        errors.append("".join(map(str, [raised.value, raised.getrepr(style="long"), raised.value.__cause__])))
        judge.key = "other-key"     # and the stand-in shows the whole of ours
    told = "\n".join([*errors, *(p.read_text() for p in tmp_path.rglob("*.jsonl")), caplog.text])
    assert "your key is ***" in told
    assert "***" in errors[0]
    assert KEY not in told
    assert KEY[-4:] not in told
    assert judge.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_redirect_carries_nothing_to_another_host(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    with JudgeStandIn() as other:
        judge.fault("redirect", times=None, text=f"{other.url.replace('127.0.0.1', 'localhost')}/chat/completions")
        with pytest.raises(ConfigError, match="which is not followed; check suites"):
            asker().ask([question(1)])
        assert not other.requests
        assert not other.others


@pytest.mark.parametrize("key", [None, "JUDGE_AUTH"])
def test_what_the_environment_holds_for_openai_is_sent_to_nobody(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "of-another-service")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: of-another-service\n"
                       "Authorization: Bearer of-another-service\nUser-Agent: of-another-service")  # fmt: skip
    judge.key = KEY if key else ""
    asker(api_key_env=key).ask([question(1)])
    assert asker(api_key_env=key).models() == ["judge-1"]
    asker(api_key_env=key).wire.call(lambda: batch_file(asker(api_key_env=key)))
    sent = [*judge.requests, *judge.others]
    assert len(sent) == 3
    assert "of-another-service" not in str([r.headers for r in sent])
    assert {r.headers.get("authorization") for r in sent} == {f"Bearer {KEY}" if key else None}


def batch_file(asker: Asker) -> Any:
    return asker.wire.client.files.create(file=("x.jsonl", b"{}"), purpose="batch")


def test_this_hosts_own_server_is_asked_past_any_proxy(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    asker(attempts=1).ask([question(1)])
    with pytest.raises(AutoEvalError):      # any other host is asked through it
        asker(attempts=1, base_url=judge.url.replace("127.0.0.1", "judge.invalid")).ask([question(2)])


def test_the_organization(judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_ORG", "org-1")
    asker(organization_env="OUR_ORG").ask([question(1)])
    assert judge.requests[0].headers["openai-organization"] == "org-1"


def test_rates_are_kept(judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval_runner.evaluators.gpt.rates.WINDOW_S", 0.5)
    began = time.monotonic()
    asker(requests_per_minute=2).ask([question(i) for i in range(5)])
    assert 1.0 <= time.monotonic() - began < 3


def test_what_done_raises_ends_it_at_once(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("timeout", when=lambda body: "質問 1" in str(body), seconds=5.0)

    def done(index: int, reply: Reply) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asker(concurrency=2).ask([question(i) for i in range(9)], done)
    assert time.monotonic() - began < 2
    assert len(judge.requests) <= 4


def test_a_journal_that_cannot_be_written_is_known_before_anything_is_asked(
    judge: JudgeStandIn, asker: Callable[..., Asker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = asker()

    def write(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("eval_runner.evaluators.gpt.journal.os.write", write)
    with pytest.raises(AutoEvalError, match="cannot write the cache of the GPT evaluator: No space"):
        full.ask([question(1)])
    assert not judge.requests
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match="cannot read the cache"):
        Journal(tmp_path / "file")


def test_a_disk_that_fills_up_ends_it(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, real = Budget(100), os.write
    filling = asker(concurrency=2, price=Price(1, 1), budget=budget)

    def write(fd: int, data: bytes) -> int:
        return real(fd, data if len(judge.requests) < 5 else data[:50])

    monkeypatch.setattr("eval_runner.evaluators.gpt.journal.os.write", write)
    with pytest.raises(AutoEvalError, match="cannot write the cache of the GPT evaluator: 50 of"):
        filling.ask([question(i) for i in range(30)])
    monkeypatch.undo()
    assert len(judge.requests) <= 7
    with pytest.raises(BudgetReached):      # and nobody waits for what will never be settled
        budget.take("another", 1000)
    monkeypatch.setenv("JUDGE_AUTH", KEY)
    asker().ask([question(i) for i in range(30)])
    assert sum(judge.counts.values()) <= 30 + 3


def test_no_thread_is_left(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    before = set(threading.enumerate())     # a test may have left some with a service that is silent
    asker(concurrency=8).ask([question(i) for i in range(20)])
    deadline = time.monotonic() + 2
    while (left := [t for t in threading.enumerate() if t not in before and t.name == "asks"]):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
