"""Read a YAML file that a person wrote into plain data, and fill in environment variables.

The accepted language is what YAML 1.2 and JSON share, so that a text means the same here, in an editor and
in the canonical JSON that digests are taken of: ``no`` is text, ``1e-3`` a number, a date is text, and there
are no tags beyond the core ones. Every misfit is one ConfigError that names file, line and remedy.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from autoeval_hooks.errors import ConfigError

MAX_BYTES = 1 << 18
"""Size of a file. PyYAML reads some 300 kB a second, and a training process waits for it."""
MAX_EXPANDED = 1 << 20
"""Characters after aliases are followed: a few lines of aliases to aliases can stand for terabytes."""
MAX_DEPTH = 32

_CORE = "tag:yaml.org,2002:"
PLAIN = tuple(
    (_CORE + kind, rf"(?:{pattern})\Z", list(first))
    for kind, pattern, first in (
        ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
        ("merge", r"<<", "<"),
    )
)
"""What text without quotes is: tag, pattern, first characters (YAML 1.2, 10.3.2; the merge key of 1.1)."""


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML file holds, made of dict, list, str, int, float, bool and None only.

    Aliases and merge keys are followed, within limits. Raises ConfigError, and nothing else, for whatever
    cannot be read or used.
    """
    return parse_yaml(read_text(path), os.fspath(path))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a configuration file; ConfigError if it is absent, too large, no file, or not UTF-8."""
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)     # a pipe is not waited for
        with open(fd, "rb") as file:
            data = file.read(MAX_BYTES + 1) or b""
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; name the configuration file, or create it") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a directory; name a file in it, such as autoeval.yaml") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{name!r}: cannot be read ({reason}); name a readable file") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES >> 10} KiB; move long lists to other files")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}: line {line}: not UTF-8 text; save the file as UTF-8") from None


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Like `read_yaml`, of text; `name` stands for the file in messages."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem=f"deeper than {MAX_DEPTH} levels", problem_mark=mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    for tag, pattern, first in PLAIN:
        Loader.add_implicit_resolver(tag, re.compile(pattern), first)

    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        at = text.split("\n")[mark.line : mark.line + 1] if mark else []
        remedy = "put '${...}' in quotes" if "${" in "".join(at) else "correct the line"
        raise ConfigError(f"{name}: {line}not valid YAML ({problem}); {remedy}") from None
    except yaml.reader.ReaderError as error:
        line = f"line {text.count(chr(10), 0, error.position) + 1}: "
        raise ConfigError(f"{name}: {line}a control character ({error.character!r}); remove it") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}: not valid YAML ({error}); correct the file") from None
    if node is None:
        raise ConfigError(f"{name}: is empty; it must at least name a queue and a suite")
    data = _Plain(name).value(node, 0)
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: must hold 'key: value' lines, such as 'queue: /shared/autoeval'")
    return data


class _Plain:
    """Turns YAML nodes into plain data, counting what aliases make of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.budget = MAX_EXPANDED

    def fail(self, node: Any, problem: str) -> ConfigError:
        return ConfigError(f"{self.name}: line {node.start_mark.line + 1}: {problem}")

    def value(self, node: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:   # an alias to a node that it stands in has no end
            raise self.fail(node, f"aliases nest deeper than {MAX_DEPTH} levels; write the value out")
        if node.id == "mapping":
            self.charge(node, 1)
            return self.mapping(node, depth)
        if node.id == "sequence":
            self.charge(node, 1)
            if node.tag != _CORE + "seq":
                raise self.fail(node, f"tag {node.tag!r} is not supported; remove it")
            return [self.value(item, depth + 1) for item in node.value]
        self.charge(node, len(node.value) + 1)
        return self.scalar(node)

    def charge(self, node: Any, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise self.fail(node, f"aliases make more than {MAX_EXPANDED >> 20} MiB of this file; use fewer")

    def mapping(self, node: Any, depth: int) -> dict[str, Any]:
        if node.tag != _CORE + "map":
            raise self.fail(node, f"tag {node.tag!r} is not supported; remove it")
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _CORE + "merge":
                for source in self.sources(value_node, depth):
                    merged = {**source, **merged}   # of several, the first that has the key
                continue
            key = self.value(key_node, depth + 1) if key_node.id == "scalar" else None
            if not isinstance(key, str):
                shown = f"{key_node.value!r:.40} " if key_node.id == "scalar" else ""
                raise self.fail(key_node, f"key {shown}is not text; put it in quotes")
            if key in own:
                raise self.fail(key_node, f"key {key!r} stands twice in one mapping; remove one")
            own[key] = self.value(value_node, depth + 1)
        return {**merged, **own}

    def sources(self, node: Any, depth: int) -> Iterator[dict[str, Any]]:
        for item in node.value if node.id == "sequence" else [node]:
            source = self.value(item, depth + 1)
            if not isinstance(source, dict):
                raise self.fail(item, "'<<' takes a mapping, or a list of mappings")
            yield source

    def scalar(self, node: Any) -> Any:
        kind, text = node.tag.removeprefix(_CORE), node.value
        try:
            if kind == "str" or kind == "merge":
                if "\0" in text:
                    raise ValueError
                text.encode()
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                number = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
                if abs(number) < 1 << 63:
                    return number
            if kind == "float" and math.isfinite(real := float(text)):
                return real
        except (ValueError, KeyError):
            pass
        if kind in _KINDS:
            raise self.fail(node, f"{text!r:.40} is no {_KINDS[kind]}; change it or put it in quotes")
        raise self.fail(node, f"tag {node.tag!r} is not supported; remove it")


_KINDS = {"int": "64-bit number", "float": "finite number", "bool": "true or false", "str": "UTF-8 text"}

Shown = dict[str, tuple[str, str]]
"""By key path, what a text became and what stands in the file, so that no message need print a secret."""

VARIABLE = re.compile(
    r"\$\$|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:[^}$]|\$(?!\{))*))?\}|(?P<torn>\$\{)"
)


def expand(value: Any, where: str) -> Any:
    """`value` with ``${VAR}`` and ``${VAR:-default}`` in its texts filled in from the environment.

    It is done in memory only. The default also serves where the variable is empty, as in a shell; ``$$``
    stands for ``$``; keys of mappings are left alone. `where` is ``"<file>: <key path>"``. Raises ConfigError
    with every misfit.
    """
    file, colon, key = where.partition(": ")
    errors: list[str] = []
    out = expand_into(value, key if colon else "", errors, {})
    fail(file, errors)
    return out


def expand_into(value: Any, where: str, errors: list[str], shown: Shown) -> Any:
    """`expand`, for a caller that collects: misfits go to `errors`, the texts that changed to `shown`."""
    if isinstance(value, dict):
        return {k: expand_into(v, f"{where}.{k}" if where else k, errors, shown) for k, v in value.items()}
    if isinstance(value, list):
        return [expand_into(v, f"{where}[{i}]", errors, shown) for i, v in enumerate(value)]
    if not isinstance(value, str) or "$" not in value:
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["torn"]:
            errors.append(f"{where}: '${{' begins no variable; write ${{NAME}}, or $${{ for these characters")
            return ""
        if not name:
            return "$"
        found = os.environ.get(name)
        if default is not None and not found:
            return default.replace("$$", "$")
        if found is None:
            errors.append(f"{where}: environment variable {name} is not set; export it, or write ${{{name}:-default}}")
            return ""
        try:
            found.encode()
        except UnicodeEncodeError:
            errors.append(f"{where}: environment variable {name} is not UTF-8 text; export it anew")
            return ""
        return found

    text = VARIABLE.sub(fill, value)
    shown[where] = (text, value)
    return text


def unexpanded(errors: list[str], shown: Shown) -> list[str]:
    """The errors with what stands in the file in place of what variables made of it."""
    out = []
    for error in errors:
        key, _, problem = error.partition(": ")
        if key in shown:
            became, stands = shown[key]
            for form in (repr(became), f"{became!r:.60}"):      # whole, or cut as `strict` cuts it
                problem = problem.replace(form, f"the text of {stands}")
        out.append(f"{key}: {problem}")
    return out


def fail(file: str, errors: list[str]) -> None:
    """Raise one ConfigError with `errors`, each ``"<key path>: <problem>"``, if there are any: the first of each key,
    since what else is said of it follows from that."""
    first: dict[str, str] = {}
    for error in errors:
        first.setdefault(error.partition(": ")[0], f"{file}: {error}")
    if len(first) > 1:
        raise ConfigError("\n".join([f"{file}: {len(first)} errors", *first.values()]))
    for line in first.values():
        raise ConfigError(line)
