"""Credentials that stand in clear in the older watcher's YAML, as its documentation showed them.

They go under variables of ours to the judge's child alone (`secrets.hold`): what is made of the file names the
variables, so that no suite, ticket, result or print-out holds a value. A key is used only where nobody but the file's
owner can read it; else whoever evaluates by it is refused, and other commands warn.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoeval_hooks.errors import ConfigError
from eval_runner import secrets
from eval_runner.config.models import Config

log = logging.getLogger("autoeval")

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Credential:
    """`ours` is the variable under which the judge is given what stands in clear, `usual` one for messages."""

    key: str
    ours: str
    usual: str
    secret: bool

    @property
    def where(self) -> str:
        return f"auto_eval.gpt_evaluation.{self.key}"


_ALL = (
    Credential("openai_api_key", "AUTOEVAL_JUDGE_API_KEY", "OPENAI_API_KEY", True),
    Credential("openai_organization", "AUTOEVAL_JUDGE_ORGANIZATION", "OPENAI_ORG_ID", False),
)
CREDENTIALS = {one.key: one for one in _ALL}


def split(gpt: Mapping[str, Any], where: str, errors: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the section at the key path `where`, its credentials, those in clear replaced by ``${VARIABLE}`` of ours; and
    the values of these variables. What is wrong goes to `errors`, without the value."""
    named: dict[str, str] = {}
    clear: dict[str, str] = {}
    for key, one in CREDENTIALS.items():
        value = gpt.get(key)
        if isinstance(value, str):
            value = value.strip()
        if value in (None, ""):
            continue
        if not isinstance(value, str):
            errors.append(f"{where}.{key}: expected text; put it in quotes")
        elif VARIABLE.fullmatch(value) or (one.secret and value == "EMPTY"):     # for a server that asks for none
            named[key] = value
        elif "${" in value:
            errors.append(f"{where}.{key}: ${{…}} stands beside something else, or has a default; "
                          f"write ${{{one.usual}}} alone")  # fmt: skip
        else:
            named[key] = f"${{{one.ours}}}"
            clear[one.ours] = value
    return named, clear


def take(clear: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Hold what stands in clear in the file at `path`, as far as it can be used. Raises ConfigError for a file that is
    gone."""
    name = os.fspath(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); name a readable file") from None
    withheld = {}
    for one in _ALL:
        value = clear.get(one.ours, "x")
        if not (value.isascii() and value.isprintable()) or " " in value:
            withheld[one.ours] = f"{one.where}: holds what cannot be one: blanks or other letters than ASCII's; mend it"
        elif one.ours in clear and one.secret and mode & 0o077:
            withheld[one.ours] = (
                f"{one.where}: stands in clear in a file that others can read (mode {stat.S_IMODE(mode):o}): run "
                f"`chmod 600 {shlex.quote(name)}`, or export it and write ${{{one.usual}}} in its place"
            )
    secrets.hold(
        {ours: value for ours, value in clear.items() if ours not in withheld}, withheld,
        [clear[one.ours] for one in _ALL if one.secret and one.ours in clear],
    )  # fmt: skip


def problems(config: Config) -> list[str]:
    """What is withheld and needed to evaluate the suites of `config`, one line each."""
    return [why for one in _ALL if (why := secrets.withheld(one.ours)) and one.ours in _used(config)]


def warn(config: Config) -> None:
    """Say what is withheld and not needed to evaluate the suites of `config`: evaluators' checks refuse what is."""
    _warn(config, _used(config))


def warn_of_all(config: Config) -> None:
    """Say what is withheld, where nothing is evaluated."""
    _warn(config, set())


def _warn(config: Config, but: set[str]) -> None:
    for one in _ALL:
        if one.ours not in but and (why := secrets.withheld(one.ours)):
            log.warning("%s: %s", config.path, why)


def _used(config: Config) -> set[str]:
    """The variables that judges of these suites are to be given."""
    judges = [entry.get("judge") for suite in config.suites.values() for entry in suite.evaluators]
    return {str(judge[key]) for judge in judges if isinstance(judge, dict) for key in judge if key.endswith("_env")}
