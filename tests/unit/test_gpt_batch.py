"""Batches: one file up, one batch, its results down; what fails in it; and a kill at every point of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import batch, retry
from eval_runner.evaluators.gpt.budget import Budget, BudgetReached, Price, bound
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.journal import Journal
from eval_runner.evaluators.gpt.records import Request
from eval_runner.evaluators.gpt.service import Service
from eval_runner.evaluators.gpt.wire import Wire
from tests.judge_stand_in import JudgeStandIn


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs after it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    monkeypatch.setenv("JUDGE_AUTH", "a-key-for-tests")
    monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *a, **k: None)   # slow, and no TLS here


@pytest.fixture
def judge() -> Iterator[JudgeStandIn]:
    with JudgeStandIn(lambda body: f"評価: {body['messages'][-1]['content']}", key="a-key-for-tests") as running:
        yield running


def question(i: int, **more: Any) -> Request:
    body = {"model": "judge-1", "messages": [{"role": "user", "content": f"質問 {i}"}], "max_tokens": 50, **more}
    return Request("/chat/completions", body)


QUESTIONS = [question(i) for i in range(5)]


@pytest.fixture
def asker(judge: JudgeStandIn, tmp_path: Path) -> Iterator[Callable[..., Asker]]:
    """A new process's asker of the same journal."""
    made: list[Asker] = []

    def make(*, evaluation: str = "e", budget: Budget | None = None, batch: bool = True, **more: Any) -> Asker:
        told: dict[str, Any] = {"api_key_env": "JUDGE_AUTH", "where": "judge", "attempts": 3, "timeout": 10.0} | more
        told = {"name": "the judge", "base_url": judge.url, "identity": "judge"} | told
        journal = Journal(tmp_path / "scope")
        made.append(Asker(Service(**told), journal, evaluation=evaluation, budget=budget, batch=batch))
        return made[-1]

    yield make
    for one in made:
        one.wire.client.close()


def test_a_batch_answers(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.polls = 3
    seen: list[int] = []
    first = asker(price=Price(1.0, 2.0))
    replies = first.ask(QUESTIONS, lambda i, reply: seen.append(i))
    assert [r.text for r in replies] == [f"評価: 質問 {i}" for i in range(5)]
    assert sorted(seen) == list(range(5))
    assert len(judge.batches) == 1
    assert first.usage.requests == 5
    assert first.usage.cost_usd == pytest.approx(sum(Price(1.0, 2.0).of(*used) for used in judge.spent))
    assert asker(batch=False).ask(QUESTIONS)[0].cached      # the cache is the same
    assert len(judge.requests) == 5


@pytest.mark.parametrize("fault", ["failed", "expired"])
def test_what_a_batch_leaves_open_goes_into_the_next(
    judge: JudgeStandIn, asker: Callable[..., Asker], fault: str
) -> None:
    judge.batch_faults = [fault]
    assert len(asker().ask(QUESTIONS)) == 5
    assert len(judge.batches) == 2
    assert set(judge.counts.values()) == {1}
    assert len(judge.requests) == 5


def test_lines_that_fail_go_into_the_next(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("500", times=2)
    judge.fault("no choices")
    assert len(asker().ask(QUESTIONS)) == 5
    assert (len(judge.batches), len(judge.requests)) == (2, 8)


def test_batches_end_with_an_error_that_says_so(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.batch_faults = ["failed"] * 9
    with pytest.raises(AutoEvalError, match=r"5 requests are not answered after 3 batches.* Enqueued token limit") as e:
        asker().ask(QUESTIONS)
    assert e.value.kind == "transient"
    judge.batch_faults = []
    judge.fault("500", times=None, when=lambda body: "質問 1" in str(body))
    with pytest.raises(AutoEvalError, match=r"1 requests are not answered after 3 batches.*had an error"):
        asker().ask(QUESTIONS)


def test_a_line_that_no_try_mends(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("400", times=None, when=lambda body: "質問 1" in str(body))
    with pytest.raises(ConfigError, match="not valid"):
        asker().ask(QUESTIONS)
    judge.faults.clear()
    asker().ask(QUESTIONS)
    assert sorted(judge.counts.values()) == [1, 1, 1, 1, 2]


def test_refusals_and_renames(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("max_tokens", times=None)
    judge.fault("filtered", when=lambda body: "質問 2" in str(body))
    replies = asker().ask(QUESTIONS)
    assert [r.refused for r in replies] == [False, False, True, False, False]
    assert len(judge.batches) == 2


def test_answers_of_another_model_are_paid_for_once(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.fault("wrong model", times=5)
    with pytest.raises(ConfigError, match="accept_models"):
        asker().ask(QUESTIONS)
    replies = asker(accept_models=("another-model",)).ask(QUESTIONS)
    assert {r.model for r in replies} == {"another-model"}
    assert len(judge.requests) == 5


def test_the_budget_reserves_all_of_it_before_it_is_created(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    price = Price(0.0, 1e6)
    judge.tokens = lambda body, text: (10, 20)
    with pytest.raises(BudgetReached):
        asker(price=price, budget=Budget(249)).ask(QUESTIONS)
    assert not judge.batches
    assert not judge.files
    asker(price=price, budget=(budget := Budget(250))).ask(QUESTIONS)
    assert budget.spent == 100
    asker(price=price, budget=(later := Budget(250)))
    assert later.spent == 100
    assert bound(QUESTIONS[0].body).output == 50


def test_a_service_without_batches(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    with pytest.raises(ConfigError, match=r"HTTP 404.* set judge.batch: false"):
        asker(base_url=judge.url.removesuffix("v1") + "v0").ask(QUESTIONS)


def test_two_paths_are_two_batches(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.reply = lambda body: "x"
    asker().ask([QUESTIONS[0], Request("/completions", {"model": "judge-1", "prompt": "p", "max_tokens": 5})])
    assert sorted(b["endpoint"] for b in judge.batches.values()) == ["/v1/chat/completions", "/v1/completions"]


def test_large_batches_are_cut(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST", 2)
    asker().ask(QUESTIONS)
    assert len(judge.batches) == 3
    monkeypatch.setattr(batch, "MOST_BYTES", 10)
    asker().ask([question(i) for i in range(10, 12)])
    assert len(judge.batches) == 5


def test_a_batch_whose_creation_was_never_answered_is_found(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.batch_faults = ["", "", "", "lost"]
    for i in range(3):      # so that the list has pages
        asker().ask([question(100 + i)])
    assert len(asker().ask(QUESTIONS)) == 5
    assert len(judge.batches) == 4


def test_where_it_cannot_be_known_whether_there_is_a_batch_none_is_created(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.batch_faults, judge.lists_batches = ["lost"], False
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be looked for"):
            asker().ask(QUESTIONS)
        assert len(judge.batches) == 1
    judge.lists_batches = True
    assert len(asker().ask(QUESTIONS)) == 5
    assert len(judge.batches) == 1


def test_a_batch_is_taken_up_by_its_id(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.polls, judge.lists_batches = 3, False

    def killed(seconds: float) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(batch.time, "sleep", killed)
        with pytest.raises(Killed):
            asker().ask(QUESTIONS)
    assert len(asker().ask(QUESTIONS)) == 5
    assert len(judge.batches) == 1


def begun(asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """A batch that was created, and its client killed."""

    def killed(seconds: float) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(batch.time, "sleep", killed)
        with pytest.raises(Killed):
            asker(**more).ask(QUESTIONS)


@pytest.mark.parametrize("lost", ["batch", "file"])
def test_what_the_service_no_longer_knows_is_asked_again(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    lost: str,
) -> None:  # fmt: skip
    judge.polls = 3
    judge.tokens = lambda body, text: (10, 20)
    price = {"price": Price(0.0, 1e6)}
    begun(asker, monkeypatch, budget=Budget(500), **price)
    if lost == "batch":
        judge.batches["batch_0"] = judge.batches.pop("batch_1")
    else:
        judge.batches["batch_1"] |= {"status": "completed", "output_file_id": "file-77"}
    judge.polls = 1
    assert len(asker(budget=(budget := Budget(500)), **price).ask(QUESTIONS)) == 5
    assert budget.spent == 250 + 100        # the first one at its upper bound
    assert "no longer knows the batch batch_1: no such thing; what it did not answer is asked again" in caplog.text
    assert len(judge.batches) == 2
    asker(budget=(later := Budget(500)), **price).ask(QUESTIONS)
    assert later.spent == 350
    assert len(judge.batches) == 2


def test_what_is_left_of_a_batch_is_kept(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its two files, one is gone."""
    judge.fault("filtered", when=lambda body: "質問 2" in str(body))
    judge.polls = 2
    begun(asker, monkeypatch)
    look = judge.look("batch_1")
    assert look
    look["output_file_id"] = "file-77"
    judge.polls = 1
    judge.requests.clear()
    assert [r.refused for r in asker().ask(QUESTIONS)] == [False, False, True, False, False]
    assert len(judge.requests) == 4


def test_a_service_that_does_not_know_its_own_batches(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    judge.look = lambda name: None  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"no longer knows the batch batch_1.* set judge.batch: false"):
        asker().ask(QUESTIONS)
    assert len(judge.batches) == 1


def test_a_batch_that_is_not_known_at_once(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    real, looks = judge.look, itertools.count()
    judge.look = lambda name: real(name) if next(looks) else None  # type: ignore[method-assign]
    assert len(asker().ask(QUESTIONS)) == 5
    assert len(judge.batches) == 1


def test_answers_that_are_too_long(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("eval_runner.evaluators.gpt.wire.MOST_FILE_BYTES", 50)
        with pytest.raises(AutoEvalError, match="more than 50 bytes"):
            asker().ask(QUESTIONS)
    judge.reply = lambda body: "x" * 2000 if "質問 1" in str(body) else "x"
    monkeypatch.setattr("eval_runner.evaluators.gpt.wire.MOST_BYTES", 1000)
    with pytest.raises(AutoEvalError, match=r"1 requests are not answered after .* more than 1000 bytes"):
        asker().ask([question(i) for i in range(20, 22)] + [question(1, seed=1)])


def test_batches_of_others_are_left_alone(judge: JudgeStandIn, asker: Callable[..., Asker]) -> None:
    journal = Journal(asker().journal.directory)
    for more in ({"service": "another"}, {"keys": "all"}, {"id": None}, {"keys": [["x"]]}, {"asked": 5}):
        line = {"kind": "batch", "name": str(more), "id": "batch_x", "asked": "", "service": "judge", "keys": ["k"]}
        journal.append(line | more)
    assert len(asker().ask(QUESTIONS)) == 5


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", ["calls", "lines"])
def test_killed_anywhere_there_is_one_batch(
    judge: JudgeStandIn, asker: Callable[..., Asker], monkeypatch: pytest.MonkeyPatch, what: str, after: bool,
) -> None:  # fmt: skip
    """Before and after every call to the service, and before and after every line of the journal."""
    judge.polls = 2
    place: Any = Wire if what == "calls" else Journal
    name = "call" if what == "calls" else "append"
    real = getattr(place, name)
    points = over = 0
    for point in itertools.count():
        left = itertools.count()

        def killed(self: Any, *given: Any, left: Any = left, point: int = point) -> Any:
            if not after and next(left) == point:
                raise Killed
            done = real(self, *given)
            if after and next(left) == point:
                raise Killed
            return done

        requests = [question(1000 * point + i) for i in range(3)]
        before = len(judge.batches)
        price = {"price": Price(0.0, 1e6)}
        monkeypatch.setattr(place, name, killed)
        try:
            asker(budget=Budget(1e6), evaluation=f"e{point}", **price).ask(requests)
        except Killed:
            points += 1
        else:
            break
        finally:
            monkeypatch.setattr(place, name, real)
        last = asker(budget=(budget := Budget(1e6)), evaluation=f"e{point}", **price)
        assert [r.text for r in last.ask(requests)] == [f"評価: {r.body['messages'][0]['content']}" for r in requests]
        assert len(judge.batches) == before + 1, f"killed at point {point}"
        assert last.usage.requests == 3
        spent = sum(out for _, out in judge.spent[-3:])
        # Killed between the line of the request and that of the batch, nobody knows that nothing was sent.
        assert budget.spent in (spent, spent + 150), f"killed at point {point}"
        over += budget.spent > spent
    assert points >= 5
    assert over <= 1
    assert set(judge.counts.values()) == {1}
