"""The lists of commands that `--help` prints."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from eval_runner.cli import cli


def groups(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Group]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from groups(command, *path, name)


LISTS = dict(groups(cli))


def test_every_list_is_looked_at() -> None:
    assert {(), ("env",), ("import",)} <= LISTS.keys()


@pytest.mark.parametrize("path", LISTS, ids=" ".join)
def test_each_command_is_told_in_one_whole_line_of_80_columns(path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80).stdout
    lines = text.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == sorted(LISTS[path].commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines), text
