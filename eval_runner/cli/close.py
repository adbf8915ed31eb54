"""`autoeval-runner close`: say that a training run is over for good."""

from __future__ import annotations

import click

from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue
from eval_runner.sinks.wandb import close_run


@click.command(short_help="Say that a run will never train on.")
@config_option
@click.argument("run")
def close(config_file: str, run: str) -> None:
    """Say that RUN (its W&B id, our id, or its name under relay/) will never train on.

    Late points of a run that did not reach its planned last step wait for it, since a resumed training must find
    its next step free. Closing it lets the runner write them itself.
    """
    click.echo(f"closed: {close_run(existing_queue(configs.load(config_file).queue), run)}")
