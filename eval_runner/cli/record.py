"""`autoeval-runner record`: evaluation results as curves in W&B, each in a run of its own."""

from __future__ import annotations

import sys

import click

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.cli.options import printable
from eval_runner.recorder import wandb_curves
from eval_runner.recorder.sources import Gathered, gather

MISSING, LATER = 1, 75


@click.command(short_help="Record HELM's output or our results in W&B runs of their own.")
@click.option("--config", "config_file", required=True, metavar="FILE",
              help="A recorder's file (`project`, `evals`), an autoeval.yaml, or an older watcher's file.")  # fmt: skip
@click.option("--print-only", is_flag=True, help="Print model, step, benchmark.metric and value; neither W&B nor a "
              "network is needed.")  # fmt: skip
@click.option("--summary-only", is_flag=True, help="Record no run for each benchmark, only the summary.")
def record(config_file: str, print_only: bool, summary_only: bool) -> None:
    """Record what HELM left, what stands in FILE, or our own results, in W&B runs of their own.

    Each run's path, the number of values that were logged and of those that were there already go to stdout, with
    tabs between. What the run has is not logged again, and late values find their place. Exit status: 0 all that was
    asked for is recorded, 1 something is missing (it is named; all else is recorded), 75 W&B is away or the run has
    another writer.
    """
    found = gather(config_file, summary_only=summary_only)
    for note in found.notes:
        click.echo(printable(note), err=True)
    if print_only:
        for line in found.lines:
            click.echo("\t".join(map(printable, line.split("\t"))))
    elif found.curves:
        _write(found)
    if found.board is not None:
        from eval_runner.recorder import board_wandb

        for line in board_wandb.make(found.board, print_only=print_only):
            click.echo("\t".join(map(printable, line.split("\t"))))
    for line in found.missing:
        click.echo(f"missing: {printable(line)}", err=True)
    if found.missing:
        sys.exit(MISSING)


def _write(found: Gathered) -> None:
    """Write the curves. An error says how far it came."""
    if not found.place.project:
        raise ConfigError("run.project: missing; name the W&B project to record in, or use --print-only")
    for i, curve in enumerate(found.curves):
        try:
            written = wandb_curves.write(found.place, curve)
        except AutoEvalError as error:
            if not i:
                raise
            what = f"{i} of {len(found.curves)} runs are recorded; record again for the others"
            raise type(error)(f"{error}; {what}") from error
        click.echo(f"{printable(written.run)}\t{written.logged}\t{written.there}")
        for line in written.changed:
            click.echo(f"{printable(written.run)}: {printable(line)}", err=True)
        if written.offline and written.logged:
            click.echo(f"an offline run: wandb sync {printable(written.run)}", err=True)
