"""Evaluate with any program: it is given the checkpoint, and leaves its scores as JSON."""

from __future__ import annotations

from eval_runner.evaluators.command.evaluator import CommandEvaluator

__all__ = ["CommandEvaluator"]
