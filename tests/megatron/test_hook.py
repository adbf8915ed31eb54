"""One process that trains: what is handed over, that training never notices, and that scores join its W&B run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import manifest
from autoeval_hooks.ticket import Ticket
from tests import wandb_log
from tests.megatron.conftest import BATCH, RUN, SEQUENCE, WANDB, Place, losses, of_ours
from tests.wandb_runs import expected, scores
from tests.wandb_trainer import drop

pytestmark = pytest.mark.megatron
Make = Callable[[str], Place]

FLAGS = (
    "--train-iters", "7", "--save-retain-interval", "4", "--non-persistent-save-interval", "3",
    "--non-persistent-ckpt-type", "global", *WANDB,
)  # fmt: skip
"""Saves of 2, 4, 6 and, after the last step, 7; a passing one of 3. Of the former Megatron keeps 4 and 7."""
EXPECTED = [("quick", 2), ("quick", 4), ("quick", 6), ("quick", 7), ("slow", 4)]
TIMED = ("iteration-time", "_runtime", "_timestamp")


@pytest.fixture(scope="module")
def plain(place: Make) -> tuple[Place, str]:
    """A training without us."""
    at = place("plain")
    return at, at.train(*FLAGS, entry="")


@pytest.fixture(scope="module")
def watched(place: Make) -> tuple[Place, str]:
    """The same one with us, and two scores that wait for it."""
    at = place("watched")
    (at.relay / "points").mkdir(parents=True)
    drop(at.relay, [30, 10])
    return at, at.train(*FLAGS, "--autoeval-config", "autoeval.yaml", TINY_PAUSE_S="0.15")


def check(tickets: dict[tuple[str, int], Ticket], at: Place) -> None:
    """Each describes the save of its step, and its pin holds what it describes."""
    for (_, step), ticket in tickets.items():
        m = ticket.manifest
        assert (m.step, m.samples, m.tokens) == (step, BATCH * step, BATCH * step * SEQUENCE)
        assert m.path == str(at.save / f"iter_{step:07d}")
        for file in m.files:
            assert manifest.record(ticket.pin, file.path) == file


def test_every_save_is_handed_over_once_and_outlives_retention(watched: tuple[Place, str]) -> None:
    at, output = watched
    found = at.tickets()
    assert sorted(found) == EXPECTED
    check(found, at)
    assert sorted(p.name for p in at.save.glob("iter_*")) == ["iter_0000004", "iter_0000007"]
    assert (at.save / "non_persistent" / "iter_0000003").is_dir()
    assert of_ours(output) == []


def test_the_manifest_says_what_is_needed_to_load_it(watched: tuple[Place, str]) -> None:
    m = watched[0].tickets()["quick", 6].manifest
    assert m.kind == "megatron"
    assert m.megatron is not None
    facts = {k: v for k, v in vars(m.megatron).items() if k not in ("tokenizer", "version")}
    assert facts == {
        "format": "torch_dist", "world_size": 1, "tensor_parallel": 1, "pipeline_parallel": 1,
        "context_parallel": 1, "expert_parallel": 1, "seq_length": SEQUENCE, "padded_vocab_size": 128, "num_layers": 2,
        "hidden_size": 64, "num_attention_heads": 4, "tokenizer_type": "NullTokenizer", "tokenizer_files": (),
    }  # fmt: skip
    assert m.megatron.version.startswith("0.19.2")      # and the commit, where Megatron lies in a git repository
    assert m.megatron.tokenizer["vocab_size"] == "127"
    assert {"__0_0.distcp", "metadata.json", ".metadata"} == {file.path for file in m.files}


def rows(at: Place) -> list[dict[str, Any]]:
    """What training logged, less what a clock says and what is ours."""
    (log,) = wandb_log.logs(at.save, RUN.wandb_id)
    found = wandb_log.rows(log)
    return [{k: v for k, v in row.items() if k not in TIMED and not k.startswith("bench/")} for row in found]


def test_training_is_the_same(plain: tuple[Place, str], watched: tuple[Place, str]) -> None:
    assert losses(watched[1]) == losses(plain[1])
    assert sorted(losses(plain[1])) == list(range(1, 8))
    assert rows(watched[0]) == rows(plain[0])       # every key and value, `_step` included, and no row more
    assert [row["_step"] for row in rows(plain[0])] == list(range(1, 8))
    files = [sorted(layout(at.save / "iter_0000007")) for at, _ in (plain, watched)]
    assert files[0] == files[1]
    assert sorted(at_top(plain[0].save)) == sorted(at_top(watched[0].save) - {".autoeval"})


def layout(checkpoint: Path) -> list[str]:
    return [str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*")]


def at_top(save: Path) -> set[str]:
    return set(os.listdir(save))


def test_scores_join_the_run_at_their_own_steps(watched: tuple[Place, str]) -> None:
    at, _ = watched
    (log,) = wandb_log.logs(at.save, RUN.wandb_id)
    found = wandb_log.rows(log)
    assert scores(found) == expected(10, 30)
    assert all("lm loss" in row for row in found if "bench/step" in row)        # joined rows of training's
    run = at.tickets()["quick", 2].manifest.run
    assert (run.wandb_id, run.project, run.name, run.wandb_mode) == ("r1", "p", "tiny", "offline")
    assert Path(run.wandb_dir) == at.save / "wandb" / "wandb"
    assert '"complete": true' in (at.relay / "ended.json").read_text()


def test_an_asynchronous_save_is_handed_over_when_it_is_complete_with_the_samples_of_its_beginning(place: Make) -> None:
    at = place("async")
    output = at.train(
        *FLAGS, "--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore",
        "--autoeval-config", "autoeval.yaml", status=1,
    )  # fmt: skip
    # Megatron finishes its W&B run before its last save is complete, and does not survive its own callback then.
    assert "in on_save_checkpoint_success\n" in output
    assert "has no attribute 'log_artifact'" in output
    found = at.tickets()
    assert sorted(found) == EXPECTED
    check(found, at)
    assert {t.manifest.run.wandb_id for t in found.values()} == {"r1"}
    assert len(re.findall("scheduled an async checkpoint save at iteration .* to save\n", output)) == 4
    assert of_ours(output) == []
