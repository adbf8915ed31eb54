"""The directories that a watcher looks at: several, whose checkpoints stand in one, and one in which no more come."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoeval_hooks.queue import Queue
from eval_runner.watching.looks import TRACKER
from tests import megatron_layouts
from tests.unit.test_watch import OURS, Watch, huggingface, megatron


def test_several_directories_are_runs_of_their_own(tmp_path: Path) -> None:
    huggingface(tmp_path / "a", 10)
    megatron(tmp_path / "b", 10)
    watch = Watch(tmp_path, "a", "b", text=OURS.replace("{tokens", "{name: r, tokens"), begin=10, interval=10, end=20)
    assert not watch.looks()
    huggingface(tmp_path / "a", 20)
    assert not watch.looks()
    megatron(tmp_path / "b", 20)
    assert watch.looks()
    queue = Queue(str(watch.config.queue))
    found = {(m.run.name, m.kind, m.step) for t in queue.tokens("pending") for m in [queue.ticket(t.ticket).manifest]}
    a, b = (run.name for run in watch.runs())
    assert (a.startswith("r-a-"), b.startswith("r-b-")) == (True, True)
    assert found == {(a, "huggingface", 10), (a, "huggingface", 20), (b, "megatron", 10), (b, "megatron", 20)}


@pytest.mark.parametrize("name", ["mine", "m" * 120])
def test_directories_that_are_called_alike_are_runs_with_names_of_their_own(tmp_path: Path, name: str) -> None:
    """The same ones after a restart, and beside others."""
    named = OURS.replace("{tokens", f"{{name: {name}, project: p, tokens")
    wandb = named.replace("[]", "[{type: wandb, late: companion}]")
    places = ["a/checkpoints", "b/checkpoints", "c/checkpoints"]
    for place in places:
        huggingface(tmp_path / place, 10)
    runs = Watch(tmp_path, *places[:2], text=wandb).runs()
    for field in ("id", "name", "wandb_id", "wandb_group"):
        assert len({getattr(run, field) for run in runs}) == 2
    assert all(len(run.wandb_id) <= 100 for run in runs)
    assert Watch(tmp_path, *places[1:], text=wandb).runs()[0] == runs[1]
    unnamed = Watch(tmp_path, *places[:2], text=OURS).runs()
    assert unnamed[0].name != unnamed[1].name
    (alone,) = Watch(tmp_path, places[0], text=wandb).runs()
    assert (alone.name, alone.wandb_id) == (name, name[:100])


def test_the_first_save_of_megatrons_is_waited_for(tmp_path: Path) -> None:
    """The tracker comes after it. Of the format ``torch``, nothing else tells that a slower host still writes."""
    out = tmp_path / "out"
    megatron_layouts.torch(out / "iter_0000010", ranks=["mp_rank_00"])
    watch = Watch(tmp_path, end=10)
    assert not watch.looks(3)
    assert watch.steps() == []
    assert watch.said == [f"{out}: no complete checkpoint so far (Megatron-LM's {TRACKER} names none)"]
    megatron_layouts.torch(out / "iter_0000010", ranks=["mp_rank_00", "mp_rank_01"])
    (out / TRACKER).write_text("10")
    assert watch.looks()
    assert watch.steps() == [10]


def test_hugging_face_checkpoints_may_be_called_as_megatrons_are(tmp_path: Path) -> None:
    out = tmp_path / "out"
    huggingface(out, 10).rename(out / "iter_0000010")
    (out / "iter_0000020").touch()
    watch = Watch(tmp_path, end=10)
    watch.looks()
    assert watch.steps() == [10]


def test_where_training_ended_early_the_watch_says_how_to_end_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    huggingface(out, 900)
    watch = Watch(tmp_path, end=1000)
    assert not watch.looks(2)
    assert not any("--end-iteration" in line for line in watch.said)
    assert not watch.looks(4)
    (line,) = [line for line in watch.said if "--end-iteration" in line]
    assert line == (f"{out}: waiting for step 1000 or a later one (--end-iteration); the latest is 900. If training is "
                    "over, stop this, and run it again with --end-iteration 900, which ends by itself")  # fmt: skip
    assert Watch(tmp_path, end=900).looks(1)
    huggingface(out, 1001)
    assert watch.looks()
