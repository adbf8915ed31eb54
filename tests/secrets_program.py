"""`python -m tests.secrets_program train CONFIG OUT` or `… cli ARGUMENT…`: the two sides, with programs that talk.

The evaluator is a stand-in whose child prints its whole environment; of the checkpoints it fails on some, with messages
that quote settings and the child's output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from autoeval_hooks import relay_files
from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner import process, registry
from eval_runner.evaluators.base import Job, Outcome
from tests.stand_ins import StandIn


class Talkative(StandIn):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def evaluate(self, job: Job) -> Outcome:
        print_all = "import os; [print(k, v, end=' ; ') for k, v in os.environ.items()]"
        process.run([sys.executable, "-c", print_all], log=job.log, env=None, cwd=job.work_dir)
        step = int(job.name.split("-")[1])
        if step == 4:
            raise ConfigError(f"plugins[0]: {self.settings['plugins'][0]!r:.60} is no module")
        if step == 6:
            raise AutoEvalError(f"the child says: {process.tail(job.log)}")
        return super().evaluate(job)


def train(config: str, out: Path) -> None:
    from autoeval_hooks import AutoEvalCallback
    from tests.trainer import trainer

    trainer(out, AutoEvalCallback(config), steps=6, report_to="wandb", run_name="the training").train()


def main(argv: list[str]) -> None:
    if argv[0] == "train":
        train(argv[1], Path(argv[2]))
        return
    from eval_runner import cli

    relay_files.ENDED_STALE_S = 0.5
    real = registry.build_evaluators
    registry.build_evaluators = lambda config, suite: (  # type: ignore[assignment]
        real(config, suite) if suite.name == "real" else [Talkative(suite.evaluators[0])]
    )
    sys.argv[1:] = argv[1:]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
