"""MLflow as a store of `tracked`; runs in a process of its own (`tracker`).

https://mlflow.org/docs/latest/api_reference/rest-api.html has the limits of a batch and the characters of a name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from autoeval_hooks.run_identity import RunIdentity
from eval_runner import secrets
from eval_runner.sinks.tracked import Entry, Missing, Refused, Value

TAG = "autoeval.run"
EXPERIMENT = "autoeval"
BATCH, LONGEST = 1000, 250
AT_ONCE = 8
"""Histories are asked for: there is a request for each name."""
_PLAIN = re.compile(r"[A-Za-z0-9._/: -]{1,200}")


def make(settings: dict[str, str]) -> MlflowStore:
    """The store, for `MlflowSink`'s settings. `directory` is where a database that is used without a server has its
    new experiments' artifacts, in `mlruns`. Raises what MLflow raises."""
    from mlflow import MlflowClient

    secrets.hide(settings["tracking_uri"])
    if settings["directory"]:
        os.chdir(settings["directory"])
    return MlflowStore(MlflowClient(tracking_uri=settings["tracking_uri"]), settings)


def name(key: str) -> str:
    """`key` as MLflow takes it. A part that must change ends with six digits of its digest, so that no two keys share
    a name."""
    changed = "/".join(_part(part) for part in key.split("/"))
    return changed if len(changed) <= LONGEST else f"{changed[: LONGEST - 7]}-{_digest(key)}"


def _part(part: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.: -]", "_", part)
    return part if plain == part and part.strip(".") else f"{plain.strip('.')}-{_digest(part)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


class MlflowStore:
    """See `tracked.Store`."""

    newest_wins = False

    def __init__(self, client: Any, settings: dict[str, str]) -> None:
        self._client = client
        self._settings = settings

    def wanted(self, entry: Entry) -> list[Value]:
        """See tracked.Store."""
        return [Value(name(key), entry.point.step, entry.at, value) for key, value in entry.metrics().items()]

    def held(self, entries: Sequence[Entry], *, all_of_it: bool) -> list[Value]:
        """See tracked.Store. Beyond the latest value of a name, which comes with the run, there is none: its history is
        asked for only where something else of it is wanted, or `all_of_it`."""
        run = self._find(entries[0].run)
        if run is None:
            return []
        latest = {m.key: Value(m.key, m.step, m.timestamp, m.value) for m in run.data.to_proto().metrics}
        ours = [value for one in entries for value in self.wanted(one)]
        keys = {v.key for v in ours if v.key in latest and v != latest[v.key] and v[1:3] <= latest[v.key][1:3]}
        if all_of_it:
            keys = {key for key in latest if key.startswith("bench/")}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            told = pool.map(lambda key: self._client.get_metric_history(run.info.run_id, key), sorted(keys))
            found = [Value(m.key, m.step, m.timestamp, m.value) for history in told for m in history]
        return found + [latest[key] for key in {v.key for v in ours} & latest.keys() - keys]

    def add(self, missing: Missing) -> None:
        """See tracked.Store."""
        from mlflow.entities import Metric

        identity = missing[0][0].run
        run = self._find(identity) or self._create(identity)
        if TAG not in run.data.tags:
            self._client.set_tag(run.info.run_id, TAG, _tag(identity))
        metrics = [Metric(v.key, v.value, v.at, v.step) for _, values in missing for v in values]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])

    def probe(self) -> str:
        """See tracked.Store."""
        if self._settings["run"]:
            return f"answers, and has the run {self._client.get_run(self._settings['run']).info.run_name!r}"
        return f"answers, and has {len(self._client.search_experiments(max_results=100))} experiment(s)"

    def _find(self, identity: RunIdentity) -> Any | None:
        """The run of this training. Raises Refused where `run` names that of another training."""
        if given := self._settings["run"]:
            run = self._client.get_run(given)
            shows = run.data.tags.get(TAG, "")
            if shows not in ("", _tag(identity)):
                raise Refused(f"the MLflow run {given} shows the training {shows}, not {_tag(identity)}: without "
                              "`run`, each training has its own")  # fmt: skip
            return run
        experiment = self._client.get_experiment_by_name(self._experiment(identity))
        if experiment is None:
            return None
        found = self._client.search_runs([experiment.experiment_id], f"tags.\"{TAG}\" = '{_tag(identity)}'")
        # Whoever looks, takes the same one, should there ever be two.
        return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)

    def _create(self, identity: RunIdentity) -> Any:
        """A run that is over from the start: who looks at it sees that nothing runs there."""
        from mlflow.exceptions import MlflowException

        wanted = self._experiment(identity)
        try:
            experiment = self._client.create_experiment(wanted)
        except MlflowException:
            found = self._client.get_experiment_by_name(wanted)
            if found is None or found.lifecycle_stage != "active":
                raise
            experiment = found.experiment_id
        run = self._client.create_run(experiment, tags={TAG: _tag(identity)}, run_name=identity.name or identity.id)
        self._client.set_terminated(run.info.run_id)
        return run

    def _experiment(self, identity: RunIdentity) -> str:
        return self._settings["experiment"] or identity.project or EXPERIMENT


def _tag(identity: RunIdentity) -> str:
    """Our id of the training, or, where MLflow's search language could not quote it, its digest."""
    return identity.id if _PLAIN.fullmatch(identity.id) else hashlib.sha256(identity.id.encode()).hexdigest()
