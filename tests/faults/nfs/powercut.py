"""A power cut, inside the lab: hand tickets over and finish them, and tell the machine outside of each that counts.

    python -m tests.faults.nfs.powercut ACKS SEED DIRECTORY

First all that was acknowledged before the last cut is looked for, on whatever file system it was; exit status 1 and
a line for each that is lost. Then work begins in DIRECTORY and goes on until the machine is cut. ACKS is a file
outside, which survives: a line is appended, and made durable, after each call that returned.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from autoeval_hooks import config as configs
from autoeval_hooks import fsio, manifest, ticket
from autoeval_hooks.handover import Handover, Save
from autoeval_hooks.keeper import Keeper
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.results import store
from eval_runner.results.schema import VERSION, Evaluation, Result, Score

FILES = ("model.safetensors", "config.json", "tokenizer.json")
QUICK = {"evaluators": [{"type": "helm", "entries": ["a"]}]}
REACHED = {
    "enqueued": ("pending", "claimed", "done", "cancelled"), "completed": ("done",), "cancelled": ("cancelled",),
}  # fmt: skip
"""What was acknowledged → where the ticket may stand from then on."""


class Acks:
    """What the machine outside was told: ticket → the last thing that was acknowledged of it."""

    def __init__(self, path: str) -> None:
        self.last: dict[tuple[str, str], str] = {}
        for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
            directory, what, name = line.split()
            self.last[directory, name] = what
        self._fd = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def tell(self, directory: str, what: str, name: str) -> None:
        os.write(self._fd, f"{directory} {what} {name}\n".encode())
        os.fsync(self._fd)


def look(acks: Acks, directory: str, figures: Counter[str]) -> Iterator[str]:
    """What is not as it was acknowledged, once the queue was swept."""
    queue = Queue(os.path.join(directory, "queue"))
    keeper = Keeper(queue, lease=0.01, max_failures=1 << 20)
    for _ in range(3):      # its runner is as dead as can be
        keeper.sweep()
        time.sleep(0.05)
    tokens: dict[str, Token] = {}
    for token in queue.tokens():
        if token.ticket in tokens:
            yield f"ticket {token.ticket[:12]} has two tokens: {tokens[token.ticket].state}, {token.state}"
        tokens[token.ticket] = token
    for (where, name), what in acks.last.items():
        if where == directory:
            figures[what] += 1
            if name not in tokens or tokens[name].state not in REACHED[what]:
                yield f"ticket {name[:12]} was {what}, and is {tokens[name].state if name in tokens else 'lost'}"
    for name in queue.ops.listdir(os.path.join(queue.root, "tickets")):
        links = queue.ops.nlink(os.path.join(queue.root, "tickets", name))
        if links != 2 or name not in tokens:
            yield f"ticket {name[:12]} has {links} names"
    for token in tokens.values():
        found = queue.read(token)      # raises for one that is torn
        m, path = found.manifest, found.pin or found.manifest.path
        if token.state == "pending" and [manifest.record(path, f.path) for f in m.files] != list(m.files):
            yield f"ticket {token.ticket[:12]}: the files of {path} are not those of its manifest"
        if token.state == "cancelled" and not queue.reason(token):
            yield f"ticket {token.ticket[:12]} is cancelled for no reason"
    yield from store.done(Path(queue.root))[1]


def work(acks: Acks, directory: str, rng: random.Random) -> None:
    """Until the power goes."""
    out = Path(directory) / "out"
    (out / ".autoeval").mkdir(parents=True, exist_ok=True)
    queue = Queue(os.path.join(directory, "queue"))
    queue.create()
    file = Path(directory) / "autoeval.yaml"
    file.write_text(json.dumps({"queue": queue.root, "hook": {"max_pins": 1 << 20}, "suites": {"quick": QUICK}}))
    settings = configs.load(str(file))
    suite = settings.suites["quick"].digest
    base = shared(out / "base")
    plain = manifest.build(str(base), path=str(base), step=0, run=RunIdentity("base"))
    for step in range(1 << 30):
        run = RunIdentity(f"{os.getpid()}-{time.time_ns()}")
        if step % 4 == 0:
            path = checkpoint(out / f"checkpoint-{time.time_ns()}")
            name = ticket.ticket_id(manifest.build(str(path), path=str(path), step=step, run=run).digest, suite)
            Handover(settings, queue, Save(str(path), step, run, time.time()), ("quick",)).run()
        else:
            draft = replace(plain, run=run, step=step)
            made = ticket.new(replace(draft, digest=manifest.digest_of(draft)), "quick", suite, 5)
            assert queue.enqueue(made)
            name = made.id
        acks.tell(directory, "enqueued", name)
        time.sleep(rng.uniform(0, 0.01))
        if rng.random() < 0.7 and (token := queue.claim()):
            if rng.random() < 0.1:
                assert queue.cancel(token, "not needed")
                acks.tell(directory, "cancelled", token.ticket)
            else:
                finish(queue, token)
                acks.tell(directory, "completed", token.ticket)
            time.sleep(rng.uniform(0, 0.01))


def finish(queue: Queue, token: Token) -> None:
    found = queue.read(token)
    m = found.manifest
    result = Result(
        version=VERSION, ticket=token.ticket, generation=token.generation, runner=token.runner, status="ok",
        suite=found.suite, suite_digest=found.suite_digest, suite_text="", run=m.run, checkpoint=m.path,
        checkpoint_digest=m.digest, step=m.step, tokens=None, saved_at=m.saved_at, started_at=time.time(),
        finished_at=time.time(), evaluations=(Evaluation("none", 0.0, (Score("b", "m", "test", 1.0, n=1),)),),
    )  # fmt: skip
    store.write(Path(queue.root), token.result_name, result, ())
    assert queue.complete(token)


def checkpoint(path: Path) -> Path:
    """A checkpoint of small files; like a trainer, it does not wait for them to be on the disk."""
    path.mkdir(exist_ok=True)
    for file in FILES:
        (path / file).write_text(f"{file} of {path.name}")
    return path


def shared(path: Path) -> Path:
    """The checkpoint that is not pinned, so that its own files must survive; made once."""
    path.mkdir(exist_ok=True)
    for file in FILES:
        if not (path / file).exists():
            fsio.replace(str(path / file), file.encode())
    return path


def main(acks_file: str, seed: str, directory: str) -> int:
    acks, lost, figures = Acks(acks_file), 0, Counter[str]()
    for known in sorted({where for where, _ in acks.last}):
        for problem in look(acks, known, figures):
            lost += 1
            print(f"  BROKEN in {known}: {problem}")
    print(f"  found again: {', '.join(f'{n} {what}' for what, n in sorted(figures.items())) or 'nothing yet'}")
    sys.stdout.flush()
    os.fsync(sys.stdout.fileno())
    if lost:
        return 1
    if directory:
        work(acks, directory, random.Random(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
