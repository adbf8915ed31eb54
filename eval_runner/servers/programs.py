"""Programs that serve Hugging Face checkpoints by OpenAI's API: `transformers serve`, vLLM and SGLang.

One implementation and a table. The name that a server goes by holds the digest of the weights, and it answers once
the server itself says that name: no server that was left over from another checkpoint can answer for this one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.strict import build
from eval_runner.evaluators.written import prefixed, refused
from eval_runner.servers import contents, gpus, interpreter, launch
from eval_runner.servers.base import Endpoint, Serving

if TYPE_CHECKING:
    from eval_runner.checkpoints.base import Servable
    from eval_runner.evaluators.base import Context

QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
"""Everything is here: nothing is looked for on a hub, and nobody is told."""
KEYS = ("VLLM_API_KEY",)
"""Variables by which a program would ask our own evaluators for a key."""


@dataclass(frozen=True)
class Settings:
    """What `server:` says. `python` is an interpreter that has the program, the runner's own where none is given;
    `arguments` are further ones for the program; `gpus` is how many GPUs it gets (1 where there are any, and 0 for
    transformers where there are none); `start_timeout` is in seconds."""

    python: str | None = None
    arguments: tuple[str, ...] = ()
    gpus: int | None = None
    start_timeout: float = 1800.0


@dataclass(frozen=True)
class Start:
    """What a command line is made of: `model` and `tokenizer` are directories, `name` is what the server goes by."""

    model: Path
    tokenizer: Path
    name: str
    port: int


@dataclass(frozen=True)
class Program:
    """A row of the table. `modules` are what `python` must have, `install` what brings them; `versions` are the
    packages that answers depend on, the program's own first. `command` comes after `python`; `ours` are the arguments
    that it makes, which the settings may not, with their other names. `probe` and `named` take the name that the server
    is to go by; the latter makes it that by which it is asked. With `links`, that name leads from the directory that
    the server runs in to the checkpoint. `spread` is the argument for more than one GPU, "" where the program spreads
    by itself, and `layouts` are those by which the settings say it themselves."""

    name: str
    modules: tuple[str, ...]
    install: str
    versions: tuple[str, ...]
    command: Callable[[Start], list[str]]
    ours: tuple[str, ...]
    probe: Callable[[str], launch.Probe]
    named: Callable[[str], str] = lambda name: name
    links: bool = False
    needs_gpu: bool = True
    spread: str = ""
    layouts: tuple[str, ...] = ()


def _listed(name: str) -> launch.Probe:
    """Asks for the list of models, which must be this one alone."""

    def good(body: bytes) -> bool:
        try:
            return [model["id"] for model in json.loads(body)["data"]] == [name]
        except (ValueError, KeyError, TypeError):
            return False

    return launch.Probe("GET", "/v1/models", good=good)


def _says(name: str) -> launch.Probe:
    """Asks for one token. `transformers serve` lists what stands in the hub's cache, and refuses requests for any model
    but the one that it was started with, by whose name it answers."""

    def good(body: bytes) -> bool:
        try:
            return bool(json.loads(body)["model"] == name)
        except (ValueError, KeyError, TypeError):
            return False

    asked = {"model": name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    return launch.Probe("POST", "/v1/completions", json.dumps(asked), good)


COMMON = ("--host", "--port", "--trust-remote-code")
TRANSFORMERS = Program(
    name="transformers",
    modules=(
        "torch", "accelerate", "fastapi", "uvicorn", "openai", "transformers", "transformers.cli.serving.completion",
    ),
    install="'transformers[serving]>=5.23' accelerate torch",
    versions=("transformers", "torch"),
    # Not its own script, which asks a package index for newer versions. Its model's name is the path, as it is given.
    command=lambda start: [
        "-c", "from transformers.cli.transformers import app; app()", "serve", start.name,
        "--host", "127.0.0.1", "--port", str(start.port),
    ],
    ours=COMMON,
    probe=_says,
    named=lambda name: f"{name}@main",      # it would add the revision itself in its answers, and they would differ
    links=True,
    needs_gpu=False,
)  # fmt: skip
VLLM = Program(
    name="vllm",
    modules=("vllm",),
    install="vllm",
    versions=("vllm", "torch"),
    command=lambda start: [
        "-m", "vllm.entrypoints.openai.api_server", "--model", str(start.model), "--tokenizer", str(start.tokenizer),
        "--served-model-name", start.name, "--host", "127.0.0.1", "--port", str(start.port),
    ],
    ours=(*COMMON, "--model", "--tokenizer", "--served-model-name", "--api-key", "--uds"),
    probe=_listed,
    spread="--tensor-parallel-size",
    layouts=("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"),
)  # fmt: skip
SGLANG = Program(
    name="sglang",
    modules=("sglang",),
    install="'sglang[all]'",
    versions=("sglang", "torch"),
    command=lambda start: [
        "-m", "sglang.launch_server", "--model-path", str(start.model), "--tokenizer-path", str(start.tokenizer),
        "--served-model-name", start.name, "--host", "127.0.0.1", "--port", str(start.port),
    ],
    ours=(*COMMON, "--model", "--model-path", "--tokenizer-path", "--served-model-name", "--api-key"),
    probe=_listed,
    spread="--tp-size",
    layouts=(
        "--tp", "--tp-size", "--tensor-parallel-size", "--pp", "--pp-size", "--pipeline-parallel-size", "--dp",
        "--dp-size", "--data-parallel-size",
    ),
)  # fmt: skip


class ProgramServer:
    """A `base.Server`. See `Settings` for the keys."""

    program: Program

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        self._key = context.where
        self._where = prefixed(context, context.where)
        self._settings = _parse(settings, self.program, context)
        self._python = interpreter.find(self._settings.python, context.base_dir)
        self._found: interpreter.Found | None = None
        self._visible: tuple[gpus.Gpu, ...] | None = None

    def check(self) -> None:
        """Raise ConfigError unless the interpreter, the program and enough GPUs are there."""
        if missing := self._asked().missing:
            has = self._asked().versions[self.program.versions[0]]
            raise ConfigError(
                f"{self._where}.python: {self._python} has no {', '.join(missing)}, which "
                f"{self._told}{f' {has}' if has else ''} needs to serve; run `{self._python} -m pip install -U "
                f"{self.program.install}`, or name the interpreter of an environment that has it"
            )
        self._gpus()

    def serves(self, checkpoint: Servable) -> bool:
        return checkpoint.megatron is None

    def facts(self, checkpoint: Servable) -> dict[str, str]:
        """Versions and settings, with the content of files that these name and of a tokenizer that is not the
        checkpoint's."""
        found = {"server": self.program.name, "gpus": str(self._gpus())}
        found |= {name: version for name, version in self._asked().versions.items() if version}
        if self._settings.arguments:
            found["server settings"] = contents.of_arguments(self._settings.arguments, self._where)
        if checkpoint.tokenizer != checkpoint.path:
            found["server tokenizer"] = contents.digest(contents.of_tokenizer(checkpoint.tokenizer))
        return found

    def start(self, serving: Serving) -> Running:
        self.check()
        model = _link(serving) if self.program.links else serving.checkpoint.path
        held = gpus.take(self._gpus(), self._present(), serving.stopping)
        try:
            running = Running(launch.start(self._recipe(serving, model, held), serving), held)
        except BaseException:
            held.close()
            raise
        try:
            serving.checkpoint.unchanged()      # as it was read
        except BaseException:
            running.close()
            raise
        return running

    @property
    def _told(self) -> str:
        return {"transformers": "`transformers serve`", "vllm": "vLLM", "sglang": "SGLang"}[self.program.name]

    def _recipe(self, serving: Serving, model: Path, held: gpus.Held) -> launch.Recipe:
        name = self.program.named(serving.name)
        tokenizer = serving.checkpoint.tokenizer

        def command(ports: Sequence[int]) -> list[str]:
            argv = [str(self._python), *self.program.command(Start(model, tokenizer, name, ports[0]))]
            if len(held.names) > 1 and self.program.spread and not self._lays_out():
                argv += [self.program.spread, str(len(held.names))]
            if serving.trust_remote_code:
                argv.append("--trust-remote-code")
            return [*argv, *self._settings.arguments]

        return launch.Recipe(
            name=self._told, command=command, ports=1, env=_environment(self._present(), held.names),
            probe=self.program.probe(name), api=lambda url: Endpoint(url, "openai", name),
            timeout=self._settings.start_timeout,
            remedy=f"; raise {self._key}.start_timeout if it only needs longer", keep=held.descriptors,
        )  # fmt: skip

    def _lays_out(self) -> bool:
        return any(_flag(argument) in self.program.layouts for argument in self._settings.arguments)

    def _asked(self) -> interpreter.Found:
        if self._found is None:
            self._found = interpreter.ask(
                self._python, self.program.modules, self.program.versions, _environment((), ()), f"{self._where}.python"
            )
        return self._found

    def _present(self) -> tuple[gpus.Gpu, ...]:
        if self._visible is None:
            self._visible = gpus.visible()
        return self._visible

    def _gpus(self) -> int:
        """How many it gets. Raises ConfigError where there are not so many."""
        asked, there = self._settings.gpus, len(self._present())
        if asked is None:
            if not there and self.program.needs_gpu:
                raise ConfigError(
                    f"{self._where}.gpus: {self._told} takes a GPU, and none is to be seen here; run it where there is "
                    "one, or write `gpus: 0` for a build of it that needs none"
                )
            return min(1, there)
        if asked > there:
            raise ConfigError(
                f"{self._where}.gpus: {asked} GPUs are asked for, and {there} are to be seen here "
                f"({gpus.VARIABLE}, else `nvidia-smi -L`)"
            )
        return asked


class TransformersServer(ProgramServer):
    """`transformers serve`."""

    program = TRANSFORMERS


class VllmServer(ProgramServer):
    """vLLM's server."""

    program = VLLM


class SglangServer(ProgramServer):
    """SGLang's server."""

    program = SGLANG


class Running:
    """A `base.Running`: the process, and the GPUs that it has."""

    def __init__(self, process: launch.Process, held: gpus.Held) -> None:
        self.endpoint = process.endpoint
        self._process = process
        self._held = held

    def failure(self, wait: float = 0.0) -> AutoEvalError | None:
        return self._process.failure(wait)

    def close(self) -> None:
        try:
            self._process.close()
        finally:
            self._held.close()


def _link(serving: Serving) -> Path:
    """A directory of that name in `work_dir`, with the checkpoint's files and those of its tokenizer."""
    path, tokenizer = serving.checkpoint.path.absolute(), serving.checkpoint.tokenizer.absolute()
    made = serving.work_dir / serving.name
    if tokenizer == path:
        made.symlink_to(path)
        return made
    made.mkdir()
    for directory, tokenizers in ((path, False), (tokenizer, True)):
        for entry in directory.iterdir():
            if contents.is_tokenizers(entry.name) is tokenizers:
                (made / entry.name).symlink_to(entry)
    return made


def _environment(present: Sequence[gpus.Gpu], names: Sequence[str]) -> dict[str, str]:
    """Our own, less what would change the server; where GPUs are `present`, it sees those that it was given alone."""
    env = {name: value for name, value in os.environ.items() if name not in KEYS} | QUIET
    return env | ({gpus.VARIABLE: ",".join(names)} if present else {})


def _flag(argument: str) -> str:
    """`--max_model_len=4` → `--max-model-len`."""
    return argument.partition("=")[0].replace("_", "-")


def _parse(data: dict[str, Any], program: Program, context: Context) -> Settings:
    key, errors = context.where, list[str]()
    settings = build(Settings, data, key, errors)
    if settings is not None:
        if settings.start_timeout <= 0:
            errors.append(f"{key}.start_timeout: must be more than 0 seconds")
        if settings.gpus is not None and settings.gpus < 0:
            errors.append(f"{key}.gpus: must be 0 or more")
        if settings.python == "":
            errors.append(f"{key}.python: empty")
        for i, argument in enumerate(settings.arguments):
            if _flag(argument) == "--trust-remote-code":
                errors.append(f"{key}.arguments[{i}]: {argument}: is said by `runner.trust_remote_code`")
            elif _flag(argument) in program.ours:
                errors.append(f"{key}.arguments[{i}]: {argument}: is set by autoeval, which must know it; remove it")
    if errors or settings is None:
        raise refused(context, errors)
    return settings
