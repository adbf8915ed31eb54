"""Stand-ins for checkpoints of Megatron-LM: directories with the names and ends of real ones (0.12 to 0.19), as its
training leaves them, and made-up bytes in the place of tensors. Real ones are in tests/megatron."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

SHARDS = ("__0_0.distcp", "__0_1.distcp")


def torch_dist(path: Path, weights: bytes = b"weights", *, shards: Iterable[str] = SHARDS, common: bool = True) -> Path:
    """0.12 to 0.18 write common.pt early; 0.19 has none."""
    torch_dcp(path, weights, shards=shards)
    if common:
        (path / "common.pt").write_bytes(saved(b"common"))
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return path


def torch_dcp(path: Path, weights: bytes = b"weights", *, shards: Iterable[str] = SHARDS) -> Path:
    """torch_dcp and fsdp_dtensor look the same."""
    path.mkdir(parents=True, exist_ok=True)
    for name in shards:
        (path / name).write_bytes(weights + name.encode())
    (path / ".metadata").write_bytes(pickle.dumps({"storage_data": [(f"layer {n}", n) for n in shards]}))
    return path


def torch(path: Path, weights: bytes = b"weights", *, ranks: Iterable[str] = ("mp_rank_00",)) -> Path:
    """`distrib_optim.pt` is there with a distributed optimizer, train_dataloader_….pt with Energon's data loader."""
    for rank in ranks:
        (path / rank).mkdir(parents=True, exist_ok=True)
        (path / rank / "model_optim_rng.pt").write_bytes(saved(weights + rank.encode()))
        (path / rank / "distrib_optim.pt").write_bytes(saved(b"optimizer"))
        (path / rank / "train_dataloader_dprank000.pt").write_bytes(b"loader")
    return path


def zarr(path: Path) -> Path:
    """0.12 and earlier."""
    (path / "module.decoder.weight").mkdir(parents=True)
    (path / "module.decoder.weight" / ".zarray").write_text("{}")
    (path / "common.pt").write_bytes(saved(b"common"))
    (path / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    return path


def saved(content: bytes) -> bytes:
    """As `torch.save` writes: a zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", content)
    return out.getvalue()
