"""The callback for Megatron-Bridge, in a stand-in for its training: what it hands over, and that training never
notices."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import manifest, pin, relay
from autoeval_hooks.errors import ConfigError
from autoeval_hooks.megatron_bridge import AutoEvalCallback
from autoeval_hooks.queue import Queue
from autoeval_hooks.ticket import Ticket
from tests.bridge_stand_in import Bridge, Manager, configuration, modules, nothing, write
from tests.unit.test_relay import StandInRun
from tests.wandb_trainer import drop

ROOT = Path(__file__).parents[2]
Make = Callable[..., Bridge]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text("queue: queue\nhook: {deadline: 2.0}\nsuites: {quick: {evaluators: [{type: helm}]}}\n")
    return path


@pytest.fixture
def bridge(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a training with the callback in it; keywords of `Bridge` and of Bridge's own `checkpoint` section."""
    wandb_utils = modules(monkeypatch)

    def make(manager: Any = None, **settings: Any) -> Bridge:
        mine = {k: settings.pop(k) for k in [*settings] if k in Bridge.__dataclass_fields__}
        manager = manager or Manager()
        manager.add(AutoEvalCallback(config))
        return Bridge(manager, wandb_utils, configuration(tmp_path / "out", **settings), **mine)

    return make


@pytest.fixture
def tickets(tmp_path: Path) -> Callable[[], dict[int, Ticket]]:
    def read() -> dict[int, Ticket]:
        queue = Queue(str(tmp_path / "queue"))
        found = [queue.read(token) for token in queue.tokens("pending")]
        assert len({t.manifest.step for t in found}) == len(found), "a checkpoint was handed over twice"
        return {t.manifest.step: t for t in found}

    return read


Tickets = Callable[[], dict[int, Ticket]]


@pytest.mark.parametrize("behind", [None, 1, 3])
def test_every_save_is_handed_over_with_its_own_step(bridge: Make, tickets: Tickets, behind: int | None) -> None:
    """Asynchronous saves are complete only `behind` steps later."""
    bridge(async_save=behind is not None, behind=behind or 0).train()
    found = tickets()
    assert sorted(found) == [2, 4, 6]
    for step, ticket in found.items():
        m = ticket.manifest
        assert (m.samples, m.tokens, Path(m.path).name) == (4 * step, 64 * step, f"iter_{step:07d}")
        assert m.megatron is not None
        assert (m.megatron.format, m.megatron.tokenizer_type) == ("torch_dist", "NullTokenizer")
        assert (m.megatron.seq_length, m.megatron.num_layers, m.megatron.world_size) == (16, 2, 1)
        assert m.megatron.tokenizer == {"vocab_size": "127"}
        assert Path(ticket.pin, "__0_0.distcp").read_text() == f"weights of {step}"
        assert Path(ticket.pin, "run_config.yaml").is_file()    # Bridge cannot convert a checkpoint without


def test_what_bridge_deletes_is_pinned_before(
    bridge: Make, tickets: Tickets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for `iter_*` in all directories below, and must find nothing of ours."""
    make = pin.make
    slept: list[str] = []

    def slow(source: str, *rest: Any) -> str:
        if ".autoeval" not in source:
            slept.append(source)
            time.sleep(0.3)
        return make(source, *rest)

    monkeypatch.setattr(pin, "make", slow)
    bridge(most_recent_k=1).train()
    assert sorted(tickets()) == [2, 4, 6]
    assert len(slept) == 3
    assert [path.name for path in (tmp_path / "out").rglob("iter_*")] == ["iter_0000006"]


def test_passing_saves_are_left_alone(
    bridge: Make, tickets: Tickets, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the save before them handed over once more."""
    make = pin.make
    pinned: list[str] = []

    def counted(source: str, *rest: Any) -> str:
        pinned.append(Path(source).name)
        return make(source, *rest)

    monkeypatch.setattr(pin, "make", counted)
    bridge(kinds={1: "global", 3: "local", 5: "local"}).train()
    assert sorted(tickets()) == [2, 4, 6]
    assert [name for name in pinned if name.startswith("iter_")] == ["iter_0000002", "iter_0000004", "iter_0000006"]
    assert caplog.records == []


def test_what_another_training_of_the_process_saved_is_not_ours(bridge: Make, tickets: Tickets) -> None:
    bridge().train()
    before = tickets()
    second = bridge(kinds={1: "local"})
    second.cfg.train.train_iters = 1
    second.train()
    assert tickets() == before
    assert second.wandb_utils.on_save_checkpoint_success.__wrapped__ is nothing     # it was wrapped once


@pytest.mark.parametrize(("rank", "expected"), [(0, []), (1, [2, 4, 6])])
def test_only_the_last_rank_acts(
    bridge: Make, tickets: Tickets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, expected: list[int]
) -> None:
    distributed = types.SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: rank, get_world_size=lambda: 2
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)  # type: ignore[arg-type]
    bridge().train()
    assert (tmp_path / "queue").exists() == bool(expected)
    assert sorted(tickets() if expected else []) == expected


def test_a_resumed_training_hands_over_what_has_no_ticket(
    bridge: Make, tickets: Tickets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = bridge()
    first.cfg.train.train_iters = 4
    first.train()
    write(tmp_path / "out/iter_0000005", "weights of 5")    # complete, and then its process was killed
    (tmp_path / "out/iter_0000003").mkdir()
    (tmp_path / "out/iter_0000003/__0_0.distcp").write_text("half of it")
    bridge(step=5).train()
    assert sorted(tickets()) == [2, 4, 5, 6]
    assert "iter_0000003" in caplog.text


def test_a_save_that_comes_again_is_known(bridge: Make, tickets: Tickets) -> None:
    bridge().train()
    before = tickets()
    bridge(step=3).train()
    assert tickets() == before


def test_training_does_not_notice_that_the_queue_cannot_be_made(
    bridge: Make, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "queue").write_text("a file")
    config.write_text(config.read_text().replace("2.0", "0.1"))
    training = bridge()
    training.train()
    assert training.train_state.step == 6
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert "python -m autoeval_hooks submit" in caplog.text


def test_another_bridge_is_one_warning(
    bridge: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = bridge()
    del training.wandb_utils.on_save_checkpoint_success
    training.save = lambda kind="": training.fire("on_checkpoint_save")  # type: ignore[method-assign]
    training.train()
    assert not (tmp_path / "queue").exists()
    (record,) = caplog.records
    assert "on_train_start failed and was passed over" in record.message


@pytest.mark.parametrize("save", [None, "msc://bucket/run"])
def test_no_directory_is_one_warning(bridge: Make, caplog: pytest.LogCaptureFixture, save: str | None) -> None:
    training = bridge()
    training.cfg.checkpoint.save = save
    training.fire("on_train_start")
    (record,) = caplog.records
    assert "checkpoint.save names no directory" in record.message


def test_a_wrong_configuration_is_an_error_before_training(config: Path) -> None:
    config.write_text(config.read_text() + "quueue: q\n")
    with pytest.raises(ConfigError, match="quueue"):
        AutoEvalCallback(config)


def test_a_signal_ends_training_without_an_event(config: Path, tmp_path: Path, tickets: Tickets) -> None:
    """`on_train_end` is not fired then; what is on its way gets there all the same."""
    code = f"""
        import time
        from pathlib import Path
        import pytest
        from autoeval_hooks import handover
        from autoeval_hooks.megatron_bridge import AutoEvalCallback
        from tests.bridge_stand_in import Bridge, Manager, configuration, modules
        run = handover.Handover.run
        handover.Handover.run = lambda self: (time.sleep(0.5), run(self))
        manager = Manager()
        manager.add(AutoEvalCallback({str(config)!r}))
        wandb_utils = modules(pytest.MonkeyPatch())
        Bridge(manager, wandb_utils, configuration(Path({str(tmp_path / "out")!r})), leaves_at=3).train()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True, timeout=60)
    assert sorted(tickets()) == [2, 3]


def test_points_join_rows_that_are_new(bridge: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points never join one row: with `log_interval`, many steps have none."""
    monkeypatch.setattr(relay, "POLL_S", 0.005)
    run = Run()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))  # type: ignore[arg-type]
    given = []

    def log(step: int) -> None:
        if step == 3:
            (directory,) = (tmp_path / "queue/relay").iterdir()
            drop(directory, [1, 2])
            given.append(directory)
        if step >= 3:
            time.sleep(0.1)    # the relay reads what was given
        if step % 3 == 0:
            run.log({"loss": 1.0}, step=step)

    training = bridge(log=log, save_interval=1)
    training.cfg.train.train_iters = 12
    training.cfg.logger.tensorboard_log_interval = 3
    training.train()
    assert run.steps == [1.0, 2.0], run.rows
    assert [row["loss"] for row in [*run.rows, run.open] if row] == [1.0] * 4
    assert (given[0] / "ended.json").exists()


class Run(StandInRun):
    """A W&B run that is logged into by step, as Bridge does; `step` is that of the open row."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.name = self.project = self.entity = self.group = self.dir = ""
        self.settings = types.SimpleNamespace(base_url="", mode="offline")

    def log(self, data: dict[str, float], commit: bool = True, step: int | None = None) -> None:
        if step is not None and step > self.step:
            super().log({}, commit=True)
            self.step = step
        super().log(data, commit=False)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, autoeval_hooks.megatron_bridge; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_manifest_is_that_of_the_pin(bridge: Make, tickets: Tickets) -> None:
    bridge().train()
    for ticket in tickets().values():
        for file in ticket.manifest.files:
            assert manifest.record(ticket.pin, file.path) == file
