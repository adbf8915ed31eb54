"""examples/megatron: what stands in it is right, and its page shows what stands in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks import yamlfile
from autoeval_hooks.config import load as hook_load
from eval_runner.cli import cli

EXAMPLE = Path(__file__).parents[2] / "examples/megatron"
PAGE = (EXAMPLE / "README.md").read_text(encoding="utf-8")
CONFIG = (EXAMPLE / "autoeval.yaml").read_text(encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for a checkout of Megatron-LM, as far as `validate` looks, and the example's data."""
    package = tmp_path / "Megatron-LM/megatron/core/package_info.py"
    package.parent.mkdir(parents=True)
    package.write_text("MAJOR = 0\nMINOR = 16\nPATCH = 1\n")
    tools = tmp_path / "Megatron-LM/tools"
    tools.mkdir()
    (tools / "run_text_generation_server.py").write_text("")
    for module in ("torch", "flask", "flask_restful"):      # the server runs with the checkout in its module path
        (tmp_path / f"Megatron-LM/{module}.py").write_text("")
    (tmp_path / "out/data").mkdir(parents=True)
    (tmp_path / "out/data/held_out.jsonl").write_text('{"id": "1", "text": "some"}\n')
    monkeypatch.setenv("MEGATRON", str(tmp_path / "Megatron-LM"))
    monkeypatch.setenv("EXAMPLE_OUT", str(tmp_path / "out"))
    monkeypatch.setattr("eval_runner.evaluators.helm.HelmEvaluator.check", lambda self: None)   # its environment
    return tmp_path


def validated(path: Path) -> str:
    result = CliRunner().invoke(cli, ["validate", "--config", str(path)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_configuration_is_right_on_both_sides(machine: Path) -> None:
    assert "type: megatron" in validated(EXAMPLE / "autoeval.yaml")
    assert hook_load(EXAMPLE / "autoeval.yaml").queue == str(machine / "out/queue")


def test_validate_really_looks_at_the_server(machine: Path) -> None:
    (machine / "Megatron-LM/megatron/core/package_info.py").unlink()
    result = CliRunner().invoke(cli, ["validate", "--config", str(EXAMPLE / "autoeval.yaml")])
    assert result.exit_code == 2
    assert "server.checkout" in result.output


def test_every_line_that_is_commented_out_is_right_as_well(machine: Path) -> None:
    converter = machine / "convert.sh"
    converter.write_text("#!/bin/sh\n")
    converter.chmod(0o755)
    commented = r"^( *)# (?=( *(every_steps|python|tensor_parallel|convert|command): |convert:|    |  \]))"
    text = re.sub(commented, r"\1", CONFIG, flags=re.M)
    assert text.count("#") < CONFIG.count("#") - 6
    text = text.replace("/path/to/venv/bin/python", sys.executable)
    text = re.sub(r"/path/to/Megatron-Bridge/\S+\.sh", str(converter), text)
    (machine / "autoeval.yaml").write_text(text)
    shown = validated(machine / "autoeval.yaml")
    assert "{checkpoint}" in shown
    assert f"python: {sys.executable}" in shown
    assert "tensor_parallel: 2" in shown
    assert "every_steps: 1000" in shown


def command(machine: Path, **env: str) -> list[str]:
    """What train.sh runs, by a stand-in for torchrun."""
    (machine / "bin").mkdir(exist_ok=True)
    torchrun = machine / "bin/torchrun"
    torchrun.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n")
    torchrun.chmod(0o755)
    done = subprocess.run(
        [EXAMPLE / "train.sh"], env={**os.environ, "PATH": f"{machine}/bin:{os.environ['PATH']}", **env},
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_train_sh_can_be_set_from_outside(machine: Path) -> None:
    here, *argv = command(machine, GPUS="4", ITERATIONS="7", TENSOR_PARALLEL="2")
    assert Path(here) == EXAMPLE
    at = argv.index("-m")
    assert argv[: at + 3] == [
        "--standalone", "--nproc-per-node", "4", "-m", "autoeval_hooks.megatron",
        str(machine / "Megatron-LM/pretrain_gpt.py"),
    ]  # fmt: skip
    value = dict(pairwise(argv))
    assert (value["--train-iters"], value["--tensor-model-parallel-size"]) == ("7", "2")
    assert value["--save"] == str(machine / "out/run")
    assert (EXAMPLE / value["--autoeval-config"]).is_file()


def test_every_save_is_one_that_a_suite_is_due_for(machine: Path) -> None:
    """Whatever SAVE_INTERVAL is, and the last save, which stands at ITERATIONS."""
    (suite,) = hook_load(EXAMPLE / "autoeval.yaml").suites.values()
    assert all(map(suite.cadence.due, range(1, 1000)))


def test_the_server_has_the_precision_of_training(machine: Path) -> None:
    """It is not in the checkpoint, and FlashAttention, which the dynamic server uses, has no float32."""
    _, *argv = command(machine)
    assert "--bf16" in argv
    assert yamlfile.parse_yaml(CONFIG, "")["server"]["arguments"][0] == "--bf16"


def test_what_has_no_default_any_more_is_given(machine: Path) -> None:
    """Megatron-LM 0.19 divides by --eval-interval, without evaluations too, and has no default for it."""
    value = dict(pairwise(command(machine)))
    assert value["--eval-iters"] == "0"
    assert int(value["--eval-interval"]) > 0


def test_every_part_writes_where_example_out_says(machine: Path) -> None:
    code = f"import runpy; print(runpy.run_path({str(EXAMPLE / 'prepare.py')!r})['OUT'])"

    def out(**env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **env}, check=True, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return done.stdout.strip()

    for written in (str(machine / "elsewhere"), "relative"):
        argv = command(machine, EXAMPLE_OUT=written)
        assert argv[argv.index("--save") + 1] == f"{out(EXAMPLE_OUT=written)}/run"


def test_without_a_checkout_it_says_so(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON")
    done = subprocess.run([EXAMPLE / "train.sh"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "MEGATRON: set it to the directory of Megatron-LM" in done.stderr


def test_what_the_page_shows_stands_in_the_script() -> None:
    shown = re.findall(r"^torchrun .*|^    --.*", PAGE, re.M)
    assert len(shown) == 2
    assert set(shown) <= set((EXAMPLE / "train.sh").read_text().splitlines())


def test_the_page_names_files_and_commands_that_are_there() -> None:
    for name in [*re.findall(r"^\| `([\w.]+)` ", PAGE, re.M), *re.findall(r"\]\((?!https?:)([^)]+)\)", PAGE)]:
        assert (EXAMPLE / name).is_file(), name
    commands = re.findall(r"^autoeval-runner (\w+)(.*)", PAGE, re.M)
    assert len(commands) >= 4
    for name, rest in commands:
        shown = CliRunner().invoke(cli, [name, "--help"]).output
        assert all(option in shown for option in re.findall(r"--\w+", rest)), name


def test_the_data_is_where_the_others_look_for_it(machine: Path) -> None:
    """`preprocess_data.py` adds the key of its input and "document" to the prefix that the page gives it."""
    (line,) = re.findall(r"^PYTHONPATH=.*preprocess_data.py (.*)", PAGE, re.M)
    given = dict(pairwise(line.split()))
    _, *argv = command(machine)
    value = dict(pairwise(argv))
    out = str(machine / "out")
    assert value["--data-path"] == given["--output-prefix"].replace("out", out, 1) + "_text_document"
    for name in ("--tokenizer-type", "--tokenizer-model"):
        assert value[name] == given[name].replace("out", out, 1)
    program = (EXAMPLE / "prepare.py").read_text()
    assert all(f'args.out / "{name}"' in program for name in ("tokenizer", "train.jsonl", "held_out.jsonl"))
