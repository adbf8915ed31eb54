"""The recorder's configuration: the older one's three documented kinds, ours, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.recorder import settings as recorder
from eval_runner.recorder.metrics import CORE_METRICS
from eval_runner.recorder.settings import AutoevalSource, Benchmark, Eval, FileSource, HelmSource, Settings

HELM = """
project: demo
base_url: http://127.0.0.1:1
evals:
  - eval_type: helm
    model_name: mymodel
    source: helm
    helm_output_dir: out
    helm_suite_name: demo-mymodel
    token_per_iteration: 0.004
    benchmarks:
      - name: mmlu
        metrics:
          - EM
      - name: narrative_qa
        metrics: [F1, ROUGE-L]
"""
FILE = """
project: demo
base_url: http://127.0.0.1:1
evals:
  - eval_type: helm
    model_name: llama-7b
    source: file
    token_num: 1000
    default_iteration: 7
    eval_result:
      mmlu:
        EM: 0.345
      msmarco_trec:
        NDCG@10: 1
"""
BOARD = """
project: demo
base_url: http://127.0.0.1:1
leaderboard: True
leaderboard_metrics:
  - mmlu.EM
  - quac.F1
excluded_models: [a]
excluded_runs: [b]
"""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)


def read(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "recorder.yaml"
    file.write_text(text)
    return recorder.load(file)


def test_helm_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = read(tmp_path, HELM)
    assert (found.project, found.base_url, found.entity) == ("demo", "http://127.0.0.1:1", "")
    asked = (Benchmark("mmlu", ("EM",)), Benchmark("narrative_qa", ("F1", "ROUGE-L")))
    assert found.evals == (
        Eval("evals[0]", "mymodel", HelmSource(tmp_path / "out", "demo-mymodel"), asked, 0, None, 0.004),
    )
    assert asked[1].keys == ("narrative_qa.F1", "narrative_qa.ROUGE-L")


def test_values_in_the_file(tmp_path: Path) -> None:
    values = {"mmlu.EM": 0.345, "msmarco_trec.NDCG@10": 1.0}
    assert read(tmp_path, FILE).evals == (Eval("evals[0]", "llama-7b", FileSource(values), None, 7, 1000.0, None),)


def test_a_leaderboard(tmp_path: Path) -> None:
    found = read(tmp_path, BOARD)
    assert found.leaderboard
    assert found.evals == ()
    assert found.leaderboard_metrics == ("mmlu.EM", "quac.F1")
    assert found.excluded_models == ("a", "b")
    assert read(tmp_path, "project: p\nleaderboard: yes\n").leaderboard_metrics == CORE_METRICS


def test_our_own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "project: p\nevals: [{model_name: m, source: autoeval, results: autoeval.yaml, run: r, suite: s}]\n"
    assert read(tmp_path, text).evals[0].source == AutoevalSource(tmp_path / "autoeval.yaml", "r", "s")


def test_the_service_is_that_of_the_file_or_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:2/")
    assert read(tmp_path, HELM).base_url == "http://127.0.0.1:1"
    assert read(tmp_path, HELM.replace("base_url: http://127.0.0.1:1", "base_url:")).base_url == "http://127.0.0.1:2"


def test_all_errors_are_said_at_once(tmp_path: Path) -> None:
    text = """
project: team/demo
leaderboard_metrics: [mmlu]
evals:
  - {eval_type: helm, model_name: m, source: helm, helm_output_dir: out, token_per_iteration: -1}
  - {eval_type: helm, model_name: "", source: file}
  - {eval_type: helm, model_name: m, source: autoeval}
  - {eval_type: helm, model_name: m, helm_output_dir: o, helm_suite_name: s,
     benchmarks: [{name: mmlu, metrics: [EM, EM]}, {name: "", metrics: []}]}
"""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    said = str(caught.value)
    for part in (
        "project: 'team/demo' is no project's name; write what stands before the '/' as `entity`",
        "leaderboard_metrics[0]: 'mmlu' is not benchmark.METRIC, such as mmlu.EM",
        "evals[0].helm_suite_name: missing; `source: helm` needs it",
        "evals[0].token_per_iteration: must be 0 or more",
        "evals[1].model_name: is empty; name the model, its W&B runs are named after it",
        "evals[1].eval_result: missing; `source: file` needs it",
        "evals[2].results: missing; `source: autoeval` needs it",
        "evals[3].benchmarks[1].name: is empty",
        "evals[3].benchmarks[1].metrics: is empty",
        "evals[3].benchmarks: mmlu.EM is asked for twice; remove one",
    ):
        assert part in said
    assert str(tmp_path / "recorder.yaml") in said


def test_the_documentations_dots_are_named_where_they_stand(tmp_path: Path) -> None:
    text = HELM.replace("      - name: narrative_qa\n", "      - ...\n      - name: narrative_qa\n")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text + "leaderboard_metrics:\n  - mmlu.EM\n  - ...\n")
    for where in ("evals[0].benchmarks[1]", "leaderboard_metrics[1]"):
        assert f"{where}: '...' stands for more in the documentation; remove the line" in str(caught.value)
    assert "is not benchmark.METRIC" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "recorders"),
    [
        ({"project": 1}, True), ({"evals": 1}, True), ({"leaderboard": 1, "base_url": 1}, True),
        ({"suites": 1}, False), ({"suites": 1, "project": 1}, False), ({"queue": 1, "suites": 1}, False),
        ({"auto_eval": 1}, False), ({}, False),
    ],
)  # fmt: skip
def test_whose_file_it_is(raw: dict[str, int], recorders: bool) -> None:
    assert recorder.is_recorders(raw) is recorders


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_url: u\nevals: []\n", "project: missing"),
        ("project: p\n", "evals: missing; name what is to be recorded, or set `leaderboard: true`"),
        (HELM.replace("helm_suite_name", "helm_suit_name"), "unknown key; did you mean 'helm_suite_name'?"),
        (HELM.replace("eval_type: helm", "eval_type: gpt"), "evals[0].eval_type: 'gpt' is not one of 'helm'"),
        (HELM.replace("source: helm", "source: c"), "evals[0].source: 'c' is not one of 'helm', 'file', 'autoeval'"),
        (FILE.replace("EM: 0.345", "EM: none"), "evals[0].eval_result.mmlu.EM: expected a number, found 'none'"),
        (FILE.replace("EM: 0.345", "EM: .nan"), "line 12: '.nan' is no finite number"),
    ],
)
def test_a_misfit_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"recorder\.yaml") as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
