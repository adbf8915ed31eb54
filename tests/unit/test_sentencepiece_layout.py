"""A SentencePiece model as a Hugging Face tokenizer: the same ids for the same texts, by the original itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from autoeval_hooks.errors import ConfigError
from eval_runner.checkpoints import sentencepiece_layout as layout
from eval_runner.checkpoints import sentencepiece_model as spm

TEXT = Path(layout.__file__).read_text(encoding="utf-8").splitlines()


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message; numbers here are below 128."""
    if isinstance(value, bytes):
        return bytes([*varint(number << 3 | 2), *varint(len(value))]) + value
    if isinstance(value, float):
        return bytes(varint(number << 3 | 5)) + struct.pack("<f", value)
    return bytes([*varint(number << 3), *varint(value)])


def varint(value: int) -> list[int]:
    return [value] if value < 0x80 else [value & 0x7F | 0x80, *varint(value >> 7)]


def made(*pieces: tuple[str, float, int], trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    rows = [field(1, text.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b"")
            for text, score, kind in pieces]  # fmt: skip
    return b"".join(field(1, row) for row in rows) + field(2, trainer) + field(3, normalizer)


BPE = made(
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("ab", -1.0, 1), ("\u2581ab", -2.0, 1), ("\u2581", -3.0, 1),
    ("a", -4.0, 1), ("b", -5.0, 1), trainer=field(3, 2),
)  # fmt: skip


def test_a_model_made_by_hand() -> None:
    """Ids by hand: the dummy prefix joins the first word, runs of spaces are one, what no piece covers is one <unk>."""
    model = spm.read(BPE, "m")
    assert [p.text for p in model.pieces][:4] == ["<unk>", "<s>", "</s>", "ab"]
    assert (model.kind, model.unk_id, model.dummy_prefix, model.fewer_spaces) == (spm.BPE, 0, True, True)
    ours = Tokenizer.from_str(json.dumps(layout.tokenizer_json(model, "m")))
    for text, ids in {"ab": [4], "ab  ab": [4, 4], " ba": [5, 7, 6], "aqqb": [5, 6, 0, 7], "": []}.items():
        assert ours.encode(text).ids == ids
    assert ours.decode([4, 4]) == "ab ab"


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 20, BPE[:-3], BPE[:30], field(1, b"") + BPE, field(1, field(1, 3)), b"text"]
)
def test_what_is_no_model(data: bytes) -> None:
    with pytest.raises(ConfigError, match="m: is no SentencePiece model"):
        spm.read(data, "m")


@pytest.mark.parametrize("trainer", [field(3, 3), field(3, 2) + field(24, 1)])
def test_what_cannot_be_laid_out(trainer: bytes) -> None:
    with pytest.raises(ConfigError, match="only unigram and BPE models"):
        layout.tokenizer_json(spm.read(made(("a", 0.0, 1), trainer=trainer), "m"), "m")


def test_without_the_original_nothing_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "m.model").write_bytes(BPE)
    with pytest.raises(ConfigError, match="pip install sentencepiece tokenizers"):
        layout.lay_out(tmp_path / "m.model", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.model"]


# ---------------------------------------------------------------------- with the real sentencepiece


def trained(directory: Path, kind: str, **options: Any) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    settings = {"vocab_size": 700, "byte_fallback": True, "minloglevel": 2, "num_threads": 1, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(directory / "m"), model_type=kind, hard_vocab_limit=False,
        **settings,
    )  # fmt: skip
    return directory / "m.model"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},     # as Llama's
        {"add_dummy_prefix": False, "user_defined_symbols": ["<sep>"], "pad_id": 3},
    ],
)
def test_a_trained_model_encodes_alike(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = trained(tmp_path, kind, **options)
    target = layout.lay_out(model, tmp_path / "out")
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours = Tokenizer.from_file(str(target / "tokenizer.json"))
    ties = 0
    for text in (*TEXT, *layout.TEXTS):
        found, wanted = ours.encode(text, add_special_tokens=False).ids, original.encode(text)
        ties += found != wanted
        assert sorted(found) == sorted(wanted)
    assert ties <= (len(TEXT) // 50 if kind == "unigram" else 0)
    settings = json.loads((target / "tokenizer_config.json").read_bytes())
    assert ours.token_to_id(settings["eos_token"]) == original.eos_id()
    assert ours.decode(original.encode("def f(x): pass")) == "def f(x): pass"


def test_it_is_made_once_and_never_mistaken(tmp_path: Path) -> None:
    model = trained(tmp_path, "bpe")
    target = layout.lay_out(model, tmp_path / "out")
    before = (target / "tokenizer.json").stat().st_mtime_ns
    assert layout.lay_out(model, target) == target
    assert (target / "tokenizer.json").stat().st_mtime_ns == before
    trained(tmp_path, "unigram")
    with pytest.raises(ConfigError, match="was made of another tokenizer"):
        layout.lay_out(model, target)


def test_one_that_encodes_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path, "bpe")
    content = layout.tokenizer_json(spm.read(model.read_bytes(), "m"), "m")
    content["model"]["merges"].reverse()
    with pytest.raises(ConfigError, match="as a Hugging Face tokenizer it would encode"):
        layout.check_alike(model, json.dumps(content))
