"""Lay a SentencePiece model out as a Hugging Face tokenizer, and see that it encodes as the original does.

`tokenizer.json` is written directly, in the format of the package tokenizers; the pieces keep their ids. sentencepiece,
which Megatron-LM's server needs for such a tokenizer anyway, and tokenizers are asked for the same texts before
anything counts: a model that is not the same on all of them is refused. Where a unigram model has two best ways to cut
a text, of the same pieces in another order, the two may choose differently (7 of 26,347 lines of Python): that passes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from autoeval_hooks import fsio
from autoeval_hooks.errors import ConfigError
from eval_runner.checkpoints import sentencepiece_model as spm
from eval_runner.checkpoints.sentencepiece_model import Model

SOURCE = "autoeval-source.json"
"""Says which model file the directory was made of."""
SPACE = "\u2581"
TEXTS = (
    "Hello, world!", " leading and  double   spaces ", "tabs\tand\nnew lines\n\n", "", " ",
    "def f(x):\n    return x**2", "Ünïcödé, naïve café — “quotes” … ½ ﬁne", "日本語の文章です。漢字とカナ。",
    "한국어 문장입니다.", "Привет, мир", "العربية",
    "🙂👩‍👩‍👧 emoji", "1234567890 3.14159 -42", "https://example.com/a?b=c&d=%20", "a" * 50,
    "\u00a0\u3000spaces", "\u2581 \u2581x",
)  # fmt: skip
"""What both must encode alike. No names of special tokens: a Hugging Face tokenizer finds these in a text, as wanted
there, and SentencePiece does not."""


def lay_out(model: Path, target: Path) -> Path:
    """Make the directory `target` of the model file `model`, unless it is there and was made of the same.

    Raises ConfigError for what is no such file, for one that cannot be laid out to encode alike, and for a `target`
    that was made of another.
    """
    try:
        data = model.read_bytes()
    except OSError as error:
        raise ConfigError(f"{model}: cannot be read ({error.strerror}); name the SentencePiece model") from error
    source = {"sha256": hashlib.sha256(data).hexdigest()}
    if target.exists():
        if _source(target) != source:
            raise ConfigError(f"{target}: was made of another tokenizer than {model}; remove it, or use another "
                              "directory")  # fmt: skip
        return target
    read = spm.read(data, str(model))
    content = json.dumps(tokenizer_json(read, str(model)), ensure_ascii=False)
    check_alike(model, content)
    new = target.with_name(f".{target.name}-{fsio.unique()}")
    try:
        new.mkdir(parents=True)
        for name, text in (
            ("tokenizer.json", content), ("tokenizer_config.json", json.dumps(_settings(read))),
            (SOURCE, json.dumps(source)),
        ):  # fmt: skip
            (new / name).write_text(text, encoding="utf-8")
        os.rename(new, target)
    except OSError as error:
        if _source(target) != source:       # else another watcher was faster
            raise ConfigError(f"{target}: the tokenizer cannot be kept there ({error}); mend it") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def tokenizer_json(model: Model, name: str) -> dict[str, Any]:
    """The content of tokenizer.json. Raises ConfigError for a model that the format cannot express."""
    if model.kind not in (spm.UNIGRAM, spm.BPE) or model.suffix_space or not model.escaped_spaces:
        raise ConfigError(f"{name}: only unigram and BPE models with spaces before words can be laid out; convert it "
                          "yourself, and name the directory as `run.tokenizer`")  # fmt: skip
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.fewer_spaces:
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True},
                  {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]  # fmt: skip
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    added = [
        {"id": i, "content": p.text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": p.kind != spm.USER_DEFINED}
        for i, p in enumerate(model.pieces) if p.kind in (spm.CONTROL, spm.USER_DEFINED) or i == model.unk_id
    ]  # fmt: skip
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if model.dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(model) if model.kind == spm.UNIGRAM else _bpe(model),
    }  # fmt: skip


def check_alike(model: Path, content: str) -> None:
    """Raise ConfigError unless the tokenizer of this tokenizer.json encodes `TEXTS` as sentencepiece does."""
    original = _imported("sentencepiece", model).SentencePieceProcessor(model_file=str(model))
    ours = _imported("tokenizers", model).Tokenizer.from_str(content)
    unigram = json.loads(content)["model"]["type"] == "Unigram"
    for text in TEXTS:
        theirs, found = original.encode(text), ours.encode(text, add_special_tokens=False).ids
        if theirs != found and not (unigram and sorted(theirs) == sorted(found)):
            raise ConfigError(
                f"{model}: as a Hugging Face tokenizer it would encode {text!r:.60} as {found[:12]}, and SentencePiece "
                f"encodes it as {theirs[:12]}; convert it yourself and name the directory as `run.tokenizer`"
            )


def _unigram(model: Model) -> dict[str, Any]:
    return {
        "type": "Unigram", "unk_id": model.unk_id, "vocab": [[p.text, p.score] for p in model.pieces],
        "byte_fallback": model.byte_fallback,
    }  # fmt: skip


def _bpe(model: Model) -> dict[str, Any]:
    """Every way to split a piece into two is a merge; SentencePiece takes the pair whose piece has the best score."""
    ids = {p.text: i for i, p in enumerate(model.pieces)}
    plain = {p.text for p in model.pieces if p.kind in (spm.NORMAL, spm.UNUSED)}
    merges = [
        (-model.pieces[ids[text]].score, ids[text[:cut]], ids[text[cut:]], [text[:cut], text[cut:]])
        for text in plain for cut in range(1, len(text)) if text[:cut] in plain and text[cut:] in plain
    ]  # fmt: skip
    return {
        "type": "BPE", "dropout": None, "unk_token": model.special["unk"], "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": model.byte_fallback, "ignore_merges": False,
        "vocab": ids, "merges": [pair for *_, pair in sorted(merges, key=lambda merge: merge[:3])],
    }  # fmt: skip


def _settings(model: Model) -> dict[str, Any]:
    there = {p.text for p in model.pieces}
    named = {f"{what}_token": text for what, text in model.special.items() if text in there}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}


def _source(directory: Path) -> object:
    try:
        return json.loads((directory / SOURCE).read_bytes())
    except (OSError, ValueError):
        return None


def _imported(name: str, model: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{model}: `pip install sentencepiece tokenizers` beside autoeval: a SentencePiece tokenizer is laid out "
            "anew for HELM, and must encode as the original does"
        ) from error
