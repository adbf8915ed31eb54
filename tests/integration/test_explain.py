"""The story of a step, for everything that can become of one; only the evaluator is a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks import fsio, relay_files, submit
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.relay_files import Announcement, Ended
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import breaker, explain, registry
from eval_runner import config as configs
from eval_runner.cli import cli
from eval_runner.evaluators.base import Job
from eval_runner.explain import Story
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import Shown, StandIn

MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]
Tell = Callable[..., list[Story]]
RUN = RunIdentity("ours", "the run", "p", "e", "w1", wandb_mode="online")


@pytest.fixture
def tell(config_file: Path) -> Tell:
    def stories(step: int, **only: str) -> list[Story]:
        return explain.explain(configs.load(str(config_file)), step, **only)

    return stories


def only(stories: list[Story]) -> Story:
    (story,) = stories
    return story


def text(story: Story) -> str:
    return "\n".join(event.what for event in story.events)


def the_token(tmp_path: Path, *states: str) -> tuple[Queue, Token]:
    queue = Queue(str(tmp_path / "queue"), runner="somebody")
    (token,) = queue.tokens(*states)
    return queue, token


# ---------------------------------------------------------------------- with a ticket


def test_from_save_to_score(checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell) -> None:
    path = checkpoint(100)
    before = time.time()
    submit(path, step=100, config=config_file)
    story = only(tell(100))
    assert story.outcome == "waits for a runner (0 ticket(s) are being evaluated)"
    assert "still there: 3 copies or clones" in text(story)
    run(StandIn([AutoEvalError("the node hiccuped")]), sink=Shown())
    story = only(tell(100))
    assert (story.state, story.suite, story.step) == ("done", "quick", 100)
    saved, pinned, queued, first, second = story.events[:5]
    assert saved.what.startswith(f"saved as {path}")
    assert saved.by == queued.by == fsio.hostname()
    assert saved.at is not None
    assert queued.at is not None
    assert before <= saved.at <= queued.at <= time.time()
    assert "which was freed since" in pinned.what
    assert first.what.startswith("attempt 1: failed (transient): the node hiccuped")
    assert second.what.startswith("attempt 2: evaluated: length bytes 7;")
    assert second.by == "r1"
    assert "no sink is configured" in story.outcome


def test_a_large_file_is_linked_and_one_without_a_pin_says_so(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, tell: Tell
) -> None:
    submit(checkpoint(100, b"x" * (17 << 20)), step=100, config=config_file)
    assert "links, 17.0 MiB" in text(only(tell(100)))
    config_file.write_text(config_file.read_text() + "hook: {pin: none}\n")
    submit(checkpoint(200), step=200, config=config_file)
    assert "not pinned" in text(only(tell(200)))


def test_what_ended_says_why_and_what_to_do(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn([CheckpointError("it is broken")]))
    story = only(tell(100))
    assert story.outcome == f"failed: it is broken; mend it and `autoeval-runner retry {story.ticket[:12]}`"

    submit(checkpoint(200, b"2"), step=200, config=config_file)
    queue, token = the_token(tmp_path, "pending")
    assert queue.cancel(token, "superseded by step 300")
    assert only(tell(200)).outcome.startswith("cancelled: superseded by step 300; `autoeval-runner retry")

    submit(checkpoint(300, b"3"), step=300, config=config_file)
    queue, token = the_token(tmp_path, "pending")
    claimed = queue.claim()
    assert claimed is not None
    assert "is being evaluated by runner somebody" in only(tell(300)).outcome
    assert queue.quarantine(claimed, "hostile")
    assert only(tell(300)).outcome.startswith("refused: hostile; mend it")

    submit(checkpoint(400, b"4"), step=400, config=config_file)
    claimed = queue.claim()
    assert claimed is not None
    queue.release(claimed, failed=True, max_failures=1)
    story = only(tell(400))
    assert "failed: runner somebody left no record" in story.outcome
    assert "attempt 1: left no record" in text(story)


def test_a_ticket_that_waits_says_for_what(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    queue, _ = the_token(tmp_path, "pending")
    for _ in range(2):
        claimed = queue.claim()
        assert claimed is not None
        queue.release(claimed, failed=True, max_failures=5)
    assert "it failed 2 time(s) and is tried again" in only(tell(100)).outcome

    with_priority = config_file.read_text().replace("quick: {", "quick: {priority: 9, ")
    plain = config_file.read_text()
    config_file.write_text(with_priority)
    submit(checkpoint(200, b"2"), step=200, config=config_file)
    assert "; 1 of higher priority go first" in only(tell(100)).outcome
    config_file.write_text(plain)

    digest = configs.load(str(config_file)).suites["quick"].digest
    record = breaker.Record("quick", digest, ("a", "b", "c"), True, 0, "no GPU")
    (tmp_path / "queue" / breaker.FOLDER).mkdir(exist_ok=True)
    (tmp_path / "queue" / breaker.FOLDER / f"{digest}.json").write_text(json.dumps(asdict(record)))
    assert "stopped, since it failed on 3 checkpoint(s)" in only(tell(100)).outcome
    assert "no GPU" in only(tell(100)).outcome

    (tmp_path / "queue" / breaker.FOLDER / f"{digest}.json").unlink()
    config_file.write_text(plain.replace("entries: [a]", "entries: [b]"))
    assert "is filed again under the definition here" in only(tell(100)).outcome

    config_file.write_text(plain.replace("quick:", "other:"))
    stories = {s.suite: s for s in tell(100)}
    assert "defines no suite quick" in stories["quick"].outcome
    assert "which came to the configuration later" in stories["other"].outcome


def test_a_ticket_that_was_filed_again_tells_both_stories(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    config_file.write_text(config_file.read_text().replace("entries: [a]", "entries: [b]"))
    run(StandIn())
    old, new = sorted(tell(100), key=lambda s: "filed again as" not in s.outcome)
    assert old.outcome == f"filed again as ticket {new.ticket[:12]}: see there"
    assert f"filed again from ticket {old.ticket[:12]}" in text(new)
    assert "attempt 1: evaluated" in text(new)


def test_an_attempt_that_does_not_count_says_so(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    thief = Queue(str(tmp_path / "queue"), runner="thief")

    def stolen(job: Job) -> None:
        (token,) = thief.tokens("claimed")
        assert thief.release(token, failed=True) == "pending"

    run(StandIn(during=stolen), mode="once")
    run(StandIn(), name="r2")
    story = only(tell(100))
    counts = [e.what for e in story.events if e.what.startswith("attempt")]
    assert len(counts) == 2
    assert "its lease was lost, so that it does not count" in counts[0] or "left no record" in counts[0]
    assert counts[1].startswith("attempt 2: evaluated: length")


def test_a_record_that_cannot_be_read(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn())
    (record,) = (tmp_path / "queue" / "results").glob("*/result.json")
    record.write_text("torn")
    story = only(tell(100))
    assert "cannot be read" in story.outcome
    assert "its record results/" in text(story)


def test_clocks_that_contradict_each_other(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    queue, token = the_token(tmp_path, "pending")
    ticket = queue.read(token)
    later = replace(ticket, manifest=replace(ticket.manifest, saved_at=ticket.manifest.saved_at + 500, host="train-1"))
    Path(queue.root, "pending", token.name).write_bytes(tickets.dump(later))
    run(StandIn())
    assert "the clocks contradict each other: an evaluation began" in text(only(tell(100)))
    assert "by train-1's clock" in text(only(tell(100)))


# ---------------------------------------------------------------------- the point


@pytest.fixture
def point(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """A result of a W&B run, its point in one of the directories of relay/<run>/."""
    monkeypatch.setattr(explain, "WATCH_S", 0.2)
    config_file.write_text(config_file.read_text().replace("sinks: []", "sinks: [{type: wandb}]"))
    submit(checkpoint(100), step=100, config=config_file, run=RUN)
    run(StandIn())
    (result,) = store.done(tmp_path / "queue")[0]

    def put(stage: str) -> Path:
        relay = tmp_path / "queue" / "relay" / result.run.key
        shutil.rmtree(relay, ignore_errors=True)
        (relay / stage).mkdir(parents=True)
        name = result.ticket + {"points": ".json", "refused": ".json"}.get(stage, "~me")
        (relay / stage / name).write_text("{}")
        if stage == "refused":
            relay_files.set_aside(str(relay), name, "a name for no score", stage)
        (relay / "identity.json").write_bytes(relay_files.encode(result.run))
        return relay

    return put


def test_a_point_that_is_shown(point: Callable[[str], Path], tell: Tell) -> None:
    point("logged")
    assert only(tell(100)).outcome == "shown: bench/quick/length/bytes at bench/step 100 in W&B run w1"


def test_a_point_that_is_not_made_yet(point: Callable[[str], Path], tell: Tell, tmp_path: Path) -> None:
    shutil.rmtree(point("points"))
    story = only(tell(100))
    assert "its point is not made yet" in story.outcome
    assert "not given to sink 0-wandb yet" in text(story)
    (mark := tmp_path / "queue" / "published" / "0-wandb").mkdir(parents=True)
    (result,) = store.done(tmp_path / "queue")[0]
    (mark / store.path_of(tmp_path / "queue", result).name).touch()
    given = next(e for e in only(tell(100)).events if e.what == "given to sink 0-wandb")
    assert given.by == "the file server"
    assert given.at is not None


def test_a_point_that_was_refused(point: Callable[[str], Path], tell: Tell) -> None:
    relay = point("refused")
    assert "its point was refused: a name for no score" in only(tell(100)).outcome
    next((relay / "refused").glob("*.reason")).unlink()
    assert "refused: no reason was left" in only(tell(100)).outcome


def test_why_a_point_waits(point: Callable[[str], Path], tell: Tell) -> None:
    relay = point("points")
    assert "its point waits: no training process has shown itself" in only(tell(100)).outcome
    (relay / "closed").touch()
    assert "its point waits: the run is closed" in only(tell(100)).outcome
    (relay / "closed").unlink()
    (relay / "run.json").write_bytes(relay_files.encode(Announcement(1, RUN, "abc", True, 500)))
    (relay / "heartbeat").write_text("abc 1\n")
    assert "its training process has not shown itself for 0.2 s" in only(tell(100)).outcome
    (relay / "why").write_text("W&B does not answer")       # what a runner that looked left
    assert "its point waits: W&B does not answer" in only(tell(100)).outcome
    (relay / "why").unlink()
    (relay / "run.json").write_text("torn")
    assert "run.json: not valid JSON" in only(tell(100)).outcome


def test_a_training_process_that_is_seen_alive(
    point: Callable[[str], Path], tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = point("taken")
    (relay / "run.json").write_bytes(relay_files.encode(Announcement(1, RUN, "abc", True, 500)))
    (relay / "heartbeat").write_text("abc 1\n")
    monkeypatch.setattr(explain, "WATCH_S", 60.0)
    beats = iter(range(2, 1000))
    monkeypatch.setattr(time, "sleep", lambda s: (relay / "heartbeat").write_text(f"abc {next(beats)}\n"))
    outcome = only(tell(100)).outcome
    assert "is being logged" in outcome
    assert "the training process is alive and logs them" in outcome


def test_a_result_without_a_wandb_run(
    checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    config_file.write_text(config_file.read_text().replace("sinks: []", "sinks: [{type: wandb}]"))
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn())
    assert "no W&B run shows it, since training has none" in only(tell(100)).outcome


def test_a_result_that_waits_for_another_sink(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, tell: Tell
) -> None:
    """Which it is and why; that there is no W&B run is no reason."""
    sinks = "sinks: [{type: wandb}, {type: tensorboard, log_dir: tb}, {type: trackio, dir: t}]"
    config_file.write_text(config_file.read_text().replace("sinks: []", sinks))
    submit(checkpoint(100), step=100, config=config_file)
    run(StandIn())
    ((result,), _) = store.done(tmp_path / "queue")
    _, board, trackio = registry.build_sinks(configs.load(config_file))
    assert only(tell(100)).outcome == (
        "evaluated; no W&B run shows it, since training has none; "
        f"it is not given to sink {board.target} yet; it is not given to sink {trackio.target} yet"
    )
    for sink in (board, trackio):
        sink.publish(result)
        (mark := tmp_path / "queue" / "published" / sink.target).mkdir(parents=True)
        (mark / store.path_of(tmp_path / "queue", result).name).touch()
    board.spool.say("no space is left")
    trackio.spool.remove(*trackio.spool.names())
    assert only(tell(100)).outcome == (
        "evaluated; no W&B run shows it, since training has none; "
        f"it waits for TensorBoard's {tmp_path}/tb: no space is left; shown in trackio in {tmp_path}/t"
    )


# ---------------------------------------------------------------------- without a ticket


def test_a_step_that_no_suite_is_due_at(checkpoint: MakeCheckpoint, config_file: Path, tell: Tell) -> None:
    text_ = config_file.read_text()
    cadence = "quick: {every_steps: 50, begin_step: 100, end_step: 300, "
    config_file.write_text(text_.replace("quick: {", cadence))
    submit(checkpoint(100), step=100, config=config_file)
    outcome = only(tell(110)).outcome
    assert "suite quick is not due at step 110: every 50 step(s) from step 100 to step 300; due near" in outcome
    assert "due near it: 100 and 150" in outcome
    assert "submit PATH --step 110 --suite quick" in outcome
    assert "due near it: 300" in only(tell(310)).outcome
    assert "due near it" not in only(tell(900)).outcome


def test_a_step_that_was_never_handed_over(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, tell: Tell
) -> None:
    Queue(str(tmp_path / "queue")).create()
    assert "no ticket was ever queued here" in only(tell(100)).outcome
    for step in (100, 300):
        submit(checkpoint(step, f"{step}".encode()), step=step, config=config_file)
    left = checkpoint(200, b"2")
    assert f"{left} is there and was never handed over" in only(tell(200)).outcome
    shutil.rmtree(left)
    outcome = only(tell(200)).outcome
    assert "holds none (never saved, or deleted before it was); handed over near it: 100 and 300" in outcome
    assert "the last one is of step 300" in only(tell(400)).outcome
    assert "handed over near it: 100" in only(tell(50)).outcome


def test_training_that_ended_before(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file, run=RUN)
    (token,) = Queue(str(tmp_path / "queue")).tokens()
    relay = tmp_path / "queue" / "relay" / Queue(str(tmp_path / "queue")).read(token).manifest.run.key
    relay.mkdir(parents=True)
    (relay / "run.json").write_bytes(relay_files.encode(Announcement(1, RUN, "abc", False, 500)))
    (relay / "ended.json").write_bytes(relay_files.encode(Ended(1, "abc", 150, False)))
    assert only(tell(400)).outcome == "training ended at step 150"
    (relay / "ended.json").write_bytes(relay_files.encode(Ended(1, "an earlier one", 150, False)))
    assert "the last one is of step 100" in only(tell(400)).outcome


def test_a_ticket_that_cannot_be_read_is_not_forgotten(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, tell: Tell
) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    (tmp_path / "queue" / "quarantine" / f"5-1-{'a' * 64}~g0f0~r").write_bytes(b"torn")
    assert "(1 ticket(s) cannot be read: see `autoeval-runner status`)" in only(tell(200)).outcome


def test_who_is_meant(checkpoint: MakeCheckpoint, config_file: Path, tell: Tell) -> None:
    submit(checkpoint(100), step=100, config=config_file, run=RUN)
    other = replace(RUN, wandb_id="w2", name="b")
    submit(checkpoint(100, b"other", name="other-100"), step=100, config=config_file, run=other)
    assert len(tell(100)) == 2
    for name in ("the run", "w1"):
        assert only(tell(100, run=name)).run == "the run"
    with pytest.raises(ConfigError, match="no ticket is of a run called 'the ruin'; did you mean 'the run'"):
        tell(100, run="the ruin")
    with pytest.raises(ConfigError, match="no suite is called 'quik'; did you mean 'quick'"):
        tell(100, suite="quik")


def test_the_command_prints_it(checkpoint: MakeCheckpoint, config_file: Path, tmp_path: Path) -> None:
    submit(checkpoint(100), step=100, config=config_file)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    shown = CliRunner().invoke(cli, ["explain", "100", "--config", str(config_file)], catch_exceptions=False)
    lines = shown.stdout.splitlines()
    assert "suite quick, step 100, ticket" in lines[0]
    assert lines[-1].strip().startswith("→ waits for a runner")
    shown = CliRunner().invoke(cli, ["explain", "100", "--json", "--config", str(config_file)], catch_exceptions=False)
    (story,) = json.loads(shown.stdout)["stories"]
    assert story["state"] == "pending"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before     # it only reads
    assert os.listdir(tmp_path / "queue" / "tmp") == []
