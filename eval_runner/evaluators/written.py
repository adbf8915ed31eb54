"""What the settings of evaluators and servers have in common: messages, paths, names and digests of what they write."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from autoeval_hooks.errors import ConfigError
from eval_runner import environments

if TYPE_CHECKING:       # which imports servers
    from eval_runner.evaluators.base import Context


def prefixed(context: Context, message: str) -> str:
    """The message with the file before it."""
    return f"{context.config_file}: {message}" if context.config_file else message


def refused(context: Context, errors: Iterable[str]) -> ConfigError:
    """All that is wrong with some settings."""
    return ConfigError("; ".join(prefixed(context, error) for error in errors))


def located(base_dir: Path, written: str) -> Path:
    """The absolute path of what the settings write: relative to `base_dir`, `~` is the home directory."""
    return (base_dir / Path(written).expanduser()).absolute()


def interpreter(context: Context, env: str | None, kind: str) -> Path:
    """The Python of the environment that the key `env` names: a path, ``conda:NAME``, or None for the managed one. It
    has what this `kind` of environment must have. Raises ConfigError."""
    if env and not env.startswith("conda:"):
        env = str(context.base_dir / Path(env).expanduser())
    try:
        return environments.find(env, kind, context.environments)
    except ConfigError as error:
        raise ConfigError(prefixed(context, f"{context.where}.env: {error}")) from error


def clean(text: str) -> str:
    """As a part of W&B keys and file names: what these bear badly becomes ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_.") or "_"


def label(text: str) -> str:
    """As `clean`, with the letters of all scripts: where people read it, and no file has that name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "_"


def digest(path: Path) -> str:
    """``sha256:…`` of a file, or of the names and digests of all files of a directory but Python's caches."""
    if path.is_dir():
        total = hashlib.sha256()
        files = [p for p in path.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
        for file in sorted(files):
            total.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
        return f"sha256:{total.hexdigest()}"
    with path.open("rb") as file_:
        return f"sha256:{hashlib.file_digest(file_, 'sha256').hexdigest()}"
