"""Read JSON lines that somebody else wrote: bounded, in UTF-8, every misfit named by its line."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import json
import os
import shlex
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.strict import near

MAX_FILE = 64 << 20
"""Bytes."""
MAX_LINE = 1 << 20
"""Bytes: more than any judge reads."""
MAX_OBJECTS = 100_000
SHOWN = 5
"""So many misfits of a file are told in full."""

_BOM = b"\xef\xbb\xbf"
_WIDE = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"),
         (b"{\0", "UTF-16LE"), (b"\0{", "UTF-16BE"))  # fmt: skip
_KANA, _HANGUL = ("\u3041", "\u30fe"), ("\uac00", "\ud7a3")
_NARROW = (("cp932", "CP932", _KANA), ("euc_jp", "EUC-JP", _KANA), ("euc_kr", "EUC-KR", _HANGUL),
           ("cp949", "CP949", _HANGUL))  # fmt: skip
"""Python's name, iconv's, and the letters that a text in it has; CP932 is Shift-JIS as Windows has it. The order
matters: much of CP932 is also Hangul in CP949."""
_FOR_GOOD = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}


@dataclass
class Problems:
    """What is wrong with a file."""

    path: Path
    found: list[str] = field(default_factory=list)

    def add(self, message: str, line: int | None = None) -> None:
        self.found.append(message if line is None else f"line {line}: {message}")

    def check(self) -> None:
        """Raise ConfigError if there are any: the first ones, and how many more."""
        if self.found:
            rest = len(self.found) - SHOWN
            shown = self.found[:SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
            raise ConfigError(f"{self.path}: {'; '.join(shown)}")


@dataclass(frozen=True)
class Line:
    """An object of a file; what does not fit is added to `problems`, and some value of the right type returned."""

    number: int
    data: dict[str, Any]
    problems: Problems

    def problem(self, message: str) -> None:
        self.problems.add(message, self.number)

    def only(self, known: Collection[str]) -> None:
        """Refuse other fields."""
        for key in self.data:
            if key not in known:
                self.problem(f"{key!r:.80}: unknown field{near(key[:80], known)}")

    def has(self, name: str) -> bool:
        """Whether a field is there; that it is missing is a misfit."""
        if name not in self.data:
            close = difflib.get_close_matches(name, [key[:80] for key in self.data], n=1)
            self.problem(f"`{name}`: missing{f'; is {close[0]!r} meant for it?' if close else ''}")
        return name in self.data

    def text(self, name: str, *, blank: bool = False) -> str:
        """A text that UTF-8 can hold; with more than spaces in it unless `blank`."""
        value = self.data[name] if self.has(name) else "-"
        if not isinstance(value, str):
            self.problem(f"`{name}`: expected text, found {kind(value)}")
            return "-"
        try:
            value.encode()
        except UnicodeEncodeError:
            self.problem(f"`{name}`: holds half a character (a lone surrogate)")
        if not blank and not value.strip():
            self.problem(f"`{name}`: is empty")
        return value


def read_lines(problems: Problems) -> Iterator[Line]:
    """The objects of the file `problems.path`, blank lines passed over. What is no object is added to `problems`.

    Raises ConfigError for a file that cannot be read so, AutoEvalError where another try may mend it.
    """
    data = _content(problems.path)
    for mark, name in _WIDE:
        if data.startswith(mark):
            raise ConfigError(f"{problems.path}: line 1: is not UTF-8, but {name}; {_remedy(name, problems.path)}")
    count = 0
    for number, raw in enumerate(io.BytesIO(data.removeprefix(_BOM)), 1):
        if not raw.strip():
            continue
        if (count := count + 1) > MAX_OBJECTS:
            raise ConfigError(f"{problems.path}: line {number}: more than {MAX_OBJECTS} lines with an object")
        if len(raw) > MAX_LINE:
            problems.add(f"{len(raw)} bytes, the limit is {MAX_LINE}", number)
        elif (found := _object(_decoded(raw, number, data, problems.path), number, problems)) is not None:
            yield Line(number, found, problems)
    if not count:
        problems.add("is empty")


def kind(value: object) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _content(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)     # a pipe is not waited for
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{path}: is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}; "
                                  "a file of JSON lines is expected")  # fmt: skip
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE + 1)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise (ConfigError if error.errno in _FOR_GOOD else AutoEvalError)(
            f"{path}: cannot be read ({error.strerror})"
        ) from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path}: more than {MAX_FILE} bytes, which is the limit")
    return data


def _decoded(raw: bytes, number: int, data: bytes, path: Path) -> str:
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        name = _guess(data)
        raise ConfigError(
            f"{path}: line {number}: is not UTF-8 (byte 0x{raw[error.start]:02x} at {error.start + 1})"
            f"{f'; it looks like {name}' if name else ''}; {_remedy(name or 'ITS_ENCODING', path)}"
        ) from None


def _object(text: str, number: int, problems: Problems) -> dict[str, Any] | None:
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        problems.add(f"not valid JSON ({error.msg} at column {error.colno}); one object a line is expected", number)
        return None
    except (ValueError, RecursionError) as error:
        problems.add(f"not valid JSON ({error})", number)
        return None
    if not isinstance(value, dict):
        problems.add(f"expected one object, found {kind(value)}", number)
        return None
    return value


def _guess(data: bytes) -> str:
    """An encoding in which the text has letters of the language that it is for, "" where none is likely."""
    for codec, name, (first, last) in _NARROW:
        with contextlib.suppress(UnicodeDecodeError):
            other = [letter for letter in data.decode(codec) if letter > "\x7f"]
            if sum(first <= letter <= last for letter in other) > len(other) / 4:
                return name
    return "LATIN1" if sum(byte > 127 for byte in data) < len(data) / 4 else ""


def _remedy(name: str, path: Path) -> str:
    return f"convert it: iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > NEW_FILE"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a field stands twice")
    return out


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")
