"""A configuration cut down to the suites that have an evaluator of one type."""

from __future__ import annotations

import dataclasses

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner.config.models import Config

_HELM = "helm"
_HUGGINGFACE = ("transformers", "vllm", "sglang")
"""Servers of checkpoints that HELM loads itself."""


def narrowed(config: Config, kind: str) -> Config:
    """The suites of `config` that have an evaluator of the type `kind`, and the server only where these need it: what
    others would need may be missing then. Raises ConfigError where no suite has one."""
    suites = {name: s for name, s in config.suites.items() if any(e["type"] == kind for e in s.evaluators)}
    types = {entry["type"] for suite in config.suites.values() for entry in suite.evaluators}
    if not suites:
        raise ConfigError(f"{config.path}: no suite has an evaluator of the type {kind!r}{near(kind, types)}")
    left = {entry["type"] for suite in suites.values() for entry in suite.evaluators}
    idle = left == {_HELM} and config.server is not None and config.server["type"] in _HUGGINGFACE
    return dataclasses.replace(config, suites=suites, server=None if idle else config.server)
