"""Pins outlive the checkpoint, hold only what evaluating needs, and are the only thing that is ever deleted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import fsio, manifest, pin
from autoeval_hooks.errors import CheckpointError

MakeCheckpoint = Callable[..., Path]
LARGE = b"w" * (manifest.WHOLE + 1)
ID = "a" * 64


def test_large_files_are_linked_and_small_ones_copied(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(weights=LARGE)
    before = os.stat(source).st_mtime_ns
    made = Path(pin.make(str(source), pin.pins_dir(str(source)), "hardlink"))
    assert sorted(os.listdir(made)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (made / "model.safetensors").samefile(source / "model.safetensors")
    assert not (made / "config.json").samefile(source / "config.json")
    assert os.stat(source).st_mtime_ns == before        # rotation sorts by it


def test_a_pin_outlives_its_checkpoint(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint(weights=LARGE)
    made = pin.make(str(source), pin.pins_dir(str(source)), "auto")
    before = [manifest.record(made, n) for n in manifest.model_files(made)]
    for file in source.iterdir():
        file.unlink()
    source.rmdir()
    assert [manifest.record(made, n) for n in manifest.model_files(made)] == before


def test_each_way_falls_back_or_says_that_it_cannot(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(fsio.fcntl, "ioctl", no_links)
    source = checkpoint(weights=LARGE)
    pins = pin.pins_dir(str(source))
    for way in ("auto", "hardlink", "reflink"):
        with pytest.raises(pin.PinImpossible, match=f"cannot be pinned here by {way}"):
            pin.make(str(source), pins, way)
        assert os.listdir(pins) == []
    made = Path(pin.make(str(source), pins, "copy"))
    assert (made / "model.safetensors").read_bytes() == LARGE


def test_a_checkpoint_that_vanishes_leaves_nothing(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint()
    monkeypatch.setattr(manifest, "model_files", lambda path: ["config.json", "gone.safetensors"])
    with pytest.raises(CheckpointError, match="deleted before it could be pinned"):
        pin.make(str(source), pin.pins_dir(str(source)), "auto")
    assert os.listdir(pin.pins_dir(str(source))) == []


def test_adopting_twice_keeps_the_first(checkpoint: MakeCheckpoint) -> None:
    source = str(checkpoint())
    first, second = (pin.make(source, pin.pins_dir(source), "auto") for _ in range(2))
    final = pin.adopt(first, ID)
    inode = os.stat(final).st_ino
    assert pin.adopt(second, ID) == final
    assert os.stat(final).st_ino == inode
    assert os.listdir(os.path.dirname(final)) == [ID]


def test_releasing_twice_is_the_same_as_once(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()
    final = pin.adopt(pin.make(str(source), pin.pins_dir(str(source)), "auto"), ID)
    pin.release(final)
    pin.release(final)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["out", "out/checkpoint-100", "out/.autoeval", "out/.autoeval/pins", "out/.autoeval/pins/mine", "link"]
)
def test_nothing_but_a_pin_is_deleted(checkpoint: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    checkpoint()
    pins = tmp_path / "out" / ".autoeval" / "pins"
    (pins / "mine").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a pin; not deleted"):
        pin.release(str(tmp_path / name))
    assert (tmp_path / "out" / "checkpoint-100" / "model.safetensors").exists()
    assert (pins / "mine").exists()


def test_a_link_in_the_place_of_a_pin_is_not_followed(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint()
    pins = tmp_path / "out" / ".autoeval" / "pins"
    pins.mkdir(parents=True)
    (pins / ID).symlink_to(source)
    with pytest.raises(CheckpointError, match="not a pin"):
        pin.release(str(pins / ID))
    other = pins / ("b" * 64)
    other.mkdir()
    (pins / ("c" * 64)).symlink_to(other)
    with pytest.raises(CheckpointError, match="not a pin"):
        pin.release(str(pins / ("c" * 64)))
    assert other.exists()
    elsewhere = tmp_path / "elsewhere" / ID
    elsewhere.mkdir(parents=True)
    (tmp_path / "trick" / ".autoeval").mkdir(parents=True)
    (tmp_path / "trick" / ".autoeval" / "pins").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a pin"):
        pin.release(str(tmp_path / "trick" / ".autoeval" / "pins" / ID))
    assert elsewhere.exists()
