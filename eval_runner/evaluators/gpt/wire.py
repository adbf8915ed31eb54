"""One request to a service, through the `openai` client, without any retry: what comes back is a reply or a failure."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from autoeval_hooks.errors import ConfigError
from eval_runner import secrets
from eval_runner.evaluators.gpt.records import Reply, Request
from eval_runner.evaluators.gpt.retry import Failure, asked_wait
from eval_runner.evaluators.gpt.service import Service

CONNECT_S = 20.0
GRACE_S = 0.5
"""After the time-out: httpx's own ones come first, which tell whether anything was sent."""
FILE_S = 1800.0
"""For a file of a batch, up or down."""
MOST_BYTES = 4 << 20
"""Of one answer. As ASCII, six times as many at most, it fits a line of the journal."""
MOST_FILE_BYTES = 1 << 30
"""Of what a batch answers."""
MESSAGE = 300
"""Characters of what a service says that go into our message."""
_NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")
_IN_DOUBT = (408, 502, 504)
"""What gateways say that do not know what became of a request."""
_PLAIN = ("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "transfer-encoding",
          "x-stainless-raw-response")  # fmt: skip
"""The client's headers that a service is sent: others would be what the environment holds for OpenAI. The last one
tells the client itself how to read the answer."""


class Wire:
    """The connection to one service. May be used by many threads."""

    def __init__(self, service: Service) -> None:
        """Raises ConfigError for a key that is not in the environment or cannot be sent, and for a wrong URL."""
        import openai  # a second, and only where something is asked

        self.service = service
        self._key = _key(service)
        host = _host(service)
        self._headers = {"User-Agent": "autoeval"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        if organization := os.environ.get(service.organization_env or ""):
            self._headers["OpenAI-Organization"] = organization
        self._exchange = threading.local()
        # A redirect is refused: it could carry the questions to a host that nobody configured.
        http = openai.DefaultHttpxClient(
            follow_redirects=False,
            mounts={f"all://{host}": None} if _is_loopback(host) else None,     # no proxy reaches this host's own
            event_hooks={"request": [self._bare], "response": [self._note]},
        )
        self.client = openai.OpenAI(
            api_key=self._key or "none", base_url=service.base_url, max_retries=0, http_client=http,
            timeout=openai.Timeout(service.timeout, connect=min(service.timeout, CONNECT_S)),
        )  # fmt: skip

    def post(self, request: Request, body: dict[str, Any]) -> Reply | Failure:
        """Send `body`, the request's as the service understands it."""
        sent = _for_megatron(body) if self.service.api == "megatron" else body
        answer = self.call(lambda: self._text(request.path, sent))
        return answer if isinstance(answer, Failure) else self.reply(answer, request, body)

    def _text(self, path: str, body: dict[str, Any]) -> str:
        asked: Any = {"model": body.get("model", ""), "extra_body": body}     # as it is, whatever the client knows
        if path == "/chat/completions":
            sending = self.client.chat.completions.with_streaming_response.create(messages=[], **asked)
        else:
            sending = self.client.completions.with_streaming_response.create(prompt="", **asked)
        return _read(sending, MOST_BYTES).decode(errors="replace")

    def models(self) -> Any | Failure:
        """What `GET /models` answers; None where that is no JSON."""

        def ask() -> Any:
            data = _read(self.client.models.with_streaming_response.list(), MOST_BYTES)
            try:
                return json.loads(data)
            except (ValueError, RecursionError):
                return None

        return self.call(ask)

    def file(self, name: str) -> bytes:
        """The content of a file, for `call`."""
        return _read(self.client.files.with_streaming_response.content(name), MOST_FILE_BYTES)

    def call(self, ask: Callable[[], Any], within: float | None = None) -> Any | Failure:
        """What `ask` returns, or what went wrong with it; the whole may take `within` seconds, by default the service's
        time-out. Nothing that is raised here may reach a log: services repeat the key in their messages.

        httpx's time-outs are for the time between two bytes, and some services send blanks while they think. So it is
        asked in a thread of its own, which is left alone when it is late; its connection is closed.
        """
        within = within or self.service.timeout
        found: Future[Any] = Future()
        responses: list[Any] = []

        def exchange() -> None:
            self._exchange.responses = responses
            try:
                found.set_result(self._tried(ask))
            except BaseException as error:      # for the thread that waits
                found.set_exception(error)

        threading.Thread(target=exchange, name="exchange", daemon=True).start()
        try:
            return found.result(within + GRACE_S)
        except TimeoutError:
            for response in responses:
                with suppress(Exception):       # it may be read at this moment
                    response.close()
            return Failure(f"no whole answer within {within:g} s", charged=True)

    def _tried(self, ask: Callable[[], Any]) -> Any | Failure:
        import openai

        try:
            return ask()
        except openai.APIStatusError as error:
            return self.refusal(error.status_code, error.body, dict(error.response.headers))
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            late = isinstance(error, openai.APITimeoutError)
            what = f"no answer within {self.service.timeout:g} s" if late else f"{cause}: {error.__cause__}"
            return Failure(self.masked(what), charged=cause not in _NEVER_SENT)
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            return self._broken(f"a body that cannot be read: {type(error).__name__}: {error}")
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):     # openai's, by its version
                raise
            return self._broken(f"{type(error).__name__}: {error}")

    def refusal(self, status: int, body: Any, headers: dict[str, str] | None = None) -> Failure:
        """From a status that is not 200, and the error object with it."""
        told = body.get("error", body) if isinstance(body, dict) else body
        fields = told if isinstance(told, dict) else {}
        said = next((fields[k] for k in ("message", "detail", "error") if fields.get(k)), told)
        headers = {k.lower(): v for k, v in (headers or {}).items()}
        if 300 <= status < 400:
            said = f"a redirect to {headers.get('location', 'nowhere')}, which is not followed"
        code = fields.get("code") if isinstance(fields.get("code"), str) else fields.get("type")
        return Failure(
            self.masked(said if isinstance(said, str) else json.dumps(said)) or "nothing", status,
            str(code or ""), str(fields.get("param") or ""), asked_wait(headers), charged=status in _IN_DOUBT,
        )  # fmt: skip

    def reply(self, answer: Any, request: Request, body: dict[str, Any]) -> Reply | Failure:
        """From the body of an answer with status 200."""
        if isinstance(answer, str):
            try:
                answer = json.loads(answer)
            except (ValueError, RecursionError):
                return self._broken(f"no JSON: {answer}")
        if not isinstance(answer, dict):
            return self._broken("JSON that is no object")
        if isinstance(told := answer.get("error"), dict):       # what some gateways make of a failure behind them
            status = told.get("code") if isinstance(told.get("code"), int) else None
            found = self.refusal(status or 0, told)
            return Failure(found.message, status, found.code, found.parameter, charged=True)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return self._broken("no choices")
        choice = choices[0]
        if request.path == "/completions":
            text, refusal = choice.get("text"), None
        else:
            message = choice.get("message")
            if not isinstance(message, dict):
                return self._broken("a choice without a message")
            text, refusal = _joined(message.get("content")), message.get("refusal")
        text = "" if text is None else text
        if not isinstance(text, str):
            return self._broken("a choice without a text")
        finish, model = choice.get("finish_reason"), answer.get("model")
        finish, model = (value if isinstance(value, str) else "" for value in (finish, model))
        if self.service.api == "megatron":
            cut = _cut(text, body)
            if cut is None:
                return Failure(
                    "the answer does not start with the prompt: Megatron's static server loses special tokens; ask "
                    "with answers.format: plain, or use its dynamic server", 400,
                )  # fmt: skip
            text, finish = cut
        refused = finish == "content_filter" or (isinstance(refusal, str) and bool(refusal))
        text = refusal if isinstance(refusal, str) and refusal else text
        tokens = counts(answer.get("usage"))
        return Reply(self._unsecret(_encodable(text)), refused, finish, self._unsecret(_encodable(model)), *tokens)

    def masked(self, text: str) -> str:
        """`text` on one line, short, and without the key."""
        text = " ".join(self._unsecret(secrets.masked(_encodable(text))).split())
        return text if len(text) <= MESSAGE else text[:MESSAGE] + "…"

    def _unsecret(self, text: str) -> str:
        if len(self._key) < secrets.LEAST:
            return text
        # Services show the key's start and end, with stars between.
        return re.sub(rf"{re.escape(self._key[:3])}\S*\*\*\S*", secrets.MASK, text.replace(self._key, secrets.MASK))

    def _broken(self, what: str) -> Failure:
        return Failure(self.masked(what), charged=True)

    def _bare(self, request: Any) -> None:
        """Of the headers of a request, keep what is needed; the rest is ours."""
        for name in list(request.headers):
            if name.lower() not in _PLAIN:
                del request.headers[name]
        request.headers.update(self._headers)

    def _note(self, response: Any) -> None:
        """For `call`; its headers have come, and no more."""
        getattr(self._exchange, "responses", []).append(response)


def _read(sending: Any, most: int) -> bytes:
    """The body, in pieces. Raises ValueError for more bytes than these."""
    pieces, size = [], 0
    with sending as response:
        for piece in response.iter_bytes():
            pieces.append(piece)
            if (size := size + len(piece)) > most:
                raise ValueError(f"more than {most} bytes")
    return b"".join(pieces)


def _key(service: Service) -> str:
    if service.api_key_env is None:
        return ""
    key = os.environ.get(service.api_key_env, "").strip()
    where = f"{service.where}.api_key_env"
    if not key:
        raise ConfigError(f"{where}: ${service.api_key_env} is not set; export it, or write null for no key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{where}: ${service.api_key_env} holds what cannot be a key: blanks or non-ASCII")
    return key


def _host(service: Service) -> str:
    try:
        url = urlsplit(service.base_url)
        host, _ = url.hostname or "", url.port
    except ValueError:
        url, host = urlsplit(""), ""
    where = f"{service.where}.base_url"
    if url.username or url.password:
        raise ConfigError(f"{where}: a user or a password must not stand in it; use api_key_env")
    if url.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{where}: {service.base_url!r:.200} is no URL that starts with http:// or https://")
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _joined(content: Any) -> Any:
    """A text, where it is a list of parts as well."""
    if not isinstance(content, list):
        return content
    return "".join(p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str))


def counts(usage: Any) -> tuple[int, int]:
    """Tokens of prompt and answer, 0 where they are not counted."""
    fields = usage if isinstance(usage, dict) else {}
    found = [fields.get(name) for name in ("prompt_tokens", "completion_tokens")]
    first, second = (n if type(n) is int and 0 <= n < 1 << 40 else 0 for n in found)
    return first, second


def _encodable(text: str) -> str:
    """Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is replaced."""
    return text.encode(errors="replace").decode()


# ---------------------------------------------------------------------- Megatron's static server


def _for_megatron(body: dict[str, Any]) -> dict[str, Any]:
    """It cuts an answer's start by the length of the prompt as it was sent, which its tokenizer may not give back; with
    the prompt before it, that can be seen. It would look for a stop sequence in the prompt, too, so none is sent."""
    known = ("prompt", "max_tokens", "temperature", "top_p", "top_k", "seed")
    return {k: body[k] for k in known if body.get(k) is not None} | {"echo": True}


def _cut(text: str, body: dict[str, Any]) -> tuple[str, str] | None:
    """The answer after the prompt, up to the first stop sequence, and why it ends if that is known."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not text.startswith(prompt):
        return None
    text = text[len(prompt) :]
    stops = body.get("stop") or []
    ends = [i for stop in ([stops] if isinstance(stops, str) else stops) if (i := text.find(stop)) >= 0]
    return (text[: min(ends)], "stop") if ends else (text, "")
