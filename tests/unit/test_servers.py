"""What a Megatron server is told, what it refuses, and what is read out of its log. Nothing is started for long."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.manifest import FileRecord, MegatronRecord
from eval_runner import config as configs
from eval_runner import doctor, process, registry, supervisor
from eval_runner.checkpoints.base import Servable
from eval_runner.cli.run import run
from eval_runner.cli.validate import validate
from eval_runner.evaluators.base import Context, Limits
from eval_runner.servers import interpreter, launch, megatron, megatron_checkout, ports, telling
from eval_runner.servers import megatron_arguments as arguments
from eval_runner.servers.base import Endpoint, Serving
from eval_runner.servers.megatron import MegatronServer

Make = Callable[..., MegatronServer]
KNOWN = MegatronRecord(format="torch_dist", version="0.16.1", tensor_parallel=2, pipeline_parallel=1, seq_length=64)
TORCH = replace(KNOWN, format="torch")
BY_HAND = MegatronRecord(format="torch")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What this project reads of a checkout of Megatron-LM."""
    for mode, name in megatron.SCRIPTS.items():
        script = tmp_path / "megatron-lm" / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text('parser.add_argument("--host")' if mode == "dynamic" else "")
    return release(tmp_path / "megatron-lm", 0, 16, 1)


def release(checkout: Path, *numbers: int) -> Path:
    info = checkout / megatron_checkout.PACKAGE
    info.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {n}\n" for name, n in zip(("MAJOR", "MINOR", "PATCH"), numbers, strict=True)]
    info.write_text(f"# a comment\n{''.join(lines)}PRE_RELEASE = ''\n__version__ = '.'.join(map(str, VERSION[:3]))\n")
    return checkout


@pytest.fixture
def make(checkout: Path, tmp_path: Path) -> Make:
    def build(**settings: object) -> MegatronServer:
        context = Context(tmp_path, tmp_path / "envs", "server", "autoeval.yaml")
        return MegatronServer({"checkout": "megatron-lm", **settings}, context)

    return build


def servable(tmp_path: Path, record: MegatronRecord | None = KNOWN) -> Servable:
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    return Servable(tmp_path / "load", tmp_path / "tokenizer", lambda: None, megatron=record)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chekout": "x"}, "autoeval.yaml: server.chekout: unknown key; did you mean 'checkout'?"),
        ({"checkout": None}, "autoeval.yaml: server.checkout: expected text, found nothing"),
        ({"checkout": ""}, "autoeval.yaml: server.checkout: empty"),
        ({"mode": "fast"}, "autoeval.yaml: server.mode: 'fast' is not one of 'static', 'dynamic'"),
        ({"tensor_parallel": 0}, "autoeval.yaml: server.tensor_parallel: must be 1 or more"),
        ({"pipeline_parallel": "2"}, "autoeval.yaml: server.pipeline_parallel: expected a whole number, found '2'"),
        ({"arguments": "--bf16"}, "autoeval.yaml: server.arguments: expected a list, found '--bf16'"),
        ({"arguments": ["--x", 4]}, "autoeval.yaml: server.arguments[1]: expected text, found 4"),
        ({"start_timeout": 0}, "autoeval.yaml: server.start_timeout: must be more than 0 seconds"),
        ({"start_timeout": -1, "python": ""},
         "autoeval.yaml: server.start_timeout: must be more than 0 seconds; autoeval.yaml: server.python: empty"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(make: Make, settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert str(caught.value) == said


def test_what_check_finds_missing(make: Make, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "MODULES", {"static": ("json", "no_such_module"), "dynamic": ("json",)})
    with pytest.raises(ConfigError, match=rf"server\.python: {sys.executable} has no no_such_module, .*`pip install"):
        make().check()
    make(mode="dynamic").check()

    def said(**settings: object) -> str:
        with pytest.raises(ConfigError) as caught:
            make(**{"mode": "dynamic", **settings}).check()
        return str(caught.value)

    assert "server.python: nowhere/python" not in said(python="nowhere/python")     # it is told as an absolute path
    assert f"server.python: {tmp_path}/nowhere/python: no such program" in said(python="nowhere/python")
    assert "server.python: no-such-interpreter: no such program" in said(python="no-such-interpreter")
    assert "is no Python that works" in said(python=shutil.which("false"))
    assert f"server.script: {tmp_path}/own.py: no such file" in said(script="own.py")
    shutil.rmtree(checkout / "tools")
    assert "server.mode: " in said()
    assert "the dynamic one since 0.16" in said()
    (checkout / megatron_checkout.PACKAGE).write_text("VERSION = '0.16'\n")
    assert "does not say which version it is" in said()
    (checkout / megatron_checkout.PACKAGE).unlink()
    assert "is no checkout of Megatron-LM" in said()
    assert f"server.checkout: {tmp_path}/gone: no such directory" in said(checkout="gone")


def test_a_script_of_the_users_own_needs_torch_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "own.py").touch()
    assert megatron.MODULES["static"][0] == "torch"
    make(script="own.py").check()


@pytest.mark.parametrize(
    ("numbers", "mode", "there", "said"),
    [
        ((0, 16, 1), None, {"torch"}, "has no flask, flask_restful, which the server needs; `pip install flask "
                                      "flask-restful` there"),
        ((0, 17, 0), None, {"torch", "hypercorn", "quart", "msgpack"},
         "has no zmq, flash_attn, which the server needs; `pip install pyzmq flash-attn` there"),
        ((0, 17, 0), None, {"torch", "hypercorn", "quart", "msgpack", "zmq", "flash_attn"}, None),
        ((0, 17, 0), None, {"torch", "hypercorn", "quart", "msgpack", "zmq", "flash_attn_3"}, None),
        ((0, 17, 0), None, {"torch", "hypercorn", "flask", "msgpack", "zmq", "flash_attn"}, "has no quart,"),
        ((0, 16, 1), "dynamic", {"torch", "hypercorn", "flask", "msgpack", "zmq", "flash_attn"}, None),
    ],
)  # fmt: skip
def test_what_each_server_needs(
    make: Make, checkout: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...], mode: str | None,
    there: set[str], said: str | None,
) -> None:  # fmt: skip
    def ask(python: Path, modules: Sequence[str], *_: object) -> interpreter.Found:
        return interpreter.Found(tuple(m for m in modules if m not in there), {"torch": ""})

    monkeypatch.setattr(interpreter, "ask", ask)
    release(checkout, *numbers)
    server = make(**({"mode": mode} if mode else {}))
    if said is None:
        server.check()
        return
    with pytest.raises(ConfigError) as caught:
        server.check()
    assert said in str(caught.value)


def test_the_mode_is_the_one_that_works(make: Make, checkout: Path, tmp_path: Path) -> None:
    modes = {}
    for minor in (12, 16, 17, 19):
        release(checkout, 0, minor, 0)
        modes[minor] = make().facts(servable(tmp_path, MegatronRecord()))["server"]
    assert modes == {12: "megatron static", 16: "megatron static", 17: "megatron dynamic", 19: "megatron dynamic"}
    (tmp_path / "own.py").touch()
    mended = make(mode="static", script="own.py")       # a static server that the user has repaired
    mended.check()
    assert mended.facts(servable(tmp_path, MegatronRecord()))["server"] == "megatron static"
    said = (
        f"autoeval.yaml: server.mode: the static server of Megatron-LM 0.17 and later does not start, and "
        f"{checkout} is 0.19.0; "
    )
    for use in (MegatronServer.check, lambda server: server.facts(servable(tmp_path, MegatronRecord()))):
        with pytest.raises(ConfigError) as caught:
            use(make(mode="static"))
        assert str(caught.value).startswith(said)


CONFIG = """
queue: queue
suites: {{quick: {{evaluators: [{{type: {evaluator}}}]}}}}
server: {server}
sinks: []
"""


def test_every_command_checks_the_server(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate`, `doctor` and `run` say what is wrong with it, each in its way."""

    class Fine:
        def __init__(self, settings: object, context: object) -> None: ...
        def check(self) -> None: ...

    get = registry.get
    monkeypatch.setattr(registry, "get", lambda kind, *rest: Fine if kind == "evaluators" else get(kind, *rest))
    monkeypatch.setattr(megatron, "MODULES", {"static": ("json",), "dynamic": ("json",)})
    path = tmp_path / "autoeval.yaml"

    def commands(server: str) -> list[tuple[int, str]]:
        path.write_text(CONFIG.format(evaluator="fine", server=server))
        found = []
        for command, options in ((validate, []), (run, ["--drain"])):
            done = CliRunner().invoke(command, ["--config", str(path), *options])
            found.append((done.exit_code, f"{done.output}{done.exception or ''}"))
        findings = [f for f in doctor._server(configs.load(str(path))) if f.what == "server"]
        return [*found, (int(findings[0].level == "problem"), findings[0].means)]

    for server, said in (
        ("{type: megatron, checkout: gone}", "server.checkout"), ("{type: megatron}", "server.checkout: missing"),
        ("{type: megatorn}", "did you mean 'megatron'?"),
    ):  # fmt: skip
        for code, output in commands(server):
            assert code != 0
            assert f"{path}: " in output
            assert said in output
    assert [code for code, _ in commands("{type: megatron, checkout: megatron-lm}")] == [0, 0, 0]
    assert [f.what for f in doctor._plugins(configs.load(str(path))) if f.level == "problem"] == []


def test_without_a_server_section_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "autoeval.yaml").write_text("queue: q\nsuites: {quick: {evaluators: [{type: helm}]}}\n")
    config = configs.load(str(tmp_path / "autoeval.yaml"))
    assert registry.build_server(config) is None
    assert doctor._server(config) == []


# ---------------------------------------------------------------------- which checkpoints


@pytest.mark.parametrize(
    ("saved_by", "fits"),
    [("", True), ("0.16.1", True), ("0.16.9", True), ("0.15.2", True), ("0.9.0", True), ("main", True),
     ("0.16.0rc0", True), ("0.17.0", False), ("0.17.0rc0", False), ("0.19.2+abc123", False), ("1.0.0", False)],
)  # fmt: skip
def test_a_checkpoint_of_a_newer_megatron_is_refused(make: Make, tmp_path: Path, saved_by: str, fits: bool) -> None:
    checkpoint = servable(tmp_path, MegatronRecord(version=saved_by))
    if fits:
        assert make().facts(checkpoint)["megatron"] == "0.16.1"
        return
    with pytest.raises(ConfigError) as caught:
        make().facts(checkpoint)
    assert str(caught.value) == (
        f"autoeval.yaml: server.checkout: {tmp_path}/megatron-lm is Megatron 0.16.1, and the checkpoint was saved by "
        f"{saved_by}; serve with the trainer's Megatron or newer"
    )


def test_it_serves_megatrons_checkpoints_and_no_others(make: Make, tmp_path: Path) -> None:
    assert make().serves(servable(tmp_path))
    assert not make().serves(servable(tmp_path, None))
    with pytest.raises(CheckpointError, match="is no checkpoint of Megatron-LM"):
        make().facts(servable(tmp_path, None))


def test_what_changes_an_answer_is_in_the_facts(make: Make, tmp_path: Path) -> None:
    found = make().facts(servable(tmp_path))
    assert found == {
        "server": "megatron static", "megatron": "0.16.1", "tensor_parallel": "2", "pipeline_parallel": "1",
        "torch": importlib.metadata.version("torch"), "server tokenizer": found["server tokenizer"],
    }  # fmt: skip
    own = tmp_path / "own.py"
    own.write_text("a")
    others = [
        make(arguments=["--bf16"]), make(arguments=["--fp16"]), make(tensor_parallel=1), make(mode="dynamic"),
        make(script="own.py"),
    ]  # fmt: skip
    told = [found, *(server.facts(servable(tmp_path)) for server in others)]
    own.write_text("b")
    told.append(make(script="own.py").facts(servable(tmp_path)))
    extra = make(arguments=["--extra", str(own)])
    told.append(extra.facts(servable(tmp_path)))
    own.write_text("c")
    told.append(extra.facts(servable(tmp_path)))
    assert len({str(facts) for facts in told}) == len(told)
    assert "--bf16" not in str(told)        # it may hold what the environment filled in
    assert make(start_timeout=5).facts(servable(tmp_path)) == found


def test_the_tokenizer_is_in_the_facts_by_its_content(make: Make, tmp_path: Path) -> None:
    """What the server reads, as training named it, and what evaluators are given; where they lie does not count."""
    def told(**more: Any) -> str:
        return make().facts(servable(tmp_path, replace(KNOWN, **more)))["server tokenizer"]

    def file(path: str, digest: str) -> dict[str, Any]:
        return {"tokenizer": {"vocab_file": path}, "tokenizer_files": (FileRecord(path, 1, 1, digest),)}

    different = [
        told(), told(tokenizer_type="GPT2BPETokenizer"), told(tokenizer={"tokenizer_model": "org/name"}),
        told(**file("/a", "1")), told(**file("/a", "2")),
    ]  # fmt: skip
    assert told(**file("/b", "2")) == different[-1]
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("a")
    different.append(told())
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("b")
    different.append(told())
    assert len(set(different)) == len(different)


def git(at: Path, *argv: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", at, *who, *argv], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_in_the_facts(make: Make, checkout: Path, tmp_path: Path) -> None:
    """That of the last check; a change that nobody committed shows, and a file that git does not know is none."""
    def commit(server: MegatronServer) -> str | None:
        return server.facts(servable(tmp_path)).get("megatron commit")

    git(tmp_path, "init", "-q")
    (tmp_path / "of the outer repository").touch()
    git(tmp_path, "add", "of the outer repository")
    git(tmp_path, "commit", "-qm", "a")
    assert commit(make()) is None           # a package that merely lies below a repository
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    assert commit(make()) is None           # no commit yet
    git(checkout, "commit", "-qm", "a")
    (checkout / "a.log").touch()
    server = make(script="megatron-lm/tools/run_text_generation_server.py")
    server.check()
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(server) == head
    (checkout / megatron.SCRIPTS["static"]).write_text("# changed")
    assert commit(make()) == f"{head}-dirty"
    assert commit(server) == head
    server.check()
    assert commit(server) == f"{head}-dirty"


@pytest.mark.parametrize("ends", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 1)])
def test_without_git_there_is_no_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, ends: Exception
) -> None:
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "a")
    assert megatron_checkout.commit(checkout)

    def run(*_: object, **__: object) -> None:
        raise ends

    monkeypatch.setattr(megatron_checkout.subprocess, "run", run)
    assert megatron_checkout.commit(checkout) == ""


def test_the_interpreter_is_asked_once_for_many_checkpoints(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    found = interpreter.Found((), {"torch": "2.9.1"})
    monkeypatch.setattr(interpreter, "ask", lambda *_: asked.append(1) or found)
    server = make()
    server.check()
    assert {server.facts(servable(tmp_path))["torch"] for _ in range(3)} == {"2.9.1"}
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("record", "ranks", "settings", "sizes"),
    [
        (MegatronRecord(), (), {}, ("1", "1")),
        (KNOWN, (), {}, ("2", "1")),
        (KNOWN, (), {"tensor_parallel": 1, "pipeline_parallel": 4}, ("1", "4")),
        (TORCH, (), {}, ("2", "1")),
        (TORCH, (), {"tensor_parallel": 2}, ("2", "1")),
        (BY_HAND, ("mp_rank_00", "mp_rank_01"), {}, ("2", "1")),
        (BY_HAND, ("mp_rank_00_000",), {"tensor_parallel": 1, "pipeline_parallel": 1}, ("1", "1")),
        (TORCH, (), {"tensor_parallel": 1}, "is only served as it was saved, with 2 and 1"),
        (BY_HAND, ("mp_rank_00",), {"pipeline_parallel": 2}, "is only served as it was saved, with 1 and 1"),
        (BY_HAND, ("mp_rank_00_000", "mp_rank_00_001"), {}, "nothing says how it was split"),
        (replace(TORCH, expert_parallel=2), (), {}, "expert parallelism 2 cannot be served"),
        (replace(KNOWN, expert_parallel=2), (), {}, ("2", "1")),
    ],
)  # fmt: skip
def test_parallel_sizes(
    make: Make, tmp_path: Path, record: MegatronRecord, ranks: tuple[str, ...], settings: dict[str, Any], sizes: object
) -> None:
    for rank in ranks:
        (tmp_path / "load" / "iter_0000010" / rank).mkdir(parents=True)
    if isinstance(sizes, str):
        with pytest.raises(ConfigError, match=sizes):
            make(**settings).facts(servable(tmp_path, record))
        return
    facts = make(**settings).facts(servable(tmp_path, record))
    assert (facts["tensor_parallel"], facts["pipeline_parallel"]) == sizes


# ---------------------------------------------------------------------- the command


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., launch.Recipe]:
    """The recipe that a server would be started by."""

    def go(server: MegatronServer, record: MegatronRecord = KNOWN, step: int = 10) -> launch.Recipe:
        recipes: list[launch.Recipe] = []
        monkeypatch.setattr(launch, "start", lambda recipe, serving: recipes.append(recipe))
        server.start(Serving(
            servable(tmp_path, record), "model-abc", step, tmp_path, tmp_path / "log", lambda: False, Limits()
        ))  # fmt: skip
        return recipes[0]

    return go


def test_the_command(make: Make, started: Callable[..., launch.Recipe], tmp_path: Path, checkout: Path) -> None:
    recipe = started(make(arguments=["--bf16"]))
    assert recipe.command([5000, 5001]) == [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", "5001", str(checkout / "tools/run_text_generation_server.py"),
        "--load", str(tmp_path / "load"), "--ckpt-step", "10", "--use-checkpoint-args", "--micro-batch-size", "1",
        "--port", "5000", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1",
        "--ckpt-format", "torch_dist", "--bf16",
    ]  # fmt: skip
    assert recipe.ports == 2
    assert recipe.env["PYTHONPATH"].split(":")[0] == str(checkout)
    assert recipe.env["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert (recipe.probe.method, recipe.probe.path) == ("PUT", "/api")
    assert not recipe.probe.good(b'"prompts argument required"')
    assert recipe.api("http://127.0.0.1:5000") == Endpoint("http://127.0.0.1:5000", "megatron", "model-abc")


def test_the_dynamic_servers_command(make: Make, started: Callable[..., launch.Recipe], checkout: Path) -> None:
    recipe = started(make(mode="dynamic"))
    argv = recipe.command([5000, 5001, 5002])
    assert argv[-4:] == ["--inference-coordinator-port", "5002", "--host", "127.0.0.1"]
    assert (recipe.ports, recipe.probe.method, recipe.probe.path) == (3, "GET", "/v1/health")
    assert recipe.api("u").api == "openai"
    (checkout / megatron.SCRIPTS["dynamic"]).write_text("")     # 0.16 and 0.17 have no such argument
    assert "--host" not in started(make(mode="dynamic")).command([5000, 5001, 5002])


def test_the_environment_passes_through(
    make: Make, started: Callable[..., launch.Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CUDA_VISIBLE_DEVICES": "3", "PYTHONPATH": "/mine", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}.items():
        monkeypatch.setenv(name, value)
    env = started(make()).env
    assert env["CUDA_VISIBLE_DEVICES"] == "3"
    assert env["PYTHONPATH"].endswith(":/mine")
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_step_0_counts_as_none(make: Make, started: Callable[..., launch.Recipe]) -> None:
    with pytest.raises(CheckpointError, match="--ckpt-step 0"):
        started(make(), step=0)


def test_the_tokenizers_arguments() -> None:
    given = {
        "tokenizer_model": "/here/tok", "vocab_size": "100", "metadata_path": "/here/m.json", "vocab_extra_ids": "0",
        "tokenizer_hf_no_use_fast": "true", "tiktoken_special_tokens": "<s> </s>",
    }  # fmt: skip
    assert arguments.tokenizer(MegatronRecord(tokenizer_type="HuggingFaceTokenizer", tokenizer=given)) == [
        "--tokenizer-type=HuggingFaceTokenizer", "--no-use-tokenizer-model-from-checkpoint-args",
        "--tokenizer-model=/here/tok", "--vocab-size=100", "--vocab-extra-ids=0", "--tokenizer-metadata=/here/m.json",
        "--tokenizer-hf-no-use-fast", "--tiktoken-special-tokens", "<s>", "</s>",
    ]  # fmt: skip
    assert arguments.tokenizer(MegatronRecord(tokenizer=given)) == []      # nobody said: what the checkpoint holds


@pytest.mark.parametrize(("tokens", "told"), [(0, None), (2048, None), (2559, None), (2560, "2561"), (8192, "8193")])
def test_a_server_takes_requests_of_the_length_that_the_model_was_trained_for(tokens: int, told: str | None) -> None:
    argv = arguments.layout(MegatronRecord(seq_length=tokens), 1, 1)
    assert argv[4:] == (["--inference-max-seq-length", told] if told else [])


def test_a_ticket_cannot_bring_arguments() -> None:
    hostile = {
        "load": "/evil", "trust_remote_code": "true", "spec": "evil module", "tokenizer_model --load": "/evil",
        "tokenizer_model": "--load=/evil", "vocab_size": "1 --load /evil", "tokenizer_sentencepiece_legacy": "--load",
    }  # fmt: skip
    argv = arguments.tokenizer(MegatronRecord(tokenizer_type="X --load /evil", tokenizer=hostile))
    assert argv == [
        "--tokenizer-type=X --load /evil", "--no-use-tokenizer-model-from-checkpoint-args",
        "--tokenizer-model=--load=/evil", "--vocab-size=1 --load /evil",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"special_tokens holds '<s> --load /evil', which reads as an argument"):
        arguments.tokenizer(MegatronRecord(tokenizer_type="X", tokenizer={"special_tokens": "<s> --load /evil"}))
    assert arguments.layout(MegatronRecord(format="--load=/evil"), 1, 1)[-1] == "1"


# ---------------------------------------------------------------------- ports and logs


def test_whose_sockets_listen_on_a_port() -> None:
    (port,) = ports.free(1)
    assert ports.listening(port) == set()
    code = f"""
import socket, sys
s = socket.socket(socket.AF_INET6 if {{six}} else socket.AF_INET); s.bind(("", {port})); s.listen()
print("ready", flush=True); sys.stdin.read()"""
    for six in (False, True):
        child = subprocess.Popen(
            [sys.executable, "-c", code.format(six=six)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        found = ports.listening(port)
        assert len(found) == 1
        assert ports.owned(child.pid, found) == found
        with socket.create_connection(("127.0.0.1", port)):
            assert ports.listening(port) == found       # a connection listens to nothing
        other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        assert ports.owned(other.pid, found) == set()
        for one in (child, other):
            one.communicate()
    assert ports.listening(port) == set()
    assert len(set(ports.free(5))) == 5


def test_who_starts_a_program_is_told_what_it_is_below(tmp_path: Path) -> None:
    roots: list[int] = []
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    below: list[list[int]] = []

    def look() -> None:
        if (tmp_path / "log").read_text():
            below.append(supervisor.descendants(roots[0]))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        process.run(
            [sys.executable, "-c", code], log=tmp_path / "log", env=None, cwd=tmp_path, on_start=roots.append,
            on_tick=look,
        )  # fmt: skip
    assert below == [[int((tmp_path / "log").read_text())]]


TORCHRUN = """
[rank1]: Traceback (most recent call last):
[rank1]: RuntimeError: Connection closed by peer
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
script.py FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : -15 (pid: 19217)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  host      : localhost
  rank      : {rank} (local_rank: 0)
  exitcode  : {exit} (pid: 19216)
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""
SIGNALLED = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15"
OOM = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [
        ("ValueError: first\nnoise\nValueError: last\nmore noise", 1, "ValueError: last"),
        ("AssertionError", 1, "AssertionError"),
        ("serve.py: error: unrecognized arguments: --x", 2, "serve.py: error: unrecognized arguments: --x"),
        (TORCHRUN.format(rank=0, exit=1), 1, OOM),
        (TORCHRUN.format(rank=1, exit=1), 1, "RuntimeError: Connection closed by peer"),
        (TORCHRUN.format(rank=3, exit=1), 1, OOM),
        (TORCHRUN.format(rank=0, exit=-9), 1, f"rank 0 was {process.reason(-9)}"),
        ("ValueError: long ago", -11, "killed by signal 11 (SIGSEGV)"),
        (f"ValueError: why\n{SIGNALLED}", 1, "ValueError: why"),
        ("loading\n\n", 0, "exit status 0; it wrote last: loading"),
        ("loading", None, ""),
        ("ValueError: in a request", None, "ValueError: in a request"),
    ],
)  # fmt: skip
def test_why_a_server_ended(tmp_path: Path, log: str, status: int | None, said: str) -> None:
    path = tmp_path / "log"
    path.write_text("RuntimeError: of an earlier start\n" + log)
    assert telling.line(path, len("RuntimeError: of an earlier start\n"), status) == said


def test_a_log_that_was_cut_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("ValueError: new\n")
    assert telling.line(path, 10_000, 1) == "ValueError: new"
    assert telling.line(tmp_path / "none", 0, 1).startswith("exit status 1; it wrote last: (no log")


@pytest.mark.parametrize(
    ("said", "lacks"),
    [("ModuleNotFoundError: No module named 'flask'", True), ("s.py: error: unrecognized arguments: --x", True),
     ("RuntimeError: `flask` and/or `flask_restful` are not installed.", True), ("RuntimeError: boom", False),
     (OOM, False)],
)  # fmt: skip
def test_what_another_try_does_not_mend(said: str, lacks: bool) -> None:
    assert telling.lacks(said) == lacks
