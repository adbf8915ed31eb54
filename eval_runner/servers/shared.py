"""The one server of a ticket: started when an evaluator first asks for it, shared by all, ended after the last."""

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
    """A context manager. `endpoint` and `stopping` are for the evaluators' jobs."""

    def __init__(self, server: Server, serving: Serving) -> None:
        self._server = server
        self._serving = serving
        self._lock = threading.Lock()
        self._running: Running | None = None
        self._failed: AutoEvalError | None = None

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._running is not None:
            self._running.close()

    def endpoint(self) -> Endpoint:
        """Where the server answers; it is started if it was not. Raises what `Server.start` does, and why the server
        died if it did."""
        with self._lock:
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

    def stopping(self) -> bool:
        """Whether evaluators must end: the attempt must, or the server died."""
        return self._serving.stopping() or (self._running is not None and self._running.failure() is not None)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While an evaluator works. A server that died is the reason, whatever the evaluator made of it; one that was
        ended because the attempt must stop is none."""
        try:
            yield
        except Exception as error:
            if self._serving.stopping() and self._running is not None:
                raise error if isinstance(error, Stopped) else Stopped(f"was told to stop ({error})") from error
            self._raise_failure(SETTLE_S, error)
            raise
        self._raise_failure(SETTLE_S, None)

    def _raise_failure(self, wait: float, cause: Exception | None) -> None:
        failure = self._failed or (self._running.failure(wait) if self._running else None)
        if failure is not None and failure is not cause:
            raise failure from cause
