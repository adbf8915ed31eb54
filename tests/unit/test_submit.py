"""`python -m autoeval_hooks submit`, as a user types it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import __main__ as command
from autoeval_hooks import pin
from autoeval_hooks.config import load
from autoeval_hooks.handover import Handover, Save, training_id
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text("queue: queue\nsuites: {quick: {every_steps: 100, evaluators: [{type: helm}]}}\n")
    return path


def test_a_checkpoint_is_queued_once(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["submit", str(checkpoint()), "--step", "100", "--config", str(config), "--tokens", "5000"]
    assert command.main(argv) == 0
    assert capsys.readouterr().out == "quick: queued\n"
    assert command.main(argv) == 0
    assert capsys.readouterr().out == "quick: known already; nothing to do\n"
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    ticket = queue.read(token)
    assert (ticket.manifest.step, ticket.manifest.tokens) == (100, 5000)
    assert os.listdir(os.path.dirname(ticket.pin)) == [ticket.id]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["CHECKPOINT", "--step", "150"], "no suite is due at step 150; name one with --suite"),
        (["CHECKPOINT", "--step", "150", "--suite", "quik"], "suites.quik: not defined; did you mean 'quick'?"),
        (["/nowhere/checkpoint-1", "--step", "100"], "/nowhere"),
        (["CHECKPOINT", "--step", "100", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_mistakes_are_one_clear_line(
    checkpoint: MakeCheckpoint, config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    path = str(checkpoint())
    argv = ["submit", "--config", str(config), *[path if a == "CHECKPOINT" else a for a in arguments]]
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_cap_on_pins_is_said(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load(config, hook={"max_pins": 1})
    queue = Queue(settings.queue)
    queue.create()
    for step in (100, 200):
        save = Save(str(checkpoint(step, f"{step}".encode())), step, RunIdentity("run"), 0.0)
        Handover(settings, queue, save, ("quick",)).run()
    pins = {queue.read(t).manifest.step: bool(queue.read(t).pin) for t in queue.tokens("pending")}
    assert pins == {100: True, 200: False}
    assert any("holds hook.max_pins = 1 pins already" in r.getMessage() for r in caplog.records)


def test_a_file_system_that_cannot_pin_is_said_and_the_ticket_goes_all_the_same(
    checkpoint: MakeCheckpoint, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def impossible(*args: object) -> str:
        raise pin.PinImpossible("x: cannot be pinned here by auto")

    monkeypatch.setattr(pin, "make", impossible)
    assert command.main(["submit", str(checkpoint()), "--step", "100", "--config", str(config)]) == 0
    assert any("Set `hook.pin: copy`" in r.getMessage() for r in caplog.records)


def test_a_training_keeps_its_id_over_resumes_only(tmp_path: Path) -> None:
    first = training_id(str(tmp_path), resumed=False)
    assert training_id(str(tmp_path), resumed=True) == first
    assert training_id(str(tmp_path), resumed=False) != first
