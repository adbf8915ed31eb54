"""One request to a service, through the `openai` client, without any retry: what comes back is a reply or a failure."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from autoeval_hooks.errors import ConfigError
from eval_runner import secrets
from eval_runner.evaluators.gpt.records import Reply, Request
from eval_runner.evaluators.gpt.retry import Failure, asked_wait
from eval_runner.evaluators.gpt.service import Service

CONNECT_S = 20.0
MOST_BYTES = 64 << 20
"""Of one answer."""
MESSAGE = 300
"""Characters of what a service says that go into our message."""
_NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")
_IN_DOUBT = (408, 502, 504)
"""What gateways say that do not know what became of a request."""
_PLAIN = ("host", "accept", "accept-encoding", "connection", "content-type", "content-length", "user-agent",
          "x-stainless-raw-response")  # fmt: skip
"""The headers that a service without a key is sent: the client would add what the environment holds for OpenAI. The
last one tells the client itself how to read the answer."""


class Wire:
    """The connection to one service. May be used by many threads."""

    def __init__(self, service: Service) -> None:
        """Raises ConfigError for a key that is not in the environment or cannot be sent, and for a wrong URL."""
        import openai  # a second, and only where something is asked

        self.service = service
        self._key = _key(service)
        host = _host(service)
        organization = os.environ.get(service.organization_env or "") or None
        # A redirect is refused: it could carry the questions to a host that nobody configured.
        http = openai.DefaultHttpxClient(
            follow_redirects=False,
            mounts={f"all://{host}": None} if _is_loopback(host) else None,     # no proxy reaches this host's own
            event_hooks={"request": [] if self._key else [_bare]},
        )
        self.client = openai.OpenAI(
            api_key=self._key or "none", organization=organization, base_url=service.base_url, max_retries=0,
            timeout=openai.Timeout(service.timeout, connect=min(service.timeout, CONNECT_S)), http_client=http,
        )  # fmt: skip

    def post(self, request: Request, body: dict[str, Any]) -> Reply | Failure:
        """Send `body`, the request's as the service understands it."""
        sent = _for_megatron(body) if self.service.api == "megatron" else body
        answer = self.call(lambda: self._read(request.path, sent))
        return answer if isinstance(answer, Failure) else self.reply(answer, request, body)

    def _read(self, path: str, body: dict[str, Any]) -> str:
        """The text that is answered, in pieces: services send blanks while they think, and httpx's time-out is for the
        time between two pieces."""
        late = time.monotonic() + self.service.timeout
        asked: Any = {"model": body.get("model", ""), "extra_body": body}     # as it is, whatever the client knows
        if path == "/chat/completions":
            sending = self.client.chat.completions.with_streaming_response.create(messages=[], **asked)
        else:
            sending = self.client.completions.with_streaming_response.create(prompt="", **asked)
        pieces, size = [], 0
        with sending as response:
            for piece in response.iter_bytes():
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise ValueError(f"more than {MOST_BYTES} bytes")
                if time.monotonic() > late:
                    raise TimeoutError
        return b"".join(pieces).decode(errors="replace")

    def models(self) -> Any | Failure:
        """What `GET /models` answers."""
        return self.call(lambda: self.client.get("/models", cast_to=object))

    def call(self, ask: Callable[[], Any]) -> Any | Failure:
        """What `ask` returns, or what went wrong with it. Nothing that is raised here may reach a log: services repeat
        the key in their messages."""
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
        except TimeoutError:
            return Failure(f"no whole answer within {self.service.timeout:g} s", charged=True)
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


def _bare(request: Any) -> None:
    """Keep what is needed of the headers of a request."""
    for name in list(request.headers):
        if name.lower() not in _PLAIN:
            del request.headers[name]


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
