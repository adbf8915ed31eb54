"""What the watcher tells of a checkpoint of Megatron's, from an older file and from the checkpoint itself."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import transformers

from autoeval_hooks.manifest import Manifest
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner.checkpoints import megatron, sentencepiece_layout
from eval_runner.checkpoints.base import Request
from eval_runner.servers import megatron_arguments
from eval_runner.watching.described import OLD_WINDOW, arguments
from eval_runner.watching.looks import TRACKER
from eval_runner.watching.plan import Options, plan
from tests import megatron_layouts
from tests.older_yaml import documented, files, write
from tests.unit.test_sentencepiece_layout import BPE

ARGS = argparse.Namespace(
    seq_length=512, tensor_model_parallel_size=2, pipeline_model_parallel_size=1, consumed_train_samples=80,
    num_layers=None, hidden_size="x",
)  # fmt: skip


class Evil:
    """Runs code where it is unpickled by others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(content: object) -> bytes:
    """As `torch.save` writes it, less the tensors."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    return out.getvalue()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / TRACKER).write_text("10")
    return tmp_path


def handed_over(here: Path, **sections: Any) -> Manifest:
    path = write(here, documented(**sections))
    planned = plan(Options(str(path), begin=10, end=10, interval=10), lambda text: None)
    assert [planned.watcher.look() for _ in range(2)] == [False, True]
    queue = Queue(str(planned.config.queue))
    (token,) = queue.tokens("pending")
    return queue.ticket(token.ticket).manifest


def test_an_older_file_names_tokenizer_and_run(here: Path) -> None:
    megatron_layouts.torch_dist(here / "checkpoints" / "iter_0000010", common=False)
    found = handed_over(here)
    record = found.megatron
    assert record is not None
    assert record.tokenizer_type == "GPT2BPETokenizer"
    assert record.tokenizer == {"vocab_file": f"{here}/vocab.json", "merge_file": f"{here}/merges.txt"}
    assert [file.path for file in record.tokenizer_files] == [f"{here}/merges.txt", f"{here}/vocab.json"]
    assert (record.tensor_parallel, record.pipeline_parallel, record.seq_length) == (4, 1, OLD_WINDOW)
    assert (found.step, found.tokens) == (10, 41943040)
    run = found.run
    assert (run.name, run.project, run.wandb_id, run.wandb_group) == ("proj-tiny", "scores", "proj-tiny", "proj-tiny")
    assert run.wandb_base_url == "https://wandb.example"


def test_what_the_checkpoint_says_goes_first(here: Path) -> None:
    path = megatron_layouts.torch_dist(here / "checkpoints" / "iter_0000010")
    (path / "common.pt").write_bytes(saved({"args": ARGS, "iteration": 10}))
    found = handed_over(here, megatron={"token_per_iteration": 0})
    assert found.megatron is not None
    assert (found.megatron.tensor_parallel, found.megatron.seq_length) == (2, 512)
    assert (found.megatron.num_layers, found.megatron.hidden_size) == (0, 0)
    assert found.tokens == 80 * 512
    (here / "checkpoints" / ".autoeval" / "run_id").unlink()
    again = handed_over_anew(here, {"seq_length": 64})
    assert again.megatron is not None
    assert again.megatron.seq_length == 64


def handed_over_anew(here: Path, megatron: dict[str, Any]) -> Manifest:
    return handed_over(here, megatron=megatron, cache_dir="another")


@pytest.mark.parametrize(
    ("ranks", "processes", "wanted"),
    [
        (("mp_rank_00", "mp_rank_01"), 2, (2, 1)),
        (("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"), 4, (2, 2)),
    ],
)
def test_the_directories_of_the_format_torch_tell_the_split(
    here: Path, ranks: tuple[str, ...], processes: int, wanted: tuple[int, int]
) -> None:
    megatron_layouts.torch(here / "checkpoints" / "iter_0000010", ranks=ranks)
    record = handed_over(here, megatron={"process_num": processes}).megatron
    assert record is not None
    assert (record.tensor_parallel, record.pipeline_parallel, record.format) == (*wanted, "torch")


def test_reading_the_arguments_runs_no_code(tmp_path: Path) -> None:
    path = megatron_layouts.torch_dist(tmp_path / "iter_0000010")
    (path / "common.pt").write_bytes(saved({"evil": Evil(tmp_path / "ran"), "args": ARGS}))
    assert arguments(str(path), ["common.pt"])["seq_length"] == 512
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()      # so it would have


@pytest.mark.parametrize(
    "content", [b"", b"PK", saved([1]), saved({"args": 1}), megatron_layouts.saved(b"\x80no pickle")]
)
def test_what_cannot_be_read_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "common.pt").write_bytes(content)
    assert arguments(str(tmp_path), ["common.pt"]) == {}


# ---------------------------------------------------------------------- what a runner makes of it


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
def test_server_and_evaluators_get_the_tokenizer(here: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`check_alike`, which asks sentencepiece, is in test_sentencepiece_layout."""
    monkeypatch.setattr(sentencepiece_layout, "check_alike", lambda model, content: None)
    (here / "t.model").write_bytes(BPE)
    megatron_layouts.torch_dist(here / "checkpoints" / "iter_0000010")
    handed_over(here, megatron={"tokenizer_type": kind, "tokenizer_path": "t.model"})
    config = configs.load(here / "old.yaml")
    queue = Queue(str(config.queue))
    (token,) = queue.tokens("pending")
    (here / "work").mkdir()
    request = Request(queue.ticket(token.ticket), config, here / "work", here / "log")
    with megatron.prepare(request) as servable:
        assert servable.megatron is not None
        wanted = {
            "gpt2": ["--tokenizer-type=GPT2BPETokenizer", f"--vocab-file={here}/vocab.json",
                     f"--merge-file={here}/merges.txt"],
            "sentencepiece": ["--tokenizer-type=SentencePieceTokenizer", f"--tokenizer-model={here}/t.model"],
        }[kind]  # fmt: skip
        assert set(wanted) <= set(megatron_arguments.tokenizer(servable.megatron))
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(servable.tokenizer))
        found = tokenizer("ab", add_special_tokens=False).input_ids
        assert found == ([4] if kind == "sentencepiece" else [64, 65])      # letters are numbered from "!"
