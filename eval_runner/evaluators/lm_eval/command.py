"""What the program inside is told: the model, or the server that answers for it, and the tasks."""

from __future__ import annotations

import json
import os
import urllib.parse
from pathlib import Path
from typing import Any, Literal

from autoeval_hooks.errors import CheckpointError, ConfigError
from eval_runner.evaluators.base import Context, Job
from eval_runner.evaluators.lm_eval.plan import Entry
from eval_runner.evaluators.lm_eval.settings import Settings
from eval_runner.evaluators.written import located, prefixed
from eval_runner.servers.base import Endpoint

Through = Literal["model", "server", "chat"]

MODELS: dict[Through, str] = {"model": "hf", "server": "local-completions", "chat": "local-chat-completions"}
"""lm_eval's names of its kinds of model."""
BATCH: dict[Through, int] = {"model": 8, "server": 1, "chat": 1}
"""Documents at once, unless the suite says. A server would answer those that come together in one batch."""
OUTPUT = "output"
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def through(settings: Settings, context: Context, job: Job) -> Through:
    """How this checkpoint is asked. Raises ConfigError where it cannot be asked so."""
    where = context.where
    way = settings.through or ("model" if job.loadable else "server")
    if way == "model" and not job.loadable:
        raise ConfigError(prefixed(context, f"{where}.through: lm_eval cannot load {job.path}; write "
                          "`through: server`, or configure `convert`"))  # fmt: skip
    if way != "model" and job.endpoint is None:
        raise ConfigError(prefixed(context, f"{where}.through: no server answers for {job.path}; add `server:`, or "
                          "write `through: model`"))  # fmt: skip
    return way


def plan(settings: Settings, context: Context, job: Job, way: Through, entries: list[Entry]) -> dict[str, Any]:
    """The plan for the program inside; the server is started here, if there is one and it does not run yet.

    Raises ConfigError for a server that speaks no protocol of lm_eval's, CheckpointError where nothing tells how many
    tokens the model takes, and what starting a server does.
    """
    code = {"trust_remote_code": job.trust_remote_code}
    if way == "model":
        model = {"pretrained": str(job.path), "tokenizer": str(job.tokenizer)} | code
        model["offload_folder"] = str(job.work_dir / "offload")
    else:
        model = _served(settings, context, job, way) | code
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    multiturn = settings.fewshot_as_multiturn
    return {
        "directory": str(context.base_dir),
        "include_path": str(located(context.base_dir, settings.include_path)) if settings.include_path else None,
        "entries": [{"task": e.name, "output": str(output(job, e))} for e in entries],
        "model": MODELS[way],
        "model_args": model | settings.model_args,
        "metadata": {"pretrained": str(job.tokenizer)},     # by which a task finds the tokenizer, also with a server
        "batch_size": settings.batch_size or BATCH[way],
        "device": settings.device,
        "options": {
            "num_fewshot": settings.num_fewshot, "limit": settings.limit, "gen_kwargs": settings.gen_kwargs or None,
            "apply_chat_template": settings.apply_chat_template, "system_instruction": settings.system_instruction,
            "fewshot_as_multiturn": settings.apply_chat_template if multiturn is None else multiturn,
            "confirm_run_unsafe_code": settings.allow_unsafe_code,
        } | (dict.fromkeys(seeds, settings.seed) if settings.seed is not None else {}),
    }  # fmt: skip


def output(job: Job, entry: Entry) -> Path:
    """Where a task's results are written."""
    return job.work_dir / OUTPUT / entry.where.rpartition("[")[2].rstrip("]")


def key_for(endpoint: Endpoint) -> dict[str, str]:
    """The variables by which lm_eval authenticates itself: the server's key, and never one that is for another
    service. No proxy leads to this host."""
    key = os.environ.get(endpoint.api_key_env, "") if endpoint.api_key_env else ""
    env = {"OPENAI_API_KEY": key}
    host = urllib.parse.urlsplit(endpoint.url).hostname or ""
    if host in ("localhost", "127.0.0.1", "::1"):
        env |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, (os.environ.get("NO_PROXY"), host))))
    return env


def _served(settings: Settings, context: Context, job: Job, way: Through) -> dict[str, Any]:
    assert job.endpoint is not None     # `through` has seen to it
    length = settings.model_args.get("max_length") or job.max_length or _length(job.path)
    if not length:
        raise CheckpointError(f"{job.path}: nothing says how many tokens its model takes; write "
                              f"`model_args: {{max_length: N}}` in {context.where}")  # fmt: skip
    endpoint = job.endpoint()
    if endpoint.api != "openai":
        raise ConfigError(prefixed(
            context, f"{context.where}: Megatron-LM's static server loses tokens of a prompt, and lm_eval cannot use "
            "it; set `server.mode: dynamic`, or configure `convert`"
        ))  # fmt: skip
    path = "chat/completions" if way == "chat" else "completions"
    found = {"model": endpoint.model, "base_url": f"{endpoint.url}/v1/{path}", "num_concurrent": settings.concurrency}
    if way == "chat":
        return found | {"tokenizer_backend": None}
    found |= {"tokenizer": str(job.tokenizer), "tokenizer_backend": "huggingface", "max_length": length}
    if context.server == "transformers":        # it takes text, and no numbers of tokens
        if settings.apply_chat_template:
            raise ConfigError(prefixed(context, f"{context.where}.through: `transformers serve` takes messages as a "
                              "chat only: write `through: chat`"))  # fmt: skip
        found["tokenized_requests"] = False
    return found


def _length(path: Path) -> int | None:
    """How many tokens a checkpoint in Hugging Face layout says that it takes."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        told = [one.get(key) for one in (config, config.get("text_config") or {}) for key in _LENGTHS]
        return next((n for n in told if isinstance(n, int) and n > 0), None)
    except (OSError, ValueError, AttributeError):
        return None
