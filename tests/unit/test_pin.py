"""Pins outlive the checkpoint, hold only what evaluating needs, and are the only thing that is ever deleted."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import manifest, pin
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.fsio import FileOps
from tests import megatron_layouts as made

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


def test_a_rank_that_vanishes_while_it_is_pinned_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's `--save-retain-interval` deletes a whole iteration, one file after another."""
    source = made.torch(tmp_path / "out" / "iter_0000010", ranks=["mp_rank_00", "mp_rank_01"])
    real = manifest.model_files

    def listed(path: str) -> list[str]:
        names = real(path)
        shutil.rmtree(source / "mp_rank_01")
        return names

    monkeypatch.setattr(manifest, "model_files", listed)
    with pytest.raises(CheckpointError, match="deleted before it could be pinned"):
        pin.make(str(source), pin.pins_dir(str(source)), "auto")
    assert os.listdir(pin.pins_dir(str(source))) == []


def test_a_nested_file_is_linked_and_not_copied(tmp_path: Path) -> None:
    source = made.torch(tmp_path / "out" / "iter_0000010", LARGE)
    made_pin = Path(pin.make(str(source), pin.pins_dir(str(source)), "hardlink"))
    (pinned,) = made_pin.iterdir()
    assert pinned.name == "mp_rank_00%2Fmodel_optim_rng.pt"
    assert pinned.samefile(source / "mp_rank_00" / "model_optim_rng.pt")


NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EACCES]


class Refusing(FileOps):
    """A stand-in for a file system that answers some of these calls with an error."""

    def __init__(self, error: int, *calls: str) -> None:
        for call in calls:
            setattr(self, call, self._refuse)
        self.error = error

    def _refuse(self, *args: object) -> None:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("error", NO_LINKS, ids=lambda e: errno.errorcode[e])
def test_each_way_falls_back_or_says_that_it_cannot(checkpoint: MakeCheckpoint, error: int) -> None:
    source = checkpoint(weights=LARGE)
    pins = pin.pins_dir(str(source))
    neither, no_reflink = Refusing(error, "link", "reflink"), Refusing(error, "reflink")
    for way in ("auto", "hardlink", "reflink"):
        with pytest.raises(pin.PinImpossible, match=f"cannot be pinned here by {way}"):
            pin.make(str(source), pins, way, neither)
        assert os.listdir(pins) == []
    copied = Path(pin.make(str(source), pins, "copy", neither))
    assert (copied / "model.safetensors").read_bytes() == LARGE
    assert not (copied / "model.safetensors").samefile(source / "model.safetensors")
    linked = Path(pin.make(str(source), pins, "auto", no_reflink))
    assert (linked / "model.safetensors").samefile(source / "model.safetensors")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE])
def test_a_fault_is_no_missing_feature(checkpoint: MakeCheckpoint, error: int) -> None:
    """It may pass: the hand-over is tried again, and no pin is given up for it."""
    source = checkpoint(weights=LARGE)
    pins = pin.pins_dir(str(source))
    with pytest.raises(OSError, match=os.strerror(error)):
        pin.make(str(source), pins, "auto", Refusing(error, "link", "reflink"))
    assert os.listdir(pins) == []


@pytest.mark.skipif(
    os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev, reason="/dev/shm is no file system of its own here"
)
def test_weights_that_lie_on_another_file_system(checkpoint: MakeCheckpoint) -> None:
    """A real EXDEV: the checkpoint names its weights by a symbolic link."""
    source = checkpoint()
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(LARGE)
        file.flush()
        (source / "model.safetensors").unlink()
        (source / "model.safetensors").symlink_to(file.name)
        with pytest.raises(pin.PinImpossible, match="Invalid cross-device link"):
            pin.make(str(source), pin.pins_dir(str(source)), "auto")
        made = Path(pin.make(str(source), pin.pins_dir(str(source)), "copy"))
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


def test_a_pin_that_is_gone_is_given_to_no_ticket(checkpoint: MakeCheckpoint) -> None:
    source = str(checkpoint())
    passing = pin.make(source, pin.pins_dir(source), "auto")
    pin.release(passing)
    with pytest.raises(FileNotFoundError, match="deleted before a ticket could name it"):
        pin.adopt(passing, ID)


def test_releasing_twice_is_the_same_as_once(checkpoint: MakeCheckpoint) -> None:
    source = checkpoint()
    final = pin.adopt(pin.make(str(source), pin.pins_dir(str(source)), "auto"), ID)
    pin.release(final)
    pin.release(final)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    [
        "out", "out/checkpoint-100", "out/.autoeval", "out/.autoeval/pins", "out/.autoeval/pins/mine", "link",
        "out/.autoeval/pins/..", "out/.autoeval/pins/../../checkpoint-100", f"out/.autoeval/pins/{ID}/..", "", "/",
        f"out/.autoeval/pins/mine/{ID}", f"out/{ID}", f"out/.autoeval/pins/{ID[:-1]}", f"out/.autoeval/pins/{ID}\n",
    ],
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


def test_what_is_not_ours_in_a_pin_keeps_all_of_it(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint()
    final = Path(pin.adopt(pin.make(str(source), pin.pins_dir(str(source)), "auto"), ID))
    (final / "zzz" / "deep").mkdir(parents=True)
    before = sorted(os.listdir(final))
    with pytest.raises(CheckpointError, match="zzz: a directory, which is none of ours, in a pin; move it away"):
        pin.release(str(final))
    assert sorted(os.listdir(final)) == before
    shutil.rmtree(final / "zzz")
    (final / "link").symlink_to(source)     # a link goes, what it names stays
    pin.release(str(final))
    assert not final.exists()
    assert (source / "model.safetensors").exists()


def test_a_parent_that_is_a_link_leads_to_the_same_pin(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Output directories are often links to another disk."""
    source = checkpoint()
    final = Path(pin.adopt(pin.make(str(source), pin.pins_dir(str(source)), "auto"), ID))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    pin.release(str(tmp_path / "link" / ".autoeval" / "pins" / ID))
    assert not final.exists()
