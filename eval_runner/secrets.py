"""Keep the secrets of our environment out of what we write: logs of what we run, records, messages.

A secret is the value of an environment variable that is named for one (``…_KEY``, ``…_TOKEN``, ``…PASSWORD``), that the
configuration names by a key such as ``api_key_env``, or that fills a ``${VAR}`` in the entry of an evaluator, a
server or a sink and is no path. What looks like a well-known kind of key, or stands as a password in an URL, is masked
too. This is the last line: nothing writes a secret on purpose, but programs that we run print what they like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

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
_filled: set[str] = set()
_named: set[str] = set()


def learn(raw: dict[str, Any]) -> None:
    """Note which variables an unexpanded configuration uses where secrets may stand: in what is for plugins."""
    suites = raw.get("suites")
    entries = [s.get("evaluators") for s in suites.values() if isinstance(s, dict)] if isinstance(suites, dict) else []
    for key, text in _texts("", [*entries, raw.get("server"), raw.get("sinks")]):
        _filled.update(m["name"] for m in VARIABLE.finditer(text) if m["name"])
        if key.endswith("_env"):
            _named.add(text)


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
    found = set()
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
