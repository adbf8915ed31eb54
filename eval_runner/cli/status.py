"""`autoeval-runner status`: what is queued, running, done and failed, and why."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval_runner import breaker
from eval_runner import config as configs
from eval_runner import status as statuses
from eval_runner.cli.options import config_option, existing_queue, printable

WIDE = 1000
"""Columns of a table that no terminal shows: a script gets each ticket on one line."""


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
def status(config_file: str, as_json: bool) -> None:
    """Show every ticket of the queue and what became of it."""
    found = statuses.read(existing_queue(configs.load(config_file).queue))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(f"{found.queue}: " + ", ".join(f"{n} {state}" for state, n in found.counts.items()))
    table = Table("state", "run", "suite", "step", "attempt", "ticket", "why", box=None, pad_edge=False)
    for t in sorted(found.tickets, key=lambda t: (t.run, t.suite, t.step or 0)):
        step = "?" if t.step is None else str(t.step)
        cells = (t.state, t.run, t.suite, step, str(t.generation + 1), t.ticket[:12], t.why)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    if found.tickets:
        Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    for stopped in found.stopped:
        click.echo(printable(breaker.said(stopped)))
    for run, n in found.points_waiting.items():
        why = found.points_why[run] or "they come when its training logs next, or once it is over"
        click.echo(printable(f"{n} point(s) wait for W&B run {run}: {why}"))
    for run, n in found.points_refused.items():
        where = f"{found.queue}/relay/{run}/refused"
        click.echo(printable(f"{n} file(s) that are no points were refused: {where} says why"))
