"""The training side's configuration: what it reads, what it refuses, and the digests that both sides share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks import config, yamlfile
from autoeval_hooks.config import Cadence, ConfigError

SUITES = "suites:\n  quick: {every_steps: 100, evaluators: [{type: helm, entries: [a]}]}\n"

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc_${}", max_size=6), inner, max_size=4),
    max_leaves=12,
)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "autoeval.yaml"
    path.write_text(text)
    return str(path)


def refused(tmp_path: Path, text: str, **overrides: Any) -> list[str]:
    """The errors, less the file's name that each must begin with."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(path, **overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(path) for line in lines)
    if len(lines) > 1:
        assert lines[0] == f"{path}: {len(lines) - 1} errors"
        lines = lines[1:]
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_reads_all_and_fills_in_defaults(tmp_path: Path) -> None:
    text = """
version: 1
queue: queue
run: {project: p, name: n, tokens_per_step: 1048576, tokenizer: tok}
hook: {pin: hardlink, max_pins: 4, deadline: 2}
path_map: {/train/: /eval}
suites:
  quick: {every_steps: 100, begin_step: 200, end_step: 300, priority: 9, evaluators: [{type: helm}]}
  all: {evaluators: [{type: helm}]}
runner: {anything: goes}     # the runner's to check
sinks: nonsense
"""
    loaded = config.load(write(tmp_path, text))
    assert loaded.path == str(tmp_path / "autoeval.yaml")
    assert loaded.queue == str(tmp_path / "queue")
    assert loaded.run == config.RunSection("p", None, "n", 1048576, str(tmp_path / "tok"))
    assert loaded.hook == config.HookSection("hardlink", max_pins=4, deadline=2.0)
    assert type(loaded.hook.deadline) is float
    assert loaded.path_map == {"/train": "/eval"}
    assert loaded.suites["quick"].cadence == Cadence(100, 200, 300, 9)
    assert loaded.suites["all"].cadence == Cadence(1, 0, None, 5)
    assert loaded.suites["quick"].digest == loaded.suites["all"].digest


def test_sections_that_stand_empty_take_their_defaults(tmp_path: Path) -> None:
    loaded = config.load(write(tmp_path, f"queue: /q\nhook:\nrun:\npath_map:\n{SUITES}"))
    assert (loaded.queue, loaded.hook, loaded.run) == ("/q", config.HookSection(), config.RunSection())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hook: {max_pin: 3}", "hook.max_pin: unknown key; did you mean 'max_pins'?"),
        ("hok: {}", "hok: unknown key; did you mean 'hook'?"),
        ("hook: {max_pins: '3'}", "hook.max_pins: expected a whole number, found '3'"),
        ("hook: {max_pins: true}", "hook.max_pins: expected a whole number, found True"),
        ("hook: {max_pins: 3.0}", "hook.max_pins: expected a whole number, found 3.0"),
        ("hook: {max_pins: 0}", "hook.max_pins: must be at least 1, found 0"),
        ("hook: {deadline: 0}", "hook.deadline: must be more than 0, found 0"),
        ("hook: {deadline: -1.5}", "hook.deadline: must be more than 0, found -1.5"),
        ("hook: {deadline: soon}", "hook.deadline: expected a number, found 'soon'"),
        ("hook: {pin: link}", "hook.pin: 'link' is not one of 'auto', 'reflink', 'hardlink', 'copy', 'none'"),
        ("hook: [pin]", "hook: expected a mapping, found a list"),
        ("run: {tokens_per_step: 0}", "run.tokens_per_step: must be at least 1, found 0"),
        ("run: {name: 5}", "run.name: expected text, found 5"),
        ("path_map: {train: /eval}", "path_map.train: 'train' and '/eval' must both be absolute paths"),
        ("path_map: {/a: /b, /a/: /c}",
         "path_map: one prefix stands twice, with and without '/' at its end; remove one"),
        ("path_map: {/a: 1}", "path_map./a: expected text, found 1"),
        ("version: 2", "version: 2 is unknown, 1 is known; correct it, or upgrade autoeval"),
        ("version: true", "version: expected a whole number, found True"),
    ],
)
def test_one_clear_error(tmp_path: Path, text: str, expected: str) -> None:
    assert refused(tmp_path, f"queue: /q\n{text}\n{SUITES}") == [expected]


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("{evaluators: []}", ".evaluators: names no evaluator; give a list such as [{type: helm, ...}]"),
        ("{every_steps: 5}", ".evaluators: names no evaluator; give a list such as [{type: helm, ...}]"),
        ("{evaluators: {type: helm}}", ".evaluators: expected a list of mappings, each with a 'type'"),
        ("{evaluators: [helm]}", ".evaluators[0]: expected a mapping such as {type: helm, ...}"),
        ("{evaluators: [{type: helm}, {x: 1}]}",
         ".evaluators[1].type: missing; write which kind this is, such as 'type: helm'"),
        ("{evaluators: [{type: 1}]}", ".evaluators[0].type: expected text, such as 'type: helm'"),
        ("nothing", ": expected a mapping with the key 'evaluators'"),
        ("{evry_steps: 5, evaluators: [{type: helm}]}", ".evry_steps: unknown key; did you mean 'every_steps'?"),
        ("{every_steps: 0, evaluators: [{type: helm}]}", ".every_steps: must be at least 1, found 0"),
        ("{priority: 10, evaluators: [{type: helm}]}", ".priority: must be at most 9, found 10"),
        ("{begin_step: 9, end_step: 8, evaluators: [{type: helm}]}",
         ".end_step: 8 is less than begin_step, 9; the suite would never be due"),
    ],
)
def test_one_clear_error_about_a_suite(tmp_path: Path, suite: str, expected: str) -> None:
    assert refused(tmp_path, f"queue: /q\nsuites: {{s: {suite}}}") == [f"suites.s{expected}"]


def test_all_errors_at_once(tmp_path: Path) -> None:
    found = refused(tmp_path, "hook: {max_pin: 3, deadline: 0}\nversion: 3\nsuites: {'a b': {evaluators: []}}")
    assert [error.partition(":")[0] for error in found] == [
        "queue", "hook.max_pin", "hook.deadline", "suites.a b", "suites.a b.evaluators", "version",
    ]


@pytest.mark.parametrize("text", ["queue: /q", "queue: /q\nsuites: {}", "queue: /q\nsuites:"])
def test_no_suite_is_an_error(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text) == ["suites: missing; define at least one suite, or nothing would be evaluated"]


@pytest.mark.parametrize("queue", ["", "queue:", "queue: ''", "queue: '  '"])
def test_no_queue_is_an_error(tmp_path: Path, queue: str) -> None:
    [error] = refused(tmp_path, f"{queue}\n{SUITES}")
    assert re.fullmatch("queue: (missing|empty); name the directory that training and runner share", error)


@pytest.mark.parametrize("name", [".", "..", "a/b", "a b", "ä", "x" * 65, ""])
def test_a_suite_name_is_a_name_anywhere(tmp_path: Path, name: str) -> None:
    [error] = refused(tmp_path, f"queue: /q\nsuites: {{'{name}': {{evaluators: [{{type: helm}}]}}}}")
    assert "not a suite's name" in error


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_are_laid_over_sections(tmp_path: Path) -> None:
    path = write(tmp_path, f"queue: /q\nrun: {{project: p, name: a}}\n{SUITES}")
    loaded = config.load(path, queue=tmp_path / "other", run={"name": "b"}, suites={"quick": {"every_steps": 7}})
    assert loaded.queue == str(tmp_path / "other")
    assert (loaded.run.project, loaded.run.name) == ("p", "b")
    assert loaded.suites["quick"].cadence.every_steps == 7
    assert loaded.suites["quick"].digest == config.load(path).suites["quick"].digest


def test_wrong_overrides_are_named_as_such(tmp_path: Path) -> None:
    path = write(tmp_path, f"queue: /q\n{SUITES}")
    with pytest.raises(ConfigError, match=r"\(with run= given in code\): run.nam: unknown key; did you mean 'name'"):
        config.load(path, run={"nam": "x"})
    with pytest.raises(ConfigError, match="que: unknown key; did you mean 'queue'"):
        config.load(path, que="x")
    for odd in ({1, 2}, float("nan"), object()):
        with pytest.raises(ConfigError, match="given in code is not plain data"):
            config.load(path, suites={"quick": {"evaluators": [{"type": "helm", "x": odd}]}})


# --- variables ---------------------------------------------------------------------------------------------------


def test_variables_are_filled_in_where_the_hook_reads_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_QUEUE", "/from/env")
    monkeypatch.delenv("AE_SECRET", raising=False)
    suite = "suites: {s: {evaluators: [{type: helm, api_key: '${AE_SECRET}'}]}}"
    loaded = config.load(write(tmp_path, f"queue: ${{AE_QUEUE}}/q\nrun: {{name: '${{AE_NAME:-d}}$$'}}\n{suite}"))
    assert (loaded.queue, loaded.run.name) == ("/from/env/q", "d$")


def test_missing_variable_names_file_key_variable_and_remedy(tmp_path: Path) -> None:
    assert refused(tmp_path, f"queue: /a/${{AE_NOT_SET}}\n{SUITES}") == [
        "queue: environment variable AE_NOT_SET is not set; export it, or write ${AE_NOT_SET:-default}"
    ]


def test_messages_never_print_what_a_variable_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_SECRET", "s3cret-" * 20)
    assert refused(tmp_path, f"queue: /q\nhook: {{max_pins: '${{AE_SECRET}}', pin: '${{AE_SECRET}}'}}\n{SUITES}") == [
        "hook.pin: the text of ${AE_SECRET} is not one of 'auto', 'reflink', 'hardlink', 'copy', 'none'",
        "hook.max_pins: expected a whole number, found the text of ${AE_SECRET}",
    ]


def test_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_A", "one")
    monkeypatch.setenv("AE_EMPTY", "")
    for text, expected in {
        "${AE_A}-${AE_A}": "one-one", "${AE_EMPTY}": "", "${AE_EMPTY:-x}": "x", "${AE_NONE:-}": "",
        "${AE_NONE:-a:-$$b}": "a:-$b", "$AE_A": "$AE_A", "$${AE_A}": "${AE_A}", "$$$${x": "$${x", "5$": "5$",
    }.items():
        assert config.expand(text, "f: k") == expected
    assert config.expand({"${AE_A}": ["${AE_A}", 1, None]}, "f: k") == {"${AE_A}": ["one", 1, None]}
    for torn in ("${", "${}", "${AE_A", "${1x}", "${AE_A:-${AE_A}}", "${AE A}"):
        with pytest.raises(ConfigError, match=r"^f: k\[1\]\.x: '\$\{' begins no variable; write"):
            config.expand(["", {"x": torn}], "f: k")
    monkeypatch.setitem(os.environ, "AE_ODD", "\udcff")
    with pytest.raises(ConfigError, match="f: k: environment variable AE_ODD is not UTF-8"):
        config.expand("${AE_ODD}", "f: k")


@given(PLAIN)
def test_escaped_dollars_expand_to_what_they_were(value: Any) -> None:
    def escaped(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: escaped(x) for k, x in v.items()}
        if isinstance(v, list):
            return [escaped(x) for x in v]
        return v.replace("$", "$$") if isinstance(v, str) else v

    assert config.expand(escaped(value), "f: k") == value


# --- secrets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "api_key: abc", "OPENAI_API_KEY: abc", "password: abc", "token: abc", "hf_token: abc", "client_secret: abc",
        "env: {WANDB_API_KEY: abc}", "headers: ['Bearer sk-" + "abc1" * 10 + "']",
        "url: 'https://me:abc@host/v1'", "x: hf_" + "abc" * 11, "x: ghp_" + "abc" * 12,
    ],
)
def test_secrets_in_clear_are_refused_and_not_printed(tmp_path: Path, setting: str) -> None:
    [error] = refused(tmp_path, f"queue: /q\nsuites: {{s: {{evaluators: [{{type: helm, {setting}}}]}}}}")
    assert "a secret must not stand in the file; write ${NAME} and export NAME" in error
    key = re.findall(r"(\w+): ", setting)[-1]
    assert re.match(rf"suites\.s\.evaluators\[0\]\.(env\.)?{key}(\[0\])?: ", error)
    assert "abc" not in error


@pytest.mark.parametrize(
    "setting",
    [
        "api_key: '${K}'", "api_key_env: OPENAI_API_KEY", "api_key: EMPTY", "end_of_text_token: '<|endoftext|>'",
        "eos_token: x", "max_tokens: 5", "token: true", "tokens: abc", "tokenizer: gpt2", "secretary: x",
        "url: 'https://host:80/v1'", "url: 'https://me:${PW}@host'", "x: task-sk-learn", "monkey: x", "key: x",
    ],
)
def test_what_only_looks_like_a_secret_is_not_refused(tmp_path: Path, setting: str) -> None:
    config.load(write(tmp_path, f"queue: /q\nsuites: {{s: {{evaluators: [{{type: helm, {setting}}}]}}}}"))


# --- cadence, digests, paths -------------------------------------------------------------------------------------


def test_due() -> None:
    cadence = Cadence(every_steps=10, begin_step=20, end_step=40)
    assert [step for step in range(60) if cadence.due(step)] == [20, 30, 40]
    assert [step for step in range(4) if Cadence().due(step)] == [0, 1, 2, 3]
    assert [step for step in range(40) if Cadence(every_steps=15, begin_step=5).due(step)] == [15, 30]


def test_digest_says_what_not_when() -> None:
    suite = {"evaluators": [{"type": "helm", "entries": ["a"], "x": 1.5}]}
    text = '{"evaluators":[{"entries":["a"],"type":"helm","x":1.5}]}'
    assert config.suite_text(suite) == text
    digest = config.suite_digest(suite)
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    for when in ({"every_steps": 5}, {"begin_step": 1, "end_step": 9}, {"priority": 1}):
        assert config.suite_digest({**suite, **when}) == digest
    for other in (
        {"evaluators": [{"type": "helm", "entries": ["b"], "x": 1.5}]},
        {"evaluators": [{"type": "helm", "entries": ["a"], "x": "1.5"}]},
        {"evaluators": [*suite["evaluators"], {"type": "gpt"}]},
        {"evaluators": [{**suite["evaluators"][0], "priority": 1}]},    # an evaluator's own key, not the cadence's
    ):
        assert config.suite_digest(other) != digest


def test_digest_is_of_the_unexpanded_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "queue: /q\nsuites: {s: {evaluators: [{type: helm, m: '${AE_M}'}]}}")
    digests = set()
    for value in ("1", "2"):
        monkeypatch.setenv("AE_M", value)
        digests.add(config.load(path).suites["s"].digest)
    assert len(digests) == 1


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=6), st.randoms(use_true_random=False))
def test_digest_does_not_depend_on_the_order_of_keys(suite: dict[str, Any], order: random.Random) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, list):
            return [shuffled(item) for item in value]
        if not isinstance(value, dict):
            return value
        items = [(key, shuffled(item)) for key, item in value.items()]
        order.shuffle(items)
        return dict(items)

    assert config.suite_digest(shuffled(suite)) == config.suite_digest(suite)


def test_map_path_takes_the_longest_prefix_of_whole_components() -> None:
    mounts = {"/train": "/eval", "/train/big/": "/huge/", "/": "/host"}
    for path, expected in {
        "/train/a": "/eval/a", "/train": "/eval", "/train/big/x": "/huge/x", "/train/bigger/x": "/eval/bigger/x",
        "/training/x": "/host/training/x",
    }.items():
        assert config.map_path(path, mounts) == expected
    assert config.map_path("/training/x", {"/train": "/eval"}) == "/training/x"
    assert config.map_path("/a/b", {"/a": "/"}) == "/b"
    assert config.map_path("/a", {"/a": "/"}) == "/"


@given(st.lists(st.sampled_from("ab"), max_size=4), st.lists(st.sampled_from("ab"), max_size=4))
def test_map_path_there_and_back(prefix: list[str], rest: list[str]) -> None:
    there, back = "/t" + "".join(f"/{p}" for p in prefix), "/e"
    path = there + "".join(f"/{p}" for p in rest)
    assert config.map_path(config.map_path(path, {there: back}), {back: there}) == path


# --- the file ----------------------------------------------------------------------------------------------------


def parsed(text: str) -> dict[str, Any]:
    return yamlfile.parse_yaml(text, "f.yaml")


def test_plain_text_means_what_yaml_1_2_says() -> None:
    text = "{a: no, b: on, c: 1e-3, d: 2024-01-02, e: 12:30, f: 0x1F, g: 010, h: 1.0, i: ~, j: TRUE, k: !!str 5}"
    assert parsed(text) == {
        "a": "no", "b": "on", "c": 0.001, "d": "2024-01-02", "e": "12:30", "f": 31, "g": 10, "h": 1.0, "i": None,
        "j": True, "k": "5",
    }


def test_aliases_and_merge_keys_are_followed() -> None:
    text = "base: &b {x: 1, y: 2}\nother: &o {y: 3, z: 4}\nboth: {<<: [*b, *o], x: 5}\nsame: *b\n"
    data = parsed(text)
    assert data["both"] == {"x": 5, "y": 2, "z": 4}
    assert data["same"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' stands twice in one mapping; remove one"),
        ("a:\n  1: x\n", "line 2: key '1' is not text; put it in quotes"),
        ("a: {true: x}", "line 1: key 'true' is not text"),
        ("{[a]: x}", "line 1: key is not text"),
        ("a: 1\nb: [\n", "line 3: not valid YAML"),
        ("a: 1\n\tb: 2\n", "line 2: not valid YAML"),
        ("a: {b: ${HOME}}", "line 1: not valid YAML .*; put '\\${...}' in quotes"),
        ("a: b\n---\nc: d\n", "line 2: not valid YAML"),
        ("a: *nothing", "line 1: not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]", "line 1: tag 'tag:yaml.org,2002:python/.* is not supported"),
        ("a: !mine {}", "line 1: tag '!mine' is not supported; remove it"),
        ("a: !!set {}", "line 1: tag .* is not supported"),
        ("a: !!binary aaaa", "line 1: tag .* is not supported"),
        ("a: !!int x", "line 1: 'x' is no 64-bit number"),
        ("a: .inf", "line 1: '.inf' is no finite number"),
        ("a: 1e999", "line 1: '1e999' is no finite number"),
        ("a: 9223372036854775808", "line 1: '9223372036854775808' is no 64-bit number"),
        ("a: " + "9" * 9000, "line 1: '9+.* is no 64-bit number"),
        ('a: "\\ud800"', "line 1: .* is no UTF-8 text"),
        ('a: "\\0"', "line 1: .* is no UTF-8 text"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ("x: 1\na: \x07", "line 2: a control character"),
        ("a: &a [*a]", "line 1: aliases nest deeper than 32 levels"),
        ("a: &a {<<: *a}", "line 1: aliases nest deeper than 32 levels"),
        ("a: {<<: 3}", "line 1: '<<' takes a mapping"),
        ("a: " + "[" * 200000, "line 1: not valid YAML \\(deeper than 32 levels\\)"),
        ("- a", "must hold 'key: value' lines"),
        ("text", "must hold 'key: value' lines"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
    ],
)
def test_hostile_and_mistaken_yaml(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"^f.yaml: {expected}"):
        parsed(text)


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [" + ", ".join(["lol"] * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 25)]
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="aliases make more than 1 MiB of this file"):
        parsed("\n".join(lines))
    with pytest.raises(ConfigError, match="aliases make more than 1 MiB of this file"):
        parsed("a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 20) + "]")
    assert time.monotonic() - begin < 20


def test_files_that_are_none(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "no.yaml"): "no such file; name the configuration file, or create it",
        str(tmp_path): "is a directory; name a file in it, such as autoeval.yaml",
        str(tmp_path / "latin"): "line 2: not UTF-8 text; save the file as UTF-8",
        str(tmp_path / "big"): "larger than 256 KiB; move long lists to other files",
        str(tmp_path / "pipe"): "is empty",
        "nul\0": "cannot be read",
    }
    (tmp_path / "latin").write_bytes(b"a: 1\nb: \xe4\n")
    (tmp_path / "big").write_text("# x\n" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    for path, expected in cases.items():
        with pytest.raises(ConfigError, match=re.escape(expected)):
            config.load(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfqueue: /q\n" + SUITES.encode())
    assert config.load(path).queue == "/q"


SYNTAX = st.text("ab01:-[]{}&*<|>!?#%@,.'\"~$ \n\t\\", max_size=60)


@settings(max_examples=400)
@given(st.binary(max_size=80) | SYNTAX.map(str.encode) | SYNTAX.map(lambda t: f"queue: /q\n{SUITES}{t}".encode()))
def test_whatever_stands_in_the_file_raises_only_config_error(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        config.load(path)


def test_loads_nothing_heavy() -> None:
    code = (
        "import sys, autoeval_hooks.config; "
        "print(sorted({'yaml', 'torch', 'transformers', 'wandb', 'pydantic', 'openai', 'filelock'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
