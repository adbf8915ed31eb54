"""What autoeval adds to HELM: a client for one local checkpoint, and bits per byte of local text.

This module runs inside the environment of HELM, which has no autoeval: it imports helm, what helm
brings, and the standard library. `helm-run --plugins autoeval_helm` registers the run spec, and
model_deployments.yaml names the client and the window service.
"""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import helm.clients.huggingface_client as huggingface
import torch
import transformers
from helm.benchmark.adaptation.common_adapter_specs import get_language_modeling_adapter_spec
from helm.benchmark.metrics.basic_metrics import compute_request_state_metrics
from helm.benchmark.metrics.language_modeling_metrics import LanguageModelingMetric
from helm.benchmark.metrics.metric import MetricResult, MetricSpec, PerInstanceStats, add_context
from helm.benchmark.metrics.metric_name import MetricContext, MetricName
from helm.benchmark.metrics.statistic import Stat, merge_stat
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Input, Instance, Scenario, ScenarioSpec
from helm.benchmark.window_services.local_window_service import LocalWindowService
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

CANNOT_LOAD = "autoeval cannot load the checkpoint"
"""Starts the message of an error that is the checkpoint's fault; autoeval looks for it in the log."""

UNKNOWN_LENGTH = 2048
"""Window, in tokens, of a model whose configuration states no limit (recurrent ones, ALiBi)."""


class CannotLoad(Exception):
    """The checkpoint or its tokenizer is not one that transformers can load."""


def _loaded(what: str, path: str, load: Any) -> Any:
    try:
        return load()
    except torch.cuda.OutOfMemoryError:
        raise  # the device's fault, and perhaps gone at the next try
    except Exception as error:
        text = " ".join(str(error).split())
        raise CannotLoad(f"{CANNOT_LOAD}: {what} in {path}: {type(error).__name__}: {text}") from error


class GreedyServer(huggingface.HuggingFaceServer):  # type: ignore[misc]  # helm is not here for mypy
    """HELM's server, decoding greedily where HELM asks for temperature 0.

    HELM samples at temperature 1e-7 instead. Where two logits are equal, which bfloat16 makes common,
    that draws one of them at random, and two identical runs differ.
    """

    def __init__(self, path: str, wrapped_tokenizer: Any, **kwargs: Any):
        if kwargs.get("torch_dtype") is None:
            # On a CPU bfloat16 is slower than float32, and emulated on many; elsewhere as it was trained.
            kwargs["torch_dtype"] = "auto" if torch.cuda.is_available() else torch.float32
        super().__init__(path, wrapped_tokenizer, **kwargs)
        self.model.eval()
        sample = self.model.generate

        def generate(*args: Any, temperature: float = 1.0, **options: Any) -> Any:
            if temperature > 1e-6:
                return sample(*args, temperature=temperature, **options)
            options.update(do_sample=False, temperature=None, top_p=None, top_k=None)
            return sample(*args, **options)

        self.model.generate = generate


class CheckpointClient(huggingface.HuggingFaceClient):  # type: ignore[misc]  # helm is not here for mypy
    """HELM's Hugging Face client for one checkpoint, loaded at once so that a bad one ends the run early."""

    def __init__(
        self, cache_config: Any, tokenizer: Any, model_name: str, path: str, torch_dtype: str | None = None,
        trust_remote_code: bool = False,
    ):  # fmt: skip
        wrapped = _loaded("the tokenizer", path, tokenizer.get_wrapped_tokenizer)
        with wrapped as plain:
            end = plain.eos_token
        dtype = {"torch_dtype": f"torch.{torch_dtype}" if torch_dtype not in (None, "auto") else torch_dtype}
        options = {**dtype, "trust_remote_code": trust_remote_code}
        super().__init__(cache_config, tokenizer, path, end, apply_chat_template=False, **options)
        # The factory makes whatever this name of its module stands for.
        huggingface.HuggingFaceServer = GreedyServer
        _loaded(
            "the model",
            path,
            lambda: huggingface.HuggingFaceServerFactory.get_server(model_name, path, wrapped, **self._kwargs),
        )


@functools.cache
def _limits(tokenizer_name: str, tokenizer: str, model: str, trusted: bool) -> tuple[str, str, bool, int]:
    """The tokenizer's end of text and start of text, whether it adds the latter itself, and the model's length."""
    code = {"trust_remote_code": trusted}
    wrapped = _loaded(
        "the tokenizer", tokenizer, lambda: HuggingFaceTokenizer.get_tokenizer(tokenizer_name, tokenizer, **code)
    )
    config = _loaded(
        "config.json", model, lambda: transformers.AutoConfig.from_pretrained(model, local_files_only=True, **code)
    )
    config = config.get_text_config()
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    length = next((n for key in keys if isinstance(n := getattr(config, key, None), int) and n > 0), UNKNOWN_LENGTH)
    with wrapped as plain:
        adds_start = bool(plain("x").input_ids[:1] == [plain.bos_token_id])
        return plain.eos_token or "", plain.bos_token or plain.eos_token or "", adds_start, length


def _sizes(length: int, end: str, start: str, adds_start: bool) -> dict[str, Any]:
    """The arguments of HELM's window for a model that takes `length` tokens. `start` is "" where there is none."""
    return {
        "max_sequence_length": length - 1,
        "max_request_length": length - 1 if adds_start or not start else length,
        "max_sequence_and_generated_tokens_length": length - 1 if adds_start else length,
        "end_of_text_token": end,
        "prefix_token": "" if adds_start else start,
    }


class CheckpointWindow(LocalWindowService):  # type: ignore[misc]  # helm is not here for mypy
    """The model's own window.

    A tokenizer that puts its start token before every prompt takes one place of the window with it;
    for any other, the first window of a text starts with the start token, so that every token of the
    text is predicted.
    """

    def __init__(
        self, service: Any, tokenizer_name: str, tokenizer: str, model: str, trust_remote_code: bool = False
    ):
        end, start, adds_start, length = _limits(tokenizer_name, tokenizer, model, trust_remote_code)
        super().__init__(service, tokenizer_name, **_sizes(length, end, start, adds_start))


class LocalTextScenario(Scenario):  # type: ignore[misc]  # helm is not here for mypy
    """Documents of a file or a directory: `.jsonl` with `text` and perhaps `id` in each line, or `.txt`."""

    name = "autoeval_bpb"
    description = "Bits per byte of local text"
    tags: tuple[str, ...] = ()

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def get_instances(self, output_path: str) -> list[Any]:
        root = Path(self.path)
        files = sorted(f for f in root.rglob("*") if f.suffix in (".jsonl", ".txt")) if root.is_dir() else [root]
        documents: dict[str, str] = {}
        for file in files:
            name = file.relative_to(root).as_posix() if root.is_dir() else file.name
            for key, text in _documents(file, name):
                if key in documents:
                    raise ValueError(f"{file}: the id {key!r} stands twice")
                documents[key] = text
        if not documents:
            raise FileNotFoundError(f"{root}: no document with text in any .jsonl or .txt file")
        return [
            Instance(input=Input(text=text), references=[], split=TEST_SPLIT, id=key)
            for key, text in documents.items()
        ]


def _documents(file: Path, name: str) -> list[tuple[str, str]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".jsonl":
        return [(name, text)] if text else []
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            document = data["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: expected a JSON object with a `text`") from error
        if not isinstance(document, str):
            raise ValueError(f"{file}:{number}: `text` is not text")
        if document:
            found.append((str(data.get("id", f"{name}:{number}")), document))
    return found


class BitsPerByteMetric(LanguageModelingMetric):  # type: ignore[misc]  # helm is not here for mypy
    """-log2 p(text) / bytes(text), over all documents and for each.

    HELM's own count adds up the bytes of each token decoded alone: that loses the leading space of a
    SentencePiece token, and makes three bytes of each part of a character that several tokens share.
    Here the bytes are those of the document in UTF-8. (Where a window ends within a character, HELM's
    adapter leaves the parts of that character out of the request: its bytes count, its bits do not.)
    """

    def __init__(self) -> None:
        super().__init__([])

    def __repr__(self) -> str:
        return "BitsPerByteMetric"

    def evaluate(self, scenario_state: Any, metric_service: Any, eval_cache_path: str, parallelism: int) -> Any:
        deployment = scenario_state.adapter_spec.model_deployment
        window = WindowServiceFactory.get_window_service(deployment, metric_service)
        states: dict[Any, list[Any]] = defaultdict(list)
        for state in scenario_state.request_states:
            states[state.instance].append(state)
        totals: dict[Any, Any] = {}
        documents = []
        for instance, windows in states.items():
            bits = sum(_bits(state, window) for state in windows)
            size = len(instance.input.text.encode()) - _unpredicted_bytes(windows[0], window)
            if size <= 0:
                continue  # one token and nothing to predict it from
            stats = [
                Stat(MetricName("logprob")).add(-bits * math.log(2)),
                Stat(MetricName("num_bytes")).add(size),
                Stat(MetricName("bits_per_byte")).add(bits / size),
            ]
            for state in windows:
                more = compute_request_state_metrics(
                    self.efficiency_metric, scenario_state.adapter_spec, state, metric_service
                )
                for stat in more:
                    merge_stat(totals, add_context(stat, MetricContext.from_instance(instance)))
            context = MetricContext.from_instance(instance)
            stats = [add_context(stat, context) for stat in stats]
            documents.append(PerInstanceStats(instance.id, instance.perturbation, 0, stats))
            for stat in [*stats[:2], add_context(Stat(MetricName("num_instances")).add(1), context)]:
                merge_stat(totals, stat)
        for context in {MetricContext.from_metric_name(name) for name in totals}:
            by_name = {n.name: s for n, s in totals.items() if MetricContext.from_metric_name(n) == context}
            ratio = -by_name["logprob"].sum / by_name["num_bytes"].sum / math.log(2)
            merge_stat(totals, add_context(Stat(MetricName("bits_per_byte")).add(ratio), context))
            count = by_name["num_instances"]
            totals[count.name] = Stat(count.name).add(count.sum)
        return MetricResult(list(totals.values()), documents)


def _conditioning(state: Any, window: Any) -> int:
    """Tokens at the front of the answer that are not predicted: the adapter's, and what the tokenizer put before."""
    tokens = state.result.completions[0].tokens
    added = len(tokens) - len(window.encode(state.request.prompt).tokens)
    return int(state.num_conditioning_tokens + max(added, 0))


def _bits(state: Any, window: Any) -> float:
    tokens = state.result.completions[0].tokens[_conditioning(state, window) :]
    return float(-sum(token.logprob for token in tokens) / math.log(2))


def _unpredicted_bytes(first: Any, window: Any) -> int:
    """Bytes of a first token that nothing stands before: without any start token it has no probability."""
    if _conditioning(first, window):
        return 0
    return len(first.result.completions[0].tokens[0].text.encode())


@run_spec_function("autoeval_bpb")  # type: ignore[untyped-decorator]  # helm is not here for mypy
def get_autoeval_bpb_spec(path: str, name: str = "") -> Any:
    """Bits per byte of the text in `path`, an absolute path; `name` is for people."""
    return RunSpec(
        name=f"autoeval_bpb:name={name or Path(str(path)).stem}",
        scenario_spec=ScenarioSpec(class_name="autoeval_helm.LocalTextScenario", args={"path": str(path)}),
        adapter_spec=get_language_modeling_adapter_spec(),
        metric_specs=[MetricSpec(class_name="autoeval_helm.BitsPerByteMetric")],
        groups=["autoeval_bpb"],
    )
