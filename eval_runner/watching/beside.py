"""The runner that `watch --run` adds: `autoeval-runner run` as a child of the watcher, which ends with it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from autoeval_hooks.queue import Queue
from eval_runner import process
from eval_runner.stop import Stop

log = logging.getLogger("autoeval")

OK, FAILED, USAGE, LATER = 0, 1, 2, 75
GRACE_S = 30.0
"""Seconds that the runner has to give its ticket back, and to end what it runs."""
AGAIN_S = 30.0
"""Before a runner that ended by itself is started again, where the watch has no end."""


@dataclass
class Beside:
    """Runs the runner for the queue of `config_file`, suites of `eval_type` alone where one is given.

    Where the watch has an end (`drains`), it is started whenever tickets came, and ends with the last of them; else it
    goes on as the watch does.
    """

    config_file: str
    queue: Path
    eval_type: str | None
    drains: bool
    stop: Stop
    _thread: threading.Thread | None = None
    _statuses: list[int] = field(default_factory=list)
    _started_for: int = -1

    @property
    def log(self) -> Path:
        return self.queue / "logs" / "watch-run.log"

    def look(self, enqueued: int) -> None:
        """Start the runner if there is something for it to do. `enqueued` counts the tickets that the watch brought."""
        if self._thread is not None and self._thread.is_alive():
            return
        if self.drains and (enqueued == self._started_for or not self._waiting()):
            return
        if USAGE in self._statuses:
            return
        self._started_for = enqueued
        self._thread = threading.Thread(target=self._run, name="autoeval-runner", daemon=True)
        self._thread.start()

    def finish(self, enqueued: int) -> int:
        """Wait for what runs, and for what came since it began; the exit status for all of it."""
        while not self.stop.is_set():
            self.look(enqueued)
            if self._thread is None or not self._thread.is_alive():
                break
            self._thread.join(0.2)
        if self._thread is not None:
            self._thread.join()
        # what failed stays so; what had to wait was taken up again by the next one
        return next((s for s in (USAGE, FAILED) if s in self._statuses), self._statuses[-1] if self._statuses else OK)

    @property
    def refused(self) -> bool:
        """Whether the runner ended for a mistake in the configuration: nothing would be evaluated."""
        return USAGE in self._statuses

    def _waiting(self) -> bool:
        try:
            return any(Queue(str(self.queue)).tokens("pending", "claimed"))
        except OSError:     # there is no queue so far, or the file system does not answer: looked at again
            return False

    def _run(self) -> None:
        argv = [sys.executable, "-c", "from eval_runner.cli import main; main()", "run", "--config", self.config_file]
        argv += ["--drain"] if self.drains else []
        argv += ["--eval-type", self.eval_type] if self.eval_type else []
        self.log.parent.mkdir(parents=True, exist_ok=True)
        while not self.stop.is_set():
            try:
                status = process.run(argv, log=self.log, env=dict(os.environ), cwd=Path.cwd(),
                                     stopping=self.stop.is_set, grace=GRACE_S)  # fmt: skip
            except process.Stopped:
                return
            except Exception as error:      # a thread's end would say nothing
                log.warning("the runner failed: %s; its log: %s", error, self.log)
                status = FAILED
            self._statuses.append(status if status in (OK, FAILED, USAGE, LATER) else FAILED)
            if status not in (OK, LATER):
                log.warning("the runner ended: %s; its log: %s", process.tail(self.log, 1), self.log)
            if self.drains or status == USAGE:
                return
            self.stop.wait(AGAIN_S)
