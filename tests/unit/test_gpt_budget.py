"""The budget is hard: what is really spent never passes it, whatever is asked, whatever fails, whatever is killed."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt.budget import Bound, Budget, BudgetReached, Ended, Price, bound
from eval_runner.evaluators.gpt.journal import Journal, new_name


@given(
    st.floats(0, 10), st.floats(0, 100), st.floats(0, 100),
    st.lists(
        st.tuples(
            st.integers(0, 20_000), st.integers(0, 4000), st.floats(0, 1), st.floats(0, 1),
            st.sampled_from(["answered", "refused", "lost", "killed before it is sent", "killed in flight"]),
        ),
        max_size=12,
    ),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_what_is_really_spent_never_passes_the_budget(
    limit: float, into: float, out: float, requests: list[tuple[int, int, float, float, str]]
) -> None:
    """Each request costs a part of its upper bound; a kill makes a new budget from the journal."""
    price, real = Price(into, out), 0.0
    with tempfile.TemporaryDirectory() as directory:
        journal, budget = Journal(Path(directory)), Budget(limit)
        for prompt, answer, part_in, part_out, fate in requests:
            most = Bound(prompt, answer).cost(price)
            assert most is not None
            try:
                budget.take(name := new_name(), most)
            except BudgetReached:
                continue
            journal.asked(name, "e", most)
            cost = price.of(int(prompt * part_in), int(answer * part_out))
            if fate == "answered":
                journal.settled(name, cost)
                budget.settle(name, cost)
            elif fate == "refused":
                cost = 0.0
                journal.settled(name, cost)
                budget.settle(name, cost)
            elif fate == "lost":
                budget.leave(name)
            else:
                cost = 0.0 if fate == "killed before it is sent" else cost
                journal.close()
                journal, budget = Journal(Path(directory)), Budget(limit)
                budget.recall(journal.spent("e"))
            real += cost
            assert real <= budget.spent * (1 + 1e-9) + 1e-12
            assert budget.spent <= limit
        journal.close()
        later = Budget(limit)
        later.recall(Journal(Path(directory)).spent("e"))
        assert later.spent == pytest.approx(budget.spent)


@given(st.text(max_size=200), st.integers(1, 1000), st.integers(1, 4))
def test_an_upper_bound_is_not_below_the_bytes(text: str, limit: int, choices: int) -> None:
    found = bound({"messages": [{"role": "user", "content": text}], "max_tokens": limit, "n": choices})
    assert found.input >= len(text.encode())
    assert found.output == limit * choices


def test_a_bound_counts_all_that_may_reach_the_model() -> None:
    schema = {"type": "json_schema", "json_schema": {"description": "x" * 5000}}
    assert bound({"messages": [], "response_format": schema}).input > 5000
    assert bound({"prompt": "日本語"}) == Bound(bound({"prompt": ""}).input + 9, None)
    assert bound({"prompt": "", "max_completion_tokens": 7}).output == 7
    assert bound({"prompt": "", "max_tokens": True}).output is None
    assert Bound(5, None).cost(Price(1, 1)) is None
    assert Price(2.5, 10).of(1_000_000, 100_000) == 3.5


def test_reached() -> None:
    budget = Budget(1.0, "suites.q.evaluators[0].budget_usd")
    budget.take("a", 0.7)
    budget.settle("a", 0.6)
    with pytest.raises(ConfigError, match=r"suites.q.evaluators\[0\].budget_usd: 1 USD are not enough: 0.6 .*0.41"):
        budget.take("b", 0.41)
    assert budget.spent == 0.6
    budget.take("b", 0.4)


def test_what_is_recalled_counts_once() -> None:
    budget = Budget(10)
    budget.take("mine", 1.0)
    budget.settle("mine", 0.5)
    for _ in range(2):
        budget.recall([("mine", 1.0), ("earlier", 2.0)])
    assert budget.spent == 2.5


def test_room_is_waited_for_while_something_is_in_flight() -> None:
    budget = Budget(1.0)
    budget.take("a", 0.7)
    threading.Timer(0.1, budget.settle, ("a", 0.1)).start()
    budget.take("b", 0.7)
    assert budget.spent == pytest.approx(0.8)
    threading.Timer(0.1, budget.leave, ("b",)).start()
    with pytest.raises(BudgetReached):
        budget.take("c", 0.7)


def test_waiting_ends_when_all_ends() -> None:
    budget = Budget(1.0)
    budget.take("a", 0.7)
    with pytest.raises(Ended):
        budget.take("b", 0.7, lambda: True)


def test_many_threads_never_take_more() -> None:
    budget, taken = Budget(10.0), []

    def run() -> None:
        for _ in range(30):
            try:
                budget.take(name := new_name(), 1.0)
            except BudgetReached:
                return
            taken.append(budget.spent)
            budget.settle(name, 0.25)

    threads = [threading.Thread(target=run) for _ in range(8)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert max(taken) <= 10.0
    assert len(taken) == 37     # the last one leaves less than a dollar
