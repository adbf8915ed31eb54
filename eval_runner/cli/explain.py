"""`autoeval-runner explain`: what became of one step, from save to point, or why it has no score."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from eval_runner import config as configs
from eval_runner import explain as explains
from eval_runner.cli.options import config_option, existing_queue, printable


@click.command(short_help="Tell what became of one step, from save to point.")
@config_option
@click.argument("step", type=int)
@click.option("--run", help="Only this run: its name, its W&B id or our id.")
@click.option("--suite", help="Only this suite.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for scripts.")
def explain(config_file: str, step: int, run: str | None, suite: str | None, as_json: bool) -> None:
    """Tell what became of STEP: saved, pinned, queued, each attempt, the result, and where its point stands.

    Where there is nothing, it says why. Nothing is changed. Times are by the clocks of the hosts that wrote them.
    """
    config = configs.load(config_file)
    existing_queue(config.queue)
    stories = explains.explain(config, step, run=run, suite=suite)
    if as_json:
        click.echo(json.dumps({"step": step, "stories": [asdict(s) for s in stories]}, indent=2))
        return
    for story in stories:
        title = f"suite {story.suite}, step {story.step}" + (f", ticket {story.ticket[:12]}" if story.ticket else "")
        click.echo(printable(f"run {story.run}, {title}" if story.run else title))
        for event in story.events:
            at = "" if event.at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
            by = f" [{event.by}]" if event.by else ""
            click.echo(f"  {at:19}  {printable(event.what)}{printable(by)}")
        click.echo(f"  → {printable(story.outcome)}")
