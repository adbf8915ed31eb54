"""An evaluation in parts: what an earlier attempt at the same ticket finished is not done again."""

from __future__ import annotations

from collections.abc import Sequence

from autoeval_hooks import manifest
from eval_runner.evaluators.base import Job, Outcome
from eval_runner.results.schema import Evaluation


class InParts:
    """The parts of one evaluation, by their place. `keys` are those of `base.Parts`; `unit` is what users call them."""

    def __init__(self, job: Job, keys: Sequence[str], unit: str) -> None:
        self._kept, self._keys, self._unit = job.finished, keys, unit
        found = {i: job.finished.get(key) for i, key in enumerate(keys)}
        self._done = {i: outcome for i, outcome in found.items() if outcome is not None}
        self.earlier = len(self._done)

    def __len__(self) -> int:
        return len(self._keys)

    def missing(self) -> list[int]:
        """Those that have no scores so far."""
        return [i for i in range(len(self)) if i not in self._done]

    def put(self, i: int, outcome: Outcome) -> None:
        """Keep a part, for another attempt, too. Raises CheckpointError as `base.Parts.put`."""
        self._done[i] = outcome
        self._kept.put(self._keys[i], outcome)

    def outcome(self, evaluator: str) -> Outcome:
        """All scores, in the order of the parts, none of which is missing."""
        parts = [self._done[i] for i in range(len(self))]
        versions = {name: text for part in parts for name, text in part.evaluation.versions.items()}
        if self.earlier:
            versions["autoeval resume"] = f"{self.earlier} of {len(self)} {self._unit} are of an earlier attempt"
        provenance = {path: was for part in parts for path, was in part.evaluation.provenance.items()}
        scores = tuple(score for part in parts for score in part.evaluation.scores)
        seconds = sum(part.evaluation.seconds for part in parts)
        return Outcome(
            Evaluation(evaluator, seconds, scores, versions, provenance), [i for part in parts for i in part.instances]
        )


def tokenizer_content(job: Job) -> list[str]:
    """Digests of the tokenizer's files, where it is not the checkpoint's own, which the ticket tells."""
    directory = str(job.tokenizer)
    if job.tokenizer == job.path:
        return []
    return [manifest.record(directory, name).digest for name in manifest.model_files(directory)]
