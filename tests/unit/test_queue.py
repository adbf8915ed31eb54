"""The queue protocol, one behaviour at a time. `test_queue_machine.py` has the whole of it at random."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoeval_hooks import keeper as keepers
from autoeval_hooks import queue as queues
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import QueueError, TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import Keeper
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.ticket import Ticket

MakeTicket = Callable[..., Ticket]


def other(queue: Queue, name: str = "other", ops: FileOps | None = None) -> Queue:
    return Queue(queue.root, runner=name, ops=ops)


def test_a_ticket_goes_its_way(queue: Queue, new_ticket: MakeTicket) -> None:
    ticket = new_ticket()
    assert queue.enqueue(ticket)
    token = queue.claim()
    assert token is not None
    assert (token.state, token.ticket, token.generation, token.runner) == ("claimed", ticket.id, 0, "me")
    assert queue.read(token) == ticket
    assert queue.complete(token)
    assert [(t.state, t.ticket) for t in queue.tokens()] == [("done", ticket.id)]


def test_enqueuing_again_is_a_no_op_in_every_state(queue: Queue, new_ticket: MakeTicket) -> None:
    ticket = new_ticket()
    assert queue.enqueue(ticket)
    for step in (queue.claim, lambda: queue.complete(next(queue.tokens("claimed")))):
        assert not queue.enqueue(ticket)
        step()
    assert not queue.enqueue(ticket)
    assert len(list(queue.tokens())) == 1
    assert os.listdir(os.path.join(queue.root, "tmp")) == []


def test_the_token_always_has_two_names(queue: Queue, new_ticket: MakeTicket) -> None:
    ticket = new_ticket()
    queue.enqueue(ticket)
    name = os.path.join(queue.root, "tickets", ticket.id)
    token = queue.claim()
    assert token is not None
    assert os.stat(name).st_nlink == 2
    queue.complete(token)
    assert os.stat(name).st_nlink == 2


def test_claims_go_by_priority_then_newest_or_oldest(queue: Queue, new_ticket: MakeTicket) -> None:
    made = [new_ticket(step, priority=priority) for step, priority in [(1, 5), (2, 5), (3, 9), (4, 0)]]
    for ticket in made:
        queue.enqueue(ticket)
    step_of = {t.id: t.manifest.step for t in made}
    newest, oldest = other(queue), other(queue)

    def order(by: Queue, newest_first: bool) -> list[int]:
        claimed = []
        while token := by.claim(newest_first=newest_first):
            claimed.append(token)
        for token in claimed:
            by.release(token, failed=False)
        return [step_of[t.ticket] for t in claimed]

    assert order(newest, True) == [3, 2, 1, 4]
    assert order(oldest, False) == [3, 1, 2, 4]


def test_a_ticket_that_came_after_a_listing_is_claimed_first(
    queue: Queue, new_ticket: MakeTicket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "LISTING_S", 0.0)
    for step in (1, 2):
        queue.enqueue(new_ticket(step))
    queue.claim()
    late = new_ticket(3)
    queue.enqueue(late)
    token = queue.claim()
    assert token is not None
    assert token.ticket == late.id


def test_each_ticket_is_claimed_once_by_many_runners(queue: Queue, new_ticket: MakeTicket) -> None:
    ids = set()
    for step in range(40):
        ticket = new_ticket(step)
        queue.enqueue(ticket)
        ids.add(ticket.id)
    barrier = threading.Barrier(8)

    def drain(name: str) -> list[str]:
        mine, got = other(queue, name), []
        barrier.wait()
        while token := mine.claim():
            got.append(token.ticket)
        return got

    with ThreadPoolExecutor(8) as pool:
        got = [t for claimed in pool.map(drain, [f"r{i}" for i in range(8)]) for t in claimed]
    assert sorted(got) == sorted(ids)


def test_the_same_ticket_submitted_at_once_is_one_token(queue: Queue, new_ticket: MakeTicket) -> None:
    ticket = new_ticket()
    barrier = threading.Barrier(8)

    def submit(_: int) -> bool:
        barrier.wait()
        return other(queue).enqueue(ticket)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(submit, range(8))) == [False] * 7 + [True]
    assert len(list(queue.tokens())) == 1


def test_a_runner_that_lost_its_claim_cannot_commit(queue: Queue, new_ticket: MakeTicket) -> None:
    queue.enqueue(new_ticket())
    zombie = queue.claim()
    assert zombie is not None
    assert other(queue).release(zombie, failed=True, max_failures=3) == "pending"
    successor = other(queue).claim()
    assert successor is not None
    assert (successor.generation, successor.failures) == (1, 1)
    assert not queue.complete(zombie)
    assert not queue.fail(zombie)
    assert queue.release(zombie, failed=False) == "lost"
    assert other(queue).complete(successor)
    assert len(list(queue.tokens())) == 1


def test_failures_are_bounded_and_giving_back_is_not_one(queue: Queue, new_ticket: MakeTicket) -> None:
    queue.enqueue(new_ticket())
    for _ in range(5):      # a runner that is told to stop uses up no attempt
        token = queue.claim()
        assert token is not None
        assert queue.release(token, failed=False, max_failures=2) == "pending"
    for became in ("pending", "failed"):
        token = queue.claim()
        assert token is not None
        assert queue.release(token, failed=True, max_failures=2) == became
    (failed,) = queue.tokens("failed")
    assert queue.retry(failed)
    token = queue.claim()
    assert token is not None
    assert token.failures == 0
    assert token.generation > failed.generation


def test_a_dead_runners_ticket_is_taken_back_and_a_live_ones_is_not(queue: Queue, new_ticket: MakeTicket) -> None:
    now = [0.0]
    for step in (1, 2):
        queue.enqueue(new_ticket(step))
    dead, live = other(queue, "dead"), other(queue, "live")
    held = {name: by.claim() for name, by in (("dead", dead), ("live", live))}
    hearts = {by.runner: by.start_heart() for by in (dead, live)}
    dead.beat(hearts["dead"], 1)
    keeper = Keeper(queue, lease=60, max_failures=3, clock=lambda: now[0])
    for beat in range(8):
        live.beat(hearts["live"], beat)
        reaped = keeper.sweep()
        assert (reaped == []) == (now[0] <= 60), now
        if reaped:
            break
        now[0] += 10.0
    assert reaped == [(held["dead"], "pending")]
    assert [t.runner for t in queue.tokens("claimed")] == ["live"]


def test_a_runner_without_any_heartbeat_is_dead_after_a_lease(queue: Queue, new_ticket: MakeTicket) -> None:
    now = [0.0]
    queue.enqueue(new_ticket())
    other(queue, "gone").claim()
    keeper = Keeper(queue, lease=60, max_failures=1, clock=lambda: now[0])
    assert keeper.sweep() == []
    now[0] = 61
    assert [became for _, became in keeper.sweep()] == ["failed"]


def test_housekeeping_is_left_to_one(queue: Queue, new_ticket: MakeTicket) -> None:
    now = [0.0]
    queue.enqueue(new_ticket())
    other(queue, "gone").claim()
    keeper = Keeper(queue, lease=60, max_failures=3, clock=lambda: now[0])
    keeper.sweep()
    now[0] = 61
    with keepers._alone(queue.root) as alone:
        assert alone
        assert keeper.sweep() == []
    assert len(keeper.sweep()) == 1


class CutOff(BaseException):
    """The process dies here: no handler of the program sees it."""


class DiesAt(FileOps):
    """Dies before the named call. (A BaseException stands in for SIGKILL.)"""

    def __init__(self, call: str) -> None:
        self.call = call

    def rename(self, src: str, dst: str) -> None:
        if self.call == "rename":
            raise CutOff
        super().rename(src, dst)


def test_a_submitter_that_died_between_its_two_names_is_finished_by_the_janitor(
    queue: Queue, new_ticket: MakeTicket
) -> None:
    ticket = new_ticket()
    with pytest.raises(CutOff):
        other(queue, ops=DiesAt("rename")).enqueue(ticket)
    assert list(queue.tokens()) == []
    assert not queue.enqueue(ticket)        # known, though not pending yet
    Keeper(queue, lease=60, max_failures=3).sweep()
    token = queue.claim()
    assert token is not None
    assert queue.read(token) == ticket


def test_the_janitor_removes_only_what_nobody_registered_for_long(queue: Queue) -> None:
    now = [0.0]
    orphan = Path(queue.root) / "tmp" / ("5-1-" + "a" * 64 + "~g0f0~host-1-abc")
    orphan.write_bytes(b"{}")
    half = Path(queue.root) / "tmp" / "result-x"
    half.mkdir()
    (half / "result.json").write_text("{")
    keeper = Keeper(queue, lease=60, max_failures=3, clock=lambda: now[0])
    keeper.sweep()
    now[0] = keepers.ORPHAN_S - 1
    keeper.sweep()
    assert orphan.exists()
    assert half.exists()
    now[0] = keepers.ORPHAN_S + 1
    keeper.sweep()
    assert os.listdir(half.parent) == []


class LostReply(FileOps):
    """An NFS server that does what it is asked and whose reply is lost: the client's repetition finds it done."""

    def rename(self, src: str, dst: str) -> None:
        super().rename(src, dst)
        raise FileNotFoundError(errno.ENOENT, "reply lost", src)

    def link(self, src: str, dst: str) -> None:
        super().link(src, dst)
        raise FileExistsError(errno.EEXIST, "reply lost", src)


def test_lost_replies_of_the_server_change_nothing(queue: Queue, new_ticket: MakeTicket) -> None:
    nfs = other(queue, "nfs", LostReply())
    ticket = new_ticket()
    assert nfs.enqueue(ticket)
    token = nfs.claim()
    assert token is not None
    assert nfs.release(token, failed=True) == "pending"
    token = nfs.claim()
    assert token is not None
    assert nfs.complete(token)
    assert [t.state for t in queue.tokens()] == ["done"]
    assert not nfs.enqueue(ticket)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_named(
    tmp_path: Path, new_ticket: MakeTicket, error: int
) -> None:
    class NoLinks(FileOps):
        def link(self, src: str, dst: str) -> None:
            raise OSError(error, os.strerror(error), src)

    bare = Queue(str(tmp_path / "q"), ops=NoLinks())
    with pytest.raises(QueueError, match=r"q: its file system has no hard links .* set `queue`"):
        bare.create()
    with pytest.raises(QueueError, match="no hard links"):
        bare.enqueue(new_ticket())
    assert os.listdir(tmp_path / "q" / "tmp") == []


def test_a_queue_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QueueError, match=r"file/q: cannot be written"):
        Queue(str(tmp_path / "file" / "q")).create()


def test_an_enqueue_that_failed_leaves_nothing_and_can_be_repeated(queue: Queue, new_ticket: MakeTicket) -> None:
    class Full(FileOps):
        def write(self, fd: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    ticket = new_ticket()
    with pytest.raises(OSError, match="No space"):
        other(queue, ops=Full()).enqueue(ticket)
    assert os.listdir(os.path.join(queue.root, "tmp")) == []
    assert queue.enqueue(ticket)


def test_a_link_that_was_done_and_reported_as_failed_is_found_by_the_janitor(
    queue: Queue, new_ticket: MakeTicket
) -> None:
    class Timeout(FileOps):
        def link(self, src: str, dst: str) -> None:
            super().link(src, dst)
            raise OSError(errno.ETIMEDOUT, "Connection timed out", src)

    ticket = new_ticket()
    with pytest.raises(OSError, match="timed out"):
        other(queue, ops=Timeout()).enqueue(ticket)
    assert not queue.enqueue(ticket)
    Keeper(queue, lease=60, max_failures=3).sweep()
    token = queue.claim()
    assert token is not None
    assert queue.read(token) == ticket


def test_what_a_stranger_left_in_tmp_stops_nothing(queue: Queue, new_ticket: MakeTicket, tmp_path: Path) -> None:
    tmp = Path(queue.root) / "tmp"
    (tmp / f"4-1-{'a' * 64}~g0f0~x").symlink_to(tmp_path)
    os.mkfifo(tmp / f"4-1-{'b' * 64}~g0f0~x")
    test_a_submitter_that_died_between_its_two_names_is_finished_by_the_janitor(queue, new_ticket)


def test_short_writes_are_completed(queue: Queue, new_ticket: MakeTicket) -> None:
    class Short(FileOps):
        def write(self, fd: int, data: bytes) -> int:
            return super().write(fd, data[:7])

    ticket = new_ticket()
    other(queue, ops=Short()).enqueue(ticket)
    token = queue.claim()
    assert token is not None
    assert queue.read(token) == ticket


# ---------------------------------------------------------------------- what others left in the directory


def plant(queue: Queue, content: bytes, ticket_id: str = "a" * 64) -> None:
    (Path(queue.root) / "pending" / f"4-1-{ticket_id}~g0f0").write_bytes(content)


def test_a_torn_ticket_goes_to_quarantine_with_its_reason(queue: Queue, new_ticket: MakeTicket) -> None:
    plant(queue, tickets.dump(new_ticket())[:-20])
    token = queue.claim()
    assert token is not None
    with pytest.raises(TicketError, match="not valid JSON") as refused:
        queue.read(token)
    assert queue.quarantine(token, str(refused.value))
    (put_aside,) = queue.tokens("quarantine")
    assert "not valid JSON" in queue.reason(put_aside)
    assert list(queue.tokens("pending", "claimed")) == []


def test_a_ticket_under_another_name_is_refused(queue: Queue, new_ticket: MakeTicket) -> None:
    plant(queue, tickets.dump(new_ticket()), "b" * 64)
    token = queue.claim()
    assert token is not None
    with pytest.raises(TicketError, match="holds ticket"):
        queue.read(token)


def test_links_pipes_and_directories_are_not_read(queue: Queue, new_ticket: MakeTicket, tmp_path: Path) -> None:
    ticket = new_ticket()
    (tmp_path / "elsewhere").write_bytes(tickets.dump(ticket))
    pending = Path(queue.root) / "pending"
    (pending / f"4-1-{ticket.id}~g0f0").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(pending / f"4-2-{'b' * 64}~g0f0")
    (pending / f"4-3-{'c' * 64}~g0f0").mkdir()
    for _ in range(3):
        token = queue.claim()
        assert token is not None
        with pytest.raises(TicketError):
            queue.read(token)
        queue.quarantine(token, "no")


def test_names_that_are_no_tokens_are_passed_over(queue: Queue) -> None:
    for name in (".nfs0001", "README", f"4-1-{'a' * 64}~g0f0~someone", f"4-1-{'A' * 64}~g0f0", "4-1-x~g0f0"):
        (Path(queue.root) / "pending" / name).write_bytes(b"")
    assert queue.claim() is None
    assert list(queue.tokens()) == []


def test_token_names_round_trip() -> None:
    token = Token("claimed", "4-12", "a" * 64, 3, 1, "host-1-abc")
    assert Token.parse("claimed", token.name) == token
    assert Token.parse("pending", token.name) is None
