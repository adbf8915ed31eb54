"""The training side of autoeval: hand every checkpoint over for evaluation, and never get in training's way.

Importing this package loads the standard library only; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoeval_hooks.accelerate import save_and_submit
    from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError, QueueError, TicketError
    from autoeval_hooks.handover import submit
    from autoeval_hooks.huggingface import AutoEvalCallback
    from autoeval_hooks.loop import AutoEval

__version__ = "0.1.0"

_EXPORTS = {
    "AutoEval": "loop",
    "AutoEvalCallback": "huggingface",
    "AutoEvalError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "QueueError": "errors",
    "TicketError": "errors",
    "save_and_submit": "accelerate",
    "submit": "handover",
}

__all__ = [
    "AutoEval",
    "AutoEvalCallback",
    "AutoEvalError",
    "CheckpointError",
    "ConfigError",
    "QueueError",
    "TicketError",
    "save_and_submit",
    "submit",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
