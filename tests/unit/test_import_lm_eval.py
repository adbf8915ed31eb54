"""What lm_eval wrote becomes results: its recorded output, and what can be wrong with such a tree."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.results.importing import lm_eval

RECORDED = Path(__file__).parents[1] / "recorded" / "lm_eval"
Import = Callable[..., Result]


@pytest.fixture
def bring(tmp_path: Path) -> Import:
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")

    def run(directory: Path, *options: str) -> Result:
        return CliRunner().invoke(cli, ["import", "lm_eval", str(directory), "--config", str(config), *options])

    return run


def results(tmp_path: Path) -> list[store.Result]:
    found, problems = store.imported(tmp_path / "queue")
    assert problems == []
    return found


def another(directory: Path, change: Callable[[str], str] = lambda text: text, step: int = 200) -> Path:
    """The recorded output as that of another checkpoint, with what `change` makes of its text."""
    shutil.copytree(RECORDED, directory)
    for path in directory.rglob("results*.json"):
        path.write_text(change(path.read_text()).replace("checkpoint-100", f"checkpoint-{step}"))
    return directory


def test_a_real_output_gives_its_scores(tmp_path: Path, bring: Import) -> None:
    shown = bring(RECORDED)
    assert shown.exit_code == 0, shown.output
    assert sorted(line.split("\t")[0::2] for line in shown.stdout.splitlines()) == [
        ["imported", "base", "100", ""], ["imported", "base", "100", ""],
    ]  # fmt: skip
    told: dict[tuple[str, str], float] = {}
    for path in RECORDED.rglob("results*.json"):
        for task, row in json.loads(path.read_text())["results"].items():
            told |= {(task, key): value for key, value in row.items() if "," in key and "stderr" not in key}
    scores = {(s.benchmark, s.metric): s for r in results(tmp_path) for s in r.scores}
    assert scores["tiny_choice", "acc"].value == told["tiny_choice", "acc,none"]
    assert scores["tiny_gen", "exact_match.number"].value == told["tiny_gen", "exact_match,number"]
    assert scores["tiny_text", "bits_per_byte"].value == told["tiny_text", "bits_per_byte,none"]
    assert scores["tiny_text", "bits_per_byte"].higher_is_better is False
    at = {json.loads(path.read_text())["date"] for path in RECORDED.rglob("results*.json")}
    assert {r.finished_at for r in results(tmp_path)} == at
    assert {r.evaluations[0].versions["lm_eval"] for r in results(tmp_path)} == {"0.4.13"}
    assert [line.split("\t")[0] for line in bring(RECORDED).stdout.splitlines()] == ["known", "known"]


def test_two_checkpoints_are_compared_by_their_documents(tmp_path: Path, bring: Import) -> None:
    """The second is the first by another name: it cannot be better or worse."""
    bring(RECORDED)
    bring(another(tmp_path / "more"))
    config, out = str(tmp_path / "autoeval.yaml"), tmp_path / "report"
    assert CliRunner().invoke(cli, ["report", "--config", config, "--out", str(out)]).exit_code == 0
    with (out / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["run"], row["suite"]) for row in rows} == {("base", "lm_eval")}
    assert {row["step"] for row in rows} == {"100", "200"}
    choice = {r.step: r for r in results(tmp_path) if any(s.benchmark == "tiny_choice" for s in r.scores)}
    ids = [{i.id for i in store.instances(store.path_of(tmp_path / "queue", r)) if i.benchmark == "tiny_choice"}
           for r in choice.values()]  # fmt: skip
    assert ids[0] == ids[1] != set()


@pytest.mark.parametrize(
    "change",
    [('"num_fewshot": 0', '"num_fewshot": 3'), ('"lm_eval_version": "0.4.13"', '"lm_eval_version": "0.4.9"'),
     ('"limit": null', '"limit": 5.0')],
    ids=["shots", "version", "limit"],
)  # fmt: skip
def test_what_was_asked_in_another_way_shares_no_series(
    tmp_path: Path, bring: Import, change: tuple[str, str]
) -> None:
    bring(RECORDED / "group")
    changed = another(tmp_path / "more", lambda text: text.replace(*change))
    assert change[1] in "".join(p.read_text() for p in (changed / "group").rglob("results*.json"))
    assert bring(changed / "group").exit_code == 0
    assert len({r.suite_digest for r in results(tmp_path)}) == 2


@pytest.mark.parametrize(
    ("model", "revision", "found"),
    [
        ("/runs/llama/checkpoint-500", "", ("/runs/llama", "llama", 500)),
        ("/runs/llama/iter_0000100", "", ("/runs/llama", "llama", 100)),
        ("runs/llama/step-7", "", ("runs/llama", "llama", 7)), ("gpt2", "", ("gpt2", "gpt2", None)),
        ("org/model_20", "", ("org/model", "org/model", 20)), ("/models/m", "", ("/models/m", "m", None)),
        ("", "", ("", "", None)), ("/models/m", "step3", ("/models/m", "m", 3)),
        ("org/p", "step1000", ("org/p", "org/p", 1000)), ("org/p", "v2", ("org/p@v2", "org/p@v2", None)),
        ("/home/me@host/llama/checkpoint-5", "v2", ("/home/me@host/llama@v2", "llama@v2", 5)),
    ],
)  # fmt: skip
def test_a_models_path_and_revision_tell_run_and_step(
    model: str, revision: str, found: tuple[str, str, int | None]
) -> None:
    told = lm_eval.checkpoint(model, revision)
    assert (told.base, told.name, told.step) == found
    assert told.model == (f"{model}@{revision}" if revision else model)


def loading(directory: Path, **arguments: str) -> Path:
    """The recorded output of a call that loaded something else, named as lm_eval names it."""
    shutil.copytree(RECORDED / "group", directory)
    (path,) = directory.glob("results*.json")
    data = json.loads(path.read_text())
    data["config"]["model_args"] = arguments
    path.write_text(json.dumps(data | {"model_name": arguments["pretrained"]}))
    return directory


def test_revisions_and_adapters_are_checkpoints_of_their_own(tmp_path: Path, bring: Import) -> None:
    for step in (1000, 2000):
        loading(tmp_path / "a" / str(step), pretrained="EleutherAI/pythia-14m", revision=f"step{step}")
    for step in (10, 20):
        loading(tmp_path / "a" / str(step), pretrained="/m/base/iter_5", peft=f"/m/lora/checkpoint-{step}")
    loading(tmp_path / "a" / "delta", pretrained="/m/base/iter_5", delta="/m/delta/checkpoint-7")
    assert bring(tmp_path / "a").exit_code == 0
    assert sorted((r.run.name, r.step, r.checkpoint) for r in results(tmp_path)) == [
        ("EleutherAI_pythia-14m", 1000, "EleutherAI/pythia-14m@step1000"),
        ("EleutherAI_pythia-14m", 2000, "EleutherAI/pythia-14m@step2000"),
        ("delta", 7, "/m/delta/checkpoint-7"),
        ("lora", 10, "/m/lora/checkpoint-10"), ("lora", 20, "/m/lora/checkpoint-20"),
    ]  # fmt: skip


def test_a_step_is_not_that_of_several_revisions(tmp_path: Path, bring: Import) -> None:
    for revision in ("v1", "v2"):
        loading(tmp_path / "a" / revision, pretrained="org/p", revision=revision)
    assert "there are 2: org/p@v1, org/p@v2" in str(bring(tmp_path / "a", "--step", "7").exception)
    assert bring(tmp_path / "a", "--step", "7", "--model", "org/p@v2").exit_code == 0
    assert [(r.run.name, r.step) for r in results(tmp_path)] == [("org_p_v2", 7)]


def test_runs_of_one_name_are_not_one_run(tmp_path: Path, bring: Import) -> None:
    for experiment, step in (("exp1", 10), ("exp2", 20)):
        loading(tmp_path / "a" / experiment, pretrained=f"/{experiment}/out/checkpoint-{step}")
    told = str(bring(tmp_path / "a").exception)
    assert "the run out would be of several models, 2: /exp1/out, /exp2/out" in told
    assert "--run is for the results of one model" in str(bring(tmp_path / "a", "--run", "x").exception)
    assert results(tmp_path) == []
    for experiment in ("exp1", "exp2"):
        assert bring(tmp_path / "a", "--model", f"/{experiment}/out", "--run", experiment).exit_code == 0
    assert [(r.run.name, r.step) for r in sorted(results(tmp_path), key=lambda r: r.step)] == [
        ("exp1", 10), ("exp2", 20),
    ]  # fmt: skip


def test_metrics_may_be_chosen(tmp_path: Path, bring: Import) -> None:
    assert bring(RECORDED, "--metric", "tiny_choice=acc", "--metric", "tiny_text=bits_per_byte").exit_code == 0
    keys = {(s.benchmark, s.metric) for r in results(tmp_path) for s in r.scores}
    assert {key for key in keys if key[0] in ("tiny_choice", "tiny_text")} == {
        ("tiny_choice", "acc"), ("tiny_text", "bits_per_byte"),
    }  # fmt: skip


def _edit(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "torn": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "empty": (lambda text: "", "not valid JSON"),
    "a list": (lambda text: "[]", "it has no `results`"),
    "results of another kind": (_edit(results={"a": 3}), "no results file of lm_eval"),
    "nothing in it": (_edit(results={}), "has no score"),
    "nested": (lambda text: "[" * 100_000, "not valid JSON"),
    "a group in itself": (_edit(group_subtasks={"tiny": ["tiny"]}), "no results file of lm_eval"),
    "a configuration of another kind": (_edit(config=[1]), "no results file of lm_eval"),
    "digests of another kind": (_edit(task_hashes=[1]), "no results file of lm_eval (AttributeError"),
    "no model": (_edit(config={}, model_name=None), "its name tells no step"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_read_is_named_and_the_others_come(tmp_path: Path, bring: Import, what: str) -> None:
    change, told = BROKEN[what]
    tree = another(tmp_path / "tree")
    (broken,) = (tree / "group").glob("results*.json")
    broken.write_text(change(broken.read_text()))
    shown = bring(tree)
    assert shown.exit_code == 1
    assert told in shown.output
    assert broken.name in shown.output
    assert [next(s.benchmark for s in r.scores) for r in results(tmp_path)] == ["tiny_text"]


def test_broken_samples_are_named(tmp_path: Path, bring: Import) -> None:
    tree = another(tmp_path / "tree")
    (samples,) = (tree / "group").glob("samples_tiny_choice*")
    samples.write_text('{"doc_id"')
    shown = bring(tree)
    assert shown.exit_code == 1
    assert samples.name in shown.stdout
