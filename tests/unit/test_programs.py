"""What vLLM, SGLang and `transformers serve` are told, and what their settings refuse. No server is started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks import manifest
from autoeval_hooks.errors import ConfigError
from autoeval_hooks.manifest import MegatronRecord
from eval_runner import registry
from eval_runner.checkpoints.base import Servable
from eval_runner.evaluators.base import Context, Limits
from eval_runner.servers import gpus, interpreter, launch, programs
from eval_runner.servers.base import Endpoint, Serving
from eval_runner.servers.interpreter import Found
from eval_runner.servers.programs import ProgramServer, SglangServer, TransformersServer, VllmServer
from tests import program_stand_in

NAME = "checkpoint-5-0123456789abcdef"
Make = Callable[..., ProgramServer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A server of one of the kinds on a host with the `there` GPUs, where everything is installed."""
    monkeypatch.setattr(gpus, "ROOT", tmp_path)

    def build(kind: type[ProgramServer] = VllmServer, there: str = "0,1", **settings: object) -> ProgramServer:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
        versions = dict.fromkeys(kind.program.versions, "1.2")
        monkeypatch.setattr(interpreter, "ask", lambda *_: Found((), versions))
        return kind(settings, Context(tmp_path, tmp_path / "envs", "server", "autoeval.yaml"))

    return build


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    for name in ("out", "tokenizer", "work"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        (tmp_path / "out" / name).write_text("checkpoint's")
    checkpoint = Servable(tmp_path / "out", tmp_path / "out", lambda: None)
    return Serving(checkpoint, NAME, 5, tmp_path / "work", tmp_path / "log", lambda: False, Limits())


def other_tokenizer(serving: Serving) -> Serving:
    directory = serving.checkpoint.path.parent / "tokenizer"
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        (directory / name).write_text("tokenizer's")
    return replace(serving, checkpoint=replace(serving.checkpoint, tokenizer=directory))


def recipe(server: ProgramServer, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> launch.Recipe:
    """What `launch.start` is told."""
    told: list[launch.Recipe] = []

    class Ended(Exception): ...

    def start(recipe: launch.Recipe, serving: Serving) -> launch.Process:
        told.append(recipe)
        raise Ended

    monkeypatch.setattr(launch, "start", start)
    with pytest.raises(Ended):
        server.start(serving)
    return told[0]


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu": 1}, "autoeval.yaml: server.gpu: unknown key; did you mean 'gpus'?"),
        ({"gpus": -1, "start_timeout": 0, "python": ""},
         "autoeval.yaml: server.start_timeout: must be more than 0 seconds; autoeval.yaml: server.gpus: must be 0 or "
         "more; autoeval.yaml: server.python: empty"),
        ({"arguments": ["--dtype", 4]}, "autoeval.yaml: server.arguments[1]: expected text, found 4"),
        ({"arguments": ["--dtype=auto", "--port=1"]},
         "autoeval.yaml: server.arguments[1]: --port=1: is set by autoeval, which must know it; remove it"),
        ({"arguments": ["--served_model_name", "x"]}, "autoeval.yaml: server.arguments[0]: --served_model_name: is set "
         "by autoeval, which must know it; remove it"),
        ({"arguments": ["--trust-remote-code"]},
         "autoeval.yaml: server.arguments[0]: --trust-remote-code: is said by `runner.trust_remote_code`"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(make: Make, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert str(caught.value) == said


def test_the_names_in_a_configuration(tmp_path: Path) -> None:
    for name, kind in {"transformers": TransformersServer, "vllm": VllmServer, "sglang": SglangServer}.items():
        assert registry.get("servers", name, "here") is kind


# ---------------------------------------------------------------------- the interpreter


def test_what_the_interpreter_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    server = VllmServer({}, Context(tmp_path, tmp_path, "server", "autoeval.yaml"))
    with pytest.raises(ConfigError) as caught:
        server.check()
    assert str(caught.value) == (
        f"autoeval.yaml: server.python: {sys.executable} has no vllm, which vLLM needs to serve; run "
        f"`{sys.executable} -m pip install -U vllm`, or name the interpreter of an environment that has it"
    )
    monkeypatch.setenv("PYTHONPATH", str(program_stand_in.installed(tmp_path / "stand-in")))
    server = VllmServer({"python": sys.executable}, Context(tmp_path, tmp_path, "server", "autoeval.yaml"))
    server.check()
    facts = server.facts(Servable(tmp_path, tmp_path, lambda: None))
    assert (facts["server"], facts["vllm"], facts["gpus"]) == ("vllm", program_stand_in.VERSION, "1")
    assert "torch" in facts


def test_a_transformers_that_is_too_old_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make(TransformersServer)
    lacks = Found(("transformers.cli.serving.completion",), {"transformers": "4.57.1", "torch": "2.9"})
    monkeypatch.setattr(interpreter, "ask", lambda *_: lacks)
    with pytest.raises(ConfigError, match=r"completion, which `transformers serve` 4\.57\.1 needs .*serving\]>=5\.23"):
        server.check()


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("nowhere/python", "{here}/nowhere/python: no such program; name a Python interpreter"),
        ("no-such-interpreter", "no-such-interpreter: no such program"),
        ("false", "/false: is no Python that works: it says nothing"),
    ],
)
def test_an_interpreter_that_is_none(tmp_path: Path, python: str, said: str) -> None:
    server = VllmServer({"python": python}, Context(tmp_path, tmp_path, "server", "autoeval.yaml"))
    with pytest.raises(ConfigError) as caught:
        server.check()
    assert str(caught.value).startswith("autoeval.yaml: server.python: ")
    assert said.format(here=tmp_path) in str(caught.value)


def test_what_is_asked_of_an_interpreter() -> None:
    modules, packages = ["json", "json.decoder", "no.such", "json.no"], ["pytest", "nothing"]
    found = interpreter.ask(Path(sys.executable), modules, packages, dict(os.environ), "")
    assert found == Found(("no.such", "json.no"), {"pytest": pytest.__version__, "nothing": ""})


# ---------------------------------------------------------------------- command lines


def test_the_command_lines(
    make: Make, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    found = recipe(make(VllmServer, arguments=["--dtype", "bfloat16"]), serving, monkeypatch)
    assert found.command([8001]) == [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", f"{out}", "--tokenizer", f"{out}",
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", "8001", "--dtype", "bfloat16",
    ]  # fmt: skip
    assert found.api("http://127.0.0.1:8001") == Endpoint("http://127.0.0.1:8001", "openai", NAME)
    found = recipe(make(SglangServer), serving, monkeypatch)
    assert found.command([8001]) == [
        sys.executable, "-m", "sglang.launch_server", "--model-path", f"{out}", "--tokenizer-path", f"{out}",
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", "8001",
    ]  # fmt: skip
    found = recipe(make(TransformersServer), replace(serving, trust_remote_code=True), monkeypatch)
    assert found.command([8001])[3:] == [
        "serve", f"{NAME}@main", "--host", "127.0.0.1", "--port", "8001", "--trust-remote-code",
    ]  # fmt: skip
    assert found.api("http://127.0.0.1:8001").model == f"{NAME}@main"
    assert (work / NAME).resolve() == out


def test_a_tokenizer_of_another_directory(make: Make, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = other_tokenizer(serving)
    tokenizer = str(serving.checkpoint.tokenizer)
    argv = recipe(make(VllmServer), serving, monkeypatch).command([1])
    assert argv[argv.index("--tokenizer") + 1] == tokenizer
    argv = recipe(make(SglangServer), serving, monkeypatch).command([1])
    assert argv[argv.index("--tokenizer-path") + 1] == tokenizer
    recipe(make(TransformersServer), serving, monkeypatch)
    made = {path.name: path.read_text() for path in (serving.work_dir / NAME).iterdir()}
    assert made == {
        "config.json": "checkpoint's", "generation_config.json": "checkpoint's", "model.safetensors": "checkpoint's",
        "tokenizer.json": "tokenizer's", "chat_template.jinja": "tokenizer's",
    }  # fmt: skip


def test_gpus_are_given_and_spread_over(make: Make, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(kind: type[ProgramServer], there: str, **settings: object) -> tuple[list[str], str | None]:
        found = recipe(make(kind, there, **settings), serving, monkeypatch)
        for entry in serving.work_dir.iterdir():
            entry.unlink()
        argv = found.command([1])
        return argv[argv.index("1") + 1 :], found.env.get("CUDA_VISIBLE_DEVICES")

    assert told(VllmServer, "4,7") == ([], "4")
    assert told(VllmServer, "4,7", gpus=2) == (["--tensor-parallel-size", "2"], "4,7")
    assert told(SglangServer, "4,7", gpus=2) == (["--tp-size", "2"], "4,7")
    assert told(VllmServer, "4,7", gpus=2, arguments=["-pp=2"]) == (["-pp=2"], "4,7")
    assert told(TransformersServer, "4,7", gpus=2) == ([], "4,7")
    assert told(TransformersServer, "4,7", gpus=0) == ([], "")        # it must not take one that is not its own
    assert told(TransformersServer, "")[0] == []
    assert told(VllmServer, "", gpus=0)[0] == []


def test_gpus_that_are_not_there(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"server\.gpus: 3 GPUs are asked for, and 2 are to be seen here"):
        make(gpus=3).check()
    with pytest.raises(ConfigError, match=r"server\.gpus: vLLM takes a GPU, and none is to be seen here.*`gpus: 0`"):
        make(VllmServer, "").check()
    make(TransformersServer, "").check()


def test_the_environment_of_a_server(make: Make, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("SOMETHING", "kept")
    env = recipe(make(VllmServer), serving, monkeypatch).env
    assert "VLLM_API_KEY" not in env        # it would ask our own evaluators for it
    assert (env["SOMETHING"], env["HF_HUB_OFFLINE"]) == ("kept", "1")


# ---------------------------------------------------------------------- facts and probes


def test_facts_tell_what_can_change_an_answer(make: Make, serving: Serving) -> None:
    plain = make().facts(serving.checkpoint)
    assert plain == {"server": "vllm", "vllm": "1.2", "torch": "1.2", "gpus": "1"}
    said = make(arguments=["--dtype", "half"]).facts(serving.checkpoint)
    assert said != plain
    assert said != make(arguments=["--dtype", "bfloat16"]).facts(serving.checkpoint)
    other = other_tokenizer(serving).checkpoint
    before = make().facts(other)
    assert before.keys() - plain.keys() == {"server tokenizer"}
    (other.tokenizer / "model.safetensors").write_text("not the tokenizer's")
    assert make().facts(other) == before
    (other.tokenizer / "chat_template.jinja").write_text("changed")
    assert make().facts(other) != before


@pytest.mark.parametrize("form", [["--chat-template", "{}"], ["--chat-template={}"]])
def test_a_file_that_an_argument_names_counts_by_its_content(
    make: Make, serving: Serving, tmp_path: Path, form: list[str]
) -> None:
    template = tmp_path / "template.jinja"
    server = make(arguments=[argument.format(template) for argument in form])
    told = [server.facts(serving.checkpoint)["server settings"]]
    for text in ("old", "new"):
        template.write_text(text)
        told.append(server.facts(serving.checkpoint)["server settings"])
    assert len(set(told)) == 3
    assert server.facts(serving.checkpoint)["server settings"] == told[-1]


def test_a_file_that_cannot_be_read_is_named(
    make: Make, serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jinja").touch()
    server = make(arguments=["--x", str(tmp_path / "a.jinja")])
    monkeypatch.setattr(manifest, "record", record)
    with pytest.raises(ConfigError, match=r"^autoeval\.yaml: server\.arguments\[1\]: /.*a\.jinja: cannot be read"):
        server.facts(serving.checkpoint)


def test_checkpoints_of_hugging_face_alone_are_served(make: Make, serving: Serving) -> None:
    assert make().serves(serving.checkpoint)
    assert not make().serves(replace(serving.checkpoint, megatron=MegatronRecord()))


@pytest.mark.parametrize(
    ("listed", "good"),
    [
        ([{"id": NAME}], True),
        ([{"id": "checkpoint-5-fedcba9876543210"}], False),
        ([{"id": NAME}, {"id": "other"}], False),
        ([], False),
        ("nonsense", False),
    ],
)
def test_a_server_must_list_the_name_alone(listed: object, good: bool) -> None:
    probe = VllmServer.program.probe(NAME)
    assert (probe.method, probe.path) == ("GET", "/v1/models")
    assert probe.good(json.dumps({"data": listed}).encode()) is good
    assert not probe.good(b"[")


def test_transformers_must_answer_by_the_name() -> None:
    probe = TransformersServer.program.probe(f"{NAME}@main")
    assert json.loads(probe.body or "")["model"] == f"{NAME}@main"
    assert probe.good(json.dumps({"model": f"{NAME}@main"}).encode())
    assert not probe.good(json.dumps({"model": NAME}).encode())
    assert not probe.good(b"null")
    assert programs.TRANSFORMERS.named(NAME) == f"{NAME}@main"
