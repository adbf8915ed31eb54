"""What a runner shows: a live line on a terminal, one JSON object a line on stderr otherwise."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from autoeval_hooks.ticket import Ticket
from eval_runner import running, secrets
from eval_runner.results.schema import Result
from eval_runner.running import SHORT, Note

log = logging.getLogger("autoeval")


class Progress:
    """Open it as a context. `verbose` adds debug messages."""

    def __init__(self, *, verbose: bool = False) -> None:
        console = Console(stderr=True)
        self._live = console.is_terminal
        handler: logging.Handler
        if self._live:
            handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
        else:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_JsonLines())
        handler.addFilter(_masked)
        self._handler = handler
        self._level = logging.DEBUG if verbose else logging.INFO
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(), console=console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._task = self._bar.add_task("waiting for tickets", total=None, what="")
        self.now = running.dump(None)
        """The evaluator at work, and how far it is, for the runner's heartbeat."""

    def __enter__(self) -> Progress:
        self._before = (log.level, log.propagate)
        log.addHandler(self._handler)
        log.setLevel(self._level)
        log.propagate = False
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
        log.removeHandler(self._handler)
        log.setLevel(self._before[0])
        log.propagate = self._before[1]

    def idle(self, done: int, failed: int) -> None:
        self.now = running.dump(None)
        self._bar.update(
            self._task, description="waiting for tickets", total=None, what=f"{done} evaluated, {failed} failed"
        )

    def settling(self) -> None:
        log.info("waiting for the last points to reach their run")
        self._bar.update(self._task, description="delivering points", total=None, what="")

    def evaluation(self, ticket: Ticket, evaluator: str) -> Callable[[float, str], None]:
        """Start showing one evaluator at work; the return value is told how far it is."""
        title = f"{escape(ticket.suite)} · step {ticket.manifest.step} · {evaluator}"
        self._bar.reset(self._task, description=title, total=1.0, what="")
        log.info("step %d, suite %s: %s starts", ticket.manifest.step, ticket.suite, evaluator)
        self.now = running.dump(Note(ticket.id[:SHORT], evaluator, 0.0, ""))

        def show(fraction: float, what: str) -> None:
            self._bar.update(self._task, completed=fraction, what=escape(what))
            self.now = running.dump(Note(ticket.id[:SHORT], evaluator, fraction, what))

        return show

    def finished(self, result: Result) -> None:
        self.now = running.dump(None)
        scores = ", ".join(f"{s.benchmark} {s.metric} {s.value:.4g}" for s in result.scores[:4])
        more = f" and {len(result.scores) - 4} more" if len(result.scores) > 4 else ""
        log.info(
            "step %d, suite %s: done in %.0f s: %s%s", result.step, result.suite, result.eval_s, scores, more,
            extra={"data": {"ticket": result.ticket, "step": result.step, "lag_s": round(result.lag_s, 1)}},
        )  # fmt: skip

    def failed(self, result: Result, became: str) -> None:
        assert result.failure is not None
        self.now = running.dump(None)
        log.error(
            "step %d, suite %s: %s; the ticket is %s", result.step, result.suite, result.failure.message, became,
            extra={"data": {"ticket": result.ticket, "step": result.step, "kind": result.failure.kind}},
        )  # fmt: skip


def _masked(record: logging.LogRecord) -> bool:
    """Keep secrets out of a message; what a plugin raises may quote its settings."""
    record.msg, record.args = secrets.masked(record.getMessage()), ()
    return True


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
