"""Is everything in place for evaluating, and if not, what is to be done? What `autoeval-runner doctor` says.

Every part looks for itself, in a thread of its own, for no longer than the whole may take. Nothing is changed: what
the queue's file system is tried with is removed (autoeval_hooks.doctor), and a key is only looked for.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import get_args

from autoeval_hooks import __version__, fsio
from autoeval_hooks.config import map_path
from autoeval_hooks.doctor import check_pinning, check_queue
from autoeval_hooks.errors import ConfigError, TicketError
from autoeval_hooks.findings import Finding
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from eval_runner import breaker, environments, registry, status
from eval_runner.checkpoints import convert
from eval_runner.config.models import Config
from eval_runner.sinks import wandb_doctor
from eval_runner.sinks.trackers import PROBE_S, TrackerSink

DEADLINE_S = 12.0
"""For all of it. Asking HELM takes some ten seconds."""
WATCH_S = 3.0
"""How long heartbeats are watched."""
TICKETS = 200
"""Of each state so many tickets are opened, the newest: in a queue of thousands the others are like them."""


@dataclass
class _Queue:
    """What the queue holds, as far as it was looked at."""

    root: Path
    tokens: list[Token] = field(default_factory=list)
    tickets: dict[str, Ticket] = field(default_factory=dict)

    def of(self, *states: str) -> list[Token]:
        return [t for t in self.tokens if t.state in states]


def examine(config: Config) -> list[Finding]:
    """All findings, part by part. Takes `DEADLINE_S` at most, and raises nothing for what is found wrong."""
    queue = _Queue(config.queue)
    gathered = _part("queue", partial(_gather, queue))
    with_queue = [partial(_with_queue, gathered, part, config, queue) for part in _PARTS.values()]
    parts = [
        _part("versions", _versions), _part("plugins", partial(_plugins, config)),
        _part("queue", lambda: check_queue(str(config.queue))), _part("path_map", partial(_path_map, config)),
        gathered, *map(_part, _PARTS, with_queue), _part("evaluators", partial(_evaluators, config)),
        _part("server", partial(_server, config)), _part("convert", partial(_convert, config)), _part("GPU", _gpu),
    ]  # fmt: skip
    end = time.monotonic() + DEADLINE_S
    return [finding for part in parts for finding in part.wait(end)]


# ---------------------------------------------------------------------- parts side by side


@dataclass
class _Part:
    """One part at work. Its thread is left behind where it takes too long."""

    what: str
    thread: threading.Thread
    found: list[Finding] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def wait(self, end: float) -> list[Finding]:
        if self.over.wait(max(end - time.monotonic(), 0.05)):
            return self.found
        return [
            Finding("warning", self.what, f"is still being looked at after {DEADLINE_S:g} s",
                    "`autoeval-runner validate` waits for evaluators; if it hangs too, look for a hung mount")
        ]  # fmt: skip


def _part(what: str, work: Callable[[], list[Finding]]) -> _Part:
    def run() -> None:
        try:
            part.found = work()
        except Exception as error:      # of one part; the others say what they can
            part.found = [Finding("problem", what, f"{type(error).__name__}: {error}", "see the files that it names")]
        part.over.set()

    part = _Part(what, threading.Thread(target=run, name=f"doctor-{what}", daemon=True))
    part.thread.start()
    return part


def _with_queue(
    gathered: _Part, part: Callable[[Config, _Queue], list[Finding]], config: Config, queue: _Queue
) -> list[Finding]:
    gathered.over.wait()
    there = (queue.root / "pending").is_dir()       # where it is not, check_queue says so
    return part(config, queue) if there or part is _sinks else []


# ---------------------------------------------------------------------- this host


def _versions() -> list[Finding]:
    found = [f"autoeval {__version__}", f"Python {platform.python_version()}"]
    for name in ("transformers", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return [Finding("ok", "versions", f"{', '.join(found)}; the training host's: `python -m autoeval_hooks doctor`")]


def _plugins(config: Config) -> list[Finding]:
    named = {("evaluators", e["type"]) for s in config.suites.values() for e in s.evaluators}
    named |= {("sinks", e["type"]) for e in config.sinks}
    named |= {("servers", config.server["type"])} if config.server else set()
    findings, works = [], 0
    for kind in get_args(registry.Kind):
        for name in sorted({point.name for point in entry_points(group=f"autoeval.{kind}")}):
            try:
                registry.get(kind, name, "plugin")
                works += 1
            except ConfigError as error:
                needed = (kind, name) in named
                text = str(error).removeprefix("plugin: ")
                findings.append(Finding("problem" if needed else "warning", f"{kind[:-1]} {name}", text,
                                        "" if needed else "nothing, as long as no configuration names it"))  # fmt: skip
    return [*findings, Finding("ok", "plugins", f"{works} can be loaded")]


def _path_map(config: Config) -> list[Finding]:
    return [
        Finding("problem", f"path_map.{source}", f"{target}: no such directory on this host", "mend it, or mount it")
        for source, target in config.path_map.items() if not os.path.isdir(target)
    ]  # fmt: skip


def _evaluators(config: Config) -> list[Finding]:
    root = config.environments or environments.default_root()
    built = [f"{e.name} ({'current' if e.current else 'of another version'})" for e in environments.listing(root)
             if e.complete]  # fmt: skip
    findings = [Finding("ok", "environments", f"{root}: {', '.join(built) or 'none is built'}")]
    for suite in config.suites.values():
        where = f"suites.{suite.name}"
        try:
            for evaluator in registry.build_evaluators(config, suite):
                evaluator.check()
        except ConfigError as error:
            findings += [Finding("problem", where, line) for line in str(error).splitlines()]
        else:
            findings.append(Finding("ok", where, "its evaluators have what they need"))
    return findings


def _server(config: Config) -> list[Finding]:
    try:
        server = registry.build_server(config)
        if server is None:
            return []
        server.check()
    except ConfigError as error:
        return [Finding("problem", "server", line) for line in str(error).splitlines()]
    return [Finding("ok", "server", "has what it needs")]


def _convert(config: Config) -> list[Finding]:
    if config.convert is None:
        return []
    try:
        convert.check(config)
    except ConfigError as error:
        return [Finding("problem", "convert", line) for line in str(error).splitlines()]
    return [Finding("ok", "convert", f"its program is there; results: {convert.directory_of(config.convert)}")]


def _gpu() -> list[Finding]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Finding("ok", "GPU", "no nvidia-smi here: evaluations run on the CPU, or on a GPU of another kind")]
    query = "--query-gpu=name,memory.free,memory.total"
    done = subprocess.run([program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=8)
    if done.returncode or not done.stdout.strip():
        said = " ".join((done.stderr or done.stdout).split())[:200]
        return [Finding("warning", "GPU", f"nvidia-smi says: {said or 'nothing'}", "look at the driver of this host")]
    return [Finding("ok", "GPU", f"{line.strip()} (name, free, all)") for line in done.stdout.strip().splitlines()]


# ---------------------------------------------------------------------- what the queue holds


def _gather(queue: _Queue) -> list[Finding]:
    if not (queue.root / "pending").is_dir():
        return []
    reader = Queue(str(queue.root), runner="doctor")
    queue.tokens = list(reader.tokens())
    refused = 0
    for state in ("pending", "claimed", "done", "failed"):
        for token in sorted(queue.of(state), key=lambda t: t.sort.partition("-")[2], reverse=True)[:TICKETS]:
            try:
                queue.tickets[token.ticket] = reader.read(token)
            except TicketError:
                refused += state == "pending"
            except OSError:
                continue        # it moved on, or `status` says more
    counts = Counter(t.state for t in queue.tokens)
    text = ", ".join(f"{n} {state}" for state, n in counts.items()) or "no ticket so far"
    findings = [Finding("ok", "tickets", text)]
    if refused:
        findings.append(Finding("warning", "tickets", f"{refused} pending will be refused",
                                "let a runner take them; `autoeval-runner status` then has the reasons"))  # fmt: skip
    return findings


def _failures(config: Config, queue: _Queue) -> list[Finding]:
    findings = [
        Finding("problem", f"suite {o.suite}", breaker.said(o).removeprefix(f"suite {o.suite}: "))
        for o in breaker.read(queue.root)
    ]
    ended = queue.of("failed", "quarantine")
    if ended:
        why = Counter(
            f"{t.state}: {t.why}" for t in status.read(queue.root).tickets if t.state in ("failed", "quarantine")
        )
        for reason, n in why.most_common(5):
            findings.append(Finding("warning", f"{n} ticket(s)", reason,
                                    "mend the cause, then `autoeval-runner retry --all` (or ID…)"))  # fmt: skip
    orphans: Counter[str] = Counter()
    for token in queue.of("pending"):
        ticket = queue.tickets.get(token.ticket)
        if ticket and ticket.suite not in config.suites:
            orphans[ticket.suite] += 1
    for suite, n in orphans.items():
        means = f"{n} ticket(s) wait for it, and {config.path} has no such suite"
        do = f"start a runner that has it, or `autoeval-runner cancel --suite {suite}`"
        findings.append(Finding("warning", f"suite {suite}", means, do))
    return findings


def _runners(config: Config, queue: _Queue) -> list[Finding]:
    """Which runners live: their heartbeats are watched; one that stood still is judged by the file server's clock."""
    reader = Queue(str(queue.root), runner="doctor")
    held = Counter(t.runner for t in queue.of("claimed"))
    with contextlib.suppress(FileNotFoundError):
        held.update({name: 0 for name in os.listdir(queue.root / "hb") if not name.startswith(".")})
    first = {name: reader.heartbeat(name) for name in held}
    alive: set[str] = set()
    end = time.monotonic() + WATCH_S
    while len(alive) < len(held) and time.monotonic() < end:
        time.sleep(0.2)
        alive |= {name for name in held if reader.heartbeat(name) != first[name]}
    lease, now = config.runner.lease, _server_time(queue.root)
    findings = []
    for name, holds in sorted(held.items()):
        what, holding = f"runner {name}", f"holds {holds} ticket(s)" if holds else "holds nothing"
        age = _age(queue.root / "hb" / name, now)
        if name in alive or (age is not None and age < lease):
            findings.append(Finding("ok", what, f"is alive and {holding}"))
        elif holds:
            since = "has no heartbeat" if age is None else f"has not shown itself for {age:.0f} s"
            findings.append(Finding("problem", what, f"{since} and {holding}",
                                    f"start a runner: it takes the ticket over after {lease:g} s"))  # fmt: skip
        else:
            findings.append(Finding("ok", what, "has ended without a goodbye; it holds nothing"))
    if queue.of("pending") and not any(f.level == "ok" and "is alive" in f.means for f in findings):
        findings.append(Finding("warning", "runners", f"none is alive, and {len(queue.of('pending'))} ticket(s) wait",
                                "start one: `autoeval-runner run`"))  # fmt: skip
    return findings or [Finding("ok", "runners", "none is alive, and no ticket waits")]


def _server_time(root: Path) -> float:
    """Now, by the clock that stamps the heartbeat files: only such times can be compared with theirs."""
    path = root / "tmp" / f".doctor-{fsio.unique()}"
    fsio.write_new(fsio.FileOps(), str(path), b"x")
    try:
        return path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)


def _age(path: Path, now: float) -> float | None:
    try:
        with path.open("rb") as file:       # through an open, so that no attribute cache answers
            return now - os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _checkpoints(config: Config, queue: _Queue) -> list[Finding]:
    """Whether what waiting tickets name can be seen from here, and how their output directories are pinned in."""
    waiting = [queue.tickets[t.ticket] for t in queue.of("pending", "claimed") if t.ticket in queue.tickets]
    findings = []
    gone = [t for t in waiting if not os.path.isdir(map_path(t.pin or t.manifest.path, config.path_map))]
    if gone:
        path = gone[0].pin or gone[0].manifest.path
        means = f"{len(gone)} of {len(waiting)} that wait cannot be seen from here, such as {path}"
        do = "if this host names it otherwise, add it to `path_map`; else it is lost: `autoeval-runner cancel`"
        findings.append(Finding("problem", "checkpoints", means, do))
    elif waiting:
        findings.append(Finding("ok", "checkpoints", f"of {len(waiting)} waiting ticket(s) can all be seen from here"))
    outputs = dict.fromkeys(os.path.dirname(t.manifest.path) for t in [*waiting, *queue.tickets.values()])
    for output in list(outputs)[:3]:
        findings.append(check_pinning(map_path(output, config.path_map), config.hook.pin))
    return findings


def _sinks(config: Config, queue: _Queue) -> list[Finding]:
    findings = []
    try:
        built = registry.build_sinks(config)
    except ConfigError as error:
        built = []
        findings += [Finding("problem", "sinks", line) for line in str(error).splitlines()]
    looks = [_part(f"sinks[{i}]", s.findings) for i, s in enumerate(built) if isinstance(s, TrackerSink)]
    runs = [ticket.manifest.run for ticket in queue.tickets.values()]
    for i, entry in enumerate(config.sinks):
        if entry["type"] == "wandb":
            settings = {key: value for key, value in entry.items() if key != "type"}
            findings += wandb_doctor.findings(settings, f"sinks[{i}]", _distinct(runs))
    end = time.monotonic() + PROBE_S + 1.0
    return findings + [finding for part in looks for finding in part.wait(end)]


def _distinct(runs: list[RunIdentity]) -> Iterator[RunIdentity]:
    yield from dict.fromkeys(runs)


_PARTS: dict[str, Callable[[Config, _Queue], list[Finding]]] = {
    "failures": _failures, "runners": _runners, "checkpoints": _checkpoints, "sinks": _sinks,
}  # fmt: skip
"""What needs to know what the queue holds."""
