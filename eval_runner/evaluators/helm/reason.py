"""Why a run of HELM failed, out of its log, and what kind of failure that is."""

from __future__ import annotations

import re
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import process

CANNOT_LOAD = "autoeval cannot load the checkpoint"
CANNOT_ASK = "autoeval cannot ask the server"
UNUSABLE = "autoeval cannot use what the server says"
BROKEN = "the served model's log-probabilities are no numbers"
OURS = (CANNOT_LOAD, CANNOT_ASK, UNUSABLE, BROKEN)
"""As in inside/autoeval_helm.py and inside/autoeval_served.py, which this process cannot import."""

_DATA = "; put the data under data_dir, or set HF_HUB_OFFLINE=0 where the network may be used"
_KINDS: tuple[tuple[str, type[AutoEvalError], str], ...] = (
    (CANNOT_LOAD, CheckpointError, ""),
    (CANNOT_ASK, AutoEvalError, ""),        # quotes the server, so it comes before what HELM's data may lack
    (UNUSABLE, ConfigError, ""),
    (BROKEN, CheckpointError, "; the model's outputs are broken"),
    (r"Log probs have NaN|contains either `inf`, `nan`", CheckpointError, "; the model's outputs are broken"),
    (r"FileNotFoundError|OfflineModeIsEnabled|LocalEntryNotFound|offline mode|Name or service not known"
     r"|name resolution|Couldn't reach|ConnectionError", ConfigError, _DATA),
    (r"ModuleNotFoundError|OptionalDependencyNotInstalled", ConfigError, "; install it in the HELM environment"),
)  # fmt: skip
_LAST = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|CannotLoad|Interrupt|Enabled|Installed|NotFound)\w*: .+)$")
_RUNNING = re.compile(r"\bRunning (.+?) \{")
_DROPPED = re.compile(r"\bRemoving stat (.+?) because its value is NaN")
_EMPTY = ("RunnerError",)  # only says that runs failed


def failure(status: int, log: Path, where: str) -> AutoEvalError:
    """The error for a run of HELM that ended with `status`; `where` names the run."""
    if status < 0:      # what the log says last is not why
        return AutoEvalError(f"{where}: {process.reason(status)}; log: {log}")
    text = _text(log)
    said = [m.group(1) for line in text.splitlines() if (m := _LAST.match(line.strip()))]
    said = [line for line in said if not line.startswith(_EMPTY)]
    known = next((line for line in said if any(marker in line for marker in OURS)), "")
    reason = _short(known or (said[-1] if said else "")) or f"exit status {status}, and no exception in the log"
    for pattern, kind, remedy in _KINDS:
        if re.search(pattern, known or reason):
            return kind(f"{where}: {reason}{remedy}; log: {log}")
    return AutoEvalError(f"{where}: {reason}; log: {log}")


def dropped_nan(log: Path) -> dict[str, set[str]]:
    """The metrics that HELM left out of each run's results because they were not a number, by the run's name.

    HELM does its runs one after the other and writes `Running NAME {` before each. A run that stands there
    twice was tried again in the same log, and the last try counts. What stands before the first such line
    (the start of a log that was cut) is known to be of no run.
    """
    dropped: dict[str, set[str]] = {}
    metrics: set[str] = set()
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if run := _RUNNING.search(line):
                    metrics = dropped[run.group(1)] = set()
                elif stat := _DROPPED.search(line):
                    metrics.add(stat.group(1))
    except FileNotFoundError:
        return {}
    return dropped


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    except OSError:
        return ""


def _short(text: str) -> str:
    """Without the request that HELM quotes in full, and of a length to read."""
    text = re.split(r" Request: Request\(| for RequestState: ", text, maxsplit=1)[0]
    return text if len(text) <= 300 else text[:300] + "…"
