"""Text to learn from that every machine with Python has: the sources of Python's own library.

Writes, into one directory:

``tokenizer/``          a byte-level BPE, trained on the training files
``train.npy``           the training files' tokens, one after the other
``held_out.jsonl``      excerpts of files that training never sees, for bits per byte
``next_line.jsonl``     multiple choice from the same files: which of four lines really comes next
``questions.jsonl``     some of these as questions for the GPT judge: code, and the line that really follows
``baseline.jsonl``      an answer to each, to be compared with: a line from elsewhere in the same files

A file is held out by the digest of its content, so the split is the same in any order and on any machine with
the same Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CONTEXT = 256
"""Tokens that the model reads at once. Every held-out excerpt fits, so HELM scores it in one window."""
VOCABULARY = 2048
BOS, EOS = "<|bos|>", "<|eos|>"

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Not the library itself."""
TABLES = {"encodings", "pydoc_data", "html"}
"""Generated tables and one huge text: not code that anybody wrote."""
LEAST_BYTES = 1_000_000


def source_files() -> list[Path]:
    """The library's sources, sorted. Exits with one line where they are not installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = SKIP | TABLES
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not skipped.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    if sum(path.stat().st_size for path in files) < LEAST_BYTES:
        sys.exit(f"{root}: too few Python sources to learn from; install the full Python library (python3-full)")
    return files


def is_held_out(text: str) -> bool:
    """True for one file in ten, by its content."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def read(files: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to train on, and the held-out ones."""
    train: list[str] = []
    held_out: list[str] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue   # the few sources in an older encoding
        (held_out if is_held_out(text) else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text goes through it and back unchanged."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[BOS, EOS], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one row of tokens, each with a beginning and an end."""
    tokens: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        tokens += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return np.array(tokens, dtype=np.uint16)


JUDGED = 40
"""Questions for the judge, at most."""
TRIES = 100
"""For each excerpt or question that is wanted; most need a few."""


def excerpts(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], seen: str, count: int, size: int = 700
) -> Iterator[dict[str, object]]:
    """`count` excerpts of whole lines, about `size` bytes each, spread over all of `texts`, none of them in `seen`.

    Only ASCII: HELM counts the bytes of a token that is part of a character wrongly.
    """
    chosen = random.Random(0)
    wanted = [text for text in texts if text.isascii() and len(text) >= 2 * size]
    number = 0
    for tried in range(TRIES * count):
        if number == count:
            return
        text = wanted[tried % len(wanted)]
        start = text.index("\n", chosen.randrange(len(text) - int(1.5 * size))) + 1
        excerpt = text[start : text.rfind("\n", start, start + size) + 1]
        if not excerpt or excerpt in seen:
            continue
        if len(tokenizer.encode(excerpt, verbose=False)) < CONTEXT:   # one place is left for the start
            yield {"id": f"excerpt{number}", "text": excerpt}
            number += 1
    enough(number, count, "excerpts")


def questions(texts: list[str], seen: str, count: int, context: int = 10) -> Iterator[dict[str, object]]:
    """Multiple choice in HELM's `custom_mcqa` format: `context` lines of code, four lines, one of which follows.

    The wrong ones are lines with the same indentation from elsewhere in the held-out files. The indentation
    stands in the question, less the space that HELM puts before an answer, so the text to be scored is exactly
    the code as it was written.
    """
    chosen = random.Random(1)
    lines = [text.split("\n") for text in texts if text.isascii()]
    pool: dict[int, list[str]] = {}
    for file in lines:
        for line in file:
            if is_answer(line):
                pool.setdefault(indentation(line), []).append(line.strip())
    number = 0
    for _ in range(TRIES * count):
        if number == count:
            return
        file = chosen.choice(lines)
        if len(file) <= context + 1:
            continue
        at = chosen.randrange(context, len(file))
        before, line = "\n".join(file[at - context : at]), file[at]
        if not is_answer(line) or len(before) > 600 or f"{before}\n{line}" in seen:
            continue
        indent, right = indentation(line), line.strip()
        others = {other for other in chosen.sample(pool[indent], 30) if other != right and other not in before}
        wrong = sorted(others, key=lambda other: (abs(len(other) - len(right)), other))[:3]   # length must not tell
        answers = [right, *wrong]
        chosen.shuffle(answers)
        yield {
            "input": {"text": before + "\n" + " " * (indent - 1)},
            "references": [{"output": {"text": a}, "tags": ["correct"] if a == right else []} for a in answers],
            "split": "test",
            "id": f"line{number}",
        }
        number += 1
    enough(number, count, "questions")


def for_judge(questions: list[Any]) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """The multiple choice questions as open ones, and the first wrong line of each as the baseline's answer."""
    open_ones: list[dict[str, object]] = []
    baseline: list[dict[str, object]] = []
    for number, question in enumerate(questions):
        lines = [(r["output"]["text"], bool(r["tags"])) for r in question["references"]]
        right, wrong = (next(text for text, correct in lines if correct is what) for what in (True, False))
        text = question["input"]["text"]
        open_ones.append({"question_id": number, "text": text, "category": "code", "reference": right})
        baseline.append({"question_id": number, "model_id": "a line from elsewhere", "text": wrong})
    return open_ones, baseline


def enough(found: int, count: int, what: str) -> None:
    """End the program unless as many were found as were wanted."""
    if found < count:
        raise SystemExit(f"only {found} of {count} {what} could be made of held-out text that training does not see")


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def is_answer(line: str) -> bool:
    """A line of code that says something: indented, long enough, no comment."""
    text = line.strip()
    return indentation(line) in (4, 8, 12) and 12 <= len(text) <= 70 and not text.startswith("#")


def write_lines(path: Path, records: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the example's data.")
    parser.add_argument("--out", type=Path, default=HERE / "out/data", help="the directory to write")
    parser.add_argument("--excerpts", type=int, default=100, help="how many excerpts for bits per byte")
    parser.add_argument("--questions", type=int, default=100, help="how many multiple choice questions")
    args = parser.parse_args()

    train, held_out = read(source_files())
    tokenizer = train_tokenizer(train)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out / "tokenizer")
    tokens = encode(tokenizer, train)
    np.save(args.out / "train.npy", tokens)
    seen = "\0".join(train)      # some sources hold copies of parts of others
    write_lines(args.out / "held_out.jsonl", excerpts(tokenizer, held_out, seen, args.excerpts))
    choices = list(questions(held_out, seen, args.questions))
    write_lines(args.out / "next_line.jsonl", choices)
    open_ones, baseline = for_judge(choices[:JUDGED])
    write_lines(args.out / "questions.jsonl", open_ones)
    write_lines(args.out / "baseline.jsonl", baseline)
    size = sum(len(text.encode()) for text in train)
    print(
        f"{args.out}: {len(train)} files to train on ({size / 1e6:.1f} MB, {len(tokens) / 1e6:.2f} M tokens), "
        f"{len(held_out)} held out"
    )


if __name__ == "__main__":
    main()
