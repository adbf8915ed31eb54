"""The W&B sink's child processes: what they are asked, where offline runs stand, and in what environment they run."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoeval_hooks import fsio
from autoeval_hooks.config import map_path
from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import process
from eval_runner.sinks import wandb_lease
from eval_runner.sinks.base import Context
from eval_runner.sinks.wandb_cases import Seen
from eval_runner.sinks.wandb_reader import BUSY, DONE, Held, Keys, Look, logs, save
from eval_runner.sinks.wandb_writer import Request

log = logging.getLogger("autoeval")

WRITER_TIMEOUT_S, LOOK_TIMEOUT_S = 300.0, 120.0
SHOWN_S = 30.0
"""A row that the service shows later than this after it was sent counts as lost, and is logged again."""
OFFLINE = ("offline", "dryrun")
_KEPT = {
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"),
    *("WANDB_HTTP_TIMEOUT", "WANDB_INIT_TIMEOUT", "WANDB_ERROR_REPORTING", "WANDB_IDENTITY_TOKEN_FILE"),
    *("WANDB_CREDENTIALS_FILE", "WANDB_X_PROXIES", "WANDB_X_EXTRA_HTTP_HEADERS"),
}
"""W&B's variables of this process that its children get too. The others describe some run, and not this one."""


@dataclass(frozen=True)
class Settings:
    """The keys of the sink's entry. `dir` takes offline runs whose own directory cannot be reached from here;
    the key goes to `base_url`, or where W&B's own settings say."""

    late: Literal["wait", "companion"] = "wait"
    dir: str = ""
    base_url: str = ""
    api_key_env: str = ""


class NotNow(AutoEvalError):
    """Nothing went wrong, but it is not the time."""


class Children:
    """Runs the reader and the writer for the runs of one queue."""

    def __init__(self, settings: Settings, context: Context) -> None:
        self._settings = settings
        self._context = context

    def look(self, run: RunIdentity, wanted: Keys, output: Path) -> Held:
        """What the run holds. Raises AutoEvalError that says why it cannot be read; `output` takes what was said."""
        with tempfile.TemporaryDirectory(prefix="autoeval-wandb-") as scratch:
            answer = Path(scratch) / "answer.json"
            self._run("wandb_reader", self._look(run, wanted, answer), Path(scratch), output)
            return Held.load(answer)

    def write(self, directory: Path, seen: Seen, broken: str) -> None:
        """Log the waiting points of `directory` as the run's only writer; `broken` is that of `wandb_writer.Request`.
        Raises AutoEvalError that says why they still wait."""
        who = fsio.unique()
        with tempfile.TemporaryDirectory(prefix="autoeval-wandb-") as scratch:
            look = self._look(seen.run, (), Path(scratch) / "unused")
            request = Request(
                look=look, companion=seen.case.way == "companion", logs_by_step=seen.by_step, who=who,
                directory=str(_parent(self._offline_dir(seen.run))) if look.offline else scratch,
                relay=str(directory), broken=broken, heartbeat_seen=seen.beat, patience=SHOWN_S,
            )  # fmt: skip
            try:
                self._run("wandb_writer", request, Path(scratch), directory / "writer.log")
            finally:
                wandb_lease.release(directory / "writer", who)

    def cannot_tell(self, seen: Seen, held: Held) -> str:
        """Why it is not certain that a row which was not found is not there; "" if it is."""
        if seen.run.wandb_mode in OFFLINE:
            own = self._own(seen.run)
            if own is None or not logs(own, seen.run.wandb_id):
                return (
                    f"the offline directories of the run ({seen.run.wandb_dir or 'unknown'}) are not here, and it may "
                    "have these points; map or mount them (`path_map`)"
                )
        elif held.state == "running" and seen.case.hook == "gone":
            return "W&B says that the run is running: somebody writes to it, or did until a moment ago"
        return ""

    def _look(self, run: RunIdentity, wanted: Keys, answer: Path) -> Look:
        offline, beside = run.wandb_mode in OFFLINE, f"{run.wandb_id}-eval"
        places = {self._fallback(), *filter(None, [self._own(run)])} if offline else set()
        return Look(
            run=run, offline=offline, keys=wanted, answer=str(answer),
            logs=_by_age(log for place in places for log in logs(place, run.wandb_id)),
            beside=_by_age(log for place in places for log in logs(place, beside)),
        )  # fmt: skip

    def _run(self, module: str, request: Look | Request, scratch: Path, output: Path) -> None:
        """Run one of our programs. Raises AutoEvalError with the last line that it said unless it is done."""
        save(request, scratch / "request.json")
        try:
            status = process.run(
                [sys.executable, "-m", f"eval_runner.sinks.{module}", str(scratch / "request.json")],
                log=output, env=self._environment(str(scratch)), cwd=scratch, stopping=self._context.stopping,
                timeout=WRITER_TIMEOUT_S if isinstance(request, Request) else LOOK_TIMEOUT_S,
            )  # fmt: skip
        except process.Stopped:
            raise
        except AutoEvalError as error:
            raise AutoEvalError(f"W&B gives no answer: it is away, slow, or refuses ({error})") from error
        if status != DONE:
            said = process.tail(output, 1)
            raise NotNow(said) if status == BUSY else AutoEvalError(f"{said} (see {output})")

    def _fallback(self) -> Path:
        return Path(self._settings.dir) if self._settings.dir else self._context.queue / "wandb"

    def _own(self, run: RunIdentity) -> Path | None:
        return Path(map_path(run.wandb_dir, self._context.path_map)) if run.wandb_dir else None

    def _offline_dir(self, run: RunIdentity) -> Path:
        """The directory with the run's own offline directories, if it is here and holds them: a path in a ticket
        is only data. Else ours."""
        own = self._own(run)
        if own is not None and logs(own, run.wandb_id) and os.access(own, os.W_OK):
            return own
        log.warning(
            "autoeval: %s: the offline directories of the run (%s) are not here, so its scores go to %s; after "
            "`wandb sync` of both, the summary and the chart definitions of the run are those of the scores",
            run.name or run.key, run.wandb_dir or "unknown", self._fallback(),
        )  # fmt: skip
        self._fallback().mkdir(parents=True, exist_ok=True)
        return self._fallback()

    def _environment(self, scratch: str) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") or k in _KEPT}
        if self._settings.base_url:
            env["WANDB_BASE_URL"] = self._settings.base_url
        if self._settings.api_key_env:
            env["WANDB_API_KEY"] = os.environ[self._settings.api_key_env]
        source = str(Path(__file__).parents[2])  # the child starts elsewhere, and runs what we are
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
        return env | {"WANDB_DIR": scratch, "WANDB_SILENT": "true", "PYTHONPATH": path}


def _by_age(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(found), key=lambda log: Path(log).parent.name))


def _parent(directory: Path) -> Path:
    """What `wandb.init(dir=…)` must be told for its directories to stand in this one."""
    return directory.parent if directory.name == "wandb" else directory
