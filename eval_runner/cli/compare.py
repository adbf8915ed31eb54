"""`autoeval-runner compare A B`: is one checkpoint better than another, or is it noise?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue, printable
from eval_runner.cli.status import WIDE
from eval_runner.results import store
from eval_runner.results.board_files import escaped
from eval_runner.results.compare import Compared, Correction, Pair, find
from eval_runner.results.compare import compare as compared
from eval_runner.results.page.words import NONE, minus, number
from eval_runner.results.schema import Instance, Result, Score

TITLES = ("benchmark", "metric", "A", "B", "B - A", "95 %", "test", "p", "adjusted", "detectable", "verdict", "note")
REGRESSION = 1


@click.command(short_help="Compare two checkpoints on the same instances.")
@config_option
@click.option("--suite", default="", metavar="SUITE", help="Only the scores of this suite.")
@click.option("--metric", "metrics", multiple=True, metavar="BENCHMARK.METRIC", help="Only these; may be repeated.")
@click.option(
    "--correction", type=click.Choice(["holm", "bh", "none"]), default="holm", show_default=True,
    help="For many tests at once: Holm's, or Benjamini and Hochberg's.",
)  # fmt: skip
@click.option("--bootstrap", is_flag=True, help="Test by the paired bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
@click.option("--markdown", is_flag=True, help="A table to paste.")
@click.option(
    "--fail-on-regression", is_flag=True, help="Exit with 1 where B is worse on a score, or nothing could be tested."
)
@click.argument("a")
@click.argument("b")
def compare(
    config_file: str, suite: str, metrics: tuple[str, ...], correction: Correction, bootstrap: bool, as_json: bool,
    markdown: bool, fail_on_regression: bool, a: str, b: str,
) -> None:  # fmt: skip
    """Compare checkpoint B with checkpoint A on the same instances, score by score.

    A and B are [RUN@]STEP, RUN@latest, RUN@best, or the beginning of a ticket. The verdict of each score is by its
    p-value adjusted for all scores shown. "Detectable" is the true difference that would be found four times in five.
    """
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    queue = existing_queue(configs.load(config_file).queue)
    contents = store.collect(queue)

    def instances(result: Result) -> Iterable[Instance]:
        return store.instances(store.path_of(queue, result))

    sides = find(contents.results, a), find(contents.results, b)
    found = compared(*sides, instances, suite=suite, wanted=metrics, correction=correction, resampled=bootstrap)
    for problem in (*contents.problems, *found.problems):
        click.echo(f"warning: {printable(problem)}", err=True)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2, allow_nan=False))
    elif markdown:
        click.echo(_markdown(found))
    else:
        _print(found)
    if fail_on_regression and (found.count("worse") or all(pair.adjusted is None for pair in found.pairs)):
        sys.exit(REGRESSION)


def _print(found: Compared) -> None:
    click.echo(printable(f"A: {found.a}   B: {found.b}"))
    table = Table(*TITLES, box=None, pad_edge=False)
    for cells in _cells(found):
        table.add_row(*(escape(printable(cell)) for cell in cells))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)
    click.echo(printable(found.sentence))


def _markdown(found: Compared) -> str:
    rows = [TITLES, ["---"] * len(TITLES), *([escaped(cell) for cell in cells] for cells in _cells(found))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"A: {escaped(found.a)}, B: {escaped(found.b)}\n\n{table}\n\n{escaped(found.sentence)}"


def _cells(found: Compared) -> list[list[str]]:
    several = len({pair.suite for pair in found.pairs}) > 1
    return [_row(pair, f"{pair.suite}/{pair.benchmark}" if several else pair.benchmark) for pair in found.pairs]


def _row(pair: Pair, name: str) -> list[str]:
    tested = pair.tested
    head = [name, pair.metric, _score(pair.old), _score(pair.new)]
    if tested is None:
        return [*head, *[NONE] * 6, pair.verdict, pair.note]
    d = tested.difference
    ends = NONE if tested.interval is None else minus(f"{tested.interval[0]:+.3g} to {tested.interval[1]:+.3g}")
    least = NONE if tested.detectable is None else f"{tested.detectable:.2g}"
    adjusted = NONE if pair.adjusted is None else f"{pair.adjusted:.2g}"
    test = f"{d.test}, n = {d.n}"
    return [*head, minus(f"{d.value:+.3g}"), ends, test, f"{d.p:.2g}", adjusted, least, pair.verdict, pair.note]


def _score(score: Score | None) -> str:
    return NONE if score is None else number(score.value, score.stderr)
