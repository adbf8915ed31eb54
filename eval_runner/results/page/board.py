"""The leaderboard as a page that needs no network: a table that sorts by any column."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from string import Template
from typing import Any

from eval_runner.results.leaderboard import Board, Line
from eval_runner.results.page.markup import Safe, data, el, join
from eval_runner.results.page.words import ARROWS, NONE, minus, number, plural

PAGE = 200
"""Lines shown at once, and without JavaScript at all."""
RATE = 4
"""Where the win rate stands among the columns."""
STEPS = {"last": "the last step of each model", "best": "the best step of each model", "all": "all steps"}
NOTES = """Ranks are by the mean win rate, as HELM has it: the share of the other entries that an entry beats in a
column, a tie counting half, averaged over the columns in which it has a value. The rank's interval (95 %) counts who is
surely better and who is surely worse, given the standard errors of all scores; with many entries that are alike it is
wide. The best step of a model was partly lucky. The min-max sum is the score of Data-Juicer's recorder: (value - min) /
(max - min) over the entries here that have a value in every column, min at most 1 and max at least 0, summed over the
columns; it and the mean score are told of these entries only, and the mean only where more, or less, is better in all.
The sum moves with the entries that are shown. What is missing is no zero, and counts for nothing."""


def page(board: Board, csv_link: str) -> str:
    """The page's HTML; it depends on its input alone."""
    script = _file("board.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script may run and nothing may be loaded, even if a name's markup should get through.
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    style = _file("page.css") + _file("board.css")
    body = join(_header(board, csv_link), _notes(board), _table(board), _reading())
    drawn = data(_drawn(board), id="data")
    return Template(_file("board.html")).substitute(policy=policy, style=style, body=body, data=drawn, script=script)


def _header(board: Board, csv_link: str) -> Safe:
    models = len({line.model for line in board.lines})
    sizes = plural(len(board.lines), "line"), plural(len(board.columns), "metric")
    about = f"{plural(models, 'model')}, {STEPS[board.steps]}: {sizes[0]}, {sizes[1]}"
    link = el("p", "All of it as ", el("a", "CSV", href=csv_link), ".", class_="small soft csv")
    return el("header", el("h1", "Leaderboard"), el("p", about, class_="runs"), link)


def _notes(board: Board) -> Safe:
    if not board.notes:
        return Safe("")
    return el("section", el("strong", "To know:"), el("ul", *(el("li", note) for note in board.notes)), class_="notice")


def _table(board: Board) -> Safe:
    if not board.lines:
        return el("p", "No scores yet. They appear here once a checkpoint has been evaluated.", class_="empty")
    find = el("input", type="search", placeholder="Find a model", aria_label="Find a model")
    more = el("button", "Show more", type="button", data_more=True)
    bar = el("div", find, el("span", data_told=True, class_="soft small"), more, class_="bar", hidden=True)
    head = [
        el("th", el("button", title, type="button"), el("small", about), scope="col", class_="" if i == 1 else "num")
        for i, (title, about) in enumerate(_titles(board))
    ]
    lines = [el("tr", *map(_cell, range(len(head)), _cells(line))) for line in board.lines[:PAGE]]
    rest = len(board.lines) - PAGE
    none = el("noscript", el("p", f"{rest} more lines need JavaScript, or stand in the CSV.")) if rest > 0 else ""
    table = el("table", el("thead", el("tr", *head)), el("tbody", *lines))
    return join(bar, el("div", table, class_="scroll", tabindex="0", role="region", aria_label="Leaderboard"), none)


def _cell(place: int, text: str) -> Safe:
    return el("th", text, scope="row") if place == 1 else el("td", text, class_="num")


def _reading() -> Safe:
    return el("footer", el("h2", "How to read this"), el("p", NOTES))


def _titles(board: Board) -> list[tuple[str, str]]:
    fixed = [
        ("Rank", "95 % interval"), ("Model", ""), ("Step", ""), ("Tokens", "billions"), ("Mean win rate", "as HELM's"),
        ("Min-max sum", ""), ("Mean score", ""),
    ]  # fmt: skip
    return fixed + [(column.name, ARROWS[column.higher_is_better]) for column in board.columns]


def rank(line: Line) -> str:
    """``3 (1 to 7)``."""
    if line.rank is None:
        return NONE
    return f"{line.rank}" + (f" ({line.rank_low} to {line.rank_high})" if line.rank_low is not None else "")


def short(value: float | None) -> str:
    """A win rate, sum or mean."""
    return NONE if value is None else minus(f"{value:.3f}")


def _cells(line: Line) -> list[str]:
    tokens = NONE if line.tokens is None else f"{line.tokens:.4g}"
    shown = [NONE if v is None else number(v.value, v.stderr) for v in line.values]
    numbers = map(short, (line.win_rate, line.min_max, line.mean))
    return [rank(line), line.model, f"{line.step:,}", tokens, *numbers, *shown]


def _keys(line: Line) -> list[float | str | None]:
    """What the columns sort by."""
    values = [None if v is None else v.value for v in line.values]
    numbers = (line.tokens, line.win_rate, line.min_max, line.mean, *values)
    return [line.rank, line.model, line.step, *(None if n is None else float(f"{n:.8g}") for n in numbers)]


def _drawn(board: Board) -> dict[str, Any]:
    """What board.js shows. `down` says which way the first press sorts a column."""
    down = [False, False] + 5 * [True] + [column.higher_is_better is not False for column in board.columns]
    return {"page": PAGE, "rate": RATE, "down": down, "lines": [[_cells(line), _keys(line)] for line in board.lines]}


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


