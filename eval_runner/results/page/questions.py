"""A benchmark's questions with their answers and reviews, as pages without a script that need no network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template

from eval_runner.results.page.markup import Safe, el, join
from eval_runner.results.page.words import minus, number, plural
from eval_runner.results.schema import Detail, Result, Score
from eval_runner.results.statistics import bounds

MAX_PAGE_CHARS = 4_000_000
"""Of texts on one page, which a browser opens at once; what is more goes on another."""
MAX_FILTERS = 30
"""Outcomes or categories that can be chosen by; for more of them there is no choice."""
MAX_PREVIEW = 140
"""Characters of the question that stand beside its outcome."""
SOURCES = ("questions.py", "questions.html", "questions.css", "page.css", "markup.py", "words.py")
"""All that a page is made of, beside the result."""

BADGES = {"win": "better", "loss": "worse"}


def pages(result: Result, benchmark: str, details: Sequence[Detail], names: Sequence[str]) -> list[str]:
    """The pages' HTML, one for each of `split(details)`, which will lie side by side under these `names`."""
    parts = split(details)
    return [_page(result, benchmark, part, names, index) for index, part in enumerate(parts)]


def split(details: Sequence[Detail]) -> list[list[Detail]]:
    """The details of each page, in their order."""
    parts: list[list[Detail]] = [[]]
    size = 0
    for d in details:
        own = sum(len(heading) + len(text) for heading, text in d.texts)
        if parts[-1] and size + own > MAX_PAGE_CHARS:
            parts.append([])
            size = 0
        parts[-1].append(d)
        size += own
    return parts


def _page(result: Result, benchmark: str, details: Sequence[Detail], names: Sequence[str], index: int) -> str:
    outcomes, categories = _numbered(d.outcome for d in details), _numbered(d.category for d in details)
    filters, style = [], _file("page.css") + _file("questions.css")
    for letter, found, counts in (
        ("o", outcomes, Counter(d.outcome for d in details)), ("c", categories, Counter(d.category for d in details)),
    ):  # fmt: skip
        if not 1 < len(found) <= MAX_FILTERS:
            continue
        filters.append(el("br"))
        for word, place in found.items():
            key = f"{letter}{place}"
            filters.append(el("input", type="checkbox", class_="filter", id=key, checked=True))
            filters.append(el("label", word, el("small", f"  {counts[word]}", class_="soft"), for_=key))
            style += f"#{key}:not(:checked) ~ .questions > .{key} {{ display: none; }}\n"
    questions = [_question(d, f"o{outcomes[d.outcome]} c{categories[d.category]}") for d in details]
    name = result.run.name or result.run.id
    where = f"{name} · {result.suite} · step {result.step:,} · {os.path.basename(result.checkpoint.rstrip('/'))}"
    if judge := _judge(result, benchmark):
        where += f" · judged by {judge}"
    cards = el("dl", *(_card(s) for s in result.scores if s.benchmark == benchmark), class_="facts")
    body = join(
        el("p", el("a", "All scores", href="../index.html"), class_="back"),
        el("header", el("h1", benchmark), el("p", where, class_="runs"), cards),
        _others(names, index), *filters, el("main", *questions, class_="questions"),
    )  # fmt: skip
    title = join(f"{benchmark} at step {result.step:,}")
    return Template(_file("questions.html")).substitute(title=title, style=style, body=body)


def _question(d: Detail, classes: str) -> Safe:
    preview = " ".join(d.texts[0][1].split()) if d.texts else ""
    preview = preview if len(preview) <= MAX_PREVIEW else preview[:MAX_PREVIEW] + "…"
    badge = el("span", d.outcome, class_=f"badge {BADGES.get(d.outcome, 'noise')}")
    about = el("small", f"{d.id} · {d.category}  ", class_="soft")
    texts = (el("section", el("h2", heading), el("pre", text, dir="auto")) for heading, text in d.texts)
    return el("details", el("summary", badge, about, preview), el("div", *texts, class_="texts"), class_=classes)


def _judge(result: Result, benchmark: str) -> str:
    """The models that judged it, as they call themselves; "" where none did."""
    mine = [e for e in result.evaluations if any(s.benchmark == benchmark for s in e.scores)]
    return ", ".join(sorted({judge for e in mine if (judge := e.versions.get("judge"))}))


def _card(s: Score) -> Safe:
    ends = bounds(s)
    between = f"95 %: {minus(f'{ends[0]:.3g}')} to {minus(f'{ends[1]:.3g}')}; " if ends else ""
    return el("div", el("dt", s.metric), el("dd", number(s.value, s.stderr), el("small", f"{between}n = {s.n:,}")))


def _others(names: Sequence[str], index: int) -> Safe:
    if len(names) < 2:
        return Safe("")
    links = [el("strong", str(i + 1)) if i == index else el("a", str(i + 1), href=n) for i, n in enumerate(names)]
    return el("p", f"{plural(len(names), 'page')}: ", *(join(link, " ") for link in links), class_="pages")


def _numbered(words: Iterator[str]) -> dict[str, int]:
    return {word: place for place, word in enumerate(sorted(set(words)))}


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
