"""Results of another queue are taken over as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoeval_hooks.run_identity import RunIdentity
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.results.importing.publish import source_of
from eval_runner.results.schema import Detail, Failure
from tests.helm_trees import helm_run
from tests.results_samples import instances_of, publish, queue, result, score

WANDB = RunIdentity("r", "theirs", "p", "e", "w1", wandb_base_url="http://127.0.0.1:9", wandb_mode="online")
Import = Callable[..., Result]


@pytest.fixture
def bring(tmp_path: Path) -> Import:
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")
    return lambda *words: CliRunner().invoke(cli, ["import", *map(str, words), "--config", str(config)])


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Another queue: three results, a failure, and what a runner left that lost its lease."""
    root = queue(tmp_path / "theirs")
    for step in (10, 20, 30):
        s = score(0.5, 0.5, n=2)
        r = replace(result(step, s, runner="r-7", generation=2), run=WANDB)
        explained = Detail("mcqa", "id0", "", "won", (("Question", "Why?"),))
        publish(root, r, instances_of(s, [0.0, 1.0]), details=[explained])
        store.write(root, f"{r.ticket}~g1~lost", replace(r, generation=1, runner="lost"), [])
    publish(root, result(40, failure=Failure("transient", "no")), state="failed")
    return root


def states(shown: Result) -> list[str]:
    return [line.split("\t")[0] for line in shown.stdout.splitlines()]


@pytest.mark.parametrize("whole", [True, False], ids=["a queue", "a copy of its results"])
def test_the_results_that_count_come_as_they_are(tmp_path: Path, bring: Import, theirs: Path, whole: bool) -> None:
    if not whole:
        shutil.copytree(theirs / "results", tmp_path / "copied" / "results")
    shown = bring("autoeval", theirs if whole else tmp_path / "copied")
    assert shown.exit_code == 0, shown.output
    assert states(shown) == ["imported"] * 3
    root, there = tmp_path / "queue", {r.ticket: r for r in store.done(theirs)[0]}
    brought, problems = store.imported(root)
    assert problems == []
    assert len(brought) == 3
    for r in brought:
        was = there[r.ticket]
        own = replace(r, generation=was.generation, runner=was.runner, evaluations=was.evaluations)
        assert own == was
        assert r.timed
        assert r.evaluations[0].versions == {"evaluated by": "r-7, generation 2"}
        assert [i.value for i in store.instances(store.path_of(root, r))] == [0.0, 1.0]
        assert [d.texts for d in store.details(store.path_of(root, r))] == [(("Question", "Why?"),)]
        assert source_of(store.path_of(root, r)).kind == "autoeval"
    assert states(bring("autoeval", theirs)) == ["known"] * 3


def test_what_this_queue_evaluated_itself_is_left_out(tmp_path: Path, bring: Import, theirs: Path) -> None:
    mine = queue(tmp_path / "queue")
    publish(mine, result(20, score(0.7)))
    shown = bring("autoeval", theirs)
    assert sorted(states(shown)) == ["imported", "imported", "known"]
    assert "this queue evaluated it itself" in shown.stdout
    assert {r.step: r.scores[0].value for r in store.collect(mine).results} == {10: 0.5, 20: 0.7, 30: 0.5}


def test_nothing_of_it_is_published(tmp_path: Path, bring: Import, theirs: Path) -> None:
    bring("autoeval", theirs)
    assert store.done(tmp_path / "queue") == ([], [])
    assert not (tmp_path / "queue" / "relay").exists()


def test_what_that_queue_had_imported_keeps_its_source(tmp_path: Path, bring: Import) -> None:
    helm_run(tmp_path / "out", "m/10")
    bring("helm", tmp_path / "out")
    (first,), _ = store.imported(tmp_path / "queue")
    (tmp_path / "queue").rename(tmp_path / "old")
    assert states(bring("autoeval", tmp_path / "old")) == ["imported"]
    assert store.imported(tmp_path / "queue")[0] == [first]
    assert source_of(store.path_of(tmp_path / "queue", first)).directory == str(tmp_path / "out")
    assert states(bring("helm", tmp_path / "out")) == ["known"]


def test_a_suite_may_be_chosen(tmp_path: Path, bring: Import, theirs: Path) -> None:
    assert "holds no such results" in str(bring("autoeval", theirs, "--suite", "other").exception)


def test_what_cannot_be_read_is_named_and_the_others_come(tmp_path: Path, bring: Import, theirs: Path) -> None:
    shutil.copytree(theirs / "results", tmp_path / "copied")
    first, second, third = sorted(p for p in (tmp_path / "copied").iterdir() if p.name.endswith("~r-7"))
    (first / store.RECORD).write_text('{"version": 9}')
    (second / store.INSTANCES).write_bytes(b"")
    for lost in (tmp_path / "copied").glob("*~lost"):
        shutil.rmtree(lost)
    shown = bring("autoeval", tmp_path / "copied")
    assert shown.exit_code == 1
    assert "was written by a newer autoeval" in shown.stderr
    assert sorted(states(shown)) == ["imported", "refused"]
    assert second.name in shown.stdout
    assert [r.ticket for r in store.imported(tmp_path / "queue")[0]] == [third.name.split("~")[0]]


def test_a_score_that_both_queues_imported_stands_once(tmp_path: Path, bring: Import) -> None:
    def of(values: list[float], *options: str) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        helm_run(tmp_path / "out", "m/10", values=values)
        return states(bring("helm", tmp_path / "out", *options))[0]

    def value() -> float:
        (found,) = store.collect(tmp_path / "queue").results
        return found.scores[0].value

    assert of([1.0, 1.0]) == "imported"
    shutil.copytree(tmp_path / "queue", tmp_path / "first")
    assert of([0.0, 0.0], "--replace") == "imported"
    shutil.copytree(tmp_path / "queue", tmp_path / "second")
    assert states(bring("autoeval", tmp_path / "first")) == ["known"]       # it was replaced here
    shutil.rmtree(tmp_path / "queue")
    assert of([1.0, 0.0]) == "imported"
    assert states(bring("autoeval", tmp_path / "first")) == ["refused"]
    assert value() == 0.5
    assert states(bring("autoeval", tmp_path / "first", "--replace")) == ["imported"]
    assert value() == 1.0
    assert states(bring("autoeval", tmp_path / "second")) == ["imported"]   # it names that as replaced
    assert value() == 0.0
