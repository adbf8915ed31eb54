"""Megatron-LM's own text-generation servers, run from the checkout that trained the checkpoint, or a newer one."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoeval_hooks.errors import CheckpointError, ConfigError
from autoeval_hooks.strict import build
from eval_runner.evaluators.written import located, prefixed, refused
from eval_runner.servers import contents, interpreter, launch
from eval_runner.servers import megatron_arguments as arguments
from eval_runner.servers.base import Endpoint, Serving
from eval_runner.servers.megatron_checkout import commit, number, version

if TYPE_CHECKING:
    from autoeval_hooks.manifest import MegatronRecord
    from eval_runner.checkpoints.base import Servable
    from eval_runner.evaluators.base import Context

Mode = Literal["static", "dynamic"]

SCRIPTS: dict[Mode, str] = {
    "static": "tools/run_text_generation_server.py", "dynamic": "tools/run_dynamic_text_generation_server.py",
}  # fmt: skip
MODULES: dict[Mode, tuple[str, ...]] = {
    "static": ("torch", "flask", "flask_restful"),
    "dynamic": ("torch", "hypercorn", "quart", "zmq", "msgpack", "flash_attn"),
}  # fmt: skip
"""What the scripts need that Megatron-LM does not always bring along. Without the last three it loads the model first
and ends then, or at the first request."""
FLASH_3 = ("flash_attn_3", "flashattn_hopper")
"""FlashAttention 3, under both of its names: one of them does as well as `flash_attn`."""
PIP = {"flask_restful": "flask-restful", "zmq": "pyzmq", "flash_attn": "flash-attn"}
"""What pip calls them, where the names differ."""
DYNAMIC_SINCE = (0, 17)
"""From this version on the static server ends at its start (`inference_max_sequence_length`), as of 0.20."""
PROMPT = "0"
"""A token for every tokenizer, Megatron's NullTokenizer included, which reads numbers."""

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
        self._where = prefixed(context, context.where)
        self._settings = s = _parse(settings, context)
        self._checkout = located(context.base_dir, s.checkout)
        self._given_script = located(context.base_dir, s.script) if s.script else None
        self._python = interpreter.find(s.python, context.base_dir)
        self._seen: tuple[interpreter.Found, str] | None = None      # what the last `check` was told, and the commit

    def check(self) -> None:
        """Raise ConfigError unless checkout, script and interpreter are there, with what the script imports."""
        version(self._checkout, self._where)
        if not self._script.is_file():
            key = "script" if self._settings.script else "mode"
            raise ConfigError(
                f"{self._where}.{key}: {self._script}: no such file; Megatron-LM has the static server in every "
                "checkout and the dynamic one since 0.16"
            )
        self._seen = self._look()
        missing = set(self._seen[0].missing)
        lacking = [n for n in self._wanted if n in missing and not (n == "flash_attn" and set(FLASH_3) - missing)]
        if lacking:
            raise ConfigError(
                f"{self._where}.python: {self._python} has no {', '.join(lacking)}, which the server needs; "
                f"`pip install {' '.join(PIP.get(name, name) for name in lacking)}` there, or name the interpreter "
                "that Megatron-LM runs with"
            )

    def serves(self, checkpoint: Servable) -> bool:
        return checkpoint.megatron is not None

    def facts(self, checkpoint: Servable) -> dict[str, str]:
        """Versions and settings, with the content of files that these name and of the tokenizer; torch and the commit
        as the last `check` found them. Raises ConfigError for a checkpoint of a newer Megatron, or of another layout.
        """
        record = _record(checkpoint)
        tensor, pipeline = self._parallel(checkpoint, record)
        ours = version(self._checkout, self._where)
        if record.version and number(ours) < number(record.version):
            raise ConfigError(
                f"{self._where}.checkout: {self._checkout} is Megatron {ours}, and the checkpoint was saved by "
                f"{record.version}; serve with the trainer's Megatron or newer"
            )
        found = {
            "server": f"megatron {self._mode}", "megatron": ours, "tensor_parallel": str(tensor),
            "pipeline_parallel": str(pipeline),
        }  # fmt: skip
        if self._seen is None:
            self._seen = self._look()
        torch, head = self._seen[0].versions["torch"], self._seen[1]
        found |= {name: said for name, said in (("torch", torch), ("megatron commit", head)) if said}
        if self._settings.arguments or self._settings.script:       # both can change what is answered
            content = self._script.read_bytes() if self._settings.script and self._script.is_file() else b""
            told = [contents.of_arguments(self._settings.arguments, self._where), hashlib.sha256(content).hexdigest()]
            found["server settings"] = contents.digest(told)
        # A path of training's is this host's here; what stands there counts.
        said = {name: value for name, value in record.tokenizer.items() if not os.path.isabs(value)}
        files = [file.digest for file in record.tokenizer_files]
        theirs = contents.of_tokenizer(checkpoint.tokenizer)
        found["server tokenizer"] = contents.digest([record.tokenizer_type, said, files, theirs])
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
        """Raises ConfigError where the checkout has no server of the mode that the settings name."""
        ours = version(self._checkout, self._where)
        works: Mode = "dynamic" if number(ours) >= DYNAMIC_SINCE else "static"
        if self._settings.mode == "static" and works == "dynamic" and not self._settings.script:
            raise ConfigError(
                f"{self._where}.mode: the static server of Megatron-LM 0.17 and later does not start, and "
                f"{self._checkout} is {ours}; remove the key, which means dynamic there, or name a static server that "
                "starts as `script`"
            )
        return self._settings.mode or works

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

    @property
    def _wanted(self) -> tuple[str, ...]:
        """The modules that the script needs. Those of a script of the user's own are not known."""
        if self._settings.script:
            return ("torch",)
        early = number(version(self._checkout, self._where)) < DYNAMIC_SINCE     # 0.16 has its dynamic server on flask
        return tuple("flask" if name == "quart" and early else name for name in MODULES[self._mode])

    def _look(self) -> tuple[interpreter.Found, str]:
        """Ask the interpreter, and git. Raises ConfigError unless it is a Python that works."""
        env, where = _environment(self._checkout), f"{self._where}.python"
        return interpreter.ask(self._python, [*self._wanted, *FLASH_3], ["torch"], env, where), commit(self._checkout)


_STATIC = launch.Probe(
    "PUT", "/api", json.dumps({"prompts": [PROMPT], "tokens_to_generate": 1, "top_k": 1}),
    good=lambda body: body.lstrip().startswith(b"{"),       # what it refuses, it answers with a text and status 200
)  # fmt: skip


def _parse(data: dict[str, Any], context: Context) -> Settings:
    key, errors = context.where, list[str]()
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
        raise refused(context, errors)
    return settings


def _record(checkpoint: Servable) -> MegatronRecord:
    if checkpoint.megatron is None:
        raise CheckpointError(f"{checkpoint.path}: is no checkpoint of Megatron-LM")
    return checkpoint.megatron


def _environment(checkout: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
