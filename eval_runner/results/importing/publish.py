"""What was found becomes results under the queue's `imported/`, each once.

An import's ID is the digest of what it holds: the scores and the files behind them, and what they are called. The same
content is the same import, wherever it lies. One checkpoint's scores of one benchmark stand once: what is a part of an
import that stands adds nothing, and what holds all of its scores and more takes its place. Other values of a benchmark
take the place of those that stand only where the user says so; no date of a file decides it. An import names those it
takes the place of (`store.REPLACES`): they do not count from the moment when it is there, are removed after it, by
another import if this one was killed, and are not imported again while it stands.

Imports form one series where they can be compared: the imports of a suite's name whose benchmarks were evaluated in the
same way. One joins the series with which it has the most benchmarks in common and that has none evaluated in another
way, and of those alike the one that has its run; where several would do that it has no benchmark in common with, it
founds its own. So two checkpoints are comparable although one of them lacks a benchmark, and those with other few-shot
settings are not, in whatever order they come; the order may decide which of several series has a checkpoint that fits
more than one. Another suite's name keeps what the user wants apart, or together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import Timeout, UnixFileLock

from autoeval_hooks import __version__, fsio, strict
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.results import store
from eval_runner.results.importing.base import Found
from eval_runner.results.importing.places import Import, Outcome, Source, replaces, series
from eval_runner.results.schema import VERSION, Detail, Evaluation, Instance, Result

SOURCE = "source.json"
_NEWEST = 1e11 - 1


class Imports:
    """What a queue has imported. With `dry`, nothing is written or removed, and all else is as if it were."""

    def __init__(
        self, queue_root: Path, *, dry: bool = False, replacing: bool = False, ops: FileOps | None = None
    ) -> None:  # fmt: skip
        """Raises OSError where the queue cannot be read. What is torn counts as not there, and importing mends it; what
        another import replaces is removed. With `replacing`, other values take the place of those that stand."""
        self._root, self._dry, self._ops, self._replacing = queue_root, dry, ops or FileOps(), replacing
        results, self.problems = store.imported(queue_root)
        self._standing = {r.ticket: Import(r, source_of(store.path_of(queue_root, r))) for r in results}
        gone = {ticket for result in results for ticket in store.replaced_by(result)}
        self._remove(gone.intersection(store.import_ids(queue_root)))

    def take(self, found: Found, directory: Path, tokens_per_step: int | None) -> Outcome:
        """Make a result of it. Raises AutoEvalError for scores that no result may hold, OSError where the file
        system fails; nothing is published then."""
        try:
            definitions = {name: _digest(definition) for name, definition in found.definitions.items()}
            result = _result(found, directory, tokens_per_step)
        except (ValueError, RecursionError) as error:
            what = f"{found.model} at step {found.step}: not numbers that can be kept"
            raise AutoEvalError(f"{what} ({error})") from error
        source = Source(found.evaluator, str(directory), time.time(), __version__, found.files, definitions)
        told = {name: found.definitions[name] for name in sorted(found.definitions)}
        text = json.dumps({"import": found.evaluator, "benchmarks": told}, sort_keys=True)
        result = replace(result, suite_digest=hashlib.sha256(text.encode()).hexdigest(), suite_text=text)
        return self._bring(result, source, found.instances, ())

    def copy(
        self, result: Result, directory: Path, files: Mapping[str, str], instances: list[Instance],
        details: list[Detail], source: Source | None,
    ) -> Outcome:  # fmt: skip
        """Take over a result of another queue as it is: its ticket stays, and its runner is named in `versions`.
        `source` is where it came from, if that queue had imported it; one of another program stands once here, too."""
        by = {"evaluated by": f"{result.runner}, generation {result.generation}"} if source is None else {}
        evaluations = tuple(replace(e, versions=e.versions | by) for e in result.evaluations)
        own = replace(result, generation=0, runner=store.IMPORTER, evaluations=evaluations)
        source = source or Source("autoeval", str(directory), time.time(), __version__, dict(files))
        return self._bring(own, source, instances, details)

    def _bring(
        self, result: Result, source: Source, instances: list[Instance], details: Iterable[Detail]
    ) -> Outcome:  # fmt: skip
        new = Import(result, source)
        for old in self._standing.values():
            if result.ticket == old.result.ticket:
                return Outcome("known", old.result)
            if result.ticket in store.replaced_by(old.result):
                return Outcome("known", old.result, f"{old.id} took its place")
        gone = store.replaced_by(result)
        if source.definitions:      # what a queue evaluated itself is told from others by its ticket
            for old in self._standing.values():
                taken = replaces(old, new, differing=self._replacing) if old.source.definitions else False
                if isinstance(taken, Outcome):
                    return taken
                if taken:
                    gone |= {old.result.ticket} | store.replaced_by(old.result)
            digest, text = series(self._standing.values(), new)
            result = replace(result, suite_digest=digest, suite_text=text)
        if gone:
            first, *rest = result.evaluations
            named = replace(first, versions=first.versions | {store.REPLACES: " ".join(sorted(gone))})
            result = replace(result, evaluations=(named, *rest))
        why = " ".join(f"replaces {ticket[:12]}" for ticket in sorted(gone) if ticket in self._standing)
        self._publish(result, source, instances, details)
        self._remove(gone)
        return Outcome("imported", result, why)

    def _remove(self, tickets: Iterable[str]) -> None:
        for ticket in tickets:
            self._standing.pop(ticket, None)
            if not self._dry:
                remove(self._root, ticket, self._ops)

    def _publish(
        self, result: Result, source: Source, instances: list[Instance], details: Iterable[Detail]
    ) -> None:  # fmt: skip
        if not self._dry:
            if not (self._root / store.IMPORTED).is_dir():
                fsio.make_dirs(self._ops, str(self._root / store.IMPORTED))
                self._ops.sync_dir(str(self._root))
            if _is_torn(self._root, store.path_of(self._root, result)):
                remove(self._root, result.ticket, self._ops)
            store.write(
                self._root, store.path_of(self._root, result).name, result, instances, details=details,
                ops=self._ops, folder=store.IMPORTED,
                more={SOURCE: json.dumps(asdict(source), indent=1).encode() + b"\n"},
            )  # fmt: skip
        self._standing[result.ticket] = Import(result, source)


@contextlib.contextmanager
def alone(queue_root: Path) -> Iterator[bool]:
    """No other import writes to the queue meanwhile. False where the file system has no locks, so that nobody can know.

    Raises AutoEvalError where another is at work, OSError where the file system fails.
    """
    lock = UnixFileLock(queue_root / "locks" / "import.lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise AutoEvalError(f"{queue_root}: another import is at work; try again when it is done") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def source_of(directory: Path) -> Source:
    """Where the import in `directory` comes from. Of one whose source.json cannot be read nothing is known."""
    path = directory / SOURCE
    errors: list[str] = []
    try:
        text = FileOps().read(str(path), store.MAX_RECORD_BYTES)
    except OSError:
        text = b""
    source = strict.parse(Source, text, str(path), errors, max_bytes=store.MAX_RECORD_BYTES)
    return source or Source("unknown", "", 0.0, "")


def matching(queue_root: Path, prefix: str) -> str:
    """The ID of the import that begins with `prefix`, readable or not. Raises ConfigError for none or several."""
    found = [ticket for ticket in store.import_ids(queue_root) if ticket.startswith(prefix)]
    if len(found) != 1:
        what = f"{len(found)} imports have an ID that begins so" if found else "no import has such an ID"
        raise ConfigError(f"{prefix!r}: {what}; `autoeval-runner import list` shows them")
    return found[0]


def remove(queue_root: Path, ticket: str, ops: FileOps | None = None) -> None:
    """Take an import back; one that is gone is as good. Raises OSError where the file system fails."""
    ops = ops or FileOps()
    path = queue_root / store.IMPORTED / f"{ticket}~g0~{store.IMPORTER}"
    aside = queue_root / "tmp" / f"import-{ticket}~{fsio.unique()}"
    if fsio.moved(ops, str(path), str(aside)):
        fsio.remove_flat(ops, str(aside))


def _is_torn(queue_root: Path, path: Path) -> bool:
    """Whether an import is there and does not count."""
    with contextlib.suppress(store.ResultError):
        return store.path_of(queue_root, store.read(path)) != path
    return os.path.lexists(path)


def _result(found: Found, directory: Path, tokens_per_step: int | None) -> Result:
    run = RunIdentity(id=f"imported-{found.run}", name=found.run)
    tokens = found.step * tokens_per_step if tokens_per_step else None
    asked = [found.evaluator, found.model, found.run, found.step, found.suite, tokens, sorted(found.versions.items())]
    content = [asdict(s) for s in found.scores], sorted(found.files.values())
    at = min(max(found.written_at, 0.0), _NEWEST)
    versions = found.versions | {"imported by": f"autoeval {__version__}", "imported from": str(directory)}
    evaluation = Evaluation(found.evaluator, 0.0, found.scores, versions)
    return Result(
        version=VERSION, ticket=_digest([asked, content]), generation=0, runner=store.IMPORTER, status="ok",
        suite=found.suite, suite_digest="", suite_text="", run=run, checkpoint=found.model,
        checkpoint_digest=_digest([found.evaluator, found.model, run.id, found.step]),  # for the weights: none are here
        step=found.step, tokens=tokens, saved_at=at, started_at=at, finished_at=at, evaluations=(evaluation,),
    )  # fmt: skip


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
