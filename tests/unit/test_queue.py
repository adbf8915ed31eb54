"""The queue protocol, one behaviour at a time. `test_queue_machine.py` has the whole of it at random."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoeval_hooks import fsio
from autoeval_hooks import keeper as keepers
from autoeval_hooks import queue as queues
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import QueueError, TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.keeper import Keeper
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.ticket import Ticket
from tests.power_cut import PowerCut

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


def test_a_housekeeper_that_stands_still_keeps_nobody_from_it_for_longer_than_a_lease(
    queue: Queue, new_ticket: MakeTicket
) -> None:
    now = [0.0]
    queue.enqueue(new_ticket())
    other(queue, "gone").claim()
    keeper = Keeper(queue, lease=60, max_failures=3, clock=lambda: now[0])
    keeper.sweep()
    with keepers._alone(queue.root):
        for now[0], reaped in ((61.0, 0), (120.0, 0), (122.0, 1)):
            assert len(keeper.sweep()) == reaped, now


def test_a_pause_in_the_middle_of_a_look_makes_nobody_dead(queue: Queue, new_ticket: MakeTicket) -> None:
    """The observer stands still for longer than a lease before it reads a heartbeat, or after."""
    now, pause = [0.0], {"before": 0.0, "after": 0.0}

    class Slow(FileOps):
        def read(self, path: str, limit: int, owners: frozenset[int] | None = None) -> bytes:
            now[0] += pause["before"]
            found = super().read(path, limit, owners)
            now[0] += pause["after"]
            return found

    live = other(queue, "live")
    queue.enqueue(new_ticket())
    live.claim()
    heart = live.start_heart()
    live.beat(heart, 1)
    keeper = Keeper(other(queue, "keeper", Slow()), lease=60, max_failures=3, clock=lambda: now[0])
    pause["before"] = 100.0
    assert keeper.sweep() == []         # the first sight is a late one
    pause["before"], pause["after"] = 0.0, 100.0
    now[0] += 10.0
    assert keeper.sweep() == []         # what was read is old by the time that it is judged
    live.beat(heart, 2)
    pause["after"] = 0.0
    now[0] += 10.0
    assert keeper.sweep() == []
    now[0] += 61.0
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


def test_what_gc_did_not_finish_is_removed_with_all_in_it(queue: Queue, tmp_path: Path) -> None:
    inner = Path(queue.root, "tmp", "gc-partial~x", "0-part", "deeper")
    inner.mkdir(parents=True)
    (inner / "result.json").touch()
    kept = tmp_path / "elsewhere" / "file"
    kept.parent.mkdir()
    kept.touch()
    (inner / "link").symlink_to(kept.parent)
    now = [0.0]
    keeper = Keeper(queue, lease=60, max_failures=3, clock=lambda: now[0])
    keeper.sweep()
    now[0] = keepers.ORPHAN_S + 1
    keeper.sweep()
    assert os.listdir(os.path.join(queue.root, "tmp")) == []
    assert kept.exists()


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


def test_the_janitor_follows_no_link(queue: Queue, tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("")
    (Path(queue.root) / "tmp" / "result-x").symlink_to(tmp_path / "elsewhere")
    keeper = Keeper(queue, lease=60, max_failures=3, clock=lambda: now[0])
    keeper.sweep()
    now[0] = keepers.ORPHAN_S + 1
    keeper.sweep()
    assert os.listdir(Path(queue.root) / "tmp") == []
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_heartbeats_of_the_dead_are_removed_and_one_that_was_paused_beats_anew(
    queue: Queue, new_ticket: MakeTicket
) -> None:
    now = [0.0]
    hearts = Path(queue.root) / "hb"
    queue.enqueue(new_ticket())
    paused, live, holder = (other(queue, name) for name in ("paused", "live", "holder"))
    fds = {by.runner: by.start_heart() for by in (paused, live, holder)}
    other(queue, "dead").start_heart()
    assert holder.claim() is not None
    keeper = Keeper(queue, lease=10 * keepers.ORPHAN_S, max_failures=3, clock=lambda: now[0])
    live.beat(fds["live"], 1)
    keeper.sweep()
    now[0] = keepers.ORPHAN_S + 1
    keeper.sweep()
    assert len(os.listdir(hearts)) == 4     # within the lease
    now[0] = 10 * keepers.ORPHAN_S + 1
    live.beat(fds["live"], 2)
    holder.beat(fds["holder"], 2)
    keeper.sweep()
    assert sorted(n for n in os.listdir(hearts) if not n.startswith(".nfs")) == ["holder", "live"]
    paused.beat(fds["paused"], 7)
    assert (hearts / "paused").read_bytes() == b"%020d" % 7
    paused.beat(fds["paused"], 8)
    assert queue.heartbeat("paused") == b"%020d" % 8
    assert not os.get_inheritable(fds["paused"])
    paused.stop_heart(fds["paused"])
    assert sorted(n for n in os.listdir(hearts) if not n.startswith(".nfs")) == ["holder", "live"]


def test_a_heartbeat_that_another_host_removed_is_made_anew(queue: Queue) -> None:
    class Nfs(FileOps):
        def stands_at(self, fd: int, path: str) -> bool:
            if not super().stands_at(fd, path):
                raise OSError(errno.ESTALE, "Stale file handle")
            return True

    me = other(queue, "me", Nfs())
    fd = me.start_heart()
    os.unlink(os.path.join(queue.root, "hb", "me"))
    me.beat(fd, 3)
    assert queue.heartbeat("me") == b"%020d" % 3


def test_a_removed_heartbeat_that_nfs_keeps_while_it_is_open_is_made_anew(queue: Queue) -> None:
    me = other(queue, "me")
    fd = me.start_heart()
    hearts = Path(queue.root) / "hb"
    (hearts / "me").rename(hearts / ".nfs0001")     # what an NFS client makes of removing it on the same host
    me.beat(fd, 3)
    assert queue.heartbeat("me") == b"%020d" % 3


def test_a_removed_heartbeat_whose_name_another_runner_took_is_not_taken_back(queue: Queue) -> None:
    me, twin = other(queue, "same"), other(queue, "same")
    fd = me.start_heart()
    os.unlink(os.path.join(queue.root, "hb", "same"))
    twin.beat(twin.start_heart(), 5)
    with pytest.raises(FileExistsError):
        me.beat(fd, 1)
    assert queue.heartbeat("same") == b"%020d" % 5


def test_a_ticket_that_lost_its_token_comes_back_once(queue: Queue, new_ticket: MakeTicket) -> None:
    now = [0.0]
    lost, other_ticket = new_ticket(1), new_ticket(2)
    for ticket in (lost, other_ticket):
        queue.enqueue(ticket)
    os.mkdir(os.path.join(queue.root, "results", f"{lost.id}~g4~someone"))
    (token,) = (t for t in queue.tokens("pending") if t.ticket == lost.id)
    os.unlink(os.path.join(queue.root, "pending", token.name))
    two = [Keeper(other(queue, n), lease=60, max_failures=3, clock=lambda: now[0]) for n in ("k1", "k2")]
    for _ in range(4):
        for keeper in two:
            keeper.sweep()
        now[0] += keepers.ORPHAN_S + 1
    found = {t.ticket: t for t in queue.tokens()}
    assert found.keys() == {lost.id, other_ticket.id}
    assert len(list(queue.tokens())) == 2
    assert (found[lost.id].state, found[lost.id].generation) == ("pending", 5)
    assert queue.read(found[lost.id]) == lost
    assert os.stat(os.path.join(queue.root, "tickets", lost.id)).st_nlink == 2


def test_a_token_that_a_listing_missed_is_not_given_a_second_one(queue: Queue, new_ticket: MakeTicket) -> None:
    """It moved from one state to the next while the keeper listed them."""
    now = [0.0]
    queue.enqueue(new_ticket())

    class Missing(FileOps):
        def listdir(self, path: str) -> list[str]:
            return [] if path.endswith("pending") else super().listdir(path)

    keeper = Keeper(other(queue, "keeper", Missing()), lease=60, max_failures=3, clock=lambda: now[0])
    for _ in range(4):
        keeper.sweep()
        now[0] += keepers.ORPHAN_S + 1
    assert len(list(queue.tokens())) == 1
    assert os.listdir(os.path.join(queue.root, "tmp")) == []


class LostReply(FileOps):
    """An NFS server that does what it is asked and whose reply is lost: the client's repetition finds it done."""

    def rename(self, src: str, dst: str) -> None:
        super().rename(src, dst)
        raise FileNotFoundError(errno.ENOENT, "reply lost", src)

    def link(self, src: str, dst: str) -> None:
        super().link(src, dst)
        raise FileExistsError(errno.EEXIST, "reply lost", src)

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        raise FileExistsError(errno.EEXIST, "reply lost", path)

    def unlink(self, path: str) -> None:
        super().unlink(path)
        raise FileNotFoundError(errno.ENOENT, "reply lost", path)


def test_lost_replies_of_the_server_change_nothing(tmp_path: Path, new_ticket: MakeTicket) -> None:
    queue = Queue(str(tmp_path / "new" / "queue"))
    nfs = other(queue, "nfs", LostReply())
    nfs.create()
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
    heart = nfs.start_heart()
    nfs.beat(heart, 1)
    nfs.stop_heart(heart)
    (done,) = queue.tokens()
    assert nfs.retry(done)
    assert nfs.cancel(next(queue.tokens("pending")), "because")
    (cancelled,) = queue.tokens()
    assert queue.reason(cancelled) == "because"
    assert os.listdir(os.path.join(queue.root, "tmp")) == []


def test_what_was_promised_survives_a_power_cut(queue: Queue, new_ticket: MakeTicket) -> None:
    ops = PowerCut()
    me = other(queue, "me", ops)

    def safe() -> None:
        assert [p for p in ops.names_at_risk if "/claimed/" not in p] == []

    me.enqueue(new_ticket(1))
    safe()
    for end in (
        lambda t: me.release(t, failed=True),
        lambda t: me.release(t, failed=True, max_failures=1),
        lambda t: me.quarantine(t, "because"),
        lambda t: me.cancel(t, "because"),
        me.fail,
        me.complete,
    ):
        token = me.claim()
        assert token is not None
        assert end(token)
        safe()
        for ended in queue.tokens("failed", "quarantine", "cancelled", "done"):
            assert me.retry(ended)
            safe()


def test_who_is_told_that_a_ticket_is_known_can_rely_on_it(queue: Queue, new_ticket: MakeTicket) -> None:
    """Its submitter died, or was told of an error, before it could make the ticket's name durable."""

    class Unsafe(PowerCut):
        def sync_dir(self, path: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

    ticket = new_ticket()
    with pytest.raises(OSError, match="Input/output"):
        other(queue, ops=Unsafe()).enqueue(ticket)
    synced: list[str] = []

    class Watched(FileOps):
        def sync_dir(self, path: str) -> None:
            synced.append(os.path.basename(path))

    watched = other(queue, ops=Watched())
    for ask in (lambda: not watched.enqueue(ticket), lambda: watched.known(ticket.id)):
        synced.clear()
        assert ask()
        assert "tickets" in synced


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


def test_a_replaced_file_whose_reply_is_lost_is_replaced(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        fsio.replace(str(tmp_path / "file"), content, LostReply())
        assert (tmp_path / "file").read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]

    class Missing(FileOps):
        def rename(self, src: str, dst: str) -> None:
            raise FileNotFoundError(errno.ENOENT, "not done", src)

    with pytest.raises(FileNotFoundError):
        fsio.replace(str(tmp_path / "file"), b"three", Missing())
    assert (tmp_path / "file").read_bytes() == b"two"


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


def test_a_reason_that_was_begun_is_written_anew(queue: Queue, new_ticket: MakeTicket) -> None:
    queue.enqueue(new_ticket())
    token = queue.claim()
    assert token is not None
    (Path(queue.root) / "quarantine" / f"reason-{token.name}").write_text("beca")
    assert queue.quarantine(token, "because")
    (aside,) = queue.tokens("quarantine")
    assert queue.reason(aside) == "because"


def test_names_that_are_no_tokens_are_passed_over(queue: Queue) -> None:
    for name in (".nfs0001", "README", f"4-1-{'a' * 64}~g0f0~someone", f"4-1-{'A' * 64}~g0f0", "4-1-x~g0f0"):
        (Path(queue.root) / "pending" / name).write_bytes(b"")
    assert queue.claim() is None
    assert list(queue.tokens()) == []


def test_token_names_round_trip() -> None:
    token = Token("claimed", "4-12", "a" * 64, 3, 1, "host-1-abc")
    assert Token.parse("claimed", token.name) == token
    assert Token.parse("pending", token.name) is None
