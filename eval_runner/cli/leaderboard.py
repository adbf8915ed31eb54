"""`autoeval-runner leaderboard`: models and steps ranked over many metrics."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoeval_hooks import yamlfile
from autoeval_hooks.errors import ConfigError
from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue, printable
from eval_runner.cli.status import WIDE
from eval_runner.recorder import board_wandb
from eval_runner.recorder import settings as recorders
from eval_runner.results import board_files, board_source, store
from eval_runner.results.leaderboard import Board, Steps, make
from eval_runner.results.page import board as pages

LINES = 20
"""Of the table on stdout, where there are files that hold all."""


@click.command()
@config_option
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="leaderboard", show_default=True,
    help="Directory to write the page, CSV, JSON and Markdown into.",
)  # fmt: skip
@click.option(
    "--steps", type=click.Choice(["last", "best", "all"]),
    help="Of each model its last step, its best, or all.  [default: last; of W&B runs: all]",
)  # fmt: skip
@click.option("--metric", "metrics", multiple=True, metavar="BENCHMARK.METRIC", help="Rank by these; may be repeated.")
@click.option("--exclude", "excluded", multiple=True, metavar="MODEL", help="Leave this model out; may be repeated.")
@click.option(
    "--lower-is-better", "lower", multiple=True, metavar="BENCHMARK.METRIC",
    help="Of W&B runs, which do not tell; may be repeated.",
)  # fmt: skip
@click.option("--wandb", "target", metavar="[ENTITY/]PROJECT", help="Show the board of our results in W&B, too.")
@click.option("--print-only", is_flag=True, help="Only print: write no file, and nothing to W&B.")
def leaderboard(
    config_file: str, out: Path, steps: Steps | None, metrics: tuple[str, ...], excluded: tuple[str, ...],
    lower: tuple[str, ...], target: str | None, print_only: bool,
) -> None:  # fmt: skip
    """Rank models and steps by their mean win rate.

    With an autoeval.yaml the models are the runs of its queue's results; with a recorder's YAML they are the W&B runs
    of its project, and the board is shown there as the run PROJECT-leaderboard.
    """
    gc.disable()    # a million small objects that all stay: walking them again and again is a third of the time
    for metric in (*metrics, *lower):
        if "." not in metric.strip("."):
            raise ConfigError(f"{metric!r} is not benchmark.METRIC, such as mmlu.EM")
    if recorders.is_recorders(yamlfile.read_yaml(config_file)):
        if target:
            raise ConfigError(f"{config_file}: a recorder's file names its W&B project; leave --wandb out")
        settings = recorders.load(config_file)
        board = board_wandb.read(settings, wanted=metrics, excluded=excluded, lower=lower, steps=steps or "all")
        place: tuple[str, str, str] | None = (settings.entity, settings.project, settings.base_url)
    else:
        if lower:
            raise ConfigError("--lower-is-better: our results tell it themselves; it is for W&B runs only")
        contents = store.collect(existing_queue(configs.load(config_file).queue))
        for problem in contents.problems:
            click.echo(f"warning: {printable(problem)}", err=True)
        read = board_source.read(contents.results, wanted=metrics, excluded=excluded)
        if contents.failed:
            read.notes.append(f"{len(contents.failed)} failed tickets have no scores; `status` says why")
        board = make(read.entries, read.columns, steps=steps or "last", notes=read.notes)
        place = (*_target(target), "") if target else None
    _print(board, None if print_only else LINES)
    if print_only:
        return
    try:
        written = board_files.write(board, out)
    except OSError as error:
        raise click.UsageError(f"{error.filename}: {error.strerror}; choose another --out") from error
    for path in written:
        click.echo(printable(str(path)))
    if place and board.lines:
        click.echo(printable(board_wandb.publish(board, *place)))


def _target(target: str) -> tuple[str, str]:
    entity, _, project = target.rpartition("/")
    if not project or "/" in entity:
        raise ConfigError(f"--wandb {target!r} is not [ENTITY/]PROJECT")
    return entity, project


def _print(board: Board, limit: int | None) -> None:
    heads = "rank (95 %)", "model", "step", "win rate", "min-max sum", "mean", "missing"
    table = Table(*heads, box=None, pad_edge=False)
    for line in board.lines[:limit]:
        numbers = map(pages.short, (line.win_rate, line.min_max, line.mean))
        cells = (pages.rank(line), line.model, str(line.step), *numbers, ", ".join(line.missing))
        table.add_row(*(escape(printable(cell)) for cell in cells))
    if board.lines:
        Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    else:
        click.echo("no scores to rank")
    if limit is not None and len(board.lines) > limit:
        click.echo(f"… and {len(board.lines) - limit} more in the files")
    for note in board.notes:
        click.echo(f"note: {printable(note)}", err=True)
