"""Results of another queue, or a copy of its `results/`: taken over as they are, each once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError, QueueError
from eval_runner.results import store
from eval_runner.results.importing import base
from eval_runner.results.importing.places import Outcome, Source
from eval_runner.results.importing.publish import SOURCE, Imports, source_of
from eval_runner.results.schema import Result

_ATTEMPT = re.compile(r"(?P<ticket>[0-9a-f]{64})~g(?P<generation>[0-9]{1,9})~(?P<runner>[A-Za-z0-9._-]{1,100})")


@dataclass(frozen=True)
class Copy:
    """A result of another queue, and where it lies."""

    result: Result
    path: Path


def find(directory: Path, suite: str) -> tuple[list[Copy], list[str]]:
    """The ok results of a queue, or of a directory of result directories, and a line for each that cannot be read.

    Of a queue those that count are taken; where no tokens say which these are, the last attempt of each ticket.
    """
    if (directory / "done").is_dir() and (directory / "pending").is_dir():
        contents = store.collect(directory)
        found = [Copy(r, store.path_of(directory, r)) for r in contents.results]
        problems = list(contents.problems)
    else:
        found, problems = _loose(directory)
    ok = [copy for copy in found if copy.result.status == "ok" and suite in ("", copy.result.suite)]
    return sorted(ok, key=lambda c: (c.result.run.name, c.result.suite, c.result.step, c.result.ticket)), problems


def _loose(directory: Path) -> tuple[list[Copy], list[str]]:
    last: dict[str, Copy] = {}
    problems: list[str] = []
    for here, files in base.walk(directory, problems):
        attempt = _ATTEMPT.fullmatch(here.name)
        if store.RECORD not in files or attempt is None:
            continue
        try:
            result = store.read(here, remedy="is the copy complete?")
            if (result.ticket, str(result.generation), result.runner) != attempt.groups():
                raise AutoEvalError(f"{here}: holds the record of another attempt")
        except AutoEvalError as error:
            problems.append(str(error))
            continue
        known = last.get(result.ticket)
        if result.status == "ok" and (known is None or known.result.generation < result.generation):
            last[result.ticket] = Copy(result, here)
    return list(last.values()), problems


def evaluated(queue_root: Path) -> frozenset[str]:
    """The tickets of which the queue has a result of its own."""
    try:
        return frozenset(result.ticket for result in store.done(queue_root)[0])
    except QueueError:
        return frozenset()


def take(imports: Imports, copy: Copy, own: Iterable[str]) -> Outcome:
    """Take a result over. Raises AutoEvalError for one whose values or texts cannot be read, OSError where the file
    system fails."""
    if copy.result.ticket in own:
        return Outcome("known", copy.result, "this queue evaluated it itself")
    files = {path.name: base.digest(path) for path in sorted(copy.path.iterdir()) if path.name != SOURCE}
    source: Source | None = None
    if copy.result.runner == store.IMPORTER:
        source = source_of(copy.path)
    return imports.copy(
        copy.result, copy.path.parent, files, list(store.instances(copy.path)), list(store.details(copy.path)), source
    )
