"""Options that several commands share."""

from __future__ import annotations

import click

config_option = click.option(
    "--config", "config_file", default="autoeval.yaml", show_default=True, metavar="FILE", help="The configuration."
)
