"""Log waiting points into a W&B run that has no writer: `python -m eval_runner.sinks.wandb_writer REQUEST.json`.

A process of its own, so that a W&B that hangs or crashes costs the runner nothing. It logs each point as a row of
its own against ``bench/step``, those that the run already has left out, and moves the points to `logged/`.

Another writer's rows are safe only while there is none: online, the service must not call the run
"running", and no training process may have shown itself since the runner decided (its heartbeat). What is
left is a training that resumes between this process's `wandb.init` and its `finish` (about a second). Its
rows and ours may then overwrite each other; if a heartbeat tells of it, the points are given back and logged again.

Resuming a run replaces its metric definitions, and a second offline directory its summary too. Both are
repeated here, so that the training's own stay as they are; so does the run's final state. The exit status is one
of the constants below; the last line of the output says what was done.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks import strict
from autoeval_hooks.relay import define
from autoeval_hooks.relay_files import AXIS, POINT_BYTES, Point, parse_point
from autoeval_hooks.run_identity import RunIdentity

DONE, FAILED, BUSY, REFUSED = 0, 1, 75, 78
"""All points are in the run; try again; the run has a writer, try again later; the configuration must change."""
HF_STEP = "train/global_step"
PROBE = "bench/lag_s"
"""Each point has it, and no two the same: by its value a row is recognised."""


@dataclass(frozen=True)
class Request:
    """What to do. `points` are files; `directory` is where W&B may put its own."""

    run: RunIdentity
    companion: bool
    """Log into a run beside the training's: `<id>-eval`, same group, job type ``eval``."""
    logs_by_step: bool
    offline: bool
    logs: tuple[str, ...]
    """Offline: the run's transaction logs, the oldest first."""
    directory: str
    points: tuple[str, ...]
    logged: str
    heartbeat: str
    """The training process's heartbeat file, and the content that stood still; "" if there was none."""
    heartbeat_seen: str

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


@dataclass
class Target:
    """The run as it is before we write: what must stay as it is."""

    rows: list[dict[str, Any]]
    """At least those that hold scores."""
    summary: dict[str, Any]
    definitions: list[dict[str, Any]]
    """Arguments of `define_metric`."""
    lines: int = 0
    state: str = ""


class Refused(Exception):
    """No other try will do better."""


class Busy(Exception):
    """Somebody else writes to the run."""


def heartbeat(path: str) -> str:
    """The content of a heartbeat file; "" where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def deliver(request: Request) -> str:
    """Do it; what was done. Raises Busy and Refused."""
    points = [parse_point(Path(path).read_bytes(), Path(path).name.split("~")[0] + ".json") for path in request.points]
    points.sort(key=lambda point: (point.step, point.ticket))
    target = _offline(request) if request.offline else _online(request, points)
    missing = [point for point in points if not any(_holds(row, point) for row in target.rows)]
    if missing:
        _check_alone(request)
        _log(request, target, missing)
        _check_alone(request)
    for path in request.points:
        os.rename(path, os.path.join(request.logged, Path(path).name.split("~")[0] + ".json"))
    return f"{len(missing)} point(s) logged, {len(points) - len(missing)} were there already"


def _check_alone(request: Request) -> None:
    if heartbeat(request.heartbeat) != request.heartbeat_seen:
        raise Busy("a training process has come to life in this run; the points are left to it")


def _holds(row: dict[str, Any], point: Point) -> bool:
    probe = _probe(point)
    value = row.get(probe)
    same = isinstance(value, int | float) and math.isclose(value, point.metrics[probe], rel_tol=1e-12)
    return same and row.get(AXIS) == point.step


def _probe(point: Point) -> str:
    return PROBE if PROBE in point.metrics else min(point.metrics)


def _log(request: Request, target: Target, points: list[Point]) -> None:
    import wandb

    run = request.run
    state = "" if request.companion else target.state
    writer = wandb.init(
        entity=run.entity or None,
        project=run.project or None,
        id=_run_id(request),
        name=f"{run.name or run.wandb_id} (eval)" if request.companion else None,
        group=run.wandb_group or None if request.companion else None,
        job_type="eval" if request.companion else None,
        resume="allow" if request.offline or request.companion else "must",
        mode="offline" if request.offline else "online",
        dir=request.directory,
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_file_stream_transmit_interval=1,
            # Where training crashed or was killed, ours is no better end.
            x_update_finish_state=state in ("", "finished", "failed"),
        ),
    )
    for definition in target.definitions:
        writer.define_metric(**definition)
    defined: set[str] = set()
    if request.offline:
        writer.summary.update(_seed(target.summary))
    # HF's callback draws its charts over a logged key: with it in the row, ours can be drawn over it too.
    with_hf_step = HF_STEP in target.summary and not request.logs_by_step and not request.companion
    for point in points:
        define(writer, point.metrics, defined)
        writer.log({**point.row(), HF_STEP: point.step} if with_hf_step else point.row())
    if with_hf_step:
        writer.summary[HF_STEP] = target.summary[HF_STEP]
    writer.finish(exit_code=1 if state == "failed" else 0)
    if not request.offline:
        lines = _remote_lines(request)
        if lines < target.lines + len(points):
            raise RuntimeError(f"the service has {lines} rows, not {target.lines} and {len(points)} more: not all came")


def _run_id(request: Request) -> str:
    return f"{request.run.wandb_id}-eval" if request.companion else request.run.wandb_id


# -------------------------------------------------------------------- online


def _path(request: Request) -> str:
    parts = [request.run.entity, request.run.project or "uncategorized", _run_id(request)]
    return "/".join(part for part in parts if part)


def _remote(request: Request) -> Any | None:
    import wandb

    try:
        return wandb.Api().run(_path(request))
    except (ValueError, wandb.errors.CommError) as error:
        if "could not find run" not in str(error).lower():
            raise
        return None


def _remote_lines(request: Request) -> int:
    return int(_remote(request).historyLineCount)  # type: ignore[union-attr]  # it was written to a moment ago


def _online(request: Request, points: list[Point]) -> Target:
    _check_service(request)
    remote = _remote(request)
    if remote is None:
        if request.companion:
            return Target([], {}, [])
        raise Refused(f"W&B has no run {_path(request)}: check run.entity and run.project in the configuration")
    if remote.state == "running" and not request.companion:
        raise Busy(f"W&B says that {_path(request)} is running: somebody writes to it, or did until a moment ago")
    rows: list[dict[str, Any]] = []
    for probe in sorted({_probe(point) for point in points}):
        rows += remote.scan_history(keys=[AXIS, probe], use_cache=False)
    definitions = remote.rawconfig.get("_wandb", {}).get("m", [])
    return Target(
        rows, dict(remote.summary), list(_from_config(definitions)), int(remote.historyLineCount), remote.state
    )


def _check_service(request: Request) -> None:
    """The key in our environment goes to the service that we are set up for, never to one that a ticket names."""
    import wandb

    ours, theirs = wandb.setup().settings.base_url.rstrip("/"), request.run.wandb_base_url.rstrip("/")
    if theirs and theirs != ours:
        raise Refused(f"the run reports to {theirs}, this runner to {ours}; set the wandb sink's base_url to the first")


def _from_config(definitions: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Arguments of `define_metric` from a run's config, where W&B keeps MetricRecord messages by field number:
    1 name, 2 pattern, 4 step metric, 5 its place in this list from 1, 6 options, 7 summary
    (wandb/proto/wandb_internal.proto of the client)."""
    for d in definitions:
        place = d.get("5", 0)
        step = definitions[place - 1].get("1") if place else d.get("4")
        options, summary = d.get("6", []), [_SUMMARIES[n] for n in d.get("7", []) if n in _SUMMARIES]
        yield _definition(d.get("1") or d["2"], step, 1 in options, 2 in options, summary)


_SUMMARIES = {1: "min", 2: "max", 3: "mean", 5: "last", 6: "none", 7: "copy", 8: "first"}


def _definition(name: str, step: str | None, sync: bool, hidden: bool, summary: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "step_metric": step or None,
        "step_sync": sync if step else None,
        "hidden": hidden or None,
        "summary": ",".join(summary) or None,
    }


# -------------------------------------------------------------------- offline


def _offline(request: Request) -> Target:
    from eval_runner.sinks.wandb_log import Content

    content = Content()
    for log in request.logs:
        content.add(Path(log))
    definitions = []
    for name, m in content.definitions.items():
        summary = [s for s in _SUMMARIES.values() if getattr(m.summary, s)]
        definitions.append(_definition(name, m.step_metric, m.options.step_sync, m.options.hidden, summary))
    state = {None: "crashed", 0: "finished"}.get(content.exit_code, "failed") if request.logs else ""
    return Target(content.rows, content.summary, definitions, state=state)


def _seed(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if not key.startswith("_")}


def main(argv: list[str]) -> int:
    errors: list[str] = []
    request = strict.parse(Request, Path(argv[1]).read_bytes(), argv[1], errors, max_bytes=16 * POINT_BYTES)
    if request is None:
        print(errors[0])
        return REFUSED
    try:
        print(deliver(request))
    except (Busy, Refused) as reason:
        print(reason)
        return BUSY if isinstance(reason, Busy) else REFUSED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv))
