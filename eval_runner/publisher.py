"""Brings finished results to the sinks, in a thread of its own: a slow or dead service never blocks evaluation."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

from autoeval_hooks import fsio
from autoeval_hooks.errors import TicketError
from autoeval_hooks.queue import Queue, Token
from eval_runner.results import store
from eval_runner.sinks.base import Sink
from eval_runner.stop import Stop

log = logging.getLogger("autoeval")

PERIOD_S = 2.0
"""Between two looks at what is done and at what the sinks have waiting."""


class Publisher:
    """Runs while its context is open. What each sink was given is marked in `published/<sink>/`; the
    marks are a shortcut only: without them everything is given again, which sinks take as it is."""

    def __init__(self, queue: Queue, sinks: dict[str, Sink]) -> None:
        self._queue = queue
        self._sinks = sinks
        self._over = threading.Event()
        self._wake = threading.Event()
        self._rounds = 0
        self._settled = False
        self._said: dict[str, str] = {}
        self._thread = threading.Thread(target=self._loop, name="autoeval-publisher", daemon=True)

    def __enter__(self) -> Publisher:
        for name in self._sinks:
            fsio.make_dirs(self._queue.ops, str(self._marks(name)))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._wake.set()
        self._thread.join(timeout=10 * PERIOD_S)

    def wake(self) -> None:
        """Something was finished: look now."""
        self._wake.set()

    def settle(self, timeout: float, stopped: Stop) -> bool:
        """Wait until every sink shows everything that is done; False when some still waits after `timeout` s, or
        `stopped` was set."""
        end, start = time.monotonic() + timeout, self._rounds
        self.wake()
        while time.monotonic() < end and self._thread.is_alive() and not stopped.is_set():
            if self._settled and self._rounds >= start + 2:     # one round may have begun before the last result
                return True
            time.sleep(PERIOD_S / 10)
        return False

    def look(self) -> bool:
        """Give every sink what it lacks, and let it move on; whether nothing waits any longer."""
        settled = [self._serve(name, sink) for name, sink in self._sinks.items()]
        return all(settled)

    def _loop(self) -> None:
        while not self._over.is_set():
            self._settled = self.look()
            self._rounds += 1
            self._wake.wait(PERIOD_S)
            self._wake.clear()

    def _serve(self, name: str, sink: Sink) -> bool:
        try:
            marked = set(self._queue.ops.listdir(str(self._marks(name))))
            given = [self._give(name, sink, t) for t in self._queue.tokens("done") if t.result_name not in marked]
            done = sink.flush() and all(given)
        except Exception as error:      # a sink must never take the runner down
            self._say(name, f"sink {name}: {error}; will be tried again")
            return False
        self._said.pop(name, None)
        return done

    def _give(self, name: str, sink: Sink, token: Token) -> bool:
        try:
            result = store.read(Path(self._queue.root) / "results" / token.result_name, self._queue.ops)
            if result.status == "ok":
                sink.publish(result)
        except store.ResultError as error:
            self._say(token.ticket, str(error))
            # Another look will not mend a record that is missing or torn, and `status` names it; an error passes.
            return not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, FileNotFoundError)
        except TicketError as error:
            self._say(token.ticket, f"sink {name}, ticket {token.ticket[:12]}: {error}; it cannot be shown there")
            return True
        except Exception as error:
            self._say(token.ticket, f"sink {name}, ticket {token.ticket[:12]}: {error}; will be tried again")
            return False
        with contextlib.suppress(FileExistsError):
            self._queue.ops.close(self._queue.ops.create(str(self._marks(name) / token.result_name)))
        return True

    def _marks(self, name: str) -> Path:
        return Path(self._queue.root) / "published" / name

    def _say(self, key: str, message: str) -> None:
        """Warn once for each change of the message."""
        if self._said.get(key) != message:
            self._said[key] = message
            log.warning(message)
