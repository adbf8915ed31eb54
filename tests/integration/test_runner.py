"""A ticket's whole path through a real queue and a real runner; only the evaluator is a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks import submit
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import AutoEvalError, CheckpointError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner.cli import cli
from eval_runner.evaluators.base import Job, Outcome
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Detail
from eval_runner.runner import REFILES, Runner
from tests.stand_ins import Shown, StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]


def states(tmp_path: Path) -> list[str]:
    return [t.state for t in Queue(str(tmp_path / "queue")).tokens()]


def test_from_save_to_result(tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run) -> None:
    for step in (100, 200):
        path = checkpoint(step, b"w" * step)
        submit(path, step=step, config=config_file)
        shutil.rmtree(path)         # retention
    sink, evaluator = Shown(), StandIn()
    run(evaluator, sink=sink)
    contents = store.collect(tmp_path / "queue")
    assert {(r.step, r.scores[0].value) for r in contents.results} == {(100, 100.0), (200, 200.0)}
    assert contents.problems == contents.failed == ()
    assert [r.step for r in sink.results] == [200, 100]             # the newest first
    assert len({job.name for job in evaluator.jobs}) == 2           # no cache can mistake one for the other
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []
    assert not any(job.work_dir.exists() for job in evaluator.jobs)
    first = next(iter(contents.results))
    assert [i.value for i in store.instances(store.path_of(tmp_path / "queue", first))] == [float(first.step)]
    run(StandIn(faults=[AssertionError("evaluated twice")]), sink=sink)
    assert len(sink.results) == 2


def test_what_people_may_want_to_read_is_kept(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    class Explained(StandIn):
        def evaluate(self, job: Job) -> Outcome:
            return replace(super().evaluate(job), details=iter([detail]))

    detail = Detail("length", "0", "bytes", "win", (("Question", "How long?"),))
    submit(checkpoint(100), step=100, config=config_file)
    run(Explained())
    (found,) = store.collect(tmp_path / "queue").results
    assert list(store.details(store.path_of(tmp_path / "queue", found))) == [detail]


def test_a_failed_evaluation_has_no_score_anywhere(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    sink = Shown()
    run(StandIn([CheckpointError("no")]), sink=sink)
    assert sink.results == []
    assert store.done(tmp_path / "queue") == ([], [])


@pytest.mark.parametrize(
    ("missing", "says"),
    [("tokenizer.json", "no tokenizer; pass `processing_class=tokenizer`"), ("config.json", "cannot be read")],
)
def test_a_checkpoint_that_lacks_something_says_so(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, missing: str, says: str
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    path = checkpoint(100, tokenizer=missing != "tokenizer.json")
    submit(path, step=100, config=config_file)
    (path / missing).unlink(missing_ok=True)
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert says in failed.failure.message


def test_pickled_weights_need_leave(tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run) -> None:
    path = checkpoint(100)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    submit(path, step=100, config=config_file)
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert "runner.allow_pickled_weights" in failed.failure.message
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 6.0, allow_pickled_weights: true"))
    CliRunner().invoke(cli, ["retry", "--config", str(config_file), "--all"], catch_exceptions=False)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_a_tokenizer_from_the_configuration(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text() + f"run: {{tokenizer: {tmp_path}/tokenizer}}\n")
    (tmp_path / "tokenizer").mkdir()
    submit(checkpoint(100, tokenizer=False), step=100, config=config_file)
    evaluator = StandIn()
    run(evaluator)
    assert evaluator.jobs[0].tokenizer == tmp_path / "tokenizer"


def test_a_changed_suite_is_a_new_result_and_a_changed_cadence_is_not(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    text = config_file.read_text()
    config_file.write_text(text.replace("entries: [a]", "entries: [b]"))
    evaluator, sink = StandIn(), Shown()
    run(evaluator, sink=sink)
    results, _ = store.done(tmp_path / "queue")
    by_status = {r.status: r for r in results}
    assert set(by_status) == {"ok", "refiled"}
    assert by_status["refiled"].refiled_as == by_status["ok"].ticket
    assert by_status["refiled"].suite_text == ""
    assert json.loads(by_status["ok"].suite_text)["evaluators"][0]["entries"] == ["b"]
    assert [r.status for r in sink.results] == ["ok"]
    assert len(evaluator.jobs) == 1
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []
    config_file.write_text(config_file.read_text().replace("quick: {", "quick: {every_steps: 50, priority: 9, "))
    assert submit(tmp_path / "out" / "checkpoint-100", step=100, config=config_file) == {"quick": False}


def test_a_suite_that_this_runner_does_not_know_is_left_for_another(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    text = config_file.read_text()
    config_file.write_text(text.replace("quick:", "other:"))
    run(StandIn([AssertionError("not ours")]))
    assert states(tmp_path) == ["pending"]
    config_file.write_text(text)
    run(StandIn())
    assert states(tmp_path) == ["done"]


def test_hostile_tickets_are_quarantined_and_the_rest_goes_on(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    pending = tmp_path / "queue" / "pending"
    for i, text in enumerate([b"torn", b'{"version":9}', b'{"version":1,"command":"rm -rf /"}']):
        (pending / f"0-{i}-{str(i) * 64}~g0f0").write_bytes(text)
    runner = run(StandIn())
    assert sorted(states(tmp_path)) == ["done", "quarantine", "quarantine", "quarantine"]
    assert runner.failed == 3
    status = CliRunner().invoke(cli, ["status", "--config", str(config_file)])
    assert "was written by a newer autoeval" in status.stdout
    assert "command: unknown key" in status.stdout


def test_paths_are_mapped_between_hosts(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    queue = Queue(str(tmp_path / "queue"))
    submit(checkpoint(100), step=100, config=config_file)
    (token,) = queue.tokens("pending")
    ticket = queue.read(token)
    here, there = str(tmp_path / "out"), "/train/out"       # the same ticket, as a host with another mount writes it
    moved = replace(ticket, pin=ticket.pin.replace(here, there),
                    manifest=replace(ticket.manifest, path=ticket.manifest.path.replace(here, there)))  # fmt: skip
    Path(queue.root, "pending", token.name).write_bytes(tickets.dump(moved))
    config_file.write_text(config_file.read_text() + f"path_map: {{/train: {tmp_path}}}\n")
    run(StandIn())
    assert states(tmp_path) == ["done"]
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []


@pytest.mark.parametrize("command", [["status"], ["retry", "--all"], ["close", "run"]])
def test_commands_without_a_queue_say_what_to_do(config_file: Path, command: list[str]) -> None:
    with pytest.raises(AutoEvalError, match="queue: not there yet"):
        CliRunner().invoke(cli, [*command, "--config", str(config_file)], catch_exceptions=False)


def test_a_suite_that_is_changed_back_is_evaluated_as_it_was(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    before = config_file.read_text()
    config_file.write_text(before.replace("entries: [a]", "entries: [b]"))
    refiled = StandIn(during=lambda job: pytest.fail("it is changed back before this is evaluated"))
    with Progress() as progress:
        runner = Runner(configs.load(str(config_file)), {"quick": [refiled]}, {}, progress)
        token = runner.queue.claim()
        assert token is not None
        runner._process(token, None)  # type: ignore[arg-type]  # only filed again, which needs no lease
    config_file.write_text(before)
    sink = Shown()
    run(StandIn(), sink=sink)
    results, _ = store.done(tmp_path / "queue")
    assert sorted(r.status for r in results) == ["ok", "refiled"]
    (shown,) = sink.results
    assert json.loads(shown.suite_text)["evaluators"][0]["entries"] == ["a"]
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []


def test_a_suite_that_is_changed_back_finds_the_pin_again_that_it_gave_up(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    """Both definitions were handed over, so each ticket has a pin of its own, and nothing but pins is left."""
    one = config_file.read_text()
    two = one.replace("entries: [a]", "entries: [b]")
    path = checkpoint(100)
    for text in (one, two):
        config_file.write_text(text)
        assert submit(path, step=100, config=config_file) == {"quick": True}
    shutil.rmtree(path)
    with Progress() as progress:
        runner = Runner(configs.load(str(config_file)), {"quick": [StandIn()]}, {}, progress)
        token = runner.queue.claim(newest_first=False)
        assert token is not None
        runner._process(token, None)  # type: ignore[arg-type]  # the first is filed as the second, which needs no lease
    assert sorted(states(tmp_path)) == ["done", "pending"]
    config_file.write_text(one)
    evaluator = StandIn()
    assert run(evaluator).failed == 0
    assert len(evaluator.jobs) == 1
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []


def test_a_pin_that_another_ticket_lives_on_outlives_its_own(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    """As after a crash in the middle of filing a ticket again."""
    path = checkpoint(100)
    submit(path, step=100, config=config_file)
    shutil.rmtree(path)
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    old = queue.read(token)
    time.sleep(0.001)       # the later ticket is taken last
    queue.enqueue(tickets.new(old.manifest, old.suite, "7" * 64, old.priority, old.pin))
    config_file.write_text(config_file.read_text().replace("runner: {", "runner: {order: oldest, "))
    run(StandIn(), mode="once")
    assert sorted(states(tmp_path)) == ["done", "pending"]
    assert len(os.listdir(old.pin)) > 1


def test_a_ticket_that_was_handed_out_often_is_filed_again_all_the_same(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    """As where batch jobs were preempted again and again, or the suite was stopped for days, until it was mended."""
    submit(checkpoint(100), step=100, config=config_file)
    queue = Queue(str(tmp_path / "queue"))
    for _ in range(REFILES + 5):
        token = queue.claim()
        assert token is not None
        assert queue.release(token, failed=False) == "pending"
    config_file.write_text(config_file.read_text().replace("entries: [a]", "entries: [b]"))
    assert run(StandIn()).failed == 0
    assert sorted(r.status for r in store.done(tmp_path / "queue")[0]) == ["ok", "refiled"]


def test_runners_that_disagree_on_a_suite_do_not_file_it_back_and_forth_for_ever(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    other = tmp_path / "other.yaml"
    other.write_text(config_file.read_text().replace("entries: [a]", "entries: [b]"))
    fail = StandIn([AssertionError("the two take only each other's tickets here")])
    with Progress() as progress:
        two = [Runner(configs.load(str(f)), {"quick": [fail]}, {}, progress) for f in (other, config_file)]
        for i in range(200):
            token = two[i % 2].queue.claim()
            if token is None:
                break
            two[i % 2]._process(token, None)  # type: ignore[arg-type]  # as above
    assert i < 199
    reasons = [f.failure.message for f in store.collect(tmp_path / "queue").failed]
    assert any("runners of this queue define it differently" in reason for reason in reasons)


def test_two_runners_that_file_a_ticket_into_each_others_hands_do_not_both_end_it(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the runners of a queue are restarted one by one with a changed suite."""
    submit(checkpoint(100), step=100, config=config_file)
    other = tmp_path / "other.yaml"
    other.write_text(config_file.read_text().replace("entries: [a]", "entries: [b]"))
    with Progress() as progress:
        new, old = (Runner(configs.load(str(f)), {"quick": [StandIn()]}, {}, progress) for f in (other, config_file))

        def file(runner: Runner) -> None:
            token = Queue(runner.queue.root, runner=runner.name).claim()
            assert token is not None
            runner._process(token, None)  # type: ignore[arg-type]  # as above

        def meanwhile(*arguments: Any, **options: Any) -> Path:
            with monkeypatch.context() as patch:
                patch.setattr(store, "write", write)
                file(new)       # the old one has reopened its ticket, and holds the new one's still
            return write(*arguments, **options)

        file(new)
        write = store.write
        monkeypatch.setattr(store, "write", meanwhile)
        file(old)
    assert sorted(states(tmp_path)) == ["done", "pending"]


def test_weights_that_came_later_are_refused(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    path = checkpoint(100)
    submit(path, step=100, config=config_file)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    run(StandIn())
    (failed,) = store.collect(tmp_path / "queue").failed
    assert "pytorch_model.bin: came after the manifest was taken" in failed.failure.message


@pytest.mark.parametrize(
    ("faults", "mode", "status"),
    [([], "--drain", 0), ([CheckpointError("no")], "--drain", 1), ([AutoEvalError("later")], "--once", 75)],
)
def test_exit_statuses(
    checkpoint: MakeCheckpoint, config_file: Path, monkeypatch: pytest.MonkeyPatch,
    faults: list[Exception], mode: str, status: int,
) -> None:  # fmt: skip
    submit(checkpoint(100), step=100, config=config_file)
    monkeypatch.setattr("eval_runner.registry.build_evaluators", lambda *a: [StandIn(faults)])
    assert CliRunner().invoke(cli, ["run", mode, "--config", str(config_file)]).exit_code == status
