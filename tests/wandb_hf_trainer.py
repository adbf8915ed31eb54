"""A real Hugging Face Trainer with its WandbCallback: `python -m tests.wandb_hf_trainer OUT QUEUE relay|plain`.

Points come out of order while it trains, and after it; it prints the digest of the weights.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from autoeval_hooks import relay as relays
from autoeval_hooks.run_identity import current
from tests.trainer import trainer, weights_digest
from tests.wandb_trainer import drop, logged, wait_for


class ByRelay(TrainerCallback):
    def __init__(self, queue: Path) -> None:
        self.queue = queue

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        identity = current("ours")
        self.directory = self.queue / "relay" / identity.key
        self.relay = relays.Relay(
            str(self.directory), identity, logs_by_step=False, planned_last_step=state.max_steps
        )  # fmt: skip
        self.relay.start()
        wait_for(lambda: (self.directory / "run.json").exists())
        drop(self.directory, [4, 2])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        time.sleep(0.1)
        self.relay.on_log()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        drop(self.directory, [8])
        self.relay.end(state.global_step)


if __name__ == "__main__":
    out, queue, relay = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "relay"
    relays.POLL_S, relays.BEAT_S, relays.GRACE_S = 0.01, 0.05, 0.05
    callbacks = [ByRelay(queue)] if relay else []
    trained = trainer(out, *callbacks, steps=8, report_to="wandb", save_strategy="no", run_name="the training")
    trained.train()
    if relay:
        drop(callbacks[0].directory, [6])
        wait_for(lambda: logged(callbacks[0].directory, 6))
    print(weights_digest(trained))
