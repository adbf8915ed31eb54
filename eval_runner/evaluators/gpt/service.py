"""A service that speaks OpenAI's API, as the settings describe it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.gpt.budget import Price


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a service is asked.

    `base_url` has no slash at its end. `api_key_env` is the variable that holds the key, None for a service without
    one; `organization_env` likewise. `timeout` is seconds for one answer, `attempts` how often a request is tried in
    all. `price` is None where it is not known. `accept_models` are names that the service may report beside the asked
    one and its dated snapshots; ``*`` is any.
    """

    base_url: str = ""
    api_key_env: str | None = "OPENAI_API_KEY"
    organization_env: str | None = None
    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    attempts: int = 6
    price: Price | None = None
    accept_models: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Service(Access):
    """A service to ask.

    `name` is for messages (``the judge``), `where` the key path for remedies (``suites.quick.evaluators[0].judge``).
    `identity` stands for the service in the keys of the journal.
    `api` is ``megatron`` for Megatron-LM's static server, whose `base_url` is the endpoint's own, without `/v1`; it
    takes only `/completions`, and counts no tokens. The bodies are the same.
    """

    name: str
    identity: str
    where: str = ""
    api: Literal["openai", "megatron"] = "openai"
    api_key_env: str | None = None


@dataclass
class Usage:
    """What was asked for one evaluation. `requests` were answered for it, now or in an earlier attempt, `cached` for
    another one; tokens and USD are of the former. `cost_usd` is None without a price; where the service counts no
    tokens, a request costs its upper bound."""

    requests: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = None


class ParameterRefused(ConfigError):
    """The service refuses `parameter` of the body, such as ``response_format``."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter
