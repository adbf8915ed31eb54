"""The recorder's tables of HELM against HELM itself, and its output made anew as tests/recorded/helm was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoeval_hooks.errors import ConfigError
from eval_runner import environments
from eval_runner.recorder import helm_output
from eval_runner.recorder.helm_runs import ASIDE, MAIN
from eval_runner.recorder.metrics import CORE, DISPLAY
from eval_runner.recorder.settings import Benchmark, HelmSource
from tests import helm_output as real

pytestmark = pytest.mark.helm
RECORDED = Path(__file__).parents[1] / "recorded" / "helm"


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return environments.find(os.environ.get("AUTOEVAL_TEST_HELM_ENV"), "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def schemas(python: Path) -> dict[str, Any]:
    found = {f.stem: yaml.safe_load(f.read_text()) for f in python.parent.parent.glob("lib/*/site-packages/helm/"
             "benchmark/static/schema_*.yaml")}  # fmt: skip
    assert "schema_classic" in found
    return found


def test_headings_are_those_of_helms_schema_files(schemas: dict[str, Any]) -> None:
    theirs: dict[str, set[str]] = {}
    for schema in schemas.values():
        for metric in schema.get("metrics", ()):
            heading = metric.get("short_display_name") or metric.get("display_name")
            theirs.setdefault(heading, set()).add(metric["name"])
    assert [(heading, name) for heading, names in DISPLAY.items() for name in {*names} - theirs[heading]] == []
    for metric in {m for metrics in CORE.values() for m in metrics} - {*DISPLAY}:
        assert theirs[metric] == {metric}


def test_main_metrics_splits_and_hidden_groups_are_those_of_the_classic_schema(schemas: dict[str, Any]) -> None:
    groups = {group["name"]: group for group in schemas["schema_classic"]["run_groups"]}
    theirs = {name: groups[name]["environment"] for name in MAIN}
    assert {name: (found["main_name"], found["main_split"]) for name, found in theirs.items()} == MAIN
    assert {name for name, group in groups.items() if group.get("visibility") == "this_group_only"} == ASIDE
    assert {*CORE} <= {*MAIN}


@pytest.mark.slow
def test_helm_writes_today_what_was_recorded(python: Path, tmp_path: Path) -> None:
    real.make(python, tmp_path / "out")
    real.trim(tmp_path / "out", tmp_path / "kept")
    assert _names(tmp_path / "kept") == _names(RECORDED)
    asked = (Benchmark("mmlu", ("EM",)), Benchmark("dyck_language", ("EM",)))
    for root in (tmp_path / "out", tmp_path / "kept", RECORDED):
        found = helm_output.read(HelmSource(root, real.SUITE), real.MODEL, asked, 0, "evals[0]")
        assert (found.missing, found.absent) == ([], [])
        if root != RECORDED:
            tables = found
    (tmp_path / "out" / "runs" / real.SUITE / "groups").rename(tmp_path / "groups")
    runs = helm_output.read(HelmSource(tmp_path / "out", real.SUITE), real.MODEL, asked, 0, "evals[0]")
    assert (runs.summary, runs.details) == (tables.summary, tables.details)
    assert [*runs.summary] == [*real.STEPS]


def _names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}
