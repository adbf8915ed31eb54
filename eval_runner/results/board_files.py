"""The leaderboard as files: HTML to look at, Markdown to paste, CSV and JSON to compute with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio
from eval_runner.results.leaderboard import Board, Line
from eval_runner.results.page import board as pages
from eval_runner.results.page.words import ARROWS, NONE, number

HTML, CSV, JSON, MARKDOWN = "leaderboard.html", "leaderboard.csv", "leaderboard.json", "leaderboard.md"
COLUMNS = (
    "model", "step", "tokens_billions", "rank", "rank_low", "rank_high", "mean_win_rate", "min_max_sum", "mean_score",
    "missing",
)  # fmt: skip
MAX_LINES = 200
"""Of the Markdown table, which people read."""


def write(board: Board, out_dir: Path) -> list[Path]:
    """Replace the four files in `out_dir`; their paths. Raises OSError."""
    texts = {HTML: pages.page(board, CSV), CSV: as_csv(board), JSON: as_json(board), MARKDOWN: as_markdown(board)}
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        fsio.replace(str((out_dir / name).absolute()), text.encode())
    return [out_dir / name for name in texts]


def as_csv(board: Board) -> str:
    """All entries by rank, numbers with full precision; what cannot be told is empty, and `missing` names the metrics
    without a value. A model's name that a spreadsheet would take for a formula has a ``'`` in front."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow((*COLUMNS, *(column.name for column in board.columns)))
    for line in board.lines:
        model, *numbers, missing = _fixed(line)
        values = (None if v is None else v.value for v in line.values)
        table.writerow((_inert(model), *(_plain(n) for n in numbers), " ".join(missing), *map(_plain, values)))
    return text.getvalue()


def as_json(board: Board) -> str:
    """One object: `steps`, `notes`, `columns` and `entries`, which hold what the CSV has, and standard errors."""
    columns = [{"name": column.name, "higher_is_better": column.higher_is_better} for column in board.columns]
    entries = [
        dict(zip(COLUMNS, _fixed(line), strict=True)) | {"scores": {
            column.name: {"value": v.value, "stderr": v.stderr}
            for column, v in zip(board.columns, line.values, strict=True) if v is not None
        }}
        for line in board.lines
    ]  # fmt: skip
    data = {"steps": board.steps, "notes": board.notes, "columns": columns, "entries": entries}
    return json.dumps(data, allow_nan=False, ensure_ascii=False) + "\n"


def as_markdown(board: Board) -> str:
    """A table of the first lines, and the notes."""
    titles = ["Rank (95 %)", "Model", "Step", "Mean win rate", "Min-max sum", "Mean score"]
    titles += [f"{column.name} {ARROWS[column.higher_is_better][:1]}".rstrip() for column in board.columns]
    out = ["# Leaderboard", "", _row(titles), _row(["---"] * len(titles))]
    for line in board.lines[:MAX_LINES]:
        values = [NONE if v is None else number(v.value, v.stderr) for v in line.values]
        sums = map(pages.short, (line.win_rate, line.min_max, line.mean))
        out.append(_row([pages.rank(line), line.model, f"{line.step:,}", *sums, *values]))
    if len(board.lines) > MAX_LINES:
        out += ["", f"The first {MAX_LINES} of {len(board.lines)} entries; {CSV} has all."]
    if board.notes:
        out += ["", *(f"- {escaped(note)}" for note in board.notes)]
    return "\n".join(out) + "\n"


def escaped(text: str) -> str:
    """Foreign text in Markdown: no markup, and no cell or line ends."""
    for char in "\\`*_[]<>|":
        text = text.replace(char, f"\\{char}")
    return " ".join(text.split())


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(escaped(cell) if cell != "---" else cell for cell in cells) + " |"


def _fixed(line: Line) -> tuple[Any, ...]:
    """What stands under COLUMNS."""
    return (
        line.model, line.step, line.tokens, line.rank, line.rank_low, line.rank_high, line.win_rate, line.min_max,
        line.mean, line.missing,
    )  # fmt: skip


def _inert(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def _plain(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)
