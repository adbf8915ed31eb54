"""What the training side reads of ``autoeval.yaml``, and what both sides must agree on: sections and digests.

The hook reads `queue`, `run`, `hook`, `path_map` and the suites' cadence; `eval_runner.config` reads all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from autoeval_hooks import yamlfile
from autoeval_hooks.errors import ConfigError as ConfigError
from autoeval_hooks.strict import build, near
from autoeval_hooks.yamlfile import expand as expand
from autoeval_hooks.yamlfile import read_yaml as read_yaml

VERSION = 1
KEYS = (
    "version", "queue", "run", "hook", "path_map", "suites", "runner", "server", "convert", "environments", "sinks",
)  # fmt: skip
"""All keys at the top level of the file; the runner's model has the same."""

_SUITE_NAME = re.compile(r"(?!\.+\Z)[A-Za-z0-9_.-]{1,64}\Z")
_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}   # pydantic's words, for the runner


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for `Annotated`. Pydantic, which the runner reads with, understands it too."""

    low: float
    high: float | None = None
    above: bool = False
    """The number must be greater than `low`, not just equal."""

    def misfit(self, value: float) -> str:
        """What is wrong with the number; empty if nothing is."""
        if value < self.low or (self.above and value == self.low):
            return f"must be {'more than' if self.above else 'at least'} {self.low:g}, found {value}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high:g}, found {value}"
        return ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> dict[str, Any]:
        bounds = {"gt" if self.above else "ge": self.low, "le": self.high}
        return {**handler(source), **{k: v for k, v in bounds.items() if v is not None}}


@dataclass(frozen=True)
class RunSection:
    """`run`: what the training process may not know of its own run. None: found out, or not used."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    tokens_per_step: Annotated[int, Range(1)] | None = None
    tokenizer: str | None = None
    """The tokenizer's directory, used where a checkpoint holds none; absolute once loaded."""


@dataclass(frozen=True)
class HookSection:
    """`hook`: how a checkpoint is kept until it is evaluated. `auto` pins by reflink, else by hard link."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    pin: Literal["auto", "reflink", "hardlink", "copy", "none"] = "auto"
    max_pins: Annotated[int, Range(1)] = 32
    on_full: Literal["supersede", "unpinned"] = "supersede"
    """Once there are `max_pins`: cancel the oldest waiting ticket, visibly, or queue the new one without a pin."""
    save_total_limit: Annotated[int, Range(1)] | None = None
    """How many checkpoints the hook keeps in the output directory, in place of the Trainer's own `save_total_limit`:
    those that a ticket without a pin waits for are spared. None: the hook deletes none."""
    deadline: Annotated[float, Range(0, above=True)] = 5.0
    """Seconds that a training step may be held."""


@dataclass(frozen=True)
class Cadence:
    """When a suite is due, and which goes first (`priority`, 9 before 0). These keys say when, not what: they are no
    part of the suite's digest."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    every_steps: Annotated[int, Range(1)] = 1
    begin_step: Annotated[int, Range(0)] = 0
    end_step: Annotated[int, Range(0)] | None = None
    priority: Annotated[int, Range(0, 9)] = 5

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is evaluated: a multiple of `every_steps`, from `begin_step` to
        `end_step`, both included."""
        last = step if self.end_step is None else self.end_step
        return self.begin_step <= step <= last and step % self.every_steps == 0


@dataclass(frozen=True)
class HookSuite:
    """What the hook knows of a suite: when it is due, and the digest of its definition."""

    cadence: Cadence
    digest: str


@dataclass(frozen=True)
class HookConfig:
    """What the hook works by. `path` and `queue` are absolute paths on the training host."""

    path: str
    queue: str
    run: RunSection
    hook: HookSection
    path_map: dict[str, str]
    suites: dict[str, HookSuite]


@dataclass(frozen=True, kw_only=True)
class _Read:
    """The top level, as far as the hook reads it and but for the suites."""

    version: int = VERSION
    queue: str
    run: RunSection = field(default_factory=RunSection)
    hook: HookSection = field(default_factory=HookSection)
    path_map: dict[str, str] = field(default_factory=dict)


_OLDER = "is the older watcher's configuration; give the file to `autoeval-runner watch`, which needs no hook"
CADENCE_KEYS = tuple(f.name for f in fields(Cadence))


def load(path: str | os.PathLike[str], **overrides: Any) -> HookConfig:
    """Read and check what the hook needs of a configuration file.

    `overrides` are top-level keys (``queue="/q"``, ``run={"name": "a"}``) laid over the file's, mappings into
    mappings. Environment variables are filled in where the hook reads: never in evaluators, whose secrets the
    training host does not have. Raises one ConfigError with all that is wrong.
    """
    file = os.fspath(path)
    raw = merged(read_yaml(file), overrides)
    if overrides:
        file += f" (with {', '.join(f'{key}=' for key in overrides)} given in code)"
    errors = check_keys(raw)
    shown: yamlfile.Shown = {}
    own = {k: raw[k] for k in ("version", "queue", "run", "hook", "path_map") if k in raw}
    own = yamlfile.expand_into(own, "", errors, shown)
    own.setdefault("queue", "missing")      # check_keys has said so
    top = build(_Read, own, "", errors)
    errors += _out_of_range(_Read, own, "")
    suites = dict(_suites(raw.get("suites"), errors, shown))
    errors += check_values(own)
    yamlfile.fail(file, yamlfile.unexpanded(errors, shown))
    assert top is not None      # there would be errors
    base = os.path.dirname(os.path.abspath(os.fspath(path)))
    return HookConfig(
        path=os.path.abspath(os.fspath(path)),
        queue=absolute(top.queue, base),
        run=with_tokenizer(top.run, base),
        hook=top.hook,
        path_map=normal_map(top.path_map),
        suites=suites,
    )


def merged(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `overrides` laid over it, mappings into mappings; keys that stand empty are left out."""
    out = {key: value for key, value in _laid(raw, overrides).items() if value is not None}
    try:
        canonical(out)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"a setting given in code is not plain data ({error}); give text, numbers, lists") from None
    return out


def _laid(below: Any, over: Mapping[str, Any]) -> dict[str, Any]:
    below = below if isinstance(below, dict) else {}
    out = dict(below)
    for key, value in over.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        out[key] = _laid(below.get(key), value) if isinstance(value, Mapping) else value
    return out


def _suites(raw: Any, errors: list[str], shown: yamlfile.Shown) -> Iterator[tuple[str, HookSuite]]:
    """The suites that are right; the misfits of the others go to `errors`."""
    for name, suite in raw.items() if isinstance(raw, dict) else ():
        where = f"suites.{name}"
        errors += check_suite(where, name, suite)
        if not isinstance(suite, dict):
            continue
        when = {key: suite[key] for key in CADENCE_KEYS if key in suite}
        when = yamlfile.expand_into(when, where, errors, shown)
        cadence = build(Cadence, when, where, errors)
        errors += _out_of_range(Cadence, when, where)
        if cadence is not None:
            yield name, HookSuite(cadence, suite_digest(suite))


def check_keys(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the top level: unknown and missing keys, no suite, and secrets anywhere below."""
    errors = [f"{key}: {_OLDER if key == 'auto_eval' else f'unknown key{near(str(key), KEYS)}'}"
              for key in raw if key not in KEYS]  # fmt: skip
    if "queue" not in raw:
        errors.append("queue: missing; name the directory that training and runner share")
    if "suites" not in raw or raw["suites"] == {}:
        errors.append("suites: missing; define at least one suite, or nothing would be evaluated")
    elif not isinstance(raw["suites"], dict):
        errors.append("suites: expected a mapping from a suite's name to its definition")
    return errors + list(_secrets(raw, ""))


def check_suite(where: str, name: str, suite: Any) -> list[str]:
    """What is wrong with a suite, but for the types and ranges of its cadence and its evaluators' settings."""
    errors = []
    if not _SUITE_NAME.match(str(name)):
        errors.append(f"{where}: not a suite's name; use up to 64 letters, digits, '_', '-' and '.'")
    if not isinstance(suite, dict):
        return [*errors, f"{where}: expected a mapping with the key 'evaluators'"]
    begin, end = suite.get("begin_step", 0), suite.get("end_step")
    if type(begin) is int and type(end) is int and end < begin:
        errors.append(f"{where}.end_step: {end} is less than begin_step, {begin}; the suite would never be due")
    known = (*CADENCE_KEYS, "evaluators")
    errors += [f"{where}.{key}: unknown key{near(str(key), known)}" for key in suite if key not in known]
    evaluators = suite.get("evaluators")
    if evaluators is None or evaluators == []:
        return [*errors, f"{where}.evaluators: names no evaluator; give a list such as [{{type: helm, ...}}]"]
    if not isinstance(evaluators, list):
        return [*errors, f"{where}.evaluators: expected a list of mappings, each with a 'type'"]
    for i, evaluator in enumerate(evaluators):
        errors += check_typed(f"{where}.evaluators[{i}]", evaluator, "helm")
    return errors


def check_typed(where: str, entry: Any, example: str) -> list[str]:
    """What is wrong with an entry that must be a mapping with a `type`."""
    if not isinstance(entry, dict):
        return [f"{where}: expected a mapping such as {{type: {example}, ...}}"]
    if "type" not in entry:
        return [f"{where}.type: missing; write which kind this is, such as 'type: {example}'"]
    if not isinstance(entry["type"], str) or not entry["type"]:
        return [f"{where}.type: expected text, such as 'type: {example}'"]
    return []


def check_values(raw: dict[str, Any]) -> list[str]:
    """What is wrong with values at the top level that have the right type; of others, `build` says it."""
    errors = []
    version, queue, path_map = (raw.get(key) for key in ("version", "queue", "path_map"))
    if type(version) is int and version != VERSION:
        errors.append(f"version: {version} is unknown, {VERSION} is known; correct it, or upgrade autoeval")
    if isinstance(queue, str) and not queue.strip():
        errors.append("queue: empty; name the directory that training and runner share")
    pairs = path_map if isinstance(path_map, dict) else {}
    pairs = {source: target for source, target in pairs.items() if isinstance(target, str)}
    for source, target in pairs.items():
        if not (source.startswith("/") and target.startswith("/")):
            errors.append(f"path_map.{source}: {source!r} and {target!r} must both be absolute paths")
    if len(normal_map(pairs)) < len(pairs):
        errors.append("path_map: one prefix stands twice, with and without '/' at its end; remove one")
    return errors


def _out_of_range(cls: type, data: Any, where: str) -> Iterator[str]:
    """Numbers beyond the bounds that the fields of `cls` are annotated with; other misfits are `build`'s."""
    if not isinstance(data, dict):
        return
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        value, key = data.get(name), f"{where}.{name}" if where else name
        if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
            yield from _out_of_range(hint, value, key)
        for part in (hint, *typing.get_args(hint)):
            for bounds in getattr(part, "__metadata__", ()):
                if type(value) in (int, float) and (misfit := bounds.misfit(value)):
                    yield f"{key}: {misfit}"


_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|password|passwd|secret|"
    r"(?:access|auth|api|hf|hub|bearer|wandb|github)[_-]token)\Z|token\Z",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,})"
    r"|://[^/\s:@$]+:[^/\s@$]+@"
)
_NO_SECRET = ("", "EMPTY")      # what local servers that ask for a key are given


def _secrets(value: Any, where: str) -> Iterator[str]:
    """Keys that hold a secret in clear: the text of a suite goes into every result, so none may stand there.

    A key counts that is named for a credential (`api_key`, `hf_token`, `password`; not `eos_token` or
    `tokens_per_step`), and a text that looks like a well-known kind of one. The value is never printed.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        path = f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}" if where else str(key)
        if not isinstance(item, str):
            yield from _secrets(item, path)
            continue
        named = isinstance(key, str) and _SECRET_KEY.match(key) and "${" not in item
        if (named and item not in _NO_SECRET) or SECRET_VALUE.search(item):
            yield f"{path}: a secret must not stand in the file; write ${{NAME}} and export NAME"


def canonical(raw: Any) -> str:
    """Canonical JSON (ASCII, sorted keys, no spaces) of plain data; ValueError for what JSON cannot hold."""
    return json.dumps(raw, sort_keys=True, separators=(",", ":"), allow_nan=False)


OUTPUT_KEYS = {"helm": ("output_path", "output_suite")}
"""By an evaluator's type, keys that only say where something is kept beside the results."""


def suite_text(raw_suite: dict[str, Any]) -> str:
    """The canonical text of what an unexpanded suite evaluates: all of it but its cadence, and where output is kept."""
    evaluators = raw_suite.get("evaluators")
    kept = raw_suite | ({"evaluators": list(map(_evaluated, evaluators))} if isinstance(evaluators, list) else {})
    return canonical({key: value for key, value in kept.items() if key not in CADENCE_KEYS})


def _evaluated(entry: Any) -> Any:
    """An evaluator's entry without the keys that change nothing of what is evaluated."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        return entry
    return {key: value for key, value in entry.items() if key not in OUTPUT_KEYS.get(entry["type"], ())}


def suite_digest(raw_suite: dict[str, Any]) -> str:
    """sha256 (hex) of `suite_text`. Equal digests mean equal evaluations, whenever they are due."""
    return hashlib.sha256(suite_text(raw_suite).encode()).hexdigest()


def map_path(path: str, path_map: Mapping[str, str]) -> str:
    """`path` with its longest prefix of whole components in `path_map` replaced; as it is where none fits."""
    for source, target in sorted(path_map.items(), key=lambda item: -len(item[0].rstrip("/"))):
        prefix = source.rstrip("/")
        if path == prefix or path.startswith(prefix + "/"):
            return (target.rstrip("/") + path[len(prefix) :]) or "/"
    return path


def normal_map(path_map: Mapping[str, str]) -> dict[str, str]:
    """The map without slashes at the ends."""
    return {source.rstrip("/") or "/": target.rstrip("/") or "/" for source, target in path_map.items()}


def absolute(path: str, base: str) -> str:
    """`path` from the directory `base`, with ``~`` for the home directory, without ``.`` and ``..``."""
    return os.path.abspath(os.path.join(base, os.path.expanduser(path)))


def with_tokenizer(run: RunSection, base: str) -> RunSection:
    """The section with its tokenizer's directory made absolute."""
    values = {f.name: getattr(run, f.name) for f in fields(run)}
    return RunSection(**{**values, "tokenizer": absolute(run.tokenizer, base) if run.tokenizer else None})
