"""Retention in a real Trainer: whatever it deletes or rewrites, what was handed over is evaluated or says why not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

from autoeval_hooks import AutoEvalCallback, manifest, pin, submit
from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket
from eval_runner.results import store
from eval_runner.runner import Runner
from tests.stand_ins import StandIn
from tests.trainer import handed_over, trainer

ROOT = Path(__file__).parents[2]
LARGE = 600
"""A width at which weights are so large that a pin links them, instead of copying."""
BEST_FIRST: dict[str, Any] = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    "greater_is_better": True,      # of a loss that falls: so the first checkpoint is the best
}  # fmt: skip


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """For the hook and for `run` alike."""
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        "queue: queue\nhook: {deadline: 30.0}\nsinks: []\nrunner: {lease: 60.0, allow_pickled_weights: true}\n"
        f"run: {{tokenizer: {tmp_path}}}\nsuites: {{quick: {{evaluators: [{{type: helm, entries: [a]}}]}}}}\n"
    )
    return path


Run = Callable[..., Runner]


def left(out: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))


def by_step(root: Path, *states: str) -> dict[int, Ticket]:
    return {step: ticket for (_, step), ticket in handed_over(root / "queue", *states).items()}


def whole(ticket: Ticket) -> bool:
    """Whether the ticket's pin holds what the manifest says, and no more."""
    names = sorted(os.listdir(ticket.pin))
    return [manifest.record(ticket.pin, name) for name in names] == list(ticket.manifest.files)


def evaluated(root: Path) -> dict[int, str]:
    """Step → the benchmark's name, or why there is no score."""
    contents = store.collect(root / "queue")
    return {r.step: r.scores[0].benchmark for r in contents.results} | {
        f.step or 0: f.failure.message for f in contents.failed
    }


@pytest.mark.parametrize(
    ("arguments", "stay"),
    [
        ({"save_total_limit": 1}, [6]),
        ({"save_total_limit": 2}, [4, 6]),
        ({"save_total_limit": 1, "save_only_model": True}, [6]),
        ({"save_total_limit": 2, **BEST_FIRST}, [2, 6]),
    ],
)  # fmt: skip
def test_what_the_trainer_deletes_is_evaluated_all_the_same(
    tmp_path: Path, config_file: Path, run: Run, arguments: dict[str, Any], stay: list[int]
) -> None:
    trainer(tmp_path / "out", AutoEvalCallback(config_file), **arguments).train()
    assert left(tmp_path / "out") == stay
    tickets = by_step(tmp_path)
    assert sorted(tickets) == [2, 4, 6]
    assert all(whole(t) for t in tickets.values())
    run(StandIn())
    assert evaluated(tmp_path) == {2: "length", 4: "length", 6: "length"}
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []
    assert left(tmp_path / "out") == stay


class Stop(TrainerCallback):
    """Ends training after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize(
    ("stop", "arguments", "saved"),
    [
        (6, {}, [2, 4, 6]),
        (4, {}, [2, 4]),
        (5, {}, [2, 4]),     # one step after the last save
        (8, {"save_strategy": "epoch", "eval_strategy": "epoch", "per_device_train_batch_size": 16}, [4, 8]),
    ],
)
def test_the_last_checkpoint_is_deleted_before_training_ends(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch,
    stop: int, arguments: dict[str, Any], saved: list[int],
) -> None:  # fmt: skip
    """With `save_total_limit=1` and a best model that is not the last. The pin takes longer than that."""
    make = pin.make

    def slow(source: str, *rest: Any) -> str:
        time.sleep(0.3 if ".autoeval" not in source else 0)
        return make(source, *rest)

    monkeypatch.setattr(pin, "make", slow)
    arguments = {**BEST_FIRST, "save_total_limit": 1, **arguments}
    trainer(tmp_path / "out", AutoEvalCallback(config_file), Stop(stop), steps=max(stop, 6), **arguments).train()
    assert left(tmp_path / "out") == saved[:1]
    tickets = by_step(tmp_path)
    assert sorted(tickets) == saved
    assert all(whole(t) for t in tickets.values())


def test_pins_hold_the_model_and_no_optimizer_on_disk(tmp_path: Path, config_file: Path) -> None:
    """By inodes: the weights of each checkpoint once, the optimizer of the last one only."""
    out = tmp_path / "out"
    trainer(out, AutoEvalCallback(config_file), width=LARGE, steps=4, save_total_limit=1).train()
    inodes: dict[int, tuple[int, str]] = {}
    for path in (p for p in out.rglob("*") if p.is_file()):
        inodes[path.stat().st_ino] = (path.stat().st_size, path.name)
    weights, optimizer = (
        [size for size, name in inodes.values() if name == file] for file in ("model.safetensors", "optimizer.pt")
    )
    assert len(weights) == 2
    assert len(optimizer) == 1
    assert min(weights) > manifest.WHOLE
    assert sum(size for size, _ in inodes.values()) < sum(weights) + sum(optimizer) + (1 << 20)
    assert (out / "checkpoint-4" / "model.safetensors").stat().st_nlink == 2      # linked: the pin costs nothing


def test_a_pin_is_the_last_copy(tmp_path: Path, config_file: Path, run: Run) -> None:
    """Training, a resumed training, and the user's own `rm -r checkpoint-*`; only then the first runner starts."""
    out = tmp_path / "out"
    trainer(out, AutoEvalCallback(config_file), width=LARGE, steps=4, save_total_limit=1).train()
    trainer(out, AutoEvalCallback(config_file), width=LARGE, save_total_limit=1).train(resume_from_checkpoint=True)
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    tickets = by_step(tmp_path)
    assert {Path(t.pin, "model.safetensors").stat().st_nlink for t in tickets.values()} == {1}
    run(StandIn())
    assert evaluated(tmp_path) == {2: "length", 4: "length", 6: "length"}
    assert os.listdir(out / ".autoeval" / "pins") == []


def rewritten(path: Path) -> None:
    """As a trainer that saves the same step anew: safetensors puts another file in the place of the old one."""
    file = path / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


def truncated(path: Path) -> None:
    """`torch.save` opens the file that is there, and so the pin's."""
    file = path / "pytorch_model.bin"
    torch.save({name: tensor + 1 for name, tensor in torch.load(file).items()}, file)


@pytest.mark.parametrize(
    ("how", "when", "outcome"),
    [
        (rewritten, "before", "length"),
        (rewritten, "during", "length"),
        (truncated, "before", "pytorch_model.bin: its content is not that of the manifest; it was rewritten"),
        (truncated, "during", "pytorch_model.bin: changed while it was evaluated; nothing is published"),
    ],
)
def test_a_checkpoint_that_is_rewritten_in_place(
    tmp_path: Path, config_file: Path, run: Run, how: Callable[[Path], None], when: str, outcome: str
) -> None:
    path = tmp_path / "out" / "checkpoint-2"
    path.mkdir(parents=True)
    tensors = {"w": torch.zeros(manifest.WHOLE // 4 + 1)}
    save_file(tensors, path / "model.safetensors")
    torch.save(tensors, path / "pytorch_model.bin")
    submit(path, step=2, config=config_file)
    (ticket,) = by_step(tmp_path).values()
    assert all(os.path.samefile(path / n, Path(ticket.pin, n)) for n in ("model.safetensors", "pytorch_model.bin"))
    if when == "before":
        how(path)
    run(StandIn(during=lambda job: how(path) if when == "during" else None))
    assert evaluated(tmp_path)[2].endswith(outcome)
    assert (len(store.done(tmp_path / "queue")[0]) == 1) == (outcome == "length")


@pytest.mark.parametrize(
    ("gone", "outcome"),
    [
        ([], "length"),
        (["optimizer.pt", "trainer_state.json"], "length"),
        (["config.json"], "checkpoint-2/config.json: cannot be read (No such file or directory)"),
        (["model.safetensors"], "checkpoint-2/model.safetensors: cannot be read (No such file or directory)"),
        (None, "it was not pinned and is gone (deleted by retention?)"),
    ],
)  # fmt: skip
def test_a_half_deleted_checkpoint_is_refused(
    tmp_path: Path, config_file: Path, run: Run, gone: list[str] | None, outcome: str
) -> None:
    """Rotation ignores errors, so half of a checkpoint may stay; without a pin, that is what a runner finds."""
    trainer(tmp_path / "out", AutoEvalCallback(config_file, hook={"pin": "none"}), steps=2).train()
    path = tmp_path / "out" / "checkpoint-2"
    for name in os.listdir(path) if gone is None else gone:
        (path / name).unlink()
    if gone is None:
        path.rmdir()
    run(StandIn())
    assert outcome in evaluated(tmp_path)[2]


@pytest.mark.parametrize(
    ("lost", "checkpoint", "outcome"),
    [
        ("pin", "whole", "length"),
        ("file of the pin", "whole", "length"),
        ("pin", "gone", "its pin is gone"),
        ("pin", "rewritten", "its pin is gone"),
    ],
)
def test_a_lost_pin_is_made_up_for_by_the_checkpoint_itself(
    tmp_path: Path, config_file: Path, run: Run, caplog: pytest.LogCaptureFixture,
    lost: str, checkpoint: str, outcome: str,
) -> None:  # fmt: skip
    trainer(tmp_path / "out", AutoEvalCallback(config_file), steps=2).train()
    (ticket,) = by_step(tmp_path).values()
    if lost == "pin":
        pin.release(ticket.pin)
    else:
        Path(ticket.pin, "model.safetensors").unlink()
    path = tmp_path / "out" / "checkpoint-2"
    if checkpoint == "rewritten":
        rewritten(path)
    elif checkpoint == "gone":
        shutil.rmtree(path)
    evaluator = StandIn()
    run(evaluator)
    assert outcome in evaluated(tmp_path)[2]
    assert [job.path for job in evaluator.jobs] == [path] * (outcome == "length")
    assert any("is evaluated" in r.getMessage() for r in caplog.records) == (outcome == "length")


# ---------------------------------------------------------------------- saves that no event tells of


class Preempted(TrainerCallback):
    """Sends the SIGTERM of a batch system in step 3, and lets the step go on once the Trainer has taken note."""

    def __init__(self) -> None:
        self.trainer: Trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:      # it is counted later
            (jit,) = [c for c in self.trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
            jit.jit_manager.kill_wait = 0.0
            os.kill(os.getpid(), signal.SIGTERM)
            while not jit.jit_manager.is_checkpoint_requested:
                threading.Event().wait(0.01)


def preempted(out: Path, config: Path, **arguments: Any) -> Trainer:
    callback = Preempted()
    callback.trainer = trainer(out, AutoEvalCallback(config), callback, enable_jit_checkpoint=True, **arguments)
    return callback.trainer


def test_a_checkpoint_saved_on_sigterm_is_handed_over(tmp_path: Path, config_file: Path) -> None:
    trained = preempted(tmp_path / "out", config_file)
    trained.train()
    assert trained.state.global_step == 3
    assert sorted(by_step(tmp_path)) == [2, 3]
    assert all(whole(t) for t in by_step(tmp_path).values())


@pytest.mark.parametrize(("killed_in", "expected"), [("save_state", [2, 4, 6]), ("os_remove", [2, 3, 4, 6])])
def test_killed_in_the_save_on_sigterm(
    tmp_path: Path, config_file: Path, caplog: pytest.LogCaptureFixture, killed_in: str, expected: list[int]
) -> None:
    """SIGKILL while the sentinel stands, or right after it went; the next trainings sort it out."""
    out = tmp_path / "out"
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys; from pathlib import Path\n"
        "from transformers import trainer_jit_checkpoint as jit\n"
        "from tests.integration.test_retention import preempted\n"
        "trained = preempted(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "remove = os.remove\n"
        "def die(path):\n"
        "    if sys.argv[3] == 'os_remove':\n"
        "        remove(path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "jit.os = type('os', (), {'path': os.path, 'makedirs': os.makedirs, 'remove': staticmethod(die)})\n"
        "trained.train()\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script), str(out), str(config_file), killed_in], cwd=ROOT, timeout=240,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert ((out / "checkpoint-3" / manifest.INCOMPLETE).exists()) == (killed_in == "save_state")
    assert left(out) == [2, 3]
    resumed = str(out / ("checkpoint-2" if killed_in == "save_state" else "checkpoint-3"))
    trainer(out, AutoEvalCallback(config_file), steps=4).train(resume_from_checkpoint=resumed)
    trainer(out, AutoEvalCallback(config_file)).train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert sorted(by_step(tmp_path)) == expected
    refused = [r.getMessage() for r in caplog.records if "its save was cut off" in r.getMessage()]
    assert bool(refused) == (killed_in == "save_state")


@pytest.mark.parametrize(("save_strategy", "new"), [("steps", False), ("no", True)])
def test_a_final_save_model_fires_no_event_and_is_submitted_by_hand(
    tmp_path: Path, config_file: Path, save_strategy: str, new: bool
) -> None:
    trained = trainer(tmp_path / "out", AutoEvalCallback(config_file), steps=2, save_strategy=save_strategy)
    trained.train()
    before = by_step(tmp_path)
    trained.save_model(str(tmp_path / "out" / "final"))
    assert by_step(tmp_path) == before
    assert sorted(before) == ([] if new else [2])
    # The same weights of the same step and run are the same ticket, wherever they lie.
    assert submit(tmp_path / "out" / "final", step=2, config=config_file) == {"quick": new}


class Trial(dict[str, Any]):
    """A stand-in for an optuna trial, in a real Trainer."""

    number = 7
    params = "none"


def test_a_hyper_parameter_search_saves_elsewhere(
    tmp_path: Path, config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    trained = trainer(out, AutoEvalCallback(config_file, hook={"save_total_limit": 1}), save_total_limit=None)
    trained.hp_search_backend, trained.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    trained.train(trial=Trial())
    tickets = by_step(tmp_path)
    paths = [t.manifest.path for t in tickets.values()]
    assert sorted(paths) == [str(out / "run-7" / f"checkpoint-{n}") for n in (2, 4, 6)]
    assert all(whole(t) for t in tickets.values())
    assert left(out / "run-7") == [2, 4, 6]
    assert any("hook.save_total_limit = 1" in r.getMessage() for r in caplog.records)


def test_a_trial_that_is_handed_over_late_is_not_taken_for_a_later_one(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()
    away.set()

    def make(*arguments: Any) -> str:
        if away.is_set():
            raise OSError(122, "Disk quota exceeded")
        return made(*arguments)

    made = pin.make
    monkeypatch.setattr(pin, "make", make)
    monkeypatch.setattr("autoeval_hooks.delivery.FIRST_PAUSE_S", 0.1)
    callback, later = AutoEvalCallback(config_file, hook={"deadline": 2.0}), Trial()
    later.number = 8
    for trial in (Trial(), later):
        trained = trainer(tmp_path / "out", callback, steps=2)
        trained.hp_search_backend, trained.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
        trained.train(trial=trial)
    away.clear()
    queue, end = Queue(str(tmp_path / "queue")), time.monotonic() + 60
    while len(tokens := list(queue.tokens("pending"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    paths = {queue.read(token).manifest.path for token in tokens}
    assert paths == {str(tmp_path / "out" / f"run-{n}" / "checkpoint-2") for n in (7, 8)}


# ---------------------------------------------------------------------- whose rotation deletes what


def test_our_work_leaves_rotation_its_order(tmp_path: Path, config_file: Path) -> None:
    """Rotation goes by the directories' times once they differ by a second: a file written into an old checkpoint
    would make it the newest, and the newest would go."""
    out = tmp_path / "out"
    trainer(out).train()
    for age, step in enumerate((6, 4, 2), start=1):
        at = (out / f"checkpoint-{step}").stat().st_mtime - 100 * age
        os.utime(out / f"checkpoint-{step}", (at, at))
    before = {p: (p.stat().st_mtime_ns, sorted(os.listdir(p))) for p in out.glob("checkpoint-*")}
    for step in (2, 4, 6):
        submit(out / f"checkpoint-{step}", step=step, config=config_file)
    assert {p: (p.stat().st_mtime_ns, sorted(os.listdir(p))) for p in before} == before
    callback = AutoEvalCallback(config_file)
    trainer(out, callback, steps=8, save_total_limit=2).train(resume_from_checkpoint=str(out / "checkpoint-6"))
    assert left(out) == [6, 8]
    ours = [p.name for p in out.rglob("*") if ".autoeval" in p.parts]
    assert ours
    assert not [name for name in ours if name.startswith("checkpoint")]


@pytest.mark.parametrize(
    ("hook", "arguments", "stay"),
    [
        ({}, {}, [2, 4, 6]),
        ({"save_total_limit": 1}, {}, [6]),
        ({"save_total_limit": 2}, {}, [4, 6]),
        ({"save_total_limit": 1}, BEST_FIRST, [2, 6]),
        ({"save_total_limit": 1, "pin": "none"}, {}, [2, 4, 6]),       # each is waited for
    ],
)
def test_rotation_by_the_hook(
    tmp_path: Path, config_file: Path, run: Run, hook: dict[str, Any], arguments: dict[str, Any], stay: list[int]
) -> None:
    out = tmp_path / "out"
    trainer(out, AutoEvalCallback(config_file, hook=hook), **arguments).train()
    assert left(out) == stay
    run(StandIn())
    assert evaluated(tmp_path) == {2: "length", 4: "length", 6: "length"}
    # Now nothing waits for the older ones; the resumed training's first save lets them go.
    again = trainer(out, AutoEvalCallback(config_file, hook=hook), steps=8, **arguments)
    again.train(resume_from_checkpoint=str(out / "checkpoint-6"))
    limit = hook.get("save_total_limit")
    newest = [2, 4, 6, 8][-limit:] if limit else [2, 4, 6, 8]
    assert left(out) == sorted({*newest, *([2] if arguments else [])})


def test_what_is_not_handed_over_yet_is_not_rotated(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = Queue.enqueue

    def refuse(self: Queue, ticket: Ticket) -> bool:
        if ticket.manifest.step == 2:
            raise OSError(116, "Stale file handle")
        return enqueue(self, ticket)

    monkeypatch.setattr(Queue, "enqueue", refuse)
    monkeypatch.setattr("autoeval_hooks.delivery.FIRST_PAUSE_S", 3600.0)
    hook = {"save_total_limit": 1, "deadline": 0.3}
    trainer(tmp_path / "out", AutoEvalCallback(config_file, hook=hook)).train()
    assert left(tmp_path / "out") == [2, 6]
    # The next process does not know of it until it has looked what was left without a ticket, which it cannot at first.
    monkeypatch.setattr(Queue, "enqueue", enqueue)
    with monkeypatch.context() as patch:
        patch.setattr(Queue, "create", lambda self: os.stat("/dev/null/away"))
        again = trainer(tmp_path / "out", AutoEvalCallback(config_file, hook=hook), steps=8)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert sorted(by_step(tmp_path)) == [4, 6, 8]
    assert left(tmp_path / "out") == [2, 6, 8]
    again = trainer(tmp_path / "out", AutoEvalCallback(config_file, hook={"save_total_limit": 1}), steps=10)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert sorted(by_step(tmp_path)) == [2, 4, 6, 8, 10]
    assert left(tmp_path / "out") == [10]


def test_two_rotations_are_one_warning_and_the_trainers_own(
    tmp_path: Path, config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = {"save_total_limit": 1}
    trainer(tmp_path / "out", AutoEvalCallback(config_file, hook=hook), save_total_limit=2).train()
    assert left(tmp_path / "out") == [4, 6]
    told = [r.getMessage() for r in caplog.records]
    assert told == [
        f"autoeval: hook.save_total_limit = 1 of {config_file} is not used: the Trainer rotates by its own "
        "save_total_limit = 2; unset one of them"
    ]


def test_an_earlier_trainings_checkpoints_are_not_rotated(tmp_path: Path, config_file: Path) -> None:
    trainer(tmp_path / "out", steps=3, save_steps=3).train()
    trainer(tmp_path / "out", AutoEvalCallback(config_file, hook={"save_total_limit": 1})).train()
    assert left(tmp_path / "out") == [3, 6]


def test_a_rotation_that_fails_costs_a_warning(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> None:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr("autoeval_hooks.retention.shutil.rmtree", refuse)
    trained = trainer(tmp_path / "out", AutoEvalCallback(config_file, hook={"save_total_limit": 1}))
    trained.train()
    assert trained.state.global_step == 6
    assert any("checkpoints are not rotated this time" in r.getMessage() for r in caplog.records)
