"""The runner's configuration: `load` reads ``autoeval.yaml``."""

from __future__ import annotations

from eval_runner.config.loader import load, schema
from eval_runner.config.models import Config, Suite

__all__ = ["Config", "Suite", "load", "schema"]
