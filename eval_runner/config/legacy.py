"""Read the older watcher's YAML, a file with `auto_eval:` at its top, as if it were a configuration of ours.

`translate` makes a raw mapping of ours, in memory, which the loader then checks as it checks any. Relative paths start
at the working directory, as they did. What is read otherwise than the older tool read it, stands in `Older.notes`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from autoeval_hooks import config as shared
from autoeval_hooks import yamlfile
from autoeval_hooks.strict import build
from eval_runner.config import in_clear, legacy_schema
from eval_runner.config.legacy_schema import AutoEval, Gpt, Megatron

KEY = "auto_eval"
PLACEHOLDERS = ("{step}", "{model}")
_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,120}")


@dataclass(frozen=True)
class Older:
    """An older file. `raw` is ours, `notes` what a user should know; `files` are those that it names, by key path,
    and must be there to evaluate anything; every path is absolute."""

    section: AutoEval
    raw: dict[str, Any]
    notes: tuple[str, ...]
    files: dict[str, str]
    in_clear: dict[str, str] = field(repr=False)
    """Credentials that stand in the file, by the variables under which the judge is given them; they stand nowhere
    else in this."""
    tokenizer: str
    """Where a Hugging Face layout of `megatron.tokenizer_path` belongs; "" where none is needed."""


def read(path: str | os.PathLike[str]) -> Older | None:
    """The older file at `path`; None for a file of ours. Raises one ConfigError with all that is wrong."""
    raw = yamlfile.read_yaml(path)
    return translate(raw, os.fspath(path)) if KEY in raw else None


def translate(raw: dict[str, Any], name: str) -> Older:
    """What the mapping of an older file stands for; `name` is the file's, for messages. Reads no other file."""
    errors = [f"{key}: unknown key; a file with `{KEY}:` holds nothing beside it" for key in raw if key != KEY]
    given = raw[KEY]
    gpt = given.get("gpt_evaluation") if isinstance(given, dict) else None
    named, clear = in_clear.split(gpt, f"{KEY}.gpt_evaluation", errors) if isinstance(gpt, dict) else ({}, {})
    if isinstance(gpt, dict):
        others = {key: value for key, value in gpt.items() if key not in in_clear.CREDENTIALS}
        given = {**given, "gpt_evaluation": others}
    shown: yamlfile.Shown = {}
    filled = yamlfile.expand_into(given, KEY, errors, shown)
    if named:
        filled["gpt_evaluation"] |= named
    old = build(AutoEval, filled, KEY, errors)
    if old is not None:
        errors += legacy_schema.problems(old, _NAME.fullmatch)
    yamlfile.fail(name, yamlfile.unexpanded(errors, shown))
    assert old is not None      # there would be errors
    files = {f"{KEY}.{key}": _absolute(value) for key, value in _files(old) if value}
    return Older(old, _literal(_ours(old)), tuple(_notes(old)), files, clear, _tokenizer(old))


def _ours(old: AutoEval) -> dict[str, Any]:
    """The raw mapping of ours; texts are meant as they stand."""
    megatron, wandb = old.megatron, old.wandb
    run: dict[str, Any] = {"name": old.full_name, "project": (wandb and wandb.project) or old.project_name}
    if megatron is not None and (tokens := round(megatron.token_per_iteration * 1e9)):
        run["tokens_per_step"] = tokens
    tokenizer = _tokenizer(old) or (old.huggingface and old.huggingface.tokenizer_path)
    if tokenizer:
        run["tokenizer"] = _absolute(tokenizer)
    out: dict[str, Any] = {
        "queue": os.path.join(_cache(old), "autoeval"), "run": run, "suites": {}, "runner": {"order": "oldest"},
        "sinks": [],
    }  # fmt: skip
    if old.helm is not None:
        out["suites"]["helm"] = {"evaluators": [_helm(old)]}
    if old.gpt_evaluation is not None:
        out["suites"]["gpt"] = {"evaluators": [_gpt(old.gpt_evaluation, megatron)]}
    if megatron is not None:
        out["runner"]["allow_pickled_weights"] = True
        out["server"] = {"type": "megatron", "checkout": _absolute(megatron.megatron_home or ".")}
    elif old.gpt_evaluation is not None:
        out["server"] = {"type": "transformers"}
    if wandb is not None:
        sink = {"type": "wandb", "late": "companion"}
        out["sinks"].append(sink | ({"base_url": wandb.base_url} if wandb.base_url else {}))
    return out


def _helm(old: AutoEval) -> dict[str, Any]:
    helm = old.helm
    assert helm is not None
    out = {
        "type": "helm", "entries_file": _absolute(helm.helm_spec_template_path), "max_instances": helm.eval_instances,
        "output_path": _absolute(helm.helm_output_path), "output_suite": old.full_name,
    }  # fmt: skip
    return out | ({"env": f"conda:{helm.helm_env_name}"} if helm.helm_env_name else {})


def _gpt(gpt: Gpt, megatron: Megatron | None) -> dict[str, Any]:
    out: dict[str, Any] = {"type": "gpt"}
    for key in ("question_file", "baseline_file", "prompt_file", "reviewer_file", "answer_file", "result_file"):
        if value := getattr(gpt, key):
            out[key] = _absolute(_per_step(value) if key in ("answer_file", "result_file") else value)
    if megatron is not None:
        out["answers"] = {"max_tokens": megatron.max_tokens}
    judge: dict[str, Any] = {}
    if gpt.openai_api_key == "EMPTY":       # as for a local server that asks for none
        judge["api_key_env"] = None
    for key, ours in (("openai_api_key", "api_key_env"), ("openai_organization", "organization_env")):
        if found := in_clear.VARIABLE.fullmatch(getattr(gpt, key) or ""):
            judge[ours] = found[1]
    judge |= {"concurrency": gpt.worker_num} if gpt.worker_num else {}
    judge |= {"attempts": gpt.max_retry} if gpt.max_retry else {}
    return out | ({"judge": judge} if judge else {})


def _per_step(written: str) -> str:
    """A path with {step} in its file's name, unless a placeholder is in it: no checkpoint overwrites another's."""
    if any(place in written for place in PLACEHOLDERS):
        return written
    path = PurePath(written)
    return str(path.with_name(f"{path.stem}-{{step}}{path.suffix}"))


def _files(old: AutoEval) -> Iterator[tuple[str, str | None]]:
    """Key paths and files or directories without which nothing can be evaluated."""
    if old.helm:
        yield "helm.helm_spec_template_path", old.helm.helm_spec_template_path
    if m := old.megatron:
        keys = ("vocab_path", "merge_path") if m.tokenizer_type == "gpt2" else ("tokenizer_path",)
        yield from ((f"megatron.{key}", getattr(m, key)) for key in keys)
    if old.huggingface:
        yield "huggingface.tokenizer_path", old.huggingface.tokenizer_path
    if g := old.gpt_evaluation:
        for key in ("question_file", "baseline_file", "prompt_file", "reviewer_file"):
            yield f"gpt_evaluation.{key}", getattr(g, key)


def _notes(old: AutoEval) -> Iterator[str]:
    if old.megatron is not None:
        for key, instead in (("port", "the server takes a free one"), ("log_path", "logs stand in QUEUE/logs")):
            if getattr(old.megatron, key) is not None:
                yield f"{KEY}.megatron.{key} means nothing here: {instead}"
        yield ("checkpoints of Megatron-LM hold pickles, which are loaded, as the older tool did: whoever can write to "
               f"{KEY}.megatron.checkpoint_path can run code on this host")  # fmt: skip
    if old.helm is not None:
        if not old.helm.helm_env_name:
            yield f"{KEY}.helm.helm_env_name is not given: HELM is autoeval's (`autoeval-runner env create helm`)"
        if old.helm.benchmarks is not None:
            yield f"{KEY}.helm.benchmarks is for `autoeval-runner record`; all benchmarks are evaluated and kept"
    if (gpt := old.gpt_evaluation) is not None:
        for one in in_clear.CREDENTIALS.values():
            if getattr(gpt, one.key) == f"${{{one.ours}}}":
                yield (f"{one.where} stands in clear; messages about it name ${one.ours}, under which the judge's "
                       "client alone is given it")  # fmt: skip
        for key in ("answer_file", "result_file"):
            written = getattr(gpt, key)
            if written and _per_step(written) != written:
                yield f"{KEY}.gpt_evaluation.{key}: is written for each checkpoint: {_absolute(_per_step(written))}"


def _tokenizer(old: AutoEval) -> str:
    needed = old.megatron is not None and old.megatron.tokenizer_type == "sentencepiece"
    return os.path.join(_cache(old), "tokenizer") if needed else ""


def _cache(old: AutoEval) -> str:
    return _absolute(old.cache_dir or "cache")


def _absolute(path: str) -> str:
    return shared.absolute(path, os.getcwd())


def _literal(value: Any) -> Any:
    """The value with what would be filled in once more written so that it stays."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("$", "$$") if isinstance(value, str) else value
