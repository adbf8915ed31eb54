"""Prepare the example's text: Python's own library, of which one file in ten is held out for evaluation.

Nothing in it is about autoeval. The text, its tokenizer and the held-out excerpts are those of examples/huggingface;
here the training text is written as Megatron-LM's tools/preprocess_data.py reads it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
OUT = HERE / os.environ.get("EXAMPLE_OUT", "out")     # as in train.sh and autoeval.yaml


def text_of_the_other_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("python_sources", HERE.parent / "huggingface/data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the example's data.")
    parser.add_argument("--out", type=Path, default=OUT / "data", help="the directory to write")
    parser.add_argument("--excerpts", type=int, default=100, help="how many excerpts for bits per byte")
    args = parser.parse_args()

    data = text_of_the_other_example()
    train, held_out = data.read(data.source_files())
    tokenizer = data.train_tokenizer(train)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out / "tokenizer")
    (args.out / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train))
    data.write_lines(args.out / "held_out.jsonl", data.excerpts(tokenizer, held_out, "\0".join(train), args.excerpts))
    print(f"{args.out}: {len(train)} files to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
