"""HELM's output becomes results: a real one that was recorded, and made-up ones with what can be wrong with them."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from autoeval_hooks.errors import ConfigError
from eval_runner import environments
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.results.importing import base, helm, helm_metrics
from tests.helm_trees import RIGHT, helm_run

RECORDED = Path(__file__).parents[1] / "recorded" / "helm_runs"
Import = Callable[..., Result]


@pytest.fixture
def bring(tmp_path: Path) -> Import:
    """`autoeval-runner import helm …` into the queue `tmp_path`/queue."""
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")

    def run(directory: Path, *options: str, program: str = "helm") -> Result:
        return CliRunner().invoke(cli, ["import", program, str(directory), "--config", str(config), *options])

    return run


def results(tmp_path: Path) -> dict[int, store.Result]:
    found, problems = store.imported(tmp_path / "queue")
    assert problems == []
    return {r.step: r for r in found}


def lines(shown: Result) -> list[list[str]]:
    return [line.split("\t") for line in shown.stdout.splitlines()]


def table(tmp_path: Path) -> list[dict[str, str]]:
    shown = CliRunner().invoke(
        cli, ["report", "--config", str(tmp_path / "autoeval.yaml"), "--out", str(tmp_path / "report")]
    )
    assert shown.exit_code == 0, shown.output
    with (tmp_path / "report" / "scores.csv").open() as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- a real run of HELM


def test_a_real_output_gives_the_scores_that_its_instances_give(tmp_path: Path, bring: Import) -> None:
    shown = bring(RECORDED, "--tokens-per-step", "1000")
    assert shown.exit_code == 0, shown.output
    assert [(state, run, suite, step, n) for state, _, run, suite, step, n, _ in lines(shown)] == [
        ("imported", "demo-tiny", "helm", "10", "4"), ("imported", "demo-tiny", "helm", "20", "4"),
    ]  # fmt: skip
    at_20 = results(tmp_path)[20]
    assert (at_20.tokens, at_20.checkpoint, at_20.timed) == (20_000, "demo-tiny/20", False)
    by_name = {s.benchmark: s for s in at_20.scores}
    assert {name: (s.metric, s.split, s.higher_is_better) for name, s in by_name.items()} == {
        "autoeval_bpb.web": ("bits_per_byte", "test", False),
        "custom_mcqa.questions.multiple_choice_separate_original": ("exact_match", "test", True),
        "dyck_language.2": ("exact_match_indicator", "test", True),
        "synthetic_reasoning.pattern_match": ("quasi_exact_match", "test", True),
    }
    values = _by_hand("custom_mcqa", 20, "exact_match")
    score = by_name["custom_mcqa.questions.multiple_choice_separate_original"]
    assert score.value == pytest.approx(statistics.mean(values))
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    nats, size = _by_hand("autoeval_bpb", 20, "logprob"), _by_hand("autoeval_bpb", 20, "num_bytes")
    assert by_name["autoeval_bpb.web"].value == pytest.approx(-sum(nats) / math.log(2) / sum(size))
    kept = list(store.instances(store.path_of(tmp_path / "queue", at_20)))
    (run,) = (RECORDED / "runs" / "demo-tiny").glob("custom_mcqa*_20")
    ids = {row["instance_id"] for row in json.loads((run / "per_instance_stats.json").read_text())}
    assert {i.id for i in kept if i.benchmark == score.benchmark} == ids
    assert len(ids) == score.n == 6


def _by_hand(benchmark: str, step: int, metric: str) -> list[float]:
    (run,) = (RECORDED / "runs" / "demo-tiny").glob(f"{benchmark}*_{step}")
    rows = json.loads((run / "per_instance_stats.json").read_text())
    return [s["sum"] / s["count"] for row in rows for s in row["stats"] if s["name"]["name"] == metric]


def test_two_checkpoints_of_a_real_output_are_compared_by_their_instances(tmp_path: Path, bring: Import) -> None:
    bring(RECORDED)
    scores = table(tmp_path)
    assert len(scores) == 8
    assert {row["suite"] for row in scores} == {"helm"}
    page = (tmp_path / "report" / "index.html").read_text()
    assert "no per-instance values to pair" not in page
    assert "Save to scores" not in page     # nobody knows when the checkpoints were saved
    assert "Checkpoints evaluated" in page


# ---------------------------------------------------------------------- what is asked is what is compared


def test_a_checkpoint_that_lacks_a_benchmark_stands_in_the_series_of_the_others(tmp_path: Path, bring: Import) -> None:
    for step in (10, 20, 30):
        helm_run(tmp_path / "out", f"m/{step}")
        if step != 30:
            helm_run(tmp_path / "out", f"m/{step}", "gsm:", metric="exact_match_indicator")
    assert bring(tmp_path / "out").exit_code == 0
    assert [(row["suite"], row["benchmark"], row["step"]) for row in table(tmp_path)] == [
        ("v1", "gsm", "10"), ("v1", "gsm", "20"),
        ("v1", "mmlu.anatomy", "10"), ("v1", "mmlu.anatomy", "20"), ("v1", "mmlu.anatomy", "30"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "options"), [({"shots": 0}, ()), ({}, ("--version", "0.5.16"))], ids=["shots", "version of HELM"]
)
def test_what_was_asked_in_another_way_shares_no_series(
    tmp_path: Path, bring: Import, spec: dict[str, Any], options: tuple[str, ...]
) -> None:
    helm_run(tmp_path / "a", "m/10")
    helm_run(tmp_path / "a", "m/20")
    helm_run(tmp_path / "b", "m/30", **spec)
    helm_run(tmp_path / "b", "m/40", **spec)
    for directory, given in (("a", ()), ("b", options)):
        assert bring(tmp_path / directory, *given).exit_code == 0
    suites = {row["step"]: row["suite"] for row in table(tmp_path)}
    assert suites["10"] == suites["20"] != suites["30"] == suites["40"]


@pytest.mark.parametrize(
    ("name", "groups", "path", "ours"),
    [
        ("mmlu:subject=anatomy,method=joint,model=x_1", ["mmlu"], None, "mmlu.anatomy.joint"),
        ("boolq:model=x,data_augmentation=canonical", ["boolq"], None, "boolq.canonical"),
        ("dyck_language_np=3:model=x", ["dyck_language"], None, "dyck_language.3"),
        ("custom_mcqa,path=_data_q.jsonl,method=joint:model=x", ["custom"], "/data/q.jsonl", "custom_mcqa.q.joint"),
        ("autoeval_bpb:name=web,model=x,groups=autoeval_3", ["autoeval_bpb"], "/d/w.jsonl", "autoeval_bpb.web"),
        ("imdb", [], None, "imdb"),
    ],
)
def test_names_of_benchmarks(name: str, groups: list[str], path: str | None, ours: str) -> None:
    assert helm.benchmark_name(name, groups, path) == ours


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama/1000", ("llama", 1000)), ("llama_1000", ("llama", 1000)), ("mymodel/p-m/0", ("mymodel/p-m", 0)),
        ("a_1/20", ("a_1", 20)), ("x/iter_0000100", ("x", 100)), ("x/checkpoint-7", ("x", 7)), ("gpt2", ("gpt2", None)),
        ("a/1_000", ("a/1", 0)), ("llama/\u0661", ("llama/\u0661", None)), ("/5", ("/5", None)), ("", ("", None)),
    ],
)  # fmt: skip
def test_a_models_name_tells_its_step(name: str, found: tuple[str, int | None]) -> None:
    assert base.model_and_step(name) == found


def test_the_older_watchers_names_are_those_of_its_runs(tmp_path: Path, bring: Import) -> None:
    helm_run(tmp_path, "mymodel/proj-llama/1000", suite="proj-llama")
    ((_, _, run, suite, step, *_),) = lines(bring(tmp_path))
    assert (run, suite, step) == ("proj-llama", "helm", "1000")     # a suite of its name would have no other's scores


@pytest.mark.parametrize("directory", ["", "runs", "runs/v1", "runs/v1/mmlu:subject=anatomy,model=m_10"])
def test_the_directory_may_be_the_output_a_suite_or_a_run(tmp_path: Path, bring: Import, directory: str) -> None:
    helm_run(tmp_path / "out", "m/10")
    ((state, _, run, suite, *_),) = lines(bring(tmp_path / "out" / directory))
    assert (state, run, suite) == ("imported", "m", "v1")


def test_run_step_and_suite_may_be_said(tmp_path: Path, bring: Import) -> None:
    helm_run(tmp_path / "a", "gpt2")
    refused = bring(tmp_path / "a")
    assert refused.exit_code == 1
    assert "gpt2: its name tells no step; say it by --step N" in refused.stdout
    ((state, _, run, suite, step, *_),) = lines(
        bring(tmp_path / "a", "--step", "7", "--run", "mine", "--suite", "old")
    )
    assert (state, run, suite, step) == ("imported", "mine", "old", "7")


def test_one_step_is_not_that_of_several_checkpoints(tmp_path: Path, bring: Import) -> None:
    helm_run(tmp_path / "a", "m/10")
    helm_run(tmp_path / "a", "other")
    shown = bring(tmp_path / "a", "--step", "7")
    assert "--step is for the results of one checkpoint, and there are 2: m at 10, other" in str(shown.exception)
    ((_, _, run, _, step, *_),) = lines(bring(tmp_path / "a", "--step", "7", "--model", "other"))
    assert (run, step) == ("other", "7")


# ---------------------------------------------------------------------- main metrics


def test_what_has_no_main_metric_is_named_and_the_others_come(tmp_path: Path, bring: Import) -> None:
    helm_run(tmp_path / "a", "m/10")
    helm_run(tmp_path / "a", "m/10", "mine:x=1", metric="special", groups=["mine"])
    shown = bring(tmp_path / "a")
    assert shown.exit_code == 1
    assert "no main metric is known of mine; choose one by --metric mine.1=METRIC" in shown.stderr
    assert [s.benchmark for s in results(tmp_path)[10].scores] == ["mmlu.anatomy"]
    (line,) = lines(bring(tmp_path / "a", "--metric", "mine=special"))
    assert (line[0], line[-1]) == ("imported", f"replaces {lines(shown)[0][1]}")
    assert [(s.benchmark, s.metric, s.higher_is_better) for s in results(tmp_path)[10].scores] == [
        ("mine.1", "special", None), ("mmlu.anatomy", "exact_match", True),
    ]  # fmt: skip


def test_the_trees_own_schema_is_asked_first(tmp_path: Path, bring: Import) -> None:
    run = helm_run(tmp_path / "a", "m/10", "mmlu:subject=x", metric="loss", split="valid")
    group = {"name": "mmlu", "environment": {"main_name": "loss", "main_split": "valid"}}
    metric = {"name": "loss", "lower_is_better": True}
    schema = run.parent / "schema.json"
    schema.write_text(json.dumps({"run_groups": [group, {"name": "other"}], "metrics": [metric]}))
    assert bring(tmp_path / "a").exit_code == 0
    (score,) = results(tmp_path)[10].scores
    assert (score.metric, score.split, score.higher_is_better) == ("loss", "valid", False)
    schema.write_text('{"run_groups": [1]}')
    shown = bring(tmp_path / "a")
    assert shown.exit_code == 1
    assert f"{schema}: not a schema of HELM" in shown.stdout


# ---------------------------------------------------------------------- what can be wrong with a tree

SPEC, STATS, VALUES = "run_spec.json", "stats.json", "per_instance_stats.json"


def _loop(run: Path) -> None:
    (run / STATS).unlink()
    (run / STATS).symlink_to(run / STATS)


def _pipe(run: Path) -> None:
    (run / VALUES).unlink()
    os.mkfifo(run / VALUES)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda run: (run / STATS).write_text('[{"name": {"na'), "HELM left no readable results"),
    "torn spec": (lambda run: (run / SPEC).write_text("{"), "not valid JSON"),
    "a spec of another kind": (lambda run: (run / SPEC).write_text("[1]"), "not the specification of a run"),
    "no text for a model": (
        lambda run: (run / SPEC).write_text('{"name": "a", "adapter_spec": {"model": 7}}'), "not the specification"
    ),
    "no values": (lambda run: (run / VALUES).unlink(), "cannot be read (No such file"),
    "a directory": (lambda run: ((run / VALUES).unlink(), (run / VALUES).mkdir()), "is no file"),
    "a pipe": (_pipe, "is no file"),
    "a loop of links": (_loop, "cannot be read (Too many levels"),
    "rows of another kind": (lambda run: (run / STATS).write_text("[1, 2]"), "not HELM's results (TypeError"),
    "nested": (lambda run: (run / STATS).write_text("[" * 100_000), "not HELM's results (RecursionError"),
    "not a number": (
        lambda run: (run / STATS).write_text((run / STATS).read_text().replace('"mean": 0.6', '"mean": NaN')),
        "exact_match is nan",
    ),
    "infinitely many": (
        lambda run: (run / STATS).write_text((run / STATS).read_text().replace('"mean": 5', '"mean": Infinity')),
        "not HELM's results (OverflowError",
    ),
    "no spec": (lambda run: (run / SPEC).unlink(), "has no run_spec.json"),
    "a stranger to JSON": (lambda run: (run / SPEC).write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_run_that_cannot_be_read_is_named_and_the_others_come(tmp_path: Path, bring: Import, what: str) -> None:
    broken = helm_run(tmp_path / "out", "m/10")
    helm_run(tmp_path / "out", "m/10", "gsm:", metric="exact_match_indicator")
    helm_run(tmp_path / "out", "m/20")
    breaks, told = BROKEN[what]
    breaks(broken)
    shown = bring(tmp_path / "out")
    assert shown.exit_code == 1
    assert told in shown.stderr
    assert "mmlu:subject=anatomy,model=m_10" in shown.stderr
    assert {step: [s.benchmark for s in r.scores] for step, r in results(tmp_path).items()} == {
        10: ["gsm"], 20: ["mmlu.anatomy"],
    }  # fmt: skip


def test_a_checkpoint_of_which_nothing_can_be_read_leaves_nothing(tmp_path: Path, bring: Import) -> None:
    (helm_run(tmp_path / "out", "m/10") / STATS).write_text("")
    helm_run(tmp_path / "out", "m/20")
    shown = bring(tmp_path / "out")
    assert [line[0] for line in lines(shown)] == ["refused", "imported"]
    assert [r.name[:12] for r in (tmp_path / "queue" / "imported").iterdir()] == [lines(shown)[1][1]]
    assert list((tmp_path / "queue" / "tmp").iterdir()) == []


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, bring: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 1200)
    helm_run(tmp_path / "out", "m/10", values=RIGHT * 20)
    helm_run(tmp_path / "out", "m/20")
    shown = bring(tmp_path / "out")
    assert "the limit is 1200" in shown.stdout
    assert list(results(tmp_path)) == [20]


def test_links_to_directories_are_not_entered(tmp_path: Path, bring: Import) -> None:
    run = helm_run(tmp_path / "out", "m/10")
    (run.parent / "again").symlink_to(run.parent)
    (tmp_path / "out" / "runs" / "latest").symlink_to(run.parent)
    assert len(lines(bring(tmp_path / "out"))) == 1


def test_two_runs_of_one_name_are_not_mixed(tmp_path: Path, bring: Import) -> None:
    one = helm_run(tmp_path / "out", "m/10", "mmlu:subject=x,groups=autoeval_0")
    two = helm_run(tmp_path / "out", "m/10", "mmlu:subject=x,groups=autoeval_1", values=[0.0, 0.0])
    shown = bring(tmp_path / "out")
    assert shown.exit_code == 1
    assert f"{two}: another run beside it has the benchmark name mmlu.x, too" in shown.stderr
    assert results(tmp_path)[10].scores[0].value == 0.6
    assert one.exists()


def test_names_that_a_terminal_would_obey_are_refused_or_shown(tmp_path: Path, bring: Import) -> None:
    run = helm_run(tmp_path / "out", "m/10")
    (run / SPEC).write_text((run / SPEC).read_text().replace('"m/10"', '"\\u001b[31mm/10"'))
    shown = bring(tmp_path / "out")
    assert shown.exit_code == 1
    assert "is none that people can read" in shown.stdout
    assert "\x1b" not in shown.output


def test_an_empty_directory_is_a_mistake(tmp_path: Path, bring: Import) -> None:
    (tmp_path / "out").mkdir()
    assert "holds no such results" in str(bring(tmp_path / "out").exception)
    assert bring(tmp_path / "nowhere").exit_code == 2
    assert bring(tmp_path / "out", "--metric", "mmlu").exit_code == 2
    assert bring(tmp_path / "out", "--suite", "a/b").exit_code == 2


def test_main_metrics_of_helm_are_given_once() -> None:
    groups = [group for members in helm_metrics.MAIN.values() for group in members]
    assert len(groups) == len(set(groups))


@pytest.mark.helm
def test_the_table_of_main_metrics_is_that_of_helm() -> None:
    given = os.environ.get("AUTOEVAL_TEST_HELM_ENV")
    try:
        python = environments.find(given, "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    (schema,) = python.parents[1].glob("lib/python3*/site-packages/helm/benchmark/static/schema_classic.yaml")
    told = yaml.safe_load(schema.read_text())
    places = {g["name"]: g.get("environment") or {} for g in told["run_groups"]}
    main = {name: (e.get("main_name"), e.get("main_split")) for name, e in places.items()}
    ours = {group: key for key, groups in helm_metrics.MAIN.items() for group in groups}
    assert {group: key for group, key in ours.items() if group not in ("custom", "autoeval_bpb")} == {
        group: main[group] for group in ours if group not in ("custom", "autoeval_bpb")
    }
    lower = {m["name"] for m in told["metrics"] if m.get("lower_is_better")}
    assert {metric for metric, _ in helm_metrics.MAIN} & lower == helm_metrics.LOWER
