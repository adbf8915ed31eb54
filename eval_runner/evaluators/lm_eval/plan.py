"""What lm_eval will run for a suite entry, found out by asking lm_eval itself once, before any checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner import process, scratch
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.lm_eval.settings import Settings
from eval_runner.evaluators.written import clean, digest, located, prefixed, refused

INSIDE = Path(__file__).parent / "inside"
"""Programs that run in lm_eval's environment, and import nothing of autoeval."""
PROBE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Entry:
    """One of `tasks:`. `tasks` and `groups` are those that it stands for; `files` hold their documents, where these are
    local; `where` is its key path, for messages."""

    name: str
    where: str
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Plan:
    entries: tuple[Entry, ...]
    versions: dict[str, str]
    """Of lm_eval and what it computes with, and the device."""
    include: Path | None
    source: str
    """The digest of `include`, as it was when this plan was made; "" without one."""

    def is_current(self) -> bool:
        """Whether the definitions are still what they were."""
        try:
            return self.include is None or digest(self.include) == self.source
        except OSError:
            return False


def environment(settings: Settings) -> dict[str, str]:
    """The environment of lm_eval's processes: ours, without what would mix another Python in.

    Whether the hub may be asked for data is for HF_HUB_OFFLINE and its like to say, as they stand in it. Code that a
    model wrote runs only where the suite allows it.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    env |= {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"HF_ALLOW_CODE_EVAL": str(int(settings.allow_unsafe_code)), "HF_DATASETS_TRUST_REMOTE_CODE": "0"}
    return env


def make(settings: Settings, context: Context, python: Path) -> Plan:
    """Ask the lm_eval of `python`. Raises ConfigError, all errors at once, for what it cannot run."""
    include = located(context.base_dir, settings.include_path) if settings.include_path else None
    source = digest(include) if include else ""     # before it is read: a later edit makes this plan an old one
    answer = _probe(settings, context, python, include)
    errors: list[str] = []
    entries = [
        _entry(name, f"{context.where}.tasks[{i}]", answer, settings, errors) for i, name in enumerate(settings.tasks)
    ]
    errors += _repeated(entries)
    known = {name for entry in entries for name in (*entry.tasks, *entry.groups)}
    if not errors:
        errors += [f"{context.where}.metrics.{key}: no such task or group here{near(key, known)}"
                   for key in settings.metrics if clean(key) not in map(clean, known)]  # fmt: skip
    if errors:
        raise refused(context, errors)
    versions = answer["versions"] | {"device": answer["device"]}
    return Plan(tuple(entries), versions, include, source)


def _entry(name: str, where: str, answer: dict[str, Any], settings: Settings, errors: list[str]) -> Entry:
    found = answer["tasks"][name]
    if "wrong" in found:
        what = found["wrong"] + "".join(f"; did you mean {other!r}?" for other in found["near"])
        if answer["skipped"]:
            what += f"; lm_eval cannot read {', '.join(answer['skipped'][:3])}"
        elif not found["near"] and not settings.include_path:
            what += "; `include_path` names a directory of further tasks"
        errors.append(f"{where}: {what}")
        return Entry(name, where, (), (), ())
    if found["unsafe"] and not settings.allow_unsafe_code:
        errors.append(f"{where}: {', '.join(found['unsafe'][:3])} runs code that the model writes; if this machine "
                      "may, set `allow_unsafe_code: true`")  # fmt: skip
    if not found["tasks"]:
        errors.append(f"{where}: {name!r} stands for no task")
    return Entry(
        name, where, tuple(found["tasks"]), tuple(found["groups"]), tuple(Path(p) for p in sorted(found["files"]))
    )


def _repeated(entries: list[Entry]) -> list[str]:
    """A task or group that two entries have would have two results of one name."""
    first: dict[str, Entry] = {}
    errors = []
    for entry in entries:
        both = [n for n in (*entry.tasks, *entry.groups) if first.setdefault(clean(n), entry) is not entry]
        if both:
            other = first[clean(both[0])]
            errors.append(f"{entry.where}: {both[0]!r} is in {other.where} ({other.name}), too; leave one of them out")
    return errors


def _probe(settings: Settings, context: Context, python: Path, include: Path | None) -> dict[str, Any]:
    with scratch.directory() as work:
        request, answer, log = work / "request.json", work / "answer.json", work / "probe.log"
        asked = {"directory": str(context.base_dir), "include_path": str(include) if include else None}
        request.write_text(json.dumps(asked | {"tasks": settings.tasks}), encoding="utf-8")
        status = process.run(
            [str(python), str(INSIDE / "autoeval_lm_eval_probe.py"), str(request), str(answer)],
            log=log, env=environment(settings), cwd=work, timeout=PROBE_TIMEOUT_S,
        )  # fmt: skip
        if status != 0:
            raise ConfigError(prefixed(
                context, f"{context.where}: {python}: lm_eval does not start: {process.tail(log, 2)}; build its "
                "environment anew with `autoeval-runner env create lm_eval`"
            ))  # fmt: skip
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
