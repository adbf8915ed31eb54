"""Loops built on accelerate, and plain ones: real trainings of the examples, on one process and on two."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file

from autoeval_hooks import CheckpointError, ConfigError, manifest, save_and_submit
from autoeval_hooks import accelerate as adapter
from autoeval_hooks.accelerate import AutoEval
from eval_runner import environments
from eval_runner.results import store
from tests.loops import EXAMPLES, checked, example, offline, scored
from tests.trainer import handed_over, trainer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(f"queue: {tmp_path}/queue\nsuites: {{quick: {{evaluators: [{{type: helm, entries: [a]}}]}}}}\n")
    return path


def model(tmp_path: Path) -> Any:
    return trainer(tmp_path / "unused").model


def test_the_plain_example_reaches_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    example("pytorch", out)
    checked(out)
    monkeypatch.setenv("EXAMPLE_OUT", str(out))
    assert [r.evaluations[0].scores[0].value > 10_000 for r in scored("pytorch", out)] == [True] * 3


@pytest.mark.slow
def test_on_two_processes_each_checkpoint_is_handed_over_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = example("accelerate", out, processes=2)
    checked(out)
    assert said.count("saved") == 3     # by one of them


@pytest.mark.slow
@pytest.mark.helm
def test_helm_sees_the_example_learn(tmp_path: Path) -> None:
    """Real HELM, as its README says; bits per byte fall from checkpoint to checkpoint."""
    try:
        environments.find(None, "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    example("accelerate", out, "--steps", "60", "--save-steps", "30")
    run = [str(Path(sys.executable).with_name("autoeval-runner")), "run", "--drain", "--config"]
    env = offline(out) | {"EXAMPLE_OUT": str(out)}
    subprocess.run([*run, str(EXAMPLES / "accelerate/autoeval.yaml")], env=env, check=True, timeout=280)
    results = store.collect(out / "queue").results
    scores = {r.step: {s.metric: s.value for s in r.evaluations[0].scores}["bits_per_byte"] for r in results}
    assert sorted(scores) == [30, 60]
    assert 8 > scores[30] > scores[60] > 1


@pytest.mark.slow
def test_on_one_process_too(tmp_path: Path) -> None:
    said = example("accelerate", tmp_path / "out")
    checked(tmp_path / "out")
    assert said.count("saved") == 3


@pytest.mark.slow
def test_a_plain_loop_may_wait_with_submit(tmp_path: Path) -> None:
    said = example("pytorch", tmp_path / "out", "--wait")
    checked(tmp_path / "out")
    assert said.count("saved") == 3


def test_the_function_does_the_same_in_one_call(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model(tmp_path))
    for step in (1, 2):
        path = save_and_submit(accelerator, prepared, tmp_path / "out", step=step, config=file, last_step=2)
        assert path == str(tmp_path / "out" / f"checkpoint-{step}")
        assert save_and_submit(accelerator, prepared, tmp_path / "bad", step=step, config=tmp_path / "none.yaml")
    (autoeval,) = [each for (config, _), each in adapter._opened.items() if config == str(file) and each is not None]
    autoeval.close()
    assert sorted(handed_over(tmp_path / "queue")) == [("quick", 1), ("quick", 2)]
    assert (tmp_path / "bad" / "checkpoint-2" / "model.safetensors").exists()      # it is saved all the same
    assert len([r for r in caplog.records if r.name == "autoeval" and r.levelno == logging.WARNING]) == 1


def test_saving_raises_as_save_pretrained_does_and_handing_over_does_not(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True)
    autoeval = AutoEval(file, accelerator, tmp_path / "out")
    with pytest.raises(TypeError, match="Linear has no save_pretrained"):
        autoeval.save_and_submit(torch.nn.Linear(2, 2), step=1)
    assert not (tmp_path / "out" / "checkpoint-1").exists()
    monkeypatch.setattr("autoeval_hooks.loop.identity", lambda config: 1 / 0)
    assert Path(autoeval.save_and_submit(model(tmp_path), step=2), "config.json").exists()
    assert any("division by zero" in r.getMessage() for r in caplog.records)
    autoeval.close()


def test_a_save_that_was_cut_off_says_so_and_the_next_one_mends_it(tmp_path: Path, file: Path) -> None:
    class Tokenizer:
        fails = True

        def save_pretrained(self, path: str) -> None:
            assert Path(path, manifest.INCOMPLETE).exists()
            if self.fails:
                raise OSError("no space")

    tokenizer = Tokenizer()
    with AutoEval(file, Accelerator(cpu=True), tmp_path / "out") as autoeval:
        with pytest.raises(OSError, match="no space"):
            autoeval.save_and_submit(model(tmp_path), step=1, tokenizer=tokenizer)
        with pytest.raises(CheckpointError, match="its save was cut off"):
            manifest.model_files(str(tmp_path / "out/checkpoint-1"))
        tokenizer.fails = False
        autoeval.save_and_submit(model(tmp_path), step=1, tokenizer=tokenizer)
    (ticket,) = handed_over(tmp_path / "queue").values()
    assert {"config.json", "model.safetensors"} <= {f.path for f in ticket.manifest.files}
    assert not (tmp_path / "out/checkpoint-1" / manifest.INCOMPLETE).exists()


@pytest.mark.parametrize("part", ["whole", "layers"])
def test_a_compiled_model_is_saved_by_its_own_names(tmp_path: Path, file: Path, part: str) -> None:
    """`save_pretrained` with the names of torch.compile makes a checkpoint that loads as random weights."""
    accelerator, plain = Accelerator(cpu=True), model(tmp_path)
    names = set(plain.state_dict()) - {"lm_head.weight"}        # tied
    if part == "layers":
        plain.transformer.h[0] = torch.compile(plain.transformer.h[0], backend="eager")
    prepared = accelerator.prepare(torch.compile(plain, backend="eager") if part == "whole" else plain)
    with AutoEval(file, accelerator, tmp_path / "out") as autoeval:
        path = autoeval.save_and_submit(prepared, step=1)
    assert set(load_file(Path(path, "model.safetensors"))) == names


def test_accelerate_rotates_its_own_states_and_ours_are_refused_there(tmp_path: Path, file: Path) -> None:
    """Its rotation takes a number out of every name in that directory, and fails at one without: `.autoeval`."""
    rotating = ProjectConfiguration(str(tmp_path / "project"), automatic_checkpoint_naming=True, total_limit=1)
    accelerator = Accelerator(cpu=True, project_config=rotating)
    prepared = accelerator.prepare(model(tmp_path))
    for place in ("project/checkpoints", "project/checkpoints/checkpoint_0/models"):
        with pytest.raises(ConfigError, match=r"accelerate rotates its own checkpoints .*project/models"):
            AutoEval(file, accelerator, tmp_path / place)
    with AutoEval(file, accelerator, tmp_path / "project/models") as autoeval:
        for step in (1, 2, 3):
            autoeval.save_and_submit(prepared, step=step)
            accelerator.save_state()
            accelerator.project_configuration.iteration = step
    assert [p.name for p in (tmp_path / "project/checkpoints").iterdir()] == ["checkpoint_2"]
    assert len(handed_over(tmp_path / "queue")) == 3


def test_rows_and_the_end_are_heard_of_through_the_trackers(tmp_path: Path, file: Path) -> None:
    accelerator = Accelerator(cpu=True)
    autoeval = AutoEval(file, accelerator, tmp_path / "out")
    assert accelerator.trackers == []       # `init_trackers` did not come so far
    heard: list[object] = []
    accelerator.trackers = [
        types.SimpleNamespace(name="theirs", log=lambda *a, **k: heard.append("theirs"), finish=lambda: None)
    ]
    autoeval.save_and_submit(model(tmp_path), step=1)
    autoeval.save_and_submit(model(tmp_path), step=2)
    assert autoeval._loop is not None
    autoeval._loop.logged = heard.append  # type: ignore[assignment]
    autoeval._loop.ends = lambda: heard.append("end")  # type: ignore[method-assign]
    accelerator.log({"loss": 1.0}, step=7)
    accelerator.end_training()
    assert heard == ["theirs", 7, "end"]
    assert accelerator.get_tracker("autoeval", unwrap=True) is autoeval
