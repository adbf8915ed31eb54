"""Which files make a checkpoint of Megatron's, when it is complete, and that a pin of one is as good as itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoeval_hooks import layouts, manifest, pin
from autoeval_hooks.errors import CheckpointError, IncompleteError
from autoeval_hooks.manifest import Manifest, MegatronRecord
from autoeval_hooks.run_identity import RunIdentity
from tests import megatron_layouts as made

RUN = RunIdentity("run1")
NAME = "iter_0000010"


def build(path: Path, **known: object) -> Manifest:
    record = MegatronRecord(**known) if known else None  # type: ignore[arg-type]
    return manifest.build(str(path), path=str(path), step=10, run=RUN, megatron=record)


def test_the_files_of_each_format(tmp_path: Path) -> None:
    dist = made.torch_dist(tmp_path / "a" / NAME)
    (dist / "integrity.json").write_text("{}")
    assert [f.path for f in build(dist).files] == [
        ".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json"
    ]  # fmt: skip
    assert [f.path for f in build(made.torch_dcp(tmp_path / "b" / NAME)).files] == [".metadata", *made.SHARDS]
    ranks = ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001")
    found = build(made.torch(tmp_path / "c" / NAME, ranks=ranks))
    assert [f.path for f in found.files] == [f"{rank}/model_optim_rng.pt" for rank in ranks]
    assert found.kind == "megatron"
    assert found.pickled == tuple(f.path for f in found.files)


@pytest.mark.parametrize(
    ("make", "known", "format"),
    [
        (made.torch_dist, "", "torch_dist"), (made.torch_dist, "torch_dist", "torch_dist"),
        (made.torch_dcp, "", "torch_dcp"), (made.torch_dcp, "torch_dcp", "torch_dcp"),
        (made.torch_dcp, "fsdp_dtensor", "fsdp_dtensor"),
        (made.torch, "", "torch"), (made.torch, "torch", "torch"),
    ],
)  # fmt: skip
def test_the_format_is_known(tmp_path: Path, make: Callable[[Path], Path], known: str, format: str) -> None:
    path = make(tmp_path / NAME)
    found = build(path, format=known) if known else build(path)
    assert found.megatron is not None
    assert found.megatron.format == format


@pytest.mark.parametrize("make", [made.torch_dist, made.torch_dcp, made.torch])
def test_a_pin_is_as_good_as_the_checkpoint(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "out" / NAME)
    before = build(path)
    passing = pin.make(str(path), pin.pins_dir(str(path)), "auto")
    shutil.rmtree(path)
    after = manifest.build(passing, path=str(path), step=10, run=RUN)
    assert (after.digest, after.weights_digest, after.files) == (before.digest, before.weights_digest, before.files)
    assert all(Path(passing, name).is_file() for name in os.listdir(passing))       # deleting one stays simple
    pin.release(passing)
    assert not os.path.exists(passing)


def test_the_state_of_a_quantized_model_is_part_of_it(tmp_path: Path) -> None:
    path = made.torch_dist(tmp_path / "out" / NAME)
    made.torch_dist(path / "modelopt_state", shards=("__0_0.distcp",))
    found = build(path)
    assert "modelopt_state/__0_0.distcp" in [f.path for f in found.files]
    passing = pin.make(str(path), pin.pins_dir(str(path)), "auto")
    assert manifest.build(passing, path=str(path), step=10, run=RUN).files == found.files
    (path / "modelopt_state" / "metadata.json").unlink()
    with pytest.raises(IncompleteError, match=r"has no modelopt_state/metadata\.json"):
        build(path)


# ---------------------------------------------------------------------- incomplete


def _without(*names: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return remove


def _empty(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(b"") and None


@pytest.mark.parametrize(
    ("make", "known", "harm", "says"),
    [
        (made.torch_dist, "", _without("metadata.json"), "has no metadata.json"),
        (made.torch_dist, "torch_dist", _without("metadata.json"), "has no metadata.json"),
        (made.torch_dist, "torch_dist", _without("metadata.json", "common.pt"), "has no metadata.json"),
        (made.torch_dist, "", _without(".metadata"), "has no .metadata"),
        (made.torch_dist, "", _empty("metadata.json"), "metadata.json does not say how it was saved"),
        (made.torch_dist, "torch_dist", _empty("metadata.json"), "metadata.json does not say how it was saved"),
        (made.torch_dist, "", _without("__0_1.distcp"), "has no __0_1.distcp, which its .metadata names"),
        (made.torch_dist, "", _without(*made.SHARDS), "holds no weights"),
        (made.torch_dcp, "torch_dcp", _without(".metadata"), "has no .metadata"),
        (made.torch_dcp, "", _without(".metadata"), "has no .metadata"),
        (made.torch_dcp, "fsdp_dtensor", _without("__0_0.distcp"), "has no __0_0.distcp"),
        (made.torch, "", _without("mp_rank_00/model_optim_rng.pt"), "holds no weights"),
        (made.torch, "torch", _without("mp_rank_00/model_optim_rng.pt"), "holds no weights"),
        (made.torch, "", _empty("mp_rank_00/model_optim_rng.pt"), "has no end"),
    ],
)
def test_what_is_not_complete_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], known: str, harm: Callable[[Path], None], says: str
) -> None:
    path = make(tmp_path / NAME)
    build(path, format=known) if known else build(path)
    harm(path)
    with pytest.raises(IncompleteError, match=says):
        build(path, format=known) if known else build(path)


def test_a_shard_that_is_named_at_the_seam_of_two_readings_is_missed(tmp_path: Path) -> None:
    path = made.torch_dcp(tmp_path / NAME)
    for ahead in range(30):
        (path / ".metadata").write_bytes(b"." * ((1 << 20) - ahead) + b"__7_0.distcp" + b"." * 100)
        with pytest.raises(IncompleteError, match=r"has no __7_0\.distcp"):
            build(path)


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    file = made.torch(tmp_path / NAME) / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(IncompleteError, match=r"mp_rank_00/model_optim_rng\.pt has no end"):
        build(tmp_path / NAME)


@pytest.mark.parametrize(
    ("there", "sizes", "missing"),
    [
        (["00", "01"], (2, 1, 1), ""), (["00"], (2, 1, 1), "mp_rank_01"),
        (["00_000", "00_001"], (1, 2, 1), ""), (["00_000"], (1, 2, 1), "mp_rank_00_001"),
        (["00_000", "01_000", "01_001"], (2, 2, 1), "mp_rank_00_001"),
        (["00_000", "00_001"], (1, 1, 2), ""), (["00_000"], (1, 1, 2), r"mp_rank_\*_001"),
        (["00_000", "01_001"], (2, 1, 2), ""),      # not every pair has a directory (checkpointing.save_checkpoint)
        (["00_000_000", "00_000_001", "00_001_000", "00_001_001"], (1, 2, 2), ""),
        (["00_000_000", "00_000_001"], (1, 2, 2), "mp_rank_00_001"),
        (["00", "01"], (0, 0, 0), ""), (["01"], (0, 0, 0), "with 0 in place 1"),
        (["00_000", "00_002"], (0, 0, 0), "with 1 in place 2"),
    ],
)  # fmt: skip
def test_every_model_parallel_rank_must_be_there(
    tmp_path: Path, there: list[str], sizes: tuple[int, int, int], missing: str
) -> None:
    path = made.torch(tmp_path / NAME, ranks=[f"mp_rank_{r}" for r in there])
    known = dict(zip(("tensor_parallel", "pipeline_parallel", "expert_parallel"), sizes, strict=True))
    if not missing:
        build(path, format="torch", **known)
        return
    with pytest.raises(IncompleteError, match=f"has no .*{missing}"):
        build(path, format="torch", **known)


def test_a_rank_that_has_written_its_optimizer_only_is_waited_for(tmp_path: Path) -> None:
    path = made.torch(tmp_path / NAME, ranks=["mp_rank_00", "mp_rank_01"])
    (path / "mp_rank_01" / "model_optim_rng.pt").unlink()
    with pytest.raises(IncompleteError, match=r"has no mp_rank_01/model_optim_rng\.pt"):
        build(path)


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(IncompleteError, match="holds no weights"):
        build(tmp_path / NAME, format="torch_dist")
    with pytest.raises(CheckpointError, match="no weights"):
        build(tmp_path / NAME)


@pytest.mark.parametrize("known", ["", "zarr"])
def test_a_format_that_nothing_reads_any_more_has_a_way_out(tmp_path: Path, known: str) -> None:
    path = made.zarr(tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"format 'zarr'; .*--ckpt-convert-format torch_dist") as raised:
        build(path, format=known) if known else build(path)
    assert not isinstance(raised.value, IncompleteError)        # it will not be later


def test_a_checkpoint_of_hugging_face_is_no_megatron_one(tmp_path: Path) -> None:
    path = made.torch_dcp(tmp_path / NAME)
    (path / "model.safetensors").write_bytes(b"weights")
    assert build(path).kind == "huggingface"
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert build(path).kind == "huggingface"


def test_a_data_loaders_state_makes_no_rank(tmp_path: Path) -> None:
    """`--dataloader-save` may name the directory of the checkpoints."""
    path = made.torch_dist(tmp_path / NAME)
    (path / "mp_rank_00").mkdir()
    (path / "mp_rank_00" / "train_dataloader_dprank000.pt").write_bytes(b"loader")
    found = build(path)
    assert found.megatron is not None
    assert found.megatron.format == "torch_dist"
    assert not any("/" in f.path for f in found.files)


def test_what_resuming_alone_needs_is_no_part_of_it(tmp_path: Path) -> None:
    path = made.torch(tmp_path / NAME)
    before = build(path).digest
    (path / "mp_rank_00" / "distrib_optim.pt").write_bytes(b"other")
    (path / "mp_rank_00" / "notes.txt").write_text("mine")
    assert build(path).digest == before


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("iter_0000010", 10), ("iter_12345678", 12345678), ("iter_00000010", None), ("iter_10", None),
        ("release", None), ("iter_0000010.old", None), ("checkpoint-10", None),
    ],
)  # fmt: skip
def test_the_name_says_the_iteration(name: str, number: int | None) -> None:
    assert layouts.iteration(f"/out/{name}") == number


def test_what_torch_itself_writes_is_read_so(tmp_path: Path) -> None:
    """torch_dcp and `torch` are torch's own formats: here are real ones, whole and cut short."""
    torch = pytest.importorskip("torch")
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    path = tmp_path / "dcp" / NAME
    state = {f"layer{i}": torch.arange(1000.0) + i for i in range(5)}
    writer = checkpoint.FileSystemWriter(path, thread_count=3)
    checkpoint.save(state, storage_writer=writer, no_dist=True)
    shards = sorted(p.name for p in path.glob("*.distcp"))
    assert [f.path for f in build(path, format="torch_dcp").files] == [".metadata", *shards]
    for shard in shards:
        (path / shard).rename(tmp_path / shard)
        with pytest.raises(IncompleteError, match=f"has no {shard}|holds no weights"):
            build(path, format="torch_dcp")
        (tmp_path / shard).rename(path / shard)
    file = tmp_path / "torch" / NAME / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    assert build(file.parents[1]).megatron == MegatronRecord(format="torch")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IncompleteError, match="has no end"):
        build(file.parents[1])


# ---------------------------------------------------------------------- hostile names

PARTS = st.sampled_from((
    "mp_rank_00", "mp_rank_00_001", "modelopt_state", "model_optim_rng.pt", "__0_0.distcp", ".metadata", "..", ".",
    "%2F", "mp_rank_00%2Fmodel_optim_rng.pt", "mp_rank_00%2F..%2Fx.distcp", "..%2F..%2Fetc", "common.pt", "x",
    "%2Fetc%2Fx.distcp", "a b.distcp", "a\n.distcp", "metadata.json",
))  # fmt: skip
NESTED = st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(names=NESTED)
@example(names=["mp_rank_00/model_optim_rng.pt", "mp_rank_00%2Fmodel_optim_rng.pt"])
@example(names=["mp_rank_00%2F..%2Fmodel_optim_rng.pt", "mp_rank_00/..%2Fmodel_optim_rng.pt"])
@example(names=["mp_rank_00/mp_rank_00/model_optim_rng.pt", "mp_rank_00/x/../model_optim_rng.pt"])
def test_no_name_leaves_the_checkpoint_or_its_pin_and_no_two_meet(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    """Whatever a directory holds, its pin holds the same files with the same content, each under a name of its own
    and right in it, and is removed again without a trace."""
    root = tmp_path_factory.mktemp("tree")
    source = root / "out" / NAME
    made.torch_dist(source)
    for i, name in enumerate(names):
        where = source / name
        try:
            if where.resolve().is_relative_to(source.resolve()) and not where.exists():
                where.parent.mkdir(parents=True, exist_ok=True)
                where.write_bytes(b"%d" % i)
        except OSError:
            continue
    before = sorted(p for p in root.rglob("*") if ".autoeval" not in p.parts)
    files = manifest.model_files(str(source))
    assert all(layouts.is_file(name) and ".." not in name.split("/") for name in files)
    assert len({layouts.flat(name) for name in files}) == len(files)
    passing = pin.make(str(source), pin.pins_dir(str(source)), "auto")
    assert {Path(passing, n).parent for n in os.listdir(passing)} == {Path(passing)}
    assert manifest.model_files(passing) == files
    for name in files:
        assert Path(layouts.place(passing, name)).read_bytes() == (Path(layouts.place(str(source), name))).read_bytes()
    pin.release(passing)
    assert sorted(p for p in root.rglob("*") if ".autoeval" not in p.parts) == before
    shutil.rmtree(root)


def test_a_rank_behind_a_link_is_read_and_not_touched(tmp_path: Path) -> None:
    path = made.torch(tmp_path / "out" / NAME)
    (path / "mp_rank_00").rename(tmp_path / "elsewhere")
    (path / "mp_rank_00").symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").iterdir())
    assert [f.path for f in build(path).files] == ["mp_rank_00/model_optim_rng.pt"]
    passing = pin.make(str(path), pin.pins_dir(str(path)), "auto")
    assert not os.path.islink(os.path.join(passing, "mp_rank_00%2Fmodel_optim_rng.pt"))
    pin.release(passing)
    assert sorted((tmp_path / "elsewhere").iterdir()) == before
    assert all(p.stat().st_size for p in before)
