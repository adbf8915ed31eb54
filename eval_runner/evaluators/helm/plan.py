"""What HELM will run for a suite entry, found out by asking HELM itself once, before any checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.strict import near
from eval_runner import process, scratch
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.helm.deployment import INSIDE
from eval_runner.evaluators.helm.place import environment, share_data
from eval_runner.evaluators.helm.settings import Entry, EntrySettings, Settings, entry_settings, make_entries
from eval_runner.evaluators.written import digest, located, prefixed, refused

PLUGIN = "autoeval_helm"
PROBE_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Planned:
    """An entry with the number of its runs, the metrics to read from each, the split, and which metrics are better when
    lower."""

    entry: Entry
    metrics: tuple[str, ...]
    split: str | None
    lower_is_better: dict[str, bool | None]
    runs: int


@dataclass(frozen=True)
class Plan:
    entries: tuple[Planned, ...]
    versions: dict[str, str]
    """Of HELM and what it computes with, and the kind of device: it decides the precision."""
    plugins: tuple[str, ...]
    files: tuple[Path, ...]
    """Data that the entries name, files and directories; their digests belong to the results."""
    sources: dict[Path, str]
    """Digests of the files that this plan was made from (entries_file, plugins, schema), as they were then."""

    def is_current(self) -> bool:
        """Whether `sources` are still what they were."""
        try:
            return all(digest(path) == was for path, was in self.sources.items())
        except OSError:
            return False


def make(settings: Settings, context: Context, python: Path, data_dir: Path) -> Plan:
    """Ask the HELM of `python`. Raises ConfigError, all errors at once, for what it cannot run."""
    with scratch.directory() as work:
        share_data(work, data_dir)
        sources: dict[Path, str] = {}
        written, where = settings.entries, f"{context.where}.entries"
        if settings.entries_file:
            where = f"{context.where}.entries_file"
            file = located(context.base_dir, settings.entries_file)
            if not file.is_file():
                raise ConfigError(prefixed(context, f"{where}: {file} does not exist"))
            sources[file] = digest(file)  # before it is read: a later edit makes this plan an old one
            written = _read_hocon(file, python, where, context, work)
        entries = make_entries(written, where, settings.max_priority, context)
        plugins = (PLUGIN, *(_plugin(p, i, context) for i, p in enumerate(settings.plugins)))
        schema = _schema(settings.schema, context)
        local = [path for p in (*plugins, schema or "") if (path := Path(p)).is_absolute() and path.exists()]
        sources |= {path: digest(path) for path in local}
        answer = _probe(entries, plugins, schema, python, work)
    if error := answer.get("plugin_error"):
        raise ConfigError(prefixed(context, f"{context.where}.plugins: cannot be imported by HELM: {error}"))
    if known := answer.get("known_schemas"):
        file = located(context.base_dir, str(schema))
        what = f"{file} is no file, and HELM has no schema {schema!r}{near(str(schema), known)}"
        raise ConfigError(prefixed(context, f"{context.where}.schema: {what}"))
    if error := answer.get("schema_error"):
        raise ConfigError(prefixed(context, f"{context.where}.schema: {schema} is not a schema of HELM: {error}"))
    errors: list[str] = []
    planned = [
        _planned(entry, found, settings, errors) for entry, found in zip(entries, answer["entries"], strict=True)
    ]
    known = {key for entry in entries for key in (entry.benchmark, entry.run_spec)}
    errors += [f"{context.where}.metrics.{key}: no such benchmark{near(key, known)}" for key in settings.metrics
               if key not in known]  # fmt: skip
    if errors:
        raise refused(context, errors)
    files = dict.fromkeys(path for entry in entries for path in entry.files)
    return Plan(tuple(planned), answer["versions"], plugins, tuple(files), sources)


def _planned(entry: Entry, found: dict[str, Any], settings: Settings, errors: list[str]) -> Planned:
    if "error" in found:
        what = found["error"]
        text = {
            "syntax": f"HELM cannot read {entry.description!r}: {what}",
            "name": f"HELM has no run spec {what!r}{near(what, found['known'])}",
            "argument": f"run spec {entry.run_spec!r} has no argument {what!r}{near(what, found['known'])}",
            "value": f"HELM cannot make a run of {entry.description!r}: {what}",
        }[found["kind"]]
        errors.append(f"{entry.where}: {text}")
        return Planned(entry, (), None, {}, 0)
    first = found["runs"][0]
    chosen = settings.metrics.get(entry.benchmark) or settings.metrics.get(entry.run_spec)
    metrics = chosen or ((first["metric"],) if first["metric"] else ())
    if not metrics:
        errors.append(
            f"{entry.where}: HELM names no main metric for {entry.run_spec!r}; choose one by "
            f"`metrics: {{{entry.run_spec}: [exact_match]}}` beside `entries`"
        )
    lower = {metric: first["lower_is_better"].get(metric) for metric in metrics}
    return Planned(entry, tuple(metrics), first["split"], lower, len(found["runs"]))


def _plugin(plugin: str, index: int, context: Context) -> str:
    """A module's name as it is, a file's path made absolute."""
    path = located(context.base_dir, plugin)
    if path.exists():
        return str(path)
    if "/" in plugin or plugin.endswith(".py"):
        raise ConfigError(prefixed(context, f"{context.where}.plugins[{index}]: {path} does not exist"))
    return plugin


def _schema(schema: str | None, context: Context) -> str | None:
    """A file beside the configuration, else the name of one that HELM ships."""
    if schema is None:
        return None
    path = located(context.base_dir, schema)
    return str(path) if path.is_file() else schema


def _probe(entries: tuple[Entry, ...], plugins: tuple[str, ...], schema: str | None, python: Path, work: Path) -> Any:
    request, answer = work / "request.json", work / "answer.json"
    asked = {"entries": [e.description for e in entries], "plugins": plugins, "schema": schema}
    request.write_text(json.dumps(asked), encoding="utf-8")
    log = work / "probe.log"
    status = process.run(
        [str(python), str(INSIDE / "autoeval_helm_probe.py"), str(request), str(answer)],
        log=log, env=environment(python, work)[0], cwd=work, timeout=PROBE_TIMEOUT_S,
    )  # fmt: skip
    if status != 0:
        raise ConfigError(f"{python}: HELM does not start: {process.tail(log, 2)}; "
                          "build its environment anew with `autoeval-runner env create helm`")  # fmt: skip
    return json.loads(answer.read_text(encoding="utf-8"))


def _read_hocon(file: Path, python: Path, where: str, context: Context, work: Path) -> tuple[EntrySettings, ...]:
    """The entries of a file in HELM's own format, read by HELM's own parser."""
    parser = (
        "import json, sys, pyhocon; json.dump(pyhocon.ConfigFactory.parse_file(sys.argv[1]), open('hocon.json', 'w'))"
    )
    log, env = work / "hocon.log", environment(python, work)[0]
    if process.run([str(python), "-c", parser, str(file)], log=log, env=env, cwd=work, timeout=60):
        raise ConfigError(prefixed(context, f"{where}: {file} is not valid HOCON ({process.tail(log, 1)})"))
    return entry_settings(json.loads((work / "hocon.json").read_text(encoding="utf-8")), str(file), context)

