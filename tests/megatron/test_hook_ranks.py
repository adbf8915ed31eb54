"""Several processes that train: one of them hands over, and says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from autoeval_hooks import manifest
from tests.megatron.conftest import BATCH, SEQUENCE, Place, losses, of_ours

pytestmark = pytest.mark.megatron
Make = Callable[..., Place]


def tokenizer(directory: Path) -> Path:
    """A Hugging Face tokenizer with a word for each number."""
    directory.mkdir()
    words = {"<unk>": 0, "</s>": 1, **{str(i): i + 2 for i in range(100)}}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "notes.md").write_text("not the tokenizer's")
    return directory


def test_two_ranks_of_data(place: Make) -> None:
    at = place("data")
    words = tokenizer(at.path / "words")
    output = at.train(
        "--train-iters", "4", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "words", ranks=2,
        AUTOEVAL_CONFIG="autoeval.yaml",
    )  # fmt: skip
    found = at.tickets()
    assert sorted(found) == [("quick", 2), ("quick", 4), ("slow", 4)]
    m = found["quick", 4].manifest
    assert (m.samples, m.tokens) == (BATCH * 4, BATCH * 4 * SEQUENCE)
    assert m.megatron is not None
    assert (m.megatron.world_size, m.megatron.tensor_parallel) == (2, 1)
    assert Path(m.megatron.tokenizer["tokenizer_model"]).is_dir()      # absolute, though it was given as "words"
    assert os.path.isabs(m.megatron.tokenizer["tokenizer_model"])
    files = {file.path: file for file in m.megatron.tokenizer_files}
    assert sorted(files) == [str(words / "tokenizer.json"), str(words / "tokenizer_config.json")]
    assert files[str(words / "tokenizer.json")].digest == manifest.record(str(words), "tokenizer.json").digest
    assert {"__0_0.distcp", "__1_0.distcp"} < {file.path for file in m.files}
    assert of_ours(output) == []


def test_two_ranks_of_a_model_in_the_old_format(place: Make) -> None:
    """Each rank has a file of its own, and Megatron names the last rank's as the checkpoint."""
    at = place("tensor")
    output = at.train(
        "--train-iters", "4", "--tensor-model-parallel-size", "2", "--ckpt-format", "torch",
        "--save-retain-interval", "4", "--autoeval-config", "autoeval.yaml", ranks=2,
    )  # fmt: skip
    found = at.tickets()
    assert sorted(found) == [("quick", 2), ("quick", 4), ("slow", 4)]
    assert [p.name for p in at.save.glob("iter_*")] == ["iter_0000004"]
    for (_, step), ticket in found.items():
        m = ticket.manifest
        assert (m.path, m.samples) == (str(at.save / f"iter_{step:07d}"), BATCH * step)
        assert m.megatron is not None
        assert (m.megatron.format, m.megatron.world_size, m.megatron.tensor_parallel) == ("torch", 2, 2)
        names = [f"mp_rank_0{rank}/model_optim_rng.pt" for rank in (0, 1)]
        assert [file.path for file in m.files] == names
        assert all(manifest.record(ticket.pin, file.path) == file for file in m.files)
    assert of_ours(output) == []


def test_with_a_broken_configuration_training_goes_on(place: Make) -> None:
    """One rank says it, once."""
    at = place("broken", "queue: queue\nhook: {deadlin: 3}\nsuites: {quick: {evaluators: [{type: helm}]}}\n")
    output = at.train("--train-iters", "3", "--autoeval-config", "autoeval.yaml", ranks=2)
    (said,) = of_ours(output)
    assert "training goes on: autoeval.yaml: hook.deadlin: unknown key; did you mean 'deadline'?" in said
    assert sorted(losses(output)) == [1, 2, 3]
    assert sorted(p.name for p in at.save.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert not (at.save / ".autoeval").exists()
