"""Where an import belongs: whose place it takes, and which series it joins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from eval_runner.results import store
from eval_runner.results.schema import Result, Score


@dataclass(frozen=True)
class Source:
    """Where an import comes from: `source.json` beside the record.

    `kind` is ``helm``, ``lm_eval`` or ``autoeval``, `directory` what was imported, at `imported_at` (seconds since the
    epoch), by version `autoeval` of this program. `files` has the sha256 of the files that were read by their path in
    it. `definitions` has the digest of how each benchmark was evaluated.
    """

    kind: str
    directory: str
    imported_at: float
    autoeval: str
    files: dict[str, str] = field(default_factory=dict)
    definitions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Import:
    """A result that was imported, or is to be."""

    result: Result
    source: Source

    @property
    def id(self) -> str:
        """Its ID, for people."""
        return self.result.ticket[:12]


@dataclass(frozen=True)
class Outcome:
    """What became of a checkpoint's results: ``imported``, ``known`` (nothing is new), or ``refused``."""

    state: Literal["imported", "known", "refused"]
    result: Result | None
    why: str = ""


def replaces(old: Import, new: Import, *, differing: bool) -> Outcome | bool:
    """Whether `new` takes the place of an import that stands, or why it is not imported. One place is one checkpoint's
    benchmark, evaluated in one way; `differing` values may take it only where the user says so."""
    a, b = old.result, new.result
    at = [(r.evaluations[0].evaluator, r.run.id, r.step) for r in (a, b)]
    if at[0] != at[1]:
        return False
    if a.checkpoint != b.checkpoint:
        what = f"step {b.step} of run {b.run.name} is {a.checkpoint} in {old.id}, and this is {b.checkpoint}"
        return Outcome("refused", b, f"{what}; give this a run of its own by --run NAME, or choose by --model")
    both = old.source.definitions.items() & new.source.definitions.items()
    if a.suite != b.suite or not both:
        return False
    more, names = old.source.definitions.items() - both, {name for name, _ in both}
    same = _of(a, names) == _of(b, names)
    if same and both == new.source.definitions.items() and (more or not differing):
        return Outcome("known", a, f"its scores stand in {old.id}")
    if more:
        what = f"{old.id} has scores of {_few(names)}, too, and others that this has not ({_few(n for n, _ in more)})"
        return Outcome("refused", b, f"{what}; `autoeval-runner import remove {old.id}`, or give this another "
                       "--suite NAME")  # fmt: skip
    if same or differing or a.ticket in store.replaced_by(b):
        return True
    return Outcome("refused", b, f"{old.id} has other scores of {_few(names)}; with --replace these take their place")


def series(standing: Iterable[Import], new: Import) -> tuple[str, str]:
    """The definition of the series that an import joins, digest and text; it comes with that of its own."""
    members: dict[str, list[Import]] = {}
    for old in standing:
        if (old.result.suite, old.source.kind) == (new.result.suite, new.source.kind):
            members.setdefault(old.result.suite_digest, []).append(old)
    asked = new.source.definitions
    fits: dict[str, tuple[int, bool]] = {}
    for digest, olds in members.items():
        known = {name: definition for old in olds for name, definition in old.source.definitions.items()}
        if all(known.get(name, definition) == definition for name, definition in asked.items()):
            fits[digest] = len(known.keys() & asked.keys()), any(o.result.run.id == new.result.run.id for o in olds)
    most = max(fits.values(), default=(0, False))
    best = [digest for digest in sorted(fits) if fits[digest] == most]
    if len(best) == 1 or most[0]:
        return best[0], members[best[0]][0].result.suite_text
    own = new.result.suite_digest
    while own in members:       # its founder was removed, and those that joined contradict it
        own = hashlib.sha256(own.encode()).hexdigest()
    return own, new.result.suite_text


def _of(result: Result, benchmarks: set[str]) -> set[Score]:
    return {score for score in result.scores if score.benchmark in benchmarks}


def _few(benchmarks: Iterable[str]) -> str:
    return ", ".join(sorted(benchmarks)[:3])
