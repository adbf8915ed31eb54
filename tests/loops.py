"""The examples of training loops as tests run them: each a process of its own, offline, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from eval_runner import config as configs
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Result
from eval_runner.runner import Runner
from tests.stand_ins import Program
from tests.trainer import handed_over
from tests.wandb_backend import environment

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def offline(directory: Path, mode: str = "disabled") -> dict[str, str]:
    """An environment in which neither W&B nor a hub can be reached."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RANK": "0"}
    env = environment(directory / "wandb", mode)
    where = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return {**env, **quiet, "PYTHONPATH": where}


def example(kind: str, out: Path, *arguments: str, processes: int = 1) -> str:
    """Run `examples/KIND/train.py` for six steps, with a save at every second, or as `arguments` say; what it said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    argv = [
        sys.executable, *([*launcher, str(processes)] if processes > 1 else []), str(EXAMPLES / kind / "train.py"),
        "--output", str(out), "--steps", "6", "--save-steps", "2", *arguments,
    ]  # fmt: skip
    env = offline(out)
    if processes > 1:
        del env["RANK"]
    done = subprocess.run(argv, env=env, cwd=out.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "autoeval:" not in done.stderr, done.stderr      # no warning of ours
    return done.stdout + done.stderr


def checked(out: Path) -> None:
    """Each of three checkpoints was handed over once, with its pin, its model's files and its tokenizer."""
    found = handed_over(out / "queue")
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6)]
    assert len({t.manifest.run.id for t in found.values()}) == 1
    assert len({t.manifest.weights_digest for t in found.values()}) == 3
    for ticket in found.values():
        assert ticket.manifest.tokens == 1024 * ticket.manifest.step
        assert ticket.manifest.has_tokenizer
        assert {"config.json", "model.safetensors"} <= {f.path for f in ticket.manifest.files}
        assert {f.path for f in ticket.manifest.files} <= {path.name for path in Path(ticket.pin).iterdir()}


def scored(kind: str, out: Path) -> list[Result]:
    """Run the example's queue to its end with a stand-in for HELM, a program that scores by the size of the weights;
    its results. The runner, its verification and its store are real."""
    config = configs.load(str(EXAMPLES / kind / "autoeval.yaml"))
    assert Path(config.queue) == out / "queue"
    with Progress() as progress:
        assert Runner(config, {"quick": [Program()]}, {}, progress, name="r1").run("drain")
    results = sorted(store.collect(Path(config.queue)).results, key=lambda result: result.step)
    assert [(r.status, r.step) for r in results] == [("ok", 2), ("ok", 4), ("ok", 6)]
    return results
