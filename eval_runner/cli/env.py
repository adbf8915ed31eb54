"""`autoeval-runner env`: the virtual environments that evaluators run in."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from eval_runner import config as configs
from eval_runner import environments
from eval_runner.cli.options import config_option


@click.group(short_help="Build and list the environments that evaluators run in.")
def env() -> None:
    """Build and list the virtual environments that evaluators run in.

    They stand in the directory that the configuration names as `environments`, else in $AUTOEVAL_ENVS, else in
    the user's cache directory.
    """


@env.command(short_help="Build an environment, and print its directory.")
@config_option
@click.argument("name", type=click.Choice(sorted(environments.KINDS)))
def create(config_file: str, name: str) -> None:
    """Build the environment NAME, unless it is there, and print its directory."""
    said = ""
    live = sys.stderr.isatty()

    def progress(fraction: float, what: str) -> None:
        nonlocal said
        line = f"{fraction:4.0%} {what}"
        if line != said:
            said = line
            click.echo(f"\r\x1b[K{line}" if live else line, err=True, nl=not live)

    try:
        directory = environments.create(name, _root(config_file), progress=progress)
    finally:
        if live and said:
            click.echo(err=True)
    click.echo(directory)


@env.command("list")
@config_option
def list_(config_file: str) -> None:
    """List the environments: name, state, directory."""
    for found in environments.listing(_root(config_file)):
        state = ("current" if found.current else "old") if found.complete else "unfinished"
        click.echo(f"{found.name}\t{state}\t{found.path}")


def _root(config_file: str) -> Path:
    """As the runner that reads this configuration will look for them; a missing default file is no mistake."""
    given = click.get_current_context().get_parameter_source("config_file")
    if given is click.core.ParameterSource.DEFAULT and not Path(config_file).exists():
        return environments.default_root()
    return configs.load(config_file).environments or environments.default_root()
