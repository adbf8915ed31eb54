"""What README says can be typed as it stands there."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks import __main__ as hooks
from autoeval_hooks import yamlfile
from autoeval_hooks.config import load as hook_load
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.cli import cli
from eval_runner.evaluators.command import CommandEvaluator
from eval_runner.evaluators.gpt import GptEvaluator
from eval_runner.evaluators.gpt import settings as gpt
from eval_runner.evaluators.lm_eval import LmEvalEvaluator
from eval_runner.evaluators.lm_eval import settings as lm_eval
from eval_runner.recorder import settings as recorder
from eval_runner.servers.external import ExternalServer
from eval_runner.servers.megatron import MegatronServer, Settings
from eval_runner.servers.programs import VllmServer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def yaml_of(heading: str) -> list[str]:
    """The YAML blocks of a section."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)
    return re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)


def test_the_configuration_is_right_on_both_sides(tmp_path: Path) -> None:
    (text,) = yaml_of("Configure")
    path = tmp_path / "autoeval.yaml"
    path.write_text(text)
    (tmp_path / "held_out.jsonl").write_text('{"text": "some", "id": "1"}\n')
    config = configs.load(str(path))
    assert [registry.build_evaluators(config, suite) for suite in config.suites.values()]
    assert registry.build_sinks(config)
    assert hook_load(path).suites["quick"].digest == config.suites["quick"].digest


def test_so_is_what_it_says_of_megatron(tmp_path: Path) -> None:
    (whole,), (more,) = yaml_of("Configure"), yaml_of("Megatron-LM")
    whole, more = yamlfile.parse_yaml(whole, "README"), yamlfile.parse_yaml(more, "README")
    path = tmp_path / "autoeval.yaml"
    path.write_text(json.dumps(whole | more | {"runner": whole["runner"] | more["runner"]}))
    config = configs.load(str(path))
    assert config.convert is not None
    assert "{checkpoint}" in config.convert.command
    assert isinstance(registry.build_server(config), MegatronServer)
    (keys,) = re.findall(r"# (python, mode.*?, start_timeout)", README)
    named = re.findall(r"(\w+)(?: \([^)]*\))?(?:, |$)", keys)
    assert set(named) | set(more["server"]) - {"type"} == {f.name for f in dataclasses.fields(Settings)}


def test_so_is_what_it_says_of_the_judge(tmp_path: Path) -> None:
    (text,) = yaml_of("GPT judge")
    path = tmp_path / "autoeval.yaml"
    path.write_text("queue: queue\n" + text)
    config = configs.load(str(path))
    (evaluator,) = registry.build_evaluators(config, config.suites["judged"])
    assert isinstance(evaluator, GptEvaluator)
    written = yamlfile.parse_yaml(text, "README")["suites"]["judged"]["evaluators"][0]
    shown = set(re.findall(r"\b([a-z_]+)\b", text))
    for part, dataclass in ((written, gpt.Settings), (written["answers"], gpt.AnswerSettings),
                            (written["judge"], gpt.JudgeSettings)):  # fmt: skip
        keys = {field.name for field in dataclasses.fields(dataclass)}
        assert set(part) - {"type"} <= keys
        assert keys - shown <= {"omit"}


def test_and_of_the_servers(tmp_path: Path) -> None:
    (whole,) = yaml_of("Configure")
    for text, kind in zip(yaml_of("Servers"), (VllmServer, ExternalServer), strict=True):
        path = tmp_path / "autoeval.yaml"
        path.write_text(json.dumps(yamlfile.parse_yaml(whole, "README") | yamlfile.parse_yaml(text, "README")))
        assert isinstance(registry.build_server(configs.load(str(path))), kind)


def test_and_of_the_other_evaluators(tmp_path: Path) -> None:
    (harness,), (program,) = yaml_of("lm-evaluation-harness"), yaml_of("A program of your own")
    entries = yamlfile.parse_yaml("evaluators:\n" + harness, "README")
    path = tmp_path / "autoeval.yaml"
    path.write_text("queue: queue\n" + program)
    (tmp_path / "eval.py").touch()
    for name in ("data", "tasks"):
        (tmp_path / name).mkdir()
    config = configs.load(str(path))
    (evaluator,) = registry.build_evaluators(config, config.suites["mine"])
    assert isinstance(evaluator, CommandEvaluator)
    path.write_text(json.dumps({"queue": "queue", "suites": {"arc": entries}}))
    config = configs.load(str(path))
    (evaluator,) = registry.build_evaluators(config, config.suites["arc"])
    assert isinstance(evaluator, LmEvalEvaluator)
    keys = {field.name for field in dataclasses.fields(lm_eval.Settings)}
    assert keys - set(re.findall(r"\b([a-z_]+)\b", harness)) == set()


def test_and_of_the_sinks(tmp_path: Path) -> None:
    (whole,), (text,) = yaml_of("Configure"), yaml_of("MLflow, trackio, TensorBoard")
    path = tmp_path / "autoeval.yaml"
    path.write_text(json.dumps(yamlfile.parse_yaml(whole, "README") | yamlfile.parse_yaml(text, "README")))
    assert len(registry.build_sinks(configs.load(str(path)))) == 4


def test_and_of_the_recorder(tmp_path: Path) -> None:
    for heading in ("Recording other results", "Leaderboard and compare"):
        (text,) = yaml_of(heading)
        path = tmp_path / "recorder.yaml"
        path.write_text(text)
        settings = recorder.load(path)
        assert (settings.project, settings.leaderboard) == ("my-project", heading.startswith("Leaderboard"))


def test_every_option_in_the_commands_table_exists() -> None:
    rows = re.findall(r"^\| `autoeval-runner (\w+)(.*?)` (?:or (`.*?`) )?\|", README, re.MULTILINE)
    assert {name for name, *_ in rows} == set(cli.commands)
    for name, arguments, more in rows:
        shown = CliRunner().invoke(cli, [name, "--help"]).output
        for option in re.findall(r"--[a-z]+", arguments + more):
            assert option in shown, (name, option)
        for sub in re.findall(r"^ (\w+)\\\|(\w+)$", arguments):
            assert all(word in shown for word in sub)


def test_the_submit_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert "python -m autoeval_hooks submit PATH [--step N] --config FILE" in README
    with pytest.raises(SystemExit) as ended:
        hooks.main(["submit", "--help"])
    assert ended.value.code == 0
    assert {"path", "--step", "--config"} <= set(capsys.readouterr().out.replace("[", " ").split())


def test_make_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+) ", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_are_shown_are_there() -> None:
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
