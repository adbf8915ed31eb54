"""`python -m autoeval_hooks submit`, as a user types it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import __main__ as command
from autoeval_hooks import manifest, pin
from autoeval_hooks import ticket as tickets
from autoeval_hooks.config import load
from autoeval_hooks.fsio import FileOps, hostname
from autoeval_hooks.handover import Handover, Save, remember, submit, training_id
from autoeval_hooks.manifest import MegatronRecord
from autoeval_hooks.queue import Queue
from autoeval_hooks.retention import tidy_pins
from autoeval_hooks.run_identity import RunIdentity
from tests import megatron_layouts as made

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
    pin.release(ticket.pin)         # as the runner does once the result stands
    assert command.main(argv) == 0
    assert os.listdir(os.path.dirname(ticket.pin)) == []


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


@pytest.mark.parametrize("make", [made.torch_dist, made.torch])
def test_a_checkpoint_of_megatrons_is_given_by_hand_and_its_name_tells_the_step(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "save" / "iter_0000100")
    argv = ["submit", f"{path}/", "--config", str(config)]
    assert command.main(argv) == 0
    assert command.main([*argv, "--step", "100"]) == 0
    assert capsys.readouterr().out == "quick: queued\nquick: known already; nothing to do\n"
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    found = queue.read(token).manifest
    assert (found.kind, found.step, found.samples, found.tokens) == ("megatron", 100, None, None)
    assert found.megatron == MegatronRecord(format=make.__name__)
    assert sorted(os.listdir(queue.read(token).pin)) == sorted(f.path.replace("/", "%2F") for f in found.files)


def test_the_step_of_a_hugging_face_checkpoint_is_told_by_its_name_unless_it_is_given(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path
) -> None:
    assert command.main(["submit", str(checkpoint()), "--config", str(config)]) == 0
    assert command.main(["submit", str(checkpoint(300)), "--config", str(config), "--step", "200"]) == 0
    queue = Queue(str(tmp_path / "queue"))
    assert {queue.read(t).manifest.step for t in queue.tokens("pending")} == {100, 200}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("iter_0000100", ["--step", "200"], "--step: 200 is not the iteration of "),
        ("mine", ["--step", "100"], "'mine' does not name one as iter_0000010 does"),
        ("iter_00000100", [], "'iter_00000100' does not name one as"),
        ("release", ["--step", "100"], "'release' does not name one as"),
        ("iter_0000000", [], "'iter_0000000' does not name one as"),
    ],
)
def test_megatron_finds_a_checkpoint_by_its_name_alone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], says: str
) -> None:
    path = made.torch_dist(tmp_path / "save" / name)
    assert command.main(["submit", str(path), "--config", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_name_that_tells_no_step_needs_one(
    checkpoint: MakeCheckpoint, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["submit", str(checkpoint(name="best")), "--config", str(config)]) == 2
    assert "--step: missing, and 'best' does not tell it as checkpoint-10 does" in capsys.readouterr().err


def test_an_incomplete_checkpoint_of_megatrons_leaves_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.torch_dist(tmp_path / "save" / "iter_0000100")
    (path / "metadata.json").unlink()
    assert command.main(["submit", str(path), "--config", str(config)]) == 2
    assert "iter_0000100: has no metadata.json, so its save" in capsys.readouterr().err
    assert list(Queue(str(tmp_path / "queue")).tokens()) == []
    assert os.listdir(pin.pins_dir(str(path))) == []


def test_the_cap_on_pins_is_said(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load(config, hook={"max_pins": 1, "on_full": "unpinned"})
    queue = Queue(settings.queue)
    queue.create()
    for step in (100, 200):
        save = Save(str(checkpoint(step, f"{step}".encode())), step, RunIdentity("run"), 0.0)
        Handover(settings, queue, save, ("quick",)).run()
    pins = {queue.read(t).manifest.step: bool(queue.read(t).pin) for t in queue.tokens("pending")}
    assert pins == {100: True, 200: False}
    assert any("holds hook.max_pins = 1 pins already" in r.getMessage() for r in caplog.records)


class NoLinks(FileOps):
    """A stand-in for a queue on a file system with links, and checkpoints on one without."""

    def link(self, src: str, dst: str) -> None:
        if "/.autoeval/pins/" in dst:
            raise OSError(errno.EPERM, "Operation not permitted")
        super().link(src, dst)

    def reflink(self, src: str, dst: str) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize(("way", "pinned"), [("auto", False), ("hardlink", False), ("copy", True), ("none", False)])
def test_a_file_system_that_cannot_pin_is_said_and_the_ticket_goes_all_the_same(
    checkpoint: MakeCheckpoint, config: Path, caplog: pytest.LogCaptureFixture, way: str, pinned: bool
) -> None:
    settings = load(config, hook={"pin": way})
    queue = Queue(settings.queue, ops=NoLinks())
    queue.create()
    path = checkpoint(weights=b"w" * (manifest.WHOLE + 1))
    handover = Handover(settings, queue, Save(str(path), 100, RunIdentity("run"), 0.0), ("quick",))
    handover.run()
    Handover(settings, queue, handover.save, ("quick",)).run()      # as when training ends: it is known, and not said
    (token,) = queue.tokens("pending")
    assert bool(queue.read(token).pin) == pinned
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == (way in ("auto", "hardlink"))
    for text in (f"model.safetensors: cannot be pinned here by {way}", "`hook.pin: copy`", "`hook.save_total_limit`"):
        assert all(text in message for message in told)


def test_a_mistyped_path_leaves_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typo = tmp_path / "typo" / "checkpoint-1"
    assert command.main(["submit", str(typo), "--step", "100", "--config", str(config)]) == 2
    assert "not a directory" in capsys.readouterr().err
    assert not typo.parent.exists()


def test_a_file_system_that_fails_for_now_is_said_so(
    checkpoint: MakeCheckpoint, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(self: Queue, ticket: object) -> bool:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Queue, "enqueue", stale)
    path = checkpoint()
    assert command.main(["submit", str(path), "--step", "100", "--config", str(config)]) == 75
    assert "Stale file handle; try again" in capsys.readouterr().err


def test_a_checkpoint_given_by_hand_belongs_to_the_run_that_trained_it(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path
) -> None:
    path = checkpoint()
    own = training_id(str(path.parent), resumed=False)
    run = RunIdentity(own, name="n", project="p", wandb_id="w", wandb_mode="offline")
    remember(str(path.parent), run)
    submit(path, step=100, config=config)
    queue = Queue(str(tmp_path / "queue"))
    (token,) = queue.tokens("pending")
    assert queue.read(token).manifest.run == run


def test_pins_that_were_left_behind_are_freed_and_no_others(
    checkpoint: MakeCheckpoint, config: Path, tmp_path: Path
) -> None:
    paths = {step: checkpoint(step, f"{step}".encode()) for step in (100, 200, 300)}
    for step, path in paths.items():
        submit(path, step=step, config=config)
    queue = Queue(str(tmp_path / "queue"), runner="me")
    by_step = {queue.read(t).manifest.step: t for t in queue.tokens("pending")}
    pins = {step: queue.read(t).pin for step, t in by_step.items()}
    for step in (100, 200):         # both done, and the runner died before it freed their pins
        token = queue.claim(wanted=lambda t, step=step: t.ticket == by_step[step].ticket)  # type: ignore[misc]
        assert token is not None
        assert queue.complete(token)
    first = queue.ticket(by_step[100].ticket)       # the first was filed again: its successor lives on its pin
    assert queue.enqueue(tickets.new(first.manifest, "quick", "e" * 64, 5, first.pin))
    directory = Path(pins[100]).parent
    (directory / f".new-{hostname()}-999999999-abcdef12").mkdir()
    (directory / f".new-{hostname()}-{os.getpid()}-abcdef12").mkdir()
    (directory / ".new-otherhost-999999999-abcdef12").mkdir()
    tidy_pins(queue, str(tmp_path / "out"))
    assert set(os.listdir(directory)) == {
        Path(pins[100]).name, Path(pins[300]).name, f".new-{hostname()}-{os.getpid()}-abcdef12",
        ".new-otherhost-999999999-abcdef12",
    }  # fmt: skip


def test_runs_never_share_a_name_on_disk() -> None:
    odd = [RunIdentity("i", project="p" * 100, entity="e" * 30, wandb_id=w) for w in ("one", "two")]
    odd += [RunIdentity("i", project="a/b", wandb_id="w"), RunIdentity("i", project="a-b", wandb_id="w")]
    odd += [RunIdentity("i", project="b", entity="x_a", wandb_id="w"), RunIdentity("i", wandb_id="../../w")]
    odd += [RunIdentity("i", project="a_b", entity="x", wandb_id="w", wandb_base_url=u) for u in ("", "http://x")]
    assert len({run.key for run in odd}) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,119}", run.key) for run in odd)


def test_a_training_keeps_its_id_over_resumes_only(tmp_path: Path) -> None:
    first = training_id(str(tmp_path), resumed=False)
    assert training_id(str(tmp_path), resumed=True) == first
    assert training_id(str(tmp_path), resumed=False) != first
