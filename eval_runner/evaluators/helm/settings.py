"""The settings of a `type: helm` entry, and the run entries that they name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import build
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.helm.kept import NAME
from eval_runner.evaluators.written import clean, located, prefixed, refused


@dataclass(frozen=True)
class EntrySettings:
    """One run entry as it is written. `name` replaces the benchmark name that the description gives."""

    description: str
    priority: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Settings:
    """What the suite says. `max_instances` counts instances of each run, as `helm-run -m` does. HELM's own output is
    kept in the suite `output_suite` below `output_path`, where that is given. `data_dir` holds `scenarios`, HELM's data
    sets; by default `output_path` where an earlier HELM left some, else a directory that all suites share."""

    entries: tuple[EntrySettings, ...] = ()
    entries_file: str | None = None
    max_instances: int = 100
    num_train_trials: int = 1
    max_priority: int | None = None
    env: str | None = None
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    plugins: tuple[str, ...] = ()
    schema: str | None = None
    data_dir: str | None = None
    metrics: dict[str, tuple[str, ...]] = field(default_factory=dict)
    output_path: str | None = None
    output_suite: str | None = None


@dataclass(frozen=True)
class Entry:
    """A run entry ready for HELM: no model in it, its paths absolute. `where` is its key path, for messages.

    `files` are the local files and directories that it names.
    """

    description: str
    benchmark: str
    where: str
    priority: int | None = None
    files: tuple[Path, ...] = ()

    @property
    def run_spec(self) -> str:
        return self.description.partition(":")[0]


def parse(data: dict[str, Any], context: Context) -> Settings:
    """Raises ConfigError that names every key that does not fit."""
    data = dict(data)
    if isinstance(data.get("entries"), list):
        data["entries"] = [{"description": e} if isinstance(e, str) else e for e in data["entries"]]
    errors: list[str] = []
    settings = build(Settings, data, context.where, errors)
    if settings is not None:
        for key in ("max_instances", "num_train_trials"):
            if getattr(settings, key) < 1:
                errors.append(f"{context.where}.{key}: must be 1 or more")
        if bool(settings.entries) == bool(settings.entries_file):
            errors.append(f"{context.where}: give either `entries` or `entries_file`")
        if bool(settings.output_path) != bool(settings.output_suite):
            errors.append(f"{context.where}: `output_path` and `output_suite` (one for each training run) go together")
        elif settings.output_suite and not NAME.fullmatch(settings.output_suite):
            errors.append(f"{context.where}.output_suite: {settings.output_suite!r:.130} is a directory's name; use "
                          "letters, digits, '.', '_' and '-', 120 at most")  # fmt: skip
    if errors or settings is None:
        raise refused(context, errors)
    return settings


def make_entries(
    written: tuple[EntrySettings, ...], where: str, max_priority: int | None, context: Context
) -> tuple[Entry, ...]:
    """The entries to run, those above `max_priority` left out. Raises ConfigError, all errors at once."""
    entries, errors = [], []
    for i, one in enumerate(written):
        if max_priority is not None and one.priority is not None and one.priority > max_priority:
            continue
        try:
            entries.append(_entry(one, f"{where}[{i}]", context.base_dir))
        except ValueError as error:
            errors.append(f"{where}[{i}]: {error}")
    if not entries and not errors:
        errors.append(f"{where}: no entry is left to run; lower their priority or raise max_priority")
    seen: dict[str, Entry] = {}
    for entry in entries:
        if (other := seen.setdefault(entry.benchmark, entry)) is not entry:
            errors.append(
                f"{entry.where}: has the benchmark name {entry.benchmark!r} of {other.where}; "
                "write {description: …, name: …} with a name of its own"
            )
    if errors:
        raise refused(context, errors)
    return tuple(entries)


def benchmark_name(description: str) -> str:
    """A stable, readable name of an entry: the run spec and the values of its arguments, joined by dots.

    `mmlu:subject=anatomy` is ``mmlu.anatomy``. Of a path, the file's stem counts; an argument called
    ``name`` stands for all others. What W&B keys and file names bear badly becomes ``_``.
    """
    spec, _, rest = description.partition(":")
    arguments = dict(a.split("=", 1) for a in rest.split(",") if "=" in a)
    values = [arguments["name"]] if "name" in arguments else [
        Path(value).stem if key.endswith("path") else value for key, value in arguments.items()
    ]  # fmt: skip
    return ".".join(clean(part) for part in [spec, *values])


def _entry(written: EntrySettings, where: str, base_dir: Path) -> Entry:
    spec, colon, rest = written.description.strip().partition(":")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", spec):
        raise ValueError(f"{written.description!r} does not start with the name of a run spec")
    arguments, files = [], []
    for argument in rest.split(",") if colon else []:
        key, equals, value = argument.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"{written.description!r}: expected key=value, found {argument!r}")
        if key == "model":
            continue  # ours
        if key in ("model_deployment", "groups"):
            raise ValueError(f"{written.description!r}: {key} is not for an entry to choose")
        if key.endswith("path"):
            path = located(base_dir, value)
            if not path.exists():
                raise ValueError(f"{written.description!r}: {path} does not exist")
            if "," in str(path):
                raise ValueError(f"{written.description!r}: HELM cannot read a path with a comma: {path}")
            files.append(path)
            value = str(path)
        arguments.append(f"{key}={value}")
    description = spec + (":" + ",".join(arguments) if arguments else "")
    benchmark = clean(written.name) if written.name else benchmark_name(description)
    return Entry(description, benchmark, where, written.priority, tuple(files))


def entry_settings(raw: object, where: str, context: Context) -> tuple[EntrySettings, ...]:
    """The entries of a parsed HOCON file: `entries: [{description, priority}, …]`, other keys refused."""

    @dataclass(frozen=True)
    class Line:
        description: str
        priority: int | None = None
        groups: tuple[str, ...] = ()  # HELM's own key for its tables, which are not read here

    errors: list[str] = []
    items = raw.get("entries") if isinstance(raw, dict) else None
    if not isinstance(items, list):
        raise ConfigError(prefixed(context, f"{where}: has no list `entries`"))
    lines = [build(Line, item, f"{where}: entries[{i}]", errors) for i, item in enumerate(items)]
    if errors:
        raise refused(context, errors)
    return tuple(EntrySettings(line.description, line.priority) for line in lines if line)


