"""The TensorBoard sink: scores in event files of their own, `<log_dir>/<run>/<suite>/`, beside those of training.

Never in a directory with another writer's event file: TensorBoard goes on to the newest file of a directory, and what
is written to the older one from then on is not shown. A step has one value there; where it was evaluated again it is
the newer. `tensorboard_store` says how late values come to stand in order. TensorBoard has no axis but the step: the
tokens are a series, ``bench/tokens``. Neither TensorFlow nor PyTorch is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import TicketError
from eval_runner.results.schema import Result
from eval_runner.sinks.tracked import entry
from eval_runner.sinks.trackers import TrackerSink


@dataclass(frozen=True)
class Settings:
    """The keys of the sink's entry. `log_dir` is by default `tensorboard` in the queue's directory; `run` is the name
    of the run's directory in it, by default the run's name with six digits of its id's digest."""

    log_dir: str = ""
    run: str = ""


class TensorboardSink(TrackerSink):
    """See the module, and `trackers`."""

    kind = "tensorboard"
    package = "tensorboard"
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3"}  # noqa: RUF012  # ClassVar in the base

    def _read(self, settings: dict[str, Any]) -> dict[str, str]:
        parsed = self.built(Settings, settings)
        if parsed is None:
            return {}
        if parsed.run and (parsed.run.startswith("/") or ".." in parsed.run.split("/")):
            self.fault("run", f"{parsed.run!r} is not a name in log_dir; give log_dir the directory above it")
        directory = self.path(parsed.log_dir) if parsed.log_dir else str(self._context.queue / "tensorboard")
        return {"log_dir": directory, "run": parsed.run}

    def _target(self) -> str:
        return f"TensorBoard's {self._settings['log_dir']}"

    def _lease(self) -> Path:
        """Where every runner finds it, whatever its configuration."""
        return Path(self._settings["log_dir"]) / ".autoeval-writer"

    def publish(self, result: Result) -> None:
        """See base.Sink. Raises TicketError for a value that TensorBoard cannot hold: its scalars are of 32 bits."""
        for key, value in entry(result).metrics().items():
            try:
                struct.pack("<f", value)
            except OverflowError:
                raise TicketError(f"{key} is {value}, which is more than TensorBoard's 32 bits hold") from None
        super().publish(result)

    def _remedy(self) -> str:
        return f"give this user the right to write there, or set `{self._context.where}.log_dir`"
