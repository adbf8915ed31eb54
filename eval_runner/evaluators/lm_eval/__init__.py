"""lm-evaluation-harness: the entry point is `LmEvalEvaluator`; `scores.read` reads what lm_eval left elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval_runner.evaluators.lm_eval.evaluator import LmEvalEvaluator

__all__ = ["LmEvalEvaluator"]


def __getattr__(name: str) -> object:
    """The evaluator, once it is asked for: who only reads results needs nothing of it."""
    if name in __all__:
        from eval_runner.evaluators.lm_eval.evaluator import LmEvalEvaluator

        return LmEvalEvaluator
    raise AttributeError(name)
