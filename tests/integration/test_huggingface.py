"""The callback in a real Trainer: what it hands over, what it costs, and that training never notices."""

from __future__ import annotations

import copy
import errno
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Trainer

from autoeval_hooks import AutoEvalCallback, ConfigError, fsio, manifest, pin
from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket
from tests.trainer import handed_over, trainer, weights_digest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        f"""
queue: {tmp_path}/queue
run: {{tokens_per_step: 64}}
hook: {{deadline: 2.0}}
suites:
  quick: {{evaluators: [{{type: helm, entries: [a]}}]}}
  slow: {{every_steps: 4, priority: 1, evaluators: [{{type: helm, entries: [b]}}]}}
"""
    )
    return path


@pytest.fixture
def tickets(tmp_path: Path) -> Callable[[], dict[tuple[str, int], Ticket]]:
    return lambda: handed_over(tmp_path / "queue")


Tickets = Callable[[], dict[tuple[str, int], Ticket]]


def test_every_checkpoint_is_handed_over_and_outlives_retention(tmp_path: Path, config: Path, tickets: Tickets) -> None:
    trainer(tmp_path / "out", AutoEvalCallback(config), save_total_limit=1).train()
    found = tickets()
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6), ("slow", 4)]
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]
    for ticket in found.values():
        m = ticket.manifest
        assert (m.tokens, m.samples) == (64 * m.step, 4 * m.step)
        assert m.path == str(tmp_path / "out" / f"checkpoint-{m.step}")
        for file in m.files:
            assert manifest.record(ticket.pin, file.path) == file
    assert found["slow", 4].priority == 1
    assert found["slow", 4].manifest == found["quick", 4].manifest
    assert {f.path for f in found["quick", 2].manifest.files} == {
        "model.safetensors", "config.json", "generation_config.json",
    }  # fmt: skip


def test_the_next_save_waits_for_a_slow_pin(
    tmp_path: Path, config: Path, tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention deletes a checkpoint at the next save, which comes a hundred times sooner than this pin."""
    make = pin.make

    def slow(source: str, pins: str, way: str, ops: fsio.FileOps) -> str:
        time.sleep(0.3 if ".autoeval" not in source else 0)
        return make(source, pins, way, ops)

    monkeypatch.setattr(pin, "make", slow)
    trainer(tmp_path / "out", AutoEvalCallback(config), save_total_limit=1).train()
    assert sorted(tickets()) == [("quick", 2), ("quick", 4), ("quick", 6), ("slow", 4)]


def logged(trained: Trainer) -> list[dict[str, float]]:
    """What training logged, less what a clock says."""
    rows = trained.state.log_history
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def test_training_is_the_same_to_the_bit(tmp_path: Path, config: Path) -> None:
    without = trainer(tmp_path / "a")
    without.train()
    with_it = trainer(tmp_path / "b", AutoEvalCallback(config))     # seeds anew
    with_it.train()
    assert weights_digest(without) == weights_digest(with_it)
    assert logged(without) == logged(with_it)


def test_a_second_training_in_the_same_place_is_another_run_and_a_resumed_one_is_not(
    tmp_path: Path, config: Path, tickets: Tickets
) -> None:
    trainer(tmp_path / "out", AutoEvalCallback(config), steps=4).train()
    first = tickets()
    trainer(tmp_path / "out", AutoEvalCallback(config), steps=6).train(resume_from_checkpoint=True)
    resumed = tickets()
    assert sorted(resumed) == [*sorted(first)[:2], ("quick", 6), ("slow", 4)]
    assert len({t.manifest.run.id for t in resumed.values()}) == 1
    trainer(tmp_path / "out", AutoEvalCallback(config, queue=str(tmp_path / "other")), steps=2).train()
    other = Queue(str(tmp_path / "other"))
    (token,) = other.tokens("pending")      # not the older checkpoints, which lie there still
    assert other.read(token).manifest.run.id != first["quick", 2].manifest.run.id


def test_a_save_without_an_event_is_found_when_training_resumes(
    tmp_path: Path, config: Path, tickets: Tickets
) -> None:
    trainer(tmp_path / "out", steps=3, save_steps=3).train()     # an older training; its checkpoint-3 stays
    callback = AutoEvalCallback(config)
    first = trainer(tmp_path / "out", callback, steps=4)
    callback.on_save = lambda *a, **k: None  # type: ignore[method-assign]  # as a save on SIGTERM: no event
    callback._reconcile = lambda *a, **k: None  # type: ignore[method-assign]  # and no end of training
    first.train()
    assert tickets() == {}
    (tmp_path / "out" / "checkpoint-2" / manifest.INCOMPLETE).write_text("")
    again = trainer(tmp_path / "out", AutoEvalCallback(config))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert sorted(tickets()) == [("quick", 4), ("quick", 6), ("slow", 4)]


def test_of_a_training_that_began_without_us_only_the_checkpoint_resumed_from_is_ours(
    tmp_path: Path, config: Path, tickets: Tickets
) -> None:
    trainer(tmp_path / "out", steps=4).train()
    trainer(tmp_path / "out", AutoEvalCallback(config)).train(resume_from_checkpoint=True)
    assert sorted(tickets()) == [("quick", 4), ("quick", 6), ("slow", 4)]


def test_the_callback_can_be_copied_and_pickled(tmp_path: Path, config: Path, tickets: Tickets) -> None:
    callback = pickle.loads(pickle.dumps(copy.deepcopy(AutoEvalCallback(config, hook={"max_pins": 7}))))
    assert callback._config.hook.max_pins == 7
    trainer(tmp_path / "out", callback, steps=2).train()
    assert sorted(tickets()) == [("quick", 2)]


def test_what_is_handed_over_late_keeps_its_run(
    tmp_path: Path, config: Path, tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One callback, two trainings, and a queue that comes back in the middle of the second."""
    monkeypatch.setattr("autoeval_hooks.delivery.FIRST_PAUSE_S", 0.05)
    enqueue, away = Queue.enqueue, threading.Event()
    away.set()

    def flaky(self: Queue, ticket: Ticket) -> bool:
        if away.is_set():
            raise OSError(errno.ESTALE, "Stale file handle")
        return enqueue(self, ticket)

    monkeypatch.setattr(Queue, "enqueue", flaky)
    callback = AutoEvalCallback(config, hook={"deadline": 0.2})
    for name in ("one", "two"):
        trained = trainer(tmp_path / name, callback, steps=2 if name == "one" else 4)
        if name == "two":
            away.clear()
        trained.train()
    assert callback._delivery.finish(10)
    queue = Queue(str(tmp_path / "queue"))
    found = [queue.read(token).manifest for token in queue.tokens("pending")]
    ids = {Path(m.path).parent.name: m.run.id for m in found}
    assert set(ids) == {"one", "two"}
    for name, own in ids.items():
        assert (tmp_path / name / ".autoeval" / "run_id").read_text() == own
    assert all(m.run.id == ids[Path(m.path).parent.name] for m in found)


def test_a_save_without_an_event_is_found_when_training_ends(
    tmp_path: Path, config: Path, tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoeval_hooks.delivery.FIRST_PAUSE_S", 0.05)
    enqueue, failures = Queue.enqueue, iter(range(3))

    def flaky(self: Queue, ticket: Ticket) -> bool:
        if next(failures, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return enqueue(self, ticket)

    monkeypatch.setattr(Queue, "enqueue", flaky)
    callback = AutoEvalCallback(config)
    monkeypatch.setattr(callback, "on_save", lambda *a, **k: None)
    trainer(tmp_path / "out", callback).train()
    found = tickets()
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6), ("slow", 4)]
    pins = os.listdir(tmp_path / "out" / ".autoeval" / "pins")
    assert sorted(pins) == sorted(t.id for t in found.values())     # what failed meanwhile left none behind


def test_what_was_handed_over_is_not_read_again_when_training_ends(
    tmp_path: Path, config: Path, tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def build(directory: str, *, step: int, **known: object) -> manifest.Manifest:
        read.append(step)
        return build_manifest(directory, step=step, **known)    # type: ignore[arg-type]

    build_manifest = manifest.build
    monkeypatch.setattr(manifest, "build", build)
    trainer(tmp_path / "out", AutoEvalCallback(config)).train()
    assert sorted(tickets()) == [("quick", 2), ("quick", 4), ("quick", 6), ("slow", 4)]
    assert read == [2, 4, 6]


def test_a_hanging_file_system_costs_one_deadline_and_a_warning(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for_ever = threading.Event()
    monkeypatch.setattr(pin, "make", lambda *a: for_ever.wait())
    plain = trainer(tmp_path / "plain", steps=20)
    began = time.monotonic()
    plain.train()
    alone = time.monotonic() - began
    callback = AutoEvalCallback(config, hook={"deadline": 2.0})
    trained = trainer(tmp_path / "out", callback, steps=20)
    began = time.monotonic()
    trained.train()
    whole = time.monotonic() - began
    for_ever.set()
    assert whole - alone < 2.0 + 2.0 + 8.0      # ten saves, and not ten deadlines
    assert weights_digest(trained) == weights_digest(plain)
    assert [r.getMessage() for r in caplog.records if "delivery is behind" in r.getMessage()]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE])
def test_a_queue_that_cannot_be_written_costs_a_warning_and_pins_stay(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    create = fsio.FileOps.create

    def refuse(self: fsio.FileOps, path: str) -> int:
        if path.startswith(str(tmp_path / "queue")):
            raise OSError(error, os.strerror(error), path)
        return create(self, path)

    monkeypatch.setattr(fsio.FileOps, "create", refuse)
    trained = trainer(tmp_path / "out", AutoEvalCallback(config, hook={"deadline": 0.2}), save_total_limit=1)
    trained.train()
    assert trained.state.global_step == 6
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(os.strerror(error) in m and "will be tried again" in m for m in messages)
    assert any("python -m autoeval_hooks submit" in m for m in messages)
    assert len(list((tmp_path / "out" / ".autoeval" / "pins").iterdir())) >= 3      # what retention deleted is kept


def test_what_failed_for_a_while_is_handed_over_later(
    tmp_path: Path, config: Path, tickets: Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoeval_hooks.delivery.FIRST_PAUSE_S", 0.05)
    enqueue, failures = Queue.enqueue, iter(range(4))

    def flaky(self: Queue, ticket: Ticket) -> bool:
        if next(failures, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle")
        return enqueue(self, ticket)

    monkeypatch.setattr(Queue, "enqueue", flaky)
    trainer(tmp_path / "out", AutoEvalCallback(config), save_total_limit=1).train()
    found = tickets()
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6), ("slow", 4)]
    assert len(list((tmp_path / "out" / ".autoeval" / "pins").iterdir())) == 4


def test_an_exception_of_ours_does_not_reach_training_and_an_interrupt_does(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    callback = AutoEvalCallback(config)
    monkeypatch.setattr("autoeval_hooks.huggingface.identity", lambda config: 1 / 0)
    trained = trainer(tmp_path / "out", callback, steps=2)
    trained.train()
    assert trained.state.global_step == 2
    assert any("division by zero" in r.getMessage() for r in caplog.records)

    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoeval_hooks.huggingface.identity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "out2", callback, steps=2).train()


def test_nothing_of_ours_is_in_a_checkpoint_or_looks_like_one(tmp_path: Path, config: Path) -> None:
    trainer(tmp_path / "a").train()
    trainer(tmp_path / "b", AutoEvalCallback(config)).train()
    checkpoints = [{p.name: sorted(os.listdir(p)) for p in (tmp_path / x).glob("checkpoint-*")} for x in "ab"]
    assert checkpoints[0] == checkpoints[1]
    assert [p.name for p in (tmp_path / "b").rglob("checkpoint-*") if ".autoeval" in p.parts] == []


def test_only_rank_zero_acts_and_waits_for_no_other(tmp_path: Path, config: Path, tickets: Tickets) -> None:
    """The second rank writes its random state only once the first has handed the checkpoint over."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time; from pathlib import Path\n"
        "from transformers import Trainer\n"
        "from tests.trainer import handed_over, trainer; from autoeval_hooks import AutoEvalCallback\n"
        "save = Trainer._save_rng_state\n"
        "def late(self, output_dir):\n"
        "    end, step = time.monotonic() + 60, self.state.global_step\n"
        "    while ('quick', step) not in handed_over(Path(sys.argv[1]).parent / 'queue'):\n"
        "        assert time.monotonic() < end, 'the first rank waits for the second'\n"
        "        time.sleep(0.02)\n"
        "    assert not os.path.exists(os.path.join(output_dir, 'rng_state_1.pth'))\n"
        "    save(self, output_dir)\n"
        "if os.environ['RANK'] == '1':\n"
        "    Trainer._save_rng_state = late\n"
        "trainer(Path(sys.argv[1]), AutoEvalCallback(sys.argv[2]), steps=4, save_total_limit=1).train()\n"
        # Left to the interpreter's exit, gloo's threads abort one run in fifty on a busy machine, callback or not.
        "import torch; torch.distributed.destroy_process_group()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--local-addr", "127.0.0.1", str(script), str(tmp_path / "out"), str(config)],
        capture_output=True, text=True, cwd=ROOT, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = tickets()
    assert sorted(found) == [("quick", 2), ("quick", 4), ("slow", 4)]
    assert found["quick", 4].manifest.samples == 4 * 2 * 4
    for ticket in found.values():       # of checkpoint-2 the pin is the last copy
        assert all(manifest.record(ticket.pin, file.path) == file for file in ticket.manifest.files)
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    assert (tmp_path / "out" / "checkpoint-4" / "rng_state_1.pth").exists()


def test_a_bad_configuration_is_one_error_before_training(tmp_path: Path, config: Path) -> None:
    config.write_text(config.read_text().replace("deadline", "deadlin"))
    with pytest.raises(ConfigError, match=r"autoeval.yaml: hook.deadlin: unknown key; did you mean 'deadline'\?"):
        AutoEvalCallback(config)


def test_checkpoints_without_weights_are_named_and_passed_over(
    tmp_path: Path, config: Path, tickets: Tickets, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "WEIGHTS", ("*.nothing",))
    trainer(tmp_path / "out", AutoEvalCallback(config), steps=2).train()
    assert tickets() == {}
    assert any("checkpoint-2: no weights" in r.getMessage() for r in caplog.records)
    assert os.listdir(tmp_path / "out" / ".autoeval" / "pins") == []
