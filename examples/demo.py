"""The main job, end to end, on this machine: `make demo`.

Trains the example's small model (huggingface/train.py) and runs `autoeval-runner run` beside it, each a process of
its own; then checks what came out, and says where it is. Nothing here is needed to use autoeval: it only starts
what the example's README says, and watches.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from itertools import pairwise
from pathlib import Path

from eval_runner import status
from eval_runner.results import store
from eval_runner.sinks.wandb_log import Content

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "huggingface"
CONFIG = EXAMPLE / "autoeval.yaml"
OUT = HERE.parent / "demo_output"
MARK = ".autoeval-demo"
"""A file in the output directory: only a directory with it is ours to empty."""
SCORES = {
    "bits per byte": ("quick", "autoeval_bpb.python", "bits_per_byte"),
    "next line": ("quick", "next_line", "exact_match"),
    "brackets": ("quick", "dyck_language.2", "exact_match_indicator"),
    "judge's win rate": ("judge", "next_line", "win_rate"),
}
"""What is printed: suite, benchmark and metric."""
SUITES = {suite for suite, _, _ in SCORES.values()}
BPB = SCORES["bits per byte"]
RUNNER = str(Path(sys.executable).with_name("autoeval-runner"))
PLACES = {"scores": "scores.csv", "report": "report/index.html", "the W&B run": "wandb", "logs": "logs"}
PATIENCE_S = 300.0
"""How long nothing may happen before the demo gives up: many times what any single part takes."""


@dataclass(frozen=True)
class Plan:
    """How much is done. The quick variant is for tests: the same path, with less to learn and to score."""

    steps: int = 900
    save_steps: int = 150
    excerpts: int = 100
    questions: int = 100
    duration: str = "about five minutes on two cores"

    @property
    def checkpoints(self) -> list[int]:
        return list(range(self.save_steps, self.steps + 1, self.save_steps))


QUICK = Plan(steps=250, save_steps=50, excerpts=50, questions=16, duration="about two minutes on two cores")


class DemoError(Exception):
    """Why the demo did not do what it says."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small model, evaluate each checkpoint, show the scores.")
    parser.add_argument("--quick", action="store_true", help="fewer steps and instances (for tests)")
    parser.add_argument("--out", type=Path, default=OUT, help="directory to write  [default: %(default)s]")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with claimed(args.out.absolute()) as out:
            demo(QUICK if args.quick else Plan(), out)
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; nothing was left running")


def demo(plan: Plan, out: Path) -> None:
    """Do all of it. Raises DemoError where it does not come out as promised."""
    watch = Watch(plan)
    watch.say(
        f"A model of 0.7 M parameters learns Python's own library, {plan.steps} steps with a checkpoint at every "
        f"{plan.save_steps}, of which the Trainer keeps the newest only. Beside it a runner evaluates each, with HELM "
        "and by a judge who compares what it writes with something else. "
        f"This takes {plan.duration}."
    )
    logs, environment = out / "logs", surroundings(out)
    logs.mkdir()

    def process(name: str, *command: object) -> Process:
        return Process(name, [str(part) for part in command], logs / f"{name}.log", environment)

    amounts = ("--excerpts", plan.excerpts, "--questions", plan.questions)
    with process("data", sys.executable, EXAMPLE / "data.py", "--out", out / "data", *amounts) as data:
        data.finish()
    watch.say(data.tail(1))
    steps = ("--steps", plan.steps, "--save-steps", plan.save_steps)
    places = ("--data", out / "data", "--output", out / "run")
    with (
        judge(process, environment, out, watch),
        process("runner", RUNNER, "run", "--config", CONFIG) as runner,
        process("training", sys.executable, EXAMPLE / "train.py", *places, *steps) as training,
    ):
        watch.until_done(training, runner, out)
    files = ("--out", out / "report", "--csv", out / "scores.csv")
    with process("report", RUNNER, "report", "--config", CONFIG, *files) as report:
        report.finish()
    watch.clear()
    check(plan, out)
    print(f"{'took:':13}{watch.elapsed}")


@contextmanager
def judge(process: Callable[..., Process], environment: dict[str, str], out: Path, watch: Watch) -> Iterator[None]:
    """With an API key in the environment nothing is done, and OpenAI's API is asked. Without one a stand-in for it is
    there while the context is open, and `environment` leads to it."""
    if environment.get("OPENAI_API_KEY"):
        watch.say("OPENAI_API_KEY is set, so the judge is a real one, and is paid for")
        yield
        return
    questions = out / "data/questions.jsonl"
    with process("judge", sys.executable, EXAMPLE / "judge.py", "--port", 0, "--questions", questions) as stand_in:
        while not (found := re.search(r"http://\S+", stand_in.tail(1))):
            if not stand_in.running():
                raise DemoError(f"the stand-in judge ended; the end of {stand_in.log}:\n{stand_in.tail(12)}")
            time.sleep(0.1)
        environment.update(JUDGE_URL=found[0], JUDGE_MODEL="stand-in-judge", OPENAI_API_KEY=secrets.token_hex(16))
        watch.say("no OPENAI_API_KEY is set, so the judge is a stand-in: no model, it compares with the right answer")
        yield


def surroundings(out: Path) -> dict[str, str]:
    """The environment of the parts: W&B offline and below `out`, and the processor shared evenly by the two."""
    cores = len(os.sched_getaffinity(0))
    # W&B's own variables of this shell belong to other runs; bytecode that may not be written makes HELM start slowly.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {
        "EXAMPLE_OUT": str(out),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(out),
        "WANDB_PROJECT": "autoeval-demo",
        "OMP_NUM_THREADS": str(min(max(cores // 2, 1), 4)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


# ---------------------------------------------------------------- processes


class Process:
    """A child with a log of its own. Leaving the context ends it and all that it started."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self.log = name, log
        self._command, self._environment = command, environment

    def __enter__(self) -> Process:
        # setpriv (util-linux) ends the child also where this process is killed outright.
        tied = [found, "--pdeathsig", "TERM", "--"] if (found := shutil.which("setpriv")) else []
        with self.log.open("wb") as out:
            self._child = subprocess.Popen(
                [*tied, *self._command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        """Politely first: the runner gives back what it holds, and ends its own children."""
        try:
            for patience in (10, 5):
                if self._child.poll() is None:
                    self._child.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        self._child.wait(patience)
        finally:    # the user may press Ctrl-C again
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)      # the whole session
            self._child.wait()

    def running(self) -> bool:
        """Whether it runs. Raises DemoError if it failed."""
        code = self._child.poll()
        if code not in (None, 0):
            raise DemoError(f"{self.name} failed with status {code}; the end of {self.log}:\n{self.tail(12)}")
        return code is None

    def finish(self) -> None:
        """Wait for its end. Raises DemoError if it failed, or takes too long."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(PATIENCE_S)
        if self.running():
            raise DemoError(f"{self.name} is not done after {PATIENCE_S:.0f} s; see {self.log}")

    def tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").replace("\r", "\n").strip().split("\n")[-lines:])


@contextmanager
def claimed(out: Path) -> Iterator[Path]:
    """The output directory, emptied, and ours alone while the context is open.

    Raises DemoError for a directory with other contents, and while another demo writes to it.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DemoError(f"{out} is no directory; remove it, or choose another by --out")
    if out.is_dir() and os.listdir(out) and not (out / MARK).is_file():
        raise DemoError(f"{out} holds something that no demo wrote; move it away, or choose another by --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / MARK).open("a") as mark:
        try:
            flock(mark, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise DemoError(f"another demo is writing to {out}; wait for it, or choose another by --out") from None
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        yield out


# ---------------------------------------------------------------- progress


@dataclass
class Watch:
    """Shows what is going on: a line for each event, and on a terminal one more that changes."""

    plan: Plan
    _start: float = field(default_factory=time.monotonic)
    _seen: int = 0
    _doing: str = "the runner is starting"
    _live: bool = field(default_factory=sys.stdout.isatty)

    @property
    def elapsed(self) -> str:
        seconds = int(time.monotonic() - self._start)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def say(self, text: str) -> None:
        self.clear()
        print(f"{self.elapsed}  {text}", flush=True)

    def clear(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", flush=True)

    def until_done(self, training: Process, runner: Process, out: Path) -> None:
        """Return when training has ended, every checkpoint is evaluated, and every point is in the W&B run.

        Raises DemoError when a part fails or nothing moves any more.
        """
        moved, before, trained = time.monotonic(), "", False
        expected = len(self.plan.checkpoints) * len(SUITES)
        while True:
            if not runner.running():
                raise DemoError(f"the runner ended early; the end of {runner.log}:\n{runner.tail(12)}")
            if not trained and not training.running():
                trained = True
                self.say("training has ended")
            self._events(runner)
            counts, waiting = state_of(out)
            if trained and sum(counts.values()) < expected:
                # A ticket that just moves to another state can be missed by a look, not by three.
                handed_over = max(sum(state_of(out)[0].values()) for _ in range(3))
                if handed_over < expected:
                    raise DemoError(
                        f"training handed over {handed_over} of {expected} tickets; the end of "
                        f"{training.log}:\n{training.tail(12)}"
                    )
            if counts.get("failed") or counts.get("quarantine"):
                raise DemoError(f"a checkpoint could not be evaluated: {why_failed(out)}; see {runner.log}")
            step = progress_of(training)
            charted = len(charts(out)) if trained else 0
            if trained and charted >= expected == counts.get("done") and not waiting:
                return
            done = counts.get("done", 0)
            doing = f"{charted} in W&B" if done == expected else self._doing
            state = f"training step {step}/{self.plan.steps} · {done} of {expected} tickets done · {doing}"
            if state != before:
                before, moved = state, time.monotonic()
            elif time.monotonic() - moved > PATIENCE_S:
                raise DemoError(f"nothing has moved for {PATIENCE_S:.0f} s ({state}); see {out / 'logs'}")
            if self._live:
                width = shutil.get_terminal_size().columns - 1
                print("\r\x1b[K" + f"{self.elapsed}  {state}"[:width], end="", flush=True)
            time.sleep(0.5)

    def _events(self, runner: Process) -> None:
        """Show what the runner has said since the last look; off a terminal its log is JSON, a record a line."""
        with runner.log.open("rb") as file:
            file.seek(self._seen)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._seen += len(line)
                with suppress(ValueError):
                    record = json.loads(line)
                    self._show(record["level"], record["message"])

    def _show(self, level: str, message: str) -> None:
        if found := re.match(r"step (\d+), .* starts$", message):
            self._doing = f"evaluating step {found[1]}"
        elif level != "info" or "done in" in message:
            self._doing = "the runner waits"
            self.say(message)


def progress_of(training: Process) -> int:
    """The step that training has reached, by the Trainer's progress bar."""
    found = re.findall(r"(\d+)/\d+ \[", training.tail(3))
    return int(found[-1]) if found else 0


def state_of(out: Path) -> tuple[dict[str, int], int]:
    """How many tickets are in which state, and how many points are still on their way to W&B."""
    try:
        found = status.read(out / "queue")
    except FileNotFoundError:
        return {}, 0        # neither side has made the queue yet
    return found.counts, sum(found.points_waiting.values())


def judges(out: Path) -> set[str]:
    """Who judged, as the servers reported it."""
    evaluations = [e for r in store.collect(out / "queue").results for e in r.evaluations]
    return {e.versions["judge"] for e in evaluations if "judge" in e.versions}


def why_failed(out: Path) -> str:
    return "; ".join(f"step {t.step}: {t.why}" for t in status.read(out / "queue").tickets if t.state != "done")


def charts(out: Path) -> list[dict[str, float]]:
    """The rows of scores that stand in the offline W&B run: one for each checkpoint and suite."""
    content = Content()
    for log in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        content.add(log)
    return [row for row in content.rows if "bench/step" in row]


# ---------------------------------------------------------------- what came out


def check(plan: Plan, out: Path) -> None:
    """Print the scores and where they are. Raises DemoError unless everything that was promised is there."""
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_place = {(int(row["step"]), row["suite"], row["benchmark"], row["metric"]): row for row in rows}
    places = [(step, title, (step, *score)) for step in plan.checkpoints for title, score in SCORES.items()]
    if missing := [f"{title} at step {step}" for step, title, place in places if place not in by_place]:
        raise DemoError(f"no score of {', '.join(missing)}; see {out / 'logs/runner.log'}")

    print(f"\n{'step':>6}" + "".join(f"{title:>20}" for title in SCORES))
    for step in plan.checkpoints:
        scores = [by_place[step, *score] for score in SCORES.values()]
        cells = [f"{float(s['value']):.3f} ± {float(s['stderr'] or 'nan'):.3f}" for s in scores]
        print(f"{step:>6}" + "".join(f"{cell:>20}" for cell in cells))
    print("(± one standard error; next line is 0.25 by chance, the win rate is against a line from elsewhere)")
    print(f"The judge was {', '.join(sorted(judges(out)))}.\n")

    done = store.collect(out / "queue").results
    results = sorted((r for r in done if r.suite == BPB[0]), key=lambda r: r.step)
    gone = len(results) - len(list((out / "run").glob("checkpoint-*")))
    late = sum(this.finished_at > following.saved_at for this, following in pairwise(results))
    print(f"The Trainer deleted {gone} of {len(results)} checkpoints, {late} of them before their scores were there.\n")

    charted = charts(out)
    for row in rows:
        name = f"bench/{row['suite']}/{row['benchmark']}/{row['metric']}"
        if [c[name] for c in charted if c["bench/step"] == int(row["step"]) and name in c] != [float(row["value"])]:
            raise DemoError(f"{name} at step {row['step']} is not in the W&B run as it is in {out / 'scores.csv'}")
    first, last = by_place[plan.checkpoints[0], *BPB], by_place[plan.checkpoints[-1], *BPB]
    fall = float(first["value"]) - float(last["value"])
    if not fall > 2 * math.hypot(float(first["stderr"]), float(last["stderr"])):
        raise DemoError(f"bits per byte did not fall clearly: {first['value']} at first, {last['value']} at last")

    for what, path in PLACES.items():
        print(f"{what + ':':13}{out / path}")


if __name__ == "__main__":
    main()
