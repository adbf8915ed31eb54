"""A judge compares a served checkpoint's answers with a baseline's: the entry point is `GptEvaluator`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval_runner.evaluators.gpt.evaluator import GptEvaluator

__all__ = ["GptEvaluator"]


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for: the worker, a program of this package, needs no runner."""
    if name == "GptEvaluator":
        from eval_runner.evaluators.gpt.evaluator import GptEvaluator

        return GptEvaluator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
