"""The command line: `autoeval-runner`. Data goes to stdout, everything else to stderr.

Exit status: 0 ok, 1 an evaluation failed, 2 a mistake of the user's, 75 try later.
"""

from __future__ import annotations

import sys

import click

from autoeval_hooks import __version__
from autoeval_hooks.errors import AutoEvalError
from eval_runner import secrets
from eval_runner.cli.cancel import cancel
from eval_runner.cli.close import close
from eval_runner.cli.compare import compare
from eval_runner.cli.doctor import doctor
from eval_runner.cli.env import env
from eval_runner.cli.explain import explain
from eval_runner.cli.gc import gc
from eval_runner.cli.import_results import import_results
from eval_runner.cli.leaderboard import leaderboard
from eval_runner.cli.record import record
from eval_runner.cli.report import report
from eval_runner.cli.retry import retry
from eval_runner.cli.run import run
from eval_runner.cli.status import status
from eval_runner.cli.sync import sync
from eval_runner.cli.validate import validate
from eval_runner.cli.watch import watch

USAGE, LATER = 2, 75


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Evaluate every checkpoint that training hands over, and show its scores in the run that trained it."""


for command in (
    run, watch, status, explain, doctor, sync, retry, cancel, close, record, report, leaderboard, compare,
    import_results, validate, env, gc,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """The console script."""
    try:
        cli()
    except AutoEvalError as error:
        click.echo(secrets.masked(f"error: {error}"), err=True)
        sys.exit(LATER if error.kind == "transient" else USAGE)
    except OSError as error:
        click.echo(f"error: {error}; try again when the file system answers", err=True)
        sys.exit(LATER)
