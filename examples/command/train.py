"""Train a model of letter pairs on Python's own documentation, in plain Python, and hand over three checkpoints.

It stands for a training of yours: the layout is that of a Hugging Face checkpoint, with real safetensors, and the
program in autoeval.yaml is the only one that knows what they mean.
"""

from __future__ import annotations

import array
import json
from pathlib import Path
from pydoc_data.topics import topics

from autoeval_hooks import submit

ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    text = " ".join("".join(c if c in ALPHABET else " " for c in "".join(topics.values()).lower()).split())
    counts = [[1.0] * len(ALPHABET) for _ in ALPHABET]
    seen = 0
    for step in (1, 2, 3):
        until = len(text) // 100 ** (3 - step)      # of the text: 0.01 %, 1 %, all
        for first, second in zip(text[seen:until], text[seen + 1 : until + 1], strict=False):
            counts[ALPHABET.index(first)][ALPHABET.index(second)] += 1
        seen = until
        submit(save(Path(f"out/checkpoint-{step}"), counts), step=step, config="autoeval.yaml")


def save(path: Path, counts: list[list[float]]) -> Path:
    """A checkpoint with the probabilities of the next letter as its weights."""
    size = len(ALPHABET)
    header = json.dumps(
        {"next": {"dtype": "F32", "shape": [size, size], "data_offsets": [0, 4 * size * size]}}
    ).encode()
    weights = array.array("f", [n / sum(row) for row in counts for n in row]).tobytes()
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    (path / "config.json").write_text('{"model_type": "letter-pairs"}')
    (path / "tokenizer.json").write_text(json.dumps({"alphabet": ALPHABET}))
    return path


if __name__ == "__main__":
    main()
