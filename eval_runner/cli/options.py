"""What several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from autoeval_hooks.errors import QueueError

config_option = click.option(
    "--config", "config_file", default="autoeval.yaml", show_default=True, metavar="FILE", help="The configuration."
)


def existing_queue(root: Path) -> Path:
    """The queue's directory, if there is a queue in it. Raises QueueError."""
    if not (root / "pending").is_dir():
        raise QueueError(
            f"queue {root}: not there yet; no checkpoint was submitted so far, or `queue` names another directory "
            "than training's"
        )
    return root
