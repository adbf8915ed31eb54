"""From a configuration file to the curves that it asks for: a recorder's file, an autoeval.yaml, an older watcher's."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks import yamlfile
from autoeval_hooks.errors import ConfigError, QueueError
from eval_runner import config as configs
from eval_runner.config import legacy
from eval_runner.recorder import helm_output, own_results, settings
from eval_runner.recorder.curves import DETAIL, SUMMARY, Curve, lines
from eval_runner.recorder.settings import CORE_BENCHMARKS, AutoevalSource, Benchmark, Eval, FileSource, Settings
from eval_runner.recorder.wandb_curves import Place


@dataclass
class Gathered:
    """What is to be recorded. `lines` is what --print-only prints. `missing` names what was asked for and is not there,
    `notes` what a user may want to know, a line each. `board` is the file itself where it asks for a leaderboard."""

    place: Place
    curves: list[Curve] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    board: Settings | None = None


def gather(path: str | os.PathLike[str], *, summary_only: bool = False) -> Gathered:
    """Read the file and all that it names. Neither W&B nor the network is asked. Raises ConfigError and QueueError."""
    if settings.is_recorders(yamlfile.read_yaml(path)):
        return _recorder(settings.load(path), summary_only)
    return _autoeval(path)


def _recorder(file: Settings, summary_only: bool) -> Gathered:
    out = Gathered(Place(file.project, file.base_url, file.entity), board=file if file.leaderboard else None)
    for entry in file.evals:
        where = f"{file.path}: {entry.where}"
        before = len(out.curves)
        if isinstance(entry.source, FileSource):
            rows = {entry.default_iteration: entry.source.values}
            out.curves.append(_curve(entry, "summary", SUMMARY, rows))
        elif isinstance(entry.source, AutoevalSource):
            source = entry.source
            try:
                curves, missing = own_results.read(
                    _queue(source.results), where, model=entry.model_name, run=source.run, suite=source.suite,
                    benchmarks=entry.benchmarks, config=_config(entry),
                )  # fmt: skip
            except QueueError as error:     # what is not there yet keeps no other entry from being recorded
                curves, missing = [], [f"results: {error}"]
            out.curves += [_with_tokens(curve, entry) for curve in curves]
            out.missing += [f"{entry.where}: {line}" for line in missing]
        else:
            _helm(out, entry, where, summary_only)
        if all(curve.tag == DETAIL for curve in out.curves[before:]):
            out.missing.append(f"{entry.where}: nothing to record of {entry.model_name}")
    out.curves = _merged(out.curves, file)
    out.lines = [line for c in out.curves if c.tag != DETAIL for line in lines(c.model, c.rows)]
    return out


def _helm(out: Gathered, entry: Eval, where: str, summary_only: bool) -> None:
    assert isinstance(entry.source, settings.HelmSource)
    asked = entry.benchmarks or CORE_BENCHMARKS
    found = helm_output.read(entry.source, entry.model_name, asked, entry.default_iteration, where)
    out.notes += [f"{entry.where}: {note}" for note in found.notes]
    out.missing += [f"{entry.where}: {line}" for line in found.missing]
    if found.absent:
        suite = entry.source.output / "runs" / entry.source.suite
        line = f"{entry.where}: {suite} has nothing of {', '.join(found.absent)}"
        (out.missing if entry.benchmarks else out.notes).append(line)   # of the default ones, many have some
    if not summary_only:
        for name, rows in found.details.items():
            if rows:
                out.curves.append(_curve(entry, name, DETAIL, rows))
    if found.summary:
        ordered = [key for benchmark in asked for key in benchmark.keys]
        rows = {s: {key: row[key] for key in ordered if key in row} for s, row in found.summary.items()}
        out.curves.append(_curve(entry, "summary", SUMMARY, rows))


def _curve(entry: Eval, name: str, tag: str, rows: dict[int, dict[str, float]]) -> Curve:
    return _with_tokens(Curve(entry.model_name, name, tag, rows, config=_config(entry)), entry)


def _with_tokens(curve: Curve, entry: Eval) -> Curve:
    """The curve on the axis of tokens, too, where the entry knows them."""
    if entry.token_per_iteration:
        curve.tokens.update({step: step * entry.token_per_iteration for step in curve.rows})
    elif entry.token_num and len(curve.rows) == 1:
        curve.tokens.update(dict.fromkeys(curve.rows, entry.token_num))
    return curve


def _config(entry: Eval) -> dict[str, Any]:
    known = {"token_num": entry.token_num, "token_per_iteration": entry.token_per_iteration}
    return {key: value for key, value in known.items() if value is not None}


def _merged(curves: list[Curve], file: Settings) -> list[Curve]:
    """Curves of one W&B run as one: several entries may be of one model, each with other steps or benchmarks. The
    run's configuration is what all of them say; the tokens of each stand in its rows. Raises ConfigError where two give
    one value differently."""
    out: dict[str, Curve] = {}
    told: dict[str, list[dict[str, Any]]] = {}
    for curve in curves:
        told.setdefault(curve.run_id(file.project), []).append(dict(curve.config))
        first = out.setdefault(curve.run_id(file.project), curve)
        if first is curve:
            continue
        for step, row in curve.rows.items():
            mine = first.rows.setdefault(step, {})
            if other := [key for key, value in row.items() if mine.get(key, value) != value]:
                raise ConfigError(
                    f"{file.path}: evals: two entries give {other[0]} of {curve.model!r} at step {step} differently; "
                    "give each a `model_name` or a `default_iteration` of its own"
                )
            mine.update(row)
        first.tokens.update(curve.tokens)
        agreed = told[curve.run_id(file.project)]
        for key in [k for k, v in first.config.items() if any(config.get(k) != v for config in agreed)]:
            del first.config[key]
    return [*out.values()]


def _queue(results: Path) -> Path:
    """The queue that `results` is, or that the configuration file `results` names. Raises QueueError where it is not
    there."""
    if results.is_dir():
        return results
    if not results.is_file():
        raise QueueError(f"{results} is not there; name a queue, or the autoeval.yaml that names it")
    return configs.load(results).queue


def _autoeval(path: str | os.PathLike[str]) -> Gathered:
    """All results of the queue of an autoeval.yaml, or of an older watcher's file, whose `helm.benchmarks` choose."""
    config, older = configs.load(path), legacy.read(path)
    sink = next((sink for sink in config.sinks if sink.get("type") == "wandb"), {})
    url = sink.get("base_url") or os.environ.get("WANDB_BASE_URL", "")
    place = Place(config.run.project or "", str(url).rstrip("/"), config.run.entity or "")
    benchmarks = None
    if older is not None and older.section.helm is not None and older.section.helm.benchmarks:
        benchmarks = [Benchmark(b.name, b.metrics) for b in older.section.helm.benchmarks]
    per_step = config.run.tokens_per_step
    known = {"token_per_iteration": per_step / 1e9} if per_step else {}
    curves, missing = own_results.read(config.queue, os.fspath(path), benchmarks=benchmarks, config=known)
    out = Gathered(place, curves, missing=missing)
    for curve in curves:
        if per_step:
            curve.tokens.update({s: s * per_step / 1e9 for s in curve.rows if s not in curve.tokens})
        out.lines += lines(curve.model if len({c.name for c in curves}) == 1 else f"{curve.model}/{curve.name}",
                           curve.rows)  # fmt: skip
    if not curves:
        out.missing.append(f"{config.queue}: has no results yet")
    return out
