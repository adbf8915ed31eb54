"""What people may want to read of a question: the texts behind its scores."""

from __future__ import annotations

from collections.abc import Sequence

from eval_runner.evaluators.gpt import scoring
from eval_runner.evaluators.gpt.answers import clean_text
from eval_runner.evaluators.gpt.records import Judged, Mode, Review
from eval_runner.results.schema import Detail


def of(judged: Judged, benchmark: str, mode: Mode) -> Detail:
    """`outcome` is ``win``, ``tie`` or ``loss`` of the checkpoint, its score, or ``unreviewed``."""
    question, baseline = judged.question, judged.baseline
    texts = [("Question", question.text), ("Answer of the checkpoint", judged.answer.text)]
    if baseline is not None:
        texts.append((f"Baseline ({baseline.model})", baseline.text))
    if question.reference:
        texts.append(("Reference", question.reference))
    orders = [()] if baseline is None else [("checkpoint", "baseline"), ("baseline", "checkpoint")]
    texts += [(_heading(review, order), review.text) for order, review in zip(orders, judged.reviews, strict=True)]
    cleaned = tuple((clean_text(heading), clean_text(text)) for heading, text in texts)
    return Detail(benchmark, str(question.id), question.category, _outcome(judged, mode), cleaned)


def _outcome(judged: Judged, mode: Mode) -> str:
    if not judged.reviewed:
        return "unreviewed"
    return scoring.outcome(judged) if mode == "pairwise" else f"{judged.reviews[0].scores[0]:g}"


def _heading(review: Review, order: Sequence[str]) -> str:
    """``Review, baseline shown first: 8 : 3 (baseline : checkpoint)``: scores stand in the `order` of the answers."""
    shown = f", {order[0]} shown first" if order else ""
    whose = f" ({' : '.join(order)})" if order and review.scores else ""
    return f"Review{shown}: {' : '.join(f'{score:g}' for score in review.scores) or review.state}{whose}"
