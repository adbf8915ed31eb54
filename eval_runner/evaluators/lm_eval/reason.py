"""Why a run of lm_eval failed, and what kind of failure that is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import process

_AGAIN = "; another try may go better"


@dataclass(frozen=True)
class Told:
    """What the program inside left: see inside/autoeval_lm_eval.py."""

    stage: str
    task: str
    types: tuple[str, ...]
    message: str
    status: int | None

    def has(self, *types: str) -> bool:
        return any(name in self.types for name in types)


Rule = tuple[str, Callable[[Told], object], type[AutoEvalError], str]
"""A stage or "" for any, what must hold, the kind of error, and the remedy. The first that fits counts."""

_RULES: tuple[Rule, ...] = (
    ("", lambda t: t.has("OutOfMemoryError") or "out of memory" in t.message, AutoEvalError,
     "; lower `batch_size`, or see what else uses the device"),
    ("", lambda t: t.has("ImportError"), ConfigError, "; install it in lm_eval's environment"),
    ("", lambda t: re.search(r"No space left|Disk quota", t.message), AutoEvalError, ""),
    ("start", lambda t: True, ConfigError, "; build its environment anew with `autoeval-runner env create lm_eval`"),
    ("load", lambda t: t.has("Empty"), ConfigError, ""),
    ("load", lambda t: re.search(r"(?i)offline ?mode|HF_HUB_OFFLINE", t.message), ConfigError,
     "; its data are not in the cache, and HF_HUB_OFFLINE is set: load them once without it"),
    ("load", lambda t: t.has("GatedRepoError", "RepositoryNotFoundError", "DatasetNotFoundError"), ConfigError,
     "; if it is gated, HF_TOKEN must be that of somebody who may read it"),
    ("load", lambda t: (t.status or 0) >= 500 or t.status == 429 or t.has("ConnectionError", "ConnectError",
     "Timeout", "TimeoutException", "LocalEntryNotFoundError"), AutoEvalError,
     f"; its data could not be downloaded{_AGAIN}"),
    ("load", lambda t: t.has("ValueError", "LookupError", "TypeError", "AttributeError", "FileNotFoundError",
     "TemplateError", "YAMLError", "AssertionError", "DatasetGenerationError"), ConfigError,
     "; see the task's definition"),
    ("model", lambda t: t.has("TypeError", "AttributeError"), ConfigError, "; see `model_args`"),
    ("model", lambda t: True, CheckpointError, ""),
    ("run", lambda t: t.has("Unusable"), ConfigError,
     "; tasks that compare log-probabilities need a server that echoes the prompt with them, as vLLM does; or let "
     "lm_eval load the checkpoint: `through: model`"),
    ("run", lambda t: t.status and 400 <= t.status < 500 and t.status not in (408, 425, 429), ConfigError,
     "; the server refuses what it is asked"),
    ("run", lambda t: re.search(r"chat[_ ]template", t.message), ConfigError,
     "; the tokenizer has no chat template: set `apply_chat_template: false`"),
    ("run", lambda t: t.has("NotImplementedError"), ConfigError, "; ask by `through: server` or `model`"),
    ("run", lambda t: re.search(r"`inf`, `nan`", t.message), CheckpointError, "; the model's outputs are broken"),
    ("run", lambda t: "marked as unsafe" in t.message or "HF_ALLOW_CODE_EVAL" in t.message, ConfigError,
     "; it runs code that the model writes: `allow_unsafe_code`"),
)  # fmt: skip


def failure(status: int, left: Path, log: Path, where: str) -> AutoEvalError:
    """The error for a run that ended with `status`; `left` is where the program leaves its report."""
    if status < 0:      # what the log says last is not why
        return AutoEvalError(f"{where}: {process.reason(status)}; log: {log}")
    told = _told(left)
    if told is None:
        said = process.tail(log, 2)
        return AutoEvalError(f"{where}: lm_eval ended with {process.reason(status)}: {said}; log: {log}")
    doing = {"load": "cannot load", "model": "cannot load the checkpoint", "write": "cannot keep its results"}
    where = f"{where} ({told.task})" if told.task else where
    said = f"{where}: lm_eval {doing.get(told.stage, 'failed')}: {_short(told.message)}"
    for stage, holds, kind, remedy in _RULES:
        if stage in ("", told.stage) and holds(told):
            return kind(f"{said}{remedy}; log: {log}")
    return AutoEvalError(f"{said}; log: {log}")


def _told(left: Path) -> Told | None:
    try:
        found: dict[str, Any] = json.loads(left.read_text(encoding="utf-8"))
        return Told(found["stage"], found["task"], tuple(found["types"]), found["message"], found["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "…"
