"""Scenarios: what may be cut off at any call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from autoeval_hooks import fsio, pin
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.handover import Handover, Save
from autoeval_hooks.queue import STATES
from tests.faults.world import RUN, SUITES, World
from tests.stand_ins import StandIn


@dataclass(frozen=True)
class Scenario:
    """`prepare` without faults, then `act` with them. `again`: whether the caller acts again after an error."""

    name: str
    prepare: Callable[[World], object]
    act: Callable[[World, FileOps], object]
    ends: frozenset[str] = frozenset({"done"})
    again: bool = True
    threads: bool = False
    """It runs several threads, so that only the first call of each kind is a point that is surely met."""
    meanwhile: Callable[[World], object] = lambda world: None
    """What happens before the queue is drained."""
    after: Callable[[World], object] = lambda world: None
    """Once the queue was drained: what happens then, before it is drained again."""


def _enqueue(world: World, ops: FileOps) -> None:
    world.queue(ops=ops).enqueue(world.tickets[0])
    world.acknowledged.add(world.tickets[0].id)


def _renew(world: World, ops: FileOps) -> None:
    queue = world.queue(fsio.unique(), ops)
    fd = queue.start_heart()
    queue.beat(fd, 1)
    os.unlink(world.root / "hb" / queue.runner)     # as housekeeping does while the runner is paused for long
    queue.beat(fd, 2)
    queue.stop_heart(fd)


def _complete(world: World, ops: FileOps) -> None:
    assert world.token is not None
    world.told["committed"] = world.queue("doomed", ops).complete(world.token)


def _put_back(state: str) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        token = world.claimed()
        if state == "failed":
            world.record(token, failed=True)
            world.queue("doomed").fail(token)
        elif state == "quarantine":
            world.queue("doomed").quarantine(token, "because")
        else:
            world.queue("user").cancel(token, "because")
        (world.token,) = world.queue().tokens(state)

    return prepare


def _reap_prepare(world: World) -> None:
    for step in (100, 200):
        world.queued(step)
    for name in ("dead", "gone"):
        queue = world.queue(name)
        assert queue.claim() is not None
        fd = queue.start_heart()
        queue.beat(fd, 1)
        os.close(fd)


def _janitor_prepare(world: World) -> None:
    """What the dead left: a ticket with its first name only and one that lost its second, files, a heartbeat."""
    for step in (100, 200):
        world.queued(step)
    half, lost = world.queue().tokens("pending")
    tmp = world.root / "tmp"
    os.rename(world.root / "pending" / half.name, tmp / f"{half.name}~{fsio.unique()}")
    os.unlink(world.root / "pending" / lost.name)
    world.lost.add(lost.ticket)
    (tmp / f"5-1-{'a' * 64}~g0f0~{fsio.unique()}").write_bytes(b"{")
    (tmp / "result-x").mkdir()
    (tmp / "result-x" / "result.json").write_text("{")
    (world.root / "hb" / "dead").write_text("1")


def _pin(world: World, ops: FileOps) -> None:
    source = world.out / "checkpoint-100"
    made = pin.make(str(source), pin.pins_dir(str(source)), "hardlink", ops)
    final = pin.adopt(made, "a" * 64, ops)
    pin.adopt(pin.make(str(source), pin.pins_dir(str(source)), "auto", ops), "a" * 64, ops)
    pin.release(final, ops)


def _handover(world: World, ops: FileOps) -> None:
    """As the hook does it: what failed is tried again by the same hand-over."""
    path = world.out / "checkpoint-100"
    if world.handover is None:
        save = Save(str(path), 100, RUN, 0.0)
        world.handover = Handover(world.hook_config, world.queue(ops=ops), save, SUITES)
    world.handover.queue.create()
    world.handover.run()
    world.acknowledged |= set(os.listdir(world.root / "tickets"))
    assert len(world.acknowledged) == len(SUITES)


def _submitted_again(world: World) -> None:
    """The trainer's retention took the checkpoint, and what was queued was evaluated; the training is resumed."""
    os.rename(world.base / "kept", world.out / "checkpoint-100")
    world.handover = None
    _handover(world, FileOps())
    _rotate(world)


def _rotate(world: World) -> None:
    """Retention deletes the checkpoint: it lives on in its pins."""
    os.rename(world.out / "checkpoint-100", world.base / "kept")


def _runner(evaluator: Callable[[], StandIn] = StandIn) -> Callable[[World, FileOps], None]:
    def act(world: World, ops: FileOps) -> None:
        world.runner("doomed", evaluator(), ops).run("once")

    return act


def _broken(world: World, ops: FileOps) -> None:
    world.runner("doomed", StandIn([CheckpointError("it is broken")]), ops).run("once")


def _torn(world: World) -> None:
    world.queued()
    (world.root / "tickets" / world.tickets[0].id).write_bytes(b"{")


def _pinned(world: World) -> None:
    world.checkpoint()
    _handover(world, FileOps())
    world.handover = None
    _rotate(world)


def _publish_prepare(world: World) -> None:
    token = world.claimed()
    world.record(token)
    world.queue("doomed").complete(token)
    for name in world.sinks("doomed"):
        (world.root / "published" / name).mkdir(parents=True)


QUARANTINED = frozenset({"done", "quarantine"})
SCENARIOS = (
    Scenario("create", lambda w: w.ticket(), lambda w, ops: w.queue(ops=ops).create(),
             after=lambda w: _enqueue(w, FileOps())),
    Scenario("enqueue", lambda w: (w.queue().create(), w.ticket()), _enqueue),
    Scenario("enqueue what is known", lambda w: w.queued(), _enqueue),
    Scenario("claim", lambda w: w.queued(), lambda w, ops: w.queue("doomed", ops).claim()),
    Scenario("renew", lambda w: w.queued(), _renew),
    Scenario("record", lambda w: w.claimed(), lambda w, ops: w.record(w.token, ops), again=False),  # type: ignore[arg-type]
    Scenario("complete", lambda w: w.record(w.claimed()), _complete),
    Scenario("fail", lambda w: w.record(w.claimed(), failed=True),
             lambda w, ops: w.queue("doomed", ops).fail(w.token), frozenset({"done", "failed"})),  # type: ignore[arg-type]
    Scenario("quarantine", lambda w: w.claimed(),
             lambda w, ops: w.queue("doomed", ops).quarantine(w.token, "because"), QUARANTINED),  # type: ignore[arg-type]
    Scenario("cancel what waits", lambda w: w.queued(),
             lambda w, ops: [w.queue("user", ops).cancel(t, "because") for t in w.queue().tokens("pending")],
             frozenset({"done", "cancelled"})),
    Scenario("cancel what runs", lambda w: w.claimed("live"),
             lambda w, ops: w.queue("user", ops).cancel(w.token, "because"),  # type: ignore[arg-type]
             frozenset({"done", "cancelled"})),
    Scenario("release", lambda w: w.claimed(),
             lambda w, ops: w.queue("doomed", ops).release(w.token, failed=True, max_failures=3)),  # type: ignore[arg-type]
    Scenario("release for the last time", lambda w: w.claimed(),
             lambda w, ops: w.queue("doomed", ops).release(w.token, failed=True, max_failures=1),  # type: ignore[arg-type]
             frozenset({"done", "failed"})),
    *(
        Scenario(f"retry what is {state}", _put_back(state),
                 lambda w, ops: w.queue("user", ops).retry(w.token), frozenset({"done", state}),  # type: ignore[arg-type]
                 after=lambda w: [w.queue().retry(t) for t in w.queue().tokens(*STATES[2:]) if t == w.token])
        for state in ("failed", "quarantine", "cancelled")
    ),
    Scenario("reap", _reap_prepare, lambda w, ops: w.sweep(long=False, ops=ops)),
    Scenario("janitor", _janitor_prepare, lambda w, ops: w.sweep(ops=ops)),
    Scenario("pin", lambda w: (w.queue().create(), w.checkpoint()), _pin),
    Scenario("hand-over", lambda w: w.checkpoint(), _handover, meanwhile=_rotate, after=_submitted_again),
    Scenario("publish", _publish_prepare, lambda w, ops: w.publisher(ops).look()),
    Scenario("runner", _pinned, _runner(), again=False, threads=True),
    Scenario("runner, broken checkpoint", lambda w: w.queued(), _broken, frozenset({"done", "failed"}), again=False,
             threads=True),
    Scenario("runner, torn ticket", _torn, _runner(), frozenset({"quarantine"}), again=False, threads=True),
    Scenario("runner, changed suite", lambda w: w.queued(digest="5" * 64), _runner(), again=False, threads=True),
)  # fmt: skip
