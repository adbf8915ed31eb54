"""`autoeval-runner gc`: free what no ticket needs."""

from __future__ import annotations

import os

import click

from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import gc as collector
from eval_runner.cli.options import config_option, existing_queue


@click.command(short_help="Free the pins and records that no ticket needs any more.")
@config_option
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and free nothing.")
@click.option("--failed", is_flag=True, help="Also what failed tickets would need if they were retried.")
@click.option("--orphans", is_flag=True, help="Also pins of tickets that this queue does not know: another may.")
@click.argument("output_dirs", nargs=-1, metavar="[OUTPUT_DIR]...")
def gc(config_file: str, dry_run: bool, failed: bool, orphans: bool, output_dirs: tuple[str, ...]) -> None:
    """Free the pins and records that no ticket needs any more, and nothing else.

    Looks in the queue, in the output directories that its tickets name, and in OUTPUT_DIR. Prints a line for each
    thing: what was done, its kind, the bytes that this freed on disk, the path, and why.
    """
    for directory in output_dirs:
        if not os.path.isdir(directory):
            raise click.UsageError(f"{directory}: not a directory; name the one that holds the checkpoints")
    config = configs.load(config_file)
    queue = Queue(str(existing_queue(config.queue)))
    found = collector.find(queue, config.path_map, output_dirs, failed=failed, orphans=orphans)
    freed, problems = [], list(found.problems)
    for thing in found.free:
        try:
            if dry_run or collector.free(queue, thing):
                freed.append(thing)
                _show("would free" if dry_run else "freed", thing)
        except (OSError, AutoEvalError) as error:
            problems.append(f"{thing.path}: not freed: {error}")
    for thing in found.strangers:
        _show("kept", thing)
    click.echo(f"{'would free' if dry_run else 'freed'} {len(freed)}, {sum(t.bytes for t in freed)} bytes")
    if found.strangers:
        click.echo("kept: pins of tickets that are not of this queue; if no other queue has them, --orphans", err=True)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise AutoEvalError(f"{len(problems)} of the pins and directories were left alone, as said above")


def _show(what: str, thing: collector.Thing) -> None:
    click.echo(f"{what}\t{thing.kind}\t{thing.bytes}\t{thing.path}\t{thing.why}")
