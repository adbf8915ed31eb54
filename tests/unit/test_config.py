"""The runner's configuration: it reads all of the file, and says of a mistake what the training side says of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks import config as hook_config
from autoeval_hooks import yamlfile
from autoeval_hooks.config import Cadence, ConfigError
from eval_runner import config
from eval_runner.cli.validate import dump
from eval_runner.config.loader import effective
from eval_runner.config.models import File, RunnerSection

SUITES = "suites:\n  quick: {every_steps: 100, evaluators: [{type: helm, entries: [a]}]}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(text)
    return path


def lines(load: Any, path: Path) -> list[str]:
    """The errors that a reader finds, without the file's name and the line that counts them."""
    try:
        load(path)
    except ConfigError as error:
        found = [line.removeprefix(f"{path}: ") for line in str(error).splitlines()]
        return found[1:] if len(found) > 1 else found
    return []


def test_reads_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_KEY", "s3cret")
    text = """
version: 1
queue: /train/queue
run: {project: p, tokenizer: /train/tok}
hook: {max_pins: 4}
path_map: {/train/: /eval/}
suites:
  quick: {every_steps: 100, priority: 9, evaluators: [{type: helm, x: '${AE_KEY}', n: 1}, {type: gpt}]}
runner: {order: oldest, max_attempts: 1, lease: 30}
environments: envs
sinks: [{type: wandb, companion: true}]
"""
    path = write(tmp_path, text)
    loaded = config.load(path)
    assert loaded.path == path
    assert loaded.queue == Path("/eval/queue")
    assert loaded.run == hook_config.RunSection(project="p", tokenizer="/eval/tok")
    assert loaded.hook == hook_config.HookSection(max_pins=4)
    assert loaded.path_map == {"/train": "/eval"}
    assert (loaded.runner.order, loaded.runner.max_attempts, loaded.runner.lease) == ("oldest", 1, 30.0)
    assert loaded.environments == tmp_path / "envs"
    assert loaded.sinks == [{"type": "wandb", "companion": True}]
    assert loaded.raw_text == text

    suite = loaded.suites["quick"]
    assert (suite.name, suite.cadence) == ("quick", Cadence(every_steps=100, priority=9))
    assert suite.evaluators == [{"type": "helm", "x": "s3cret", "n": 1}, {"type": "gpt"}]
    assert suite.text == '{"evaluators":[{"n":1,"type":"helm","x":"${AE_KEY}"},{"type":"gpt"}]}'
    assert suite.digest == hashlib.sha256(suite.text.encode()).hexdigest()
    assert suite.digest == hook_config.load(path).suites["quick"].digest


def test_defaults(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, f"queue: q\npath_map: {{'{tmp_path}': /elsewhere}}\n{SUITES}"))
    assert loaded.queue == tmp_path / "q"   # it starts at our own file, so it is no path of the training host
    assert loaded.sinks == [{"type": "wandb"}]
    assert loaded.environments is None
    assert (loaded.runner.order, loaded.runner.max_attempts, loaded.runner.lease) == ("newest", 3, 60.0)
    assert loaded.suites["quick"].cadence == Cadence(every_steps=100)
    assert config.load(write(tmp_path, f"queue: q\nsinks: []\nrunner:\n{SUITES}")).sinks == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runner: {ordr: newest}", "runner.ordr: unknown key; did you mean 'order'?"),
        ("runner: {order: best}", "runner.order: 'best' is not one of 'newest', 'oldest'"),
        ("runner: {lease: 0.5}", "runner.lease: must be at least 1, found 0.5"),
        ("runner: {timeout: 0}", "runner.timeout: must be more than 0, found 0"),
        ("runner: {breaker: 0}", "runner.breaker: must be at least 1, found 0"),
        ("runner: {lease: long}", "runner.lease: expected a number, found 'long'"),
        ("runner: {max_attempts: 0}", "runner.max_attempts: must be at least 1, found 0"),
        ("runner: {max_attempts: true}", "runner.max_attempts: expected a whole number, found True"),
        ("runner: 3", "runner: expected a mapping, found 3"),
        ("environments: 3", "environments: expected text, found 3"),
        ("sinks: wandb", "sinks: expected a list, found 'wandb'"),
        ("sinks: [wandb]", "sinks[0]: expected a mapping such as {type: wandb, ...}"),
        ("sinks: [{x: 1}]", "sinks[0].type: missing; write which kind this is, such as 'type: wandb'"),
        ("sinks: [{type: wandb, x: '${AE_NOT_SET}'}]",
         "sinks[0].x: environment variable AE_NOT_SET is not set; export it, or write ${AE_NOT_SET:-default}"),
        ("sinks: [{type: wandb, api_key: abc}]",
         "sinks[0].api_key: a secret must not stand in the file; write ${NAME} and export NAME"),
    ],
)
def test_one_clear_error(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, f"queue: q\n{text}\n{SUITES}")
    assert lines(config.load, path) == [expected]


def test_all_errors_at_once_with_the_file_in_each(tmp_path: Path) -> None:
    path = write(tmp_path, "quee: q\nrunner: {lease: 0}\nhook: {max_pin: 3}\nsuites: {s: {evaluators: [{type: 1}]}}")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path}: 5 errors"
    assert sorted(line.removeprefix(f"{path}: ").partition(": ")[0] for line in rest) == [
        "hook.max_pin", "quee", "queue", "runner.lease", "suites.s.evaluators[0].type",
    ]


def test_messages_never_print_what_a_variable_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_SECRET", "s3cret-" * 20)
    path = write(tmp_path, f"queue: q\nrunner: {{order: '${{AE_SECRET}}', lease: '${{AE_SECRET}}'}}\n{SUITES}")
    assert sorted(lines(config.load, path)) == [
        "runner.lease: expected a number, found the text of ${AE_SECRET}",
        "runner.order: the text of ${AE_SECRET} is not one of 'newest', 'oldest'",
    ]


# What may go wrong in what both sides read: values for each key, most of them wrong.
ODD = st.sampled_from([None, True, 0, 1, -1, 10, 0.5, 3.0, "", "5", "auto", "/a", [], ["x"], {}, {"x": 1}, "${AE_NO}"])
KEY = st.sampled_from
SECTION = st.dictionaries(KEY(["project", "name", "tokens_per_step", "tokenizer", "nam"]), ODD, max_size=3)
HOOK = st.dictionaries(KEY(["pin", "max_pins", "deadline", "max_pin"]), ODD, max_size=3)
EVALUATORS = st.lists(st.dictionaries(KEY(["type", "x"]), st.sampled_from(["helm", 1]), max_size=2) | ODD, max_size=2)
CADENCE = st.dictionaries(KEY(["every_steps", "begin_step", "end_step", "priority", "evry_steps"]), ODD, max_size=4)
SUITE = st.tuples(CADENCE, EVALUATORS).map(lambda pair: {**pair[0], "evaluators": pair[1]})
FILES = st.fixed_dictionaries(
    {},
    optional={
        "version": ODD, "queue": ODD, "run": SECTION | ODD, "hook": HOOK | ODD, "hok": ODD,
        "path_map": st.dictionaries(KEY(["/a", "/a/", "b"]), ODD, max_size=2) | ODD,
        "suites": st.dictionaries(KEY(["a", "b c"]), SUITE | ODD, max_size=2) | ODD,
    },
)


@settings(max_examples=200, deadline=None)
@given(FILES)
def test_both_sides_say_the_same(tmp_path_factory: Any, data: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "both.yaml"
    path.write_text(json.dumps(data))
    of_hook, of_runner = lines(hook_config.load, path), lines(config.load, path)
    assert sorted(set(of_runner)) == sorted(of_runner)
    assert set(of_hook) == set(of_runner)


@settings(max_examples=200, deadline=None)
@given(FILES, st.dictionaries(KEY([*RunnerSection.model_fields, "x"]), ODD), ODD, ODD)
def test_no_mistake_is_told_in_pydantics_words(
    tmp_path_factory: Any, data: dict[str, Any], runner: Any, sinks: Any, environments: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "words.yaml"
    path.write_text(json.dumps({**data, "runner": runner, "sinks": sinks, "environments": environments}))
    for line in lines(config.load, path):
        assert not any(word in line for word in ("Input", "input", "Field", "should", "nput_value", "keyword"))


SYNTAX = st.text("ab01:-[]{}&*<|>!?#%@,.'\"~$ \n\t\\", max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | SYNTAX.map(lambda t: f"queue: /q\n{SUITES}{t}".encode()))
def test_whatever_stands_in_the_file_raises_only_config_error(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile_runner.yaml"
    path.write_bytes(data)
    lines(config.load, path)


def test_the_two_sides_know_the_same_keys() -> None:
    assert tuple(File.model_fields) == hook_config.KEYS


def test_schema_knows_keys_bounds_and_choices() -> None:
    schema = json.loads(json.dumps(config.schema()))
    assert tuple(schema["properties"]) == hook_config.KEYS
    assert schema["required"] == ["queue", "suites"]
    assert schema["additionalProperties"] is False
    parts = schema["$defs"]
    assert parts["HookSection"]["properties"]["pin"]["enum"] == ["auto", "reflink", "hardlink", "copy", "none"]
    assert parts["HookSection"]["properties"]["deadline"]["exclusiveMinimum"] == 0
    assert parts["SuiteEntry"]["properties"]["priority"]["maximum"] == 9
    assert parts["SuiteEntry"]["required"] == ["evaluators"]
    assert parts["SuiteEntry"]["additionalProperties"] is parts["HookSection"]["additionalProperties"] is False
    assert parts["Entry"]["additionalProperties"] is True


def test_effective_has_the_defaults_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_KEY", "s3cret")
    text = "queue: q\nhook: {max_pins: 4}\nsuites: {s: {evaluators: [{type: gpt, api_key: '${AE_KEY}'}]}}"
    loaded = config.load(write(tmp_path, text))
    shown = effective(loaded)
    assert tuple(shown) == tuple(key for key in hook_config.KEYS if key not in ("environments", "server", "convert"))
    assert shown["queue"] == str(tmp_path / "q")
    assert shown["hook"] == {
        "pin": "auto", "max_pins": 4, "on_full": "supersede", "save_total_limit": None, "deadline": 5.0,
    }  # fmt: skip
    assert shown["suites"]["s"] == {
        "every_steps": 1, "begin_step": 0, "end_step": None, "priority": 5,
        "evaluators": [{"type": "gpt", "api_key": "${AE_KEY}"}],
    }
    assert shown["runner"] == loaded.runner.model_dump()
    assert shown["sinks"] == [{"type": "wandb"}]
    assert "s3cret" not in dump(shown)
    again = config.load(write(tmp_path, dump(shown)))
    assert (again.suites, again.queue, again.hook) == (loaded.suites, loaded.queue, loaded.hook)


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["1e-3", "no", "0x1F", "0o7", "2024-01-02", "1_000", "12:30", "null", "~", "<<", ".inf", "=", "true", "+.5", "${A}",
     "\x85", "a\u2028"]
)
SCALAR = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | TEXT | st.floats(
    allow_nan=False, allow_infinity=False
)


@settings(deadline=None)
@given(st.dictionaries(TEXT, SCALAR | st.lists(SCALAR, max_size=3), max_size=4))
def test_what_is_printed_reads_back_the_same(data: dict[str, Any]) -> None:
    again = yamlfile.parse_yaml(dump(data), "printed")
    assert again == data
    assert hook_config.canonical(again) == hook_config.canonical(data)
