"""A loop of one's own: what `AutoEval` hands over, what it waits for, and what never reaches training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import AutoEval, CheckpointError, ConfigError, config, exports, fsio, loop, manifest, pin
from autoeval_hooks import relay as relays
from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket
from tests.processes import wait_for
from tests.unit.test_imports import FORBIDDEN, modules_after
from tests.unit.test_relay import StandInRun
from tests.unit.test_watch import safetensors

ROOT = Path(__file__).parents[2]
Checkpoint = Callable[..., Path]


def handed_over(root: Path) -> dict[tuple[str, int], Ticket]:
    """(suite, step) → the ticket."""
    queue = Queue(str(root))
    found = [queue.read(token) for token in queue.tokens("pending")] if root.exists() else []
    return {(t.suite, t.manifest.step): t for t in found}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(
        f"queue: {tmp_path}/queue\n"
        "run: {tokens_per_step: 10}\n"
        "hook: {deadline: 2.0}\n"
        "suites: {quick: {every_steps: 2, evaluators: [{type: helm, entries: [a]}]}}\n"
    )
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_checkpoints_that_are_due_are_handed_over_and_outlive_their_deletion(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = pin.make

    def slow(source: str, pins: str, way: str, ops: object) -> str:
        time.sleep(0.1 if ".autoeval" not in source else 0)
        return make(source, pins, way, ops)  # type: ignore[arg-type]

    monkeypatch.setattr(pin, "make", slow)
    with AutoEval(file, tmp_path / "out") as autoeval:
        before: Path | None = None
        for step in range(1, 7):
            path = checkpoint(step, f"weights of {step}".encode())
            autoeval.saved(path, step, samples=3 * step, tokens=7 if step == 4 else None)
            if before is not None:
                shutil.rmtree(before)       # as a loop does that keeps only the newest
            before = path
    found = handed_over(tmp_path / "queue")
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6)]
    assert {(m.step, m.tokens, m.samples) for m in (t.manifest for t in found.values())} == {
        (2, 20, 6), (4, 7, 12), (6, 60, 18),
    }  # fmt: skip
    assert len({t.manifest.run.id for t in found.values()}) == 1
    for ticket in found.values():
        assert all(manifest.record(ticket.pin, f.path) == f for f in ticket.manifest.files)


def test_what_is_written_again_waits_for_the_pin(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = pin.make
    monkeypatch.setattr(pin, "make", lambda *a: (time.sleep(0.2), make(*a))[1])
    path = checkpoint(2, b"first", name="latest")
    autoeval = AutoEval(file, tmp_path / "out")
    autoeval.saved(path, 2)
    autoeval.settle()
    shutil.rmtree(path)
    autoeval.close()
    (ticket,) = handed_over(tmp_path / "queue").values()
    assert Path(ticket.pin, "model.safetensors").read_bytes() == b"first"


def test_a_fresh_training_is_another_run_and_a_resumed_one_is_not(
    tmp_path: Path, file: Path, checkpoint: Checkpoint
) -> None:
    ids = []
    for step, resumed_at in ((2, 0), (4, 2), (6, 0)):
        with AutoEval(file, tmp_path / "out", resumed_at=resumed_at) as autoeval:
            autoeval.saved(checkpoint(step, b"%d" % step), step)
        ids.append((tmp_path / "out/.autoeval/run_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    assert {t.manifest.step: t.manifest.run.id for t in handed_over(tmp_path / "queue").values()} == dict(
        zip((2, 4, 6), ids, strict=True)
    )


def test_what_a_killed_training_left_is_handed_over_when_it_resumes(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for path in checkpoint(8, safetensors(b"of another training")).iterdir():
        os.utime(path, (1, 1))
    AutoEval(file, tmp_path / "out").close()
    checkpoint(2, safetensors(b"2"))
    checkpoint(3, safetensors(b"3, not due"))
    shutil.copytree(checkpoint(4, safetensors(b"4")), tmp_path / "out/notes-4")
    (checkpoint(6, safetensors(b"6")) / manifest.INCOMPLETE).write_text("")
    checkpoint(10, safetensors(b"later than what it resumes from"))
    AutoEval(file, tmp_path / "out", resumed_at=8).close()
    assert sorted(handed_over(tmp_path / "queue")) == [("quick", 2), ("quick", 4)]
    assert not warnings(caplog)


def cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes(safetensors(b"w" * 1000)[:-1])


def two_of_three(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00003.safetensors")
    shutil.copy(path / "model-00001-of-00003.safetensors", path / "model-00002-of-00003.safetensors")


def no_end(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "trainer_state.json").unlink()
    (path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


@pytest.mark.parametrize(
    ("kill", "said"), [(cut, "has 1073 of 1074 bytes"), (two_of_three, "no index"), (no_end, "has no end")]
)
def test_what_it_was_killed_in_is_passed_over(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture,
    kill: Callable[[Path], None], said: str,
) -> None:  # fmt: skip
    AutoEval(file, tmp_path / "out").close()
    checkpoint(2, safetensors())
    kill(checkpoint(4, safetensors(b"4")))
    AutoEval(file, tmp_path / "out", resumed_at=4).close()
    assert sorted(handed_over(tmp_path / "queue")) == [("quick", 2)]
    (message,) = warnings(caplog)
    assert "passed over" in message
    assert said in message


def test_only_the_main_process_acts(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(2)
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "1")
    autoeval = AutoEval(file, tmp_path / "out")
    autoeval.saved(path, 2)
    autoeval.logged(2)
    autoeval.close()
    assert not (tmp_path / "queue").exists()
    dist = types.SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 0)
    monkeypatch.setitem(sys.modules, "torch.distributed", dist)  # type: ignore[arg-type]
    assert loop.is_main()       # it knows better than the launcher's variable


@pytest.mark.parametrize(
    ("variables", "main"),
    [
        ({}, True),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True),     # a batch script, an salloc shell, or srun's first
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8"}, False),
        ({"SLURM_PROCID": "1", "RANK": "0"}, True),             # torchrun on each node
        ({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_RANK": "1"}, False),    # mpirun in a batch script
        ({"SLURM_PROCID": "0", "PMI_RANK": "1"}, False),
        ({"SLURM_PROCID": "0", "PMIX_RANK": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, True),
        ({"RANK": "", "SLURM_PROCID": "0"}, True),
    ],
)  # fmt: skip
def test_the_launcher_says_which_process_is_the_main_one(
    variables: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # type: ignore[arg-type]
    for name in loop.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert loop.is_main() is main


def test_weights_without_a_model_are_given_up_with_the_remedy(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoint(2)
    (path / "config.json").unlink()
    with AutoEval(file, tmp_path / "out") as autoeval:
        autoeval.saved(path, 2)
        autoeval.saved(tmp_path / "out/nowhere", 4)
    first, second = warnings(caplog)
    assert f"{path}: no config.json" in first
    assert "save_pretrained" in first
    assert "nowhere: cannot be listed" in second
    assert not handed_over(tmp_path / "queue")


def test_a_hanging_file_system_costs_one_deadline_and_a_warning(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for_ever = threading.Event()

    def hang(*given: object) -> None:
        for_ever.wait()
        raise CheckpointError("the test is over")

    monkeypatch.setattr(pin, "make", hang)
    paths = [checkpoint(step) for step in range(2, 22, 2)]
    began = time.monotonic()
    autoeval = AutoEval(file, tmp_path / "out", hook={"deadline": 0.3})
    for step, path in zip(range(2, 22, 2), paths, strict=True):
        autoeval.saved(path, step)
    assert 0.3 <= time.monotonic() - began < 1.0
    assert len([w for w in warnings(caplog) if "delivery is behind" in w]) == 1
    autoeval.close()
    assert "python -m autoeval_hooks submit" in warnings(caplog)[-1]
    for_ever.set()


def test_faults_of_ours_do_not_reach_the_loop(
    tmp_path: Path, file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    autoeval = AutoEval(file, tmp_path / "out")
    monkeypatch.setattr(loop, "identity", lambda config: 1 / 0)
    autoeval.saved(checkpoint(2), 2)
    autoeval.saved(tmp_path, "four")  # type: ignore[arg-type]
    assert any("division by zero" in w for w in warnings(caplog))
    with pytest.raises(ConfigError, match="no_such_key"):
        AutoEval(file, tmp_path / "out", no_such_key=1)


def test_a_loop_that_ends_without_close_has_its_checkpoints_handed_over(
    tmp_path: Path, file: Path, checkpoint: Checkpoint
) -> None:
    path = checkpoint(2)
    program = (
        "import sys, time; from autoeval_hooks import AutoEval, pin\n"
        "make = pin.make\n"
        "pin.make = lambda *a: (time.sleep(0.3), make(*a))[1]\n"
        "AutoEval(sys.argv[1], sys.argv[2]).saved(sys.argv[3], 2)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(file), str(tmp_path / "out"), str(path)], check=True, cwd=ROOT, timeout=60
    )
    assert sorted(handed_over(tmp_path / "queue")) == [("quick", 2)]


@pytest.fixture
def wandb_run(monkeypatch: pytest.MonkeyPatch) -> StandInRun:
    """A stand-in for an open W&B run; its module is imported, and the run comes when a test sets it."""
    for key, value in {"POLL_S": 0.005, "BEAT_S": 0.02, "GRACE_S": 0.05, "END_WAIT_S": 2.0}.items():
        monkeypatch.setattr(relays, key, value)
    run = StandInRun()
    run.settings = types.SimpleNamespace(base_url="", mode="offline")  # type: ignore[attr-defined]
    run.name, run.project, run.entity, run.group = "n", "p", "", ""  # type: ignore[attr-defined]
    return run


def test_a_wandb_run_that_opens_later_is_found_and_its_end_is_told(
    tmp_path: Path, file: Path, wandb_run: StandInRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = types.SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    autoeval = AutoEval(file, tmp_path / "out", last_step=9)
    autoeval.logged(1)
    wandb.run = wandb_run
    autoeval.logged(2)
    wait_for(lambda: list((tmp_path / "queue").glob("relay/*/run.json")))
    (directory,) = (tmp_path / "queue/relay").iterdir()
    announced = json.loads((directory / "run.json").read_text())
    assert (announced["logs_by_step"], announced["planned_last_step"]) == (True, 9)
    wait_for(lambda: autoeval._loop is not None and autoeval._loop._relay)
    autoeval.logged(8)
    assert not (directory / "ended.json").exists()
    autoeval.logged(9)
    wait_for(lambda: (directory / "ended.json").exists(), 5)      # before `close`: W&B may be finished by then
    assert json.loads((directory / "ended.json").read_text())["complete"] is True
    again = AutoEval(file, tmp_path / "out")        # by its W&B run it is the same training
    own = (tmp_path / "out/.autoeval/run_id").read_text()
    again.close()
    assert (tmp_path / "out/.autoeval/run_id").read_text() == own
    wandb.run = None


def test_the_loops_load_nothing_heavy() -> None:
    names = modules_after("from autoeval_hooks import AutoEval, save_and_submit; import autoeval_hooks.exports")
    assert not names & (FORBIDDEN | {"accelerate", "lightning"})


# ---------------------------------------------------------------------- exports


def test_an_export_goes_once_no_ticket_needs_it(tmp_path: Path, file: Path) -> None:
    directory = exports.directory(str(tmp_path / "out"))
    settings = config.load(file)

    def export(to: str) -> None:
        Path(to, "config.json").write_text("{}")
        Path(to, "model.safetensors").write_bytes(os.urandom(8))

    unpinned = AutoEval(file, directory, hook={"pin": "none"})
    pinned = AutoEval(file, directory)
    for step, autoeval in ((2, unpinned), (4, pinned), (5, pinned)):
        exports.write(exports.path_of(directory, step), export)
        autoeval.saved(exports.path_of(directory, step), step)
    pinned.close()
    unpinned.close()
    kept = [Path(directory, name) for name in ("checkpoint-4", "notes", "step-x")]
    for path in kept:
        path.mkdir()
    died = Path(directory, pin.make(exports.path_of(directory, 2), directory, "copy")).rename(
        Path(directory, ".new-" + fsio.hostname() + "-999999999-00000000")
    )
    queue = Queue(settings.queue)
    assert exports.tidy(queue, directory, lambda: {exports.path_of(directory, 5)}) == [died.name, "step-4"]
    assert exports.tidy(queue, directory, lambda: ()) == ["step-5"]     # not due: nobody waits for it
    assert sorted(os.listdir(directory)) == sorted([".autoeval", "step-2", *(p.name for p in kept)])
    (token,) = [t for t in queue.tokens("pending") if queue.read(t).manifest.step == 2]
    assert queue.cancel(token, "no longer wanted")
    assert exports.tidy(queue, directory, lambda: ()) == ["step-2"]


def test_an_export_that_fails_leaves_nothing_and_the_one_before_stays(tmp_path: Path) -> None:
    path = exports.path_of(str(tmp_path / "e"), 2)
    exports.write(path, lambda to: Path(to, "a").write_text("first") and None)

    def fails(to: str) -> None:
        Path(to, "a").write_text("second")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        exports.write(path, fails)
    assert os.listdir(tmp_path / "e") == ["step-2"]
    assert Path(path, "a").read_text() == "first"
    exports.write(path, lambda to: Path(to, "a").write_text("third") and None)
    assert Path(path, "a").read_text() == "third"
