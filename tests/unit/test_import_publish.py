"""Imports stand once, whatever is imported when, and the rest of the queue leaves them alone."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Queue
from eval_runner import gc, status
from eval_runner.cli import cli
from eval_runner.results import store
from eval_runner.results.importing import helm
from eval_runner.results.importing.base import Found, Options
from eval_runner.results.importing.publish import SOURCE, Imports, alone, source_of
from eval_runner.results.schema import Instance, Score
from eval_runner.results.series import rows
from tests import results_samples
from tests.helm_trees import T0, helm_run


def found(step: int = 10, *, run: str = "m", model: str = "", shots: int = 5, **values: float) -> Found:
    """A checkpoint's scores by benchmark."""
    scores = tuple(Score(name, "em", "test", value, 1) for name, value in sorted(values.items()))
    values_of = [Instance(name, "em", "test", "a", value) for name, value in values.items()]
    return Found(
        "helm", model or f"{run}/{step}", run, step, "v1", scores, values_of,
        {name: {"shots": shots} for name in values},
        {"f": results_samples.digest(step, shots, sorted(values.items()))}, T0,
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return results_samples.queue(tmp_path / "queue")


@pytest.fixture
def take(root: Path) -> Callable[..., tuple[str, str]]:
    """Import it as a command of its own would; what became of it, and why."""

    def go(one: Found, **options: bool) -> tuple[str, str]:
        outcome = Imports(root, **options).take(one, Path("/from"), None)
        return outcome.state, outcome.why

    return go


Take = Callable[..., tuple[str, str]]


def standing(root: Path) -> list[tuple[int, dict[str, float]]]:
    imported, problems = store.imported(root)
    assert problems == []
    return sorted(((r.step, {s.benchmark: s.value for s in r.scores}) for r in imported), key=str)


# ---------------------------------------------------------------------- once


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=12))
def test_whatever_the_order_and_the_repeats_the_same_imports_stand(calls: list[tuple[int, int]]) -> None:
    """A tree that grows: at each step, ever more benchmarks are there. The fullest that was seen stands, once."""
    with tempfile.TemporaryDirectory() as directory:
        root = results_samples.queue(Path(directory))
        for step, size in calls:
            Imports(root).take(found(step, **{f"b{i}": i / 4 for i in range(size)}), Path("/from"), None)
        most = {step: max(size for s, size in calls if s == step) for step, _ in calls}
        assert standing(root) == [(step, {f"b{i}": i / 4 for i in range(n)}) for step, n in sorted(most.items())]
        again = [found(step, **{f"b{i}": i / 4 for i in range(size)}) for step, size in calls]
        assert {Imports(root).take(one, Path("/x"), None).state for one in again} <= {"known"}
        assert len({row.suite for row in rows(store.collect(root).results)}) <= 1


def test_a_tree_that_was_moved_is_the_same_import(tmp_path: Path) -> None:
    helm_run(tmp_path / "here", "m/10")
    root = results_samples.queue(tmp_path / "queue")

    def bring(directory: Path) -> list[str]:
        found_there = helm.find(directory, Options()).pending
        return [Imports(root).take(pending.read(), directory, None).state for pending in found_there]

    assert bring(tmp_path / "here") == ["imported"]
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert bring(tmp_path / "there") == ["known"]


def test_other_scores_stand_only_where_the_user_says_so(root: Path, take: Take) -> None:
    assert take(found(a=0.1)) == ("imported", "")
    (first,) = store.imported(root)[0]
    state, why = take(found(a=0.2))
    assert (state, why.startswith(f"{first.ticket[:12]} has other scores of a; with --replace")) == ("refused", True)
    assert standing(root) == [(10, {"a": 0.1})]
    assert take(found(a=0.2), replacing=True) == ("imported", f"replaces {first.ticket[:12]}")
    assert standing(root) == [(10, {"a": 0.2})]


@pytest.mark.parametrize("replacing", [True, False])
def test_what_was_replaced_does_not_come_again(root: Path, take: Take, replacing: bool) -> None:
    """A tree has both, and is imported again and again."""
    for value in (0.1, 0.2, 0.3):
        take(found(a=value), replacing=True)
    (last,) = store.imported(root)[0]
    for value in (0.1, 0.2):
        assert take(found(a=value), replacing=replacing) == ("known", f"{last.ticket[:12]} took its place")
    assert take(found(a=0.3), replacing=replacing) == ("known", "")
    assert standing(root) == [(10, {"a": 0.3})]


def test_a_record_that_another_wrote_removes_imports_only(root: Path) -> None:
    """What it says that it replaces is made a path of."""
    bystander = root / "results" / f"mine~g0~{store.IMPORTER}"
    bystander.mkdir()
    theirs = results_samples.result(10, Score("a", "em", "test", 0.1, 1))
    named = replace(theirs.evaluations[0], versions={store.REPLACES: "../results/mine"})
    hostile = replace(theirs, evaluations=(named,))
    assert Imports(root).copy(hostile, Path("/from"), {}, [], [], None).state == "imported"
    assert bystander.is_dir()


def test_the_same_scores_of_other_files_are_known_and_may_take_the_place(root: Path, take: Take) -> None:
    """Such as those that have got their samples since."""
    take(found(a=0.1))
    again = replace(found(a=0.1), files={"f": "another"})
    assert take(again)[0] == "known"
    assert take(again, replacing=True)[0] == "imported"
    assert standing(root) == [(10, {"a": 0.1})]


def test_two_models_are_not_one_step_of_a_run(root: Path, take: Take) -> None:
    take(found(run="out", model="/exp1/out/checkpoint-10", a=0.1))
    assert take(found(run="out", model="/exp2/out/checkpoint-10", a=0.1))[0] == "refused"   # the same scores, too
    state, why = take(found(run="out", model="/exp2/out/checkpoint-10", b=0.2), replacing=True)
    assert state == "refused"
    assert "/exp1/out/checkpoint-10 in " in why
    assert "this is /exp2/out/checkpoint-10; give this a run of its own by --run NAME" in why
    assert take(found(run="other", model="/exp2/out/checkpoint-10", b=0.2))[0] == "imported"
    alone_there = Imports(root / "nowhere", dry=True).take(
        found(run="out", model="/exp2/out/checkpoint-10", a=0.1), Path("/from"), None
    )
    assert alone_there.result is not None
    assert alone_there.result.checkpoint_digest not in {r.checkpoint_digest for r in store.imported(root)[0]}


def test_scores_that_would_stand_twice_are_refused(root: Path, take: Take) -> None:
    take(found(a=0.1, b=0.2))
    state, why = take(found(b=0.3, c=0.4), replacing=True)
    assert state == "refused"
    assert "has scores of b, too, and others that this has not (a)" in why
    assert standing(root) == [(10, {"a": 0.1, "b": 0.2})]
    assert take(found(c=0.4))[0] == "imported"      # beside them it may stand
    assert standing(root) == [(10, {"a": 0.1, "b": 0.2}), (10, {"c": 0.4})]


def test_a_result_of_our_own_of_the_same_ticket_comes_first(root: Path, take: Take) -> None:
    take(found(a=0.1))
    (imported,) = store.imported(root)[0]
    own = replace(imported, runner="r-1", evaluations=(replace(imported.evaluations[0], scores=(
        Score("a", "em", "test", 0.9, 1),)),))  # fmt: skip
    results_samples.publish(root, own)
    (result,) = store.collect(root).results
    assert result.scores[0].value == 0.9


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    dry = Imports(tmp_path / "queue", dry=True)
    assert [dry.take(found(a=0.1), tmp_path, None).state for _ in range(2)] == ["imported", "known"]
    assert dry.take(found(a=0.2, b=0.2), tmp_path, None).state == "refused"
    assert dry.take(found(a=0.1, b=0.2), tmp_path, None).why.startswith("replaces")
    assert not (tmp_path / "queue").exists()


# ---------------------------------------------------------------------- faults


class Full(FileOps):
    """A disk that is full after some bytes."""

    def __init__(self, left: int) -> None:
        self.left = left

    def write(self, fd: int, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return super().write(fd, data)


@pytest.mark.parametrize("left", [0, 500, 1000])
def test_an_import_that_is_cut_short_leaves_nothing(root: Path, left: int) -> None:
    with pytest.raises(OSError, match="No space"):
        Imports(root, ops=Full(left)).take(found(a=0.1), Path("/from"), None)
    assert standing(root) == []
    assert list((root / "tmp").iterdir()) == []
    assert Imports(root).take(found(a=0.1), Path("/from"), None).state == "imported"


@pytest.mark.parametrize("file", [store.RECORD, "all"])
def test_what_is_torn_is_named_and_importing_mends_it(root: Path, take: Take, file: str) -> None:
    take(found(a=0.1))
    (path,) = (root / store.IMPORTED).iterdir()
    if file == "all":
        for each in path.iterdir():
            each.unlink()
    else:
        (path / file).write_text('{"version": 1')
    (problem,) = store.collect(root).problems
    assert problem.startswith(f"import {path.name[:12]} does not count")
    assert take(found(a=0.1))[0] == "imported"
    assert standing(root) == [(10, {"a": 0.1})]


class Killed(BaseException):
    """The process is gone."""


class Fails(FileOps):
    """Whose `point`-th operation does not happen. After a `kill` there is none any more."""

    def __init__(self, point: int, error: type[BaseException]) -> None:
        self.left, self.error = point, error

    def __getattribute__(self, name: str) -> Any:
        if name in ("left", "error") or name.startswith("_"):
            return super().__getattribute__(name)
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.error is Killed):
            raise self.error()
        return super().__getattribute__(name)


@pytest.mark.parametrize("error", [Killed, OSError])
def test_wherever_a_replacing_import_ends_one_of_them_stands(tmp_path: Path, error: type[BaseException]) -> None:
    """At each operation of the file system: readers see the old scores or the new, and importing again ends it."""
    seen = set()
    for point in itertools.count(1):
        root = results_samples.queue(tmp_path / str(point))
        Imports(root).take(found(a=0.1), Path("/from"), None)
        try:
            Imports(root, replacing=True, ops=Fails(point, error)).take(found(a=0.2), Path("/from"), None)
        except error:
            ended = False
        else:
            ended = True
        (result,), problems = store.collect(root).results, store.collect(root).problems
        assert problems == (), point
        seen.add((result.scores[0].value, len(store.import_ids(root))))
        Imports(root, replacing=True).take(found(a=0.2), Path("/from"), None)
        assert standing(root) == [(10, {"a": 0.2})], point
        assert len(store.import_ids(root)) == 1, point
        if ended:
            break
    assert seen == {(0.1, 1), (0.2, 2), (0.2, 1)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(root: Path, take: Take, value: float) -> None:
    with pytest.raises(AutoEvalError, match="not numbers that can be kept"):
        take(found(a=value))
    assert standing(root) == []


# ---------------------------------------------------------------------- the rest of the queue


@pytest.fixture
def command(tmp_path: Path, root: Path) -> Callable[..., Result]:
    config = tmp_path / "autoeval.yaml"
    config.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")
    return lambda *words: CliRunner().invoke(cli, [*words, "--config", str(config)])


def test_imports_are_listed_and_taken_back(root: Path, take: Take, command: Callable[..., Result]) -> None:
    take(found(10, a=0.1))
    take(found(20, a=0.1))
    (path, torn) = sorted((root / store.IMPORTED).iterdir())
    (torn / store.RECORD).write_text("")
    (line,) = command("import", "list").stdout.splitlines()
    assert line.split("\t")[0] == path.name[:12]
    assert command("import", "remove", "0" * 12).exception is not None
    assert command("import", "remove", path.name[:12], torn.name[:12]).exit_code == 0
    assert list((root / store.IMPORTED).iterdir()) == list((root / "tmp").iterdir()) == []


def test_what_an_import_replaced_is_gone_before_that_is_taken_back(
    root: Path, take: Take, command: Callable[..., Result]
) -> None:
    """An import was killed before it removed what it replaces."""
    take(found(a=0.1))
    (old,) = (root / store.IMPORTED).iterdir()
    shutil.copytree(old, root / "kept")
    take(found(a=0.2), replacing=True)
    (root / "kept").rename(old)
    (new,) = store.imported(root)[0]
    assert command("import", "remove", new.ticket[:12]).exit_code == 0
    assert store.import_ids(root) == []


@pytest.mark.parametrize("words", [("helm", "out"), ("autoeval", "queue"), ("remove", "0123")], ids=lambda w: w[0])
def test_two_imports_do_not_run_at_once(
    tmp_path: Path, root: Path, command: Callable[..., Result], words: tuple[str, str]
) -> None:
    helm_run(tmp_path / "out", "m/10")
    what = words[1] if words[0] == "remove" else str(tmp_path / words[1])
    with alone(root) as locked:
        assert locked
        error = command("import", words[0], what).exception
    assert isinstance(error, AutoEvalError)
    assert "another import is at work" in str(error)
    assert error.kind == "transient"
    assert store.import_ids(root) == []
    assert "another import" not in str(command("import", words[0], what).exception)


def test_the_queues_other_commands_leave_imports_alone(
    root: Path, take: Take, command: Callable[..., Result]
) -> None:
    take(found(a=0.1))
    before = sorted(p.name for p in root.rglob("*"))
    assert gc.find(Queue(str(root)), {}, [], failed=True, orphans=True).free == []
    assert sum(status.read(root).counts.values()) == 0
    assert store.done(root) == ([], [])     # of which `sync` makes points
    assert command("gc").exit_code == command("status").exit_code == 0
    assert sorted(p.name for p in root.rglob("*")) == before


def test_where_it_comes_from_is_kept(root: Path, take: Take) -> None:
    take(found(a=0.1))
    (result,) = store.imported(root)[0]
    source = source_of(store.path_of(root, result))
    assert (source.kind, source.directory, list(source.files)) == ("helm", "/from", ["f"])
    assert result.evaluations[0].versions["imported from"] == "/from"
    assert json.loads(result.suite_text) == {"import": "helm", "benchmarks": {"a": {"shots": 5}}}
    (store.path_of(root, result) / SOURCE).write_text("{")
    assert source_of(store.path_of(root, result)).kind == "unknown"
