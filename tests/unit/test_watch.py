"""What a watcher hands over, passes over and waits for, look after look, in directories made by the test."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoeval_hooks import handover
from autoeval_hooks.errors import AutoEvalError
from autoeval_hooks.queue import Queue
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import config as configs
from eval_runner.stop import Stop
from eval_runner.watching import given as givens
from eval_runner.watching import watcher as watchers
from eval_runner.watching.given import Giver
from eval_runner.watching.looks import TRACKER
from eval_runner.watching.watcher import SETTLE_S, Wanted, Watcher
from tests import megatron_layouts

OURS = """queue: queue
run: {tokens_per_step: 10}
suites: {quick: {every_steps: 10, evaluators: [{type: helm, entries: [a]}]}}
sinks: []
"""


def safetensors(content: bytes = b"weights") -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return struct.pack("<Q", len(header)) + header + content


def huggingface(directory: Path, step: int, content: bytes = b"") -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(safetensors(content or f"weights of {step}".encode()))
    for name in ("config.json", "tokenizer.json", "trainer_state.json"):
        (path / name).write_text("{}")
    return path


def megatron(directory: Path, step: int, tracker: int | None = None, content: bytes = b"") -> Path:
    path = megatron_layouts.torch_dist(directory / f"iter_{step:07d}", content or f"weights of {step}".encode())
    (directory / TRACKER).write_text(str(step if tracker is None else tracker))
    return path


class Watch:
    """A watcher that a test looks with, and what it said and enqueued."""

    def __init__(self, base: Path, *directories: str, text: str = OURS, **wanted: Any) -> None:
        self.config_file = base / "autoeval.yaml"
        self.config_file.write_text(text)
        self.said: list[str] = []
        self.config = configs.load(self.config_file)
        Queue(str(self.config.queue)).create()
        places = tuple(str(base / directory) for directory in directories or ("out",))
        giver = Giver(self.config, several=len(places) > 1)
        self.watcher = Watcher(giver, places, Wanted(**wanted), None, self.said.append)

    def looks(self, times: int = 2) -> bool:
        return [self.watcher.look() for _ in range(times)][-1]

    def steps(self) -> list[int]:
        queue = Queue(str(self.config.queue))
        return sorted(queue.ticket(token.ticket).manifest.step for token in queue.tokens("pending"))

    def passed(self) -> list[str]:
        return [line.rpartition(": ")[2] for line in self.said if "passed over, for a later" in line]

    def gone(self) -> list[str]:
        return [line.rpartition(": ")[2] for line in self.said if "were deleted before" in line]

    def runs(self) -> list[RunIdentity]:
        return [self.watcher.giver.run(directory) for directory in self.watcher.directories]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which checkpoints were handed over, each of which is read then."""
    found: list[str] = []
    work = handover.Handover.prepare

    def prepare(self: handover.Handover) -> None:
        found.append(os.path.basename(self.save.path))
        work(self)

    monkeypatch.setattr(handover.Handover, "prepare", prepare)
    return found


# ---------------------------------------------------------------------- which steps


@given(st.integers(0, 50), st.one_of(st.none(), st.integers(0, 60)), st.one_of(st.none(), st.integers(1, 20)),
       st.integers(-1, 70), st.integers(-1, 70))  # fmt: skip
def test_the_steps_are_those_of_the_older_tools_loop(
    begin: int, end: int | None, interval: int | None, after: int, saved: int
) -> None:
    wanted = Wanted(begin, end, interval)
    listed, step = [], begin        # evaluator.py: cur_iter from begin to end, by the interval
    while step <= (80 if end is None else end):
        listed.append(step)
        step += interval or 1
    assert [s for s in range(81) if wanted.has(s)] == [s for s in listed if s <= 80]
    expected = [s for s in listed if after < s <= saved] if interval else []
    assert list(wanted.expected(after, saved)) == expected
    if end is not None and interval and listed:
        assert wanted.last == listed[-1]


# ---------------------------------------------------------------------- complete, and settled


def test_a_checkpoint_is_handed_over_once_it_stands_still(tmp_path: Path, out: Path) -> None:
    path = huggingface(out, 10)
    watch = Watch(tmp_path)
    assert not watch.looks(1)
    assert watch.steps() == []
    assert watch.watcher.pause(1800) == SETTLE_S
    (path / "model.safetensors").write_bytes(safetensors(b"more of it"))
    watch.looks(1)
    assert watch.steps() == []
    watch.looks(1)
    assert watch.steps() == [10]
    assert watch.watcher.pause(1800) == 1800
    ticket = Queue(str(watch.config.queue)).ticket(os.listdir(watch.config.queue / "tickets")[0])
    assert ticket.manifest.tokens == 100
    assert ticket.manifest.saved_at == pytest.approx(path.joinpath("model.safetensors").stat().st_mtime, abs=5)
    assert ticket.pin.startswith(str(out))


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def no_shard(path: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def no_index(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "trainer_state.json").unlink()


def no_zip_end(path: Path) -> None:
    no_weights(path)
    (path / "pytorch_model.bin").write_bytes(megatron_layouts.saved(b"w")[:-30])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (cut, "bytes so far"),
        (no_shard, "has no model-2.safetensors so far"),
        (no_index, "and no index so far"),
        (no_weights, "holds no weights so far"),
        (no_zip_end, "has no end"),
        (lambda path: (path / "config.json").unlink(), "has no config.json so far"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x01"), "no whole header"),
        (lambda path: (path / "checkpoint-is-incomplete.txt").touch(), "cut off"),
    ],
)
def test_a_hugging_face_save_that_is_not_over_is_waited_for(
    tmp_path: Path, out: Path, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(huggingface(out, 10))
    watch = Watch(tmp_path, end=10)
    assert not watch.looks(3)
    assert watch.steps() == []
    assert [line for line in watch.said if why in line] == watch.said      # once
    shutil.rmtree(out / "checkpoint-10")
    huggingface(out, 10)
    assert watch.looks()
    assert watch.steps() == [10]


def test_megatrons_tracker_and_files_both_count(tmp_path: Path, out: Path) -> None:
    path = megatron(out, 10, tracker=0)
    watch = Watch(tmp_path, begin=10, interval=10)
    watch.looks(3)
    assert watch.steps() == []
    (path / "metadata.json").unlink()
    for torn in ("", "release", "10"):
        (out / TRACKER).write_text(torn)
        watch.looks()
        assert watch.steps() == []
    megatron(out, 10)
    watch.looks()
    assert watch.steps() == [10]


def test_a_rewound_training_is_waited_for_and_evaluated_anew(tmp_path: Path, out: Path) -> None:
    for step in (10, 20, 30):
        megatron(out, step)
    (out / TRACKER).write_text("10")        # resumed from 10: what stands beyond will be written again
    watch = Watch(tmp_path, begin=10, interval=10, end=30)
    assert not watch.looks(3)
    assert (watch.steps(), watch.gone()) == ([10], [])
    megatron(out, 20, content=b"written again")
    assert not watch.looks()
    megatron(out, 30)
    assert watch.looks()
    assert watch.steps() == [10, 20, 30]
    megatron(out, 20, tracker=20, content=b"and again")
    watch.looks()
    assert watch.steps() == [10, 20, 20, 30]


# ---------------------------------------------------------------------- deleted, late, refused


def test_a_deleted_step_is_reported_once_and_never_waited_for(tmp_path: Path, out: Path) -> None:
    for step in (10, 40):
        huggingface(out, step)
    watch = Watch(tmp_path, begin=10, interval=10, end=40)
    assert watch.looks(4)
    assert (watch.steps(), watch.passed()) == ([10, 40], ["20, 30"])
    huggingface(out, 20)        # a copy that came late
    assert not watch.looks(1)
    assert watch.looks(1)
    assert (watch.steps(), watch.passed()) == ([10, 20, 40], ["20, 30"])


def test_many_missing_ones_are_one_line(tmp_path: Path, out: Path) -> None:
    huggingface(out, 1000)
    watch = Watch(tmp_path, begin=10, interval=10)
    watch.looks(3)
    assert watch.passed() == ["10, 20, 30, 40, 50 and 94 more"]


@pytest.mark.parametrize("interval", [10, None])
@pytest.mark.parametrize("spoil", [cut, lambda path: None])
def test_one_that_went_between_two_looks_is_reported(
    tmp_path: Path, out: Path, spoil: Callable[[Path], None], interval: int | None
) -> None:
    spoil(huggingface(out, 10))
    watch = Watch(tmp_path, begin=10, interval=interval)
    watch.looks(1)
    shutil.rmtree(out / "checkpoint-10")
    watch.looks(2)
    huggingface(out, 20)
    watch.looks(3)
    assert (watch.steps(), watch.passed(), watch.gone()) == ([20], [], ["10"])


def test_a_save_that_was_cut_off_is_passed_over_once_a_later_one_is_there(tmp_path: Path, out: Path) -> None:
    cut(huggingface(out, 10))
    huggingface(out, 20)
    watch = Watch(tmp_path, begin=10, interval=10, end=20)
    assert watch.looks(3)
    assert watch.steps() == [20]
    assert sum("so it is passed over unless it changes" in line for line in watch.said) == 1


def test_one_that_can_never_be_evaluated_is_passed_over(tmp_path: Path, out: Path, hashed: list[str]) -> None:
    path = huggingface(out, 10)
    (path / "model.safetensors").unlink()       # a sharded FSDP save: training went on, and there are no weights
    watch = Watch(tmp_path, end=10)
    assert watch.looks(4)
    assert (watch.steps(), hashed) == ([], ["checkpoint-10"])
    assert sum("step 10 is passed over" in line and "no weights" in line for line in watch.said) == 1


# ---------------------------------------------------------------------- restart, faults


def test_a_restart_reads_nothing_again(tmp_path: Path, out: Path, hashed: list[str]) -> None:
    for step in (10, 20):
        huggingface(out, step)
    assert Watch(tmp_path, end=20).looks()
    assert hashed == ["checkpoint-10", "checkpoint-20"]
    again = Watch(tmp_path, end=20)
    assert again.looks(1)
    assert hashed == ["checkpoint-10", "checkpoint-20"]
    assert again.watcher.enqueued == 0
    (tmp_path / "queue" / "watch" / os.listdir(tmp_path / "queue" / "watch")[0]).write_text("torn")
    lost = Watch(tmp_path, end=20)
    assert lost.looks()
    assert (len(hashed), lost.watcher.enqueued, lost.steps()) == (4, 0, [10, 20])
    assert any("known already" in line for line in lost.said)


def test_a_changed_suite_is_handed_over_again(tmp_path: Path, out: Path) -> None:
    huggingface(out, 10)
    assert Watch(tmp_path, end=10).looks()
    changed = Watch(tmp_path, end=10, text=OURS.replace("entries: [a]", "entries: [b]"))
    assert changed.looks()
    assert changed.steps() == [10, 10]


def test_two_watchers_remember_beside_each_other(tmp_path: Path, hashed: list[str]) -> None:
    for name in ("a", "b"):
        huggingface(tmp_path / name, 10)
    begun = [Watch(tmp_path, name, end=10) for name in ("a", "b")]
    assert all(watch.looks() for watch in begun)
    for name in ("a", "b"):
        assert Watch(tmp_path, name, end=10).looks(1)
    assert len(hashed) == 2


def test_a_file_system_that_fails_is_tried_again(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path, "gone", "out", end=10)
    assert not watch.looks(3)
    assert sum("cannot be looked at" in line for line in watch.said) == 1
    huggingface(tmp_path / "gone", 10)
    huggingface(out, 10)
    failing = [OSError(5, "Input/output error"), AutoEvalError("not now")] * 2

    def give(*args: Any) -> dict[str, bool]:
        raise failing.pop(0)

    with monkeypatch.context() as patch:
        patch.setattr(watch.watcher.giver, "give", give)
        assert not watch.looks(3)
    assert watch.watcher.pause(1800) == watchers.RETRY_S
    assert any("Input/output error; trying again" in line for line in watch.said)
    assert watch.looks(1)
    assert watch.steps() == [10, 10]


def test_nothing_is_pinned_where_nothing_may_be_written(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, the tests may write anywhere: `os.access` says otherwise here."""
    huggingface(out, 10)
    monkeypatch.setattr(givens.os, "access", lambda path, mode: mode == os.R_OK and os.path.exists(path))
    watch = Watch(tmp_path, end=10)
    assert watch.looks()
    queue = Queue(str(watch.config.queue))
    (token,) = queue.tokens("pending")
    assert queue.ticket(token.ticket).pin == ""
    assert sorted(os.listdir(out)) == ["checkpoint-10"]
    assert any("nothing is pinned" in line for line in watch.said)


def test_a_backlog_ends_no_ticket(tmp_path: Path, out: Path) -> None:
    for step in (10, 20, 30):
        huggingface(out, step)
    watch = Watch(tmp_path, text=OURS + "hook: {max_pins: 1}\n", end=30)
    assert watch.looks()
    assert watch.steps() == [10, 20, 30]


def test_the_cadence_of_our_own_file_counts(tmp_path: Path, out: Path) -> None:
    for step in (10, 15, 20):
        huggingface(out, step)
    watch = Watch(tmp_path, begin=15)
    watch.looks()
    assert watch.steps() == [20]


def test_it_stops_when_told(tmp_path: Path, out: Path) -> None:
    huggingface(out, 10)
    watch, stop = Watch(tmp_path), Stop()
    looked: list[int] = []

    def after_look() -> None:
        looked.append(1)
        if len(looked) == 2:
            stop.set()

    watch.watcher.pause = lambda interval: 0.0  # type: ignore[method-assign]
    assert not watch.watcher.watch(1800, stop, after_look)
    assert (len(looked), watch.steps()) == (2, [10])
