"""The MLflow sink: scores in the MLflow run of the training, or in one that is made for it.

A run is found by its tag ``autoeval.run``, our id of the training; `run` names another by its MLflow id, such as the
one that the training itself logs to. Each score is logged at the training's step, and its time is the end of its
evaluation: MLflow's databases keep one row for a name, step, time and value, so that what is logged twice stands there
once. Where a step was evaluated again, both values stand there, and the newer one is MLflow's "latest".

Tried with MLflow 3.17: `mlflow-skinny` is enough for a tracking server (http, https, databricks); a database
(sqlite:///…) needs the whole of `mlflow`; a plain directory is refused by MLflow unless MLFLOW_ALLOW_FILE_STORE is set.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autoeval_hooks.findings import Finding
from eval_runner import secrets
from eval_runner.sinks.trackers import TrackerSink

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class Settings:
    """The keys of the sink's entry. `run` is an MLflow run id; `experiment` is that of runs that are made, by default
    the training's project."""

    tracking_uri: str = ""
    experiment: str = ""
    run: str = ""


class MlflowSink(TrackerSink):
    """See the module, and `trackers`."""

    kind = "mlflow"
    package = "mlflow"
    environment = {  # noqa: RUF012  # ClassVar in the base
        "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_RUN_ID": "", "MLFLOW_EXPERIMENT_ID": "", "MLFLOW_EXPERIMENT_NAME": "", "MLFLOW_TRACKING_URI": "",
    }  # fmt: skip

    defaults = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # noqa: RUF012

    def _read(self, settings: dict[str, Any]) -> dict[str, str]:
        parsed = self.built(Settings, settings)
        if parsed is None:
            return {}
        uri = parsed.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        secrets.hide(uri)
        self.outside = "" if parsed.tracking_uri else _plain(uri)
        if not uri:
            self.fault("tracking_uri", "missing: where MLflow is, such as http://127.0.0.1:5000; or export "
                       "MLFLOW_TRACKING_URI")  # fmt: skip
        database = re.split(r"[:+]", uri)[0] in DATABASES
        if database and find_spec("sqlalchemy") is None:
            self.fault("tracking_uri", "a database needs the whole of MLflow: pip install mlflow")
        return {
            "tracking_uri": self._absolute(uri), "experiment": parsed.experiment, "run": parsed.run,
            "directory": self.path("") if database else "",
        }  # fmt: skip

    def _absolute(self, uri: str) -> str:
        """A relative path starts at the file, as all of its paths do."""
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            return f"sqlite:///{self.path(uri.removeprefix('sqlite:///'))}"
        if "://" not in uri and not uri.startswith("databricks"):
            return f"file:{self.path(uri.removeprefix('file:'))}" if uri else ""
        return uri

    def _remedy(self) -> str:
        return "look at the server, the network and MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN; evaluation goes on"

    def findings(self) -> list[Finding]:
        """See `trackers`. A database that is not there yet is not made."""
        file = Path(self._settings["tracking_uri"].removeprefix("sqlite:///"))
        if not self._settings["tracking_uri"].startswith("sqlite:///") or file.exists():
            return super().findings()
        there = os.access(file.parent, os.W_OK | os.X_OK)
        says = "is made when first written to" if there else "cannot be made: its directory is not there, or is closed"
        where = self._context.where
        return [self._package(), Finding("ok" if there else "problem", where, f"{file} {says}",
                                         "" if there else f"make it, or mend `{where}.tracking_uri`")]  # fmt: skip

    def _target(self) -> str:
        return f"MLflow at {_plain(self._settings['tracking_uri'])}"


def _plain(uri: str) -> str:
    """Without a password, and what may hold one."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
