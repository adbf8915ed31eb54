"""What MLflow, trackio and TensorBoard have in common: values at steps, and which of them a store holds already.

A value is a result's by its name, its step and the time at which its evaluation ended. These come from the result
alone, so that publishing again, by whoever, gives the same value, and a store that holds it is left as it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from autoeval_hooks.relay_files import TOKENS_AXIS, Point
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.results.schema import Result
from eval_runner.sinks.base import Standing, State, point

DONE, FAILED, BUSY, REFUSED = 0, 1, 75, 78
"""How a tracker's process ends: done; try again; another is at it; the configuration must change."""


class Refused(Exception):
    """No other try will do better."""


class Value(NamedTuple):
    """One value in a store: `at` is when its evaluation ended, in milliseconds since the epoch."""

    key: str
    step: int
    at: int
    value: float


@dataclass(frozen=True)
class Entry:
    """What is to be shown of one result."""

    run: RunIdentity
    suite: str
    generation: int
    at: int
    point: Point

    @property
    def name(self) -> str:
        """No two attempts have the same."""
        return f"{self.point.ticket}~g{self.generation}"

    def metrics(self) -> dict[str, float]:
        """What is logged: the point's metrics, and ``bench/tokens`` (billions) where they are known."""
        tokens = {} if self.point.tokens is None else {TOKENS_AXIS: self.point.tokens}
        return {**self.point.metrics, **tokens}


def entry(result: Result) -> Entry:
    """The entry of an ok result."""
    return Entry(result.run, result.suite, result.generation, round(result.finished_at * 1000), point(result))


Missing = list[tuple[Entry, list[Value]]]


class Store(Protocol):
    """A tracker, in a process of its own. Its methods may raise anything; Refused says that trying again is vain.

    `newest_wins`: it shows one value of a name at a step, the one with the latest `at`; else it shows all of them."""

    newest_wins: bool

    def wanted(self, entry: Entry) -> list[Value]:
        """What it would hold of the entry, by its own names and in its own precision."""

    def held(self, entries: Sequence[Entry], *, all_of_it: bool) -> list[Value]:
        """What it holds below ``bench/`` of the run of these entries, all of which are of one run; [] where it has no
        such run. Names that none of the entries has may be left out unless `all_of_it`."""

    def add(self, missing: Missing) -> None:
        """Log these values, of one run, which is made where it is not there; durable once it returns."""

    def probe(self) -> str:
        """What answers, in words. Raises where it cannot be written to; it is not changed."""


def absent(entries: Iterable[Entry], store: Store, held: Iterable[Value]) -> Missing:
    """What of the entries the store does not hold; entries that it holds are left out."""
    there = set(held)
    latest = _latest(there) if store.newest_wins else {}
    found = []
    for one in entries:
        values = [v for v in store.wanted(one) if v not in there and latest.get((v.key, v.step), v.at) <= v.at]
        there.update(values)        # what two entries share is logged once
        if values:
            found.append((one, values))
    return found


@dataclass
class _Held:
    """A store's content, by what is asked of it."""

    count: Counter[Value] = field(default_factory=Counter)
    at: Mapping[tuple[str, int, int], list[Value]] = field(default_factory=dict)
    latest: Mapping[tuple[str, int], int] = field(default_factory=dict)


def standings(entries: Sequence[Entry], store: Store, held: Sequence[Value]) -> list[Standing]:
    """How each entry stands, and what no entry accounts for; `entries` are all of one run."""
    at = defaultdict(list)
    for value in held:
        at[value[:3]].append(value)
    content = _Held(Counter(held), at, _latest(held) if store.newest_wins else {})
    found: list[Standing] = []
    accounted: set[tuple[str, int, int]] = set()
    for one in entries:
        wanted = store.wanted(one)
        state, says = _stands(wanted, content)
        accounted.update(v[:3] for v in wanted)
        found.append(Standing(one.run.key, one.suite, one.point.step, one.point.ticket, state, says))
    strange: dict[tuple[int, int], list[Value]] = defaultdict(list)
    for value in content.count:
        if value[:3] not in accounted:
            strange[value.step, value.at].append(value)
    key = entries[0].run.key if entries else ""
    return found + [Standing(key, "", step, "", "unknown", _shown(v)) for (step, _), v in sorted(strange.items())]


def _stands(wanted: Sequence[Value], held: _Held) -> tuple[State, str]:
    later = [v for v in wanted if held.latest.get((v.key, v.step), v.at) > v.at]
    if later and len(later) == len(wanted):
        return "shown", "a later result of this step stands in its place"
    mine = [v for v in wanted if v not in later]
    there = [v for v in mine if held.count[v]]
    if twice := [v for v in there if held.count[v] > 1]:
        return "twice", f"{twice[0].key} stands there {held.count[twice[0]]} times"
    other = [(v, held.at[v[:3]][0]) for v in mine if not held.count[v] and v[:3] in held.at]
    if other:
        told = [f"{v.key} is {found.value}, not {v.value}" for v, found in other]
        return "different", "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")
    if len(there) < len(mine):
        return "missing", f"{len(mine) - len(there)} of {len(mine)} values" if there else ""
    return "shown", ""


def _latest(held: Iterable[Value]) -> dict[tuple[str, int], int]:
    """When the newest evaluation ended that has a value of this name at this step."""
    latest: dict[tuple[str, int], int] = {}
    for value in held:
        latest[value.key, value.step] = max(value.at, latest.get((value.key, value.step), value.at))
    return latest


def _shown(values: Sequence[Value]) -> str:
    told = ", ".join(f"{v.key}={v.value}" for v in sorted(values)[:3])
    return f"no result accounts for these values: {told}"
