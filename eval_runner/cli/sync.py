"""`autoeval-runner sync`: compare results with what the trackers show, and repair."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.cli.options import config_option, existing_queue, printable
from eval_runner.cli.status import WIDE
from eval_runner.results import store
from eval_runner.results.schema import Result
from eval_runner.sinks.base import Sink, Standing, State

DIFFERENT, LATER = 1, 75
PAUSE_S = 2.0
WAITS: tuple[State, ...] = ("waiting", "missing", "unclear")


@dataclass(frozen=True)
class Line:
    """A finding of one sink. `was` is its state before anything was repaired."""

    sink: str
    was: State
    finding: Standing


@click.command(short_help="Compare results with what each sink holds, and repair.")
@config_option
@click.option("--dry-run", is_flag=True, help="Only compare.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="Go on until all is shown, for so long at most.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
@click.argument("runs", nargs=-1)
def sync(config_file: str, dry_run: bool, wait: float, as_json: bool, runs: tuple[str, ...]) -> None:
    """Compare the results of RUNS (all, if none is named) with what each sink holds of them, and repair.

    What is missing is logged as ever: into W&B by the training process while it lives, else from here. Nothing that
    is there is changed. Exit status: 0 all results are shown, 75 some still wait or could not be read or looked for,
    1 some are shown with other values. A W&B run whose training process ended lately must be watched for two minutes
    first: --wait 180.
    """
    config = configs.load(config_file)
    results, problems = store.done(existing_queue(config.queue))
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
    chosen = _chosen([result for result in results if result.status == "ok"], runs, config.queue)
    lines = []
    for entry, sink in zip(config.sinks, registry.build_sinks(config), strict=True):
        lines += [Line(entry["type"], was, finding) for was, finding in _serve(sink, chosen, dry_run, wait)]
    _print(lines, as_json)
    states = {line.finding.state for line in lines}
    if states & {*WAITS} or problems:       # a result that cannot be read is not known to be shown
        sys.exit(LATER)
    if "different" in states:
        sys.exit(DIFFERENT)


def _chosen(results: list[Result], runs: tuple[str, ...], queue: Path) -> list[Result]:
    """All results of the runs that are named by W&B id, our id, name or key. Raises ConfigError for a name of none."""
    called = [(r, {r.run.id, r.run.wandb_id, r.run.name, r.run.key} - {""}) for r in results]
    known = {name for _, names in called for name in names}
    for name in runs:
        if name not in known:
            raise ConfigError(f"{queue}: no result is of a run called {name!r}{near(name, known)}")
    keys = {result.run.key for result, names in called if not runs or names & {*runs}}
    return [result for result in results if result.run.key in keys]


def _serve(sink: Sink, results: Sequence[Result], dry_run: bool, wait: float) -> list[tuple[State, Standing]]:
    """The findings, each with its state before the repair."""
    before = sink.compare(results, repair=not dry_run)
    if dry_run or all(finding.state not in WAITS for finding in before):
        return [(finding.state, finding) for finding in before]
    end = time.monotonic() + wait
    while not sink.flush() and time.monotonic() < end:
        time.sleep(PAUSE_S)
    was = {finding.ticket: finding.state for finding in before}
    return [(was.get(f.ticket, f.state), f) for f in sink.compare(results, repair=False)]


def _print(lines: list[Line], as_json: bool) -> None:
    counts = Counter(line.finding.state for line in lines)
    repaired = sum(line.was in WAITS and line.finding.state == "shown" for line in lines)
    if as_json:
        data = {"counts": dict(counts), "repaired": repaired, "points": [
            {"sink": line.sink, "was": line.was, **asdict(line.finding)} for line in lines
        ]}  # fmt: skip
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "no result to show")
    told = [line for line in lines if line.finding.state != "shown" or line.was != "shown"]
    if not told:
        return
    table = Table("state", "was", "run", "suite", "step", "ticket", "why", box=None, pad_edge=False)
    for line in sorted(told, key=lambda line: (line.finding.run, line.finding.suite, line.finding.step)):
        f = line.finding
        cells = (f.state, line.was, f.run, f.suite, str(f.step), f.ticket[:12], f.says)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
