"""Ask a service that speaks OpenAI's API: many requests at once, each answered only once, whatever is killed when."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import pool, retry
from eval_runner.evaluators.gpt.budget import Bound, Budget, Ended, bound
from eval_runner.evaluators.gpt.journal import Entry, Journal, key_of, new_name
from eval_runner.evaluators.gpt.rates import Booking, Rates
from eval_runner.evaluators.gpt.records import Reply, Request
from eval_runner.evaluators.gpt.refusal import final
from eval_runner.evaluators.gpt.retry import PATIENCE_S, Failure, back_off
from eval_runner.evaluators.gpt.service import Service, Usage
from eval_runner.evaluators.gpt.wire import Wire

_DATED = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4})(?:-preview)?\Z")
"""What the reported name of a snapshot has after the asked one; `gpt-4-32k` is no snapshot of `gpt-4`."""


class Asker:
    """Asks one service, and keeps every answer in `journal`.

    `salt` makes requests that are equal otherwise different, so that they are asked again. `evaluation` names the
    evaluation of one checkpoint, the same in all its attempts: for its budget and its `usage`, what its earlier
    attempts were answered counts as its own, and what others were answered as `cached`. With `batch`, requests go
    through the batch interface. `rates` are those of all who ask the service. `progress` is told how many of how many
    are answered.
    """

    def __init__(
        self,
        service: Service,
        journal: Journal,
        *,
        salt: str = "",
        evaluation: str = "",
        budget: Budget | None = None,
        batch: bool = False,
        rates: Rates | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Raises ConfigError for a key that is not in the environment, and a budget without a price."""
        if budget and service.price is None:
            raise ConfigError(f"{service.where}.price: missing; a budget needs it, in USD per million tokens")
        self.usage = Usage(cost_usd=None if service.price is None else 0.0)
        self.wire = Wire(service)
        self.evaluation = evaluation
        self._service = service
        self._journal = journal
        self._salt = salt
        self._budget = budget
        self._batch = batch
        self._progress = progress
        self._rates = rates or Rates(service.requests_per_minute, service.tokens_per_minute)
        self._renames = False
        self._counted: set[str] = set()
        self._lock = threading.Lock()
        if budget:
            budget.recall(journal.spent(evaluation))

    def known(self, request: Request) -> Reply | None:
        """The answer of an earlier request, from the journal only."""
        return self._journal.get(self._key(request))

    def ask(
        self, requests: Sequence[Request], done: Callable[[int, Reply], None] = lambda index, reply: None
    ) -> list[Reply]:
        """The answers, in the order of the requests; requests that are equal are asked once.

        `done(index, reply)` is called in this thread as each comes. Raises the first error that is final, once what is
        in flight is answered and written down: ConfigError (`ParameterRefused` where the service refuses a parameter of
        the body, such as ``response_format``; `budget.BudgetReached`), AutoEvalError after the last attempt.
        """
        from eval_runner.evaluators.gpt import batch  # which imports this module

        self._journal.refresh()
        if self._batch:
            batch.finish(self)
        replies: dict[int, Reply] = {}
        waiting: dict[str, list[int]] = {}

        def answered(index: int, reply: Reply) -> None:
            replies[index] = reply
            done(index, reply)
            self._progress(len(replies), len(requests))

        for i, request in enumerate(requests):
            key = self._key(request)
            if (entry := self._journal.entry(key)) is None:
                waiting.setdefault(key, []).append(i)
            else:
                self._count_known(key, entry)
                answered(i, entry.reply)
        if waiting:
            self._journal.open()
            todo = {key: requests[places[0]] for key, places in waiting.items()}

            def arrived(key: str, reply: Reply) -> None:
                for i in waiting[key]:
                    answered(i, reply)

            if self._batch:
                batch.ask(self, todo, arrived)
            else:
                pool.run(todo.items(), self._answer, arrived, self._service.concurrency)
        return [replies[i] for i in range(len(requests))]

    def models(self) -> list[str] | None:
        """The names of the models that the service lists; None where it has no such list, or none for this key, which
        may ask all the same. Raises ConfigError where it refuses the key, AutoEvalError where it cannot be reached."""
        tries = 0
        while isinstance(answer := self.wire.models(), Failure):
            tries += 1
            if answer.status in (403, 404, 405, 501):
                return None
            if not answer.again or tries >= self._service.attempts or (answer.wait or 0) > PATIENCE_S:
                raise self.final(answer, {}, tries)
            threading.Event().wait(back_off(tries) if answer.wait is None else answer.wait)
        listed = answer.get("data") if isinstance(answer, dict) else None
        names = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else None
        return None if names is None else [n for n in names if isinstance(n, str)]

    # ------------------------------------------------------------------ one request

    def _answer(self, request: Request, ending: threading.Event) -> Reply:
        """The answer, asked for as long as that makes sense. Raises what is final, and Ended."""
        most, tries, name, first = bound(request.body), 0, "", None
        try:
            while True:
                booking = self._book(most, ending)
                first = first or booking
                name = name or self.reserve([most], ending.is_set)
                body = self.understood(request.body)
                result = self.wire.post(request, body)
                if isinstance(result, Reply):
                    self._rates.answered(booking, result.input_tokens + result.output_tokens or booking.tokens)
                    used, name = name, ""
                    return self.keep(request, result, used)
                if result.charged and name:
                    self.leave(name)       # for ever at its upper bound; the next try takes another one
                    name = ""
                if result.renamed(body):
                    self._renames = True
                    continue
                if result.filtered:
                    used, name = name, ""
                    return self.keep(request, Reply(result.message, True, "content_filter", "", 0, 0), used, free=True)
                tries += not self._in_turn(result, first)
                wait = back_off(tries) if result.wait is None else result.wait
                if not result.again or tries >= self._service.attempts or wait > PATIENCE_S:
                    raise self.final(result, request.body, tries)
                if result.status == 429 or result.wait is not None:
                    self._rates.pause(wait)
                elif ending.wait(wait):
                    raise Ended
        finally:
            if name:
                self.settle(name, 0.0)

    def _in_turn(self, failure: Failure, first: Booking) -> bool:
        """Whether a request, first sent as `first`, only waits for its turn: it is told when to come back, and the
        service answers others. That is no attempt."""
        patience = self._service.attempts * retry.LONGEST_WAIT_S
        return failure.status == 429 and failure.wait is not None and self._rates.silence(first) < patience

    def _book(self, most: Bound, ending: threading.Event) -> Booking:
        while not isinstance(found := self._rates.book(most.input + (most.output or 0)), Booking):
            if ending.wait(found):
                break
        if ending.is_set() or not isinstance(found, Booking):
            raise Ended
        return found

    # ------------------------------------------------------------------ what batches need, too

    def reserve(self, bounds: Sequence[Bound], ending: Callable[[], bool] = lambda: False) -> str:
        """Take the upper bound of requests from the budget and write it down; the name that `settle` wants, "" for what
        has no price. Raises BudgetReached, and ConfigError where there is a budget and no upper bound."""
        price = self._service.price
        if price is None:
            return ""
        costs = [b.cost(price) for b in bounds]
        amount = sum(c for c in costs if c is not None)
        if None in costs:
            if self._budget:
                raise ConfigError(f"{self._service.where}.max_tokens: missing; with a budget, an answer needs a limit")
            return ""
        name = new_name()
        if self._budget:
            self._budget.take(name, amount, ending)
        try:
            self._journal.asked(name, self.evaluation, amount)
        except BaseException:
            if self._budget:        # nothing is sent
                self._budget.settle(name, 0.0)
            raise
        return name

    def settle(self, name: str, cost: float) -> None:
        """What was reserved as `name` has cost this many USD."""
        self._journal.settled(name, cost)
        if self._budget:
            self._budget.settle(name, cost)

    def leave(self, name: str) -> None:
        """Nobody in this process will know what `name` costs; if it is not settled, it counts at its upper bound."""
        if self._budget and name:
            self._budget.leave(name)

    def understood(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body as the service is known to take it."""
        if not self._renames or "max_tokens" not in body:
            return body
        return {("max_completion_tokens" if k == "max_tokens" else k): v for k, v in body.items()}

    def learn(self, failure: Failure, body: dict[str, Any]) -> bool:
        """Whether the next request will be put in another way, for what this one was refused for."""
        self._renames = self._renames or failure.renamed(body)
        return failure.renamed(body)

    def cost(self, request: Request, reply: Reply) -> float | None:
        """USD; the upper bound where the service counts no tokens."""
        if (price := self._service.price) is None:
            return None
        if reply.input_tokens or reply.output_tokens:
            return price.of(reply.input_tokens, reply.output_tokens)
        return bound(request.body).cost(price)

    def keep(self, request: Request, reply: Reply, name: str, *, free: bool = False) -> Reply:
        """Write a reply down, then count it. `name` is settled by it, if there is one. Raises ConfigError for the
        reply of another model than the asked one, which is paid for and no answer."""
        cost = 0.0 if free and self._service.price else self.cost(request, reply)
        try:
            if not self._is_asked(str(request.body.get("model", "")), reply.model):
                if name:
                    self.settle(name, cost or 0.0)
                raise ConfigError(
                    f"{self._service.name} was asked for the model {request.body.get('model')!r} and answers as "
                    f"{reply.model!r:.100}; if that is right, add it to {self._service.where}.accept_models"
                )
            self._journal.replied(
                self._service.identity, request, self._salt, reply, evaluation=self.evaluation, asked=name, cost=cost
            )
            if self._budget and name:
                self._budget.settle(name, cost or 0.0)
        finally:
            self.leave(name)
        self._count(self._key(request), reply, cost)
        return reply

    def final(self, failure: Failure, body: dict[str, Any], tries: int = 1) -> AutoEvalError:
        """The error of a request that is not tried again."""
        return final(self._service, failure, body, tries)

    @property
    def journal(self) -> Journal:
        return self._journal

    @property
    def service(self) -> Service:
        return self._service

    # ------------------------------------------------------------------ counting

    def _key(self, request: Request) -> str:
        return key_of(self._service.identity, request, self._salt)

    def _is_asked(self, asked: str, reported: str) -> bool:
        accepted = self._service.accept_models
        if not reported or reported == asked or reported in accepted or "*" in accepted:
            return True
        return any(reported.startswith(n) and _DATED.match(reported[len(n) :]) for n in (asked, *accepted) if n)

    def _count_known(self, key: str, entry: Entry) -> None:
        if key in self._counted:
            return
        if self.evaluation and entry.evaluation == self.evaluation:
            self._count(key, entry.reply, entry.cost)
        else:
            self._counted.add(key)
            self.usage.cached += 1

    def _count(self, key: str, reply: Reply, cost: float | None) -> None:
        with self._lock:
            self._counted.add(key)
            self.usage.requests += 1
            self.usage.input_tokens += reply.input_tokens
            self.usage.output_tokens += reply.output_tokens
            if self.usage.cost_usd is not None:
                self.usage.cost_usd += cost or 0.0
