"""`autoeval-runner status --watch`: a table that is drawn anew, or, off a terminal, one block of text each time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from eval_runner import breaker
from eval_runner.cli.options import printable
from eval_runner.live import Ticket, View, Watcher
from eval_runner.results.page.words import duration
from eval_runner.running import Note
from eval_runner.status import Backlog

WIDE = 1000
"""Columns where no terminal shows it: each row is one line."""
UNREADABLE = "cannot be read: see `autoeval-runner status`"
NO_REASON = "they come when its training logs next, or once it is over"
NOT_TRIED = "no runner has tried yet"


def watch(root: Path, seconds: float) -> None:
    """Show the queue every so many seconds, until Ctrl-C. A queue that does not answer is said, and asked again."""
    try:
        watcher, console = Watcher(root), Console(width=None if sys.stdout.isatty() else WIDE)
        if not console.is_terminal:
            while True:
                console.print(_look(watcher, wide=True))
                time.sleep(seconds)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_look(watcher, wide=False), refresh=True)
                time.sleep(seconds)
    except KeyboardInterrupt:
        return


def _look(watcher: Watcher, *, wide: bool) -> RenderableType:
    now = time.strftime("%H:%M:%S")
    try:
        view = watcher.look()
    except OSError as error:
        return _line(f"{now} the queue does not answer: {error}; asking again")
    return Group(*_parts(view, now, wide), *([_line("")] if wide else []))


def _parts(view: View, now: str, wide: bool) -> Iterator[RenderableType]:
    yield _line(f"{now} {view.queue}: " + ", ".join(f"{n} {state}" for state, n in view.counts.items()))
    if view.working:
        at = [(w.runner, *_which(w.ticket), *_progress(w.note)) for w in view.working]
        yield _table(("running on", "run", "suite", "step", "evaluator", "done", "at"), at, wide)
    if view.waiting:
        waiting = [
            (w.suite, str(w.tickets), UNREADABLE if w.longest is None else duration(w.longest)) for w in view.waiting
        ]  # fmt: skip
        yield _table(("waiting", "tickets", "oldest saved before"), waiting, wide)
    if view.last:
        last = view.last
        which = f"{last.run}, suite {last.suite}, step {last.step}"
        after = "" if last.lag is None else f", {duration(last.lag)} after the save"
        yield _line(f"last scores: {which}{after}")
    if view.troubles:
        wrong = [(t.state, *_which(t.ticket), str(t.failures), t.why) for t in view.troubles]
        yield _table(("went wrong", "run", "suite", "step", "failures", "why"), wrong, wide)
    if view.more:
        yield _line(f"and {view.more} more that went wrong: see `autoeval-runner status`")
    for stopped in view.stopped:
        yield _line(breaker.said(stopped))
    yield from map(_line, backlog(view.queue, view.points, view.results))
    yield from map(_line, view.points.problems + view.results.problems)


def backlog(queue: str, points: Backlog, results: Backlog) -> Iterator[str]:
    """What waits for a tracker and why, and what was refused, a line each."""
    for run, n in points.waiting.items():
        yield f"{n} point(s) wait for W&B run {run}: {points.why[run] or NO_REASON}"
    for run, n in points.refused.items():
        yield f"{n} file(s) that are no points were refused: {queue}/relay/{run}/refused says why"
    for target, n in results.waiting.items():
        yield f"{n} result(s) wait for {target}: {results.why[target] or NOT_TRIED}"


def _which(ticket: Ticket | None) -> tuple[str, str, str]:
    return ("?", "?", "?") if ticket is None else (ticket.run, ticket.suite, str(ticket.step))


def _progress(note: Note | None) -> tuple[str, str, str]:
    return ("", "", "") if note is None else (note.evaluator, f"{note.fraction:.0%}", note.what)


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]], wide: bool) -> Table:
    """One line a row: what is too long for a terminal is cut."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=not wide, overflow="fold" if wide else "ellipsis")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _line(text: str) -> Text:
    return Text(printable(text))
