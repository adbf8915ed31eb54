"""The settings of a `type: command` entry: what is wrong is said at once, with its key."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.command import CommandEvaluator, paths
from eval_runner.evaluators.command.settings import parse

COMMAND = [sys.executable, "eval.py", "{checkpoint}", "{output}/scores.json"]
GOOD: dict[str, Any] = {"command": COMMAND, "metrics": {"accuracy": "results.acc"}}


def context(base: Path = Path("/nowhere"), server: str = "") -> Context:
    return Context(base, base, "suites.s.evaluators[0]", "autoeval.yaml", server)


def wrong(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD | settings, context())
    return str(caught.value)


def test_a_metric_may_be_a_path_alone() -> None:
    settings = parse(GOOD | {"metrics": {"a": "x.y", "b": {"path": "z", "n": 50, "benchmark": "other"}}}, context())
    assert (settings.metrics["a"].path, settings.metrics["a"].benchmark, settings.metrics["a"].split) == (
        "x.y", "eval", "test")  # fmt: skip
    assert (settings.metrics["b"].n, settings.metrics["b"].benchmark) == ("50", "other")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["python3.11", "-u", "tools/my eval.py", "{checkpoint}"], "my_eval"),
        (["{python}", "-m", "package.eval"], "package"),
        (["./bench", "x.py"], "bench"),
        (["bash", "run.sh"], "run"),
        (["{python}", "{config_dir}/other.py"], "other"),
        (["/usr/bin/python", "{checkpoint}"], "python"),
    ],
)
def test_the_benchmarks_name_is_the_programs(command: list[str], name: str) -> None:
    settings = parse(GOOD | {"command": [*command, "{checkpoint}", "{output}"]}, context())
    assert (settings.name, settings.metrics["accuracy"].benchmark) == (name, name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"command": []}, "command: is empty"),
        ({"command": ["a", 5]}, r"command\[1\]: expected text, found 5"),
        ({"command": ["a", "{output}", "{modle}"]}, r"command\[2\]: \{modle\} stands for nothing"),
        ({"command": ["a", "{checkpoint}"]}, r"command: has no \{output\}"),
        ({"command": ["a", "{output}"]}, r"command: has neither \{checkpoint\} nor \{server_url\}"),
        ({"command": ["{checkpoint}/run", "{output}"]}, r"command\[0\]: the only placeholder .*\{python\}"),
        ({"env": {"A B": "x"}}, "env: 'A B' is no name of an environment variable"),
        ({"env": {"A": "{x}"}}, r"env\.A: \{x\} stands for nothing"),
        ({"working_directory": "{checkpoint}"}, r"working_directory: \{checkpoint\} stands for nothing"),
        ({"metrics": {}}, "metrics: is empty"),
        ({"metrics": {"a": 5}}, r"metrics\.a: expected a mapping"),
        ({"metrics": {"a/b": "x"}}, "metrics.a/b: 'a/b' is no name: .* write 'a_b'"),
        ({"metrics": {"a": {"path": "x", "benchmark": "b c"}}}, r"metrics\.a\.benchmark: 'b c' is no name"),
        ({"metrics": {"a": {"path": "x", "split": ""}}}, r"metrics\.a\.split: '' is no name"),
        ({"metrics": {"a": {"path": "x..y"}}}, r"metrics\.a\.path: 'x\.\.y' is no path; write it like"),
        ({"metrics": {"a": {"path": "x", "n": 0}}}, r"metrics\.a\.n: must be 1 or more"),
        ({"metrics": {"a": {"path": "x", "stderr": "["}}}, r"metrics\.a\.stderr: '\[' is no path"),
        ({"metrics": {"a": {"paht": "x"}}}, r"metrics\.a\.paht: unknown key; did you mean 'path'\?"),
        ({"metrics": {"a": {}}}, r"metrics\.a\.path: missing; only a metric of `instances\.values`"),
        ({"scores": "/tmp/x"}, r"scores: '/tmp/x': expected the name of a file below \{output\}"),
        ({"scores": "a/../../x"}, "scores: .*expected the name of a file"),
        ({"instances": {"file": "..", "values": {"accuracy": "x"}}}, r"instances\.file: '\.\.': expected"),
        ({"instances": {"file": "x", "values": {"accurcy": "x"}}}, r"instances\.values\.accurcy: is none of"),
        ({"instances": {"file": "x", "values": {}}}, r"instances\.values: is empty"),
        ({"name": "a b"}, "name: 'a b' is no benchmark's name: .*'a_b'"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], says: str) -> None:
    said = wrong(**settings)
    assert re.search(rf"^autoeval\.yaml: suites\.s\.evaluators\[0\]\.{says}", said), said


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = wrong(command=["a", "{x}"], metrics={"a": "b["}, scores="", name="?")
    assert said.count("autoeval.yaml: ") == 4


def test_check_names_all_that_is_missing_here(tmp_path: Path) -> None:
    settings = GOOD | {
        "command": ["./no-program", "{server_url}", "{output}"], "files": ["eval.py", "data"], "working_directory": "w",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        CommandEvaluator(settings, context(tmp_path)).check()
    said = str(caught.value)
    for part in (
        "command[0]: './no-program' is no program here", f"files[0]: {tmp_path}/eval.py: no such",
        f"files[1]: {tmp_path}/data: no such", f"working_directory: {tmp_path}/w: no such directory",
        "{server_url} needs a server; configure `server:`",
    ):  # fmt: skip
        assert f"autoeval.yaml: suites.s.evaluators[0].{part}" in said.replace("command: {", "{")
    for name in ("no-program", "eval.py"):
        (tmp_path / name).touch(mode=0o755)
    for name in ("data", "w"):
        (tmp_path / name).mkdir()
    CommandEvaluator(settings, context(tmp_path, "transformers")).check()


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a", ("a",)),
        ("results.arc-easy.acc,none", ("results", "arc-easy", "acc,none")),
        ("[0].f1", (0, "f1")),
        ("a[-1][2].b c", ("a", -1, 2, "b c")),
        ('a["b.c"].d', ("a", "b.c", "d")),
        (r'["\u00e9\"]"]', ('é"]',)),
        ("results.0", ("results", "0")),
    ],
)
def test_paths(text: str, steps: tuple[str | int, ...]) -> None:
    assert paths.parse(text) == steps


@pytest.mark.parametrize(
    "text", ["", ".a", "a.", "a..b", "a[", "a[]", "a[x]", "[1]b", 'a["b"', r'["\q"]', "a[007]", "]"]
)
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no path; write it like"):
        paths.parse(text)
