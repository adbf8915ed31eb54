"""A key that stands in clear in the older watcher's YAML: used where nobody else can read the file, else refused where
a judge is needed and warned of elsewhere; and never in what is made of the file."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import registry, secrets
from eval_runner.cli import cli
from eval_runner.cli.validate import check, dump
from eval_runner.config import legacy
from eval_runner.config.loader import effective
from eval_runner.config.narrowed import narrowed
from eval_runner.watching.plan import Options, plan
from tests.older_yaml import documented, files, write

KEY = "plain-key-of-a-user-0123456789"      # of no kind that is known by its looks
VARIABLE = "AUTOEVAL_JUDGE_API_KEY"
ROOT = Path(__file__).parents[2]
GPT_FILES = ("question.jsonl", "baseline.jsonl", "prompt.jsonl", "reviewer.jsonl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    files(tmp_path)
    yield tmp_path
    secrets.hold({}, {}, ())
    secrets._hidden.discard(KEY)


def older(here: Path, mode: int, organization: str | None = None, **sections: Any) -> Path:
    gpt = {"openai_api_key": KEY} | ({"openai_organization": organization} if organization else {})
    sections = {"megatron": None, "huggingface": {"checkpoint_path": "out"}, "gpt_evaluation": gpt} | sections
    path = write(here, documented(**sections))
    path.chmod(mode)
    return path


def judge(config: configs.Config) -> Any:
    return config.suites["gpt"].evaluators[0]["judge"]


def process(here: Path, command: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", "from eval_runner.cli import main; main()", *command.split()]
    return subprocess.run(
        [*argv, "--config", str(here / "old.yaml")], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=here,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def refusal(path: Path, mode: str) -> str:
    return (
        f"{path}: auto_eval.gpt_evaluation.openai_api_key: stands in clear in a file that others can read (mode "
        f"{mode}): run `chmod 600 {path}`, or export it and write ${{OPENAI_API_KEY}} in its place"
    )


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_in_a_file_of_its_owners_it_is_used(here: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    config = configs.load(older(here, mode, "org-1"))
    assert judge(config) == {"api_key_env": VARIABLE, "organization_env": "AUTOEVAL_JUDGE_ORGANIZATION"}
    assert secrets.value(VARIABLE) == KEY
    assert secrets.environment([VARIABLE, None, "HOME"]) == os.environ | {VARIABLE: KEY}
    (evaluator,) = registry.build_evaluators(config, config.suites["gpt"])
    evaluator.check()
    assert not caplog.records
    assert secrets.masked(f"says {KEY}!") == "says ***!"


def test_it_stands_nowhere_else(here: Path) -> None:
    path = older(here, 0o600, "org-1")
    config, found = configs.load(path), legacy.read(path)
    made = [str(found), repr(found), dump(effective(config)), config.suites["gpt"].text, str(config.suites)]
    assert not [text for text in made if KEY in text]
    assert KEY not in "".join(os.environ.values())
    other = configs.load(write(here, documented(gpt_evaluation={"openai_api_key": "another"})))
    assert other.suites["gpt"].digest == configs.load(
        write(here, documented(gpt_evaluation={"openai_api_key": KEY}))).suites["gpt"].digest  # fmt: skip


def test_children_that_it_is_not_for_do_not_get_it(here: Path) -> None:
    configs.load(older(here, 0o600))
    assert secrets.environment([]) is None
    assert secrets.environment(["OPENAI_API_KEY"]) is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o610])
def test_in_a_file_of_others_it_is_refused_where_a_judge_is_needed(
    here: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = older(here, mode)
    wanted = refusal(path, f"{mode:o}")
    config = narrowed(configs.load(path, warn=False), "gpt")
    (evaluator,) = registry.build_evaluators(config, config.suites["gpt"])
    with pytest.raises(ConfigError) as caught:
        evaluator.check()
    assert str(caught.value) == wanted
    assert wanted in check(config)
    with pytest.raises(ConfigError) as caught:
        plan(Options(str(path), eval_type="gpt"), lambda text: None)
    assert str(caught.value) == wanted
    assert secrets.environment([VARIABLE]) is None
    assert secrets.masked(KEY) == "***"
    assert not caplog.records       # said once, as an error


@pytest.mark.parametrize("command", ["run --drain", "validate"])
def test_the_commands_that_evaluate_refuse_it(here: Path, command: str) -> None:
    path = older(here, 0o644, helm=None)
    done = process(here, command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("stands in clear") == 1
    assert refusal(path, "644") in done.stderr
    assert KEY not in done.stderr


def test_the_doctor_tells_of_it_once(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = older(here, 0o644, wandb=None)
    done = CliRunner().invoke(cli, ["doctor", "--config", str(path)])
    assert (done.exit_code, done.stdout.count("stands in clear"), caplog.records) == (1, 1, [])
    assert KEY not in done.output


def test_a_runner_that_asks_no_judge_only_warns(here: Path) -> None:
    """And goes on to HELM's environment, which is not there: how to have ours is said by the older file's key."""
    path = older(here, 0o644, wandb=None)
    for name in GPT_FILES:
        (here / name).unlink()
    done = process(here, "run --drain --eval-type helm")
    warning, error = done.stderr.splitlines()
    assert json.loads(warning) | {"time": ""} == {"time": "", "level": "warning", "message": refusal(path, "644")}
    assert done.returncode == 2
    assert error.startswith(f"error: {path}: suites.helm.evaluators[0].env: env: conda:helm-env: no conda environment")
    assert error.endswith(
        "or remove the key `env` (in an older file: `helm_env_name`) and run `autoeval-runner env create helm`, to use "
        "autoeval's own"
    )


def test_where_no_judge_is_needed_it_is_a_warning(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = older(here, 0o644)
    said: list[str] = []
    assert list(plan(Options(str(path)), said.append).config.suites) == ["helm"]
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.WARNING, refusal(path, "644"))


COMMANDS = {
    "status": 0, "status --json": 0, "report --out r": 0, "leaderboard": 0, "gc": 0, "import list": 0, "sync": 0,
    "env list": 0, "explain 10": 0, "record --print-only": 1,     # there is nothing to record
}  # fmt: skip
"""And the exit status for an empty queue."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_do_not_evaluate_only_warn(
    here: Path, command: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And do not miss the files that evaluating would need."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in (*GPT_FILES, "spec.conf"):
        (here / name).unlink()
    done = []
    for mode in (0o600, 0o644):
        path = older(here, mode, wandb=None)
        Queue(str(configs.load(path, warn=False).queue)).create()
        caplog.clear()
        done.append(CliRunner().invoke(cli, [*command.split(), "--config", str(path)]))
        said = [r.getMessage() for r in caplog.records if "in clear" in r.getMessage()]
        assert said == ([] if mode == 0o600 else [refusal(path, "644")])
    assert [d.exit_code for d in done] == [COMMANDS[command]] * 2, done[0].output
    assert str(done[0].exception) == str(done[1].exception)
    assert KEY not in done[0].output + done[1].output


def test_a_warning_goes_to_stderr(here: Path) -> None:
    path = older(here, 0o644)
    Queue(str(configs.load(path, warn=False).queue)).create()
    done = process(here, "status")
    assert (done.returncode, done.stderr) == (0, refusal(path, "644") + "\n")


def test_an_organization_is_no_secret(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    gpt = {"openai_api_key": "EMPTY", "openai_organization": "org-of-ours"}
    config = configs.load(older(here, 0o644, gpt_evaluation=gpt))
    assert judge(config) == {"api_key_env": None, "organization_env": "AUTOEVAL_JUDGE_ORGANIZATION"}
    assert secrets.value("AUTOEVAL_JUDGE_ORGANIZATION") == "org-of-ours"
    (evaluator,) = registry.build_evaluators(config, config.suites["gpt"])
    evaluator.check()
    assert secrets.masked("org-of-ours") == "org-of-ours"
    assert not caplog.records


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (12345678, "auto_eval.gpt_evaluation.openai_api_key: expected text; put it in quotes"),
        ("${A:-hidden}", "stands beside something else, or has a default; write ${OPENAI_API_KEY} alone"),
        ("hidden-${A}", "stands beside something else, or has a default; write ${OPENAI_API_KEY} alone"),
    ],
)
def test_what_is_no_key(here: Path, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(older(here, 0o600, gpt_evaluation={"openai_api_key": value}))
    assert wanted in str(caught.value)
    assert not any(part in str(caught.value).removeprefix(f"{here}") for part in ("12345678", "hidden"))


@pytest.mark.parametrize("value", ["<your api key>", "schlüssel"])
def test_what_cannot_be_sent_is_refused_where_a_judge_is_needed(here: Path, value: str) -> None:
    config = configs.load(older(here, 0o600, gpt_evaluation={"openai_api_key": value}), warn=False)
    (evaluator,) = registry.build_evaluators(config, config.suites["gpt"])
    with pytest.raises(ConfigError, match="openai_api_key: holds what cannot be one: blanks or other letters than"):
        evaluator.check()


def test_what_an_earlier_configuration_held_is_not_used(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    configs.load(older(here, 0o600))
    configs.load(write(here, documented()))
    assert secrets.value(VARIABLE) == ""
    configs.load(older(here, 0o644), warn=False)
    caplog.clear()
    (here / "autoeval.yaml").write_text("queue: q\nsuites: {a: {evaluators: [{type: helm}]}}\n")
    configs.load(here / "autoeval.yaml")
    assert not caplog.records
