"""The Python that a server program runs with: where it is, and what it has. It is asked; nothing is imported here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoeval_hooks.errors import ConfigError

LOOK_S = 120.0
"""Seconds that it may take to answer; from a file system that is busy, Python starts slowly."""

_ASK = """
import importlib.metadata, importlib.util, json, os, sys
def there(name):            # a package takes seconds to import, so its modules are looked for as files
    top, *rest = name.split(".")
    found = importlib.util.find_spec(top)
    if found is None or not rest:
        return found is not None
    paths = [os.path.join(place, *rest) for place in found.submodule_search_locations or ()]
    return any(os.path.isdir(path) or os.path.isfile(path + ".py") for path in paths)
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
wanted, packages = map(json.loads, sys.argv[1:])
print(json.dumps([[n for n in wanted if not there(n)], {n: version(n) for n in packages}]))
"""


@dataclass(frozen=True)
class Found:
    """What an interpreter says: the modules that it lacks, and the versions of packages, "" where there is none."""

    missing: tuple[str, ...]
    versions: dict[str, str]


def find(named: str | None, base_dir: Path) -> Path:
    """The interpreter that `named` means: our own without a name, one of the PATH, or a path from `base_dir` on.
    Links are kept: a virtual environment's Python is one."""
    if named is None:
        return Path(sys.executable)
    if "/" in named:
        return (base_dir / Path(named).expanduser()).absolute()
    return Path(shutil.which(named) or named)


def ask(python: Path, modules: Sequence[str], packages: Sequence[str], env: dict[str, str], where: str) -> Found:
    """Raises ConfigError, which starts with `where`, unless it is a Python that works."""
    if not (python.is_file() and os.access(python, os.X_OK)):
        raise ConfigError(f"{where}: {python}: no such program; name a Python interpreter")
    try:
        done = subprocess.run(
            [python, "-c", _ASK, json.dumps(modules), json.dumps(packages)], capture_output=True, text=True,
            timeout=LOOK_S, env=env, cwd="/",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{where}: {python}: cannot be run ({error})") from error
    try:
        missing, versions = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        said = (done.stderr.strip().split("\n")[-1:] or [""])[0]
        raise ConfigError(f"{where}: {python}: is no Python that works: {said[:200] or 'it says nothing'}") from error
    return Found(tuple(missing), versions)
