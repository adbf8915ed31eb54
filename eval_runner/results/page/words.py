"""Numbers and times as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"
"""What stands where there is nothing."""

ARROWS = {True: "↑ higher is better", False: "↓ lower is better", None: ""}


def number(value: float, stderr: float | None) -> str:
    """A value with as many digits as its standard error gives a meaning to, and that error with two digits."""
    if not stderr:
        return minus(f"{value:.4g}")
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    if decimals > 8:
        return minus(f"{value:.6g} ± {stderr:.1e}")
    return minus(f"{value:.{decimals}f} ± {stderr:.{decimals}f}")


def minus(text: str) -> str:
    """Numbers with a minus sign that is as wide as a plus."""
    return text.replace("-", MINUS)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 10 s``, ``2 h 5 min``; a negative one, of clocks that disagree, is shown as it is."""
    sign, s = MINUS if seconds < 0 else "", abs(seconds)
    if s < 9.95:
        return f"{sign}{s:.1f} s"
    if s < 59.5:
        return f"{sign}{s:.0f} s"
    minutes, rest = divmod(round(s), 60)
    return f"{sign}{minutes} min {rest} s" if minutes < 60 else f"{sign}{minutes // 60} h {minutes % 60} min"


def billions(tokens: int | None) -> str:
    return NONE if tokens is None else f"{tokens / 1e9:.4g}"


def time(seconds: float) -> tuple[str, str]:
    """``21 Nov 21:05`` and ``2026, UTC``."""
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at.day} {at:%b %H:%M}", f"{at.year}, UTC"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
