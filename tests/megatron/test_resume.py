"""A training that is stopped by a signal, and the one that goes on from an earlier checkpoint of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket
from tests.megatron.conftest import BATCH, WANDB, Place, losses, of_ours

pytestmark = pytest.mark.megatron
Make = Callable[..., Place]
FLAGS = (
    "--save-interval", "4", "--load", "save", "--exit-signal-handler", "--override-opt-param-scheduler", *WANDB,
    "--autoeval-config", "autoeval.yaml",
)  # fmt: skip


def stopped(at: Place) -> tuple[str, int]:
    """Train until there is a checkpoint of step 8 and a little longer, then ask for the end. What was printed, and the
    step of the last save."""
    output = at.path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            at.command(*FLAGS, "--train-iters", "5000"), cwd=at.path, env=at.environment(TINY_PAUSE_S="0.05"),
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while "iteration        9/" not in output.read_text():
            assert process.poll() is None, output.read_text()[-2500:]
            assert time.monotonic() < end, output.read_text()[-2500:]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, output.read_text()[-2500:]
    finally:
        process.kill()
        process.wait()
    return output.read_text(), int((at.save / "latest_checkpointed_iteration.txt").read_text())


def by_step(at: Place) -> dict[int, list[Ticket]]:
    """The tickets of the suite `quick`, a step's in the order of their saves."""
    queue = Queue(str(at.queue))
    found = [queue.read(token) for token in queue.tokens("pending")]
    out: dict[int, list[Ticket]] = {}
    for ticket in sorted(found, key=lambda t: t.manifest.saved_at):
        if ticket.suite == "quick":
            out.setdefault(ticket.manifest.step, []).append(ticket)
    return out


def forget(at: Place, ticket: Ticket) -> None:
    """As if training had died before it handed this checkpoint over."""
    (token,) = [p for p in (at.queue / "pending").iterdir() if ticket.id in p.name]
    token.unlink()
    (at.queue / "tickets" / ticket.id).unlink()
    shutil.rmtree(ticket.pin)


def test_a_signal_a_resume_and_an_iteration_that_is_saved_again(place: Make) -> None:
    at = place("stopped", "queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\n")
    output, last = stopped(at)
    before = by_step(at)
    assert last >= 9
    assert sorted(before) == sorted({*range(4, last, 4), last})
    assert all(len(tickets) == 1 for tickets in before.values())
    assert before[last][0].manifest.samples == BATCH * last
    assert of_ours(output) == []

    forget(at, before[4][0])
    cut_off = at.save / "iter_0000003"      # no last file: a save that was cut off
    shutil.copytree(at.save / "iter_0000004", cut_off)
    os.unlink(cut_off / "metadata.json")
    output = at.train(*FLAGS, "--ckpt-step", "4", "--train-iters", "8")
    assert sorted(losses(output)) == [5, 6, 7, 8]
    after = by_step(at)
    assert sorted(after) == sorted(before)
    assert after[4][0].manifest.digest == before[4][0].manifest.digest
    assert after[4][0].manifest.samples == BATCH * 4
    assert [t.id for t in after[8]][:1] == [before[8][0].id]
    assert {step: len(tickets) for step, tickets in after.items() if step != 8} == dict.fromkeys({*before} - {8}, 1)
    runs = {t.manifest.run.id for tickets in after.values() for t in tickets}
    assert runs == {Path(at.save / ".autoeval" / "run_id").read_text()}
    (said,) = of_ours(output)
    assert "given up" in said
    assert "iter_0000003: has no metadata.json" in said
    assert len(after[8]) == 2       # other files, so another checkpoint
