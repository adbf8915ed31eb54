"""Ask a checkpoint, through its server, or a baseline, through an API, for an answer to every question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks.config import canonical
from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt.client import Asker
from eval_runner.evaluators.gpt.records import Answer, Question, Reply, Request
from eval_runner.evaluators.gpt.service import Service
from eval_runner.evaluators.gpt.settings import AnswerSettings, BaselineModel
from eval_runner.servers.base import Endpoint

Format = Literal["chat", "plain"]

STOP = ("\nQuestion:",)
"""Where a plain answer ends at the latest: a base model goes on with a question of its own."""
SEED = 0
"""Sent where an answer is drawn: a server that heeds it gives the same one again."""
STATIC = "megatron static"
"""The server that has no chat, as its facts name it."""


# ---------------------------------------------------------------------- how a checkpoint is asked


def form(wanted: Literal["auto", "chat", "plain"], tokenizer: Path, facts: dict[str, str], where: str) -> Format:
    """How the checkpoint is asked; `auto` is chat where its tokenizer has a template and the server can apply it.
    Raises ConfigError where that is impossible, or cannot be known."""
    static = facts.get("server") == STATIC
    if wanted == "chat" and static:
        raise ConfigError(
            f"{where}.answers.format: Megatron-LM's static server completes text only; write `plain`, or use "
            "`mode: dynamic` in `server`"
        )
    if wanted != "auto":
        return wanted
    return "chat" if not static and has_chat_template(tokenizer) else "plain"


def has_chat_template(tokenizer: Path) -> bool:
    """Whether a tokenizer's directory holds a default chat template, in any of the places where transformers looks:
    `chat_template.jinja`, `chat_template.json`, or `chat_template` in `tokenizer_config.json`, a text or a list of
    named ones. Named ones alone (`additional_chat_templates/`) are for who asks for them.

    Raises ConfigError for a file that is no JSON.
    """
    if (tokenizer / "chat_template.jinja").is_file():
        return True
    return any(_has_default(tokenizer / name) for name in ("chat_template.json", "tokenizer_config.json"))


def _has_default(path: Path) -> bool:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); is there a chat template? Set answers.format") from error
    template = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(template, list):
        return any(isinstance(one, dict) and one.get("name") == "default" for one in template)
    if isinstance(template, dict):
        return "default" in template
    return isinstance(template, str) and bool(template)


def requests(questions: Sequence[Question], settings: AnswerSettings, style: Format, model: str) -> list[Request]:
    """What the checkpoint is asked. `model` is the name that its weights have here, whatever its server calls it."""
    made = []
    for question in questions:
        body: dict[str, Any] = {"model": model}
        if style == "chat":
            body["messages"] = _messages(settings.system, question)
        else:
            asked = settings.template.replace("{question}", question.text)
            body["prompt"] = f"{settings.system}\n\n" * bool(settings.system) + asked
        body |= {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
        if settings.temperature > 0:
            body["seed"] = SEED
        if stop := stops(settings, style):
            body["stop"] = list(stop)
        made.append(Request("/chat/completions" if style == "chat" else "/completions", body))
    return made


def stops(settings: AnswerSettings, style: Format) -> tuple[str, ...]:
    return settings.stop or (STOP if style == "plain" else ())


def service(
    endpoint: Endpoint | None, settings: AnswerSettings, name: str, digest: str, facts: dict[str, str], where: str
) -> Service:
    """The checkpoint's server. Its answers are known by all files of the checkpoint (`digest`) and by what they are
    served with, never by the port; without an `endpoint` (it has not started), only what is known can be looked up."""
    endpoint = endpoint or Endpoint("http://127.0.0.1:9", "openai", name)       # the discard port: never asked
    # Megatron-LM's own servers say no name; that what answers is a process of ours was seen when it started.
    nameless = facts.get("server", "").startswith("megatron")
    return Service(
        name="the checkpoint's server", api=endpoint.api,
        base_url=endpoint.url if endpoint.api == "megatron" else f"{endpoint.url}/v1",
        identity=canonical({"checkpoint": name, "digest": digest, "facts": facts}), api_key_env=endpoint.api_key_env,
        accept_models=("*",) if nameless else (endpoint.model,), concurrency=settings.concurrency,
        timeout=settings.timeout, where=f"{where}.answers",
    )  # fmt: skip


class Served(Asker):
    """Asks the checkpoint's server by the name that it goes by. Keys have the checkpoint's own, which is known before
    the server has started."""

    name: str = ""

    def understood(self, body: dict[str, Any]) -> dict[str, Any]:
        return super().understood(body) | ({"model": self.name} if self.name else {})


# ---------------------------------------------------------------------- asking


def collect(
    asker: Asker, questions: Sequence[Question], asked: Sequence[Request], window: int | None
) -> None:
    """Ask what is not known yet. Raises what `Asker.ask` does, with the question's id where one cannot be answered,
    and ConfigError for a question that does not fit the model's window of so many tokens."""
    try:
        replies = asker.ask(asked)
    except ConfigError:
        _ask_one_by_one(asker, questions, asked)
        replies = asker.ask(asked)
    for question, reply in zip(questions, replies, strict=True):
        _check_window(question, reply, window)


def _check_window(question: Question, reply: Reply, window: int | None) -> None:
    """Some servers go on beyond it, and answer nonsense."""
    if window is not None and reply.input_tokens + reply.output_tokens > window:
        raise ConfigError(
            f"question {question.id!r}: its prompt has {reply.input_tokens} tokens and its answer "
            f"{reply.output_tokens}, and the model takes {window} in all; shorten it, or lower answers.max_tokens"
        )


def _ask_one_by_one(asker: Asker, questions: Sequence[Question], asked: Sequence[Request]) -> None:
    """Find out which question it was that the server refused: it is among the first that have no answer."""
    for question, request in zip(questions, asked, strict=True):
        if asker.known(request) is None:
            try:
                asker.ask([request])
            except ConfigError as error:
                raise ConfigError(f"question {question.id!r} cannot be asked: {error}") from error


def answers(
    asker: Asker, questions: Sequence[Question], asked: Sequence[Request], model: str, stop: Sequence[str],
    window: int | None = None,
) -> list[Answer]:  # fmt: skip
    """The answers that are known by now; all of them, or an error names the first that is not, or that went beyond the
    model's window."""
    found = []
    for question, request in zip(questions, asked, strict=True):
        reply = asker.known(request)
        if reply is None:
            said = "its answer is gone from the cache; do not empty it meanwhile"
            raise AutoEvalError(f"question {question.id!r}: {said}")
        _check_window(question, reply, window)
        found.append(Answer(question.id, model, trimmed(reply.text, stop), reply.finish))
    return found


def trimmed(text: str, stop: Sequence[str]) -> str:
    """An answer as it is judged: up to the first `stop`, which some servers leave in or do not heed, without space
    around it, and without characters that no file or request can hold."""
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return clean_text(text[: min(ends, default=len(text))]).strip()


def clean_text(text: str) -> str:
    """With U+FFFD in the place of NUL and of halves of surrogate pairs, which a model's bytes may come out as."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


# ---------------------------------------------------------------------- the baseline


def baseline_requests(
    questions: Sequence[Question], settings: BaselineModel, answering: AnswerSettings
) -> list[Request]:
    """What an API model is asked, as a chat; what `baseline` does not say is as for the checkpoint."""
    body: dict[str, Any] = {"model": settings.model, "max_tokens": settings.max_tokens or answering.max_tokens}
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if answering.stop:
        body["stop"] = list(answering.stop)
    return [
        Request("/chat/completions", {**body, "messages": _messages(answering.system, question)})
        for question in questions
    ]


def baseline_answers(
    asker: Asker, questions: Sequence[Question], asked: Sequence[Request], stop: Sequence[str]
) -> list[Answer]:
    """Raises what `Asker.ask` does, and ConfigError where the baseline gives an empty answer: a win over nothing says
    nothing."""
    found = []
    for question, reply in zip(questions, asker.ask(asked), strict=True):
        text = trimmed(reply.text, stop)
        if not text:
            raise ConfigError(
                f"{asker.service.where}: {reply.model} gives no answer to question {question.id!r}"
                f"{' (it refuses)' if reply.refused else f' ({reply.finish})' if reply.finish else ''}; raise its "
                "max_tokens, take the question out, or give a baseline_file"
            )
        found.append(Answer(question.id, reply.model, text, reply.finish))
    return found


def _messages(system: str | None, question: Question) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question.text}]
