"""trackio's local database as a store of `tracked`; runs in a process of its own (`tracker`).

Written with `SQLiteStorage.bulk_log` of trackio 0.43, which a run's own writer ends in, too, and which ignores a row
whose log id is there. Read from its table `metrics`: of the ids, `get_logs` tells nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autoeval_hooks.run_identity import RunIdentity
from eval_runner.sinks.tracked import Entry, Missing, Refused, Value

PROJECT = "autoeval"
BUSY_S = 10.0
"""Seconds that another writer may hold the database."""


def make(settings: dict[str, str]) -> TrackioStore:
    """Raises Refused where trackio's directory is on a network file system: trackio itself writes no database there."""
    if settings["dir"]:
        os.environ["TRACKIO_DIR"] = settings["dir"]     # it is read while trackio is imported
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    if utils.get_storage_mode() != "sqlite":
        raise Refused(f"{utils.TRACKIO_DIR} is on a network file system, where SQLite is not safe; set the sink's "
                      "`dir` (or TRACKIO_DIR) to a local one, or export TRACKIO_STORAGE_MODE=sqlite")  # fmt: skip
    return TrackioStore(SQLiteStorage, settings, Path(utils.TRACKIO_DIR))


class TrackioStore:
    """See `tracked.Store`."""

    newest_wins = False

    def __init__(self, storage: Any, settings: dict[str, str], directory: Path) -> None:
        self._storage = storage
        self._settings = settings
        self._directory = directory

    def wanted(self, entry: Entry) -> list[Value]:
        """See tracked.Store."""
        return [Value(key, entry.point.step, entry.at, value) for key, value in entry.metrics().items()]

    def held(self, entries: Sequence[Entry], *, all_of_it: bool) -> list[Value]:
        """See tracked.Store."""
        run = self._run(entries[0].run)
        query = "SELECT step, timestamp, metrics FROM metrics WHERE run_id = ? AND CAST(metrics AS TEXT) LIKE ?"
        rows = self._query(entries[0].run, query, (run, '%"bench/%')) if run else []
        return [
            Value(key, step, _milliseconds(timestamp), float(value))
            for step, timestamp, text in rows
            for key, value in json.loads(text).items()
            if key.startswith("bench/") and isinstance(value, int | float)
        ]

    def add(self, missing: Missing) -> None:
        """See tracked.Store."""
        identity = missing[0][0].run
        project = self._project(identity)
        self._storage.validate_project_name(project)
        self._storage.bulk_log(
            project=project, run=self._name(identity),
            metrics_list=[{v.key: v.value for v in values} for _, values in missing],
            steps=[one.point.step for one, _ in missing],
            timestamps=[datetime.fromtimestamp(one.at / 1000, UTC).isoformat() for one, _ in missing],
            log_ids=[f"{_prefix(identity)}{one.name}" for one, _ in missing],
            run_id=self._run(identity) or _digest(f"run {identity.id}", 32),
        )  # fmt: skip

    def probe(self) -> str:
        """See tracked.Store."""
        above = next(p for p in (self._directory, *self._directory.parents) if p.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise Refused(f"{above} cannot be written to by this user")
        return f"{self._directory} can be written to"

    def _run(self, identity: RunIdentity) -> str:
        """The id of the run that the scores are in, else of the latest of its name that holds no other training's; ""
        where there is none."""
        name = self._name(identity)
        ours = self._query(identity, "SELECT run_id FROM metrics WHERE run_name = ? AND log_id LIKE ? LIMIT 1",
                           (name, f"{_prefix(identity)}%"))  # fmt: skip
        if ours:
            return str(ours[0][0])
        others = "SELECT run_id FROM metrics WHERE log_id LIKE 'autoeval:%'"
        latest = (f"SELECT run_id FROM metrics WHERE run_name = ? AND run_id NOT IN ({others}) GROUP BY run_id "
                  "ORDER BY MIN(timestamp) DESC LIMIT 1")  # fmt: skip
        found = self._query(identity, latest, (name,))
        return str(found[0][0]) if found else ""

    def _query(self, identity: RunIdentity, query: str, values: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """The rows; none where the project is not there yet. Raises sqlite3.Error."""
        path = self._storage.get_project_db_path(self._project(identity))
        if not path.exists():
            return []
        self._storage.init_db(self._project(identity))      # brings a table of an older trackio up to date
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
            return connection.execute(query, values).fetchall()

    def _project(self, identity: RunIdentity) -> str:
        return self._settings["project"] or identity.project or PROJECT

    def _name(self, identity: RunIdentity) -> str:
        return self._settings["name"] or identity.name or identity.id


def _prefix(identity: RunIdentity) -> str:
    """How the log ids of this training begin."""
    return f"autoeval:{_digest(identity.id, 12)}:"


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _milliseconds(timestamp: str) -> int:
    found = datetime.fromisoformat(timestamp)
    return round(found.replace(tzinfo=found.tzinfo or UTC).timestamp() * 1000)
