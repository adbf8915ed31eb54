"""Evaluate a checkpoint with a program of the user's: an argument list, run as it stands, then its score files."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import commands, process, secrets
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.command import scores
from eval_runner.evaluators.command.progress import Told
from eval_runner.evaluators.command.settings import parse
from eval_runner.evaluators.written import digest, located, prefixed
from eval_runner.results.schema import Evaluation

FAULTS: dict[int, tuple[type[AutoEvalError], str]] = {
    2: (ConfigError, "a wrong call?"),
    64: (ConfigError, "a wrong call"),
    78: (ConfigError, "a mistake in its configuration"),
    65: (CheckpointError, "the checkpoint cannot be evaluated"),
    75: (AutoEvalError, "try later"),
}
"""Exit statuses that say whose fault it is, as BSD's sysexits(3) has them; 2 is what argparse and most shells' own
commands answer to a wrong call. Any other failure may pass, and is tried again."""


class CommandEvaluator:
    """Any program. See `settings.Settings` for the keys.

    No part of an evaluation is kept for another attempt: what a program has done so far is its own business, and it
    may keep that where it likes.
    """

    def __init__(self, settings: dict[str, Any], context: Context) -> None:
        self._settings = parse(settings, context)
        self._context = context
        self.benchmark = self._settings.name

    def check(self) -> None:
        """Raise one ConfigError with all that is missing: the program, the files, the working directory, a server."""
        s, where, errors = self._settings, self._context.where, []
        if self._program() is None:
            errors.append(f"{where}.command[0]: {s.command[0]!r:.200} is no program here; mend the path, or $PATH")
        for i, written in enumerate(s.files):
            if not ((path := self._located(written)).is_file() or path.is_dir()):
                errors.append(f"{where}.files[{i}]: {path}: no such file or directory")
        if not commands.placeholders(s.working_directory) and not (path := self._located(s.working_directory)).is_dir():
            errors.append(f"{where}.working_directory: {path}: no such directory")
        if s.asks_server and not self._context.server:
            errors.append(f"{where}.command: {{server_url}} needs a server; {_SERVER}")
        if errors:
            raise ConfigError("; ".join(prefixed(self._context, error) for error in errors))

    def evaluate(self, job: Job) -> Outcome:
        """Run the program, and read its scores: all that were asked for, or none. See the protocol for what it raises.
        A server is started only where a placeholder asks for it."""
        self.check()
        s, began = self._settings, time.monotonic()
        name, provenance = s.program, self._provenance()
        output, work = (Path(os.path.realpath(job.work_dir)) / kind for kind in ("output", "work"))
        output.mkdir()
        work.mkdir()
        values: dict[str, object] = {
            "checkpoint": job.path, "tokenizer": job.tokenizer, "step": job.step, "name": job.name, "output": output,
            "work_dir": work, "config_dir": self._context.base_dir, "python": sys.executable,
        }  # fmt: skip
        if s.asks_server:
            values |= self._served(job)
        job.progress(0.0, f"{name} runs")
        status = self._run(job, values, Told(output, job.progress))
        if s.asks_server:
            job.release()
        if self._provenance() != provenance:
            raise AutoEvalError(self._said("files: were changed while they were used; the next try reads the new ones"))
        if status != 0:
            kind, meaning = FAULTS.get(status, (AutoEvalError, ""))
            reason = process.reason(status) + (f" ({meaning})" if meaning else "")
            said = f"it said: {process.tail(job.log) or 'nothing'}; log: {job.log}"
            raise kind(self._said(f"command: {name} failed: {reason}; {said}"))
        try:
            found, instances = scores.read(s, output, self._said(""))
        except AutoEvalError as error:
            raise type(error)(f"{error}; log: {job.log}") from error
        job.progress(1.0, f"{name}: all scores read")
        versions = {"command": shlex.join(map(secrets.masked, s.command))} | job.facts
        if s.asks_server:
            versions |= job.server_facts
        seconds = time.monotonic() - began
        return Outcome(Evaluation("command", seconds, tuple(found), versions, provenance), instances)

    def _run(self, job: Job, values: dict[str, object], told: Told) -> int:
        """The exit status of the program."""
        s = self._settings
        argv = [str(self._program()), *(commands.filled(argument, values) for argument in s.command[1:])]
        env = os.environ | {name: commands.filled(value, values) for name, value in s.env.items()}
        cwd = self._located(commands.filled(s.working_directory, values))
        try:
            return job.run(argv, env=env, cwd=cwd, on_tick=told.look)
        except OSError as error:
            raise ConfigError(
                self._said(f"command: {s.command[0]} cannot be run ({error.strerror}); name the program that runs it")
            ) from error

    def _served(self, job: Job) -> dict[str, object]:
        if job.endpoint is None:
            raise ConfigError(self._said(f"command: {job.path} is served by nothing here; {_SERVER}"))
        job.progress(0.0, "waits for the checkpoint's server")
        endpoint = job.endpoint()
        return {"server_url": endpoint.url, "server_model": endpoint.model}

    def _program(self) -> str | None:
        first = self._settings.command[0]
        path = self._settings.env.get("PATH")
        return sys.executable if first == "{python}" else commands.program(first, self._context.base_dir, path)

    def _provenance(self) -> dict[str, str]:
        """Digests of what `files` names, and of a program that the command names by its path."""
        named = [self._located(written) for written in self._settings.files]
        if "/" in self._settings.command[0]:
            named.append(Path(str(self._program())))
        try:
            return {str(path): digest(path) for path in named}
        except OSError as error:
            raise ConfigError(self._said(f"files: {error.filename}: cannot be read ({error.strerror})")) from error

    def _located(self, written: str) -> Path:
        try:
            return located(self._context.base_dir, written)
        except RuntimeError as error:       # ~ or ~USER
            raise ConfigError(f"{self._said('')}: {written}: no such home directory; write it in full") from error

    def _said(self, key: str) -> str:
        """The beginning of a message: the file and the key path."""
        where = self._context.where
        return prefixed(self._context, f"{where}.{key}" if key else where)


_SERVER = "configure `server:`, such as `server: {type: transformers}`"
