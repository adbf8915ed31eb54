"""What requests cost at most, and a hard limit for what one evaluation may spend."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from autoeval_hooks.errors import ConfigError

OVERHEAD_TOKENS = 256
"""For what a server puts around a prompt: a chat template's roles, the start of the answer."""
WAKE_S = 0.2
"""Seconds between two looks at whether to end."""


@dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """USD."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Bound:
    """How many tokens a request can take at most; `output` is None where its body sets no limit."""

    input: int
    output: int | None

    def cost(self, price: Price) -> float | None:
        """USD; None where it has no limit."""
        return None if self.output is None else price.of(self.input, self.output)


def bound(body: dict[str, Any]) -> Bound:
    """The most that `body` can take.

    A byte-level tokenizer never makes more tokens of a text than it has bytes in UTF-8, and the body holds, besides the
    prompt, all that a server may put before the model (such as a JSON schema), so its own bytes are counted.
    """
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")
    limits = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    limit = next((n for n in limits if isinstance(n, int) and not isinstance(n, bool)), None)
    choices = body.get("n") if isinstance(body.get("n"), int) else 1
    return Bound(len(data) + OVERHEAD_TOKENS, None if limit is None else limit * max(1, choices or 1))


class BudgetReached(ConfigError):
    """The next request could pass the budget, and was not sent."""


class Ended(Exception):
    """Another request failed for good: this one is not asked any more."""


class Budget:
    """A hard limit in USD for what one evaluation may spend, over all its attempts. May be used by many threads.

    Before something is sent, its upper bound is taken (`take`); it stays taken until it is known what the request cost
    (`settle`). What was sent and never answered, here or in an attempt that was killed, counts at its upper bound.
    """

    def __init__(self, limit: float, where: str = "") -> None:
        """`where` is the key path for messages: ``suites.quick.evaluators[0].budget_usd``."""
        self.limit = limit
        self._where = where or "budget_usd"
        self._taken: dict[str, float] = {}
        self._open: set[str] = set()
        self._changed = threading.Condition()

    @property
    def spent(self) -> float:
        """USD: what is known to be spent, and the upper bound of what is not known."""
        with self._changed:
            return math.fsum(self._taken.values())

    def recall(self, asked: Iterable[tuple[str, float]]) -> None:
        """Count what earlier attempts spent: `Journal.spent(evaluation)`. What was counted before is not counted again,
        so that several journals, and one journal several times, may be recalled."""
        with self._changed:
            for name, amount in asked:
                self._taken.setdefault(name, amount)

    def take(self, name: str, amount: float, ending: Callable[[], bool] = lambda: False) -> None:
        """Reserve `amount` USD for the request `name`; for want of room, those that are in flight are waited for, most
        of which cost less than they might. Raises BudgetReached, with nothing reserved, and Ended once `ending`."""
        with self._changed:
            while (spent := math.fsum(self._taken.values())) + amount > self.limit:
                if not self._open:
                    raise BudgetReached(
                        f"{self._where}: {self.limit:g} USD are not enough: {spent:.6g} are spent, and the next "
                        f"request may cost {amount:.6g}. Nothing is lost: raise it, and all that was answered comes "
                        "from the cache"
                    )
                if ending():
                    raise Ended
                self._changed.wait(WAKE_S)
            self._taken[name] = amount
            self._open.add(name)

    def settle(self, name: str, amount: float) -> None:
        """The request `name` cost `amount` USD, 0 if it was never sent or was refused."""
        with self._changed:
            self._taken[name] = amount
            self._open.discard(name)
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """Nobody will know what the request `name` cost."""
        with self._changed:
            self._open.discard(name)
            self._changed.notify_all()
