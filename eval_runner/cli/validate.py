"""`autoeval-runner validate`: is the configuration right, and what does it come to?"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import yaml

from autoeval_hooks import yamlfile
from autoeval_hooks.errors import ConfigError
from eval_runner import registry, secrets
from eval_runner.checkpoints import convert
from eval_runner.cli.options import config_option
from eval_runner.config import Config, load, schema
from eval_runner.config.loader import effective


@click.command()
@config_option
@click.option("--schema", "only_schema", is_flag=True, help="Print the JSON schema for editors, and check nothing.")
def validate(config_file: str, only_schema: bool) -> None:
    """Check the configuration and print it with all defaults.

    Evaluators and a server check their settings and what they need on this machine. Secrets are never printed: what
    comes from the environment stands as it does in the file. Exit: 0 right, 2 wrong, with the errors on stderr.
    """
    if only_schema:
        click.echo(json.dumps(schema(), indent=2))
        return
    try:
        config = load(config_file, warn=False)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(2)
    if errors := check(config):
        click.echo(secrets.masked("\n".join(errors)), err=True)
        sys.exit(2)
    click.echo(dump(effective(config)), nl=False)


def check(config: Config) -> list[str]:
    """What the plugins that the configuration names find wrong, one message each."""
    errors: list[str] = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ConfigError as error:
            errors.extend(line for line in str(error).splitlines() if line not in errors)

    for suite in config.suites.values():
        for evaluator in attempt(partial(registry.build_evaluators, config, suite)) or ():
            attempt(evaluator.check)
    if server := attempt(partial(registry.build_server, config)):
        attempt(server.check)
    attempt(partial(convert.check, config))
    attempt(partial(registry.build_sinks, config))
    return errors


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this project or any other reader of YAML would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in yamlfile.PLAIN:
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def dump(data: dict[str, Any]) -> str:
    """YAML that `autoeval_hooks.config.read_yaml` reads back as `data`."""
    breaks = {"\x85", "\u2028", "\u2029"}      # line breaks of YAML 1.1, which PyYAML writes as they are
    readable = not breaks & set(json.dumps(data, ensure_ascii=False))
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=readable, width=110)
