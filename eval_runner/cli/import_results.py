"""`autoeval-runner import`: scores that another program, or another queue, has."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue, printable
from eval_runner.results import store
from eval_runner.results.importing import helm, lm_eval, queues
from eval_runner.results.importing.base import Options, Tree
from eval_runner.results.importing.places import Outcome
from eval_runner.results.importing.publish import Imports, alone, matching, remove, source_of

T = TypeVar("T")
REFUSED = 1
EVERY_S = 10.0
_SUITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

directory_argument = click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
replace_option = click.option("--replace", "replacing", is_flag=True, help="Where a checkpoint's benchmark stands with "
                              "other scores, these take their place.")  # fmt: skip
dry_option = click.option("--dry-run", is_flag=True, help="Say what would come, and write nothing.")


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a program's results."""
    for option in (
        click.option("--version", default="", metavar="V", help="The evaluator's, where its files do not tell: "
                     "scores of several versions are not compared."),
        click.option("--metric", "metrics", multiple=True, metavar="BENCHMARK=METRIC",
                     help="The metric to take of a benchmark; may be given several times.  [helm: HELM's main metric; "
                     "lm_eval: all]"),
        click.option("--tokens-per-step", type=click.IntRange(1), metavar="N", help="For the axis bench/tokens.  "
                     "[default: run.tokens_per_step of FILE]"),
        click.option("--suite", default="", metavar="NAME", help="The suite's name.  [default: HELM's suite, else the "
                     "program's name]"),
        click.option("--step", type=click.IntRange(0), metavar="N", help="The checkpoint's, where the model's name "
                     "does not tell: name/N, name_N, checkpoint-N, iter_N."),
        click.option("--model", default="", metavar="NAME", help="Take the results of this model only: its "
                     "name in full, or without the step."),
        click.option("--run", default="", metavar="NAME", help="The run's name.  [default: the model's]"),
        replace_option, dry_option, config_option,
    ):  # fmt: skip
        command = option(command)
    return directory_argument(command)


@click.group("import", short_help="Bring in scores that exist.")
def import_results() -> None:
    """Bring in scores that exist: they stand in reports, tables and comparisons beside those of the queue.

    Prints a line for each checkpoint: what became of it, its import's ID, run, suite, step, the number of scores, and
    why. Importing again changes nothing, and scores that differ from those that stand are refused without --replace.
    Nothing is published to trackers. Exit status: 0 all is there, 1 something could not be taken and is named, 2 a
    mistake in the call, or nothing to import, 75 another import is at work.
    """


@import_results.command("helm", short_help="HELM's output.")
@shared_options
def helm_command(directory: Path, **given: Any) -> None:
    """HELM's output: DIRECTORY is its output path, a suite of its runs/, or one run."""
    _import_tree(helm.find, directory, **given)


@import_results.command("lm_eval", short_help="Results of lm-evaluation-harness.")
@shared_options
def lm_eval_command(directory: Path, **given: Any) -> None:
    """Results of lm-evaluation-harness: the files results_*.json at or below DIRECTORY, with their samples."""
    _import_tree(lm_eval.find, directory, **given)


@import_results.command("autoeval", short_help="Results of another queue.")
@directory_argument
@config_option
@dry_option
@replace_option
@click.option("--suite", default="", metavar="NAME", help="Take the results of this suite only.")
def autoeval_command(directory: Path, config_file: str, dry_run: bool, replacing: bool, suite: str) -> None:
    """Results of another queue: DIRECTORY is the queue, or a copy of its results/.

    They stay what they are. One that this queue has evaluated itself is left out.
    """
    root = configs.load(config_file).queue
    copies, problems = queues.find(directory.absolute(), suite)
    imports, own = _imports(root, dry_run, replacing), queues.evaluated(root)
    takes = [(f"{c.result.run.name} at {c.result.step}", partial(queues.take, imports, c, own)) for c in copies]
    _finish(directory, dry_run, problems, takes)


@import_results.command("list", short_help="Show what was imported.")
@config_option
def list_command(config_file: str) -> None:
    """What was imported: ID, run, suite, step, number of scores, kind, directory, when."""
    root = existing_queue(configs.load(config_file).queue)
    results, problems = store.imported(root)
    for r in results:
        source = source_of(store.path_of(root, r))
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(source.imported_at))
        cells = (r.ticket[:12], r.run.name, r.suite, r.step, len(r.scores), source.kind, source.directory, at)
        click.echo("\t".join(printable(str(cell)) for cell in cells))
    for problem in problems:
        click.echo(f"warning: {printable(problem)}", err=True)


@import_results.command("remove", short_help="Take imports back.")
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@config_option
def remove_command(config_file: str, ids: tuple[str, ...]) -> None:
    """Take imports back: IDs or their beginnings, as `import list` shows them."""
    root = existing_queue(configs.load(config_file).queue)
    _alone(root)
    Imports(root)       # removes what these replaced, lest it count again
    for ticket in dict.fromkeys(matching(root, prefix) for prefix in ids):
        remove(root, ticket)
        _line("removed", ticket[:12])


# ---------------------------------------------------------------------- what they share


def _import_tree(
    find: Callable[[Path, Options], Tree], directory: Path, *, config_file: str, dry_run: bool, replacing: bool,
    tokens_per_step: int | None, **given: Any,
) -> None:  # fmt: skip
    config = configs.load(config_file)
    options = _options(given)
    directory = directory.absolute()
    tree = find(directory, options)
    imports = _imports(config.queue, dry_run, replacing)
    tokens = tokens_per_step or config.run.tokens_per_step
    passed_over = list(tree.passed_over)

    def take(read: Callable[[], Any]) -> Outcome:
        found = read()
        passed_over.extend(found.passed_over)
        return imports.take(found, directory, tokens)

    _finish(directory, dry_run, passed_over, [(p.title, partial(take, p.read)) for p in tree.pending])


def _options(given: dict[str, Any]) -> Options:
    metrics: dict[str, tuple[str, ...]] = {}
    for written in given.pop("metrics"):
        benchmark, equals, metric = written.partition("=")
        if not (benchmark and equals and metric):
            raise click.UsageError(f"--metric {written}: expected BENCHMARK=METRIC, such as mmlu=exact_match")
        metrics[benchmark] = (*metrics.get(benchmark, ()), metric)
    if given["suite"] and not _SUITE.fullmatch(given["suite"]):
        raise click.UsageError(f"--suite {given['suite']}: use up to 64 letters, digits, '_', '-' and '.'")
    return Options(**given, metrics=metrics)


def _imports(root: Path, dry_run: bool, replacing: bool) -> Imports:
    """What is imported; until the command ends, no other changes it."""
    if not dry_run:
        Queue(str(root)).create()
        _alone(root)
    imports = Imports(root, dry=dry_run, replacing=replacing)
    for problem in imports.problems:
        click.echo(f"warning: {printable(problem)}", err=True)
    return imports


def _alone(root: Path) -> None:
    if not click.get_current_context().with_resource(alone(root)):
        click.echo("warning: this file system has no locks; let no two imports run at once", err=True)


def _finish(
    directory: Path, dry_run: bool, passed_over: list[str], takes: Sequence[tuple[str, Callable[[], Outcome]]]
) -> None:  # fmt: skip
    """Take one after the other, tell of each, and end with the exit status. Raises ConfigError where there is none."""
    counts = {"imported": 0, "known": 0, "refused": 0}
    for title, take in _watched(takes):
        try:
            outcome = take()
        except AutoEvalError as error:
            outcome = Outcome("refused", None, str(error))
        counts[outcome.state] += 1
        word = "would import" if dry_run and outcome.state == "imported" else outcome.state
        r = outcome.result
        if r is None:
            _line(word, "", title, "", "", 0, outcome.why)
        else:
            _line(word, r.ticket[:12], r.run.name, r.suite, r.step, len(r.scores), outcome.why)
    for line in passed_over:
        click.echo(f"passed over: {printable(line)}", err=True)
    if not takes and not passed_over:
        raise ConfigError(f"{directory}: holds no such results; name the directory that does")
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    click.echo(f"{told or 'nothing'}{f', {len(passed_over)} passed over' if passed_over else ''}", err=True)
    if counts["refused"] or passed_over:
        sys.exit(REFUSED)


def _line(*cells: object) -> None:
    click.echo("\t".join(printable(str(cell)) for cell in cells))


def _watched(items: Sequence[T]) -> Iterator[T]:
    """The items; on stderr, a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        with contextlib.ExitStack() as stack:
            yield from stack.enter_context(click.progressbar(items, label="importing", file=sys.stderr))
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > EVERY_S:
            said = time.monotonic()
            click.echo(f"{done} of {len(items)}", err=True)
        yield item
