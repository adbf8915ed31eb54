"""Write curves to W&B, each as a run of its own.

A run has one writer at a time: recorders on this host take a lock, and while the service calls a run "running" (another
host's recorder, or one that was killed a few minutes ago) it is left alone. What is left is a second host that
begins within the same second. What was logged is looked for afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.relay import define
from eval_runner.recorder.curves import TAGS, Curve, Missing, latest, missing

OFFLINE = ("offline", "dryrun")
DEFAULT_URL = "https://api.wandb.ai"
SHOWN_S, AGAIN_S = 30.0, 0.5
"""How long the service is given to show what it took, and how often it is asked."""
API_TIMEOUT_S, INIT_TIMEOUT_S = 20, 60.0
_PASSING = ("did not respond", "connect", "timeout", "timed out", "deadline", "HTTP 5", "unreachable", "busy")
"""What W&B's errors say where the service is away, and not the key refused."""


@dataclass(frozen=True)
class Place:
    """Where the runs are. `base_url` and `entity` are "" where W&B's own settings decide."""

    project: str
    base_url: str = ""
    entity: str = ""


@dataclass(frozen=True)
class Written:
    """What became of a curve. `run` is its path, or the directory of an offline run; `changed` are values that the run
    had otherwise before."""

    run: str
    logged: int
    there: int
    changed: tuple[str, ...]
    offline: bool


def write(place: Place, curve: Curve) -> Written:
    """Log what the curve's run lacks.

    Raises ConfigError where W&B is not installed or switched off, or refuses the key; AutoEvalError where it is away,
    where somebody else writes to the run, and where not all that was logged is there.
    """
    wandb = _wandb()
    check_mode()
    run_id = curve.run_id(place.project)
    with service(place), alone(place, run_id), _said_plainly(wandb, place):
        return (_offline if _mode() in OFFLINE else _online)(wandb, place, curve, run_id)


def check_mode() -> None:
    """Raises ConfigError where W&B is switched off."""
    if _mode() == "disabled":
        raise ConfigError("WANDB_MODE is `disabled`, so that nothing can be recorded; unset it, or use --print-only")


def _mode() -> str:
    return os.environ.get("WANDB_MODE", "online")


def check_idle(wandb: Any, place: Place, run_id: str) -> None:
    """Raises AutoEvalError where the service calls the run "running". Offline, nobody is asked."""
    if _mode() in OFFLINE:
        return
    path = _path(place, run_id)
    if (remote := _remote(wandb, path)) is not None and remote.state == "running":
        raise _running(path)


def _running(path: str) -> AutoEvalError:
    return AutoEvalError(
        f"W&B says that {path} is running: somebody writes to it, or did until a moment ago; try again in a few minutes"
    )


def _path(place: Place, run_id: str) -> str:
    return "/".join(part for part in (place.entity, place.project, run_id) if part)


def _online(wandb: Any, place: Place, curve: Curve, run_id: str) -> Written:
    path = _path(place, run_id)
    remote = _remote(wandb, path)
    lacks = missing(curve, _held(remote))
    if lacks.rows and remote is not None and remote.state == "running":
        raise _running(path)
    if lacks.rows:
        _log(wandb, place, curve, run_id, lacks)
        _look(curve, lacks, path, lambda: _held(_remote(wandb, path)))
    return Written(path, lacks.values, lacks.there, lacks.changed, offline=False)


def _offline(wandb: Any, place: Place, curve: Curve, run_id: str) -> Written:
    """Against what earlier offline directories on this host hold: the service is not asked."""
    from eval_runner.sinks.wandb_log import Content
    from eval_runner.sinks.wandb_reader import logs

    directory = Path(os.environ.get("WANDB_DIR") or ".").absolute()

    def held() -> list[dict[str, Any]]:
        content = Content()
        for log in logs(directory, run_id):
            content.add(Path(log))
        return content.rows

    lacks = missing(curve, held())
    if lacks.rows:
        while any(time.strftime("%Y%m%d_%H%M%S") in log for log in logs(directory, run_id)):
            time.sleep(0.1)     # W&B names a directory by the second, and would write over that of this one
        _log(wandb, place, curve, run_id, lacks)
        _look(curve, lacks, str(directory), held)
    found = logs(directory, run_id)
    at = str(Path(found[-1]).parent) if found else str(directory)
    return Written(at, lacks.values, lacks.there, lacks.changed, offline=True)


def _look(curve: Curve, lacks: Missing, where: str, held: Callable[[], list[dict[str, Any]]]) -> None:
    """Wait until what was logged is there. A service may lose it, and a log on disk may lag behind `finish`."""
    end = time.monotonic() + SHOWN_S
    while left := missing(curve, held()).values:
        if time.monotonic() > end:
            raise AutoEvalError(f"{where}: {left} of {lacks.values} values that were logged are not in the run; record "
                                "again, what came is not repeated")  # fmt: skip
        time.sleep(AGAIN_S)


def _log(wandb: Any, place: Place, curve: Curve, run_id: str, lacks: Missing) -> None:
    run = wandb.init(
        entity=place.entity or None,
        project=place.project,
        id=run_id,
        name=curve.name,
        group=curve.model,
        tags=[*TAGS, curve.tag],
        config=curve.config,
        resume="allow",
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            init_timeout=INIT_TIMEOUT_S,
            silent=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_file_stream_transmit_interval=1,
        ),
    )
    defined: set[str] = set()
    define(run, latest(curve), defined)     # all of them: resuming a run forgets its definitions
    for row in lacks.rows:
        run.log(row)
    run.summary.update(latest(curve))
    run.finish()


def _remote(wandb: Any, path: str) -> Any | None:
    """The run as the service has it; None if there is none."""
    try:
        return wandb.Api(timeout=API_TIMEOUT_S).run(path)
    except (ValueError, wandb.errors.CommError) as error:
        if "could not find" not in str(error).lower():
            raise
        return None


def _held(remote: Any | None) -> list[dict[str, Any]]:
    if remote is None:
        return []
    return sorted(remote.scan_history(use_cache=False), key=lambda row: row.get("_step", 0))


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "wandb is not installed here: pip install 'autoeval-hooks[wandb]', or use --print-only"
        ) from error
    return wandb


@contextlib.contextmanager
def service(place: Place) -> Iterator[None]:
    """W&B's client goes to the service of the configuration; it takes the address from its environment."""
    before = os.environ.get("WANDB_BASE_URL")
    if place.base_url:
        os.environ["WANDB_BASE_URL"] = place.base_url
    try:
        yield
    finally:
        if place.base_url:
            os.environ.pop("WANDB_BASE_URL")
        if before is not None:
            os.environ["WANDB_BASE_URL"] = before


@contextlib.contextmanager
def alone(place: Place, run_id: str) -> Iterator[None]:
    """No other recorder of this user on this host writes to the run meanwhile. Raises AutoEvalError if one does."""
    from filelock import FileLock, Timeout

    own = hashlib.sha256(f"{place}{run_id}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "autoeval" / "recorder"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{cache}: {error.strerror}; locks are kept there, so set XDG_CACHE_HOME") from error
    try:
        with FileLock(cache / f"{own}.lock", timeout=0):
            yield
    except Timeout:
        raise AutoEvalError(f"another recorder on this host writes to {run_id}; try again when it is done") from None


@contextlib.contextmanager
def _said_plainly(wandb: Any, place: Place) -> Iterator[None]:
    """What W&B raises, as one line of ours."""
    url = place.base_url or os.environ.get("WANDB_BASE_URL") or DEFAULT_URL
    try:
        yield
    except AutoEvalError:
        raise
    except wandb.errors.UsageError as error:
        if "api key" in str(error).lower():
            raise ConfigError(f"no key for W&B: export WANDB_API_KEY, or `wandb login --host {url}`") from error
        raise ConfigError(f"W&B refuses the run: {_line(error)}") from error
    except Exception as error:      # wandb's own, requests', and what else a client of a service raises
        said = _line(error)
        refused = isinstance(error, wandb.errors.AuthenticationError) or any(n in said for n in ("401", "403"))
        if refused and not any(word in said for word in _PASSING):
            raise ConfigError(f"W&B at {url} refuses the key or the project: {said}") from error
        raise AutoEvalError(f"W&B at {url} gives no answer: it is away, slow, or refuses ({said})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
