"""`autoeval-runner watch`: find checkpoints by themselves, where training has no hook."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from eval_runner import secrets
from eval_runner.cli.options import config_option, printable
from eval_runner.stop import Stop
from eval_runner.watching.beside import Beside
from eval_runner.watching.looks import Kind
from eval_runner.watching.plan import Options, plan, seconds


@click.command(short_help="Look for complete checkpoints, and hand them over.")
@config_option
@click.option("--begin-iteration", "begin", type=click.IntRange(min=0), help="The first. Default: the interval.")
@click.option("--end-iteration", "end", type=click.IntRange(min=0), help="The last. Default: it goes on.")
@click.option("--iteration-interval", "interval", type=click.IntRange(min=1),
              help="Steps between two. Default: 1000 for an older file, else all.")  # fmt: skip
@click.option("--check-interval", "--check-iterval", "check", default="30", show_default=True, metavar="TIME",
              help="Minutes between two looks; also 30s, 5m, 1h.")  # fmt: skip
@click.option("--model-type", "kind", type=click.Choice(["megatron", "huggingface"]),
              help="What the checkpoints are. Default: what the file or the directory says.")  # fmt: skip
@click.option("--eval-type", metavar="TYPE",
              help="Only suites with such an evaluator. Default: helm for an older file, else all.")  # fmt: skip
@click.option("--checkpoint-dir", "directories", multiple=True, metavar="DIR",
              help="A directory that holds checkpoints; repeatable. Default: the older file's.")  # fmt: skip
@click.option("--run", "runs", is_flag=True, help="Also evaluate: run `autoeval-runner run` beside it.")
def watch(
    config_file: str, begin: int | None, end: int | None, interval: int | None, check: str, kind: Kind | None,
    eval_type: str | None, directories: tuple[str, ...], runs: bool,
) -> None:  # fmt: skip
    """Look for complete checkpoints, again and again, and hand them over: no hook is needed in training.

    FILE is an autoeval.yaml, or the older watcher's YAML (`auto_eval:`). With --end-iteration it ends once all
    checkpoints up to it are enqueued or passed over, and with --run evaluated. SIGTERM ends it.
    """
    try:
        every = seconds(check)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--check-interval") from None
    planned = plan(Options(config_file, begin, end, interval, kind, eval_type, directories), _say)
    watcher, stop = planned.watcher, Stop()
    beside = Beside(config_file, planned.config.queue, planned.eval_type, end is not None, stop) if runs else None

    def after_look() -> None:
        if beside is not None:
            beside.look(watcher.enqueued)
            if beside.refused:
                stop.set()

    with _stopped_by_signals(stop):
        over = watcher.watch(every, stop, after_look)
        if over:
            _say("all checkpoints up to --end-iteration are enqueued or passed over")
        status = beside.finish(watcher.enqueued) if beside is not None else 0
    if beside is not None and status:
        _say(f"the runner's log: {beside.log}")
    sys.exit(status)


def _say(text: str) -> None:
    click.echo(secrets.masked(printable(text)), err=True)


@contextmanager
def _stopped_by_signals(stop: Stop) -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        stop.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
