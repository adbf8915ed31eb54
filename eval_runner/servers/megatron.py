"""Megatron-LM's own text-generation servers, run from the checkout that trained the checkpoint, or a newer one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.strict import build
from eval_runner.servers import launch
from eval_runner.servers import megatron_arguments as arguments
from eval_runner.servers.base import Endpoint, Serving

if TYPE_CHECKING:
    from autoeval_hooks.manifest import MegatronRecord
    from eval_runner.checkpoints.base import Servable
    from eval_runner.evaluators.base import Context

Mode = Literal["static", "dynamic"]

SCRIPTS: dict[Mode, str] = {
    "static": "tools/run_text_generation_server.py", "dynamic": "tools/run_dynamic_text_generation_server.py",
}  # fmt: skip
MODULES: dict[Mode, tuple[str, ...]] = {
    "static": ("torch", "flask", "flask_restful"), "dynamic": ("torch", "hypercorn", "quart"),
}  # fmt: skip
"""What the scripts import that Megatron-LM does not always bring along."""
PACKAGE = "megatron/core/package_info.py"
DYNAMIC_SINCE = (0, 17)
"""Where no mode is given, the static server serves with Megatron-LM before this version."""
PROMPT = "0"
"""A token for every tokenizer, Megatron's NullTokenizer included, which reads numbers."""
LOOK_S = 60.0

_VERSION = re.compile(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)\s*$", re.MULTILINE)
_FIRST = re.compile(r"\s*(\d+)\.(\d+)")
_RANK = re.compile(r"mp_rank_\d{2,}")


@dataclass(frozen=True)
class Settings:
    """What `server:` says. `checkout` is Megatron-LM's directory. What is not given: `python`, an interpreter that has
    what Megatron-LM needs, is the runner's own; `mode` the one that works in that version; `script` the checkout's;
    `tensor_parallel` and `pipeline_parallel` are those of training. `arguments` are further ones for the script, and
    `start_timeout` is in seconds."""

    checkout: str
    python: str | None = None
    mode: Mode | None = None
    script: str | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    arguments: tuple[str, ...] = ()
    start_timeout: float = 1800.0


class MegatronServer:
    """A `base.Server`. See `Settings` for the keys."""

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        self._where = f"{context.config_file}: {context.where}" if context.config_file else context.where
        self._settings = s = _parse(settings, context.where, self._where)
        self._checkout = _located(context.base_dir, s.checkout)
        self._given_script = _located(context.base_dir, s.script) if s.script else None
        self._python = Path(sys.executable)
        if s.python:
            named = Path(shutil.which(s.python) or s.python)
            self._python = named if "/" not in s.python else _located(context.base_dir, s.python)

    def check(self) -> None:
        """Raise ConfigError unless checkout, script and interpreter are there, with what the script imports."""
        version(self._checkout, self._where)
        if not self._script.is_file():
            key = "script" if self._settings.script else "mode"
            raise ConfigError(
                f"{self._where}.{key}: {self._script}: no such file; Megatron-LM has the static server in every "
                "checkout and the dynamic one since 0.16"
            )
        if not (self._python.is_file() and os.access(self._python, os.X_OK)):
            raise ConfigError(f"{self._where}.python: {self._python}: no such program; name a Python interpreter")
        if missing := self._missing():
            raise ConfigError(
                f"{self._where}.python: {self._python} has no {', '.join(missing)}, which the server needs; install "
                f"{'it' if len(missing) == 1 else 'them'} there, or name the interpreter that Megatron-LM runs with"
            )

    def serves(self, checkpoint: Servable) -> bool:
        return checkpoint.megatron is not None

    def facts(self, checkpoint: Servable) -> dict[str, str]:
        """Versions and settings. Raises ConfigError for a checkpoint of a newer Megatron, or of another layout."""
        record = _record(checkpoint)
        tensor, pipeline = self._parallel(checkpoint, record)
        ours = version(self._checkout, self._where)
        if record.version and _number(ours) < _number(record.version):
            raise ConfigError(
                f"{self._where}.checkout: {self._checkout} is Megatron {ours}, and the checkpoint was saved by "
                f"{record.version}; serve with the trainer's Megatron or newer"
            )
        found = {
            "server": f"megatron {self._mode}", "megatron": ours, "tensor_parallel": str(tensor),
            "pipeline_parallel": str(pipeline),
        }  # fmt: skip
        if self._settings.arguments or self._settings.script:       # both can change what is answered
            content = self._script.read_bytes() if self._settings.script and self._script.is_file() else b""
            told = json.dumps([self._settings.arguments, hashlib.sha256(content).hexdigest() if content else ""])
            found["server settings"] = hashlib.sha256(told.encode()).hexdigest()[:16]
        return found

    def start(self, serving: Serving) -> launch.Process:
        record = _record(serving.checkpoint)
        if serving.step < 1:
            raise CheckpointError(f"{serving.checkpoint.path}: Megatron takes --ckpt-step 0 for unset; save later")
        self.facts(serving.checkpoint)
        tensor, pipeline = self._parallel(serving.checkpoint, record)
        static = self._mode == "static"
        recipe = launch.Recipe(
            name=f"Megatron's {self._mode} server",
            command=partial(self._command, serving, record, tensor, pipeline),
            ports=2 if static else 3,
            env=_environment(self._checkout),
            probe=_STATIC if static else launch.Probe("GET", "/v1/health"),
            api=lambda url: Endpoint(url, "megatron" if static else "openai", serving.name),
            timeout=self._settings.start_timeout,
            remedy=f"; raise {self._where.rpartition(': ')[2]}.start_timeout if it only needs longer",
        )
        return launch.start(recipe, serving)

    @property
    def _mode(self) -> Mode:
        """The static server of 0.17 and later ends at its start (`inference_max_sequence_length`), as of 0.20."""
        if self._settings.mode:
            return self._settings.mode
        return "dynamic" if _number(version(self._checkout, self._where)) >= DYNAMIC_SINCE else "static"

    @property
    def _script(self) -> Path:
        return self._given_script or self._checkout / SCRIPTS[self._mode]

    def _parallel(self, checkpoint: Servable, record: MegatronRecord) -> tuple[int, int]:
        """Tensor and pipeline parallel sizes to serve with. Raises ConfigError where the format does not allow them."""
        s = self._settings
        saved = (record.tensor_parallel, record.pipeline_parallel)
        if record.format == "torch" and not all(saved):     # submitted by hand: its directories tell
            names = {p.name for p in checkpoint.path.glob("iter_*/mp_rank_*")}
            saved = (len(names), 1) if names and all(map(_RANK.fullmatch, names)) else (0, 0)
        wanted = (s.tensor_parallel or saved[0] or 1, s.pipeline_parallel or saved[1] or 1)
        if record.format == "torch":
            if not all(saved) and not (s.tensor_parallel and s.pipeline_parallel):
                raise ConfigError(
                    f"{checkpoint.path}: nothing says how it was split; set {self._where}.tensor_parallel and "
                    ".pipeline_parallel to what training had"
                )
            if all(saved) and wanted != saved:
                raise ConfigError(
                    f"{self._where}: asks for tensor_parallel {wanted[0]} and pipeline_parallel {wanted[1]}, and a "
                    f"checkpoint of the format torch is only served as it was saved, with {saved[0]} and {saved[1]}; "
                    "remove both keys, or save with --ckpt-format torch_dist"
                )
            if record.expert_parallel > 1:
                raise ConfigError(
                    f"{self._where}: a checkpoint of the format torch with expert parallelism {record.expert_parallel} "
                    "cannot be served; save with --ckpt-format torch_dist, or configure `convert`"
                )
        return wanted

    def _command(
        self, serving: Serving, record: MegatronRecord, tensor: int, pipeline: int, ports: Sequence[int]
    ) -> list[str]:
        """torch.distributed.run also for one process: every size takes the same path, and Megatron finds the rank and
        the address that it asks the environment for."""
        argv = [
            str(self._python), "-m", "torch.distributed.run", "--nproc-per-node", str(tensor * pipeline),
            "--master-addr", "127.0.0.1", "--master-port", str(ports[1]), str(self._script),
            "--load", str(serving.checkpoint.path), "--ckpt-step", str(serving.step), "--use-checkpoint-args",
            "--micro-batch-size", "1", "--port", str(ports[0]),
            *arguments.layout(record, tensor, pipeline), *arguments.tokenizer(record),
        ]  # fmt: skip
        if self._mode == "dynamic":
            argv += ["--inference-coordinator-port", str(ports[2])]
            if re.search(r"""["']--host["']""", self._script.read_text(encoding="utf-8", errors="replace")):
                argv += ["--host", "127.0.0.1"]     # since 0.18; without it, any host could ask
        return [*argv, *self._settings.arguments]

    def _missing(self) -> list[str]:
        """The modules that the interpreter does not find. Those of a script of the user's own are not known."""
        wanted = ("torch",) if self._settings.script else MODULES[self._mode]
        code = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
        try:
            done = subprocess.run(
                [self._python, "-c", code, *wanted], capture_output=True, text=True, timeout=LOOK_S,
                env=_environment(self._checkout), cwd="/",
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"{self._where}.python: {self._python}: cannot be run ({error})") from error
        if done.returncode:
            said = (done.stderr.split("\n")[-2:] or [""])[0]
            raise ConfigError(f"{self._where}.python: {self._python}: is no Python that works: {said[:200]}")
        return done.stdout.split()


_STATIC = launch.Probe(
    "PUT", "/api", json.dumps({"prompts": [PROMPT], "tokens_to_generate": 1, "top_k": 1}),
    good=lambda body: body.lstrip().startswith(b"{"),       # what it refuses, it answers with a text and status 200
)  # fmt: skip


def version(checkout: Path, where: str) -> str:
    """The version of the Megatron-LM in `checkout`, read and not imported. Raises ConfigError where there is none."""
    if not checkout.is_dir():
        raise ConfigError(f"{where}.checkout: {checkout}: no such directory; name the checkout of Megatron-LM")
    try:
        text = (checkout / PACKAGE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{where}.checkout: {checkout} has no {PACKAGE} ({error.strerror}), so it is no checkout of Megatron-LM"
        ) from error
    found = dict(_VERSION.findall(text))
    if len(found) < 3:
        raise ConfigError(f"{where}.checkout: {checkout / PACKAGE} does not say which version it is")
    return f"{found['MAJOR']}.{found['MINOR']}.{found['PATCH']}"


def _number(text: str) -> tuple[int, int]:
    """For comparing; patch releases read each other's checkpoints. A version that is none is older than any."""
    found = _FIRST.match(text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def _parse(data: dict[str, Any], key: str, where: str) -> Settings:
    errors: list[str] = []
    settings = build(Settings, data, key, errors)
    if settings is not None:
        for name in ("tensor_parallel", "pipeline_parallel"):
            if (size := getattr(settings, name)) is not None and size < 1:
                errors.append(f"{key}.{name}: must be 1 or more")
        if settings.start_timeout <= 0:
            errors.append(f"{key}.start_timeout: must be more than 0 seconds")
        for name in ("checkout", "python", "script"):
            if getattr(settings, name) == "":
                errors.append(f"{key}.{name}: empty")
    if errors or settings is None:
        prefix = where.removesuffix(key)
        raise ConfigError("; ".join(f"{prefix}{error}" for error in errors))
    return settings


def _record(checkpoint: Servable) -> MegatronRecord:
    if checkpoint.megatron is None:
        raise CheckpointError(f"{checkpoint.path}: is no checkpoint of Megatron-LM")
    return checkpoint.megatron


def _environment(checkout: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _located(base_dir: Path, written: str) -> Path:
    return (base_dir / Path(written).expanduser()).absolute()
