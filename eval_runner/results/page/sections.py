"""The sections of the report, each a function from what it shows to its markup."""

from __future__ import annotations

import statistics as averages
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from eval_runner.results.comparisons import Comparison, Latest
from eval_runner.results.page.markup import Safe, el, join
from eval_runner.results.page.words import ARROWS, NONE, billions, duration, minus, number, plural, time
from eval_runner.results.schema import Failure, Score
from eval_runner.results.series import ANCHORS, Row, judge_changes
from eval_runner.results.statistics import ALPHA, bounds
from eval_runner.results.store import Contents

REASONS = {
    "transient": "Tried again without success",
    "checkpoint": "The checkpoint cannot be evaluated",
    "configuration": "The configuration must be changed",
}
BY_CATEGORY = "By category"
NOTES = """Bars in the charts are 95 % intervals: the evaluator's own where it gives one (a judge's scores have the
bootstrap's over questions, at least Wilson's where few of them differ), else ± 1.96 standard errors, or Wilson's
interval where a score is a proportion of right answers. Tables give value ± standard error, or the interval in brackets
where that error is 0. A score that is a link leads to its questions, answers and reviews.
“Better”, “worse”, “higher” and “lower” mean that the difference to the other checkpoint on the same instances has
p < 0.05 (paired t test; McNemar's exact test for right and wrong answers); anything else is within noise. The errors
are those of the choice of instances, not of another training run. The best of many earlier checkpoints was partly
lucky, so expect some “worse” against it. Where the judge changed between two checkpoints, as it reports its own name,
their scores are not compared, the charts have a dashed line, and the best earlier checkpoint is the best by the same
judge. A suite's name followed by @ and a digest is an earlier definition of it."""


def header(contents: Contents, table: Sequence[Row], csv_link: str) -> Safe:
    runs = sorted({row.run for row in table if not row.superseded})
    names = ", ".join(runs) if runs else "no runs yet"
    facts = _facts(contents, table, len(runs))
    cards = el("dl", *(el("div", el("dt", a), el("dd", b, el("small", c))) for a, b, c in facts), class_="facts")
    link = el("p", "All scores as ", el("a", "CSV", href=csv_link), ".", class_="small soft csv")
    return el(
        "header", el("h1", "Checkpoint scores"), el("p", names, class_="runs"),
        cards if facts else "", link if csv_link else "",
    )  # fmt: skip


def _facts(contents: Contents, table: Sequence[Row], runs: int) -> list[tuple[str, str, str]]:
    """(what, value, detail)"""
    facts = []
    if ok := [r for r in contents.results if r.status == "ok"]:
        timed, last = [r for r in ok if r.timed], max(ok, key=lambda r: r.finished_at)
        checkpoints = {(r.run.id, r.step, r.checkpoint_digest) for r in ok}
        facts = [
            ("Checkpoints evaluated", str(len(checkpoints)), f"up to step {max(r.step for r in ok):,}"),
            ("Benchmarks", str(len({row.key[:2] for row in table})), f"in {plural(runs, 'run')}"),
        ]
        if timed:
            lags = [r.lag_s for r in timed]
            facts += [
                ("Save to scores", duration(averages.median(lags)), f"median; at most {duration(max(lags))}"),
                ("Evaluation itself", duration(averages.median(r.eval_s for r in timed)), "median"),
            ]
        facts.append(("Last result", *time(last.finished_at)))
        if judges := {judge for r in ok for e in r.evaluations if (judge := e.versions.get("judge"))}:
            facts.append(("Judged by", ", ".join(sorted(judges)), "as it reports its own name"))
        facts += _usage([e.usage for r in ok for e in r.evaluations if e.usage])
    if count := len(_failures(contents)):
        facts.append(("Failed", str(count), "reasons below"))
    return facts


def _usage(usages: Sequence[Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """What services that are paid for were asked, over all results."""
    if not usages:
        return []
    total: Counter[str] = Counter()
    for usage in usages:
        total.update(usage)
    asked, known = int(total["requests"]), f"{int(total['cached']):,} known before"
    told = f"{asked:,} asked, {known}"
    if not any("cost_usd" in usage for usage in usages):
        return [("Judge and models", plural(asked, "request"), told)]
    priced = int(sum(usage.get("requests", 0) for usage in usages if "cost_usd" in usage))
    if priced < asked:
        told = f"for {priced:,} of {asked:,} requests; the price of the others is not known; {known}"
    return [("Judge and models", f"${total['cost_usd']:,.2f}", told)]


def problems(found: Sequence[str]) -> Safe:
    if not found:
        return Safe("")
    text = el("strong", f"{plural(len(found), 'file')} could not be read, so what they hold is missing below.")
    return el("section", text, el("ul", *(el("li", p) for p in found)), class_="notice", role="alert")


def nothing_yet() -> Safe:
    return el("p", "No scores yet. They appear here once a checkpoint has been evaluated.", class_="empty")


Links = Mapping[tuple[str, int, str, str], str]
"""Where the questions behind a score are shown: by the result's ticket, generation and runner, and the benchmark."""


def latest(compared: Sequence[Latest], links: Links) -> Safe:
    """Each run's latest scores, and whether they differ from the previous and from the best ones; what fell first."""
    runs = list(dict.fromkeys(item.row.run for item in compared))
    tables = []
    for run in runs:
        mine = sorted((item for item in compared if item.row.run == run), key=_urgency)
        head = _head("Benchmark", "Step", "Score", "Against the previous checkpoint", "Against the best earlier one")
        parts = _parts([item.row for item in mine])
        folded = [item for item in mine if item.row.key in parts]
        lines = [_latest_line(item, links) for item in mine if item.row.key not in parts]
        table = _table("", head, lines, label=f"Latest scores of {run}", stack=True)
        if folded:
            lines = [_latest_line(item, links) for item in folded]
            more = _table("", head, lines, label=f"Latest scores of {run} by category", stack=True)
            table = join(table, el("details", el("summary", BY_CATEGORY, "  ", _tally(folded)), more))
        tables.append(el("details", el("summary", run, "  ", _tally(mine)), table, open=len(runs) <= 2))
    note = el("p", _chance(compared), class_="small soft")
    return el("section", el("h2", "Latest checkpoint"), *tables, note, aria_label="Latest checkpoint")


def _tally(items: Sequence[Latest]) -> Safe:
    tally = Counter(item.previous.verdict for item in items if item.previous)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in tally.items())
    return el("span", f"against the previous checkpoint: {summary}" if summary else "", class_="soft small")


def _parts(table: Sequence[Row]) -> set[tuple[str, str, str, str]]:
    """The keys of ``NAME.CATEGORY`` where NAME is a benchmark, too. Anchors are no category."""
    whole = {row.key[:2] for row in table}

    def part(suite: str, benchmark: str) -> bool:
        names = [benchmark[:i] for i, letter in enumerate(benchmark) if letter == "."]
        return not benchmark.endswith(f".{ANCHORS}") and any((suite, name) in whole for name in names)

    return {row.key for row in table if part(*row.key[:2])}


def _latest_line(item: Latest, links: Links) -> list[Safe]:
    row = item.row
    return [
        el("th", _name(row), scope="row"),
        el("td", f"{row.result.step:,}", class_="num", data_label="Step"),
        el("td", _linked(row, links), _n(row.score), data_label="Score"),
        el("td", *_verdict(item.previous), data_label="Previous"),
        el("td", *_best(item), data_label="Best earlier"),
    ]


def _urgency(item: Latest) -> int:
    order = ("worse", "better")
    verdict = item.previous.verdict if item.previous else ""
    return order.index(verdict) if verdict in order else len(order)


def _chance(compared: Sequence[Latest]) -> str:
    tests = {(id(i), id(c.against)) for i in compared for c in (i.previous, i.best) if c and c.difference}
    if not tests:
        return "Nothing to compare yet." if not any(i.previous for i in compared) else ""
    return (
        f"{plural(len(tests), 'comparison')}: if nothing had changed, about {len(tests) * ALPHA:.2g} of them would "
        "still show a difference by chance."
    )


def _best(item: Latest) -> list[Safe | str]:
    if item.best is None and item.previous is not None:
        return [el("small", "no direction is known to be better")]
    if item.best and item.previous and item.best.against is item.previous.against:
        return [el("small", "the previous one is the best")]
    return _verdict(item.best)


def _verdict(c: Comparison | None) -> list[Safe | str]:
    if c is None:
        return [el("small", "first checkpoint")]
    badge = el("span", c.verdict, class_=f"badge {c.verdict if c.verdict in ('better', 'worse') else 'noise'}")
    where = f"step {c.against.result.step:,}"
    if (d := c.difference) is None:
        return [badge, el("small", f"{where}; {c.note}", class_="detail")]
    p = f"p = {d.p:.2g}" if d.p >= 0.001 else "p < 0.001"
    how = f"unpaired: {c.note}" if c.note else f"n = {d.n:,}"
    change = ("+" if d.value > 0 else "") + number(d.value, d.stderr)
    return [badge, change, el("small", f"{where}, {p}, {how}", class_="detail")]


def charts(drawn: dict[str, Any]) -> Safe:
    """The frames that page.js draws into, with the buttons that choose what they show."""
    figures = []
    for index, chart in enumerate(drawn["charts"]):
        title, names = chart["title"], [m["name"] for m in chart["metrics"]]
        what = el("span", names[0], class_="soft small")
        if len(names) > 1:
            what = el("select", *(el("option", n) for n in names), aria_label=f"Metric of {title}")
        direction = el("span", chart["metrics"][0]["direction"], class_="direction soft small")
        caption = el("figcaption", el("h3", title), el("span", what, "  ", direction))
        plot = el("div", class_="plot", role="img", aria_label=f"{title} over training; its numbers are in All scores")
        figures.append(el("figure", caption, plot, data_chart=str(index)))
    runs = [
        _button(str(i), True, el("i", style=f"background:{run['color']}"), run["name"])
        for i, run in enumerate(drawn["runs"])
    ]
    axes = [_button(name, name == "step", name) for name in ("step", "tokens")]
    bar = [
        el("div", *runs, class_="legend", role="group", aria_label="Runs shown") if len(runs) > 1 else "",
        el("div", *axes, class_="axis", role="group", aria_label="Horizontal axis") if drawn["tokens"] else "",
    ]
    noscript = el("noscript", el("p", "The charts need JavaScript; the tables do not.", class_="soft"))
    return el(
        "section", el("h2", "Scores over training"), el("div", *bar, class_="bar"), noscript,
        el("div", *figures, class_="charts"), aria_label="Charts",
    )  # fmt: skip


def _button(value: str, pressed: bool, *children: str) -> Safe:
    return el("button", *children, type="button", value=value, aria_pressed=str(pressed).lower())


def _failures(contents: Contents) -> list[tuple[str, str, str, str, str, str]]:
    """(run, suite, step, why in words, message, attempts and log) of every ticket that ended without scores."""
    found = []
    for f in contents.failed:
        why = "Refused: it could not be trusted" if f.state == "quarantine" else _why(f.failure)
        step = NONE if f.step is None else f"{f.step:,}"
        found.append((f.run or NONE, f.suite or NONE, step, why, f.failure.message, _tail(f.attempts, f.failure)))
    for r in contents.results:
        if r.status == "failed" and r.failure:
            run, tail = r.run.name or r.run.id, _tail(r.generation + 1, r.failure)
            found.append((run, r.suite, f"{r.step:,}", _why(r.failure), r.failure.message, tail))
    return found


def _why(failure: Failure) -> str:
    return REASONS.get(failure.kind, failure.kind)


def _tail(attempts: int, failure: Failure) -> str:
    return plural(attempts, "attempt") + (f"; log: {failure.log}" if failure.log else "")


def failed(contents: Contents) -> Safe:
    found = _failures(contents)
    if not found:
        return Safe("")
    lines = []
    for run, suite, step, why, message, tail in found:
        reason = el("td", el("strong", why), Safe("<br>"), message, el("small", tail, class_="detail"), class_="wrap")
        place = el("td", step, class_="num", data_label="Step")
        lines.append([el("th", run, scope="row"), el("td", suite, data_label="Suite"), place, reason])
    head = _head("Run", "Suite", "Step", "Why")
    table = _table("Tickets that ended without scores", head, lines, stack=True)
    return el("section", el("h2", "Failed"), table, aria_label="Failed")


def scores(table: Sequence[Row], links: Links) -> Safe:
    """A table for each run, and one of its categories: steps, the latest first, by benchmarks."""
    tables = []
    judges = {(run, step): change for (run, _, step), change in judge_changes(table).items()}
    for run in dict.fromkeys(row.run for row in table if not row.superseded):
        mine = [row for row in table if row.run == run]
        parts = _parts(mine)
        changes = {step: change for (name, step), change in judges.items() if name == run}
        tables.append(_by_step(run, [row for row in mine if row.key not in parts], changes, links))
        if folded := [row for row in mine if row.key in parts]:
            more = _by_step(f"{run}, by category", folded, changes, links)
            tables.append(el("details", el("summary", BY_CATEGORY), more))
    return el("section", el("h2", "All scores"), *tables, aria_label="All scores")


def _by_step(caption: str, mine: Sequence[Row], judges: Mapping[int, str], links: Links) -> Safe:
    sizes: dict[tuple[str, str, str, str], set[int]] = {}
    for row in mine:
        sizes.setdefault(row.key, set()).add(row.score.n)
    several = len({key[0] for key in sizes}) > 1
    titles = [_score_title(key, several, found) for key, found in sizes.items()]
    tokens = any(row.result.tokens is not None for row in mine)
    step_title = el("th", "Step", scope="col", class_="num pin")
    token_title = el("th", "Tokens", el("small", "billions"), scope="col", class_="num") if tokens else Safe("")
    cells = {(row.result.step, row.key): row for row in mine}
    points = {row.result.step: row.result for row in mine}
    lines = [
        [el("th", f"{step:,}", _judge(judges.get(step)), scope="row", class_="num pin",
            title=points[step].checkpoint),
         _number_cell(billions(points[step].tokens)) if tokens else Safe(""),
         *(_score_cell(cells.get((step, key)), len(found) > 1, links) for key, found in sizes.items())]
        for step in sorted(points, reverse=True)
    ]  # fmt: skip
    return _table(caption, [step_title, token_title, *titles], lines)


def _judge(change: str | None) -> Safe:
    return el("small", f"judge changed: {change}", class_="detail soft") if change else Safe("")


def superseded(table: Sequence[Row], links: Links) -> Safe:
    old = [row for row in table if row.superseded]
    if not old:
        return Safe("")
    lines = [
        [el("td", row.run), _number_cell(f"{row.result.step:,}"), el("td", _name(row)), _score_cell(row, True, links)]
        for row in old
    ]
    count = plural(len({(row.run, row.result.step) for row in old}), "earlier checkpoint")
    why = "Training wrote these steps again later. The charts show the checkpoint that was evaluated last."
    head = _head("Run@checkpoint", "Step", "Benchmark", "Score")
    shown = _table("", head, lines, label="Earlier checkpoints")
    return el("details", el("summary", f"Scores of {count}"), el("p", why, class_="soft"), shown)


def reading() -> Safe:
    return el("footer", el("h2", "How to read this"), el("p", NOTES))


# ---------------------------------------------------------------------- cells


def _table(
    caption: str, head: Sequence[Safe], lines: Sequence[Sequence[Safe]], *, label: str = "", stack: bool = False
) -> Safe:
    """A table that scrolls inside its frame; one that stacks shows its rows as blocks where the window is narrow.

    `label` is what a screen reader calls it, where there is no caption.
    """
    body = el("tbody", *(el("tr", *line) for line in lines))
    title = el("caption", caption) if caption else ""
    table = el("table", title, el("thead", el("tr", *head)), body)
    kind = "scroll stack" if stack else "scroll"
    return el("div", table, class_=kind, tabindex="0", role="region", aria_label=label or caption)


def _head(*titles: str) -> list[Safe]:
    return [el("th", t, scope="col", class_="num" if t == "Step" else False) for t in titles]


def _number_cell(text: str) -> Safe:
    return el("td", text, class_="num")


def _score_title(key: tuple[str, str, str, str], with_suite: bool, sizes: set[int]) -> Safe:
    """`sizes` are the numbers of instances in its column; where there is one, it stands here and not in each cell."""
    suite, benchmark, metric, split = key
    detail = (f"{suite} · " if with_suite else "") + f"{metric} ({split})"
    size = el("small", f"n = {sizes.copy().pop():,}") if len(sizes) == 1 else ""
    return el("th", benchmark, el("small", detail), size, scope="col")


def _score_cell(row: Row | None, with_n: bool, links: Links) -> Safe:
    if row is None:
        return el("td", NONE, title="no score")
    return el("td", _linked(row, links), _n(row.score) if with_n else "")


def _linked(row: Row, links: Links) -> str:
    """The score, as a link where its questions are shown."""
    r, shown = row.result, _shown(row.score)
    href = links.get((r.ticket, r.generation, r.runner, row.score.benchmark), "")
    return el("a", shown, href=href) if href else shown


def _name(row: Row) -> Safe:
    suite, benchmark, metric, split = row.key
    arrow = ARROWS[row.score.higher_is_better][:1]
    return join(benchmark, Safe("<br>"), el("small", f"{suite} · {metric} ({split}) {arrow}", class_="soft"))


def _shown(s: Score) -> str:
    """``0.812 ± 0.013``, or the interval where the standard error is 0, and says nothing, or not known."""
    ends = bounds(s)
    if not s.stderr and ends and ends[0] < ends[1]:
        return minus(f"{s.value:.4g} [{ends[0]:.2g}, {ends[1]:.2g}]")
    return number(s.value, s.stderr)


def _n(s: Score) -> Safe:
    return el("small", f"  n = {s.n:,}")
