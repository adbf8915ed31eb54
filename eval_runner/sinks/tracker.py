"""Show entries in a tracker, or look at it: `python -m eval_runner.sinks.tracker REQUEST.json`.

A process of its own, so that a service that hangs, a slow import or a program that prints costs the runner nothing.
What is there already is left out; the rest is logged, and looked for again. Only one process writes to a target at a
time (wandb_lease, which is W&B's in name only). The last line of the output says what went wrong; the exit status is of
`tracked`.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks import strict
from eval_runner import secrets
from eval_runner.sinks.base import Standing
from eval_runner.sinks.tracked import BUSY, DONE, FAILED, REFUSED, Entry, Refused, Store, absent, standings
from eval_runner.sinks.wandb_lease import Lease, seen

MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Request:
    """What to do: `module` is that of the store, and has `make(settings) -> Store`. `broken` is what the holder of the
    lease `who` is asked for in `lease` has shown for so long that it counts as dead. `answer` is a file."""

    what: Literal["write", "look", "probe"]
    module: str
    settings: dict[str, str]
    entries: tuple[Entry, ...]
    answer: str
    lease: str
    who: str
    broken: str


@dataclass
class Answer:
    """`shown` names the entries that the tracker holds now; `errors` says, by the key of a run, why it was left.
    `probed` is what a probe found, `holder` what another shows that is writing."""

    shown: list[str] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    probed: str = ""
    holder: str = ""

    @classmethod
    def load(cls, path: Path) -> Answer:
        """Without what the reader knows for a secret. Raises ValueError."""
        data = json.loads(path.read_bytes())
        errors = {key: secrets.masked(why) for key, why in data["errors"].items()}
        return cls(data["shown"], [Standing(**s) for s in data["standings"]], errors, data["probed"], data["holder"])


def work(request: Request, store: Store) -> Answer:
    """Do it, run by run: one that cannot be written to does not hold up the others."""
    answer = Answer()
    if request.what == "probe":
        answer.probed = store.probe()
        return answer
    runs: dict[str, list[Entry]] = {}
    for one in request.entries:
        runs.setdefault(one.run.key, []).append(one)
    do: Callable[[Store, list[Entry], Answer], None] = _write if request.what == "write" else _look
    for key, entries in runs.items():
        try:
            do(store, entries, answer)
        except Exception as error:      # of a tracker's client, which may raise anything
            answer.errors[key] = said(error)
    return answer


def _write(store: Store, entries: list[Entry], answer: Answer) -> None:
    missing = absent(entries, store, store.held(entries, all_of_it=False))
    if missing:
        store.add(missing)
        missing = absent(entries, store, store.held(entries, all_of_it=False))
    left = {one.name for one, _ in missing}
    answer.shown += [one.name for one in entries if one.name not in left]
    if missing:
        key, step = missing[0][1][0][:2]
        why = f"{len(left)} result(s) were logged and are not there, such as {key} at step {step}"
        answer.errors[entries[0].run.key] = why


def _look(store: Store, entries: list[Entry], answer: Answer) -> None:
    answer.standings += standings(entries, store, store.held(entries, all_of_it=True))


def said(error: Exception) -> str:
    """An error in one line, without secrets."""
    text = secrets.masked(" ".join(str(error).split()))
    return text[:500] if isinstance(error, Refused) else f"{type(error).__name__}: {text}"[:500]


def main(argv: list[str]) -> int:
    errors: list[str] = []
    request = strict.parse(Request, Path(argv[1]).read_bytes(), argv[1], errors, max_bytes=MAX_BYTES)
    if request is None:
        print(errors[0])
        return REFUSED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))      # and so give the lease back
    try:
        answer = _leased(request) if request.what == "write" else _asked(request)
    except Refused as reason:
        print(said(reason))
        return REFUSED
    except Exception as error:
        print(said(error))
        return FAILED
    Path(request.answer).write_text(json.dumps(asdict(answer)), encoding="utf-8")
    return BUSY if answer.holder else DONE


def _leased(request: Request) -> Answer:
    root = Path(request.lease)
    root.parent.mkdir(parents=True, exist_ok=True)
    lease = Lease(root, request.who)
    if not lease.acquire(request.broken):
        return Answer(holder=seen(root)[1] or "somebody")
    with lease.beating():
        return _asked(request)


def _asked(request: Request) -> Answer:
    make: Any = importlib.import_module(request.module).make
    return work(request, make(request.settings))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
