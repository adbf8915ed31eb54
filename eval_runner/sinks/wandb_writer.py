"""Log waiting points into a W&B run that has no writer: `python -m eval_runner.sinks.wandb_writer REQUEST.json`.

A process of its own, so that a W&B that hangs or crashes costs the runner nothing. It logs each point as a row of its
own against ``bench/step``. It holds the run's lease (wandb_lease), leaves out what the run already has, and takes each
point (points/ → taken/) just before it logs: whatever ends it, what may have been logged is known. Then it reads the
run again, and what it finds there goes to logged/. What it does not find stays taken, to be looked for once more.

Another writer's rows are safe only while there is none: online, the service must not call the run "running", and no
training process may have shown itself since the runner decided (its heartbeat). What is left is a training that
resumes between this process's `wandb.init` and its `finish` (about a second): its rows and ours may then overwrite
each other, and a row of training that is overwritten is lost. Ours are looked for again.

Resuming a run replaces its metric definitions, and a second offline directory its summary too. Both are
repeated here, so that the training's own stay as they are; so does the run's final state. The exit status is one
of the constants of `wandb_reader`; the last line of the output says what was done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autoeval_hooks import relay_files as files
from autoeval_hooks import strict
from autoeval_hooks.errors import TicketError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.relay import define
from autoeval_hooks.relay_files import POINT_BYTES, Point, clock
from eval_runner.sinks.wandb_lease import Lease
from eval_runner.sinks.wandb_reader import (
    BUSY,
    DONE,
    REFUSED,
    Look,
    Refused,
    check_service,
    holds,
    keys,
    logs,
    path,
    remote_run,
    rows,
)

HF_STEP = "train/global_step"
AGAIN_S = 2.0
"""Between two looks at what the service shows."""


@dataclass(frozen=True)
class Request:
    """What to do. `relay` is the run's directory in the queue; `directory` is where W&B may put its own."""

    look: Look
    companion: bool
    """Log into a run beside the training's: `<id>-eval`, same group, job type ``eval``."""
    logs_by_step: bool
    directory: str
    relay: str
    who: str
    """The name under which the lease and the points are taken, used once."""
    broken: str
    """What the holder of the lease has shown for so long that it counts as dead; "" if there is none."""
    heartbeat_seen: str
    """The training process's heartbeat that stood still; "" if there was none."""
    patience: float
    """For how long (s) the service is given to show what it took."""


@dataclass
class Target:
    """The run as it is before we write: what must stay as it is."""

    summary: dict[str, Any]
    definitions: list[dict[str, Any]]
    """Arguments of `define_metric`."""
    state: str = ""


class Busy(Exception):
    """Somebody else writes to the run."""


def heartbeat(path: str) -> str:
    """The content of a heartbeat file; "" where there is none."""
    try:
        return FileOps().read(path, 256).decode(errors="replace")
    except FileNotFoundError:
        return ""


def deliver(request: Request) -> str:
    """Do it; what was done. Raises Busy and Refused."""
    lease = Lease(Path(request.relay) / "writer", request.who)
    if not lease.acquire(request.broken):
        raise Busy("another runner logs them")
    with lease.beating():
        points, unread = _points(request)
        present = _present(request, points)
        there = [point for point in points if point.ticket in present]
        _settle(request, _take(request, there))
        missing = [point for point in points if point.ticket not in present]
        if missing:
            missing = _deliver(request, lease, missing)
    if unread:
        raise Refused(f"{len(unread)} point(s) cannot be read here, such as {unread[0]}")
    return f"{len(missing)} point(s) logged, {len(there)} were there already"


def _deliver(request: Request, lease: Lease, missing: list[Point]) -> list[Point]:
    target = _offline(request) if request.look.offline else _online(request)
    _check_alone(request, lease)
    if not (taken := _log(request, target, missing)):
        return []
    end = clock() + request.patience
    # As long as the lease is ours, nobody else looks, and takes what does not show yet for lost.
    while len(present := _present(request, taken)) < len(taken) and clock() < end:
        time.sleep(AGAIN_S)
    _settle(request, [point for point in taken if point.ticket in present])
    _check_alone(request, lease)
    if lost := [point for point in taken if point.ticket not in present]:
        raise RuntimeError(f"{len(lost)} of {len(taken)} point(s) that were logged are not in the run: not all came")
    return taken


def _points(request: Request) -> tuple[list[Point], list[str]]:
    """The points that wait, and those that cannot be read now, each with why: they must not hold up the others."""
    points, unread = [], []
    for name in files.waiting(request.relay):
        try:
            points.append(files.read_point(request.relay, name))
        except TicketError as error:
            print(f"refused a point: {error}")
            files.set_aside(request.relay, name, str(error))
        except FileNotFoundError:       # another took it
            continue
        except OSError as error:
            unread.append(f"{name}: {error.strerror}")
    return sorted(points, key=lambda point: (point.step, point.ticket)), unread


def _present(request: Request, points: list[Point]) -> set[str]:
    """The tickets whose rows are in the run."""
    look = replace(request.look, keys=keys(points))
    if look.offline:    # a log of ours was not there yet when we were told of them
        new = set(logs(Path(request.directory), _run_id(request))) - {*look.logs, *look.beside}
        look = replace(look, logs=(*look.logs, *sorted(new)))
    found = rows(look).rows if points else []
    return {point.ticket for point in points if any(holds(row, point) for row in found)}


def _take(request: Request, points: list[Point]) -> list[Point]:
    """Those that nobody else took."""
    return [
        p for p in points
        if files.move(request.relay, f"points/{p.ticket}.json", f"taken/{files.taken(p.ticket, request.who)}")
    ]  # fmt: skip


def _settle(request: Request, points: list[Point]) -> None:
    for name in (files.taken(point.ticket, request.who) for point in points):
        files.move(request.relay, f"taken/{name}", f"logged/{name}")


def _check_alone(request: Request, lease: Lease) -> None:
    if heartbeat(str(Path(request.relay) / "heartbeat")) != request.heartbeat_seen:
        raise Busy("a training process has come to life in this run; the points are left to it")
    if not lease.held():
        raise Busy("another writer was let into this run, since no sign of life of ours was seen")


def _log(request: Request, target: Target, points: list[Point]) -> list[Point]:
    """Log those that nobody else took meanwhile, and these are returned."""
    import wandb

    run, offline = request.look.run, request.look.offline
    state = "" if request.companion else target.state
    writer = wandb.init(
        entity=run.entity or None,
        project=run.project or None,
        id=_run_id(request),
        name=f"{run.name or run.wandb_id} (eval)" if request.companion else None,
        group=run.wandb_group or None if request.companion else None,
        job_type="eval" if request.companion else None,
        resume="allow" if offline or request.companion else "must",
        mode="offline" if offline else "online",
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
    if offline:
        writer.summary.update(_seed(target.summary))
    # HF's callback draws its charts over a logged key: with it in the row, ours can be drawn over it too.
    with_hf_step = HF_STEP in target.summary and not request.logs_by_step and not request.companion
    points = _take(request, points)
    for point in points:
        define(writer, point.metrics, defined)
        writer.log({**point.row(), HF_STEP: point.step} if with_hf_step else point.row())
    if with_hf_step:
        writer.summary[HF_STEP] = target.summary[HF_STEP]
    writer.finish(exit_code=1 if state == "failed" else 0)
    return points


def _run_id(request: Request) -> str:
    wandb_id = request.look.run.wandb_id
    return f"{wandb_id}-eval" if request.companion else wandb_id


# -------------------------------------------------------------------- online


def _online(request: Request) -> Target:
    check_service(request.look.run)
    name = path(request.look.run, _run_id(request))
    remote = remote_run(request.look.run, _run_id(request))
    if remote is None:
        if request.companion:
            return Target({}, [])
        raise Refused(f"W&B has no run {name}: check run.entity and run.project in the configuration")
    if remote.state == "running" and not request.companion:
        raise Busy(f"W&B says that {name} is running: somebody writes to it, or did until a moment ago")
    definitions = remote.rawconfig.get("_wandb", {}).get("m", [])
    return Target(dict(remote.summary), list(_from_config(definitions)), remote.state)


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
    before = request.look.beside if request.companion else request.look.logs
    for log in before:
        content.add(Path(log))
    definitions = []
    for name, m in content.definitions.items():
        summary = [s for s in _SUMMARIES.values() if getattr(m.summary, s)]
        definitions.append(_definition(name, m.step_metric, m.options.step_sync, m.options.hidden, summary))
    state = {None: "crashed", 0: "finished"}.get(content.exit_code, "failed") if before else ""
    return Target(content.summary, definitions, state)


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
