"""`autoeval-runner retry`: bring failed tickets back, and let a suite that is stopped go on."""

from __future__ import annotations

import contextlib

import click

from autoeval_hooks.errors import TicketError
from autoeval_hooks.queue import Queue, Token
from eval_runner import breaker
from eval_runner import config as configs
from eval_runner.cli.options import config_option, existing_queue
from eval_runner.results import store


@click.command(short_help="Queue failed, quarantined or cancelled tickets again.")
@config_option
@click.argument("tickets", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every failed ticket.")
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="Every failed ticket of this suite.")
def retry(config_file: str, tickets: tuple[str, ...], every: bool, suites: tuple[str, ...]) -> None:
    """Queue failed, quarantined or cancelled TICKETS again, named by the start of their ids, with a fresh count of
    attempts; a finished one too, if its result was lost. A suite that was stopped goes on once it is named, or a
    ticket of it.
    """
    if not (tickets or every or suites):
        raise click.UsageError("name tickets (see `autoeval-runner status`), or give --suite NAME or --all")
    root = existing_queue(configs.load(config_file).queue)
    queue = Queue(str(root))
    stopped = {o.suite_digest: o for o in breaker.read(root)}
    closed = {o.suite_digest for o in stopped.values() if every or o.suite in suites}
    known = {o.suite for o in stopped.values()}
    chosen, found = [], set()
    for token in queue.tokens("failed", "quarantine", "cancelled", "done", *(["pending"] if stopped else [])):
        names = {prefix for prefix in tickets if token.ticket.startswith(prefix)}
        if token.state == "done" and not (names and store.unreadable(root, token)):
            continue
        suite, digest = _suite(queue, token)
        if token.state == "pending":        # it waits for its suite
            names = names if digest in stopped else set()
        elif names or (token.state == "failed" and (every or suite in suites)):
            chosen.append(token)
        if names or token in chosen:
            closed.add(digest)
        known |= {suite} if token.state == "failed" else set()
        found |= names
    for prefix in tickets:
        if prefix not in found:
            raise click.UsageError(f"no failed, quarantined or cancelled ticket starts with {prefix!r}")
    for name in set(suites) - known:
        raise click.UsageError(f"suite {name!r} is not stopped, and no ticket of it has failed")
    for digest in closed & stopped.keys():
        if breaker.close(root, digest):
            click.echo(f"suite {stopped[digest].suite}: goes on")
    for token in chosen:
        click.echo(f"{token.ticket[:12]}: {'queued' if queue.retry(token) else 'was taken by another'}")
    if not chosen and not closed:
        click.echo("no ticket has failed", err=True)


def _suite(queue: Queue, token: Token) -> tuple[str, str]:
    """The suite of a ticket, by name and digest; empty where it cannot be read."""
    with contextlib.suppress(TicketError, OSError):
        ticket = queue.ticket(token.ticket)
        return ticket.suite, ticket.suite_digest
    return "", ""
