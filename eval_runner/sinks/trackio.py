"""The trackio sink: scores in trackio's local database, beside what the training logs to it, if it does.

Scores join the latest run of the training's name (`name` names another) in the project, or one that is made for them.
Each result is one row at the training's step; its log id is made of the ticket, and trackio keeps one row of an id.
The rows are written by trackio's own storage code, not by `trackio.init`, which prints, measures the machine and makes
every resumed run a writer of its own. No service is asked: for a Space, `trackio sync --project P` after it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from eval_runner.sinks.trackers import TrackerSink


@dataclass(frozen=True)
class Settings:
    """The keys of the sink's entry. `project` and `name` are the training's unless they are given; `dir` is trackio's
    own directory, by default where trackio has it (TRACKIO_DIR)."""

    project: str = ""
    name: str = ""
    dir: str = ""


class TrackioSink(TrackerSink):
    """See the module, and `trackers`."""

    kind = "trackio"
    package = "trackio"
    environment = {  # noqa: RUF012  # ClassVar in the base
        "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRACKIO_SPACE_ID": "",
        "TRACKIO_SERVER_URL": "", "TRACKIO_DATASET_ID": "", "TRACKIO_BUCKET_ID": "", "SPACE_ID": "",
        "SPACE_REPO_NAME": "", "SYSTEM": "",
    }  # fmt: skip

    def _read(self, settings: dict[str, Any]) -> dict[str, str]:
        parsed = self.built(Settings, settings)
        if parsed is None:
            return {}
        self.outside = "" if parsed.dir else os.environ.get("TRACKIO_DIR", "")
        return {"project": parsed.project, "name": parsed.name, "dir": self.path(parsed.dir) if parsed.dir else ""}

    def _target(self) -> str:
        return f"trackio in {self._settings['dir'] or 'its own directory'}"
