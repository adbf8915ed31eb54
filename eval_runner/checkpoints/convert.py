"""Checkpoints made into Hugging Face layout by a program of the user's choice, once each (`kept`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from autoeval_hooks import layouts
from autoeval_hooks import manifest as manifests
from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.manifest import FileRecord, Manifest
from eval_runner import commands, process
from eval_runner.checkpoints import kept, trust
from eval_runner.checkpoints.base import Request, Servable, Verified
from eval_runner.checkpoints.locks import Lock
from eval_runner.config.models import Config, ConvertSection

PLACEHOLDERS = ("checkpoint", "output", "tokenizer", "step")
_NEEDED = {"checkpoint": "what to convert", "output": "where to leave it"}


def check(config: Config) -> None:
    """Raise one ConfigError with all that is wrong with the section `convert`, as far as it shows without a
    checkpoint. Nothing is made."""
    section = config.convert
    if section is None:
        return
    errors = [
        error for i, argument in enumerate(section.command)
        for error in commands.problems(argument, f"convert.command[{i}]", PLACEHOLDERS)
    ]  # fmt: skip
    if not errors:
        named = {name for argument in section.command for name in commands.placeholders(argument)}
        errors += [
            f"convert.command: has no {{{name}}}, so that the program cannot know {what}"
            for name, what in _NEEDED.items() if name not in named
        ]  # fmt: skip
    if _program(config, section) is None:
        errors.append(f"convert.command[0]: {section.command[0]!r:.200} is no program here; mend the path")
    if problem := _unusable(directory_of(section)):
        errors.append(f"convert.directory: {problem}; name another directory")
    if errors:
        raise ConfigError("\n".join(f"{config.path}: {error}" for error in errors))


def directory_of(section: ConvertSection) -> Path:
    """Where converted checkpoints are kept: `convert.directory`, else below the user's cache directory."""
    if section.directory:
        return Path(section.directory)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "autoeval" / "converted"


@contextmanager
def converted(
    request: Request, found: Verified, checkpoint: Path, tokenizer: Callable[[], Path]
) -> Iterator[Servable]:
    """What the configured program makes of `checkpoint`, a directory whose files are those of `found`: a checkpoint in
    Hugging Face layout, which is not removed for as long as the context is open.

    `tokenizer` gives the directory of the one to use where the result has none. Raises what it raises, ConfigError
    where the program leaves no such checkpoint, AutoEvalError where it fails, and CheckpointError where loading the
    result would run code without leave.
    """
    check(request.config)
    section, source = request.config.convert, request.ticket.manifest
    assert section is not None
    given = tokenizer() if any("tokenizer" in commands.placeholders(argument) for argument in section.command) else None
    key, root = _key(source, request.config, section, given), directory_of(section)
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(Lock(root / f"{key}.lock"))
            result = kept.obtain(
                root, key, lock, partial(_convert, request, section, found, checkpoint, given),
                source=source.path, keep=section.keep, stopping=request.stopping,
                waits=lambda: request.progress("convert")(0.0, "waiting: the same checkpoint is being converted"),
            )  # fmt: skip
        except OSError as error:
            raise AutoEvalError(f"{root}: cannot hold what is converted ({error}); see `convert.directory`") from error
        model = result.found.path
        described = _checked(request.config, source, model, result.files)
        directory = model if described.has_tokenizer else given or tokenizer()

        def unchanged() -> None:
            found.unchanged()
            result.found.unchanged()

        what = _digest([[f.path, f.size, f.digest] for f in result.files])[:16]
        facts = {"converted by": f"{Path(section.command[0]).name} {_digest(section.command)[:12]}", "converted": what}
        yield Servable(model, directory, unchanged, facts=facts)


def _convert(
    request: Request, section: ConvertSection, found: Verified, checkpoint: Path, tokenizer: Path | None, output: Path
) -> None:
    """Run the program, and check what it leaves in `output`."""
    source, limits, name = request.ticket.manifest, request.limits, Path(section.command[0]).name
    where = f"{request.config.path}: convert.command: {name}"
    values = {"checkpoint": checkpoint, "output": output, "tokenizer": tokenizer, "step": source.step}
    program = _program(request.config, section)
    argv = [str(program), *(commands.filled(argument, values) for argument in section.command[1:])]
    request.progress("convert")(0.0, f"{name} converts the checkpoint")
    try:
        status = process.run(
            argv, log=request.log, env=None, cwd=request.work_dir, stopping=request.stopping,
            timeout=limits.timeout, grace=limits.grace, silence=limits.silence,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{where} cannot be run ({error.strerror}); name the program that runs it") from error
    except process.TimedOut as error:
        raise AutoEvalError(f"{source.path}: not converted: {error}; raise `runner.timeout`") from error
    said = f"it said: {process.tail(request.log)}; log: {request.log}"
    if status != 0:
        raise AutoEvalError(f"{source.path}: not converted: {name}: {process.reason(status)}; {said}")
    found.unchanged()
    if output.is_symlink() or not (output / "config.json").is_file():
        raise ConfigError(f"{where} left no Hugging Face checkpoint in {{output}} (no config.json); {said}")
    names = manifests.model_files(str(output))
    if layouts.is_megatron(os.listdir(output)) or not any(manifests.is_weights(n) for n in names):
        raise ConfigError(f"{where} left no weights in {{output}} (*.safetensors); {said}")
    outside = [
        n for n in names
        if not (output / n).resolve().is_relative_to(output.resolve())
        or ((output / n).is_symlink() and os.path.isabs(os.readlink(output / n)))       # it is to be moved
    ]  # fmt: skip
    if outside:
        raise ConfigError(f"{where} left a link, {outside[0]}, that leads out of {{output}}; have it leave a copy")
    _checked(request.config, source, output, tuple(manifests.record(str(output), n) for n in names))


def _checked(config: Config, source: Manifest, model: Path, files: tuple[FileRecord, ...]) -> Manifest:
    """What the files are, if loading them runs no code without leave."""
    described = replace(source, path=str(model), kind="huggingface", megatron=None, files=files)
    trust.check_weights(model, described, pickles=config.runner.allow_pickled_weights)
    trust.check_code(model, allowed=config.runner.trust_remote_code)
    return described


def _program(config: Config, section: ConvertSection) -> str | None:
    return commands.program(section.command[0], config.path.parent)


def _unusable(directory: Path) -> str:
    """Why nothing can be kept in a directory, or ""."""
    there = next(p for p in (directory, *directory.parents) if os.path.lexists(p))
    if not there.is_dir():
        return f"{there}: not a directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there}: cannot be written to"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _key(source: Manifest, config: Config, section: ConvertSection, tokenizer: Path | None) -> str:
    """Equal for what the same command makes of the same files, with the same tokenizer. The program and the files that
    the command names count by their content: a script that was mended is another."""
    program = _program(config, section) or ""
    named = [path for path in (program, *section.command[1:]) if os.path.isfile(path)]
    programs = [program, *(manifests.record(*os.path.split(os.path.realpath(path))).digest for path in named)]
    names = manifests.model_files(str(tokenizer)) if tokenizer else []
    more = [manifests.record(str(tokenizer), name) for name in names]
    contents = [[[f.path, f.size, f.digest] for f in files] for files in (source.files, more)]
    return _digest([source.kind, source.step, section.command, programs, *contents])
