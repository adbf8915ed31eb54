"""Clients that are killed at random moments, for real: no finished request is ever asked again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from eval_runner.evaluators.gpt.journal import Journal
from tests.judge_stand_in import JudgeStandIn

pytestmark = pytest.mark.slow

REQUESTS, CONCURRENCY = 40, 4
NURSERY = """
import json, os, sys, traceback
from pathlib import Path
import openai
from eval_runner.evaluators.gpt import batch
from eval_runner.evaluators.gpt.budget import Budget, Price
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.service import Service
from eval_runner.evaluators.gpt.journal import Journal
from eval_runner.evaluators.gpt.records import Request

batch.POLL_S = 0.05

def run(url, directory, requests, concurrency, limit, batched):
    service = Service(
        name="the judge", base_url=url, identity="judge", concurrency=concurrency, price=Price(0.0, 1e6), where="judge",
    )
    asker = Asker(service, Journal(Path(directory)), evaluation="e", budget=Budget(limit), batch=batched)
    print("starts", os.getpid(), flush=True)
    messages = lambda i: [{"role": "user", "content": f"質問 {i}"}]
    asker.ask([
        Request("/chat/completions", {"model": "judge-1", "messages": messages(i), "max_tokens": 50})
        for i in range(requests)
    ])
    print("done", asker.usage.requests, asker.usage.cached, flush=True)

for line in sys.stdin:
    if not (pid := os.fork()):
        try:
            run(**json.loads(line))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Clients:
    """Real processes, one after the other, each a fork of one that has imported everything."""

    def __init__(self, judge: JudgeStandIn, scope: Path) -> None:
        self._arguments = {"url": judge.url, "directory": str(scope), "requests": REQUESTS, "concurrency": CONCURRENCY}
        argv = [sys.executable, "-c", NURSERY]
        self._nursery = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exc: object) -> None:
        self._nursery.communicate(timeout=30)

    def run(
        self, limit: float, *, batched: bool = False, kill_after: float | None = None, how: int = signal.SIGKILL
    ) -> tuple[str, int]:
        """What a client printed at its end, and its exit status."""
        out, into = self._nursery.stdout, self._nursery.stdin
        assert out
        assert into
        into.write(json.dumps(self._arguments | {"limit": limit, "batched": batched}) + "\n")
        into.flush()
        word, pid = out.readline().split()
        assert word == "starts"
        ended = threading.Event()
        if kill_after is not None:
            time.sleep(kill_after)
            threading.Thread(target=_kill, args=(int(pid), how, ended), daemon=True).start()
        said, began = "", time.monotonic()
        while "ended" not in (line := out.readline()):
            assert line
            said += line
        ended.set()
        if kill_after is not None and how == signal.SIGTERM:    # how long the kernel takes to kill is not ours
            assert time.monotonic() - began < 2
        return said, int(line.rpartition("ended")[2])


def _kill(pid: int, how: int, ended: threading.Event) -> None:
    """Again and again: one run on an overloaded machine waited 300 s for a killed client; nobody knows why."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        if ended.wait(1):
            return


def finished(scope: Path) -> set[str]:
    """The contents that stand in the journal with their replies."""
    found = set()
    for file in scope.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                told: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if told.get("kind") == "reply":
                found.add(json.dumps([f"/v1{told['path']}", told["request"]], sort_keys=True))
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_again_and_again_nothing_finished_is_asked_twice(tmp_path: Path, how: signal.Signals) -> None:
    scope, log, dice, kills, said = tmp_path / "scope", tmp_path / "log", random.Random(5), 0, ""
    served = JudgeStandIn(delay=0.05, log=log, tokens=lambda body, text: (10, 20))
    with served as judge, Clients(judge, scope) as clients:
        while not said:
            before, known = len(judge.requests), finished(scope)
            said, status = clients.run(1e6, kill_after=dice.uniform(0.0, 0.15) if kills < 40 else None, how=how)
            assert status == (0 if said else -how)
            kills += not said
            asked = [r.content for r in judge.requests[before:]]
            assert not known & set(asked), "asked again, and was in the journal"
            assert len(judge.counts.keys() - finished(scope)) <= CONCURRENCY, "answered, and not in the journal"
        assert said == f"done {REQUESTS} 0\n"
        assert kills >= 4
        counts = judge.counts
        assert len(counts) == REQUESTS
        assert REQUESTS < sum(counts.values()) <= REQUESTS + kills * CONCURRENCY
        assert Counter(log.read_text().splitlines()) == counts
        # The budget's view of it is never below what the service charged for.
        spent = sum(amount for _, amount in Journal(scope).spent("e"))
        assert sum(out for _, out in judge.spent) <= spent


def test_killed_with_a_budget_it_never_costs_more(tmp_path: Path) -> None:
    """Every kill may cost what is in flight, and the limit holds all the same."""
    limit, dice = 1900.0, random.Random(7)      # eight kills take 1600 at most, all requests cost 2000
    served = JudgeStandIn(delay=0.05, tokens=lambda body, text: (10, 50))
    with served as judge, Clients(judge, tmp_path / "scope") as clients:
        for _ in range(8):
            clients.run(limit, kill_after=dice.uniform(0.0, 0.12))
        said, status = clients.run(limit)
        assert (said, status) == ("", 1)
        assert 0 < sum(out for _, out in judge.spent) <= limit


def test_killed_again_and_again_there_is_one_batch(tmp_path: Path) -> None:
    dice = random.Random(9)
    with JudgeStandIn(polls=25) as judge, Clients(judge, tmp_path / "scope") as clients:
        for _ in range(10):
            clients.run(1e6, batched=True, kill_after=dice.uniform(0.0, 0.15))
        said, _ = clients.run(1e6, batched=True)
        assert said == f"done {REQUESTS} 0\n"
        assert len(judge.batches) == 1
        assert set(judge.counts.values()) == {1}
