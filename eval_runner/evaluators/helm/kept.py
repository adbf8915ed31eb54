"""Keep HELM's run directories where `output_path` says, in HELM's own layout, for helm-summarize and helm-server.

There a checkpoint is the model ``autoeval/<output_suite>_<step>``: what reads such a tree finds the step behind the
last ``_``. The marks by which we tell entries apart are taken out again.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio
from autoeval_hooks.errors import AutoEvalError

NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,120}")
"""What can be a suite of HELM's, and part of a model's name."""


@dataclass(frozen=True)
class Place:
    """Where runs are kept: ``<path>/runs/<suite>/``. A suite is for one training run: a step stands there once."""

    path: Path
    suite: str

    def keep(self, run: Path, mark: str, model: str, step: int) -> Path:
        """Copy the run directory of the model `model`, whose name ends with ``,groups=<mark>``; one of the same step
        is replaced. Returns where it stands. Raises AutoEvalError where that fails."""
        ours = f"autoeval/{self.suite}_{step}"
        name = _without(run.name, mark).replace(_flat(model), _flat(ours))
        target = self.path / "runs" / self.suite / name
        new = self.path / f".autoeval-{fsio.unique()}"
        old = new.with_name(f"{new.name}-old")
        try:
            new.mkdir(parents=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            for file in (f for f in run.iterdir() if f.is_file()):
                text = file.read_text(encoding="utf-8").replace(model, ours).replace(_flat(model), _flat(ours))
                (new / file.name).write_text(_unmarked(text, mark) if file.name == "run_spec.json" else text, "utf-8")
            _put(new, target, old)
        except (OSError, ValueError) as error:
            raise AutoEvalError(f"{target}: HELM's output cannot be kept there ({error}); mend it, or change "
                                "`output_path`") from error  # fmt: skip
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)      # else the only copy
        return target


def _put(new: Path, target: Path, old: Path) -> None:
    """Rename `new` to `target`, and what stands there to `old`; back where that fails. Raises OSError."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _unmarked(text: str, mark: str) -> str:
    spec: dict[str, Any] = json.loads(text)
    spec["name"] = _without(spec["name"], mark)
    spec["groups"] = [group for group in spec["groups"] if group != mark]
    return json.dumps(spec, indent=2)


def _without(name: str, mark: str) -> str:
    return name.removesuffix(f",groups={mark}").removesuffix(f":groups={mark}")


def _flat(model: str) -> str:
    """As HELM writes a model's name into that of a run."""
    return model.replace("/", "_")
