"""`status --watch`: what runs and how far it is, what waits and what went wrong, on a terminal and off it."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from autoeval_hooks import submit
from autoeval_hooks.errors import AutoEvalError, CheckpointError
from autoeval_hooks.queue import NOTE_BYTES, Queue, Token
from autoeval_hooks.ticket import Ticket
from eval_runner import running
from eval_runner import status as statuses
from eval_runner.cli import cli, live
from eval_runner.evaluators.base import Job
from eval_runner.live import View, Watcher
from eval_runner.results import store
from eval_runner.results.schema import Failure
from eval_runner.runner import Runner
from eval_runner.sinks.base import Context
from eval_runner.sinks.tensorboard import TensorboardSink
from tests.processes import wait_for
from tests.results_samples import publish, result, score
from tests.stand_ins import StandIn

ROOT = Path(__file__).parents[2]
MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]


def shown(watcher: Watcher, *, wide: bool = True) -> str:
    console = Console(file=io.StringIO(), width=live.WIDE if wide else 80)
    console.print(live._look(watcher, wide=wide))
    text: str = console.file.getvalue()     # type: ignore[attr-defined]  # it is the StringIO of above
    return text


def test_a_runner_shows_what_it_is_at(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-for-anybody")
    monkeypatch.setattr("eval_runner.lease.BEAT_MAX_S", 0.05)
    views: list[View] = []
    texts: list[str] = []
    watcher = Watcher(tmp_path / "queue")

    def during(job: Job) -> None:
        job.progress(0.42, "asks with sk-not-for-anybody")

        def seen() -> bool:
            views.append(watcher.look())
            note = views[-1].working[0].note
            return note is not None and note.what != ""

        wait_for(seen, 20)
        texts.append(shown(watcher))

    for step in (100, 200):
        submit(checkpoint(step, b"w" * step), step=step, config=config_file)
    run(StandIn(during=during), mode="once")
    (working,) = views[-1].working
    assert (working.runner, working.ticket and working.ticket.step) == ("r1", 200)
    assert working.note == running.Note(working.note.ticket, "helm", 0.42, "asks with ***")     # type: ignore[union-attr]
    assert [(w.suite, w.tickets) for w in views[-1].waiting] == [("quick", 1)]
    assert 0 <= views[-1].waiting[0].longest < 600
    (line,) = [line for line in texts[0].splitlines() if line.startswith("r1")]
    assert [line.split()[0], *line.split()[2:]] == ["r1", "quick", "200", "helm", "42%", "asks", "with", "***"]
    after = watcher.look()
    assert after.working == []
    assert after.last
    assert (after.last.step, after.counts["done"], after.counts["pending"]) == (200, 1, 1)
    assert 0 < after.last.lag < 600


def test_what_went_wrong_is_told_with_why(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run
) -> None:
    config_file.write_text(config_file.read_text().replace("lease: 6.0", "lease: 6.0, order: oldest"))
    for step in (100, 200):
        submit(checkpoint(step), step=step, config=config_file)
    watcher = Watcher(tmp_path / "queue")
    run(StandIn([CheckpointError("the weights are \x1b[2J[red]noise")]), mode="once")
    run(StandIn([AutoEvalError("no luck today")]), mode="once")
    found = watcher.look()
    assert [(t.state, t.ticket and t.ticket.step, t.failures) for t in found.troubles] == [
        ("pending", 200, 1), ("failed", 100, 0)]  # fmt: skip
    text = shown(watcher)
    assert "the weights are \\x1b[2J[red]noise" in text
    assert "no luck today" in text
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in shown(watcher, wide=False).splitlines())


def test_only_the_newest_troubles_are_told_of(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    Queue(str(queue)).create()
    for step in range(14):
        publish(queue, result(step, failure=Failure("checkpoint", f"reason {step}")), state="failed")
    publish(queue, result(99, score(0.5), run="other"))
    text = shown(watcher := Watcher(queue))
    assert watcher.look().more == 4
    assert "and 4 more that went wrong: see `autoeval-runner status`" in text
    assert text.count("reason ") == 10
    assert "last scores: other, suite quick, step 99, 1 min 0 s after the save" in text


def test_a_queue_that_does_not_answer_is_asked_again(queue: Queue, tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "queue")
    assert "0 pending" in shown(watcher)
    shutil.move(tmp_path / "queue", tmp_path / "away")
    assert "the queue does not answer: " in shown(watcher)
    shutil.move(tmp_path / "away", tmp_path / "queue")
    assert "0 pending" in shown(watcher)


def test_a_relay_directory_that_cannot_be_listed_is_named_and_hides_no_other(
    tmp_path: Path, queue: Queue, config_file: Path
) -> None:
    for run in ("a-well", "b-broken", "c-well"):
        (tmp_path / "queue" / "relay" / run / "points").mkdir(parents=True)
        (tmp_path / "queue" / "relay" / run / "points" / "p").touch()
    (tmp_path / "queue" / "relay" / "file").touch()
    broken = tmp_path / "queue" / "relay" / "b-broken" / "taken"
    broken.symlink_to("taken")
    done = CliRunner().invoke(cli, ["status", "--config", str(config_file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"{broken}: cannot be listed (Too many levels of symbolic links)" in done.stdout
    assert "run a-well" in done.stdout
    assert "run c-well" in done.stdout
    found = json.loads(CliRunner().invoke(cli, ["status", "--config", str(config_file), "--json"]).stdout)
    assert found["points_waiting"] == {"a-well": 1, "c-well": 1}
    assert len(found["problems"]) == 1
    assert str(broken) in shown(Watcher(tmp_path / "queue"))


def test_results_that_wait_for_another_tracker_are_counted_with_why(
    tmp_path: Path, queue: Queue, config_file: Path
) -> None:
    sinks = tmp_path / "queue" / "sinks"
    for target, names in {"mlflow-1": ["a", "b", ".being-written"], "trackio-2": ["a"], "tensorboard-3": []}.items():
        (sinks / target / "waiting").mkdir(parents=True)
        for name in names:
            (sinks / target / "waiting" / name).touch()
    (sinks / "mlflow-1" / "why").write_text("mlflow \x1b[2Jgives no answer")
    (sinks / "z-broken").mkdir()
    (sinks / "z-broken" / "waiting").symlink_to("waiting")
    arguments = ["status", "--config", str(config_file)]
    lines = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout.splitlines()
    assert lines[1:3] == [
        "2 result(s) wait for mlflow-1: mlflow \\x1b[2Jgives no answer",
        "1 result(s) wait for trackio-2: no runner has tried yet",
    ]
    assert f"{sinks / 'z-broken' / 'waiting'}: cannot be listed" in lines[3]
    assert shown(Watcher(tmp_path / "queue")).splitlines()[1:4] == lines[1:4]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert found["results_waiting"] == {"mlflow-1": 2, "trackio-2": 1}
    assert found["results_why"] == {"mlflow-1": "mlflow \x1b[2Jgives no answer", "trackio-2": ""}
    assert len(found["problems"]) == 1


def test_what_a_sink_took_and_could_not_show_is_counted(tmp_path: Path, queue: Queue, config_file: Path) -> None:
    sink = TensorboardSink({}, Context(tmp_path / "queue", "r1", "sinks[0]", str(config_file)))
    sink.publish(result(100, score(0.5)))
    found = statuses.read(tmp_path / "queue")
    assert found.results_waiting == {sink.spool.root.name: 1}


def test_the_last_scores_are_of_a_ticket_that_has_scores(tmp_path: Path) -> None:
    root = tmp_path / "queue"
    Queue(str(root)).create()
    watcher = Watcher(root)
    refiled = replace(result(300), status="refiled", refiled_as="f" * 64)
    for at, r in enumerate((result(100, score(0.5)), result(200, score(0.6)), refiled)):
        name = publish(root, r).result_name
        os.utime(root / "results" / name, (at, at))
    for _ in range(2):
        last = watcher.look().last
        assert last
        assert (last.step, last.lag) == (200, 60.0)


def test_what_was_imported_has_no_lag(tmp_path: Path) -> None:
    root = tmp_path / "queue"
    Queue(str(root)).create()
    when = 1_800_000_000.0
    untimed = replace(result(200, score(0.5)), saved_at=when, started_at=when, finished_at=when)
    imported = replace(untimed, runner=store.IMPORTER)
    (root / store.IMPORTED).mkdir()
    store.write(root, store.path_of(root, imported).name, imported, [], folder=store.IMPORTED)
    assert Watcher(root).look().last is None
    publish(root, untimed)
    assert "last scores: demo, suite quick, step 200\n" in shown(Watcher(root))


def test_tickets_that_cannot_be_read_are_a_row_of_their_own(
    tmp_path: Path, queue: Queue, new_ticket: Callable[..., Ticket], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (100, 200, 300):
        queue.enqueue(new_ticket(step))
    first, second, _ = (tmp_path / "queue" / "pending").iterdir()
    first.write_text("{")
    second.write_text("")
    watcher = Watcher(tmp_path / "queue")
    assert [(w.suite, w.tickets, w.longest is None) for w in watcher.look().waiting] == [
        ("quick", 1, False), ("?", 2, True)]  # fmt: skip
    (line,) = [line for line in shown(watcher).splitlines() if line.startswith("?")]
    assert line.split(maxsplit=2) == ["?", "2", "cannot be read: see `autoeval-runner status`"]

    def moved_on(self: Queue, token: Token) -> Ticket:
        raise FileNotFoundError(token.name)

    monkeypatch.setattr(Queue, "read", moved_on)
    assert [w.suite for w in Watcher(tmp_path / "queue").look().waiting] == []


@pytest.mark.parametrize("arguments", [["--watch", "--json"], ["--watch", "0"], ["--watch", "soon"]])
def test_what_cannot_be_watched_is_a_mistake_in_the_call(queue: Queue, config_file: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["status", *arguments, "--config", str(config_file)]).exit_code == 2


# ---------------------------------------------------------------------- as a process


def start(config_file: Path, *watch: str, stdout: int) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", "from eval_runner.cli import main; main()", "status", *watch]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    return subprocess.Popen([*program, "--config", str(config_file)], stdout=stdout, stderr=subprocess.PIPE, env=env)


def ended(child: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Ctrl-C, the exit status, and what was said on stderr."""
    child.send_signal(signal.SIGINT)
    assert child.stderr
    said = child.stderr.read()
    child.stderr.close()
    return child.wait(30), said


def test_off_a_terminal_a_plain_block_is_printed_each_time(
    queue: Queue, config_file: Path, new_ticket: Callable[..., Ticket]
) -> None:
    queue.enqueue(new_ticket(100))
    child = start(config_file, "--watch", "0.3", stdout=subprocess.PIPE)
    try:
        assert child.stdout
        blocks: list[list[bytes]] = [[]]
        began = time.monotonic()
        while len(blocks) < 3:      # a block ends with an empty line
            line = child.stdout.readline()
            assert line
            blocks[-1].append(line) if line.strip() else blocks.append([])
        assert time.monotonic() - began < 60
        assert ended(child) == (0, b"")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()    # type: ignore[union-attr]
    for block in blocks[:2]:
        assert b": 1 pending, 0 claimed" in block[0]
        assert block[2].split()[:2] == [b"quick", b"1"]
        assert b"\x1b" not in b"".join(block)


def test_on_a_terminal_the_table_is_drawn_anew(
    queue: Queue, config_file: Path, new_ticket: Callable[..., Ticket]
) -> None:
    ours, theirs = pty.openpty()
    child = start(config_file, "--watch=0.2", stdout=theirs)
    os.close(theirs)
    seen = bytearray()

    def drain() -> None:
        try:
            while data := os.read(ours, 4096):
                seen.extend(data)
        except OSError:     # the terminal's other end is closed
            return

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        wait_for(lambda: b"0 pending" in seen)
        queue.enqueue(new_ticket(100))
        wait_for(lambda: b"1 pending" in seen)
        assert ended(child) == (0, b"")
    finally:
        child.kill()
        child.wait()
        reader.join(30)
        os.close(ours)
    assert b"\x1b[1A\x1b[2K" in seen        # a line up, and cleared
    assert seen.rstrip().endswith(b"\x1b[?25h")     # the cursor is there again


# ---------------------------------------------------------------------- the note in a heartbeat


@given(st.text(max_size=400), st.floats(0, 1), st.sampled_from(["helm", "e" * 40, "評価" * 20]))
@example("\U0001f600" * 100, 0.5, "helm")
@example("\ud800\0", 0.5, "helm")
def test_a_note_has_one_length_whatever_it_says(what: str, fraction: float, evaluator: str) -> None:
    text = running.dump(running.Note("a" * running.SHORT, evaluator, fraction, what))
    assert len(text) == len(running.dump(None)) == NOTE_BYTES
    found = running.load(text, "a" * 64)
    assert found is None or (found.evaluator, abs(found.fraction - fraction) <= 5e-4) == (evaluator, True)
    assert running.load(text, "b" * 64) is None
    if evaluator == "helm" and what.isascii() and what.isprintable() and '"' not in what and "\\" not in what:
        assert found
        assert what.startswith(found.what)
        assert found.what[:30] == what[:30]


@given(st.binary(max_size=300))
@example(b"null")
@example(b'{"ticket": "", "evaluator": "", "fraction": 0.5, "what": ""}')
@example(b'{"ticket": "a", "evaluator": 5, "fraction": NaN, "what": ""}')
def test_what_is_no_note_is_none(text: bytes) -> None:
    assert running.load(text, "a" * 64) is None


def test_a_later_note_leaves_nothing_of_an_earlier_one(queue: Queue) -> None:
    heart = queue.start_heart()
    for note in (running.Note("a", "helm", 0.5, "much to say " * 9), None):
        queue.beat(heart, 7, running.dump(note))
        assert running.load(queue.note("me"), "a" * 64) == (note and running.Note("a", "helm", 0.5, note.what))
        assert queue.heartbeat("me")[:20] == b"%020d" % 7
    queue.stop_heart(heart)
    assert queue.note("me") == b""
