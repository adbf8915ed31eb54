"""The one server of a ticket: started when an evaluator first asks for it, shared by all, ended once none needs it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from autoeval_hooks.errors import AutoEvalError
from eval_runner.process import Stopped
from eval_runner.servers.base import Endpoint, Running, Server, Serving

SETTLE_S = 10.0
"""Seconds that are taken, after an evaluator, to know whether its server is dying, or is another by now."""

log = logging.getLogger("autoeval")


class Shared:
    """A context manager. `endpoint`, `release` and `stopping` are for the evaluators' jobs."""

    def __init__(self, server: Server, serving: Serving) -> None:
        self._server = server
        self._serving = serving
        self._lock = threading.Lock()
        self._running: Running | None = None
        self._failed: AutoEvalError | None = None
        self._released = False      # the evaluator that works needs it no more

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def endpoint(self) -> Endpoint:
        """Where the server answers; it is started if it was not. Raises what `Server.start` does, and why the server
        died if it did."""
        with self._lock:
            self._released = False
            if failure := self._failed or (self._running and self._running.failure()):
                raise failure
            if self._running is None:
                log.info("step %d: its server starts; log: %s", self._serving.step, self._serving.log)
                try:
                    self._running = self._server.start(self._serving)
                except AutoEvalError as error:
                    self._failed = error
                    raise
            return self._running.endpoint

    def release(self, *, keep: bool) -> None:
        """The evaluator that works needs the server no more: what becomes of it is none of its business. It is ended
        unless another evaluator follows (`keep`). Raises why it failed, if it did, after a last look."""
        self._raise_failure(SETTLE_S, None)
        self._released = True
        if not keep:
            self._close()

    def stopping(self) -> bool:
        """Whether evaluators must end: the attempt must, or the server died that is still needed."""
        running = None if self._released else self._running
        return self._serving.stopping() or (running is not None and running.failure() is not None)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While an evaluator works. A server that died is the reason, whatever the evaluator made of it; one that was
        ended because the attempt must stop is none, nor is one that was released before."""
        self._released = False
        try:
            yield
        except Exception as error:
            if self._serving.stopping() and self._running is not None:
                raise error if isinstance(error, Stopped) else Stopped(f"was told to stop ({error})") from error
            self._raise_failure(SETTLE_S, error)
            raise
        self._raise_failure(SETTLE_S, None)

    def _close(self) -> None:
        with self._lock:
            if self._running is not None:
                self._running.close()
                self._running = None

    def _raise_failure(self, wait: float, cause: Exception | None) -> None:
        if self._released:
            return
        failure = self._failed or (self._running.failure(wait) if self._running else None)
        if failure is not None and failure is not cause:
            raise failure from cause
