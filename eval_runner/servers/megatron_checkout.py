"""What a checkout of Megatron-LM says of itself: its version, and the commit where git knows one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from autoeval_hooks.errors import ConfigError

PACKAGE = "megatron/core/package_info.py"
LOOK_S = 60.0
"""Seconds that git may take; on a file system that is busy, it looks at some thousand files."""

_VERSION = re.compile(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)\s*$", re.MULTILINE)
_FIRST = re.compile(r"\s*(\d+)\.(\d+)")


def version(checkout: Path, where: str) -> str:
    """The version of the Megatron-LM in `checkout`, read and not imported. Raises ConfigError where there is none."""
    if not checkout.is_dir():
        raise ConfigError(f"{where}.checkout: {checkout}: no such directory; name the checkout of Megatron-LM")
    try:
        text = (checkout / PACKAGE).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(
            f"{where}.checkout: {checkout} has no {PACKAGE} ({error.strerror}), so it is no checkout of Megatron-LM"
        ) from error
    found = dict(_VERSION.findall(text))
    if len(found) < 3:
        raise ConfigError(f"{where}.checkout: {checkout / PACKAGE} does not say which version it is")
    return f"{found['MAJOR']}.{found['MINOR']}.{found['PATCH']}"


def number(text: str) -> tuple[int, int]:
    """For comparing; patch releases read each other's checkpoints. A version that is none is older than any."""
    found = _FIRST.match(text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def commit(checkout: Path) -> str:
    """The commit of `checkout`, with "-dirty" behind it where a file of it was changed; files that git does not know
    (logs, compiled helpers) are not looked at. "" where there is no git, or the files are none of a repository's: a
    package that merely lies below one has no commit."""
    if _git(checkout, "ls-files", "--error-unmatch", PACKAGE) is None:
        return ""
    head, changed = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "status", "--porcelain", "-uno", ".")
    return "" if head is None or changed is None else f"{head}-dirty" if changed else head


def _git(checkout: Path, *argv: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(checkout), *argv]    # what others do there is not disturbed
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
