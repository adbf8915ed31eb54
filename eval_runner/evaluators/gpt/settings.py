"""The settings of a `type: gpt` entry."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import build, near
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.gpt.records import Mode
from eval_runner.evaluators.gpt.service import Access, Service
from eval_runner.evaluators.written import clean, located, prefixed, refused

SETS = ("general-en", "general-ja", "general-ko")
"""The built-in question sets."""
OPENAI_URL = "https://api.openai.com/v1"

_OLD_KEYS = {
    "openai_api_key": "api_key_env: NAME_OF_AN_ENVIRONMENT_VARIABLE",
    "openai_organization": "organization_env: NAME_OF_AN_ENVIRONMENT_VARIABLE",
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_VALID: dict[str, tuple[Callable[[Any], object], str]] = {
    "max_tokens": (lambda v: v >= 1, "must be 1 or more"),
    "temperature": (lambda v: 0 <= v <= 2, "must be from 0 to 2"),
    "concurrency": (lambda v: 1 <= v <= 1000, "must be from 1 to 1000"),
    "requests_per_minute": (lambda v: v > 0, "must be more than 0"),
    "tokens_per_minute": (lambda v: v > 0, "must be more than 0"),
    "timeout": (lambda v: v > 0, "must be more than 0 seconds"),
    "attempts": (lambda v: 1 <= v <= 100, "must be from 1 to 100"),
    "input": (lambda v: v >= 0, "must be 0 or more"),
    "output": (lambda v: v >= 0, "must be 0 or more"),
    "budget_usd": (lambda v: v > 0, "must be more than 0"),
    "max_unreviewed": (lambda v: 0 <= v <= 1, "must be from 0 to 1"),
    "model": (lambda v: v.strip() == v != "", "expected the name of a model"),
    "template": (lambda v: "{question}" in v, "must have {question}, where the question's text stands"),
    "stop": (lambda v: all(v), "an empty text would stop every answer"),
    "api_key_env": (lambda v: _VARIABLE.fullmatch(v), "expected the name of an environment variable, no key itself"),
    "organization_env": (lambda v: _VARIABLE.fullmatch(v), "expected the name of an environment variable"),
}
"""What is allowed where a key of this name has a value, wherever it stands. A message never shows the value."""
_PLACEHOLDER = re.compile(r"\{(step|model)\}")


@dataclass(frozen=True)
class AnswerSettings:
    """How the checkpoint is asked for its answers, and the baseline of an API model where it says nothing else.
    `template` is what a model without a chat template completes; `timeout` is in seconds, for one answer."""

    max_tokens: int = 512
    temperature: float = 0.0
    format: Literal["auto", "chat", "plain"] = "auto"
    template: str = "Question: {question}\n\nAnswer:"
    system: str | None = None
    stop: tuple[str, ...] = ()
    concurrency: int = 4
    timeout: float = 600.0


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Access):
    """The service that judges. `model`, `temperature` and `max_tokens` replace what the reviewer file says; None
    leaves it. `omit` names parameters that are not sent at all: a written ``temperature: null`` stands there, too.
    `base_url` is never empty after `parse`."""

    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    omit: tuple[Literal["temperature", "max_tokens"], ...] = ()
    structured: Literal["auto", "true", "false"] = "auto"
    batch: bool = False


@dataclass(frozen=True, kw_only=True)
class BaselineModel(Access):
    """An API model that answers the questions once. `max_tokens` None is that of `answers`, as is what is not named
    here (`system`, `stop`); `temperature` None is not sent. `base_url` as in `JudgeSettings`."""

    model: str
    temperature: float | None = 0.0
    max_tokens: int | None = None


@dataclass(frozen=True)
class Settings:
    """What the suite says. After `parse`, `name` is never empty, and fit for a benchmark's name."""

    name: str = ""
    questions: str | None = None
    question_file: str | None = None
    mode: Mode = "pairwise"
    baseline_file: str | None = None
    baseline: BaselineModel | None = None
    prompt_file: str | None = None
    reviewer_file: str | None = None
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    budget_usd: float | None = None
    max_unreviewed: float = 0.1
    anchors: str = "default"
    answer_file: str | None = None
    result_file: str | None = None


@dataclass(frozen=True)
class Located:
    """The files that the settings name, or ours; absolute, and not looked at so far."""

    questions: Path
    baseline: Path | None
    prompts: Path
    reviewers: Path
    anchors: Path | None


def parse(data: dict[str, Any], context: Context) -> Settings:
    """Raises ConfigError that names every key that does not fit. Reads $OPENAI_BASE_URL, and no file."""
    errors: list[str] = []
    where = context.where
    settings = build(Settings, _rewritten(data, where, errors), where, errors)
    if settings is not None:
        _check_values(settings, where, errors)
        _check_choices(settings, where, errors)
        settings = _completed(settings, where, errors)
    if errors or settings is None:
        raise refused(context, errors)
    return settings


def locate(settings: Settings, context: Context) -> Located:
    """Where the files are: relative to `context.base_dir`, `~` is the home directory, built-in ones in the package.
    Raises ConfigError for a home directory that is not known."""

    def file(key: str, ours: str) -> Path:
        written = getattr(settings, key)
        return _located(written, f"{context.where}.{key}", context) if written else built_in(ours)

    return Located(
        questions=file("question_file", f"{settings.questions}.jsonl"),
        baseline=file("baseline_file", "") if settings.baseline_file else None,
        prompts=file("prompt_file", f"prompts-{settings.mode}.jsonl"),
        reviewers=file("reviewer_file", "reviewers.jsonl"),
        anchors=_anchors(settings.anchors, context),
    )


def service(part: JudgeSettings | BaselineModel, name: str, where: str) -> Service:
    """How a service is asked; `name` is for messages, `where` the key path of its settings."""
    same = {f.name: getattr(part, f.name) for f in dataclasses.fields(Access)}
    return Service(name=name, identity=part.base_url, where=where, **same)


def built_in(name: str) -> Path:
    """A file of `sets/`."""
    return Path(str(resources.files("eval_runner.evaluators.gpt") / "sets" / name))


def output_path(written: str, context: Context, *, step: int, model: str) -> Path:
    """The path of an `answer_file` or `result_file` for one checkpoint; what a file name bears badly in `model`
    becomes ``_``. Raises ConfigError for a home directory that is not known."""
    values = {"step": str(step), "model": clean(model)}
    filled = _PLACEHOLDER.sub(lambda found: values[found[1]], written)
    return _located(filled, context.where, context)


def _anchors(written: str, context: Context) -> Path | None:
    if written in ("default", "none"):
        return built_in("anchors.jsonl") if written == "default" else None
    return _located(written, f"{context.where}.anchors", context)


def _located(written: str, where: str, context: Context) -> Path:
    try:
        return located(context.base_dir, written)
    except RuntimeError as error:       # ~ or ~USER
        raise ConfigError(prefixed(context, f"{where}: {written}: no such home directory; write it in full")) from error


def _rewritten(data: dict[str, Any], where: str, errors: list[str]) -> dict[str, Any]:
    """What may be written in a second way, as the dataclasses have it; the older toolkit's secrets are refused."""
    data = _without_old_keys(data, where, errors)
    for key in ("judge", "baseline"):
        if isinstance(data.get(key), dict):
            data[key] = _without_old_keys(data[key], f"{where}.{key}", errors)
    judge = data.get("judge")
    if isinstance(judge, dict):
        if isinstance(judge.get("structured"), bool):       # of YAML
            judge["structured"] = str(judge["structured"]).lower()
        nothing = [name for name in ("temperature", "max_tokens") if name in judge and judge[name] is None]
        if nothing and isinstance(judge.setdefault("omit", []), list):
            judge["omit"] = judge["omit"] + nothing
    return data


def _without_old_keys(data: dict[str, Any], where: str, errors: list[str]) -> dict[str, Any]:
    remedy = "no secret stands in a file: remove it, export it as an environment variable, and write"
    for key in sorted(data.keys() & _OLD_KEYS.keys()):
        section = "" if where.endswith((".judge", ".baseline")) else "judge."
        errors.append(f"{where}.{key}: {remedy} `{section}{_OLD_KEYS[key]}`")
    return {key: value for key, value in data.items() if key not in _OLD_KEYS}


def _check_values(part: object, where: str, errors: list[str]) -> None:
    for one in dataclasses.fields(part):  # type: ignore[arg-type]  # one of the dataclasses above
        value = getattr(part, one.name)
        if dataclasses.is_dataclass(value):
            _check_values(value, f"{where}.{one.name}", errors)
        elif value is not None and one.name in _VALID:
            fits, words = _VALID[one.name]
            if not fits(value):
                errors.append(f"{where}.{one.name}: {words}")


def _check_choices(s: Settings, where: str, errors: list[str]) -> None:
    """What keys say about each other, and texts that name one of several things."""
    if (s.questions is None) == (s.question_file is None):
        errors.append(f"{where}: give either `questions` (a built-in set: {', '.join(SETS)}) or `question_file`")
    if s.questions is not None and s.questions not in SETS:
        errors.append(f"{where}.questions: no built-in set {s.questions!r:.60}{near(s.questions, SETS)}; "
                      "for a file of your own write `question_file`")  # fmt: skip
    if s.mode == "pairwise" and (s.baseline_file is None) == (s.baseline is None):
        errors.append(f"{where}: mode 'pairwise' needs either `baseline_file` or `baseline`")
    if s.mode != "pairwise" and (s.baseline_file is not None or s.baseline is not None):
        errors.append(f"{where}: mode {s.mode!r} has no baseline; remove it, or write `mode: pairwise`")
    for name in ("question_file", "baseline_file", "prompt_file", "reviewer_file", "anchors"):
        if getattr(s, name) == "":
            errors.append(f"{where}.{name}: expected a path")
    if s.budget_usd is not None:
        for name, service in (("judge", s.judge), ("baseline", s.baseline)):
            if service is not None and service.price is None:
                errors.append(f"{where}.{name}.price: missing; budget_usd needs it (USD per million tokens; 0 for a "
                              "server of your own)")  # fmt: skip
    for name in s.judge.omit:
        if getattr(s.judge, name) is not None:
            errors.append(f"{where}.judge.{name}: stands in `omit`, too; remove one of them")
    _check_outputs(s, where, errors)


def _check_outputs(s: Settings, where: str, errors: list[str]) -> None:
    for name in ("answer_file", "result_file"):
        written = getattr(s, name)
        if written is None:
            continue
        if re.search(r"[{}]", _PLACEHOLDER.sub("", written)):
            errors.append(f"{where}.{name}: {written!r:.200}: only {{step}} and {{model}} may stand in braces")
        elif not _PLACEHOLDER.search(written):
            errors.append(f"{where}.{name}: {written!r:.200} is written anew for each checkpoint; "
                          "put {step} or {model} into it")  # fmt: skip
    if s.answer_file is not None and s.answer_file == s.result_file:
        errors.append(f"{where}.result_file: is the answer_file, too")


def _completed(s: Settings, where: str, errors: list[str]) -> Settings:
    """With a name and base URLs."""
    written = s.name or s.questions or Path(s.question_file or "").stem
    if re.search(r"[A-Za-z0-9]", written) is None and (s.name or s.question_file):
        errors.append(f"{where}.name: {written!r:.60} has no letter or digit that a benchmark's name can hold; "
                      "give one, such as `name: my-questions`")  # fmt: skip
    judge = dataclasses.replace(s.judge, base_url=_base_url(s.judge.base_url, f"{where}.judge.base_url", errors))
    baseline = s.baseline and dataclasses.replace(
        s.baseline, base_url=_base_url(s.baseline.base_url, f"{where}.baseline.base_url", errors)
    )
    return dataclasses.replace(s, name=clean(written), judge=judge, baseline=baseline)


def _base_url(written: str, where: str, errors: list[str]) -> str:
    """The settings' URL, else $OPENAI_BASE_URL, else OpenAI's; without a slash at its end."""
    variable = os.environ.get("OPENAI_BASE_URL", "")
    url, source = (written, where) if written else (variable, f"{where} ($OPENAI_BASE_URL)")
    url = (url or OPENAI_URL).rstrip("/")
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits or not url.isprintable() or " " in url:
        errors.append(f"{source}: expected a URL such as {OPENAI_URL}")
    elif "@" in parts.netloc or parts.query or parts.fragment:
        errors.append(f"{source}: a user, a password, `?` or `#` may not stand in it; the key belongs into the "
                      "environment variable that api_key_env names")  # fmt: skip
    elif parts.path.endswith(("/chat/completions", "/completions", "/models")):
        errors.append(f"{source}: is one of the API's paths; write what stands before it, such as {OPENAI_URL}")
    return url
