"""What identifies a checkpoint: its content, step and run, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import manifest
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.run_identity import RunIdentity

MakeCheckpoint = Callable[..., Path]
RUN = RunIdentity("run1")


def digest(path: Path, step: int = 100, run: RunIdentity = RUN) -> str:
    return manifest.build(str(path), path=str(path), step=step, run=run).digest


def test_the_digest_is_of_content_step_and_run(checkpoint: MakeCheckpoint) -> None:
    one = checkpoint(weights=b"one", name="a")
    same, other = checkpoint(weights=b"one", name="b"), checkpoint(weights=b"two", name="c")
    assert digest(one) == digest(same) == digest(one, run=RunIdentity("run1", name="x", wandb_id="other"))
    assert len({digest(one), digest(other), digest(one, step=101), digest(one, run=RunIdentity("run2"))}) == 4


def test_what_only_resuming_needs_is_no_part_of_it(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    before = digest(path)
    others = ("rng_state_1.pth", "optimizer.bin", "scheduler.pt", "training_args.bin", "trainer_state.json", "my.json")
    for name in others:
        (path / name).write_bytes(b"new")
    (path / "global_step100").mkdir()
    assert digest(path) == before
    (path / "tokenizer.json").write_text('{"changed": true}')
    assert digest(path) != before


def test_every_region_of_a_large_file_is_sampled(tmp_path: Path) -> None:
    size = manifest.WHOLE * 3
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * size)
    before = manifest.record(str(tmp_path), path.name).digest
    stride = (size - 2 * manifest.END) // manifest.BLOCKS
    for offset in [0, size - 1, *range(manifest.END, size - manifest.END - stride, stride * 9)]:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\1")
        after = manifest.record(str(tmp_path), path.name).digest
        assert after != before, offset
        before = after


def test_a_checkpoint_without_weights_says_what_to_do(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-100: no weights .* submit a converted copy"):
        digest(path)


def test_a_save_that_was_cut_off_is_refused(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    (path / manifest.INCOMPLETE).write_text("")
    with pytest.raises(CheckpointError, match="was cut off"):
        digest(path)


def test_a_deleted_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: cannot be listed .* was it deleted\?"):
        digest(tmp_path / "gone")


def test_a_fault_that_may_pass_is_not_held_against_the_checkpoint(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()

    def stale(*args: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(OSError, match="Stale"):
        digest(path)


def test_a_file_that_changes_while_it_is_read_is_refused(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()
    read = os.pread

    def grow(fd: int, length: int, offset: int) -> bytes:
        with (path / "model.safetensors").open("ab") as file:
            file.write(b"more")
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", grow)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        manifest.record(str(path), "model.safetensors")


def test_a_file_that_vanishes_after_the_listing_is_no_smaller_checkpoint(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, listdir = checkpoint(), os.listdir

    def and_then_it_goes(where: str) -> list[str]:
        names = listdir(where)
        (path / "tokenizer.json").unlink()
        return names

    monkeypatch.setattr(os, "listdir", and_then_it_goes)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: was deleted meanwhile"):
        manifest.model_files(str(path))


def test_pickled_weights_are_known_as_such(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint()
    (path / "pytorch_model-00001-of-00002.bin").write_bytes(b"pickle")
    found = manifest.build(str(path), path=str(path), step=1, run=RUN)
    assert found.pickled == ("pytorch_model-00001-of-00002.bin",)
