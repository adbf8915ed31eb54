"""What is given up for newer checkpoints: the right tickets, visibly, and the right directories."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import pin
from autoeval_hooks import ticket as tickets
from autoeval_hooks.config import load
from autoeval_hooks.handover import Handover, Save
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.retention import rotate, tidy_pins
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import status
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Failure, Result

MakeCheckpoint = Callable[..., Path]
SUITES = """queue: queue
suites:
  quick: {evaluators: [{type: helm}]}
  slow: {evaluators: [{type: helm, entries: [a]}]}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(SUITES)
    return path


@pytest.fixture
def hand_over(checkpoint: MakeCheckpoint, config: Path, queue: Queue) -> Callable[..., Path]:
    """Hand a checkpoint over as the hook does; `hook` lays over its section."""

    def go(step: int, *, suites: tuple[str, ...] = ("quick",), path: Path | None = None, **hook: object) -> Path:
        path = path or checkpoint(step, f"weights of {step}".encode())
        settings = load(config, hook=hook)
        Handover(settings, queue, Save(str(path), step, RunIdentity("run"), 0.0), suites).run()
        return path

    return go


HandOver = Callable[..., Path]


def bring(queue: Queue, step: int, state: str) -> None:
    """Take the pending ticket of `step` to `state`, by the calls that a runner makes."""
    token = Queue(queue.root, runner="me").claim(wanted=lambda t: queue.read(t).manifest.step == step)
    assert token is not None
    if state == "failed":
        t = queue.read(token)
        store.write(
            Path(queue.root), token.result_name,
            Result(
                version=VERSION, ticket=t.id, generation=token.generation, runner=token.runner, status="failed",
                suite=t.suite, suite_digest=t.suite_digest, suite_text="", run=t.manifest.run,
                checkpoint=t.manifest.path, checkpoint_digest=t.manifest.digest, step=step, tokens=None, saved_at=0.0,
                started_at=0.0, finished_at=0.0, failure=Failure("configuration", "no such benchmark"),
            ), (),
        )  # fmt: skip
    {
        "claimed": lambda: True, "done": lambda: queue.complete(token), "failed": lambda: queue.fail(token),
        "cancelled": lambda: queue.cancel(token, "by hand"), "quarantine": lambda: queue.quarantine(token, "bad"),
    }[state]()  # fmt: skip


def states(queue: Queue) -> dict[int, str]:
    return {queue.ticket(t.ticket).manifest.step: t.state for t in queue.tokens()}


@pytest.mark.parametrize(
    ("before", "step", "superseded", "pinned"),
    [
        ({100: "pending", 200: "pending"}, 300, 100, True),
        ({200: "pending", 100: "pending"}, 300, 100, True),         # by step, not by when they came
        ({100: "pending", 200: "failed"}, 300, 200, True),
        ({100: "failed", 200: "failed"}, 300, 100, True),
        ({100: "claimed", 200: "pending"}, 300, 200, True),
        ({100: "claimed", 200: "claimed"}, 300, None, False),
        ({300: "pending", 400: "failed"}, 200, None, False),        # never for an older one
        ({100: "done", 200: "pending"}, 300, None, True),           # a pin that was left behind makes room
        ({100: "cancelled", 200: "pending"}, 300, None, True),
        ({100: "pending", 200: "quarantine"}, 300, 100, True),
    ],
)  # fmt: skip
def test_the_oldest_that_waits_makes_room(
    hand_over: HandOver, queue: Queue, caplog: pytest.LogCaptureFixture,
    before: dict[int, str], step: int, superseded: int | None, pinned: bool,
) -> None:  # fmt: skip
    for waiting, state in before.items():
        out = hand_over(waiting, max_pins=2).parent
        if state != "pending":
            bring(queue, waiting, state)
    hand_over(step, max_pins=2)
    expected = {**before, step: "pending"} | ({superseded: "cancelled"} if superseded else {})
    assert states(queue) == expected
    found = {queue.ticket(t.ticket).manifest.step: queue.ticket(t.ticket) for t in queue.tokens()}
    assert bool(found[step].pin) == pinned
    for other, state in expected.items():
        lost = state in ("done", "cancelled")
        assert os.path.isdir(found[other].pin) == (not lost if other != step else pinned)
    assert len(os.listdir(out / ".autoeval" / "pins")) == 2
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == (superseded is not None or not pinned)
    if superseded:
        assert f"suite quick of step {superseded} will not be evaluated: superseded by step {step}" in told[0]
        why = {t.step: t.why for t in status.read(Path(queue.root)).tickets}[superseded]
        held = f"superseded by step {step}: {out}/.autoeval/pins held hook.max_pins = 2 pins"
        assert why == held + ("; it had failed: no such benchmark" if before[superseded] == "failed" else "")
    elif not pinned:
        assert f"checkpoint-{step} is not pinned" in told[0]
        assert "holds hook.max_pins = 2 pins already" in told[0]


def test_nobody_is_superseded_unless_that_makes_room(hand_over: HandOver, queue: Queue) -> None:
    for step in (100, 200, 300):
        hand_over(step)
        if step < 300:
            bring(queue, step, "claimed")
    hand_over(400, max_pins=2)      # which was lowered: two pins of three are claimed
    assert states(queue) == {100: "claimed", 200: "claimed", 300: "pending", 400: "pending"}


def test_a_runner_that_is_faster_keeps_its_ticket(
    hand_over: HandOver, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over(100, max_pins=2)
    hand_over(200, max_pins=2)
    cancel, other = Queue.cancel, Queue(queue.root, runner="other")

    def late(self: Queue, token: Token, reason: str) -> bool:
        if not list(queue.tokens("claimed")):
            assert other.claim(newest_first=False) is not None
        return cancel(self, token, reason)

    monkeypatch.setattr(Queue, "cancel", late)
    hand_over(300, max_pins=2)
    assert states(queue) == {100: "claimed", 200: "cancelled", 300: "pending"}
    (claimed,) = queue.tokens("claimed")
    assert os.path.isdir(queue.read(claimed).pin)


def test_a_checkpoint_that_is_known_supersedes_nobody(
    hand_over: HandOver, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    hand_over(100, max_pins=2)
    path = hand_over(200, max_pins=2)
    hand_over(200, path=path, max_pins=2)
    assert states(queue) == {100: "pending", 200: "pending"}
    assert caplog.records == []


def test_a_checkpoint_that_is_known_supersedes_nobody_beyond_the_cap_either(hand_over: HandOver, queue: Queue) -> None:
    paths = {step: hand_over(step) for step in (100, 200, 300)}
    for step, path in paths.items():        # as a resumed training does, whose cap was lowered
        hand_over(step, path=path, max_pins=2)
    assert states(queue) == {100: "pending", 200: "pending", 300: "pending"}


def test_each_suite_of_a_checkpoint_gets_its_room(hand_over: HandOver, queue: Queue) -> None:
    for step in (100, 200):
        hand_over(step, suites=("quick", "slow"), max_pins=4)
    hand_over(300, suites=("quick", "slow"), max_pins=4)
    assert {(queue.ticket(t.ticket).manifest.step, t.state) for t in queue.tokens()} == {
        (100, "cancelled"), (200, "pending"), (300, "pending"),
    }  # fmt: skip
    pins = {queue.read(t).pin for t in queue.tokens("pending")}
    assert len(pins) == 4
    assert all(os.path.isdir(p) for p in pins)


def test_a_cap_below_the_number_of_suites_still_pins(hand_over: HandOver, queue: Queue) -> None:
    for step in (100, 200):
        hand_over(step, suites=("quick", "slow"), max_pins=1)
    assert all(os.path.isdir(queue.read(t).pin) for t in queue.tokens("pending"))
    assert states(queue) == {100: "cancelled", 200: "pending"}


def test_a_pin_goes_once_nobody_lives_on_it(hand_over: HandOver, queue: Queue) -> None:
    """Filed again under a changed suite: the old ticket is done, its successor lives on its pin."""
    hand_over(100, max_pins=2)
    (token,) = queue.tokens("pending")
    old = queue.read(token)
    heir = tickets.new(old.manifest, "quick", "e" * 64, 5, old.pin)
    assert queue.enqueue(heir)
    bring_done = queue.claim(wanted=lambda t: t.ticket == old.id)
    assert bring_done is not None
    assert queue.complete(bring_done)
    hand_over(200, max_pins=2)
    tidy_pins(queue, str(Path(old.pin).parents[2]))
    assert os.path.isdir(old.pin)
    hand_over(300, max_pins=2)
    assert not os.path.exists(old.pin)
    assert [t.ticket for t in queue.tokens("cancelled")] == [heir.id]


def test_another_directory_is_left_alone(hand_over: HandOver, checkpoint: MakeCheckpoint, queue: Queue) -> None:
    other = checkpoint(1, name="../other/checkpoint-1")
    hand_over(1, path=Path(os.path.normpath(other)), max_pins=1)
    hand_over(100, max_pins=1)
    hand_over(200, max_pins=1)
    assert states(queue) == {1: "pending", 100: "cancelled", 200: "pending"}
    assert all(queue.read(t).pin for t in queue.tokens("pending"))


@pytest.mark.parametrize("states_of_100", ["pending", "done"])
def test_a_ticket_that_cannot_be_read_stops_both(
    hand_over: HandOver, queue: Queue, caplog: pytest.LogCaptureFixture, states_of_100: str
) -> None:
    """It may live on any of the pins."""
    hand_over(100, max_pins=1)
    if states_of_100 == "done":
        bring(queue, 100, "done")
    token = Token("pending", "4-1", "f" * 64, 0, 0)
    (Path(queue.root) / "tickets" / token.ticket).write_text("torn")
    os.link(Path(queue.root) / "tickets" / token.ticket, Path(queue.root) / "pending" / token.name)
    path = hand_over(200, max_pins=1)
    assert len(os.listdir(path.parent / ".autoeval" / "pins")) == 1
    assert not list(queue.tokens("cancelled"))
    assert any("tickets/ffff" in r.getMessage() for r in caplog.records)


# ---------------------------------------------------------------------- rotation


@pytest.fixture
def trained(checkpoint: MakeCheckpoint) -> Callable[..., Path]:
    """An output directory with checkpoints of these steps, written one second after the other."""

    def make(*steps: int) -> Path:
        for i, step in enumerate(steps):
            path = checkpoint(step, f"weights of {step}".encode())
            at = time.time() - 1000 + i
            os.utime(path / "trainer_state.json", (at, at))
        return path.parent

    return make


def left(out: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("steps", "keep", "spared", "stay"),
    [
        ((100, 200, 300), 1, (), [300]),
        ((100, 200, 300), 2, (), [200, 300]),
        ((100, 200, 300), 3, (), [100, 200, 300]),
        ((100, 200, 300), 1, ("checkpoint-100",), [100, 300]),
        ((900, 1000), 1, (), [1000]),
        ((300, 100), 1, (), [100]),     # the newest is the one that was written last
    ],
)
def test_checkpoints_beyond_the_newest_go(
    trained: Callable[..., Path], queue: Queue, steps: tuple[int, ...], keep: int, spared: tuple[str, ...],
    stay: list[int],
) -> None:  # fmt: skip
    out = trained(*steps)
    rotate(queue, str(out), keep, since_ns=0, spared=spared)
    assert left(out) == stay


@pytest.mark.parametrize("state", ["pending", "claimed", "failed", "done", "cancelled", "quarantine"])
@pytest.mark.parametrize("kept_by", ["none", "pin", "lost pin"])
def test_a_checkpoint_that_a_ticket_waits_for_stays(
    trained: Callable[..., Path], hand_over: HandOver, queue: Queue, state: str, kept_by: str
) -> None:
    out = trained(100, 200)
    hand_over(100, path=out / "checkpoint-100", pin="none" if kept_by == "none" else "auto")
    if state != "pending":
        bring(queue, 100, state)
    if kept_by == "lost pin":
        (token,) = queue.tokens()
        pin.release(queue.ticket(token.ticket).pin)
    rotate(queue, str(out), 1, since_ns=0, spared=())
    waits = state in ("pending", "claimed", "failed") and kept_by != "pin"
    assert left(out) == ([100, 200] if waits else [200])


def test_what_is_no_checkpoint_of_this_training_stays(trained: Callable[..., Path], queue: Queue) -> None:
    out = trained(1, 2, 3, 4)
    (out / "checkpoint-1" / "trainer_state.json").unlink()                  # half of one
    elsewhere = out.parent / "elsewhere"
    (out / "checkpoint-2").rename(elsewhere)
    (out / "checkpoint-2").symlink_to(elsewhere)
    for name in ("checkpoint-9.pinned", "checkpoint--5", "checkpoint-best", "my-checkpoint-7"):
        (out / name).mkdir()
        (out / name / "trainer_state.json").write_text("{}")
    (out / "checkpoint-77").write_text("a file")
    before = {str(p) for p in out.rglob("*")}
    since = os.stat(out / "checkpoint-4" / "trainer_state.json").st_mtime_ns
    assert rotate(queue, str(out), 1, since_ns=since, spared=()) == []
    assert {str(p) for p in out.rglob("*")} == before
    assert rotate(queue, str(out), 1, since_ns=0, spared=()) == ["checkpoint-3"]
    assert (elsewhere / "model.safetensors").exists()


def test_rotation_rests_while_a_ticket_cannot_be_read(trained: Callable[..., Path], queue: Queue) -> None:
    out = trained(1, 2)
    (Path(queue.root) / "tickets" / ("f" * 64)).write_text("torn")
    with pytest.raises(tickets.TicketError):
        rotate(queue, str(out), 1, since_ns=0, spared=())
    assert left(out) == [1, 2]
