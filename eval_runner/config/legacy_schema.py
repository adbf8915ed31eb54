"""What may stand in the older watcher's YAML: all keys that its programs read, and the few that we add to it.

The keys and their defaults are those of Data-Juicer's tools/evaluator/evaluator.py, gpt_eval/gpt_evaluator.py and
their documentation. `seq_length` and the section `huggingface` are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """`megatron`. `token_per_iteration` is in billions, 0 where it is not known; `seq_length` (tokens) is only needed
    where a checkpoint does not tell it. `port` and `log_path` mean nothing any more."""

    checkpoint_path: str
    tokenizer_type: Literal["gpt2", "sentencepiece"]
    process_num: int = 1
    megatron_home: str | None = None
    vocab_path: str | None = None
    merge_path: str | None = None
    tokenizer_path: str | None = None
    max_tokens: int = 512
    token_per_iteration: float = 0.0
    seq_length: int | None = None
    log_path: str | None = None
    port: int | None = None


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """`huggingface`, which is ours: the directory that holds `checkpoint-N`, and a tokenizer's directory for
    checkpoints that hold none."""

    checkpoint_path: str | None = None
    tokenizer_path: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A row of `helm.benchmarks`, which is the recorder's."""

    name: str
    metrics: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Helm:
    """`helm`."""

    helm_spec_template_path: str
    helm_output_path: str
    helm_env_name: str | None = None
    eval_instances: int = 100
    benchmarks: tuple[Benchmark, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Gpt:
    """`gpt_evaluation`."""

    question_file: str
    baseline_file: str
    prompt_file: str | None = None
    reviewer_file: str | None = None
    answer_file: str | None = None
    result_file: str | None = None
    openai_api_key: str | None = None
    openai_organization: str | None = None
    worker_num: int | None = None
    max_retry: int | None = None
    debug: bool | None = None


@dataclass(frozen=True)
class Wandb:
    """`wandb`."""

    project: str | None = None
    base_url: str | None = None


@dataclass(frozen=True, kw_only=True)
class AutoEval:
    """`auto_eval`, all of the file."""

    project_name: str
    model_name: str
    cache_dir: str | None = None
    megatron: Megatron | None = None
    huggingface: HuggingFace | None = None
    helm: Helm | None = None
    gpt_evaluation: Gpt | None = None
    wandb: Wandb | None = None

    @property
    def full_name(self) -> str:
        """The run's name: the older tool's for the model, and for HELM's suite."""
        return f"{self.project_name}-{self.model_name}"


_AT_LEAST: tuple[tuple[str, str, float], ...] = (
    ("megatron", "process_num", 1),
    ("megatron", "max_tokens", 1),
    ("megatron", "token_per_iteration", 0),
    ("megatron", "seq_length", 1),
    ("helm", "eval_instances", 1),
    ("gpt_evaluation", "worker_num", 1),
    ("gpt_evaluation", "max_retry", 1),
)
"""Section, key, and the least value that it may have."""
_NOT_EMPTY = ("project_name", "model_name")


def problems(old: AutoEval, is_name: Callable[[str], object]) -> Iterator[str]:
    """What is wrong with values that have the right type, and with what keys say of each other. `is_name` tells
    whether a text can be the name of HELM's suite, and so of a directory."""
    for section, key, least in _AT_LEAST:
        value: Any = getattr(getattr(old, section), key, None)
        if value is not None and value < least:
            yield f"auto_eval.{section}.{key}: must be at least {least:g}, found {value}"
    empty = [key for key in _NOT_EMPTY if not getattr(old, key).strip()]
    yield from (f"auto_eval.{key}: empty; name the run" for key in empty)
    if not empty and not is_name(old.full_name):
        yield (f"auto_eval.model_name: {old.full_name!r:.130} names HELM's suite, a directory; use letters, digits, "
               "'.', '_' and '-', 120 at most")  # fmt: skip
    if old.helm is None and old.gpt_evaluation is None:
        yield "auto_eval: has neither `helm` nor `gpt_evaluation`, so nothing would be evaluated; add one of them"
    if old.megatron is not None and old.huggingface is not None:
        yield ("auto_eval.huggingface: stands beside `megatron`, and one server answers for one kind of checkpoint; "
               "write two files")  # fmt: skip
    if old.megatron is not None:
        needed = ("vocab_path", "merge_path") if old.megatron.tokenizer_type == "gpt2" else ("tokenizer_path",)
        kind = old.megatron.tokenizer_type
        yield from (f"auto_eval.megatron.{key}: missing; tokenizer_type {kind!r} needs it"
                    for key in needed if not getattr(old.megatron, key))  # fmt: skip
    if old.gpt_evaluation is not None and old.gpt_evaluation.debug:
        yield "auto_eval.gpt_evaluation.debug: made scores without a judge, which nothing does here; remove the key"
