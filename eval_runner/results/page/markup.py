"""HTML in which text cannot become markup: whatever is not `Safe` is escaped where it is put in."""

from __future__ import annotations

import html
import json


class Safe(str):
    """Text that is markup already. Only this module's functions and this package's own templates make it."""

    __slots__ = ()


VOID = frozenset({"br", "input"})
"""Elements that hold nothing, and have no end."""


def el(name: str, *children: str, **attributes: str | bool) -> Safe:
    """An element. In attributes' names a last ``_`` is dropped, others become ``-``; one that is False is left out."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(value)}"')
        for key, value in attributes.items()
        if value is not False
    )
    return Safe(f"<{name}{shown}>" + ("" if name in VOID else f"{join(*children)}</{name}>"))


def join(*children: str) -> Safe:
    return Safe("".join(c if isinstance(c, Safe) else html.escape(c) for c in children))


def data(value: object, **attributes: str) -> Safe:
    """A JSON data block for a script to read; nothing in it can end the block."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return el("script", Safe(text), type="application/json", **attributes)
