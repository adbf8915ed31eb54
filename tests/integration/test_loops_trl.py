"""TRL's trainers take the callback of Hugging Face's; an adapter (LoRA) is merged by `convert.command`, or refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.errors import CheckpointError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner.checkpoints import huggingface
from eval_runner.checkpoints.base import Request, Servable
from tests.loops import EXAMPLES, checked, example, scored
from tests.trainer import handed_over


@pytest.mark.slow
def test_the_example_reaches_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    example("trl", out)
    checked(out)
    assert [p.name for p in (out / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    monkeypatch.setenv("EXAMPLE_OUT", str(out))
    scored("trl", out)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A directory as PEFT writes it: no config.json."""
    path = tmp_path / "run" / "checkpoint-2"
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/models/base"}')
    (path / "adapter_model.safetensors").write_bytes(b"adapter")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Servable]:
    """Submit a checkpoint, and have the runner make it servable; what is there while it is."""

    def go(path: Path, convert: str = "") -> Servable:
        file = tmp_path / "autoeval.yaml"
        file.write_text(
            f"queue: queue\nsuites: {{quick: {{evaluators: [{{type: helm, entries: [a]}}]}}}}\n{convert}\n"
        )
        submit(path, step=2, config=file)
        queue = Queue(str(tmp_path / "queue"))
        (token,) = queue.tokens("pending")
        (work := tmp_path / "work").mkdir()
        request = Request(queue.read(token), configs.load(str(file)), work, tmp_path / "log")
        with huggingface.prepare(request) as servable:
            assert (servable.path / "config.json").is_file()
            servable.unchanged()
            return servable

    return go


def test_an_adapter_alone_is_refused_with_the_remedy(adapter: Path, prepare: Callable[..., Servable]) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-2: an adapter \(LoRA\).*`convert.command`.*merge\.py"):
        prepare(adapter)
    assert (EXAMPLES / "trl" / "merge.py").is_file()


def test_a_program_merges_an_adapter(tmp_path: Path, adapter: Path, prepare: Callable[..., Servable]) -> None:
    """With a stand-in for the program: it writes what it was given."""
    program = tmp_path / "merge.py"
    program.write_text(
        "import os, sys\n"
        "os.makedirs(sys.argv[2], exist_ok=True)\n"
        "open(sys.argv[2] + '/config.json', 'w').write('{}')\n"
        "merged = open(sys.argv[1] + '/adapter_model.safetensors').read() + ' merged'\n"
        "open(sys.argv[2] + '/model.safetensors', 'w').write(merged)\n"
    )
    command = json.dumps([sys.executable, str(program), "{checkpoint}", "{output}"])
    servable = prepare(adapter, f"convert: {{command: {command}, directory: {tmp_path}/merged}}")
    assert (servable.path / "model.safetensors").read_text() == "adapter merged"
    assert (servable.tokenizer / "tokenizer.json").is_file()
    assert servable.facts["converted by"].startswith("python")


def test_a_whole_model_needs_no_program(
    checkpoint: Callable[..., Path], prepare: Callable[..., Servable], tmp_path: Path
) -> None:
    path = checkpoint(2)
    (path / "adapter_config.json").write_text("{}")     # as one that was merged into it may leave
    convert = f"convert: {{command: ['false', '{{checkpoint}}', '{{output}}'], directory: {tmp_path}/merged}}"
    assert prepare(path, convert).facts == {}


@pytest.mark.slow
def test_a_lora_training_is_merged_by_the_example(
    tmp_path: Path, prepare: Callable[..., Servable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the lines of its autoeval.yaml that are to be taken in, as in that directory."""
    pytest.importorskip("peft")
    out = tmp_path / "out"
    example("trl", out, "--lora")
    found = handed_over(out / "queue")
    assert sorted(found) == [("quick", 2), ("quick", 4), ("quick", 6)]
    path = shutil.copytree(found["quick", 2].pin, tmp_path / "lora/checkpoint-2")
    monkeypatch.setenv("PWD", str(EXAMPLES / "trl"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    _, convert = (EXAMPLES / "trl/autoeval.yaml").read_text().split("# convert:")
    servable = prepare(path, "convert:" + convert.replace("\n# ", "\n"))
    base, merged = (p / "model.safetensors" for p in (out / "base", servable.path))
    assert base.stat().st_size == merged.stat().st_size
    assert base.read_bytes() != merged.read_bytes()
