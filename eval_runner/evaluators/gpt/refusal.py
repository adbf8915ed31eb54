"""The error that a request ends with, for people: what the service said, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt.retry import PATIENCE_S, Failure
from eval_runner.evaluators.gpt.service import ParameterRefused, Service


def final(service: Service, failure: Failure, body: Mapping[str, Any], tries: int) -> AutoEvalError:
    """The error of a request that is not tried again, after so many tries: ConfigError where none mends it,
    ParameterRefused where that is for a parameter of `body`, else AutoEvalError."""
    where, said = service.where, failure.message
    asked = f"{service.name} at {service.base_url}"
    if failure.no_quota:
        return ConfigError(f"{asked}: the account has no credit left: {said}")
    if failure.again:
        told = f" (HTTP {failure.status})" if failure.status else ""
        waits = f"; it asks to wait {failure.wait:.0f} s" if (failure.wait or 0) > PATIENCE_S else ""
        return AutoEvalError(f"{asked}: no answer after {tries} attempts{waits}: {said}{told}")
    if name := failure.refuses(body):
        remedy = f"; set {where}.{name}: null" if name == "temperature" else f"; see {where}"
        return ParameterRefused(f"{asked} refuses the parameter {name}: {said}{remedy}", name)
    remedy = _remedy(service, failure.status or 0)
    return ConfigError(f"{asked} refuses what it is asked (HTTP {failure.status}): {said}; {remedy}")


def _remedy(service: Service, status: int) -> str:
    where = service.where
    if status in (401, 403) and not service.api_key_env:
        return f"it wants a key: set {where}.api_key_env"
    key = f"the key in ${service.api_key_env} ({where}.api_key_env)"
    if 300 <= status < 400:
        return f"check {where}.base_url"
    remedies = {
        401: f"check {key}", 403: f"check what {key} may do", 404: f"check {where}.model and {where}.base_url",
    }  # fmt: skip
    return remedies.get(status, f"see {where}")
