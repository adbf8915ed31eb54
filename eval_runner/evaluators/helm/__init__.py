"""HELM: the entry point is `HelmEvaluator`."""

from __future__ import annotations

from eval_runner.evaluators.helm.evaluator import HelmEvaluator

__all__ = ["HelmEvaluator"]
