"""A stand-in for a training process, with the real wandb client: `python wandb_trainer.py '{"steps": 10, …}'`.

It logs as Hugging Face's WandbCallback does (`train/global_step` in each row), or as Megatron does
(`log(…, step=)`) with `by_step`. It also plays the runner: `points` maps a step, "end" or "after" to the steps of
points that are dropped there. At the end it prints a JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import wandb

from autoeval_hooks import relay as relays
from autoeval_hooks import relay_files as files
from autoeval_hooks.run_identity import current


@dataclass
class Spec:
    queue: str
    steps: int
    start: int = 1
    relay: bool = True
    by_step: bool = False
    planned: int | None = None
    resume: str | None = None
    points: dict[str, list[int]] = field(default_factory=dict)
    end: bool = True
    leave: str = "exit"
    """``exit``, ``finish``, ``kill`` (SIGKILL), ``crash`` (SIGKILL, with W&B's own process)."""
    grace: float = 0.05
    send_every: int = 1
    """Seconds."""
    linger: float = 0.0
    """Seconds before the kill: W&B sends and writes every second here, and what it has not sent or written is lost."""


def point(step: int) -> files.Point:
    """The point of a checkpoint of this step; its ticket is a digest-like name."""
    seconds = step + 0.123456789
    scores = {"bench/s/arc/acc": step / 1000, "bench/s/arc/acc/n": 100.0}
    metrics = {**scores, "bench/lag_s": seconds, "bench/eval_s": seconds}
    return files.Point(files.VERSION, f"{step:064x}", step, step / 8, metrics)


def drop(directory: Path, steps: list[int]) -> None:
    """As a runner gives points."""
    for step in steps:
        (directory / "given").mkdir(exist_ok=True)
        p = point(step)
        tmp = directory / "points" / f".{p.ticket}"
        tmp.write_bytes(files.encode(p))
        (directory / "given" / p.ticket).unlink(missing_ok=True)
        os.link(tmp, directory / "given" / p.ticket)
        os.rename(tmp, directory / "points" / f"{p.ticket}.json")


def logged(directory: Path, step: int) -> bool:
    """Whether the point of this step was delivered."""
    return any(files.ticket_of(name) == point(step).ticket for name in files.waiting(str(directory), "logged"))


def wait_for(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    """The processes that `parent` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def main(spec: Spec) -> None:
    relays.POLL_S, relays.BEAT_S, relays.GRACE_S = 0.01, 0.05, spec.grace
    run = wandb.init(
        project="p", id="r1", name="the training", group="g", config={"lr": 1}, resume=spec.resume,
        settings=wandb.Settings(x_file_stream_transmit_interval=spec.send_every, x_transaction_log_flush_interval=1),
    )  # fmt: skip
    if not spec.by_step:
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        run.define_metric("loss", summary="min")
    identity = current("ours")
    directory = Path(spec.queue) / "relay" / identity.key
    relay = relays.Relay(
        str(directory), identity, logs_by_step=spec.by_step, planned_last_step=spec.planned
    )  # fmt: skip
    if spec.relay:
        relay.start()
        wait_for(lambda: (directory / "run.json").exists() or identity.wandb_id == "")
    costs = []
    last = spec.start + spec.steps - 1
    for step in range(spec.start, last + 1):
        if spec.by_step:
            run.log({"loss": 1 / step}, step=step)
        else:
            run.log({"loss": 1 / step, "train/global_step": step})
        began = time.perf_counter()
        relay.on_log()
        costs.append(time.perf_counter() - began)
        drop(directory, spec.points.get(str(step), []))
        time.sleep(0.04)
    drop(directory, spec.points.get("end", []))
    if spec.end:
        relay.end(last)
    if late := spec.points.get("after", []):
        drop(directory, late)
        wait_for(lambda: all(logged(directory, step) for step in late))
    print(json.dumps({"costs": costs, "key": identity.key, "mode": identity.wandb_mode}), flush=True)
    if spec.leave in ("kill", "crash"):
        time.sleep(spec.linger)
        if spec.leave == "crash":
            for child in children(os.getpid()):
                os.kill(child, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.leave == "finish":
        run.finish()


if __name__ == "__main__":
    main(Spec(**json.loads(sys.argv[1])))
