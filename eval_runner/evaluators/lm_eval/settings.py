"""The settings of a `type: lm_eval` entry."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autoeval_hooks.strict import build
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.written import clean, located, refused

_OURS = {
    "pretrained": "the checkpoint is the ticket's",
    "model": "the checkpoint is the ticket's",
    "tokenizer": "it is the checkpoint's, or `run.tokenizer`",
    "base_url": "the address is the server's",
    "trust_remote_code": "`runner.trust_remote_code` decides that",
    "batch_size": "write it beside `model_args`",
    "device": "write it beside `model_args`",
    "auth_token": "no secret stands in a file; `server.api_key_env` names the variable that holds the key",
    "header": "no secret stands in a file; `server.api_key_env` names the variable that holds the key",
}
"""Keys of lm_eval's model_args that are not the suite's to choose, and why."""
_COUNTS = ("limit", "batch_size", "concurrency")


@dataclass(frozen=True)
class Settings:
    """What the suite says.

    `tasks` are names of tasks, groups or tags; `include_path` is a directory of further definitions. `num_fewshot`,
    `limit` (documents of each task), `gen_kwargs`, `system_instruction`, `apply_chat_template`, `fewshot_as_multiturn`
    and `seed` are lm_eval's, whose defaults hold. `through` is ``model`` (lm_eval loads the checkpoint), ``server``
    (it asks for completions) or ``chat`` (for chat completions); default: ``model`` where the checkpoint can be
    loaded, else ``server``. `batch_size` is a number, as another batch gives other roundings: 8 for a model, 1 for a
    server. `concurrency` is how many requests a server gets at once. `metrics` chooses some of a task's or group's
    metrics, `name` is put before the benchmarks' names. `allow_unsafe_code` lets tasks run code that the model wrote.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    through: Literal["model", "server", "chat"] | None = None
    concurrency: int = 1
    device: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    seed: int | None = None
    metrics: dict[str, tuple[str, ...]] = field(default_factory=dict)
    name: str | None = None
    env: str | None = None
    allow_unsafe_code: bool = False

    def benchmark(self, task: str) -> str:
        """The benchmark's name of a task or group."""
        return f"{clean(self.name)}.{clean(task)}" if self.name else clean(task)


def parse(data: dict[str, Any], context: Context) -> Settings:
    """Raises ConfigError that names every key that does not fit."""
    where, errors = context.where, list[str]()
    data = dict(data)
    if str(data.get("batch_size")).startswith("auto"):
        errors.append(f"{where}.batch_size: write a number; what \"auto\" finds depends on the machine's free memory, "
                      "and the scores on it")  # fmt: skip
        del data["batch_size"]
    open_ended = {key: data.pop(key) for key in ("model_args", "gen_kwargs") if key in data}
    settings = build(Settings, data, where, errors)
    for key, value in open_ended.items():
        errors += _mapping(value, f"{where}.{key}")
    if settings is not None:
        settings = replace(settings, **open_ended)
        errors += _misfits(settings, where)
        if settings.include_path and not located(context.base_dir, settings.include_path).is_dir():
            path = located(context.base_dir, settings.include_path)
            errors.append(f"{where}.include_path: {path} is no directory; name that which holds the tasks' YAML files")
    if errors or settings is None:
        raise refused(context, errors)
    return settings


def _mapping(value: object, where: str) -> list[str]:
    """`build` knows no values of any kind; JSON's are what lm_eval is given."""
    if not isinstance(value, dict):
        return [f"{where}: expected a mapping"]
    return [f"{where}: the key {key!r} is not text" for key in value if not isinstance(key, str)]


def _misfits(settings: Settings, where: str) -> list[str]:
    given = {key: getattr(settings, key) for key in _COUNTS}
    errors = [f"{where}.{key}: must be 1 or more" for key, n in given.items() if n is not None and n < 1]
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        errors.append(f"{where}.num_fewshot: must be 0 or more")
    if not settings.tasks:
        errors.append(f"{where}.tasks: name at least one task; `lm_eval ls tasks` lists them")
    for i, task in enumerate(settings.tasks):
        if not task or task != task.strip() or any(c in task for c in ",*?[ "):
            errors.append(f"{where}.tasks[{i}]: {task!r} is no name of a task, group or tag")
        elif task.endswith((".yaml", ".yml")):
            errors.append(f"{where}.tasks[{i}]: {task!r} is a file: write the name that stands in it; its directory is "
                          "for `include_path`")  # fmt: skip
    errors += [f"{where}.tasks: {task!r} stands there twice" for task, n in Counter(settings.tasks).items() if n > 1]
    errors += [f"{where}.model_args.{key}: is not for a suite to choose: {_OURS[key]}"
               for key in settings.model_args if key in _OURS]  # fmt: skip
    if settings.through == "chat" and not settings.apply_chat_template:
        errors.append(f"{where}.through: a chat is asked with `apply_chat_template: true`")
    if settings.fewshot_as_multiturn and not settings.apply_chat_template:
        errors.append(f"{where}.fewshot_as_multiturn: goes with `apply_chat_template: true`")
    for key, metrics in settings.metrics.items():
        if not metrics:
            errors.append(f"{where}.metrics.{key}: name at least one metric, or leave the key out")
    return errors
