"""Keep the secrets of our environment out of what we write: logs of what we run, records, messages.

A secret is the value of an environment variable that is named for one (``…_KEY``, ``…_TOKEN``, ``…PASSWORD``), that the
configuration names by a key such as ``api_key_env``, or that fills a ``${VAR}`` in the entry of an evaluator, a
server or a sink and is no path. What looks like a well-known kind of key, or stands as a password in an URL, is masked
too. This is the last line: nothing writes a secret on purpose, but programs that we run print what they like.

A secret that stands in a file is held here under a variable's name, not in our environment: only the children that it
is for are given it (`environment`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from autoeval_hooks.config import SECRET_VALUE
from autoeval_hooks.yamlfile import VARIABLE

MASK = "***"
LEAST = 6
"""Characters: a shorter value, such as ``true``, would be found in any text."""
CUT = 40
"""Of a longer value the start is enough, since messages quote values cut short."""
_NAMED = re.compile(r"(?:.*_)?(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)\Z", re.IGNORECASE)
_IN_URL = re.compile(r"://[^/\s:@]+:([^/\s@]+)@")
"""A password, such as that of a proxy."""
_USER = re.compile(r"://([^/\s@]+)@")
_filled: set[str] = set()
_named: set[str] = set()
_held: dict[str, str] = {}
_withheld: dict[str, str] = {}
_hidden: set[str] = set()


def learn(raw: dict[str, Any]) -> None:
    """Note which variables an unexpanded configuration uses where secrets may stand: in what is for plugins."""
    suites = raw.get("suites")
    entries = [s.get("evaluators") for s in suites.values() if isinstance(s, dict)] if isinstance(suites, dict) else []
    for key, text in _texts("", [*entries, raw.get("server"), raw.get("sinks")]):
        _filled.update(m["name"] for m in VARIABLE.finditer(text) if m["name"])
        if key.endswith("_env"):
            _named.add(text)


def hold(values: Mapping[str, str], withheld: Mapping[str, str], hidden: Iterable[str]) -> None:
    """Take the values of variables that stand in a configuration, in place of an earlier one's; `withheld` says of
    variables why their values are not used. What is in `hidden` is masked, and stays so."""
    _hidden.update(hidden)
    for known, new in ((_held, values), (_withheld, withheld)):
        known.clear()
        known.update(new)


def hide(url: str) -> None:
    """Mask from now on what stands before the @ of this URL, wherever it comes from."""
    if found := _USER.search(url):
        _hidden.update(text for part in (found[1], found[1].partition(":")[2]) for text in (part, unquote(part)))


def value(name: str) -> str:
    """Of a variable that is held, else of the environment's; empty where there is none."""
    return _held.get(name) or ("" if name in _withheld else os.environ.get(name, ""))


def withheld(name: str) -> str:
    """Why a variable whose value stands in a file has none; empty where that is not so."""
    return _withheld.get(name, "")


def environment(names: Iterable[str | None]) -> dict[str, str] | None:
    """The environment of a child that is given these variables; None, as for `process.run`, where none is held."""
    given = {name: _held[name] for name in names if name in _held}
    return {**os.environ, **given} if given else None


def masked(text: str) -> str:
    """`text` with `MASK` in the place of every secret."""
    for value in _values():
        text = re.sub(re.escape(value[:CUT]) + (r"[^\s'\"]*" if len(value) > CUT else ""), MASK, text)
    return SECRET_VALUE.sub(lambda m: f"://{MASK}@" if m[0].startswith("://") else MASK, text)


class Veil:
    """Masks a stream of bytes that comes in pieces; a piece's end that may begin a secret is held back."""

    def __init__(self) -> None:
        self._values = [os.fsencode(value) for value in _values()]
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What of the stream can be shown now."""
        data = self._held + data
        for value in self._values:
            data = data.replace(value, MASK.encode())
        longest = min(max(map(len, self._values), default=0), len(data) + 1) - 1
        keep = next((k for k in range(longest, 0, -1) if any(v.startswith(data[-k:]) for v in self._values)), 0)
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def rest(self) -> bytes:
        """What was held back, at the stream's end."""
        held, self._held = self._held, b""
        return held


def _values() -> list[str]:
    """The secrets, the longest first."""
    found = set(_hidden)
    for name, value in os.environ.items():
        path = value.startswith(("/", "~", "."))
        if name in _named or (not path and (name in _filled or _NAMED.match(name))):
            found.add(value)
        found.update(_IN_URL.findall(value))
    return sorted((v for v in found if len(v) >= LEAST), key=lambda v: (-len(v), v))


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text below, and the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else ((key, v) for v in value) if isinstance(value, list) else ()
    for inner, item in items:
        yield from _texts(str(inner), item)
