"""Command lines that users write: an argument list with placeholders, which no shell ever sees.

``{name}`` stands for a value, ``{{`` and ``}}`` are braces. Each argument is filled in once: what a value holds is
text, whatever it looks like, and an argument stays one argument.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Formatter

from autoeval_hooks import strict

BRACES = "write {{ and }} for braces of the program's own"


def placeholders(argument: str) -> list[str]:
    """The placeholders in an argument, with what is wrong about one as a part of its name. Raises ValueError for a
    brace alone."""
    return [
        name + (f"!{way}" if way else "") + (f":{spec}" if spec else "")
        for _, name, spec, way in Formatter().parse(argument) if name is not None
    ]  # fmt: skip


def problems(argument: str, where: str, known: Iterable[str]) -> list[str]:
    """What is wrong with the placeholders of an argument; `where` is its key path."""
    try:
        found = placeholders(argument)
    except ValueError as error:
        return [f"{where}: {error}; {BRACES}"]
    return [
        f"{where}: {{{name:.60}}} stands for nothing{strict.near(name, known)}; {BRACES}"
        for name in found if name not in known
    ]  # fmt: skip


def filled(argument: str, values: Mapping[str, object]) -> str:
    """An argument without `problems`, each placeholder replaced by its value."""
    return argument.format_map(values)


def program(written: str, base_dir: Path, path: str | None = None) -> str | None:
    """The path of the program, None if there is none. A name without a slash is looked up in `path`, by default
    $PATH; a relative path starts at `base_dir`, ``~`` is the home directory."""
    name = os.path.expanduser(written)
    return shutil.which(os.path.join(base_dir, name) if "/" in name else name, path=path)
