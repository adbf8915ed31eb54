"""Real trainings with `megatron.training` on the CPU, each in processes of its own; `make test-megatron` runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket
from tests.trainer import handed_over
from tests.wandb_backend import environment

ROOT = Path(__file__).parents[2]
SITE = ROOT / ".venv-megatron"
"""Where the Makefile puts Megatron."""
SCRIPT = Path(__file__).with_name("pretrain_tiny.py")
SEQUENCE, BATCH = 32, 4
TINY = f"""
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}
--micro-batch-size 2 --global-batch-size {BATCH} --train-iters 6
--lr 1e-3 --lr-decay-style constant --lr-decay-iters 100
--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 128
--transformer-impl local --distributed-backend gloo --use-cpu-initialization --attention-backend unfused
--no-masked-softmax-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-bias-gelu-fusion
--no-bias-dropout-fusion --no-rope-fusion
--log-interval 1 --eval-iters 0 --eval-interval 99 --save-interval 2 --num-workers 0
""".split()
WANDB = ("--wandb-project", "p", "--wandb-exp-name", "tiny", "--tensorboard-dir", "tensorboard")
RUN = RunIdentity(id="", project="p", wandb_id="r1", wandb_base_url="http://127.0.0.1:9")
"""What names the relay's directory of a run with WANDB."""
CONFIG = """
queue: queue
suites:
  quick: {evaluators: [{type: helm, entries: [a]}]}
  slow: {every_steps: 4, evaluators: [{type: helm, entries: [b]}]}
"""


@dataclass(frozen=True)
class Place:
    """A directory to train in: `save` holds the checkpoints, `queue` the tickets."""

    path: Path

    @property
    def save(self) -> Path:
        return self.path / "save"

    @property
    def queue(self) -> Path:
        return self.path / "queue"

    @property
    def relay(self) -> Path:
        return self.queue / "relay" / RUN.key

    def command(self, *flags: str, entry: str = "autoeval_hooks.megatron", ranks: int = 1) -> list[str]:
        """The command line of a training; an `entry` of "" starts the script itself."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
        way = [*launch, str(ranks)] if ranks > 1 else []
        script = [*(("-m", entry) if entry else ()), str(SCRIPT)]
        return [sys.executable, *way, *script, *TINY, "--save", "save", *flags]

    def environment(self, **more: str) -> dict[str, str]:
        single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        own = {
            "PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1",
            "WANDB_RUN_ID": RUN.wandb_id, "WANDB_RESUME": "allow",
        }  # fmt: skip
        return {**environment(self.path / "wandb", "offline"), **single, **own, **more}

    def train(
        self, *flags: str, entry: str = "autoeval_hooks.megatron", ranks: int = 1, status: int = 0, **env: str
    ) -> str:
        """Train to the end; what was printed."""
        done = subprocess.run(
            self.command(*flags, entry=entry, ranks=ranks), env=self.environment(**env), cwd=self.path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150,
        )  # fmt: skip
        assert done.returncode == status, done.stdout[-2500:]
        return done.stdout

    def tickets(self) -> dict[tuple[str, int], Ticket]:
        return handed_over(self.queue)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    """Make a directory with a configuration."""
    if not (SITE / "megatron" / "training").is_dir():
        pytest.fail(f"{SITE} has no Megatron; run `make test-megatron`, which puts it there")

    def make(name: str, config: str = CONFIG) -> Place:
        made = Place(tmp_path_factory.mktemp(name))
        (made.path / "autoeval.yaml").write_text(config)
        return made

    return make


def losses(output: str) -> dict[int, str]:
    """Iteration → loss, as Megatron prints them."""
    return {int(i): loss for i, loss in re.findall(r"iteration\s+(\d+)/.*?lm loss: (\S+)", output)}


def of_ours(output: str) -> list[str]:
    """What we said."""
    return [line for line in output.splitlines() if "autoeval:" in line]
