"""Requests through the batch interface: one file up, one batch, its results down, whatever is killed in between.

A batch is written down before it is created, under a name that it carries in its metadata, and again with its id. One
that was begun is taken up by whoever needs its answers next, and found by its name where a kill came between the two,
so that none is created twice. What a batch leaves open goes into the next one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import wire as wires
from eval_runner.evaluators.gpt.budget import bound
from eval_runner.evaluators.gpt.journal import new_name
from eval_runner.evaluators.gpt.records import Reply, Request
from eval_runner.evaluators.gpt.retry import PATIENCE_S, Failure, back_off

if TYPE_CHECKING:       # which imports this module
    from eval_runner.evaluators.gpt.client import Asker

POLL_S = 30.0
"""Seconds between two looks at a batch."""
MOST = 50_000
MOST_BYTES = 100 << 20
"""Requests and bytes of one file; OpenAI's limits are 50,000 and 200 MB."""
TAG = "autoeval"
"""The key of the metadata that holds a batch's name."""
logger = logging.getLogger("autoeval")
ENDED = ("completed", "failed", "expired", "cancelled")

Todo = dict[str, Request]
Arrived = Callable[[str, Reply], None]


def ask(asker: Asker, todo: Todo, arrived: Arrived) -> None:
    """Answer `todo`, by the key of each request. Raises as `Asker.ask` does, once a batch is read to its end."""
    todo, rounds, failure = dict(todo), 0, Failure("")
    while todo:
        begun = {b["name"]: b for b in asker.journal.batches()}
        batch = next((b for b in begun.values() if _fits(b, asker) and todo.keys() & set(b["keys"])), None)
        if batch is None:
            if rounds >= asker.service.attempts:
                raise AutoEvalError(
                    f"{asker.service.name} at {asker.service.base_url}: {len(todo)} requests are not answered after "
                    f"{rounds} batches, the last for: {failure.message}"
                )
            if rounds:
                time.sleep(back_off(rounds))
            rounds += 1
            batch = _plan(asker, _chunk(todo))
        try:
            failure = _Batch(asker, batch).run(todo, arrived, new=batch["name"] not in begun) or failure
        finally:
            asker.leave(batch["asked"])


def finish(asker: Asker) -> None:
    """Settle the batches whose answers are all written down: a kill came before this was."""
    for batch in asker.journal.batches():
        if _fits(batch, asker):
            entries = [asker.journal.entry(key) for key in batch["keys"]]
            if all(entries):
                _Batch(asker, batch).done(sum((e.cost or 0.0) for e in entries if e))


def _fits(batch: dict[str, Any], asker: Asker) -> bool:
    """Whether it is a batch of this service, as we write them."""
    keys = batch.get("keys")
    texts = [batch.get(n) for n in ("id", "asked", "service")] + (keys if isinstance(keys, list) and keys else [None])
    return all(isinstance(text, str) for text in texts) and batch["service"] == asker.service.identity


def _chunk(todo: Todo) -> Todo:
    """What fits into one file, all of one path."""
    path, size = next(iter(todo.values())).path, 0
    chunk: Todo = {}
    for key, request in todo.items():
        size += len(json.dumps(request.body)) + 256
        if chunk and (len(chunk) >= MOST or size > MOST_BYTES):
            break
        if request.path == path:
            chunk[key] = request
    return chunk


def _plan(asker: Asker, chunk: Todo) -> dict[str, Any]:
    """Write down that a batch is created now; the whole of it is taken from the budget."""
    asked = asker.reserve([bound(request.body) for request in chunk.values()])
    line = {
        "kind": "batch", "name": new_name(), "id": "", "service": asker.service.identity, "asked": asked,
        "keys": list(chunk),
    }  # fmt: skip
    asker.journal.append(line)
    return line


def _id(asker: Asker, answer: dict[str, Any]) -> str:
    if not isinstance(name := answer.get("id"), str) or not name:
        raise AutoEvalError(f"{asker.service.name} at {asker.service.base_url}: answers without an id")
    return name


class _Unknown(ConfigError):
    """Whether there is a batch."""


class _Gone(Exception):
    """The service no longer knows a batch, or what it answered."""


class _Batch:
    """One batch, from its line in the journal on."""

    def __init__(self, asker: Asker, line: dict[str, Any]) -> None:
        self._asker = asker
        self._line = line
        self._keys = set(line["keys"])
        self._bodies: dict[str, dict[str, Any]] = {}
        self._other: float | None = 0.0
        """USD of what is not asked for now, such as what was written down before a kill; None: nobody knows."""

    def run(self, todo: Todo, arrived: Arrived, *, new: bool) -> Failure | None:
        """Bring it to its end; what it answered leaves `todo`. The last failure that another batch may mend."""
        chunk = {key: request for key, request in todo.items() if key in self._keys}
        self._bodies = {key: self._asker.understood(request.body) for key, request in chunk.items()}
        if not self._line["id"]:
            self._create(chunk, new)
        where = f"/batches/{self._line['id']}"
        client = self._asker.wire.client
        state: dict[str, Any] = {}
        answers: dict[str, Reply | Failure] = {}
        gone: _Gone | None = None
        try:
            while (state := self._get(lambda: client.get(where, cast_to=object))).get("status") not in ENDED:
                time.sleep(POLL_S)
            for field in ("error_file_id", "output_file_id"):
                if isinstance(file := state.get(field), str) and file:
                    answers |= dict(self._read(file, chunk))
        except _Gone as error:
            gone, self._other = error, None
        failure = self._keep(chunk, answers, todo, arrived)
        if gone:
            return self._lost(gone, new)
        if state["status"] == "completed" and not failure and len(answers) < len(chunk):
            return Failure("the batch has no answer to some requests")
        return failure or (None if state["status"] == "completed" else _told(state))

    def _lost(self, gone: _Gone, new: bool) -> Failure:
        """What it did not answer goes into another batch, unless this one is `new`: then that would go on for ever."""
        asker = self._asker
        told = f"{asker.service.name} at {asker.service.base_url} no longer knows the batch {self._line['id']}: {gone}"
        if new:
            raise ConfigError(f"{told}; where it was not removed there, set {asker.service.where}.batch: false")
        logger.warning("%s; what it did not answer is asked again, and it counts at its upper bound", told)
        return Failure(told)

    # ------------------------------------------------------------------ up

    def _create(self, chunk: Todo, new: bool) -> None:
        """Create it, unless it is there: where it is not `new`, a kill may have come between the two."""
        asker, client = self._asker, self._asker.wire.client
        path = next(iter(chunk.values())).path
        lines = [{"custom_id": k, "method": "POST", "url": f"/v1{path}", "body": b} for k, b in self._bodies.items()]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()

        def upload() -> Any:
            made = client.files.create(file=(f"{TAG}.jsonl", data), purpose="batch")
            return {"id": getattr(made, "id", None)}

        def create() -> Any:
            wanted = {"endpoint": f"/v1{path}", "completion_window": "24h", "metadata": {TAG: self._line["name"]}}
            return client.post("/batches", body={"input_file_id": file} | wanted, cast_to=object)

        found = None if new else self._find()
        if found is None:
            try:
                file = _id(asker, self._call(upload, within=wires.FILE_S))
                found = self._call(create, again=self._find)
            except _Unknown:
                raise
            except ConfigError as error:
                self.done(0.0)      # refused, so that there is none
                where = asker.service.where
                raise ConfigError(f"{error}; where there is no batch interface, set {where}.batch: false") from None
        self._line = self._line | {"id": _id(asker, found)}
        asker.journal.append(self._line)

    def _find(self) -> dict[str, Any] | None:
        """The batch of our name, in the service's list."""
        after = ""
        while True:
            try:
                page = self._call(partial(self._page, after))
            except ConfigError as error:
                raise _Unknown(
                    f"a batch may have been created before an end that was not foreseen, and cannot be looked for: "
                    f"{error}. If the service lists none with the metadata {TAG}={self._line['name']}, remove the line "
                    f"with this name below {self._asker.journal.directory}"
                ) from None
            data = page.get("data")
            items = [b for b in data if isinstance(b, dict)] if isinstance(data, list) else []
            for item in items:
                if isinstance(told := item.get("metadata"), dict) and told.get(TAG) == self._line["name"]:
                    return item
            last = items[-1].get("id") if items else None
            if not page.get("has_more") or not isinstance(last, str) or last == after:
                return None
            after = last

    def _page(self, after: str) -> Any:
        params = {"limit": 100} | ({"after": after} if after else {})
        return self._asker.wire.client.get("/batches", options={"params": params}, cast_to=object)

    # ------------------------------------------------------------------ down

    def _read(self, file: str, chunk: Todo) -> Iterator[tuple[str, Reply | Failure]]:
        """What a result file says about the requests of `chunk`."""
        wire = self._asker.wire
        data = self._get(lambda: {"data": wire.file(file)}, wires.FILE_S)["data"]
        for text in data.splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                self._other = None
                continue
            key = line.get("custom_id") if isinstance(line, dict) else None
            if isinstance(key, str) and key in chunk:
                large = Failure(f"an answer of more than {wires.MOST_BYTES} bytes", charged=True)
                yield key, large if len(text) > wires.MOST_BYTES else self._answer(line, chunk[key])
            elif isinstance(key, str) and key in self._keys:
                self._count_other(key, line)

    def _count_other(self, key: str, line: dict[str, Any]) -> None:
        response, price = line.get("response"), self._asker.service.price
        if not isinstance(response, dict) or response.get("status_code") != 200 or price is None or self._other is None:
            return
        body, entry = response.get("body"), self._asker.journal.entry(key)
        counted = wires.counts(body.get("usage") if isinstance(body, dict) else None)
        known = price.of(*counted) if any(counted) else entry.cost if entry else None
        self._other = None if known is None else self._other + known

    def _answer(self, line: dict[str, Any], request: Request) -> Reply | Failure:
        wire, response = self._asker.wire, line.get("response")
        if not isinstance(response, dict):
            told = line.get("error") if isinstance(line.get("error"), dict) else {}
            return Failure(wire.masked(str((told or {}).get("message") or (told or {}).get("code") or "no answer")))
        if response.get("status_code") != 200:
            status = response.get("status_code")
            return wire.refusal(status if isinstance(status, int) else 500, response.get("body"))
        return wire.reply(response.get("body"), request, request.body)

    def _keep(
        self, chunk: Todo, answers: dict[str, Reply | Failure], todo: Todo, arrived: Arrived
    ) -> Failure | None:
        """Write every reply down, then that the batch is done. Raises what is final after that; not so for the replies
        of another model: with `accept_models` set, they are read again and not asked again."""
        asker, again, final, cost = self._asker, None, None, 0.0
        for key, answer in answers.items():
            request = chunk[key]
            if isinstance(answer, Failure):
                body = self._bodies[key]
                cost += (asker.cost(request, Reply("", False, "", "", 0, 0)) or 0.0) if answer.charged else 0.0
                if not answer.filtered:
                    if asker.learn(answer, body) or answer.again:
                        again = answer
                    else:
                        final = final or asker.final(answer, body)
                    continue
                answer = Reply(answer.message, True, "content_filter", "", 0, 0)
                reply = asker.keep(request, answer, "", free=True)
            else:
                reply = asker.keep(request, answer, "")
                cost += asker.cost(request, answer) or 0.0
            del todo[key]
            arrived(key, reply)
        self.done(None if self._other is None else cost + self._other)
        if final:
            raise final
        return again

    def done(self, cost: float | None) -> None:
        """It needs no more looks, and cost this many USD; None: nobody knows, and it stays at its upper bound."""
        if self._line["asked"] and cost is not None:
            self._asker.settle(self._line["asked"], cost)
        self._asker.journal.append({"kind": "batch_done", "name": self._line["name"]})

    def _get(self, ask: Callable[[], Any], within: float | None = None) -> dict[str, Any]:
        """As `_call`; raises _Gone for what the service no longer knows. It may not know yet what it has just made, so
        it is asked more than once."""
        return self._call(ask, within=within, gone=True)

    def _call(
        self, ask: Callable[[], Any], again: Callable[[], Any] = lambda: None, *, within: float | None = None,
        gone: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """What the service answers, an object, tried again as a request is; `again` may find it before each such try.
        The batch stays in the journal when this raises."""
        tries = 0
        while True:
            answer = self._asker.wire.call(ask, within)
            if isinstance(answer, dict):
                return answer
            failure = answer if isinstance(answer, Failure) else Failure("an answer that is no object")
            tries += 1
            wait = back_off(tries) if failure.wait is None else failure.wait
            missing = gone and failure.status == 404
            if not (failure.again or missing) or tries >= self._asker.service.attempts or wait > PATIENCE_S:
                raise _Gone(failure.message) if missing else self._asker.final(failure, {}, tries)
            time.sleep(wait)
            if (found := again()) is not None:
                return dict(found)


def _told(state: dict[str, Any]) -> Failure:
    """Why a batch ended without all answers, as the service says."""
    errors = state.get("errors")
    data = errors.get("data") if isinstance(errors, dict) else None
    said = [e["message"] for e in data or () if isinstance(e, dict) and isinstance(e.get("message"), str)]
    return Failure(" ".join([f"the batch {state['status']}", *said])[:300])
