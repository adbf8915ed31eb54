"""Is one checkpoint better than another? Two checkpoints, score by score, on the same instances where it can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner.recorder import metrics
from eval_runner.results import board_source, leaderboard, pairs
from eval_runner.results.bootstrap import RESAMPLES
from eval_runner.results.comparisons import Reader
from eval_runner.results.pairs import Tested
from eval_runner.results.schema import Instance, Result, Score
from eval_runner.results.series import Row, change, comparable, definition, rows
from eval_runner.results.statistics import ALPHA, Verdict

Correction = Literal["holm", "bh", "none"]
MIN_PREFIX = 6
"""Characters of a ticket that may stand for it."""


@dataclass(frozen=True)
class Side:
    """A checkpoint, `name` as ``RUN@STEP``, with its scores."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Pair:
    """One score of both. `adjusted` is the p-value with the correction for many tests, by which the verdict is made;
    `note` says why there is none, or what to know of it."""

    suite: str
    benchmark: str
    metric: str
    split: str
    higher_is_better: bool | None
    old: Score | None
    new: Score | None
    tested: Tested | None = None
    adjusted: float | None = None
    verdict: Verdict | Literal["not comparable"] = "not comparable"
    note: str = ""


@dataclass(frozen=True)
class Compared:
    """`sentence` says what came out; `problems` which files could not be read."""

    a: str
    b: str
    correction: Correction
    pairs: tuple[Pair, ...]
    sentence: str
    problems: tuple[str, ...]

    def count(self, verdict: str) -> int:
        return sum(pair.verdict == verdict for pair in self.pairs)


def find(results: Sequence[Result], called: str) -> Side:
    """The checkpoint that is called ``[RUN@]STEP``, ``RUN@latest``, ``RUN@best`` or by the beginning of a ticket, with
    the scores of all suites (of a ticket, its own).

    `best` is the step with the highest mean win rate among the run's steps, of those with the most benchmarks. Raises
    ConfigError where it is none, or may be several.
    """
    table = rows(results)
    run, at, what = called.rpartition("@")
    if not at:
        runs = sorted({row.run for row in table if not row.superseded})
        number = what.isdecimal() and any(row.result.step == int(what) for row in table)
        if not number and what not in ("latest", "best") and len(what) >= MIN_PREFIX:
            return _by_ticket(table, what)
        if len(runs) > 1:
            raise ConfigError(f"{called!r}: there are several runs, so write RUN@{what}; they are {', '.join(runs)}")
        run = runs[0] if runs else ""
    mine = [row for row in table if row.run == (run := _run(table, run))]
    steps = sorted({row.result.step for row in mine})
    if not steps:
        raise ConfigError(f"{called!r}: there are no results yet")
    if what == "latest":
        step = steps[-1]
    elif what == "best":
        step = _best(mine)
    elif what.isdecimal():
        step = int(what)
    else:
        raise ConfigError(f"{called!r}: is no [RUN@]STEP, RUN@latest, RUN@best or ticket; {run} has {_steps(steps)}")
    if step not in steps:
        raise ConfigError(f"{called!r}: {run} has no scores at step {step}; it has {_steps(steps)}")
    return Side(f"{run}@{step}", tuple(row for row in mine if row.result.step == step))


def compare(
    a: Side, b: Side, instances: Callable[[Result], Iterable[Instance]], *, suite: str = "",
    wanted: Sequence[str] = (), correction: Correction = "holm", resampled: bool = False,
) -> Compared:  # fmt: skip
    """What changed from `a` to `b`, over all scores or those of a `suite` and those that are `wanted`
    (``benchmark.METRIC``). `resampled`: by the paired bootstrap. Raises ConfigError where nothing is chosen, and where
    the bootstrap could not find a single difference among so many scores."""
    reader = Reader(instances)
    old, new = _scores(a), _scores(b)
    keys = [key for key in dict.fromkeys([*old, *new]) if _chosen(key, suite, wanted)]
    if not keys:
        known = {f"{key[0]}: {key[1]}.{key[2]}" for key in [*old, *new]}
        raise ConfigError(f"{a.name} and {b.name} have no such score; they have {', '.join(sorted(known))}")
    found = [_pair(key, old.get(key, ()), new.get(key, ()), reader, resampled=False) for key in keys]
    if resampled:
        _enough(sum(pair.tested is not None for pair in found), correction)
        found = [_pair(key, old.get(key, ()), new.get(key, ()), reader, resampled=True) for key in keys]
    tested = [pair for pair in found if pair.tested is not None]
    adjusted = pairs.CORRECTIONS[correction]([pair.tested.difference.p for pair in tested if pair.tested])
    by_pair = {id(pair): p for pair, p in zip(tested, adjusted, strict=True)}
    judged = tuple(_judged(pair, by_pair.get(id(pair))) for pair in found)
    return Compared(a.name, b.name, correction, judged, _sentence(a.name, b.name, judged), tuple(reader.problems))


# ---------------------------------------------------------------------- which checkpoint


def _run(table: Sequence[Row], called: str) -> str:
    """The name in our tables of the run with this name or id."""
    names: dict[str, set[str]] = {}
    for row in table:
        ids = () if row.superseded else (row.result.run.id, row.result.run.wandb_id, row.result.run.name)
        for name in (row.run, *ids):
            names.setdefault(name, set()).add(row.run)
    found = {called} & names.keys() and ({called} if called in {row.run for row in table} else names[called])
    if table and not found:
        raise ConfigError(f"{called!r}: no result is of a run called so{near(called, names)}")
    if len(found) > 1:
        raise ConfigError(f"{called!r}: several runs are called so: {', '.join(sorted(found))}")
    return next(iter(found), called)


def _by_ticket(table: Sequence[Row], prefix: str) -> Side:
    found = {row.result.ticket for row in table if row.result.ticket.startswith(prefix.lower())}
    if not found:
        raise ConfigError(f"{prefix!r}: no run has scores at such a step, and no ticket with scores begins so")
    if len(found) > 1:
        raise ConfigError(f"{prefix!r}: {len(found)} tickets begin so; write more of it")
    mine = tuple(row for row in table if row.result.ticket in found)
    return Side(f"{mine[0].run}@{mine[0].result.step}", mine)


def _best(mine: Sequence[Row]) -> int:
    unique = {id(row.result): row.result for row in mine if not row.superseded}
    read = board_source.read(unique.values())
    (best,) = leaderboard.choose(read.entries, read.columns, "best") or (None,)
    if best is None or not any(column.higher_is_better is not None for column in read.columns):
        raise ConfigError(f"{mine[0].run}@best: it is known of no score whether more is better; name the step")
    return best.step


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[-10:]))
    return f"steps {shown}" if len(steps) <= 10 else f"{len(steps)} steps, the last {shown}"


# ---------------------------------------------------------------------- which scores

Key = tuple[str, str, str, str]
"""Suite, without the digest of a definition, benchmark, metric, split."""


def _scores(side: Side) -> Mapping[Key, Sequence[Row]]:
    """The scores of each key, one for each definition of its suite."""
    out: dict[Key, list[Row]] = {}
    for row in sorted(side.rows, key=lambda row: (row.result.suite, row.place)):
        out.setdefault((row.result.suite, *row.key[1:]), []).append(row)
    return out


def _chosen(key: Key, suite: str, wanted: Sequence[str]) -> bool:
    return suite in ("", key[0]) and (not wanted or any(metrics.matches(name, key[1], key[2]) for name in wanted))


def _pair(key: Key, old: Sequence[Row], new: Sequence[Row], reader: Reader, *, resampled: bool) -> Pair:
    alike = [(a, b) for a in old for b in new if definition(a.result) == definition(b.result)]
    a, b = alike[-1] if alike else (old[-1] if old else None, new[-1] if new else None)
    shown = b or a
    pair = Pair(*key, shown.score.higher_is_better if shown else None, a.score if a else None, b.score if b else None)
    if a is None or b is None:
        return replace(pair, note=f"{'A' if a is None else 'B'} has no such score")
    if not alike:
        if a.result.suite_digest != b.result.suite_digest:
            return replace(pair, note="the suite's definition is another")
        return replace(pair, note="the evaluators read other files, such as questions")
    if not comparable(a, b):
        return replace(pair, note=f"the judge is another: {change(a, b)}")
    before, after = reader.of(a), reader.of(b)
    if before and after:
        common = len(before.keys() & after.keys())
        if common < 2:
            few = f"too few instances: {common}"
            other = f"other questions: {common} of {len(before)} are in both"
            return replace(pair, note=few if common == len(before) == len(after) else other)
        some = f"on the {common} instances that both have" if common < max(len(before), len(after)) else ""
        return replace(pair, tested=pairs.by_pairs(before, after, resampled=resampled), note=some)
    note = "not paired: no per-instance values" + (", so no bootstrap" if resampled else "")
    return replace(pair, tested=pairs.by_errors(a.score, b.score), note=note)


def _enough(tests: int, correction: Correction) -> None:
    if correction != "none" and pairs.LEAST_P * tests >= ALPHA:
        raise ConfigError(
            f"--bootstrap: {RESAMPLES} resamples tell no p below {pairs.LEAST_P:.2g}, so that of {tests} scores no "
            "single one could be told from noise; choose fewer by --suite or --metric, or leave --bootstrap out"
        )


def _judged(pair: Pair, adjusted: float | None) -> Pair:
    if pair.tested is None or adjusted is None:
        known = pair.old is not None and pair.new is not None and pair.note.startswith("not paired")
        return replace(pair, verdict="not tested" if known else "not comparable")
    verdict = replace(pair.tested.difference, p=adjusted).verdict(pair.higher_is_better)
    return replace(pair, adjusted=adjusted, verdict=verdict)


# ---------------------------------------------------------------------- in words


def _sentence(a: str, b: str, found: Sequence[Pair]) -> str:
    count = Counter(pair.verdict for pair in found)
    tested = sum(pair.adjusted is not None for pair in found)
    left = len(found) - tested
    rest = f"; {left} could not be compared" if left else ""
    if not tested:
        return f"{b} cannot be compared with {a}: no score could be tested."
    if not tested - count["within noise"]:
        return f"{b} and {a} differ by no more than noise on {_of(tested)}{rest}."
    parts = [
        f"{word} on {count[word]}{_named(found, word)}"
        for word in ("better", "worse", "higher", "lower") if count[word]
    ]  # fmt: skip
    noise = f", within noise on {count['within noise']}" if count["within noise"] else ""
    return f"{b} against {a}, on {_of(tested)}: {', '.join(parts)}{noise}{rest}."


def _of(tested: int) -> str:
    return f"{tested} score{'s' if tested > 1 else ''}"


def _named(found: Sequence[Pair], word: str) -> str:
    names = [f"{pair.benchmark}.{pair.metric}" for pair in found if pair.verdict == word]
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
