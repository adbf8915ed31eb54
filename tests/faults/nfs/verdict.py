"""What the storm left, held against what its processes saw: read on the server's disk, once all of them are gone."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from autoeval_hooks import handover, keeper
from autoeval_hooks import relay_files as relay
from autoeval_hooks.keeper import Keeper
from autoeval_hooks.queue import STATES, Queue, Token
from eval_runner.results import store
from eval_runner.sinks.base import point
from tests.faults.nfs import roles
from tests.faults.nfs.roles import World


@dataclass
class Verdict:
    figures: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def judge(world: World, *, drained: bool, say: Callable[[str], None]) -> Verdict:
    """Tidy up as the product does, then look at everything."""
    for host in world.mounts:
        _in_child(world, host)
        say(f"  host {host} is tidy")
    found = Verdict()
    queue = Queue(str(world.truth / "queue"), runner="judge")
    tokens = list(queue.tokens())
    by_id: dict[str, list[Token]] = defaultdict(list)
    for token in tokens:
        by_id[token.ticket].append(token)
    if not drained:
        found.problems.append("it did not drain: a ticket or a process was still at work when time was up")
    for rule in (_tickets, _states, _commits, _leases, _points, _pins, _leftovers, _processes):
        problems = list(rule(world, queue, by_id, found.figures))
        say(f"  looked at its {rule.__name__.strip('_')}: {len(problems)} problems")
        found.problems += problems[:10]
        if len(problems) > 10:
            found.problems.append(f"… and {len(problems) - 10} more of the kind")
    return found


def history(world: World, problems: list[str]) -> list[str]:
    """All that was seen of the first ticket that is named in `problems`, in the order in which it happened."""
    named = next((m[1] for p in problems if (m := re.search(r"ticket ([0-9a-f]{12})", p))), None)
    lines = [line for line in roles.seen(world) if named and any(w.startswith(named) for w in line.words)]
    lines.sort(key=lambda line: line.at)
    return [f"{line.at:9.3f} {line.by} {line.what} {' '.join(line.words)}" for line in lines]


def table(found: Verdict, counts: Counter[str], version: str, seed: int, seconds: float) -> str:
    lines = {**found.figures, **counts, "seconds": round(seconds)}
    rows = "\n".join(f"  {what:<42}{n:>7}" for what, n in lines.items())
    return f"storm on NFS {version}, seed {seed}: {'BROKEN' if found.problems else 'ok'}\n{rows}"


def _in_child(world: World, host: str) -> None:
    """What `gc` and the next training do: sweep, and free the pins that no ticket needs. On each host, since only it
    knows which of its processes are gone."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            roles.become(host)
            keeper.ORPHAN_S = 0.0
            queue = Queue(str(world.mounts[host] / "queue"), runner=f"judge-{host}")
            for _ in range(2):
                Keeper(queue, lease=world.lease, max_failures=3).sweep()
            sweeper = Keeper(queue, lease=world.lease, max_failures=3)
            for _ in range(3):
                sweeper.sweep()
                time.sleep(0.05)
            for out in os.listdir(world.mounts[host] / "out"):
                handover.tidy_pins(queue, str(world.mounts[host] / "out" / out))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "tidying up failed"


Tokens = dict[str, list[Token]]


def _processes(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    for line in roles.seen(world):
        figures["kills before or after a file operation"] += line.what == "dies"
        figures["answers lost"] += line.what == "unanswered"
        if line.what == "gone" and line.by.endswith("trainer"):
            yield f"{line.by} could not hand over what it had just saved: {line.words[1]}"
        if line.what == "crash":
            yield f"{line.by} ended with an error: {line.words[0][-600:]}"


def _leases(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """Who holds a ticket is left alone, and who lost it has been told by then."""
    cancels = _cancels(world)
    for line in roles.seen(world, "runner-*"):
        if line.what == "freed":
            yield f"{line.by}: the pin of {line.words[0][:12]} was freed while it was evaluated"
        if line.what == "untold" and line.words[0] not in cancels:
            yield f"{line.by} lost ticket {line.words[0][:12]} to another and was not told to stop"
        if line.what == "reaped":
            figures["reaped"] += 1
            figures["reaped from a runner that lived"] += not (world.logs / f"{line.words[2]}.hurt").exists()
    # A machine that is short of time may starve one for a whole lease: that is no harm, but must stay the exception.
    if figures["reaped from a runner that lived"] > max(5, len(by_id) / 50):
        yield f"{figures['reaped from a runner that lived']} tickets were taken from runners that lived"


def _cancels(world: World) -> set[str]:
    return {line.words[0] for line in roles.seen(world, "user-*") if line.what == "cancels"}


def _tickets(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """Each ticket that a submitter was told is queued is there, once, as one file with two names."""
    acks = Counter(line.words[0] for line in roles.seen(world, "submitter-*") if line.what == "ack")
    figures["tickets"] = len(by_id)
    figures["tickets submitted by two"] = sum(1 for n in acks.values() if n > 1)
    lost = [t for t in acks if t not in by_id]
    yield from (f"ticket {t[:12]} was acknowledged and is lost" for t in lost)
    twice = [t for t, tokens in by_id.items() if len(tokens) > 1]
    yield from (f"ticket {t[:12]} has {len(by_id[t])} tokens: {[x.state for x in by_id[t]]}" for t in twice)
    figures["lost"] = len(lost)
    figures["duplicates"] = len(twice)
    for name in set(os.listdir(world.truth / "queue" / "tickets")) | set(by_id):
        paths = [os.path.join(queue.root, "tickets", name)]
        paths += [os.path.join(queue.root, t.state, t.name) for t in by_id.get(name, ())]
        try:
            stats = [os.stat(p) for p in paths]
        except FileNotFoundError as error:
            yield f"ticket {name[:12]}: {error}"
            continue
        if len({s.st_ino for s in stats}) != 1 or stats[0].st_nlink != 2:
            yield f"ticket {name[:12]}: {len(paths)} names, {stats[0].st_nlink} links"


def _states(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """Everything is done or was cancelled by a user, and each done ticket has its result."""
    cancels = _cancels(world)
    results, problems = store.done(world.truth / "queue")
    yield from problems
    yield from (f"ticket {r.ticket[:12]}: a result that is {r.status}" for r in results if r.status != "ok")
    for token in (t for tokens in by_id.values() for t in tokens):
        figures[f"… {token.state}"] += 1
        if token.state not in ("done", "cancelled"):
            why = queue.reason(token) or _failure(world, token)
            yield f"ticket {token.ticket[:12]} is {token.state} in the end: {why}"
        elif token.state == "cancelled" and (token.ticket not in cancels or not queue.reason(token)):
            yield f"ticket {token.ticket[:12]} is cancelled by nobody, or without its reason"
    figures["results of attempts that do not count"] = len(os.listdir(world.truth / "queue/results")) - len(results)


def _failure(world: World, token: Token) -> str:
    """Why the last attempt at a ticket failed; "" where none left a record."""
    records = list((world.truth / "queue" / "results").glob(f"{token.ticket}~*/result.json"))
    found = [json.loads(r.read_text())["failure"] for r in sorted(records, key=lambda r: r.stat().st_mtime_ns)]
    return next((f["message"] for f in reversed(found) if f), "")


def _commits(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """Who was told that it committed is who stands in done/, and nobody else was."""
    for line in roles.seen(world, "runner-*"):
        if line.what != "complete":
            continue
        ticket, generation, runner, committed = line.words
        stands = any(
            (t.state, t.generation, t.runner) == ("done", int(generation), runner) for t in by_id.get(ticket, ())
        )
        figures["commits" if committed == "True" else "commits refused to who lost the claim"] += 1
        if stands != (committed == "True"):
            yield f"{runner} was told {committed} for ticket {ticket[:12]} g{generation}; done/ says {stands}"


def _points(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """Each done ticket is shown once and as its result says; calls that were repeated said the same."""
    results, _ = store.done(world.truth / "queue")
    wanted = {r.ticket: r for r in results}
    shown: Counter[str] = Counter()
    root = world.truth / "queue" / "relay"
    for run in sorted(os.listdir(root)) if root.is_dir() else ():
        names = [(stage, name) for stage in relay.STAGES for name in relay.waiting(str(root / run), stage)]
        for stage, name in names:
            there = relay.read_point(str(root / run), name, stage)
            shown[there.ticket] += 1
            result = wanted.get(there.ticket)
            if result is None:
                yield f"ticket {there.ticket[:12]} is shown and not done"
            elif there.metrics != point(result).metrics or run != result.run.key:
                yield f"ticket {there.ticket[:12]}: what is shown is not its result"
    yield from (f"ticket {t[:12]} is done and not shown" for t in wanted if not shown[t])
    twice = [t for t, n in shown.items() if n > 1]
    yield from (f"ticket {t[:12]} is shown {shown[t]} times" for t in twice)
    calls: dict[str, list[str]] = defaultdict(list)
    for line in roles.seen(world, "runner-*"):
        if line.what == "publish":
            calls[line.words[0]].append(line.words[1])
    yield from (f"ticket {t[:12]} was published as different points" for t, c in calls.items() if len(set(c)) > 1)
    figures["shown"] = sum(shown.values())
    figures["shown twice"] = len(twice)
    figures["publish calls that were repeated"] = sum(len(c) - 1 for c in calls.values())


def _pins(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """No pin of a finished ticket is left, nor one that was never finished."""
    for path in world.truth.glob("out/*/.autoeval/pins/*"):
        states = [t.state for t in by_id.get(path.name, ())]
        if "done" in states or path.name.startswith("."):
            yield f"pin {path.relative_to(world.truth)} is left; its ticket is {states}"
    pinned = sum(1 for tokens in by_id.values() for t in tokens if queue.ticket(t.ticket).pin)
    figures["tickets with a pin"] = pinned


def _leftovers(world: World, queue: Queue, by_id: Tokens, figures: Counter[str]) -> Iterator[str]:
    """Nothing stands about under a passing name, and nothing that is no token among the tokens."""
    yield from (f"tmp/{name} is left" for name in os.listdir(world.truth / "queue/tmp"))
    for state in STATES:
        for name in os.listdir(world.truth / "queue" / state):
            if re.match(r"\.reason-.*~user-", name):
                figures["reasons of users who were killed as they wrote"] += 1     # no token; nobody ever reads it
            elif not name.startswith("reason-") and Token.parse(state, name) is None:
                yield f"{state}/{name} is no token"
