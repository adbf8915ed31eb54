"""Read ``autoeval.yaml`` for the runner, with everything that is wrong with it said at once and in our words."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from autoeval_hooks import config as shared
from autoeval_hooks import strict, yamlfile
from eval_runner import secrets
from eval_runner.config import in_clear, legacy
from eval_runner.config.models import Config, ConvertSection, File, RunnerSection, Suite, SuiteEntry

_WORDS = {
    "string_type": "expected text, found {found}",
    "int_type": "expected a whole number, found {found}",
    "float_type": "expected a number, found {found}",
    "bool_type": "expected true or false, found {found}",
    "dict_type": "expected a mapping, found {found}",
    "model_type": "expected a mapping, found {found}",
    "dataclass_type": "expected a mapping, found {found}",
    "list_type": "expected a list, found {found}",
    "literal_error": "{found} is not one of {expected}",
    "greater_than": "must be more than {gt:g}, found {found}",
    "greater_than_equal": "must be at least {ge:g}, found {found}",
    "less_than_equal": "must be at most {le:g}, found {found}",
    "extra_forbidden": "unknown key{near}",
    "unexpected_keyword_argument": "unknown key{near}",
}
"""What pydantic finds, by its name for it, in the words that the training side uses for the same. What is missing
or empty is not here: the checks that both sides share have said it by then."""


def load(path: str | os.PathLike[str], *, warn: bool = True) -> Config:
    """Read and check a configuration file, ours or the older watcher's. Raises one ConfigError with all that is wrong,
    each with its key path. A key in clear that cannot be used is warned of, but where what is evaluated is checked, too
    (`warn=False`)."""
    name = os.fspath(path)
    text = yamlfile.read_text(path)
    raw, clear = _raw(text, name)
    secrets.learn(raw)
    errors = shared.check_keys(raw)
    for suite_name, suite in _mapping(raw.get("suites")).items():
        errors += shared.check_suite(f"suites.{suite_name}", suite_name, suite)
    sinks = raw.get("sinks")
    for i, sink in enumerate(sinks if isinstance(sinks, list) else ()):
        errors += shared.check_typed(f"sinks[{i}]", sink, "wandb")
    if "server" in raw:
        errors += shared.check_typed("server", raw["server"], "megatron")
    shown: yamlfile.Shown = {}
    expanded = yamlfile.expand_into(raw, "", errors, shown)
    errors += shared.check_values(expanded)
    try:
        file = File.model_validate_json(shared.canonical(expanded))
    except ValidationError as error:
        errors += _in_our_words(error)
    yamlfile.fail(name, yamlfile.unexpanded(errors, shown))

    base = os.path.dirname(os.path.abspath(name))
    path_map = shared.normal_map(file.path_map)
    tokenizer = _mapped(file.run.tokenizer, base, path_map) if file.run.tokenizer else None
    config = Config(
        path=Path(os.path.abspath(name)),
        queue=Path(_mapped(file.queue, base, path_map)),
        run=dataclasses.replace(file.run, tokenizer=tokenizer),
        hook=file.hook,
        path_map=path_map,
        suites={key: _suite(key, suite, raw["suites"][key]) for key, suite in file.suites.items()},
        runner=file.runner,
        server=file.server.model_dump() if file.server else None,
        convert=_convert(file.convert, base),
        environments=Path(shared.absolute(file.environments, base)) if file.environments else None,
        sinks=[sink.model_dump() for sink in file.sinks],
        raw_text=text,
        sinks_text=tuple(shared.canonical(sink) for sink in raw.get("sinks", ())),
    )
    in_clear.take(clear, path)
    if warn:
        in_clear.warn_of_all(config)
    return config


def effective(config: Config) -> dict[str, Any]:
    """The configuration with all defaults, for people to read: values that the file gives stand as they stand in
    it, so that no secret is filled in; `queue` is the directory that the runner uses."""
    raw, _ = _raw(config.raw_text, str(config.path))
    file = File.model_validate_json(shared.canonical(yamlfile.expand(raw, str(config.path))))
    out = {key: value for key, value in file.model_dump(mode="json").items() if key != "suites"}
    cadence = dataclasses.asdict(shared.Cadence())
    out["suites"] = dict.fromkeys(raw["suites"], cadence)
    out = shared.merged(out, raw)
    if "$" not in raw["queue"]:
        out["queue"] = str(config.queue)
    return {key: out[key] for key in shared.KEYS if key in out}


def schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors that check YAML while it is typed."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **File.model_json_schema(),
        "title": "autoeval.yaml",
        "description": "Which checkpoints are evaluated, when, on what, and where the scores go",
    }


def _raw(text: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's mapping, an older file's as one of ours; and the credentials that stand in clear in such a one."""
    raw = shared.merged(yamlfile.parse_yaml(text, name), {})
    if legacy.KEY not in raw:
        return raw, {}
    older = legacy.translate(raw, name)
    return shared.merged(older.raw, {}), older.in_clear


def _suite(name: str, entry: SuiteEntry, raw: dict[str, Any]) -> Suite:
    return Suite(
        name=name,
        cadence=shared.Cadence(**{key: getattr(entry, key) for key in shared.CADENCE_KEYS}),
        digest=shared.suite_digest(raw),
        text=shared.suite_text(raw),
        evaluators=[evaluator.model_dump() for evaluator in entry.evaluators],
    )


def _convert(section: ConvertSection | None, base: str) -> ConvertSection | None:
    if section is None or section.directory is None:
        return section
    return section.model_copy(update={"directory": shared.absolute(section.directory, base)})


def _mapped(path: str, base: str, path_map: dict[str, str]) -> str:
    """A path as this host sees it: from `base`, or, if it is absolute and so may be the training host's, mapped."""
    full = shared.absolute(path, base)
    return shared.map_path(full, path_map) if os.path.isabs(path) else full


def _in_our_words(error: ValidationError) -> list[str]:
    out = []
    for found in error.errors(include_url=False):
        *above, key = found["loc"]
        values = {
            **found.get("ctx", {}),
            "found": _found(found["input"]),
            "near": strict.near(str(key), _known(tuple(above))),
        }
        if "expected" in values:
            values.update(found=repr(found["input"]), expected=values["expected"].replace(" or ", ", "))
        words = _WORDS.get(found["type"], found["msg"].replace("{", "{{").replace("}", "}}"))
        out.append(f"{_key_path(found['loc'])}: {words.format(**values)}")
    return out


def _known(above: tuple[int | str, ...]) -> tuple[str, ...]:
    """The keys that may stand below a key path."""
    sections: dict[tuple[int | str, ...], tuple[str, ...]] = {
        (): shared.KEYS,
        ("run",): tuple(f.name for f in dataclasses.fields(shared.RunSection)),
        ("hook",): tuple(f.name for f in dataclasses.fields(shared.HookSection)),
        ("runner",): tuple(RunnerSection.model_fields),
        ("convert",): tuple(ConvertSection.model_fields),
    }
    return sections.get(above, ())


def _key_path(loc: tuple[int | str, ...]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


def _found(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "nothing" if value is None else f"{value!r:.60}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
