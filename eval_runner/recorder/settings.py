"""The recorder's configuration: the older recorder's YAML, as it is.

    project: NAME                   # of W&B
    base_url: URL                   # of W&B; default: $WANDB_BASE_URL, or W&B's own
    entity: NAME                    # ours: default: that of the key
    evals:                          # what is recorded
      - eval_type: helm
        model_name: NAME
        source: helm                # default
        helm_output_dir: DIR        # HELM's output, which holds runs/
        helm_suite_name: NAME
        helm_model: NAME            # ours: the model's name in HELM, where the suite holds several
        token_per_iteration: 0.004  # billions
        default_iteration: 0        # the step of a model whose name tells none
        benchmarks: [{name: mmlu, metrics: [EM]}]
      - {eval_type: helm, model_name: NAME, source: file, token_num: 1000, eval_result: {mmlu: {EM: 0.345}}}
      - {eval_type: helm, model_name: NAME, source: autoeval, results: FILE, run: RUN, suite: SUITE}     # ours
    leaderboard: true               # and the leaderboard of the project is made
    leaderboard_metrics: [mmlu.EM]
    excluded_models: [NAME]         # also `excluded_runs`

Relative paths are relative to the working directory, as they were.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks import strict, yamlfile
from eval_runner.recorder.metrics import CORE, CORE_METRICS

SourceName = Literal["helm", "file", "autoeval"]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is asked for, and its metrics by HELM's display names, such as ``EM``."""

    name: str
    metrics: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """``benchmark.METRIC`` for each metric."""
        return tuple(f"{self.name}.{metric}" for metric in self.metrics)


CORE_BENCHMARKS: tuple[Benchmark, ...] = tuple(Benchmark(name, metrics) for name, metrics in CORE.items())


@dataclass(frozen=True)
class HelmSource:
    """HELM's output. `model` is the model's name there, "" where there is but one."""

    output: Path
    suite: str
    model: str = ""


@dataclass(frozen=True)
class FileSource:
    """The values stand in the configuration: `values` by ``benchmark.METRIC``."""

    values: dict[str, float]


@dataclass(frozen=True)
class AutoevalSource:
    """Our own results: of a queue, or of the queue that a configuration file names. `run` (id, W&B's id or name) and
    `suite` choose among them; "" is all."""

    results: Path
    run: str = ""
    suite: str = ""


@dataclass(frozen=True)
class Eval:
    """One entry of `evals`. `token_num` and `token_per_iteration` are in billions, as they always were, and None where
    they are not known. `benchmarks` is None where none are named: then the sixteen core ones, and of our own results
    all, are meant."""

    where: str
    model_name: str
    source: HelmSource | FileSource | AutoevalSource
    benchmarks: tuple[Benchmark, ...] | None = None
    default_iteration: int = 0
    token_num: float | None = None
    token_per_iteration: float | None = None


@dataclass(frozen=True)
class Settings:
    """The file. `base_url` and `entity` are "" where it names none and W&B's own settings decide."""

    path: Path
    project: str
    base_url: str = ""
    entity: str = ""
    evals: tuple[Eval, ...] = ()
    leaderboard: bool = False
    leaderboard_metrics: tuple[str, ...] = CORE_METRICS
    excluded_models: tuple[str, ...] = ()


def load(path: str | os.PathLike[str]) -> Settings:
    """Read and check a recorder's file. Raises one ConfigError with all that is wrong, each with its key path.

    `base_url` is that of the file, else of the environment variable WANDB_BASE_URL, else "".
    """
    name = os.fspath(path)
    raw = yamlfile.read_yaml(path)
    errors: list[str] = []
    shown: yamlfile.Shown = {}
    raw = yamlfile.expand_into(_without_dots(raw, "", errors), "", errors, shown)
    file = strict.build(_File, _as_was(raw), "", errors)
    evals: list[Eval] = []
    if file is not None:
        errors += _misfits(file)
        evals = [_eval(entry, f"evals[{i}]", errors) for i, entry in enumerate(file.evals)]
    yamlfile.fail(name, yamlfile.unexpanded(errors, shown))
    assert file is not None     # or there was an error
    return Settings(
        path=Path(name).absolute(),
        project=file.project,
        base_url=(file.base_url or os.environ.get("WANDB_BASE_URL", "")).rstrip("/"),
        entity=file.entity,
        evals=tuple(evals),
        leaderboard=file.leaderboard,
        leaderboard_metrics=file.leaderboard_metrics or CORE_METRICS,
        excluded_models=(*file.excluded_models, *file.excluded_runs),
    )


# ---------------------------------------------------------------------- as it is written


@dataclass(frozen=True)
class _Written:
    """One entry of `evals` as it is written; which keys it must have depends on its source."""

    model_name: str
    eval_type: Literal["helm"] = "helm"
    source: SourceName = "helm"
    helm_output_dir: str = ""
    helm_suite_name: str = ""
    helm_model: str = ""
    results: str = ""
    run: str = ""
    suite: str = ""
    eval_result: dict[str, dict[str, float]] = field(default_factory=dict)
    benchmarks: tuple[Benchmark, ...] | None = None
    default_iteration: int = 0
    token_num: float | None = None
    token_per_iteration: float | None = None


@dataclass(frozen=True)
class _File:
    project: str
    base_url: str = ""
    entity: str = ""
    evals: tuple[_Written, ...] = ()
    leaderboard: bool = False
    leaderboard_metrics: tuple[str, ...] = ()
    excluded_models: tuple[str, ...] = ()
    excluded_runs: tuple[str, ...] = ()


def _as_was(raw: dict[str, Any]) -> dict[str, Any]:
    """What the older recorder's YAML 1.1 took as well: a key without a value is one that is not there, and ``yes`` is
    true."""
    out = {key: value for key, value in raw.items() if value is not None}
    if isinstance(said := out.get("leaderboard"), str) and said.lower() in _WORDS:
        out["leaderboard"] = _WORDS[said.lower()]
    if isinstance(evals := out.get("evals"), list):
        out["evals"] = [{k: v for k, v in e.items() if v is not None} if isinstance(e, dict) else e for e in evals]
    return out


def _without_dots(raw: Any, where: str, errors: list[str]) -> Any:
    """Without the list items ``...``, each an error: the older documentation's examples have them for "and so on"."""
    if isinstance(raw, dict):
        return {k: _without_dots(v, f"{where}.{k}" if where else str(k), errors) for k, v in raw.items()}
    if not isinstance(raw, list):
        return raw
    errors += [f"{where}[{i}]: '...' stands for more in the documentation; remove the line"
               for i, item in enumerate(raw) if item in DOTS]  # fmt: skip
    return [_without_dots(item, f"{where}[{i}]", errors) for i, item in enumerate(raw) if item not in DOTS]


DOTS = ("...", "…")
_WORDS = {"yes": True, "on": True, "no": False, "off": False}


_NEEDED: dict[SourceName, tuple[str, ...]] = {
    "helm": ("helm_output_dir", "helm_suite_name"),
    "file": ("eval_result",),
    "autoeval": ("results",),
}


def _misfits(file: _File) -> list[str]:
    out = []
    if not file.project:
        out.append("project: is empty; name the W&B project")
    elif "/" in file.project:
        out.append(f"project: {file.project!r} is no project's name; write what stands before the '/' as `entity`")
    if not file.evals and not file.leaderboard:
        out.append("evals: missing; name what is to be recorded, or set `leaderboard: true`")
    for i, metric in enumerate(file.leaderboard_metrics):
        if "." not in metric.strip("."):
            out.append(f"leaderboard_metrics[{i}]: {metric!r} is not benchmark.METRIC, such as mmlu.EM")
    return out


def _eval(entry: _Written, where: str, errors: list[str]) -> Eval:
    """The entry; what is wrong with it goes to `errors`."""
    if not entry.model_name:
        errors.append(f"{where}.model_name: is empty; name the model, its W&B runs are named after it")
    for key in _NEEDED[entry.source]:
        if not getattr(entry, key):
            errors.append(f"{where}.{key}: missing; `source: {entry.source}` needs it")
    for key in ("token_num", "token_per_iteration", "default_iteration"):
        if (getattr(entry, key) or 0) < 0:
            errors.append(f"{where}.{key}: must be 0 or more")
    for i, benchmark in enumerate(entry.benchmarks or ()):
        for key in ("name", "metrics"):
            if not getattr(benchmark, key):
                errors.append(f"{where}.benchmarks[{i}].{key}: is empty")
    if entry.benchmarks == ():
        errors.append(f"{where}.benchmarks: is empty; leave it out for the default ones")
    seen: set[str] = set()
    for key in (key for benchmark in entry.benchmarks or () for key in benchmark.keys):
        if key in seen:
            errors.append(f"{where}.benchmarks: {key} is asked for twice; remove one")
        seen.add(key)
    return Eval(
        where, entry.model_name, _source(entry), entry.benchmarks, entry.default_iteration, entry.token_num,
        entry.token_per_iteration,
    )  # fmt: skip


def _source(entry: _Written) -> HelmSource | FileSource | AutoevalSource:
    if entry.source == "file":
        written = entry.eval_result.items()
        return FileSource({f"{name}.{metric}": v for name, metrics in written for metric, v in metrics.items()})
    if entry.source == "autoeval":
        return AutoevalSource(_path(entry.results), entry.run, entry.suite)
    return HelmSource(_path(entry.helm_output_dir), entry.helm_suite_name, entry.helm_model)


def _path(written: str) -> Path:
    return Path(written).expanduser().absolute()


def is_recorders(raw: dict[str, Any]) -> bool:
    """Whether a configuration file is a recorder's, and neither an autoeval.yaml nor an older watcher's."""
    return bool({"evals", "leaderboard", "project"} & raw.keys()) and not {"queue", "suites", "auto_eval"} & raw.keys()
