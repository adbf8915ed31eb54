"""The leaderboard of a W&B project: read from its runs, and shown in its run `PROJECT-leaderboard`.

A model's scores are in a run with the tag ``summary`` whose group is the model, rows keyed ``benchmark.METRIC``. The
older recorder's rows stand at `_step`; ours have the step in ``bench/step``. The tokens are the row's ``bench/tokens``,
else the run's config ``token_num``, or ``token_per_iteration`` times the step, all in billions. Runs whose config names
different suites, or definitions of a suite, are compared in columns of their own.

The run `PROJECT-leaderboard` is named, grouped and tagged ``leaderboard``. Each time it gets one row with everything,
and what it shows is the last one. Its chart ``benchmark_score`` is the older recorder's: bars of the min-max sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.recorder import wandb_curves
from eval_runner.recorder.curves import identity
from eval_runner.recorder.metrics import CORE_METRICS, DISPLAY, names
from eval_runner.recorder.settings import Settings
from eval_runner.results import leaderboard
from eval_runner.results.leaderboard import Board, Column, Entry, Line, Steps, Value
from eval_runner.results.page import board as pages

STEP, AXIS, TOKENS = "_step", "bench/step", "bench/tokens"
SUMMARY, OURS = "summary", "leaderboard"
TIMEOUT_S = 60
MAX_ROWS = 10_000
"""Of a W&B table that a chart is made of: the service draws no more."""

LOWER = frozenset({"BPB", "PPL", "Diff.", "Dist.", "Toxic fraction", "ECE (1-bin)", "ECE (10-bin)"})
"""Headings of metrics of which less is better (`lower_is_better` in the schema files of crfm-helm 0.5.16)."""
MISTAKES = ("could not find project", "api key", "api_key", "401", "403", "not found", "permission")
"""What W&B's errors say where another try will not mend it."""
_BY_NAME = {name: heading for heading, known in DISPLAY.items() for name in known}
_HIGHER = {*DISPLAY, *(metric.rpartition(".")[2] for metric in CORE_METRICS)} - LOWER


def make(settings: Settings, *, print_only: bool) -> list[str]:
    """Read the project's runs, rank all their steps and, unless `print_only`, show that in W&B; lines to print.

    Reading needs W&B in any case. Raises like `read`.
    """
    board = read(settings)
    lines = [_said(line) for line in board.lines] or ["leaderboard: no scores to rank"]
    lines += [f"leaderboard: {note}" for note in board.notes]
    if board.lines and not print_only:
        lines.append(publish(board, settings.entity, settings.project, settings.base_url))
    return lines


def read(
    settings: Settings, *, wanted: Sequence[str] = (), excluded: Collection[str] = (), lower: Collection[str] = (),
    steps: Steps = "all",
) -> Board:  # fmt: skip
    """The board of a project's runs.

    `wanted` stands for the file's `leaderboard_metrics`, `excluded` adds to its excluded models, `lower` are metrics of
    which less is better. Raises ConfigError where there is no such project or wandb is not installed, and AutoEvalError
    where W&B does not answer.
    """
    asked = tuple(dict.fromkeys(wanted or settings.leaderboard_metrics))
    left_out = {*settings.excluded_models, *excluded}
    notes: list[str] = []
    higher = {name: _higher(name, {*lower}, notes) for name in asked}
    if unknown := sorted({*lower} - {*asked}):
        raise ConfigError(f"--lower-is-better {unknown[0]}: ranked by are only {', '.join(asked)}")
    table = _Table()
    seen: set[str] = set()
    path = "/".join(part for part in (settings.entity, settings.project) if part)
    overrides = {"base_url": settings.base_url} if settings.base_url else {}
    with _service(f"project {path}", "the board cannot be made") as wandb:
        runs = []
        for run in wandb.Api(overrides=overrides, timeout=TIMEOUT_S).runs(path, filters={"tags": SUMMARY}):
            model = run.group or run.name
            seen |= {model, run.id}
            if run.group != OURS and not {model, run.id} & left_out:
                runs.append(run)
        suites = {_suite(run) for run in runs} - {("", "")}
        for run in runs:
            table.add(run, asked, _front(_suite(run), suites), _suite(run)[0], notes)
    if absent := sorted(left_out - seen):
        notes.append(f"excluded, and not there anyway: {', '.join(absent)}")
    columns = {c: Column(c, higher[name]) for name in asked for c in sorted(table.columns.get(name, {name}))}
    return leaderboard.make(table.entries.values(), [*columns.values()], steps=steps, notes=notes)


def publish(board: Board, entity: str, project: str, base_url: str) -> str:
    """Show the board in the run `PROJECT-leaderboard`; a line that says where.

    Raises ConfigError where W&B is not installed or switched off, AutoEvalError where it is away or somebody else
    writes to the run.
    """
    wandb_curves.check_mode()
    place, run_id = wandb_curves.Place(project, base_url, entity), identity(project, OURS)
    several = len({line.model for line in board.lines}) < len(board.lines)
    shown = board.lines[:MAX_ROWS]
    columns = ["model", "token_num", "score", "win_rate", "rank", "rank_low", "rank_high", "mean", "step", "entry"]
    rows = [
        [line.model, line.tokens, line.min_max, line.win_rate, line.rank, line.rank_low, line.rank_high, line.mean,
         line.step, f"{line.model}, step {line.step}" if several else line.model]
        for line in shown
    ]  # fmt: skip
    scores = [
        [row[-1], row[4], row[3], *(None if v is None else v.value for v in line.values)]
        for row, line in zip(rows, shown, strict=True)
    ]
    overrides = {"base_url": base_url} if base_url else {}
    with _service(f"project {project}", "the board is not shown") as wandb, wandb_curves.service(place), \
            wandb_curves.alone(place, run_id):
        wandb_curves.check_idle(wandb, place, run_id)
        settings = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True, **overrides)
        run = wandb.init(
            entity=entity or None, project=project, id=run_id, name=OURS, group=OURS, tags=[OURS],
            save_code=False, settings=settings, reinit="create_new",
        )  # fmt: skip
        bars = {
            key: wandb.plot.bar(wandb.Table(data=rows, columns=columns), "entry", height, title=key.replace("_", " "))
            for key, height in (("benchmark_score", "score"), ("mean_win_rate", "win_rate"))
        }
        all_scores = wandb.Table(data=scores, columns=["entry", "rank", "win_rate", *(c.name for c in board.columns)])
        run.log({**bars, OURS: all_scores})
        run.finish()
    cut = f"; its first {MAX_ROWS} of {len(board.lines)} entries" if len(board.lines) > MAX_ROWS else ""
    where = run.url or f"run {run_id}, offline in {run.dir.removesuffix('/files')}"
    return f"leaderboard: shown in W&B, {where}{cut}"


# ---------------------------------------------------------------------- reading

Suite = tuple[str, str]
"""A suite's name and its definition's digest, "" of runs that tell none."""


@dataclass
class _Table:
    """The entries, the columns that each metric asked for has become, and the run of each value."""

    entries: dict[tuple[str, int], Entry] = field(default_factory=dict)
    columns: dict[str, set[str]] = field(default_factory=dict)
    runs: dict[tuple[str, int, str], str] = field(default_factory=dict)

    def add(self, run: Any, asked: Iterable[str], front: str, suite: str, notes: list[str]) -> None:
        """Take a run's values into columns with `front` before their names. Within a run, what was logged later counts;
        where two runs give one value differently, the later run counts, and that is said."""
        model = run.group or run.name
        metrics = {name: name.removeprefix(f"{suite}/") if suite else name for name in asked}
        own: dict[int, Entry] = {}
        for step, row in _rows(run):
            entry = own.get(step) or Entry(model, step, {}, _tokens(run.config, {}, step))
            values = {name: v for name, metric in metrics.items() if (v := _value(row, metric, entry, notes))}
            tokens = float(row[TOKENS]) if _number(row.get(TOKENS)) else entry.tokens
            own[step] = Entry(model, step, {**entry.values, **values}, tokens)
        for step, entry in own.items():
            before = self.entries.get((model, step)) or Entry(model, step, {})
            values = dict(before.values)
            for name, value in entry.values.items():
                column = front + metrics[name]
                if (was := values.get(column, value)) != value:
                    first = self.runs[model, step, column]
                    notes.append(f"{model} at step {step}: {column} is {was.value!r} in run {first}, and "
                                 f"{value.value!r} in the later run {run.id}, which counts")  # fmt: skip
                values[column] = value
                self.columns.setdefault(name, set()).add(column)
                self.runs[model, step, column] = run.id
            tokens = before.tokens if entry.tokens is None else entry.tokens
            self.entries[model, step] = Entry(model, step, values, tokens)


def _suite(run: Any) -> Suite:
    name = str(run.config.get("suite") or "")
    return (name, str(run.config.get("definition") or run.config.get("suite_digest") or "")) if name else ("", "")


def _front(suite: Suite, suites: Collection[Suite]) -> str:
    """What stands before a metric in its column: the suite where there are several, and which definition, likewise."""
    name, digest = suite
    if not name or len(suites) < 2:
        return ""
    return f"{name}@{digest[:8]}/" if sum(other == name for other, _ in suites) > 1 else f"{name}/"


def _rows(run: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, row) in the order in which they were logged, nested values by their dotted names."""
    for raw in run.scan_history(use_cache=False):
        row = dict(_flat(raw))
        at = row.get(AXIS, row.get(STEP))
        if isinstance(at, int | float) and math.isfinite(at):
            yield int(at), row


def _flat(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _value(row: Mapping[str, Any], name: str, entry: Entry, notes: list[str]) -> Value | None:
    """The row's value of ``benchmark.METRIC``; its standard error is not recorded."""
    benchmark, _, metric = name.rpartition(".")
    key = next((k for k in (f"{benchmark}.{m}" for m in names(metric)) if row.get(k) is not None), None)
    if key is None:
        return None
    if _number(row[key]):
        return Value(float(row[key]))
    notes.append(f"{entry.model} at step {entry.step}: {key} is {row[key]!r:.40}, which is no number")
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tokens(config: Mapping[str, Any], row: Mapping[str, Any], step: int) -> float | None:
    """Billions; None where neither the row nor the run tells."""
    if _number(row.get(TOKENS)):
        return float(row[TOKENS])
    if _number(config.get("token_num")):
        return float(config["token_num"])
    if _number(config.get("token_per_iteration")):
        return step * float(config["token_per_iteration"])
    return None


def _higher(name: str, lower: Collection[str], notes: list[str]) -> bool:
    """Whether more is better; W&B does not tell."""
    metric = name.rpartition(".")[2]
    heading = _BY_NAME.get(metric, metric)
    if name in lower or heading in LOWER:
        return False
    if heading not in _HIGHER:
        notes.append(f"{name}: taken as better where it is higher, as the older tool takes all; else --lower-is-better")
    return True


# ---------------------------------------------------------------------- words


@contextlib.contextmanager
def _service(what: str, so: str) -> Iterator[Any]:
    """The wandb package, and its errors in our words."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("wandb is not installed here; run: pip install 'autoeval-hooks[wandb]'") from None
    try:
        yield wandb
    except Exception as error:
        text = str(error) or type(error).__name__
        theirs = type(error).__module__.split(".")[0] in ("wandb", "requests") or isinstance(error, OSError)
        if not theirs and not (isinstance(error, ValueError) and MISTAKES[0] in text.lower()):
            raise
        if any(word in text.lower() for word in MISTAKES):
            raise ConfigError(f"W&B, {what}: {text}; check project, entity, base_url and WANDB_API_KEY") from error
        raise AutoEvalError(f"W&B, {what}: {text}; {so}, try again") from error


def _said(line: Line) -> str:
    missing = f", without {', '.join(line.missing)}" if line.missing else ""
    return (
        f"leaderboard: {pages.rank(line)} {line.model} step {line.step}: mean win rate {pages.short(line.win_rate)},"
        f" min-max sum {pages.short(line.min_max)}{missing}"
    )
