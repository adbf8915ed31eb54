"""The settings of a HELM entry: what is refused, and how benchmarks are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.helm import HelmEvaluator, deployment
from eval_runner.evaluators.helm.settings import Entry, EntrySettings, benchmark_name, entry_settings, make_entries
from eval_runner.evaluators.written import digest


@pytest.fixture
def context(tmp_path: Path) -> Context:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "held out.jsonl").write_text("{}")
    return Context(tmp_path, tmp_path / "envs", "suites.quick.evaluators[0]", "autoeval.yaml")


def _entries(context: Context, *written: EntrySettings | str, max_priority: int | None = None) -> tuple[Entry, ...]:
    made = tuple(EntrySettings(w) if isinstance(w, str) else w for w in written)
    return make_entries(made, f"{context.where}.entries", max_priority, context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entries": ["boolq"], "max_instance": 5}, r"max_instance: unknown key; did you mean 'max_instances'"),
        ({"entries": ["boolq"], "max_instances": "5"}, "max_instances: expected a whole number, found '5'"),
        ({"entries": ["boolq"], "max_instances": 0}, "max_instances: must be 1 or more"),
        ({"entries": ["boolq"], "torch_dtype": "float31"}, "torch_dtype: 'float31' is not one of 'auto'"),
        ({"entries": [{"description": "boolq", "prio": 1}]}, r"entries\[0\]\.prio: unknown key"),
        ({"entries": "boolq"}, "entries: expected a list"),
        ({}, "give either `entries` or `entries_file`"),
        ({"entries": ["boolq"], "entries_file": "x.conf"}, "give either `entries` or `entries_file`"),
        ({"entries": ["boolq"], "metrics": {"boolq": "exact_match"}}, "metrics.boolq: expected a list"),
    ],
)
def test_settings_that_do_not_fit(context: Context, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        HelmEvaluator(settings, context)
    assert str(caught.value).startswith("autoeval.yaml: suites.quick.evaluators[0]")


def test_all_errors_at_once(context: Context) -> None:
    with pytest.raises(ConfigError) as caught:
        HelmEvaluator({"entries": ["boolq"], "maximum": 1, "schema": 2}, context)
    assert "maximum" in str(caught.value)
    assert "schema" in str(caught.value)


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("boolq", "boolq"),
        ("mmlu:subject=anatomy", "mmlu.anatomy"),
        ("dyck_language:num_parenthesis_pairs=2", "dyck_language.2"),
        ("autoeval_bpb:path=/some/where/x.jsonl,name=python", "autoeval_bpb.python"),
        ("custom_mcqa:path=/some/where/held out.jsonl,method=joint", "custom_mcqa.held_out.joint"),
        ("x:a=b/c d=é", "x.b_c_d"),
    ],
)
def test_benchmark_names(description: str, name: str) -> None:
    assert benchmark_name(description) == name


def test_two_entries_never_share_a_benchmark(context: Context) -> None:
    with pytest.raises(ConfigError, match=r"entries\[1\]: has the benchmark name 'x\.1' of .*entries\[0\]; write"):
        _entries(context, "x:a=1", "x:b=1")
    first, second = _entries(context, "x:a=1", EntrySettings("x:b=1", name="x by b"))
    assert (first.benchmark, second.benchmark) == ("x.1", "x_by_b")


def test_the_model_is_ours_and_paths_start_at_the_configuration(context: Context) -> None:
    (entry,) = _entries(context, "custom_mcqa:path=data/held out.jsonl,model=<model>,method=joint")
    path = context.base_dir / "data" / "held out.jsonl"
    assert entry.description == f"custom_mcqa:path={path},method=joint"
    assert entry.files == (path,)
    assert _entries(context, "mmlu:model=<model>")[0].description == "mmlu"


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("custom_mcqa:path=data/none.jsonl", r"entries\[0\]: .*none\.jsonl does not exist"),
        ("mmlu:subject", "expected key=value, found 'subject'"),
        ("mmlu:model_deployment=openai/gpt", "model_deployment is not for an entry to choose"),
        ("two words", "does not start with the name of a run spec"),
    ],
)
def test_entries_that_do_not_fit(context: Context, description: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _entries(context, description)


def test_priorities(context: Context) -> None:
    kept = _entries(context, EntrySettings("a", 1), EntrySettings("b", 3), EntrySettings("c"), max_priority=2)
    assert [e.benchmark for e in kept] == ["a", "c"]
    assert [e.where[-10:] for e in kept] == ["entries[0]", "entries[2]"]
    with pytest.raises(ConfigError, match="no entry is left"):
        _entries(context, EntrySettings("b", 3), max_priority=2)


def test_entries_of_a_file(context: Context) -> None:
    lines = {"entries": [{"description": "mmlu:model=<model>", "priority": 1, "groups": ["a"]}]}
    assert entry_settings(lines, "runs.conf", context) == (EntrySettings("mmlu:model=<model>", 1),)
    with pytest.raises(ConfigError, match=r"runs\.conf: entries\[0\]\.prioritty: unknown key; did you mean 'priority'"):
        entry_settings({"entries": [{"description": "a", "prioritty": 1}]}, "runs.conf", context)
    with pytest.raises(ConfigError, match="has no list `entries`"):
        entry_settings({"runs": []}, "runs.conf", context)


def test_digests_change_with_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("one")
    before = digest(tmp_path / "d")
    assert before == digest(tmp_path / "d")
    (tmp_path / "d" / "a.txt").write_text("two")
    changed = digest(tmp_path / "d")
    (tmp_path / "d" / "a.txt").rename(tmp_path / "d" / "b.txt")
    assert len({before, changed, digest(tmp_path / "d")}) == 3


def test_the_digest_of_a_plugin_does_not_change_by_importing_it(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    before = digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "__init__.pyc").write_text("x")
    assert digest(tmp_path) == before


def test_a_model_name_that_helm_would_read_otherwise_is_refused() -> None:
    assert deployment.model_name("step-100-0a1b") == "autoeval/step-100-0a1b"
    with pytest.raises(ConfigError, match="job name"):
        deployment.model_name("run/step,100")


@pytest.mark.parametrize(("env", "says"), [("/nowhere", "does not start"), (None, "is not built")])
def test_a_missing_environment_names_the_key_and_the_remedy(tmp_path: Path, env: str | None, says: str) -> None:
    context = Context(tmp_path, tmp_path / "envs", "suites.quick.evaluators[0]", "autoeval.yaml")
    evaluator = HelmEvaluator({"entries": ["mmlu:subject=anatomy"], "env": env}, context)
    remedy = "run `autoeval-runner env create helm`"
    with pytest.raises(ConfigError, match=rf"^autoeval.yaml: suites.quick.evaluators\[0\].env: .*{says}.*{remedy}"):
        evaluator.check()
