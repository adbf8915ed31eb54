"""Paths into JSON: ``results.acc``, ``runs[0].f1``, ``[-1].loss``, ``results["arc.easy"].acc``."""

from __future__ import annotations

import json
import re
from typing import Any

from autoeval_hooks.strict import near

Steps = tuple[str | int, ...]

_KEY = r"(?P<dot>\.?)(?P<key>[^.\[\]]+)"
_STEP = re.compile(_KEY + r"""|\[(?P<index>-?[0-9]{1,9})\]|\[(?P<quoted>"(?:[^"\\]|\\.)*")\]""")
_SHOWN = 300
"""Characters of what there is instead."""


class NoValueError(ValueError):
    """What a path does not lead to, and what is there instead."""


def parse(text: str) -> Steps:
    """The keys and indices of a path. Raises ValueError for text that is none."""
    steps: list[str | int] = []
    at = 0
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None or (found["key"] is not None and bool(found["dot"]) != bool(steps)):
            break
        try:
            steps.append(json.loads(found["quoted"] or found["index"]) if found["key"] is None else found["key"])
        except ValueError:      # an escape that JSON has not, a control character, a number like 007
            break
        at = found.end()
    if not steps or at < len(text):
        raise ValueError(
            f"{text!r:.200} is no path; write it like results.acc, results[0].acc or results[\"a key\"].acc"
        )
    return tuple(steps)


def get(data: Any, steps: Steps) -> Any:
    """What a path leads to. Raises NoValueError that says how far it leads, and what is there."""
    for i, step in enumerate(steps):
        if isinstance(step, str):
            if not isinstance(data, dict):
                raise NoValueError(f"{_place(steps[:i])} is {kind(data)}, which has no key {step!r:.80}")
            if step not in data:
                raise NoValueError(f"{_place(steps[:i])} has no key {step!r:.80}{near(step, data):.{_SHOWN}}")
        elif not isinstance(data, list):
            raise NoValueError(f"{_place(steps[:i])} is {kind(data)}, which has no [{step}]")
        elif not -len(data) <= step < len(data):
            raise NoValueError(f"{_place(steps[:i])} has no [{step}]: its length is {len(data)}")
        data = data[step]
    return data


def kind(data: Any) -> str:
    """A value in words, for messages."""
    if isinstance(data, dict):
        return "a mapping"
    if isinstance(data, list):
        return f"a list of {len(data)}"
    return f"{json.dumps(data):.60}"


def _place(steps: Steps) -> str:
    if not steps:
        return "the top"
    words = [f"[{s}]" if isinstance(s, int) else f".{s}" if s.isidentifier() else f"[{json.dumps(s)}]" for s in steps]
    return f"`{''.join(words).removeprefix('.'):.200}`"
