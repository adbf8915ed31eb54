"""The results directory: the truth that every sink, table and report is made from.

    results/ID~gN~RUNNER/result.json           one attempt's record: strict JSON, one `Result`
    results/ID~gN~RUNNER/instances.jsonl.gz    its per-instance values, one `Instance` a line
    results/ID~gN~RUNNER/details.jsonl.gz      what people may want to read of it, one `Detail` a line, if anything
    imported/ID~g0~import/                     the same of a result that was imported, and source.json

A directory appears whole or not at all, and is never changed. One under `results/` counts only while a token in
`done/` (or, for a failure's reason, in `failed/`) names it: what a runner wrote after it lost its lease is garbage.
What is imported has no token: it counts while it is there, unless another import replaces it or the queue has a result
of the same ticket.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autoeval_hooks import fsio, strict
from autoeval_hooks.errors import CheckpointError, ConfigError, QueueError, TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Queue, Token
from eval_runner import secrets
from eval_runner.results.lines import DETAILS as DETAILS
from eval_runner.results.lines import INSTANCES as INSTANCES
from eval_runner.results.lines import ResultError as ResultError
from eval_runner.results.lines import details as details
from eval_runner.results.lines import dump_details, dump_instances, plain, title
from eval_runner.results.lines import instances as instances
from eval_runner.results.schema import VERSION, Detail, Failure, Instance, Result

RECORD = "result.json"
MAX_RECORD_BYTES = 16 << 20
IMPORTED = "imported"
"""The queue's directory of what was imported."""
IMPORTER = "import"
"""The runner of an imported result. Names that runners give themselves are never this one."""
REPLACES = "replaces"
"""Among the versions of an import: the IDs of those whose place it takes. None of them counts, though still there."""

UNCOMMITTED = "it was evaluated, and the file system failed before the result was committed"
"""Why a ticket failed whose last attempt left scores."""


# ---------------------------------------------------------------------- writing


def write(
    queue_root: Path, name: str, result: Result, instances: Iterable[Instance], *, details: Iterable[Detail] = (),
    ops: FileOps | None = None, folder: str = "results", more: Mapping[str, bytes] | None = None,
) -> Path:  # fmt: skip
    """Publish a result durably as `results/<name>` and return that path; `folder` is another of the queue's, and `more`
    has further files by name.

    Raises CheckpointError for a score that is no number, ConfigError for one that two evaluators give, ValueError
    for a record that contradicts itself, QueueError when `name` is there already, and OSError when the file
    system fails; nothing is published then.
    """
    ops = ops or FileOps()
    files = {RECORD: _dump(result), INSTANCES: dump_instances(instances), **(more or {})}
    if explained := list(details):
        files[DETAILS] = dump_details(explained)
    tmp = str(queue_root / "tmp" / f"result-{name}~{fsio.unique()}")
    final = queue_root / folder / name
    with contextlib.suppress(FileExistsError):      # the name is ours alone: done, and the reply was lost
        ops.mkdir(tmp)
    try:
        for file, content in files.items():
            fsio.write_new(ops, os.path.join(tmp, file), content)
        ops.sync_dir(tmp)
        _publish(ops, tmp, str(final))
    except BaseException:
        with contextlib.suppress(OSError):
            fsio.remove_flat(ops, tmp)
        raise
    ops.sync_dir(str(final.parent))
    return final


def _publish(ops: FileOps, tmp: str, final: str) -> None:
    try:
        if not fsio.moved(ops, tmp, final):
            raise QueueError(f"{tmp}: vanished before it was published; keep other programs out of the queue's tmp/")
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise QueueError(f"{final}: is there already; give every runner a name of its own") from error
        raise


def _dump(result: Result) -> bytes:
    """The record's text, checked by reading it back: what is published can be read."""
    _check_scores(result)
    if result.failure is not None:
        message = secrets.masked(plain(result.failure.message))
        clean = replace(result.failure, message=message, log=plain(result.failure.log))
        result = replace(result, failure=clean)
    text = json.dumps(asdict(result), allow_nan=False, indent=1).encode() + b"\n"
    _load(text, f"result of ticket {result.ticket}")
    return text


def _check_scores(result: Result) -> None:
    seen = set()
    for evaluation in result.evaluations:
        for what, used in evaluation.usage.items():
            if not math.isfinite(used):
                raise ResultError(f"evaluator {evaluation.evaluator}: its usage {what!r} is {used}")
        for s in evaluation.scores:
            for what, number in (("value", s.value), ("stderr", s.stderr), ("low", s.low), ("high", s.high)):
                if number is not None and not math.isfinite(number):
                    raise CheckpointError(
                        f"score {title(s)}: its {what} is {number}, which is no number; the model may have diverged,"
                        f" see the log of evaluator {evaluation.evaluator}"
                    )
            if (key := (s.benchmark, s.metric, s.split)) in seen:
                raise ConfigError(
                    f"suite {result.suite}: score {title(s)} is given twice;"
                    " take the benchmark out of one of its evaluators, or give that one a `name`"
                )
            seen.add(key)


# ---------------------------------------------------------------------- reading


def read(path: Path, ops: FileOps | None = None, *, remedy: str = "`retry` its ticket to evaluate again") -> Result:
    """The record of the result directory `path`. Raises ResultError that names the file."""
    file = path / RECORD
    try:
        text = (ops or FileOps()).read(str(file), MAX_RECORD_BYTES)
    except OSError as error:
        raise ResultError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    return _load(text, str(file))


def _load(text: bytes, where: str) -> Result:
    errors: list[str] = []
    result = strict.parse(Result, text, where, errors, max_bytes=MAX_RECORD_BYTES)
    version = re.match(rb'\{\s*"version":\s*(\d{1,9})\b', text)
    if version and int(version[1]) > VERSION:
        raise ResultError(f"{where}: version {int(version[1])} was written by a newer autoeval; upgrade this one")
    if result is None:
        raise ResultError("; ".join(errors[:5]))
    if problem := _problem(result):
        raise ResultError(f"{where}: {problem}")
    return result


def _problem(result: Result) -> str:
    """How a well-formed record contradicts itself, or ""."""
    scores = [s for e in result.evaluations for s in e.scores]
    wrong = [s for s in scores if s.n < 1 or (s.stderr or 0) < 0]
    inside_out = [s for s in scores if (s.low is None) != (s.high is None) or (s.low or 0) > (s.high or 0)]
    rules = {
        f"version {result.version} is not {VERSION}": result.version != VERSION,
        "an ok result without a score": result.status == "ok" and not scores,
        "a failed result without its failure": result.status == "failed" and result.failure is None,
        "a refiled result that does not say as what": result.status == "refiled" and not result.refiled_as,
        f"score {wrong and title(wrong[0])} has no instances or a negative error": bool(wrong),
        f"score {inside_out and title(inside_out[0])} has half an interval, or one inside out": bool(inside_out),
        "a usage that is negative": any(used < 0 for e in result.evaluations for used in e.usage.values()),
        "a time that is none": not all(0 <= t < 1e11 for t in (result.saved_at, result.started_at, result.finished_at)),
        "a negative step, generation or token count": min(result.step, result.generation, result.tokens or 0) < 0,
    }
    return next((text for text, broken in rules.items() if broken), "")


def path_of(queue_root: Path, result: Result) -> Path:
    """The directory that holds `result`."""
    folder = IMPORTED if result.runner == IMPORTER else "results"
    return queue_root / folder / f"{result.ticket}~g{result.generation}~{result.runner}"


# ---------------------------------------------------------------------- what counts


@dataclass(frozen=True)
class FailedTicket:
    """A ticket that ended without scores. `state` is ``failed`` or ``quarantine``; `attempts` counts hand-outs.

    `run`, `suite`, `step` and `checkpoint` are empty (None) where not even the ticket can be read.
    """

    ticket: str
    state: str
    attempts: int
    failure: Failure
    run: str = ""
    suite: str = ""
    step: int | None = None
    checkpoint: str = ""


@dataclass(frozen=True)
class Contents:
    """All that counts in a queue. `problems` says, a line each, which finished tickets and imports have no readable
    result."""

    results: tuple[Result, ...] = ()
    failed: tuple[FailedTicket, ...] = ()
    problems: tuple[str, ...] = ()


def collect(queue_root: Path) -> Contents:
    """Read every finished ticket's result: those that `done/` names, what was imported, and the failures.

    Raises QueueError where there is no queue.
    """
    results, problems = done(queue_root)
    unfinished = [_failed(queue_root, token) for token in _tokens(queue_root, "failed", "quarantine")]
    evaluated = {result.ticket for result in results}
    brought, torn = imported(queue_root)
    results += [result for result in brought if result.ticket not in evaluated]
    return Contents(tuple(results), tuple(f for f in unfinished if f is not None), tuple(problems + torn))


def done(queue_root: Path) -> tuple[list[Result], list[str]]:
    """The results that tokens in `done/` name, and a line for each of these that is missing or unreadable.

    Raises QueueError where there is no queue.
    """
    results, problems = [], []
    for token in _tokens(queue_root, "done"):
        try:
            results.append(_of(queue_root, token))
        except ResultError as error:
            problems.append(f"ticket {token.ticket[:12]} is done, but {error}")
    return results, problems


_IMPORT = re.compile(rf"([0-9a-f]{{64}})~g0~{IMPORTER}")
_ID = re.compile(r"\b[0-9a-f]{64}\b")


def imported(queue_root: Path) -> tuple[list[Result], list[str]]:
    """The imports that count, sorted by ID, and a line for each that is unreadable."""
    results: list[Result] = []
    problems: dict[str, str] = {}
    for ticket in import_ids(queue_root):
        path, remedy = queue_root / IMPORTED / f"{ticket}~g0~{IMPORTER}", "import it again"
        try:
            result = read(path, remedy=remedy)
            if path_of(queue_root, result) != path:
                raise ResultError(f"{path / RECORD}: is the record of another; {remedy}")
            results.append(result)
        except ResultError as error:
            problems[ticket] = f"import {ticket[:12]} does not count: {error}"
    gone = {ticket for result in results for ticket in replaced_by(result)}
    return [r for r in results if r.ticket not in gone], [why for t, why in problems.items() if t not in gone]


def replaced_by(result: Result) -> frozenset[str]:
    """The IDs of the imports whose place an import takes."""
    return frozenset(ticket for e in result.evaluations for ticket in _ID.findall(e.versions.get(REPLACES, "")))


def import_ids(queue_root: Path) -> list[str]:
    """The IDs of what was imported, readable or not, sorted."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(m[1] for name in os.listdir(queue_root / IMPORTED) if (m := _IMPORT.fullmatch(name)))
    return []


def unreadable(queue_root: Path, token: Token) -> str:
    """Why the result of a finished ticket cannot be read: a disk or a power cut took it. "" where it can."""
    try:
        _of(queue_root, token)
    except ResultError as error:
        return str(error)
    return ""


def _tokens(queue_root: Path, *states: str) -> Iterator[Token]:
    try:
        yield from Queue(str(queue_root), runner="reader").tokens(*states)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise QueueError(f"queue {queue_root}: is not there; start training or the runner, or mend `queue`") from error


def _of(queue_root: Path, token: Token) -> Result:
    path = queue_root / "results" / token.result_name
    result = read(path)
    if (result.ticket, result.generation, result.runner) != (token.ticket, token.generation, token.runner):
        raise ResultError(f"{path / RECORD}: is the record of another attempt ({path_of(queue_root, result).name})")
    return result


def _failed(queue_root: Path, token: Token) -> FailedTicket | None:
    """Why a ticket failed: by its last attempt's record, else by what is known. None if it was retried meanwhile."""
    queue, attempts = Queue(str(queue_root), runner="reader"), token.generation + 1
    if token.state == "quarantine":
        failure = Failure("checkpoint", queue.reason(token) or "refused; no reason was left")
        return FailedTicket(token.ticket, token.state, attempts, failure)
    with contextlib.suppress(ResultError):
        r = _of(queue_root, token)
        failure = r.failure or Failure("transient", UNCOMMITTED)
        return FailedTicket(
            token.ticket, token.state, attempts, failure, r.run.name or r.run.id, r.suite, r.step, r.checkpoint
        )
    failure = Failure("transient", f"no record of the last attempt: runner {token.runner} died or lost its lease")
    try:
        t = queue.read(token)
    except FileNotFoundError:
        return None
    except (TicketError, OSError) as error:
        return FailedTicket(token.ticket, token.state, attempts, Failure("checkpoint", str(error)))
    run = t.manifest.run
    return FailedTicket(
        token.ticket, token.state, attempts, failure, run.name or run.id, t.suite, t.manifest.step, t.manifest.path
    )
