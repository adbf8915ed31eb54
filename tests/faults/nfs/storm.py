"""The storm, inside the lab: processes on two mounts of one NFS export are killed and stopped at random for minutes.

    python -m tests.faults.nfs.storm VERSION MOUNT_A MOUNT_B EXPORT SECONDS SEED

Everything is imported before the first fork, and this process has no threads. Exit status 0 when nothing was lost,
nothing shown twice and no zombie committed; what was broken is printed otherwise.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks import manifest
from autoeval_hooks.queue import Queue
from tests.faults.nfs import roles, verdict
from tests.faults.nfs.roles import Log, Submitter, World

LEASE_S = 5.0
KILL_S, STOP_S = 2.0, 2.0
"""Mean seconds from one to the next."""
RESTART_S = 50.0
"""Seconds between two restarts of the server: it forgets what it was about to answer."""
PART_S = 40.0
"""Mean seconds from one loss of host b's network to the next; under NFS 4.2, where the lab gives it a network."""
PATIENCE_S = 120.0
SETTLE_S = 600.0
"""It takes 20 s on a quiet machine."""
INF = float("inf")
RUNS = 3
RUNNERS = 3
"""On each host."""


@dataclass
class Process:
    """One process of the storm and those that come after it, each a fork of this one."""

    name: str
    host: str
    work: Callable[[str, Log, random.Random], None]
    pid: int = 0
    lives: int = 0
    wakes_at: float = 0.0
    """When it is continued; 0 while it is not stopped."""
    born_at: float = 0.0
    """When the next one is started; 0 while one lives, infinity when none is to be."""

    def start(self, world: World, seed: int) -> None:
        self.lives += 1
        self.born_at = self.wakes_at = 0.0
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            roles.become(self.host)
            log = Log(world, self.name)
            try:
                self.work(f"{self.name}.{self.lives}", log, random.Random(f"{seed} {self.name} {self.lives}"))
                status = 0
            except BaseException:
                log("crash", traceback.format_exc())
        finally:
            os._exit(status)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class Storm:
    world: World
    seed: int
    network: bool
    processes: list[Process]
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    server: subprocess.Popen[bytes] | None = None
    """While it is restarted."""

    def __post_init__(self) -> None:
        self._log = Log(self.world, "storm")

    def blow(self, seconds: float) -> None:
        """Faults at random for so long."""
        begin = time.monotonic()
        kill_at, stop_at, said_at, restart_at = begin + 5.0, begin + 5.0, begin, begin + RESTART_S / 2
        part_at, join_at = begin + PART_S if self.network else INF, INF
        while (now := time.monotonic()) < begin + seconds:
            self._tend(now)
            if now >= kill_at:
                self._kill()
                kill_at = now + self.rng.expovariate(1 / KILL_S)
            if now >= stop_at:
                self._stop(now)
                stop_at = now + self.rng.expovariate(1 / STOP_S)
            if now >= restart_at and self.server is None:
                restart_at = now + RESTART_S
                self._restart_server()
            self._restarted(wait=False)
            if now >= part_at:
                part_at, join_at = INF, now + self.rng.uniform(0.3, 2.5) * self.world.lease
                self._link("down")
            if now >= join_at:
                part_at, join_at = now + self.rng.expovariate(1 / PART_S), INF
                self._link("up")
            if now >= said_at:
                said_at = now + 20.0
                say(f"  {now - begin:4.0f} s: {self._figures()}")
            time.sleep(0.02)
        if self.network:
            self._link("up")
        self._restarted(wait=True)

    def settle(self) -> bool:
        """No more faults: let everything drain and end. False when no ticket ends for `PATIENCE_S` before that, or it
        goes on for `SETTLE_S`."""
        (self.world.logs / "calm").touch()
        for process in self._living():
            process.signal(signal.SIGCONT)
            process.wakes_at = 0.0
        begin = time.monotonic()
        ended, moved_at, said_at = -1, begin, 0.0
        while not self._drained():
            now = time.monotonic()
            self._tend(now, hurry=True)
            before, ended = ended, sum(len(os.listdir(self.world.truth / "queue" / s)) for s in ("done", "cancelled"))
            if ended != before:
                moved_at = now
            if now > min(moved_at + PATIENCE_S, begin + SETTLE_S):
                return False
            if now >= said_at:
                said_at = now + 20.0
                say(f"  calm: {self._figures()}")
            time.sleep(0.1)
        for process in self.processes:
            process.born_at = INF
            if process.pid:
                process.signal(signal.SIGKILL if process.name.startswith("user") else signal.SIGTERM)
        begin, said_at = time.monotonic(), 0.0
        while self._living() and (now := time.monotonic()) < begin + PATIENCE_S:
            self._tend(now)
            if now >= said_at:
                said_at = now + 20.0
                say(f"  at work still: {', '.join(p.name for p in self._living())}")
            time.sleep(0.1)
        return not self._living()

    def _tend(self, now: float, *, hurry: bool = False) -> None:
        """Note who died; continue and start who is due."""
        for process in self.processes:
            if process.pid:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                if pid:
                    process.pid = 0
                    done = status == 0 or process.born_at == INF
                    process.born_at = INF if done else now + self.rng.uniform(0, 0.5)
            elif process.born_at <= now or (hurry and process.born_at < INF):
                process.start(self.world, self.seed)
                self.counts["restarts"] += 1
            if process.pid and 0 < process.wakes_at <= now:
                process.wakes_at = 0.0
                process.signal(signal.SIGCONT)

    def _living(self) -> list[Process]:
        return [p for p in self.processes if p.pid]

    def _kill(self) -> None:
        living = self._living()
        victims = [self._victim(living)] if living else []
        if self.rng.random() < 0.04:        # a node goes down
            host = self.rng.choice("ab")
            victims = [p for p in living if p.host == host]
        for process in victims:
            process.signal(signal.SIGKILL)
            self.hurt(process, "killed")
            self.counts["kills"] += 1

    def _stop(self, now: float) -> None:
        awake = [p for p in self._living() if not p.wakes_at]
        if awake:
            process, long = self._victim(awake), self.rng.random() < 0.5
            lease = self.world.lease
            process.wakes_at = now + (self.rng.uniform(1.2 * lease, 2.5 * lease) if long else self.rng.uniform(0.05, 1))
            process.signal(signal.SIGSTOP)
            self.hurt(process, f"stopped for {process.wakes_at - now:.1f} s")
            self.counts["stops beyond the lease" if long else "short stops"] += 1

    def _victim(self, among: list[Process]) -> Process:
        return self.rng.choices(among, [3 if p.name.startswith("runner") else 1 for p in among])[0]

    def hurt(self, process: Process, what: str) -> None:
        """Note whom something was done to: nobody else may be taken for dead."""
        (self.world.logs / f"{process.name}.{process.lives}.hurt").touch()
        self._log(what, f"{process.name}.{process.lives}")

    def _restart_server(self) -> None:
        """It is not waited for: it may have to wait for host b's network, which none but the storm brings back."""
        for process in self._living():
            self.hurt(process, "loses its server")
        self.server = subprocess.Popen(["sh", "-ec", "rpc.nfsd 0; sleep 1; rpc.nfsd 8"])

    def _restarted(self, *, wait: bool) -> None:
        """Note that the server is back, once it is."""
        if self.server is None or (not wait and self.server.poll() is None):
            return
        assert self.server.wait() == 0, "the server could not be restarted"
        self.server = None
        for process in self._living():
            self.hurt(process, "had lost its server")
        self.counts["server restarts"] += 1

    def _link(self, state: str) -> None:
        if state == "down":
            self.counts["partitions"] += 1
            for process in self._living():
                if process.host == "b":
                    self.hurt(process, "loses its network")
        subprocess.run(["ip", "-n", "b", "link", "set", "net-b", state], check=True)

    def _drained(self) -> bool:
        """Whether every submitter ended and every ticket is where it stays, and shown. Listings of several states are
        of several moments: what is nowhere among those that wait may have moved from one to another."""
        if any(p.name.startswith("submitter") and p.born_at < INF for p in self.processes):
            return False
        root = self.world.truth / "queue"
        ended = list(Queue(str(root)).tokens("done", "cancelled"))
        done = {t.result_name for t in ended if t.state == "done"}
        shown, known = (set(os.listdir(root / name)) for name in ("published/witness", "tickets"))
        return known <= {t.ticket for t in ended} and done <= shown

    def _figures(self) -> str:
        root = self.world.truth / "queue"
        folders = ("pending", "claimed", "done", "failed", "published/witness")
        states = {name: len(os.listdir(root / name)) for name in folders if (root / name).is_dir()}
        return ", ".join(f"{n} {what}" for what, n in [*states.items(), *self.counts.items()])


def say(text: str) -> None:
    """Print it so that the machine outside sees it now."""
    print(text, flush=True)
    os.fsync(sys.stdout.fileno())


def prepare(world: World) -> None:
    """The queue, the configuration of each host, and the one checkpoint that most tickets are for."""
    for host, path in world.mounts.items():
        other = next(str(p) for h, p in world.mounts.items() if h != host)
        (world.truth / f"autoeval-{host}.yaml").write_text(json.dumps({
            "queue": str(path / "queue"), "path_map": {other: str(path)}, "hook": {"max_pins": 100_000},
            "runner": {"lease": world.lease, "max_attempts": 3, "breaker": 1000}, "sinks": [],
            "suites": {"quick": {"evaluators": [{"type": "helm", "entries": ["a"]}]}},
        }))  # fmt: skip
    for name in ("base", *(f"run{i}" for i in range(RUNS))):
        (world.truth / "out" / name).mkdir(parents=True)
    roles.save(world.truth / "out" / "base" / "checkpoint-0", 0)
    Queue(str(world.truth / "queue")).create()


def cast(world: World) -> list[Process]:
    """Who takes part: for each run a trainer and its twin on the other host, runners and a user on each host."""

    def submitter(host: str, run: str, twin: bool) -> Process:
        name = f"submitter-{run}-{'twin' if twin else 'trainer'}"
        return Process(name, host, lambda life, log, rng: Submitter(world, host, run, name, twin, life, log, rng)())

    def runner(host: str, number: int) -> Process:
        def work(life: str, log: Log, rng: random.Random) -> None:
            roles.evaluate_all(world, host, life, log, rng)

        return Process(f"runner-{host}{number}", host, work)

    def user(host: str) -> Process:
        return Process(f"user-{host}", host, lambda life, log, rng: roles.meddle(world, host, log, rng))

    found = [user("a"), user("b")]
    for i in range(RUNS):
        hosts = "ab" if i % 2 == 0 else "ba"
        (world.logs / f"run{i}.step").write_text("0")
        found += [submitter(hosts[0], f"run{i}", False), submitter(hosts[1], f"run{i}", True)]
    return found + [runner(host, i) for host in "ab" for i in range(RUNNERS)]


def main(version: str, a: str, b: str, export: str, seconds: float, seed: int) -> int:
    # So that files of a few kilobytes are sampled and linked, as weights of gigabytes are.
    manifest.WHOLE, manifest.END, manifest.BLOCK, manifest.BLOCKS = 4096, 1024, 64, 8
    logs = Path("/run/storm") / version
    logs.mkdir(parents=True)
    faulthandler.register(signal.SIGUSR1, (logs / "stacks").open("a"))      # hung.py asks; the children inherit it
    name = f"storm-{version}"
    world = World({"a": Path(a) / name, "b": Path(b) / name}, Path(export) / name, logs, LEASE_S)
    world.truth.mkdir()
    prepare(world)
    storm = Storm(world, seed, version == "4.2", cast(world), random.Random(seed))
    say(f"storm on NFS {version}: seed {seed}, {len(storm.processes)} processes")
    began = time.monotonic()
    gc.freeze()     # a collection in a child would write to, and so copy, all that it shares with this process
    for process in storm.processes:
        process.start(world, seed)
    storm.blow(seconds)
    drained = storm.settle()
    if not drained:
        subprocess.run([sys.executable, "-S", Path(__file__).with_name("hung.py")], check=False)
    for process in storm._living():
        process.signal(signal.SIGKILL)
    say("  all of it ended; the verdict")
    found = verdict.judge(world, drained=drained, say=say)
    say(verdict.table(found, storm.counts, version, seed, time.monotonic() - began))
    for problem in found.problems:
        say(f"  BROKEN: {problem}")
    for line in verdict.history(world, found.problems):
        say(f"    {line}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5], float(sys.argv[5]), int(sys.argv[6])))
