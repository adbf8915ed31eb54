"""Templates of prompts: `str.format`'s braces and doubled braces, and nothing else of it.

A template is data that somebody else wrote: it may name what is put in, but reach into nothing, as
``{question.__class__}`` would, and format nothing. What is put in is never looked at.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping

from autoeval_hooks.strict import near

REMEDY = "write {{ and }} for braces that are text"


def names(template: str, known: Collection[str]) -> set[str]:
    """The placeholders of a template. Raises ValueError for what is no plain name, or none of `known`."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    found = set()
    for _, name, form, conversion in pieces:
        if name is None:
            continue
        if form or conversion or not name or name.isdigit() or set(name) & set(".[]"):
            whole = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{_braced(whole)}: only a plain name may stand in braces; {REMEDY}")
        found.add(name)
    if unknown := sorted(found - set(known)):
        raise ValueError("; ".join(f"unknown placeholder {_braced(n)}{near(n[:80], known)}" for n in unknown))
    return found


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put the values in, character by character. Raises ValueError as `names` does."""
    names(template, values)
    return template.format_map(values)


def _braced(name: str) -> str:
    return "{" + name[:60] + "}"
