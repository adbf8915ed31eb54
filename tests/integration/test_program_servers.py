"""vLLM's and SGLang's servers as real processes, with a stand-in for the programs, and a GPU that does not exist."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError
from eval_runner.checkpoints.base import Servable, look
from eval_runner.evaluators.base import Context, Limits
from eval_runner.servers import gpus, launch, ports
from eval_runner.servers.base import Serving
from eval_runner.servers.programs import ProgramServer, Running, SglangServer, VllmServer
from tests import program_stand_in
from tests.processes import MARK, marked, wait_for

ROOT = Path(__file__).parents[2]
NAME = "checkpoint-5-0123456789abcdef"


@dataclass
class Lab:
    directory: Path
    mark: str

    @property
    def log(self) -> Path:
        return self.directory / "server.log"

    def server(self, kind: type[ProgramServer] = VllmServer, **settings: object) -> ProgramServer:
        return kind({"start_timeout": 60, **settings}, Context(self.directory, self.directory, "server"))

    def serving(self, unchanged: Callable[[], None] = lambda: None, *, trust: bool = False) -> Serving:
        work = self.directory / uuid.uuid4().hex
        work.mkdir()
        checkpoint = Servable(self.directory / "out", self.directory / "out", unchanged)
        return Serving(checkpoint, NAME, 5, work, self.log, lambda: False, Limits(grace=0.3), trust)

    def start(self, kind: type[ProgramServer] = VllmServer, **settings: object) -> Running:
        return self.server(kind, **settings).start(self.serving())

    def holders(self) -> set[int]:
        """The processes, but this one, that hold the GPU's lock."""
        found = set()
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if os.readlink(link) == str(gpus.directory() / "0.lock"):
                    found.add(int(link.parts[2]))
        return found - {os.getpid()}

    def started(self) -> list[dict[str, object]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line.removeprefix("started ")) for line in lines if line.startswith("started ")]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    made = Lab(tmp_path, uuid.uuid4().hex)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("weights")
    monkeypatch.setenv(MARK, made.mark)
    monkeypatch.setenv("PYTHONPATH", str(program_stand_in.installed(tmp_path / "stand-in")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpus, "ROOT", tmp_path)
    yield made
    wait_for(lambda: [pid for pid in marked(made.mark) if pid != os.getpid()] == [])


@pytest.mark.parametrize("kind", [VllmServer, SglangServer])
def test_a_server_that_lists_the_name(lab: Lab, kind: type[ProgramServer]) -> None:
    running = lab.start(kind)
    assert running.failure() is None
    assert running.endpoint.model == NAME
    assert lab.holders() != set()       # the GPU is its own until it is gone, not until its runner is
    assert lab.holders() <= set(marked(lab.mark))
    (started,) = lab.started()
    assert started["env"] == {"CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": None}
    running.close()
    assert [pid for pid in marked(lab.mark) if pid != os.getpid()] == []


@pytest.mark.parametrize("mode", ["other", "more", "none"])
def test_a_server_that_lists_another_name_never_answers(lab: Lab, mode: str) -> None:
    with pytest.raises(AutoEvalError, match="vLLM answers GET /v1/models with status 200: "):
        lab.start(arguments=["--stand-in", mode])
    gpus.take(1, gpus.visible(), lambda: True).close()      # it was given back


def test_arguments_that_the_program_refuses(lab: Lab) -> None:
    said = "vLLM ended before it answered: .*unrecognized arguments: --no-such"
    with pytest.raises(AutoEvalError, match=said) as caught:
        lab.start(arguments=["--no-such"])
    assert caught.value.kind == "configuration"


def test_code_of_the_checkpoints_own_runs_by_leave_alone(lab: Lab) -> None:
    lab.server().start(lab.serving(trust=True)).close()
    lab.start().close()
    assert ["--trust-remote-code" in str(one["argv"]) for one in lab.started()] == [True, False]


def test_a_server_of_an_older_checkpoint_on_the_port(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers as ours would, even by our checkpoint's name; but it is not the process that we started."""
    stale = lab.start(gpus=0)
    taken = int(stale.endpoint.url.rpartition(":")[2])
    others, free = iter([taken]), ports.free
    monkeypatch.setattr(ports, "free", lambda count: [next(others, None) or free(1)[0]])
    running = lab.start()
    assert running.endpoint.url != stale.endpoint.url
    for each in (running, stale):
        each.close()


def test_a_checkpoint_that_is_rewritten_while_it_loads(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    out = lab.directory / "out"
    before = look(out, "model.safetensors")

    def unchanged() -> None:
        if look(out, "model.safetensors") != before:
            raise CheckpointError("model.safetensors: changed")

    start = launch.start

    def rewritten(recipe: launch.Recipe, serving: Serving) -> launch.Process:
        (out / "model.safetensors").write_text("other weights")
        return start(recipe, serving)

    monkeypatch.setattr(launch, "start", rewritten)
    with pytest.raises(CheckpointError, match="changed"):
        lab.server().start(lab.serving(unchanged))
    assert [pid for pid in marked(lab.mark) if pid != os.getpid()] == []
    gpus.take(1, gpus.visible(), lambda: True).close()


RUNNER = """
import sys, time
from pathlib import Path
from eval_runner.checkpoints.base import Servable
from eval_runner.evaluators.base import Context, Limits
from eval_runner.servers import gpus
from eval_runner.servers.base import Serving
from eval_runner.servers.programs import VllmServer
here = Path(sys.argv[1])
gpus.ROOT = here
(here / "work").mkdir()
checkpoint = Servable(here / "out", here / "out", lambda: None)
name, log = "checkpoint-4-fedcba9876543210", here / "first.log"
serving = Serving(checkpoint, name, 4, here / "work", log, lambda: False, Limits())
VllmServer({}, Context(here, here, "server")).start(serving)
(here / "ready").touch()
time.sleep(300)
"""


def test_two_runners_and_one_gpu(lab: Lab) -> None:
    """The second waits, and starts once the first runner was killed and nothing of its server is left."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ['PYTHONPATH']}", MARK: f"{lab.mark}-first"}
    first = subprocess.Popen([sys.executable, "-c", RUNNER, str(lab.directory)], env=env)
    second: list[Running] = []
    try:
        wait_for((lab.directory / "ready").exists)
        assert len(marked(f"{lab.mark}-first")) >= 3        # runner, supervisor, server
        waiting = threading.Thread(target=lambda: second.append(lab.start()))
        waiting.start()
        waiting.join(2.0)
        assert waiting.is_alive()
        assert not lab.log.exists()
    finally:
        first.kill()
        first.wait()
    waiting.join(60)
    assert marked(f"{lab.mark}-first") == []
    assert second[0].failure() is None
    second[0].close()
