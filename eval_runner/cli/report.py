"""`autoeval-runner report`: the results as a page and a table."""

from __future__ import annotations

from pathlib import Path

import click

from eval_runner import config as configs
from eval_runner.cli.options import config_option
from eval_runner.results.report import generate


@click.command(short_help="Write an HTML report, and all scores as CSV.")
@config_option
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="report", show_default=True,
    help="Directory to write index.html into.",
)  # fmt: skip
@click.option(
    "--csv", type=click.Path(dir_okay=False, path_type=Path),
    help="File to write all scores to.  [default: scores.csv beside index.html]",
)  # fmt: skip
def report(config_file: str, out: Path, csv: Path | None) -> None:
    """Write a self-contained HTML report and all scores as CSV, and print the paths of both."""
    try:
        made = generate(configs.load(config_file).queue, out, csv)
    except OSError as error:
        raise click.UsageError(f"{error.filename}: {error.strerror}; choose another --out or --csv") from error
    for problem in made.problems:
        click.echo(f"warning: {problem}", err=True)
    click.echo(made.index)
    click.echo(made.csv)
