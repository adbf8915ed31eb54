"""Megatron's checkpoints made servable: verified, laid out for `--load`, with the tokenizer that training used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoeval_hooks import manifest, pin, ticket
from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.manifest import FileRecord, MegatronRecord
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import config as configs
from eval_runner.checkpoints import megatron
from eval_runner.checkpoints.base import Request, Servable
from tests import megatron_layouts as made

Prepare = Callable[..., AbstractContextManager[Servable]]
VOCAB = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}


def files(*paths: Path) -> tuple[FileRecord, ...]:
    """As the training side records them."""
    return tuple(replace(manifest.record(str(p.parent), p.name), path=str(p)) for p in paths)


@pytest.fixture
def huggingface(tmp_path: Path) -> MegatronRecord:
    path = tmp_path / "trainer" / "tok"
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    return MegatronRecord(
        tokenizer_type="HuggingFaceTokenizer", tokenizer={"tokenizer_model": str(path)}, seq_length=64,
        tokenizer_files=files(path / "tokenizer.json", path / "tokenizer_config.json"),
    )  # fmt: skip


@pytest.fixture
def gpt2(tmp_path: Path) -> MegatronRecord:
    path = tmp_path / "trainer" / "bpe"
    path.mkdir(parents=True)
    (path / "my-vocab.json").write_text(json.dumps(VOCAB))
    (path / "my-merges.txt").write_text("#version: 0.2\na b\n")
    return MegatronRecord(
        tokenizer_type="GPT2BPETokenizer", tokenizer_files=files(path / "my-vocab.json", path / "my-merges.txt"),
        tokenizer={"vocab_file": str(path / "my-vocab.json"), "merge_file": str(path / "my-merges.txt")},
    )  # fmt: skip


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def go(
        record: MegatronRecord | None = None, make: Callable[[Path], Path] = made.torch_dist, *, step: int = 10,
        name: str = "iter_0000010", pinned: bool = False, hook_tokenizer: str = "", **settings: Any,
    ) -> AbstractContextManager[Servable]:  # fmt: skip
        path = make(tmp_path / "out" / name)
        found = manifest.build(str(path), path=str(path), step=step, run=RunIdentity("r"), megatron=record,
                               tokenizer=hook_tokenizer)  # fmt: skip
        at = ""
        if pinned:
            at = pin.adopt(pin.make(str(path), pin.pins_dir(str(path)), "auto"), "a" * 64)
            shutil.rmtree(path)
        file = tmp_path / "autoeval.yaml"
        suites = {"quick": {"evaluators": [{"type": "helm"}]}}
        defaults = {"queue": "queue", "suites": suites, "runner": {"allow_pickled_weights": True}}
        file.write_text(yaml.safe_dump(defaults | settings))
        work = tmp_path / "work"
        work.mkdir()
        request = Request(ticket.new(found, "quick", "5" * 64, 5, at), configs.load(str(file)), work, tmp_path / "log")
        return megatron.prepare(request)

    return go


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("make", [made.torch_dist, made.torch_dcp, made.torch])
def test_it_is_laid_out_for_load(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path, make: Callable[[Path], Path], pinned: bool
) -> None:
    expected = make(tmp_path / "expected")
    with prepare(huggingface, make, pinned=pinned) as servable:
        assert (servable.path / "latest_checkpointed_iteration.txt").read_text() == "10"
        (iteration,) = [p for p in servable.path.iterdir() if p.is_dir()]
        assert iteration.name == "iter_0000010"
        for name in manifest.model_files(str(expected)):
            assert (iteration / name).read_bytes() == (expected / name).read_bytes(), name
        assert servable.megatron is not None
        assert servable.megatron.seq_length == 64
        servable.unchanged()


def test_a_checkpoint_that_changes_is_found(prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path) -> None:
    with prepare(huggingface, made.torch) as servable:
        (tmp_path / "out" / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"other")
        with pytest.raises(CheckpointError, match=r"mp_rank_00/model_optim_rng\.pt: changed while it was evaluated"):
            servable.unchanged()


def test_a_checkpoint_of_bridge_is_to_be_converted(prepare: Prepare, huggingface: MegatronRecord) -> None:
    def bridge(path: Path) -> Path:
        made.torch_dist(path)
        (path / "run_config.yaml").write_text("model: {}\n")
        return path

    with pytest.raises(ConfigError, match=r"iter_0000010 is a checkpoint of Megatron-Bridge's.*add `convert: "), \
            prepare(huggingface, bridge):
        pass


def test_pickles_need_leave(prepare: Prepare, huggingface: MegatronRecord) -> None:
    with pytest.raises(CheckpointError, match=r"iter_0000010: .*set `runner\.allow_pickled_weights: true`"), \
            prepare(huggingface, runner={}):
        pass


@pytest.mark.parametrize(
    ("step", "name"),
    [(11, "iter_0000010"), (0, "iter_0000000"), (10, "release"), (10, "checkpoint-10"), (10, "iter_00000010")],
)
def test_it_is_found_by_its_iteration_or_not_at_all(
    prepare: Prepare, huggingface: MegatronRecord, step: int, name: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: Megatron finds a checkpoint by its iteration"), \
            prepare(huggingface, step=step, name=name):
        pass


# ---------------------------------------------------------------------- tokenizers


def test_the_tokenizer_of_training_is_used_where_this_host_has_it(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    (tmp_path / "trainer").rename(here)
    with prepare(huggingface, path_map={str(tmp_path / "trainer"): str(here)}) as servable:
        assert servable.tokenizer == here / "tok"
        assert servable.megatron is not None
        assert servable.megatron.tokenizer == {"tokenizer_model": str(here / "tok")}
        (here / "tok" / "tokenizer.json").write_text('{"other": 1}')
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: changed while it was evaluated"):
            servable.unchanged()


@pytest.mark.parametrize("relative", ["tok", "./tok", "trainer/tok", "~/trainer/tok"])
def test_a_relative_path_of_the_training_host_is_found(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path, relative: str
) -> None:
    with prepare(replace(huggingface, tokenizer={"tokenizer_model": relative})) as servable:
        assert servable.megatron is not None
        assert servable.megatron.tokenizer["tokenizer_model"] == str(tmp_path / "trainer" / "tok")


def test_a_name_of_the_hub_stays(prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path) -> None:
    record = replace(huggingface, tokenizer={"tokenizer_model": "org/model"}, tokenizer_files=())
    with prepare(record, run={"tokenizer": str(tmp_path / "trainer" / "tok")}) as servable:
        assert servable.megatron is not None
        assert servable.megatron.tokenizer["tokenizer_model"] == "org/model"
        assert servable.tokenizer == tmp_path / "trainer" / "tok"


def test_gpt2s_files_are_laid_out_as_transformers_reads_them(
    prepare: Prepare, gpt2: MegatronRecord, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    with prepare(gpt2) as servable:
        assert servable.tokenizer.parent == tmp_path / "work"
        read = transformers.AutoTokenizer.from_pretrained(str(servable.tokenizer))
        assert read.encode("ab") == [VOCAB["ab"]]
        assert read.eos_token_id == VOCAB["<|endoftext|>"]
        assert servable.megatron is not None
        assert servable.megatron.tokenizer == gpt2.tokenizer


def test_a_tokenizer_that_is_not_here_has_a_remedy(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "trainer")
    with pytest.raises(CheckpointError, match=r"tok.*not here; map it with `path_map`, or set `run\.tokenizer`"):
        prepare(huggingface).__enter__()


def test_run_tokenizer_stands_in_for_one_that_is_not_here(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path
) -> None:
    (tmp_path / "trainer" / "tok").rename(tmp_path / "mine")
    with prepare(huggingface, run={"tokenizer": "mine"}) as servable:
        assert servable.tokenizer == tmp_path / "mine"
        assert servable.megatron is not None
        assert servable.megatron.tokenizer["tokenizer_model"] == str(tmp_path / "mine")


def test_vocabulary_files_that_are_not_here_cannot_be_stood_in_for(
    prepare: Prepare, gpt2: MegatronRecord, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    os.unlink(gpt2.tokenizer["merge_file"])
    with pytest.raises(CheckpointError, match=r"my-merges\.txt: .*not here; map it with `path_map`$"):
        prepare(gpt2, run={"tokenizer": "mine"}).__enter__()


def test_another_tokenizer_under_the_same_path_is_refused(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path
) -> None:
    (tmp_path / "trainer" / "tok" / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(CheckpointError, match=r"tok/tokenizer\.json: is not the tokenizer that training used"):
        prepare(huggingface).__enter__()


@pytest.mark.parametrize("kind", ["NullTokenizer", "SentencePieceTokenizer", "TikTokenizer", ""])
def test_a_tokenizer_that_evaluators_cannot_load_is_asked_for(prepare: Prepare, tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"iter_0000010: evaluators cannot load .*; set `run\.tokenizer` to"):
        prepare(MegatronRecord(tokenizer_type=kind)).__enter__()


def test_a_checkpoint_given_by_hand_needs_run_tokenizer_alone(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with prepare(None, run={"tokenizer": "mine"}) as servable:
        assert servable.tokenizer == tmp_path / "mine"
        assert servable.megatron == MegatronRecord(format="torch_dist")


@pytest.mark.parametrize("where", ["ticket", "configuration"])
def test_run_tokenizer_that_is_not_here_is_said(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path, where: str
) -> None:
    gone = str(tmp_path / "gone")
    settings: dict[str, Any] = {"run": {"tokenizer": gone}} if where == "configuration" else {"hook_tokenizer": gone}
    with pytest.raises(CheckpointError, match=r"gone: the tokenizer that `run\.tokenizer` names is not here"):
        prepare(huggingface, **settings).__enter__()


@pytest.mark.parametrize("given", [False, True])
def test_a_tokenizers_code_needs_leave(
    prepare: Prepare, huggingface: MegatronRecord, tmp_path: Path, given: bool
) -> None:
    """Megatron's server loads its own, also where evaluators use another."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "trainer" / "tok" / "config.json").write_text('{"auto_map": {"AutoTokenizer": "x.X"}}')
    with pytest.raises(CheckpointError, match=r"tok/config\.json: names code of the checkpoint's own"):
        prepare(huggingface, **({"run": {"tokenizer": "mine"}} if given else {})).__enter__()
