"""Build dataclasses from data that somebody else wrote, refusing whatever does not fit.

One reader serves the configuration (all errors at once, with the near name) and the tickets
(unknown fields, other types and NaN are refused, so that data never becomes behaviour).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

MAX_ERRORS = 100
"""After this many nothing more is looked at: eight megabytes can hold millions of misfits."""

MAX_CONTAINERS = 500_000
"""Lists and mappings of one text; to read millions takes seconds."""


def near(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the known name nearest to `name`, or the list of all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def build(cls: type[T], data: object, where: str, errors: list[str]) -> T | None:
    """Make the dataclass `cls` from the mapping `data`.

    Every misfit is appended to `errors` as ``"<key path>: <what is wrong>"``, with `where` as the
    path's start; the return value is None when there was one.
    """
    before = len(errors)
    if not isinstance(data, dict):
        errors.append(f"{where}: expected a mapping, found {_name(data)}")
        return None
    fields = _fields(cls)  # type: ignore[arg-type]  # a class is hashable
    for key in data:
        if len(errors) >= MAX_ERRORS:
            break
        if key not in fields:
            errors.append(f"{_join(where, key)}: unknown key{near(str(key)[:80], fields)}")
    values: dict[str, Any] = {}
    for name, (kind, plain, optional) in fields.items():
        if name not in data:
            if not optional:
                errors.append(f"{_join(where, name)}: missing")
            continue
        value = data[name]
        if type(value) is plain and _plain_fits(value):     # most values of a thousand results are such
            values[name] = value
        else:
            values[name] = _value(kind, value, _join(where, name), errors)
    return cls(**values) if len(errors) == before else None


def parse(cls: type[T], text: bytes, where: str, errors: list[str], *, max_bytes: int, max_depth: int = 12) -> T | None:
    """`build` from JSON text in UTF-8; size, depth, repeated keys and non-finite numbers are checked first."""
    if len(text) > max_bytes:
        errors.append(f"{where}: {len(text)} bytes, the limit is {max_bytes}")
        return None
    if text.count(b"[") + text.count(b"{") > MAX_CONTAINERS:
        errors.append(f"{where}: more than {MAX_CONTAINERS} lists and mappings")
        return None
    try:
        data = json.loads(text.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if _depth(data) > max_depth:
            raise ValueError(f"nested deeper than {max_depth} levels")
    except (ValueError, RecursionError) as error:
        errors.append(f"{where}: not valid JSON ({error})")
        return None
    return build(cls, data, where, errors)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, type | None, bool]]:
    """A dataclass's fields by name: the type, the plain type that it is or may be, and whether it may be left out.

    Remembered, since it is half of the time of reading a thousand results."""
    hints, out = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        kind, missing = hints[f.name], dataclasses.MISSING
        plain = next((part for part in (kind, *typing.get_args(kind)) if part in _TYPE_NAMES), None)
        if typing.get_origin(kind) not in (None, typing.Union, types.UnionType):
            plain = None
        out[f.name] = kind, plain, f.default is not missing or f.default_factory is not missing
    return out


@functools.cache
def _shape(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


def _plain_fits(value: Any) -> bool:
    """Whether a plain value is surely one that `_value` takes: short text, small numbers."""
    if isinstance(value, str):
        return value.isascii() and "\0" not in value
    return bool(-1e15 < value < 1e15)


def _value(kind: Any, value: object, where: str, errors: list[str]) -> Any:
    origin, args = _shape(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where, errors)
    if origin is typing.Literal:
        if value not in args or type(value) is not type(args[0]):
            errors.append(f"{where}: {value!r:.60} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            errors.append(f"{where}: expected a list, found {_name(value)}")
            return ()
        items = []
        for i, item in enumerate(value):
            if len(errors) >= MAX_ERRORS:
                break
            items.append(_value(args[0], item, f"{where}[{i}]", errors))
        return tuple(items)
    if origin is dict:
        if not isinstance(value, dict):
            errors.append(f"{where}: expected a mapping, found {_name(value)}")
            return {}
        out = {}
        for key, item in value.items():
            if len(errors) >= MAX_ERRORS:
                break
            if not isinstance(key, str) or not _holds(key):
                errors.append(f"{where}: key {key!r:.60} is not text that a name may hold")
            out[key] = _value(args[1], item, _join(where, key), errors)
        return out
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where, errors)
    if kind is float and type(value) is int and abs(value) < 1 << 1000:     # what lies beyond is no float
        value = float(value)
    if type(value) is not kind:
        errors.append(f"{where}: expected {_TYPE_NAMES.get(kind, kind)}, found {_name(value)}")
    elif kind is float and not math.isfinite(typing.cast(float, value)):
        errors.append(f"{where}: {value} is not a finite number")
    elif kind is int and abs(typing.cast(int, value)) >= 1 << 63:
        errors.append(f"{where}: the number does not fit in 64 bits")
    elif kind is str and not _holds(typing.cast(str, value)):
        errors.append(f"{where}: text with a character that no path or name may hold")
    return value


_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _name(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else f"{value!r:.60}"


def _join(where: str, key: object) -> str:
    shown = str(key)
    if len(shown) > 80 or not shown.isprintable():
        shown = f"{key!a:.80}"
    return f"{where}.{shown}" if where else shown


def _holds(text: str) -> bool:
    """Whether a path or a name can hold this text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _refuse_constant(name: str) -> Callable[[], None]:
    raise ValueError(f"{name} is not a number")


def _depth(data: object) -> int:
    deepest, level = 0, [data]
    while level:
        deepest += 1
        level = [v for d in level for v in (d.values() if isinstance(d, dict) else d if isinstance(d, list) else ())]
    return deepest
