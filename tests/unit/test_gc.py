"""`autoeval-runner gc`: it frees what no ticket needs, twice the same, and nothing else ever."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoeval_hooks import fsio, manifest, pin, submit
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from eval_runner import gc as collector
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Evaluation, Failure, Score
from eval_runner.results.schema import Result as Record

MakeCheckpoint = Callable[..., Path]
STATES = ("pending", "claimed", "done", "failed", "quarantine", "cancelled")
HOURS = 3600.0
DEAD = 2**31 - 1        # no process has this id
SUITES = "queue: queue\nsuites: {quick: {evaluators: [{type: helm}]}}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(SUITES)
    return path


@pytest.fixture
def gc(config: Path) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["gc", "--config", str(config), *arguments])

    return run


Gc = Callable[..., Result]


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def bring(queue: Queue, ticket_id: str, state: str) -> Token:
    """Take a pending ticket to a state; the token that it has then."""
    if state == "pending":
        return next(t for t in queue.tokens() if t.ticket == ticket_id)
    queue = Queue(queue.root, runner=queue.runner)      # which lists anew
    token = queue.claim(wanted=lambda t: t.ticket == ticket_id)
    assert token is not None
    if state == "done":
        assert queue.complete(token)
    elif state == "failed":
        assert queue.fail(token)
    elif state == "quarantine":
        assert queue.quarantine(token, "refused")
    elif state == "cancelled":
        assert queue.cancel(token, "not needed")
    return next(t for t in queue.tokens(state) if t.ticket == ticket_id)


def record(queue: Queue, ticket: Ticket, generation: int, runner: str, status: str = "ok") -> Path:
    """A result on disk, of whatever attempt."""
    outcome: dict[str, object] = {
        "ok": {"evaluations": (Evaluation("e", 1.0, (Score("b", "m", "test", 1.0, 1),)),)},
        "failed": {"failure": Failure("transient", "bad luck")},
    }[status]  # type: ignore[assignment]
    name = f"{ticket.id}~g{generation}~{runner}"
    result = Record(
        version=VERSION, ticket=ticket.id, generation=generation, runner=runner, status=status,  # type: ignore[arg-type]
        suite=ticket.suite, suite_digest=ticket.suite_digest, suite_text="", run=ticket.manifest.run,
        checkpoint=ticket.manifest.path, checkpoint_digest=ticket.manifest.digest, step=ticket.manifest.step,
        tokens=None, saved_at=0.0, started_at=0.0, finished_at=0.0, **outcome,  # type: ignore[arg-type]
    )  # fmt: skip
    return store.write(Path(queue.root), name, result, ())


def lines(result: Result) -> list[list[str]]:
    """The lines on stdout, but for the last, in fields."""
    return [line.split("\t") for line in result.stdout.splitlines()[:-1]]


@pytest.mark.parametrize("state", STATES)
def test_the_pin_of_an_ended_ticket_goes(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc, state: str
) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    path = queue.read(token).pin
    bring(queue, token.ticket, state)
    ended = state in ("done", "quarantine", "cancelled")
    dry = gc("--dry-run")
    assert [row[0] for row in lines(dry)] == ["would free"] * ended
    assert os.path.isdir(path)
    real = gc()
    assert [row[1:4:2] for row in lines(real)] == [["pin", path]] * ended
    assert lines(real) == [["freed", *row[1:]] for row in lines(dry)]
    assert os.path.isdir(path) != ended
    again = gc()
    assert (again.exit_code, again.stdout) == (0, "freed 0, 0 bytes\n")
    if state == "failed":
        assert len(lines(gc("--failed"))) == 1
        assert not os.path.exists(path)


def test_bytes_count_where_the_last_name_of_a_file_goes(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    large = b"w" * (manifest.WHOLE + 1)
    config.write_text("queue: queue\nsuites: {a: {evaluators: [{type: x}]}, b: {evaluators: [{type: y}]}}\n")
    paths = [checkpoint(step, large + str(step).encode()) for step in (1, 2)]
    for step, path in enumerate(paths, start=1):
        submit(path, step=step, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    for token in list(queue.tokens()):
        bring(queue, token.ticket, "done")
    shutil.rmtree(paths[0])         # of this one the pins of two suites are the last copies
    small = sum(os.path.getsize(paths[1] / name) for name in ("config.json", "tokenizer.json"))
    expected = 4 * small + len(large) + 1
    assert gc("--dry-run").stdout.splitlines()[-1] == f"would free 4, {expected} bytes"
    result = gc()
    assert result.stdout.splitlines()[-1] == f"freed 4, {expected} bytes"
    assert sum(int(row[2]) for row in lines(result)) == expected
    assert (paths[1] / "model.safetensors").stat().st_nlink == 1


def test_a_ticket_filed_again_keeps_its_predecessors_pin(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    old = queue.read(token)
    heir = tickets.new(old.manifest, "quick", "e" * 64, 5, old.pin)
    assert queue.enqueue(heir)
    bring(queue, old.id, "done")
    # Named as another host names it, which `path_map` does not tell.
    out, moved = Path(old.manifest.path).parent, tmp_path / "mounted"
    out.rename(moved)
    assert lines(gc(str(moved))) == []
    bring(queue, heir.id, "done")
    assert [row[1] for row in lines(gc(str(moved)))] == ["pin"]
    assert os.listdir(moved / ".autoeval" / "pins") == []


def test_pins_are_found_through_the_path_map(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    bring(queue, token.ticket, "done")
    (tmp_path / "out").rename(tmp_path / "mounted")
    assert lines(gc()) == []
    config.write_text(f"{SUITES}path_map: {{{tmp_path}/out: {tmp_path}/mounted}}\n")
    assert len(lines(gc())) == 1


@pytest.mark.parametrize(
    ("host", "pid", "seconds", "goes"),
    [
        ("", DEAD, HOURS, True),
        ("", DEAD, 60.0, False),                 # it may live in a container that has the host's name
        ("", os.getpid(), 30 * HOURS, False),    # it lives
        ("elsewhere", DEAD, 5 * HOURS, False),
        ("elsewhere", DEAD, 7 * HOURS, True),
    ],
)  # fmt: skip
def test_passing_pins_of_the_dead_go(
    checkpoint: MakeCheckpoint, config: Path, gc: Gc, host: str, pid: int, seconds: float, goes: bool
) -> None:
    path = checkpoint()
    submit(path, step=100, config=config)
    passing = path.parent / ".autoeval" / "pins" / f".new-{host or fsio.hostname()}-{pid}-abcdef12"
    passing.mkdir()
    (passing / "model.safetensors").write_bytes(b"12345")
    age(passing, seconds)
    assert [row[2:4] for row in lines(gc())] == ([["5", str(passing)]] if goes else [])
    assert passing.exists() != goes


def test_a_hand_over_that_is_tried_again_keeps_its_pin(checkpoint: MakeCheckpoint, config: Path, gc: Gc) -> None:
    path = checkpoint()
    submit(path, step=100, config=config)
    made = Path(pin.make(str(path), pin.pins_dir(str(path)), "auto"))
    passing = made.rename(made.with_name(".new-elsewhere-77-abcdef12"))
    age(passing, 100 * HOURS)
    pin.keep(str(passing))      # which `Handover.run` calls each time
    assert lines(gc()) == []
    assert passing.exists()


def test_pins_of_another_queue_are_listed_and_freed_on_demand_only(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    path = checkpoint()
    submit(path, step=100, config=config)
    (tmp_path / "queue").rename(tmp_path / "other")
    Queue(str(tmp_path / "queue")).create()
    (name,) = os.listdir(path.parent / ".autoeval" / "pins")
    theirs = path.parent / ".autoeval" / "pins" / name
    assert lines(gc()) == []            # no ticket leads there
    found = gc(str(path.parent))
    assert [(row[0], row[3]) for row in lines(found)] == [("kept", str(theirs))]
    assert "--orphans" in found.stderr
    gc("--orphans", str(path.parent))
    assert theirs.exists()              # so young, its ticket may be on its way
    age(theirs, 7 * HOURS)
    assert [row[0] for row in lines(gc("--orphans", "--dry-run", str(path.parent)))] == ["would free"]
    assert [row[0] for row in lines(gc("--orphans", str(path.parent)))] == ["freed"]
    assert not theirs.exists()


def test_in_the_queue_what_lost_goes_and_what_counts_stays(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    queue = Queue(str(tmp_path / "queue"), runner="r")
    for step, state in ((1, "done"), (2, "pending"), (3, "claimed"), (4, "failed"), (5, "cancelled")):
        submit(checkpoint(step, str(step).encode()), step=step, config=config)
        (token,) = [t for t in queue.tokens("pending") if queue.read(t).manifest.step == step]
        ticket = queue.read(token)
        for generation, runner, status in ((0, "r", "ok"), (0, "dead", "ok"), (1, "slow", "failed")):
            record(queue, ticket, generation, runner, status)
        bring(queue, ticket.id, state)
        left = Path(queue.root) / "partial" / ticket.id / "deep" / "er"
        left.mkdir(parents=True)
        (left / "scores").write_text("x" * 10)
    steps = {t.ticket: queue.ticket(t.ticket).manifest.step for t in queue.tokens()}
    (done,) = queue.tokens("done")
    elsewhere = shutil.copytree(Path(queue.root) / "results" / f"{done.ticket}~g0~dead", tmp_path / "elsewhere")
    (Path(queue.root) / "results" / f"{done.ticket}~g9~dead").symlink_to(elsewhere)
    result = gc()
    freed = {(row[1], steps[Path(row[3]).name[:64]], Path(row[3]).name[64:]) for row in lines(result)}
    assert freed == {
        ("pin", 1, ""), ("pin", 5, ""), ("partial", 1, ""), ("partial", 5, ""),
        ("result", 1, "~g0~dead"), ("result", 4, "~g0~dead"), ("result", 5, "~g0~dead"), ("result", 5, "~g0~r"),
    }  # fmt: skip
    assert {r.step for r in store.collect(Path(queue.root)).results} == {1}
    assert os.listdir(Path(queue.root) / "tmp") == []
    assert gc().stdout == "freed 0, 0 bytes\n"
    assert os.path.islink(Path(queue.root) / "results" / f"{done.ticket}~g9~dead")
    assert sorted(os.listdir(elsewhere)) == ["instances.jsonl.gz", "result.json"]
    gc("--failed")
    assert {steps[n] for n in os.listdir(Path(queue.root) / "partial")} == {2, 3}


def test_reasons_go_with_their_tokens(checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc) -> None:
    queue = Queue(str(tmp_path / "queue"), runner="r")
    submit(checkpoint(), step=100, config=config)
    (token,) = queue.tokens()
    cancelled = bring(queue, token.ticket, "cancelled")
    reason = Path(queue.root) / "cancelled" / f"reason-{cancelled.name}"
    age(reason, 2 * HOURS)
    gc()
    assert queue.reason(cancelled) == "not needed"
    assert queue.retry(cancelled)
    assert [row[1:4:2] for row in lines(gc())] == [["reason", str(reason)]]
    moving = Path(queue.root) / "quarantine" / f"reason-{cancelled.name}"      # written a moment before its token moves
    moving.write_text("torn")
    assert lines(gc()) == []


def test_what_is_retried_meanwhile_stays(checkpoint: MakeCheckpoint, config: Path, tmp_path: Path) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    path = queue.read(token).pin
    cancelled = bring(queue, token.ticket, "cancelled")
    (thing,) = collector.find(queue, {}).free
    assert queue.retry(cancelled)
    assert not collector.free(queue, thing)
    assert os.path.isdir(path)


def test_what_another_frees_meanwhile_is_no_problem(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a runner does that is at work."""
    queue, pins = Queue(str(tmp_path / "queue"), runner="r"), []
    for step in (100, 200):
        submit(checkpoint(step), step=step, config=config)
        (token,) = queue.tokens("pending")
        pins.append(queue.read(token).pin)
        bring(queue, token.ticket, "done")
    first, second = sorted(pins)

    def lstat(path: str) -> os.stat_result:
        if path == first:
            os.rename(path, tmp_path / "freed")
        return real(path)

    real = os.lstat
    monkeypatch.setattr(os, "lstat", lstat)
    result = gc()
    assert result.exit_code == 0, result.stderr
    assert [line[3] for line in lines(result)] == [second]


def test_a_live_ticket_that_cannot_be_read_keeps_every_pin(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    path = queue.read(token).pin
    bring(queue, token.ticket, "done")
    (tmp_path / "queue" / "tickets" / ("f" * 64)).write_text("torn")
    result = gc()
    assert result.exit_code == 1
    assert "its pins are left alone" in result.stderr
    assert os.path.isdir(path)


def test_what_lies_in_a_pin_and_is_not_ours_is_told_and_stays(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc
) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    path = Path(queue.read(token).pin)
    bring(queue, token.ticket, "done")
    (path / "notes").mkdir()
    before = sorted(os.listdir(path))
    result = gc()
    assert f"{path}/notes: a directory, which is none of ours, in a pin; move it away" in result.stderr
    assert sorted(os.listdir(path)) == before
    (path / "notes").rmdir()
    assert len(lines(gc())) == 1


@pytest.mark.parametrize(
    ("linked", "told"), [("pin", "a link in the place of a pin"), ("pins", "lies elsewhere, behind a link")]
)
def test_what_lies_behind_a_link_is_told_and_stays(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, gc: Gc, linked: str, told: str
) -> None:
    submit(checkpoint(), step=100, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="r")
    (token,) = queue.tokens()
    path = Path(queue.read(token).pin)
    bring(queue, token.ticket, "done")
    moved = path if linked == "pin" else path.parent
    elsewhere = moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(elsewhere)
    before = snapshot(elsewhere)
    for arguments in (["--dry-run"], [], ["--orphans"]):
        result = gc(*arguments)
        assert f"{moved}: {told}" in result.stderr
        assert lines(result) == []
    assert snapshot(elsewhere) == before
    assert moved.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/dev/null/out"], "/dev/null/out: not a directory"), (["--config", "/dev/null/a.yaml"], "/dev/null/a.yaml"),
        ([], "not there yet; no checkpoint was submitted so far"),
    ],
)
def test_mistakes_are_one_clear_line(config: Path, gc: Gc, arguments: list[str], says: str) -> None:
    result = gc(*arguments)
    assert result.exit_code
    assert says in f"{result.output} {result.exception}"


# ---------------------------------------------------------------------- any world

checkpoints = st.fixed_dictionaries({
    "state": st.sampled_from(STATES), "pinned": st.booleans(), "gone": st.booleans(),
    "heir": st.sampled_from((None, *STATES)),           # filed again under another suite, on the same pin
    "odd": st.sampled_from((None, "directory", "link", "file")),        # what somebody put into the pin
    "lost": st.booleans(), "partial": st.booleans(),
})  # fmt: skip
strays = st.lists(
    st.sampled_from(("dead", "alive", "elsewhere", "stranger", "notes", "link", "checkpoint-5", "partial", "result")),
    unique=True,
)


def snapshot(*roots: Path) -> dict[str, bytes | str]:
    """Every path below, with its content."""
    return {
        str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
        for root in roots for p in root.rglob("*")
    }  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=st.lists(checkpoints, min_size=1, max_size=5), stray=strays, failed=st.booleans(), orphans=st.booleans())
def test_whatever_stands_there_only_what_nobody_needs_goes(
    world: list[dict[str, object]], stray: list[str], failed: bool, orphans: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(os.path.realpath(directory))
        out, outside = root / "out", root / "outside"
        (outside / ("a" * 64)).mkdir(parents=True)
        (outside / ("a" * 64) / "precious").write_text("not ours")
        queue = Queue(str(root / "queue"), runner="r")
        queue.create()
        ended = {"done", "quarantine", "cancelled", *(["failed"] if failed else [])}
        needed, may_go, must_go = set[str](), set[str](), set[str]()
        for i, each in enumerate(world):
            path = out / f"checkpoint-{i}"
            path.mkdir(parents=True)
            (path / "model.safetensors").write_bytes(b"weights %d" % i)
            passing = pin.make(str(path), pin.pins_dir(str(path)), "auto")
            found = manifest.build(passing, path=str(path), step=i, run=RunIdentity("run"))
            first = tickets.new(found, "quick", "5" * 64, 5)
            held = pin.adopt(passing, first.id) if each["pinned"] else ""
            if not held:
                pin.release(passing)
            first = tickets.new(found, "quick", "5" * 64, 5, held)
            assert queue.enqueue(first)
            on_it = [each["state"]]
            if each["heir"]:
                heir = tickets.new(found, "quick", "e" * 64, 5, held)
                assert queue.enqueue(heir)
                bring(queue, heir.id, str(each["heir"]))
                on_it.append(each["heir"])
            if each["lost"]:
                lost = record(queue, first, 7, "loser")
                (may_go if each["state"] in (*ended, "failed") else needed).add(str(lost))
            if each["partial"]:
                left = root / "queue" / "partial" / first.id
                left.mkdir(parents=True)
                (left / "x").write_text("x")
                (may_go if each["state"] in ended else needed).add(str(left))
            bring(queue, first.id, str(each["state"]))
            if held:
                if each["odd"] == "directory":
                    (Path(held) / "mine").mkdir()
                elif each["odd"] == "link":
                    (Path(held) / "mine").symlink_to(outside)
                elif each["odd"] == "file":
                    (Path(held) / "mine").write_text("x")
                free = ended.issuperset(on_it) and each["odd"] != "directory"
                (must_go if free else needed).add(held)
            if each["gone"]:
                shutil.rmtree(path)
        pins = out / ".autoeval" / "pins"
        pins.mkdir(parents=True, exist_ok=True)
        for name in stray:
            at = {
                "dead": pins / f".new-{fsio.hostname()}-{DEAD}-abcdef12", "notes": pins / "notes",
                "alive": pins / f".new-{fsio.hostname()}-{os.getpid()}-abcdef12", "stranger": pins / ("b" * 64),
                "elsewhere": pins / ".new-elsewhere-1-abcdef12", "link": pins / ("a" * 64),
                "checkpoint-5": pins / "checkpoint-5", "partial": root / "queue" / "partial" / ("c" * 64),
                "result": root / "queue" / "results" / ("c" * 64 + "~g0~r"),
            }[name]  # fmt: skip
            if name in ("link", "result"):
                at.symlink_to(outside / ("a" * 64))
                continue
            at.mkdir(parents=True)
            (at / "model.safetensors").write_text("x")
            age(at, 7 * HOURS)
            goes = name in ("dead", "elsewhere") or (name == "stranger" and orphans)
            (must_go if goes else needed).add(str(at))
        before = snapshot(root)
        found_first = collector.find(queue, {}, [str(out)], failed=failed, orphans=orphans)
        for thing in found_first.free:
            with contextlib.suppress(CheckpointError):
                collector.free(queue, thing)
        after = snapshot(root)
        session = str(out / ".autoeval" / "session")
        gone = before.keys() - after.keys()
        assert all(any(g == m or g.startswith(m + "/") for m in must_go | may_go) for g in gone), gone
        assert after.keys() - before.keys() <= {session}
        assert all(after[p] == before[p] for p in before.keys() - gone)
        assert not any(os.path.exists(p) for p in must_go | may_go)
        assert all(os.path.exists(p) for p in needed)
        again = collector.find(queue, {}, [str(out)], failed=failed, orphans=orphans)
        assert {t.path for t in again.free} <= {p for p in needed if os.path.isdir(os.path.join(p, "mine"))}
