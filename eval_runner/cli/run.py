"""`autoeval-runner run`: evaluate what is queued."""

from __future__ import annotations

import sys

import click

from autoeval_hooks import fsio
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.checkpoints import convert
from eval_runner.cli.options import config_option
from eval_runner.config import in_clear
from eval_runner.config.narrowed import narrowed
from eval_runner.progress import Progress
from eval_runner.runner import Mode, Runner, stopped_by_signals
from eval_runner.sinks.base import named
from eval_runner.stop import Stop

FAILED, LATER = 1, 75


@click.command(short_help="Evaluate the checkpoints of tickets, and bring the scores.")
@config_option
@click.option("--once", "mode", flag_value="once", help="Evaluate one ticket, if there is one, and end.")
@click.option("--drain", "mode", flag_value="drain", help="Evaluate until no ticket is pending, and end.")
@click.option("--eval-type", metavar="TYPE", help="Only suites with such an evaluator; others' tickets are left.")
@click.option("--verbose", is_flag=True, help="Say more.")
def run(config_file: str, mode: Mode | None, eval_type: str | None, verbose: bool) -> None:
    """Take tickets, evaluate their checkpoints, and bring the scores to the runs that trained them.

    Without --once or --drain it goes on until it is stopped. SIGTERM gives the ticket in hand back.
    """
    config = configs.load(config_file, warn=False)
    if eval_type:
        config = narrowed(config, eval_type)
    with Progress(verbose=verbose) as progress:
        in_clear.warn(config)
        evaluators = {name: registry.build_evaluators(config, suite) for name, suite in config.suites.items()}
        for evaluator in (e for suite in evaluators.values() for e in suite):
            evaluator.check()
        if server := registry.build_server(config):
            server.check()
        convert.check(config)
        name, stopped = fsio.unique(), Stop()
        built = registry.build_sinks(config, name, stopped.is_set)
        sinks = named((entry["type"] for entry in config.sinks), built)
        runner = Runner(config, evaluators, sinks, progress, name, stopped, server)
        with stopped_by_signals(runner):
            settled = runner.run(mode or "forever")
    waiting = runner.held_back() if mode else []
    for one in waiting:
        click.echo(f"tickets wait for suite {one.suite}, which is stopped: see `autoeval-runner status`", err=True)
    if runner.failed:
        sys.exit(FAILED)
    if waiting:
        sys.exit(LATER)
    if runner.given_back and mode:
        click.echo(f"{len(runner.given_back)} ticket(s) were given back unfinished", err=True)
        sys.exit(LATER)
    if not settled:
        click.echo("some points still wait for their run: see `autoeval-runner status` and `doctor`", err=True)
        sys.exit(LATER)
