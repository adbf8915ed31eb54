"""`autoeval-runner retry`: bring failed tickets back."""

from __future__ import annotations

import click

from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue


@click.command()
@config_option
@click.argument("tickets", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every failed ticket.")
def retry(config_file: str, tickets: tuple[str, ...], every: bool) -> None:
    """Queue failed or quarantined TICKETS again, named by the start of their ids, with a fresh count of attempts."""
    if not tickets and not every:
        raise click.UsageError("name tickets (see `autoeval-runner status`), or give --all")
    queue = Queue(str(existing_queue(configs.load(config_file).queue)))
    found = list(queue.tokens("failed", "quarantine"))
    chosen = [t for t in found if (every and t.state == "failed") or any(t.ticket.startswith(p) for p in tickets)]
    for prefix in tickets:
        if not any(t.ticket.startswith(prefix) for t in chosen):
            raise click.UsageError(f"no failed or quarantined ticket starts with {prefix!r}")
    for token in chosen:
        click.echo(f"{token.ticket[:12]}: {'queued' if queue.retry(token) else 'was taken by another'}")
    if not chosen:
        click.echo("no ticket has failed", err=True)
