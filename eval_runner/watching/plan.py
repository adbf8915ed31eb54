"""What the options of `autoeval-runner watch` and the configuration ask for, put together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.errors import ConfigError
from eval_runner import config as configs
from eval_runner.checkpoints import sentencepiece_layout
from eval_runner.config import in_clear, legacy
from eval_runner.config.legacy import Older
from eval_runner.config.models import Config
from eval_runner.config.narrowed import narrowed
from eval_runner.watching.given import Giver
from eval_runner.watching.looks import Kind
from eval_runner.watching.watcher import Wanted, Watcher

OLD_INTERVAL = 1000
"""Iterations between two checkpoints, where an older file is given and no option."""
_OLD_SECTIONS = {"helm": "helm", "gpt": "gpt_evaluation"}
_KEPT = {
    "helm": {"output_path": "helm_output_path"},
    "gpt": {"answer_file": "answer_file", "result_file": "result_file"},
}
"""Settings that say where output is kept, by a training's name or step, and the older file's names for them."""
_UNITS = {"": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Options:
    """The options of the command line; None and () where they are not given. `check_interval` is in seconds."""

    config_file: str
    begin: int | None = None
    end: int | None = None
    interval: int | None = None
    kind: Kind | None = None
    eval_type: str | None = None
    directories: tuple[str, ...] = ()


def seconds(text: str) -> float:
    """A time as written: minutes, or a number with s, m or h behind it. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or not (value := float(found[1]) * _UNITS[found[2]]):
        raise ValueError(f"{text!r:.40} is no time; write minutes (30), or 30s, 5m, 1h")
    return value


@dataclass(frozen=True)
class Planned:
    """The watcher, the configuration that its checkpoints are evaluated by, and the type of evaluator that it was cut
    down to, if any."""

    watcher: Watcher
    config: Config
    eval_type: str | None


def plan(options: Options, say: Callable[[str], None]) -> Planned:
    """`say` is told how an older file is read, and what defaults mean. Raises ConfigError, before anything is looked
    at."""
    older = legacy.read(options.config_file)
    config = configs.load(options.config_file, warn=False)
    if eval_type := _eval_type(options, older):
        config = narrowed(config, eval_type)
    in_clear.warn(config)
    kind = _kind(options, older, config)
    directories = _directories(options, older)
    _check_kept(options.config_file, directories, older, config)
    if older is not None:
        for note in older.notes:
            say(note)
        _prepare(older, options.config_file, config)
    wanted = _wanted(options, older is not None, say)
    giver = Giver(config, older, several=len(directories) > 1)
    return Planned(Watcher(giver, directories, wanted, kind, say), config, eval_type)


def _eval_type(options: Options, older: Older | None) -> str | None:
    """An older file may describe both kinds, of which the older tool ran one: helm, unless told otherwise."""
    if options.eval_type or older is None:
        return options.eval_type
    return "helm" if older.section.helm else "gpt"


def _kind(options: Options, older: Older | None, config: Config) -> Kind | None:
    if older is None:
        return options.kind
    megatron = older.section.megatron is not None
    kind = options.kind or ("megatron" if megatron else "huggingface")
    if kind == "megatron" and not megatron:
        raise ConfigError(f"{options.config_file}: auto_eval.megatron: missing; --model-type megatron needs it")
    loads = all(e["type"] == "helm" for suite in config.suites.values() for e in suite.evaluators)
    if kind == "huggingface" and megatron and not loads:
        raise ConfigError(
            f"{options.config_file}: auto_eval.megatron: the judge asks a server, and Megatron-LM's does not serve "
            "Hugging Face checkpoints; write another file for these, with `huggingface` in the place of `megatron`"
        )
    return kind


def _directories(options: Options, older: Older | None) -> tuple[str, ...]:
    """Absolute; those of the command line, else the file's. Raises ConfigError without one."""
    given = list(options.directories)
    if not given and older is not None:
        section = older.section
        found = section.megatron or section.huggingface
        given = [found.checkpoint_path] if found and found.checkpoint_path else []
    if not given:
        where = "auto_eval.huggingface.checkpoint_path, or " if older else ""
        raise ConfigError(f"{options.config_file}: {where}--checkpoint-dir: missing; name the directory to watch")
    return tuple(dict.fromkeys(os.path.abspath(os.path.expanduser(one)) for one in given))


def _check_kept(name: str, directories: tuple[str, ...], older: Older | None, config: Config) -> None:
    """Raise ConfigError where files that evaluators keep for several trainings would have the same names."""
    if len(directories) == 1:
        return
    errors = []
    for suite in config.suites.values():
        for i, evaluator in enumerate(suite.evaluators):
            where = f"auto_eval.{_OLD_SECTIONS[evaluator['type']]}" if older else f"suites.{suite.name}.evaluators[{i}]"
            for key, old_key in _KEPT.get(evaluator["type"], {}).items():
                written = evaluator.get(key)
                if not isinstance(written, str) or "{model}" in written:
                    continue
                remedy = "write {model} in its name"
                if key == "output_path":
                    suite_key = "model_name" if older else "output_suite"
                    remedy = f"watch each with a file of its own, which has another `{suite_key}`"
                errors.append(f"{name}: {where}.{old_key if older else key}: --checkpoint-dir names {len(directories)} "
                              f"trainings, whose output would replace each other's there; {remedy}")  # fmt: skip
    if errors:
        raise ConfigError("\n".join(errors))


def _wanted(options: Options, older: bool, say: Callable[[str], None]) -> Wanted:
    interval = options.interval or (OLD_INTERVAL if older else None)
    begin = options.begin
    if begin is None:
        begin = interval or 0
        if interval is not None:
            say(f"--begin-iteration is not given: the first is {begin}, as --iteration-interval says")
    if options.end is None:
        say("--end-iteration is not given: the watch goes on until it is stopped")
    elif options.end < begin:
        raise ConfigError(f"--end-iteration: {options.end} is less than --begin-iteration, {begin}")
    return Wanted(begin, options.end, interval)


def _prepare(older: Older, name: str, config: Config) -> None:
    """Raise ConfigError unless the files that an older file names for what is evaluated are there; lay its tokenizer
    out."""
    idle = {"helm": "auto_eval.helm.", "gpt": "auto_eval.gpt_evaluation."}
    unused = tuple(start for suite, start in idle.items() if suite not in config.suites)
    missing = [f"{name}: {key}: {path}: no such file; correct the path (relative ones start at the working directory)"
               for key, path in older.files.items() if not key.startswith(unused) and not os.path.exists(path)]
    missing += [f"{name}: {why}" for why in in_clear.problems(config)]
    if missing:
        raise ConfigError("\n".join(missing))
    if older.tokenizer:
        model = older.files["auto_eval.megatron.tokenizer_path"]
        sentencepiece_layout.lay_out(Path(model), Path(older.tokenizer))
