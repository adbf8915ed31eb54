"""Makes the older watcher's YAML as its documentation describes it, filled in, and the files that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

QUESTION = {"question_id": 1, "text": "What is a lock?", "category": "general"}
PROMPT = {"category": "general", "system_prompt": "s", "prompt_template": "{question} {answer_1} {answer_2}",
          "defaults": {}, "description": "d", "prompt_id": 1}  # fmt: skip
REVIEWER = {"category": "general", "metadata": {"model": "gpt-x", "temperature": 0.2, "max_tokens": 10}}


def documented(**sections: Any) -> dict[str, Any]:
    """The documented example with every key, but for credentials and for the keys of the other tokenizer. A section
    given as None is left out; a mapping is laid over the documented one."""
    full: dict[str, Any] = {
        "project_name": "proj",
        "model_name": "tiny",
        "cache_dir": "cache",
        "megatron": {
            "process_num": 4, "megatron_home": "Megatron-LM", "checkpoint_path": "checkpoints",
            "tokenizer_type": "gpt2", "vocab_path": "vocab.json", "merge_path": "merges.txt", "max_tokens": 256,
            "token_per_iteration": 0.004194304,
        },
        "helm": {
            "helm_spec_template_path": "spec.conf", "helm_output_path": "helm_output", "helm_env_name": "helm-env",
        },
        "gpt_evaluation": {
            "question_file": "./question.jsonl", "answer_file": "answers/answer.jsonl",
            "baseline_file": "./baseline.jsonl", "prompt_file": "./prompt.jsonl", "reviewer_file": "./reviewer.jsonl",
            "result_file": "reviews/result.jsonl",
        },
        "wandb": {"project": "scores", "base_url": "https://wandb.example"},
    }  # fmt: skip
    for key, value in sections.items():
        known = full.get(key)
        full[key] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return {"auto_eval": {key: value for key, value in full.items() if value is not None}}


def write(directory: Path, content: dict[str, Any]) -> Path:
    """The file, in `directory`, which must be the working directory for its relative paths."""
    path = directory / "old.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def files(directory: Path) -> None:
    """What the documented example names: all of it small, the tokenizer with bytes only."""
    lines = {
        "question": QUESTION, "baseline": {"question_id": 1, "model_id": "base", "text": "A thing."}, "prompt": PROMPT,
        "reviewer": REVIEWER,
    }  # fmt: skip
    for name, content in lines.items():
        (directory / f"{name}.jsonl").write_text(json.dumps(content) + "\n")
    (directory / "spec.conf").write_text('entries: [{description: "mmlu:model=<model>,subject=anatomy", priority: 1}]')
    letters = {chr(i): n for n, i in enumerate(range(33, 127))}
    (directory / "vocab.json").write_text(json.dumps(letters | {"<|endoftext|>": len(letters)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "Megatron-LM").mkdir(exist_ok=True)
