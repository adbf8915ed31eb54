"""What autoeval adds to HELM for a checkpoint that a server answers for: a client, and its window service.

As `autoeval_helm` beside it, this module runs inside the environment of HELM, which has no autoeval.

Two protocols. ``megatron`` is `PUT /api` of Megatron-LM's static server: it gives the tokens as numbers, which
its `POST /completions` does not; that one also loses tokens where the prompt starts with the end of text.
``openai`` is `POST /v1/completions` of Megatron-LM's dynamic server, asked with the tokens of the prompt, so that
nothing depends on how the server cuts text. Either way an answer that does not hold the prompt token by token is
refused: a log-probability that stands at the wrong token is worse than none.
"""

from __future__ import annotations

import functools
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autoeval_helm import _loaded, _sizes  # type: ignore[import-not-found]  # beside this file, in HELM's processes
from helm.benchmark.window_services.local_window_service import LocalWindowService
from helm.clients.client import Client, truncate_sequence
from helm.common.request import (
    EMBEDDING_UNAVAILABLE_REQUEST_RESULT,
    ErrorFlags,
    GeneratedOutput,
    Request,
    RequestResult,
    Token,
)
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

CANNOT_ASK = "autoeval cannot ask the server"
UNUSABLE = "autoeval cannot use what the server says"
BROKEN = "the served model's log-probabilities are no numbers"
"""Start the messages of errors: the server's, perhaps gone at the next try; one of settings or versions; the
checkpoint's. autoeval looks for them in the log."""

ANSWER_S = 1800.0
"""Seconds that one answer may take; a server that died ends the connection at once."""
BUSY = (408, 429)
"""Statuses below 500 that another try may mend."""


class Failed(Exception):
    """A request that got no usable answer; the message starts with one of the markers above."""


@dataclass(frozen=True)
class Answer:
    """The prompt's tokens (where they were asked for) and those that the model added, and the text of the latter."""

    prompt: list[Token]
    generated: list[Token]
    text: str


class ServedClient(Client):  # type: ignore[misc]  # helm is not here for mypy
    """A client of one server; `url` has no slash at its end, `model` is the name that an ``openai`` server knows."""

    def __init__(self, tokenizer: Any, url: str, api: str, model: str):
        self._ask = {"megatron": _ask_megatron, "openai": _ask_openai}[api]
        self._url = url
        self._model = model
        self._tokenizer = _loaded("the tokenizer", model, tokenizer.get_wrapped_tokenizer)
        with self._tokenizer as plain:
            self._end = plain.eos_token

    def make_request(self, request: Request) -> RequestResult:
        """HELM's protocol: what goes wrong is told in the result, and not tried again: HELM would wait for minutes."""
        if request.embedding:
            return EMBEDDING_UNAVAILABLE_REQUEST_RESULT
        began = time.time()
        try:
            completions = [self._completion(request) for _ in range(request.num_completions)]
        except Failed as error:
            flags = ErrorFlags(is_retriable=False, is_fatal=True)
            return RequestResult(False, [], [], cached=False, error=str(error), error_flags=flags)
        return RequestResult(
            True, [], completions, cached=False, request_time=time.time() - began, request_datetime=int(began)
        )

    def _completion(self, request: Request) -> GeneratedOutput:
        if request.messages:
            raise Failed(f"{UNUSABLE}: HELM asks with chat messages, and the server completes text")
        with self._tokenizer as plain:
            answer = self._ask(self._url, self._model, request, plain)
        generated = answer.generated[: request.max_tokens]      # at least one is always asked for
        text = answer.text if request.max_tokens else ""
        tokens = answer.prompt + generated if request.echo_prompt else generated
        text = request.prompt + text if request.echo_prompt else text
        whole = GeneratedOutput(text=text, logprob=sum(t.logprob for t in tokens), tokens=tokens)
        return truncate_sequence(whole, request, end_of_text_token=self._end, print_warning=False)


# ---------------------------------------------------------------------- the two protocols


def _ask_megatron(url: str, model: str, request: Request, tokenizer: Any) -> Answer:
    # Temperature 0 is refused; the server's own default of top_k is 0, all tokens.
    sampling: dict[str, Any] = {"temperature": float(request.temperature)} if request.temperature else {"top_k": 1}
    if request.temperature and 0 < request.top_p < 1:
        sampling["top_p"] = float(request.top_p)
    wanted = max(1, request.max_tokens)
    body = {"prompts": [request.prompt], "tokens_to_generate": wanted, "logprobs": True} | sampling
    where = f"{url}/api"
    answer = _http("PUT", where, body)
    tokens, logprobs = (_only(answer, key, where) for key in ("tokens", "logprobs"))
    if len(logprobs) != len(tokens) - 1:
        raise Failed(f"{UNUSABLE}: {where} gives {len(logprobs)} log-probabilities for {len(tokens)} tokens")
    length = _prompt_length(tokens, request.prompt, tokenizer, where)
    if len(tokens) - length > wanted:
        raise Failed(f"{UNUSABLE}: {where} adds {len(tokens) - length} tokens where {wanted} were asked for")
    found = _tokens(tokenizer, tokens, [None, *logprobs], where)
    return Answer(found[:length], found[length:], tokenizer.decode(tokens[length:]))


def _ask_openai(url: str, model: str, request: Request, tokenizer: Any) -> Answer:
    ids = tokenizer(request.prompt).input_ids
    # Megatron 0.17 and 0.18 end when they are asked for no token.
    wanted = max(1, request.max_tokens)
    body = {
        "model": model, "prompt": ids, "max_tokens": wanted, "temperature": float(request.temperature),
        "top_p": float(request.top_p), "logprobs": 0, "echo": bool(request.echo_prompt),
    }  # fmt: skip
    if request.stop_sequences:
        body["stop"] = list(request.stop_sequences)
    where = f"{url}/v1/completions"
    choice = _only(_http("POST", where, body), "choices", where, of=dict)
    told = choice.get("logprobs")
    if not isinstance(told, dict) or not all(isinstance(told.get(k), list) for k in ("tokens", "token_logprobs")):
        raise Failed(f"{UNUSABLE}: {where} gives no log-probabilities")
    texts, logprobs = told["tokens"], told["token_logprobs"]
    if not request.echo_prompt and logprobs[:1] == [None]:
        logprobs = logprobs[1:]     # Megatron keeps the place of the prompt's first token
    if not request.echo_prompt and body.get("stop") and choice.get("finish_reason") == "stop":
        logprobs = logprobs[: len(texts)]   # and takes a stop sequence off the tokens, not all of it off these
    if len(logprobs) != len(texts):
        raise Failed(f"{UNUSABLE}: {where} gives {len(logprobs)} log-probabilities for {len(texts)} tokens")
    length = len(ids) if request.echo_prompt else 0
    added, numbers = texts[length:], choice.get("generation_token_ids")
    if len(added) > wanted or (numbers is not None and len(numbers) != len(added)):
        raise _misaligned(f"{len(texts)} tokens for a prompt of {length} and {wanted} more", where)
    if request.echo_prompt:
        _check_prompt(ids, choice.get("prompt_token_ids"), texts, tokenizer, where)
    if numbers is not None:
        found = _tokens(tokenizer, [*ids[:length], *numbers], logprobs, where, starts=length > 0)
        return Answer(found[:length], found[length:], tokenizer.decode(numbers))
    prompt = _tokens(tokenizer, ids[:length], logprobs[:length], where)
    generated = [Token(str(t), _number(n, where)) for t, n in zip(added, logprobs[length:], strict=True)]
    return Answer(prompt, generated, "".join(t.text for t in generated))


# ---------------------------------------------------------------------- whether an answer is of this prompt


def _prompt_length(tokens: list[int], prompt: str, tokenizer: Any, where: str) -> int:
    """How many tokens of the answer are the prompt's. Megatron's tokenizers may leave out the start token that the
    tokenizer of transformers puts before every text; then it is left out for all."""
    ways = [tokenizer(prompt).input_ids, tokenizer(prompt, add_special_tokens=False).input_ids]
    for ids in ways:
        if tokens[: len(ids)] == ids:
            return len(ids)
    raise _misaligned(_difference(ways[0], tokens), where)


def _check_prompt(
    ids: list[int], given: list[int] | None, texts: list[Any], tokenizer: Any, where: str
) -> None:
    """Raise Failed unless the answer starts with the prompt: by its tokens' numbers, else by their text."""
    if given is not None:
        if given != ids:
            raise _misaligned(_difference(ids, given), where)
        return
    if len(texts) < len(ids):
        raise _misaligned(f"{len(texts)} tokens for a prompt of {len(ids)}", where)
    expected = [tokenizer.decode([i]).strip() for i in ids]
    if (found := [str(t).strip() for t in texts[: len(ids)]]) != expected:
        raise _misaligned(_difference(expected, found), where)


def _difference(expected: Sequence[Any], found: Sequence[Any]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    shown = [repr(side[at]) if at < len(side) else "nothing" for side in (found, expected)]
    return f"token {at} of {len(expected)} is {shown[0]}, not {shown[1]}"


def _misaligned(what: str, where: str) -> Failed:
    return Failed(
        f"{UNUSABLE}: {where} answers for another prompt: {what}; does the server use the run's tokenizer? The static "
        "server of Megatron 0.17 and later drops special tokens: use the dynamic one"
    )


def _tokens(
    tokenizer: Any, ids: list[int], logprobs: list[Any], where: str, *, starts: bool = True
) -> list[Token]:
    """The first of a text that `starts` here may be without a log-probability: nothing stands before it."""
    if starts and logprobs[:1] == [None]:
        logprobs = [0.0, *logprobs[1:]]
    return [Token(tokenizer.decode([i]), _number(n, where)) for i, n in zip(ids, logprobs, strict=True)]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Failed(f"{UNUSABLE}: {where} gives {value!r} for a log-probability")
    if not math.isfinite(value):
        raise Failed(f"{BROKEN}: {where} gives {value}")
    return float(value)


def _only(answer: dict[str, Any], key: str, where: str, of: type = list) -> Any:
    """The one item of the list `key`."""
    items = answer.get(key)
    if not isinstance(items, list) or len(items) != 1 or not isinstance(items[0], of):
        raise Failed(f"{UNUSABLE}: {where} has no list of one `{key}`: {_short(json.dumps(answer))}")
    return items[0]


# ---------------------------------------------------------------------- HTTP


def _http(method: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))   # the server is on this host
    try:
        with opener.open(request, timeout=ANSWER_S) as response:
            text = response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        kind = CANNOT_ASK if error.code >= 500 or error.code in BUSY else UNUSABLE
        raise Failed(f"{kind}: {url} answers {error.code}: {_said(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{CANNOT_ASK}: {url}: {type(error).__name__}: {_short(str(error))}") from error
    try:
        answer = json.loads(text)
    except ValueError:
        answer = text
    if not isinstance(answer, dict):    # a text is how the static server refuses, with status 200
        raise Failed(f"{UNUSABLE}: {url} says: {_short(str(answer)) or 'nothing'}")
    return answer


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return _short(error.read().decode(errors="replace")) or "nothing"
    except (OSError, http.client.HTTPException):
        return "an answer that breaks off"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "…"


# ---------------------------------------------------------------------- the window


@functools.cache
def _ends(tokenizer_name: str, tokenizer: str, trusted: bool) -> tuple[str, str, bool]:
    """The tokenizer's end of text and start of text, and whether it adds the latter itself."""
    code = {"trust_remote_code": trusted}
    wrapped = _loaded(
        "the tokenizer", tokenizer, lambda: HuggingFaceTokenizer.get_tokenizer(tokenizer_name, tokenizer, **code)
    )
    with wrapped as plain:
        adds_start = bool(plain("x").input_ids[:1] == [plain.bos_token_id])
        return plain.eos_token or "", plain.bos_token or plain.eos_token or "", adds_start


class ServedWindow(LocalWindowService):  # type: ignore[misc]  # helm is not here for mypy
    """That of `autoeval_helm.CheckpointWindow`, of one token less than `max_length`: one more is always asked for."""

    def __init__(
        self, service: Any, tokenizer_name: str, tokenizer: str, max_length: int, trust_remote_code: bool = False
    ):
        end, start, adds_start = _ends(tokenizer_name, tokenizer, trust_remote_code)
        super().__init__(service, tokenizer_name, **_sizes(max_length - 1, end, start, adds_start))
