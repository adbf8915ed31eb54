"""Start a server program, know that what answers is ours, know when it dies, and end it with all that it started.

The program runs under `process.run` in a thread of its own, so that the evaluators' programs run beside it. As
everything that the runner starts, it ends with the runner, and with the attempt's lease.
"""

from __future__ import annotations

import http.client
import logging
import re
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner import process
from eval_runner.servers import ports, telling
from eval_runner.servers.base import Endpoint, Serving

TRIES = 3
"""Starts with other ports, where another program took one between our look and the server's."""
POLL_S = 0.1
"""Seconds between two looks at a server that starts."""
ANSWER_S = 30.0
"""Seconds that an answer may take from its first byte to its last."""
WATCH_S = 0.5
"""Seconds between two looks at the port of a server that answers."""
MISSING_S = 3.0
"""A server that does not listen for so long answers no more: its launcher may take long to see that it died."""
ANSWER_MAX = 1 << 16

_TAKEN = re.compile(rb"address already in use|EADDRINUSE", re.IGNORECASE)

logger = logging.getLogger("autoeval")


@dataclass(frozen=True)
class Probe:
    """A request that tells whether a server answers: once its status is 200 and `good` is true of the body.

    A server that is not ready answers 503, or does not listen; any other answer is one that no patience mends.
    """

    method: str
    path: str
    body: str | None = None
    good: Callable[[bytes], bool] = lambda body: True


@dataclass(frozen=True)
class Recipe:
    """How a server is started. `name` is for messages. `command` makes the arguments of `ports` free ports, the first
    of which is to answer; `timeout` is what the server may take until then, in seconds, and `remedy` what to do where
    that is too little. `keep` are descriptors that stay open until nothing of the server is left."""

    name: str
    command: Callable[[Sequence[int]], list[str]]
    ports: int
    env: dict[str, str]
    probe: Probe
    api: Callable[[str], Endpoint]
    timeout: float
    remedy: str
    keep: tuple[int, ...] = ()


class _Taken(AutoEvalError):
    """Another program has one of the ports."""


def start(recipe: Recipe, serving: Serving) -> Process:
    """Start a server and wait until it answers. See `base.Server.start` for what it raises."""
    began = time.monotonic()
    for tries in range(1, TRIES + 1):
        server = Process(recipe, serving, ports.free(recipe.ports))
        try:
            server.wait(began + recipe.timeout)
        except _Taken as error:
            server.close()
            if tries == TRIES:
                raise AutoEvalError(f"{error}; tried with {TRIES} ports; log: {serving.log}") from error
            logger.info("%s; trying another", error)
        except BaseException:
            server.close()
            raise
        else:
            logger.info("%s answers at %s after %.0f s", recipe.name, server.endpoint.url, time.monotonic() - began)
            return server
    raise AssertionError


class Process:
    """A server program at work; a `base.Running` once `wait` has returned."""

    def __init__(self, recipe: Recipe, serving: Serving, chosen: Sequence[int]) -> None:
        self._recipe = recipe
        self._serving = serving
        self._ports = chosen
        self._argv = recipe.command(chosen)
        self.endpoint = recipe.api(f"http://127.0.0.1:{chosen[0]}")
        self._log_start = serving.log.stat().st_size if serving.log.exists() else 0
        self._supervisor = -1       # not there yet
        self._answered = False
        self._looked_at = self._seen_at = float("-inf")
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._why: AutoEvalError | None = None
        self._thread = threading.Thread(target=self._run, name="autoeval-server", daemon=True)
        self._thread.start()

    def wait(self, deadline: float) -> None:
        """Until it answers; `deadline` is in seconds of `time.monotonic`."""
        name, log = self._recipe.name, self._serving.log
        while not self._answers(deadline):
            if self._ended.is_set():
                raise self._why or process.Stopped(f"{name} was told to stop")
            if time.monotonic() > deadline:
                raise AutoEvalError(
                    f"{name} did not answer within {self._recipe.timeout:g} s{self._recipe.remedy}; it wrote last: "
                    f"{process.tail(log, 1)}; log: {log}"
                )
            self._ended.wait(POLL_S)
        self._seen_at = time.monotonic()
        self._answered = True

    def failure(self, wait: float = 0.0) -> AutoEvalError | None:
        end = time.monotonic() + wait
        while not self._closing.is_set():
            if self._ended.is_set():
                return self._why
            if time.monotonic() >= end or self._listens():
                return None
            self._ended.wait(POLL_S)
        return None

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    # ------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        limits, stopping = self._serving.limits, self._serving.stopping
        try:
            status = process.run(
                self._argv, log=self._serving.log, env=self._recipe.env, cwd=self._serving.work_dir,
                stopping=lambda: self._closing.is_set() or stopping(), grace=limits.grace, silence=limits.silence,
                on_tick=self._watch, on_start=self._started, keep=self._recipe.keep,
            )  # fmt: skip
            self._why = self._reason(status)
        except process.Stopped:
            pass
        except AutoEvalError as error:
            self._why = error
        except OSError as error:
            what = error.filename or self._argv[0]
            self._why = AutoEvalError(f"{self._recipe.name} cannot be run: {what}: {error.strerror}")
        except BaseException as error:
            self._why = AutoEvalError(f"{self._recipe.name}: {type(error).__name__}: {error}")
        finally:
            self._ended.set()

    def _started(self, supervisor: int) -> None:
        self._supervisor = supervisor

    def _watch(self) -> None:
        """Raise once a server that answered has not listened for a while."""
        now = time.monotonic()
        if not self._answered or now - self._looked_at < WATCH_S:
            return
        self._looked_at = now
        if self._listens():
            self._seen_at = now
        elif now - self._seen_at > MISSING_S:
            raise self._error("listens no more", telling.line(self._serving.log, self._log_start))

    def _reason(self, status: int) -> AutoEvalError:
        """Why the program ended by itself."""
        if not self._answered and _TAKEN.search(telling.text(self._serving.log, self._log_start)):
            return self._taken(self._ports)
        said = telling.line(self._serving.log, self._log_start, status)
        return self._error("ended in mid-evaluation" if self._answered else "ended before it answered", said)

    def _error(self, what: str, said: str) -> AutoEvalError:
        kind = ConfigError if not self._answered and telling.lacks(said) else AutoEvalError
        return kind(f"{self._recipe.name} {what}{f': {said}' if said else ''}; log: {self._serving.log}")

    # ------------------------------------------------------------------ whose port it is

    def _listens(self) -> bool:
        return bool(ports.owned(self._supervisor, ports.listening(self._ports[0])))

    def _answers(self, deadline: float) -> bool:
        """Whether the server answers, and nobody else does in its place."""
        if not ports.listening(self._ports[0]):
            return False
        self._check_owner(self._ports[:1])
        if not self._asked(deadline):
            return False
        self._check_owner(self._ports)
        return True

    def _check_owner(self, some: Sequence[int]) -> None:
        for port in some:
            if self._foreign(port):
                time.sleep(2 * POLL_S)      # a socket may pass from a process to the next between our two looks
                if self._foreign(port):
                    raise self._taken([port])

    def _foreign(self, port: int) -> set[str]:
        found = ports.listening(port)
        return found - ports.owned(self._supervisor, found)

    def _taken(self, some: Sequence[int]) -> _Taken:
        which = f"port {some[0]} is" if len(some) == 1 else f"one of the ports {', '.join(map(str, some))} is"
        return _Taken(f"{self._recipe.name}: {which} in use by another program of this host")

    def _asked(self, deadline: float) -> bool:
        """Whether our request is answered. Raises AutoEvalError for an answer that no patience mends."""
        probe = self._recipe.probe
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[0], timeout=ANSWER_S)
        try:
            connection.request(probe.method, probe.path, probe.body, {"Content-Type": "application/json"})
            while not select.select([connection.sock], [], [], POLL_S)[0]:
                # One that ends meanwhile closes the connection, unless a device holds it in the kernel.
                if self._ended.is_set() or time.monotonic() > deadline:
                    return False
            response = connection.getresponse()
            status, body = response.status, response.read(ANSWER_MAX)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if status == 503:
            return False
        if status == 200 and probe.good(body):
            return True
        self._check_owner(self._ports[:1])
        text = " ".join(body.decode(errors="replace").split())[:200]
        said = telling.line(self._serving.log, self._log_start)
        raise AutoEvalError(
            f"{self._recipe.name} answers {probe.method} {probe.path} with status {status}: {text or 'nothing'}"
            f"{f' ({said})' if said else ''}; log: {self._serving.log}"
        )
