"""Asks the HELM of this environment what it makes of run entries, before any checkpoint is loaded.

`python autoeval_helm_probe.py REQUEST ANSWER` reads and writes JSON files. The request holds `entries`
(descriptions without a model), `plugins` and `schema`. The answer holds `versions`, with the kind of device that
torch finds among them, and for each entry either
`error` (with `kind` and `known`, the names that were possible) or `runs`: groups, the main metric and split,
and which metrics are better when lower. Instead of the entries' answers there is `plugin_error`, `schema_error`,
or `known_schemas` where there is no file of the schema's name.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import helm.benchmark.run as helm_run
import torch
import yaml
from helm.benchmark import run_spec as registry
from helm.benchmark.metrics.metric import create_metric
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, register_model_deployment
from helm.benchmark.run_expander import RUN_EXPANDERS
from helm.benchmark.run_spec_factory import construct_run_specs
from helm.benchmark.runner import set_benchmark_output_path
from helm.benchmark.scenarios.scenario import create_scenario
from helm.common.object_spec import parse_object_spec

MODEL = "autoeval/probe"
STATIC = Path(helm_run.__file__).parent / "static"
OWN = {"autoeval_bpb": ("bits_per_byte", "test"), "custom": ("exact_match", "test")}
"""Main metric and split of groups that no schema of HELM has."""


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    helm_run.register_builtin_configs_from_helm_package()
    set_benchmark_output_path(str(Path(request_file).parent))
    register_model_deployment(ModelDeployment(name=MODEL, client_spec=ClientSpec("unused")))
    answer: dict[str, Any] = {"versions": _versions(), "entries": []}
    try:
        helm_run.import_user_plugins(request["plugins"])
    except Exception as error:
        answer["plugin_error"] = f"{type(error).__name__}: {error}"
    else:
        answer |= _answers(request["entries"], request["schema"])
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


def _answers(entries: list[str], chosen: str | None) -> dict[str, Any]:
    if chosen and not (STATIC / chosen).is_file():
        return {"known_schemas": sorted(path.name for path in STATIC.glob("schema_*.yaml"))}
    try:
        schemas = _schemas(chosen)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:  # of the chosen file: those of HELM can be read
        return {"schema_error": " ".join(str(error).split())}
    return {"entries": [_entry(text, schemas) for text in entries]}


def _versions() -> dict[str, str]:
    names = ("crfm-helm", "transformers", "torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"      # as HELM's client chooses
    return {name: importlib.metadata.version(name) for name in names} | {"device": device}


def _schemas(chosen: str | None) -> list[dict[str, Any]]:
    """HELM's tables of run groups and metrics: the chosen one, the classic one, then all others."""
    first = STATIC / "schema_classic.yaml"
    others = sorted(STATIC.glob("schema_*.yaml"))
    paths = dict.fromkeys([STATIC / chosen, first, *others] if chosen else [first, *others])
    return [_schema(path) for path in paths]


def _schema(path: Path) -> dict[str, Any]:
    schema = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(schema, dict):
        raise ValueError("no mapping")
    for key in ("metrics", "run_groups"):
        if not all(isinstance(item, dict) and "name" in item for item in schema.get(key) or []):
            raise ValueError(f"{key} is no list of mappings with a name")
    return schema


def _entry(description: str, schemas: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        spec = parse_object_spec(description)
    except ValueError as error:
        return {"error": str(error), "kind": "syntax", "known": []}
    function = registry.get_run_spec_function(spec.class_name)
    if function is None:
        return {"error": spec.class_name, "kind": "name", "known": sorted(registry._REGISTERED_RUN_SPEC_FUNCTIONS)}
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in spec.args:
            if key not in parameters and key not in RUN_EXPANDERS:
                return {"error": key, "kind": "argument", "known": sorted(parameters)}
    spec.args["model"] = MODEL
    try:
        return {"runs": [_run(run, schemas) for run in construct_run_specs(spec)]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "kind": "value", "known": sorted(parameters)}


def _run(run: Any, schemas: list[dict[str, Any]]) -> dict[str, Any]:
    lower: dict[str, bool] = {}
    for metric in run.metric_specs:
        try:
            lower |= {m.name: m.lower_is_better for m in create_metric(metric).get_metadata()}
        except Exception:  # most metrics describe themselves; those that do not are in a schema, or unknown
            continue
    for schema in reversed(schemas):
        lower |= {m["name"]: m["lower_is_better"] for m in schema.get("metrics") or [] if "lower_is_better" in m}
    metric, split = _main(run, schemas)
    return {"groups": run.groups, "metric": metric, "split": split, "lower_is_better": lower}


def _main(run: Any, schemas: list[dict[str, Any]]) -> tuple[str | None, str | None]:
    for group in run.groups:
        if group in OWN:
            return OWN[group]
    for schema in schemas:
        environments = {g["name"]: g.get("environment") or {} for g in schema.get("run_groups") or []}
        for group in run.groups:
            name = environments.get(group, {}).get("main_name")
            if name and name != "none":
                return name, environments[group].get("main_split")
    try:
        metadata = create_scenario(run.scenario_spec).get_metadata()
    except Exception:  # a scenario need not describe itself, and some load data when they are made
        return None, None
    return metadata.main_metric, metadata.main_split


if __name__ == "__main__":
    main(*sys.argv[1:])
