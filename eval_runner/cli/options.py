"""What several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from autoeval_hooks.errors import QueueError

config_option = click.option(
    "--config", "config_file", default="autoeval.yaml", show_default=True, metavar="FILE", help="The configuration."
)


def printable(text: str) -> str:
    """Text of others for a terminal: characters that would move its cursor or change its settings are shown as such,
    as are those that reverse the direction of writing."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def existing_queue(root: Path) -> Path:
    """The queue's directory, if there is a queue in it. Raises QueueError."""
    if not (root / "pending").is_dir():
        raise QueueError(
            f"queue {root}: not there yet; no checkpoint was submitted so far, or `queue` names another directory "
            "than training's"
        )
    return root
