"""What the options of `watch` and the two kinds of configuration file ask for, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import ConfigError
from eval_runner import process
from eval_runner.cli.watch import watch as command
from eval_runner.stop import Stop
from eval_runner.watching.beside import Beside
from eval_runner.watching.plan import Options, Planned, plan, seconds
from eval_runner.watching.watcher import Wanted
from tests.older_yaml import documented, files, write

OURS = "queue: q\nsuites:\n  a: {evaluators: [{type: helm}]}\n  b: {evaluators: [{type: gpt}]}\nsinks: []\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    return tmp_path


def older(here: Path, options: dict[str, Any] | None = None, **sections: Any) -> tuple[Planned, list[str]]:
    said: list[str] = []
    path = write(here, documented(**sections))
    return plan(Options(str(path), **(options or {})), said.append), said


@pytest.mark.parametrize(
    ("text", "wanted"), [("30", 1800), ("0.5", 30), ("30s", 30), ("5m", 300), ("1h", 3600), ("2 s", 2)]
)
def test_times(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "-1", "1d", "0s", "s", "1e3"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="is no time; write minutes"):
        seconds(text)


def test_an_older_file_alone(here: Path) -> None:
    planned, said = older(here)
    w = planned.watcher
    assert (w.directories, w.kind, planned.eval_type) == ((f"{here}/checkpoints",), "megatron", "helm")
    assert (w.wanted, list(planned.config.suites)) == (Wanted(1000, None, 1000), ["helm"])
    assert "--begin-iteration is not given: the first is 1000, as --iteration-interval says" in said
    assert any("--end-iteration is not given" in line for line in said)
    assert any("pickles" in line for line in said)


def test_options_go_before_the_file(here: Path) -> None:
    options: dict[str, Any] = {"begin": 0, "end": 400, "interval": 200, "eval_type": "gpt"}
    options["directories"] = ("x", "~/y", "x")
    kept = {"answer_file": "a-{model}.jsonl", "result_file": "r-{model}.jsonl"}
    planned, said = older(here, options, gpt_evaluation=kept)
    w = planned.watcher
    assert w.wanted == Wanted(0, 400, 200)
    assert w.directories == (f"{here}/x", str(Path("~/y").expanduser()))
    assert w.giver.several
    assert (list(planned.config.suites), planned.eval_type) == (["gpt"], "gpt")
    assert not any("--begin" in line or "--end" in line for line in said)


def test_what_is_there_decides(here: Path) -> None:
    planned, _ = older(here, megatron=None, helm=None, huggingface={"checkpoint_path": "out"})
    assert (planned.watcher.kind, planned.eval_type) == ("huggingface", "gpt")
    assert planned.watcher.directories == (f"{here}/out",)
    hf = older(here, {"kind": "huggingface", "directories": ("d",)})[0]     # HELM loads them itself
    assert (hf.watcher.kind, hf.eval_type) == ("huggingface", "helm")


def test_our_own_file(here: Path) -> None:
    (here / "autoeval.yaml").write_text(OURS)
    planned = plan(Options("autoeval.yaml", directories=("d",)), lambda text: None)
    assert (planned.watcher.wanted, planned.watcher.kind, planned.eval_type) == (Wanted(0, None, None), None, None)
    assert list(planned.config.suites) == ["a", "b"]
    only = plan(Options("autoeval.yaml", interval=50, eval_type="gpt", directories=("d",)), lambda text: None)
    assert (only.watcher.wanted, list(only.config.suites)) == (Wanted(50, None, 50), ["b"])


@pytest.mark.parametrize(
    ("options", "sections", "message"),
    [
        ({"begin": 10, "end": 9}, {}, "--end-iteration: 9 is less than --begin-iteration, 10"),
        ({"kind": "megatron"}, {"megatron": None}, "auto_eval.megatron: missing; --model-type megatron needs it"),
        ({}, {"megatron": None}, "auto_eval.huggingface.checkpoint_path, or --checkpoint-dir: missing"),
        ({"kind": "huggingface", "eval_type": "gpt"}, {}, "does not serve Hugging Face checkpoints"),
        ({"eval_type": "gpt"}, {"gpt_evaluation": None}, "no suite has an evaluator of the type 'gpt'"),
    ],
)
def test_what_does_not_go_together(
    here: Path, options: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as caught:
        older(here, options, **sections)
    assert str(caught.value).startswith(("--end", str(here)))


@pytest.mark.parametrize(
    ("eval_type", "keys", "remedy"),
    [
        ("helm", ["helm.helm_output_path"], "another `model_name`"),
        ("gpt", ["gpt_evaluation.answer_file", "gpt_evaluation.result_file"], "write {model} in its name"),
    ],
)
def test_trainings_that_would_replace_each_others_output_are_refused(
    here: Path, eval_type: str, keys: list[str], remedy: str
) -> None:
    with pytest.raises(ConfigError, match="--checkpoint-dir names 2 trainings") as caught:
        older(here, {"eval_type": eval_type, "directories": ("x", "y")})
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"auto_eval.{key}" for key in keys]
    assert all(remedy in line for line in lines)


def test_so_they_are_with_our_own_file(here: Path) -> None:
    kept = OURS.replace("{type: helm}", "{type: helm, entries: [x], output_path: o, output_suite: s}")
    (here / "autoeval.yaml").write_text(kept)
    with pytest.raises(ConfigError, match=r"suites\.a\.evaluators\[0\]\.output_path: .* another `output_suite`"):
        plan(Options("autoeval.yaml", directories=("d", "e")), lambda text: None)
    plan(Options("autoeval.yaml", directories=("d",)), lambda text: None)


@pytest.mark.parametrize(
    ("eval_type", "key"), [("helm", "helm.helm_spec_template_path"), ("gpt", "gpt_evaluation.question_file")]
)
def test_every_file_that_is_missing_is_named_by_its_key(here: Path, eval_type: str, key: str) -> None:
    """Those of what is not evaluated may be missing."""
    for name in ("spec.conf", "merges.txt", "question.jsonl"):
        (here / name).unlink()
    with pytest.raises(ConfigError) as caught:
        older(here, {"eval_type": eval_type})
    found = {line.split(": ")[1] for line in str(caught.value).splitlines()}
    assert found == {f"auto_eval.{key}", "auto_eval.megatron.merge_path"}


@pytest.mark.parametrize("option", ["--check-interval", "--check-iterval"])
def test_the_command_line(here: Path, option: str) -> None:
    write(here, documented())
    done = CliRunner().invoke(command, ["--config", "old.yaml", option, "ten"])
    assert (done.exit_code, "'ten' is no time; write minutes (30), or 30s, 5m, 1h" in done.output) == (2, True)
    (here / "checkpoints").mkdir()
    (here / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2000")
    call = ["--config", "old.yaml", option, "1s", "--begin-iteration", "1000", "--end-iteration", "2000"]
    done = CliRunner().invoke(command, call)
    assert done.exit_code == 0
    assert "passed over, for a later checkpoint is there and these are not" in done.output
    assert "1000, 2000" in done.output
    assert done.stdout == ""


def test_a_runner_that_refuses_its_configuration_ends_the_watch(here: Path) -> None:
    """Without an environment for HELM, nothing could be evaluated."""
    (here / "autoeval.yaml").write_text(
        "queue: q\nenvironments: none\nsuites: {a: {evaluators: [{type: helm, entries: [x]}]}}\nsinks: []\n"
    )
    (here / "out").mkdir()
    done = CliRunner().invoke(
        command, ["--config", "autoeval.yaml", "--checkpoint-dir", "out", "--check-interval", "0.3s", "--run"]
    )
    assert done.exit_code == 2
    assert "is not built" in (here / "q" / "logs" / "watch-run.log").read_text()
    assert "the runner's log: " in done.output


@pytest.mark.parametrize(("ends", "wanted"), [([75, 0], 0), ([75, 75], 75), ([1, 75, 0], 1), ([0], 0), ([0, 9], 1)])
def test_the_exit_status_is_for_all_drains(
    here: Path, monkeypatch: pytest.MonkeyPatch, ends: list[int], wanted: int
) -> None:
    """What had to wait at one was taken up by the next; what failed stays so."""
    monkeypatch.setattr(process, "run", lambda *args, **options: ends.pop(0))
    monkeypatch.setattr(Beside, "_waiting", lambda self: True)
    beside = Beside("none.yaml", here / "q", None, drains=True, stop=Stop())
    for enqueued in range(1, len(ends) + 1):
        status = beside.finish(enqueued)
    assert (status, ends) == (wanted, [])


def test_nothing_is_run_for_an_empty_queue(here: Path) -> None:
    beside = Beside("none.yaml", here / "q", None, drains=True, stop=Stop())
    beside.look(0)
    assert (beside.finish(0), beside.log.exists()) == (0, False)
