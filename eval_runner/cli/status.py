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
from eval_runner.cli import live
from eval_runner.cli.options import config_option, existing_queue, printable

WIDE = live.WIDE
PERIOD_S = 5.0
"""Between two looks of --watch."""


@click.command()
@config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
@click.option(
    "--watch", "period", is_flag=False, flag_value=PERIOD_S, type=click.FloatRange(min=0.1), metavar="[SECONDS]",
    help=f"Show what runs, waits and fails, again every so many seconds ({PERIOD_S:g}), until Ctrl-C.",
)  # fmt: skip
def status(config_file: str, as_json: bool, period: float | None) -> None:
    """Show every ticket of the queue and what became of it."""
    if period is not None and as_json:
        raise click.UsageError("--watch shows a table; take either --json or --watch")
    root = existing_queue(configs.load(config_file).queue)
    if period is not None:
        live.watch(root, period)
        return
    found = statuses.read(root)
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
    for line in live.backlog(found.queue, found.points, found.results):
        click.echo(printable(line))
    for problem in found.problems:
        click.echo(printable(problem))
