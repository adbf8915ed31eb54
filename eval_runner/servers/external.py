"""A server that somebody else starts. What makes it ours to ask is the name of the model that it lists: it holds the
digest of the weights, so that another checkpoint's server, or one that was swapped in, is never asked."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.strict import build
from eval_runner.evaluators.written import prefixed, refused
from eval_runner.process import Stopped
from eval_runner.servers.base import Endpoint, Serving

if TYPE_CHECKING:
    from eval_runner.checkpoints.base import Servable
    from eval_runner.evaluators.base import Context

POLL_S = 1.0
"""Seconds between two looks at a server that is waited for."""
WATCH_S = 10.0
"""Seconds between two looks at one that answers."""
AWAY_S = 60.0
"""Seconds that one which answered may be away; its evaluators try again themselves."""
ANSWER_S = 10.0
ANSWER_MAX = 1 << 20
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""No proxy of the environment leads there."""

logger = logging.getLogger("autoeval")


@dataclass(frozen=True)
class Settings:
    """What `server:` says. `url` is that below which `/v1/models` and `/v1/completions` stand, or ends with the `/v1`;
    `api_key_env` names the variable of the environment that holds the server's key, where it asks for one;
    `start_timeout` is how long it is waited for, in seconds."""

    url: str
    api_key_env: str | None = None
    start_timeout: float = 600.0


class _Away(Exception):
    """The server cannot be asked just now."""


class ExternalServer:
    """A `base.Server`. See `Settings` for the keys."""

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        self._where = prefixed(context, context.where)
        self._settings = _parse(settings, context)
        self._url = self._settings.url.rstrip("/").removesuffix("/v1").rstrip("/")

    def check(self) -> None:
        """Raise ConfigError unless the key is there. The server itself may be started later."""
        name = self._settings.api_key_env
        if name and not os.environ.get(name):
            raise ConfigError(f"{self._where}.api_key_env: {name} is not set in the runner's environment; export it")

    def serves(self, checkpoint: Servable) -> bool:
        return checkpoint.megatron is None

    def facts(self, checkpoint: Servable) -> dict[str, str]:
        """Where it is: which program answers there, and how it was started, is not known to us."""
        return {"server": "external", "server url": self._url}

    def start(self, serving: Serving) -> Running:
        """Wait until the server lists the checkpoint's name."""
        self.check()
        models = Models(self._url, self._settings.api_key_env, self._where)
        end = time.monotonic() + self._settings.start_timeout
        told = False
        while True:
            try:
                listed = models.listed()
                if serving.name in listed:
                    break
                why = f"{models.url} lists {_names(listed)}, not {serving.name}"
                kind: type[AutoEvalError] = ConfigError
            except _Away as error:
                why, kind = f"{models.url}: {error}", AutoEvalError
            remedy = f"start it with `--served-model-name {serving.name}`, for {serving.checkpoint.path}"
            if time.monotonic() > end:
                raise kind(
                    f"{self._where}.url: after {self._settings.start_timeout:g} s, {why}; {remedy}, or raise "
                    "start_timeout"
                )
            if not told:
                told = True
                logger.warning("step %d waits for its server: %s; %s", serving.step, why, remedy)
            if serving.stopping():
                raise Stopped("told to stop while waiting for a server")
            time.sleep(min(POLL_S, max(0.0, end - time.monotonic()) + 0.01))
        serving.checkpoint.unchanged()
        return Running(models, Endpoint(self._url, "openai", serving.name, self._settings.api_key_env))


class Models:
    """The list of a server's models. `url` is where it stands."""

    def __init__(self, url: str, api_key_env: str | None, where: str) -> None:
        self.url = f"{url}/v1/models"
        self._key = os.environ.get(api_key_env, "") if api_key_env else ""
        self._where = where
        near = urllib.parse.urlsplit(url).hostname in LOOPBACK
        self._opener = urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if near else []))

    def listed(self) -> list[str]:
        """The names. Raises _Away where another try may tell, and ConfigError where none will."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            with self._opener.open(urllib.request.Request(self.url, headers=headers), timeout=ANSWER_S) as response:
                body = response.read(ANSWER_MAX)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise ConfigError(
                    f"{self._where}.api_key_env: {self.url} answers {error.code}: it asks for "
                    f"{'another key' if self._key else 'a key; name the variable that holds it'}"
                ) from error
            if error.code < 500 and error.code not in (408, 425, 429):
                raise ConfigError(
                    f"{self._where}.url: {self.url} answers {error.code}; name the URL below which /v1/models stands"
                ) from error
            raise _Away(f"answers {error.code}") from error
        except (OSError, HTTPException) as error:
            raise _Away(f"{type(error).__name__}: {str(error)[:200]}") from error
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            said = f"{self.url} answers with no list of models: {body[:100]!r}"
            raise ConfigError(f"{self._where}.url: {said}") from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: it would take the key elsewhere."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


class Running:
    """A `base.Running`. A thread looks at the server now and then; `failure` asks it itself where it may take time."""

    def __init__(self, models: Models, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._models = models
        self._lock = threading.Lock()
        self._why: AutoEvalError | None = None
        self._seen_at = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autoeval-external", daemon=True)
        self._thread.start()

    def failure(self, wait: float = 0.0) -> AutoEvalError | None:
        if wait and self._why is None:
            self._look()
        return self._why

    def close(self) -> None:
        """End the watch; the server is another's, and goes on."""
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_S):
            self._look()

    def _look(self) -> None:
        with self._lock:
            try:
                listed = self._models.listed()
            except _Away as error:
                if time.monotonic() - self._seen_at > AWAY_S:
                    self._why = AutoEvalError(f"{self._models.url}: the server is gone: {error}")
            except AutoEvalError as error:
                self._why = AutoEvalError(f"the server changed in mid-evaluation: {error}")
            else:
                self._seen_at = time.monotonic()
                if self.endpoint.model not in listed:
                    self._why = AutoEvalError(
                        f"{self._models.url}: the server was swapped in mid-evaluation: it lists {_names(listed)}, and "
                        f"{self.endpoint.model} no more; nothing is published"
                    )


def _names(listed: list[str]) -> str:
    return ", ".join(listed[:3]) + (" …" if len(listed) > 3 else "") if listed else "no model"


def _parse(data: dict[str, Any], context: Context) -> Settings:
    key, errors = context.where, list[str]()
    settings = build(Settings, data, key, errors)
    if settings is not None:
        if settings.start_timeout <= 0:
            errors.append(f"{key}.start_timeout: must be more than 0 seconds")
        if settings.api_key_env == "":
            errors.append(f"{key}.api_key_env: empty")
        if said := _misfit(settings.url):
            errors.append(f"{key}.url: {said}")
    if errors or settings is None:
        raise refused(context, errors)
    return settings


def _misfit(url: str) -> str:
    """What is wrong with a URL; "" where nothing is."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"{url!r:.200}: {error}"
    if parts.username or parts.password:        # it is not shown
        return "holds a user or a password; name the variable that holds a key by `api_key_env`"
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        return f"{url!r:.200} is no URL such as http://HOST:8000"
    return ""
