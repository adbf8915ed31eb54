"""`autoeval-runner cancel`: end tickets that nobody needs any more."""

from __future__ import annotations

import click

from autoeval_hooks import fsio
from autoeval_hooks.errors import TicketError
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.ticket import Ticket
from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue
from eval_runner.status import is_run


@click.command(short_help="Cancel waiting and running tickets.")
@config_option
@click.argument("tickets", nargs=-1)
@click.option("--suite", help="Those of this suite.")
@click.option("--step", type=int, help="Those of this step.")
@click.option("--run", help="Those of this run: its name, its W&B id or our id.")
@click.option("--reason", default="cancelled by hand", show_default=True, help="Why; `status` and `explain` say it.")
def cancel(
    config_file: str, tickets: tuple[str, ...], suite: str | None, step: int | None, run: str | None, reason: str
) -> None:
    """Cancel waiting and running TICKETS, named by the start of their ids, or by suite, step and run together.

    A runner that holds one stops evaluating it and cannot publish it. `retry ID` brings a cancelled ticket back.
    """
    if not tickets and suite is None and step is None and run is None:
        raise click.UsageError("name tickets (see `autoeval-runner status`), or give --suite, --step or --run")
    queue = Queue(str(existing_queue(configs.load(config_file).queue)), runner=f"cancel-{fsio.unique()}")
    tokens = list(queue.tokens("pending", "claimed"))
    for prefix in tickets:
        if not any(t.ticket.startswith(prefix) for t in tokens):
            raise click.UsageError(f"no pending or claimed ticket starts with {prefix!r}; see `autoeval-runner status`")
    chosen = [t for t in tokens if not tickets or t.ticket.startswith(tickets)]
    if suite is not None or step is not None or run is not None:
        chosen = [t for t in chosen if _fits(_ticket(queue, t), suite, step, run)]
    for token in chosen:
        click.echo(f"{token.ticket[:12]}: {_cancelled(queue, token, reason)}")
    if not chosen:
        click.echo("no pending or claimed ticket is meant", err=True)


def _cancelled(queue: Queue, token: Token, reason: str) -> str:
    """End one ticket; what became of it. It may be claimed, or given back, at the moment that we look."""
    current: Token | None = token
    while current is not None:
        if queue.cancel(current, reason):
            return f"cancelled; runner {current.runner} stops evaluating it" if current.runner else "cancelled"
        current = next((t for t in queue.tokens("pending", "claimed") if t.ticket == token.ticket), None)
    state = next((t.state for t in queue.tokens() if t.ticket == token.ticket), "gone")
    return f"not cancelled; it is {state} by now"


def _ticket(queue: Queue, token: Token) -> Ticket | None:
    try:
        return queue.read(token)
    except (TicketError, OSError):
        return None


def _fits(ticket: Ticket | None, suite: str | None, step: int | None, run: str | None) -> bool:
    if ticket is None:
        return False
    return (
        suite in (None, ticket.suite)
        and step in (None, ticket.manifest.step)
        and (run is None or is_run(ticket.manifest.run, run))
    )
