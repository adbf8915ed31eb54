"""Command lines of users: each placeholder is filled in once, and what it stands for is never more than text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eval_runner import commands

NAMES = ("checkpoint", "output", "step")
VALUES = st.fixed_dictionaries({name: st.text(max_size=20) for name in NAMES})
PIECES = st.lists(st.one_of(st.sampled_from(NAMES).map(lambda n: (n,)), st.text(max_size=8)), max_size=6)


@given(PIECES, VALUES)
@example([("checkpoint",), "/x"], {"checkpoint": "{output}", "output": "$(date)", "step": "1"})
@example([("step",), "}}{{"], {"checkpoint": "{", "output": "}", "step": "{step}{{"})
def test_every_placeholder_is_filled_in_once(pieces: list[str | tuple[str]], values: dict[str, str]) -> None:
    argument = "".join(
        f"{{{p[0]}}}" if isinstance(p, tuple) else p.replace("{", "{{").replace("}", "}}") for p in pieces
    )
    expected = "".join(values[p[0]] if isinstance(p, tuple) else p for p in pieces)
    assert commands.problems(argument, "here", NAMES) == []
    assert commands.filled(argument, values) == expected
    assert commands.placeholders(argument) == [p[0] for p in pieces if isinstance(p, tuple)]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("{chekpoint}", r"^here: \{chekpoint\} stands for nothing; did you mean 'checkpoint'\?; write \{\{ and \}\}"),
        ("{}", r"\{\} stands for nothing; known: checkpoint, output, step"),
        ("{0}", "stands for nothing"),
        ("{step.real}", r"\{step\.real\} stands for nothing"),
        ("{checkpoint[0]}", "stands for nothing"),
        ("{step!r}", "stands for nothing"),
        ("{step:>9}", "stands for nothing"),
        ("{step:{output}}", "stands for nothing"),
        ("{step", "here: .*; write {{ and }}"),
        ("step}", "here: .*; write {{ and }}"),
    ],
)
def test_all_else_in_braces_is_refused(argument: str, says: str) -> None:
    (said,) = commands.problems(argument, "here", NAMES)
    assert re.search(says, said), said


def test_a_program_is_looked_up_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("bin", "tools"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "score").write_text("#!/bin/sh\n")
        (tmp_path / place / "score").chmod(0o755)
    (tmp_path / "tools" / "data").write_text("no program")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert commands.program("score", tmp_path) == str(tmp_path / "bin" / "score")
    assert commands.program("score", tmp_path, str(tmp_path / "tools")) == str(tmp_path / "tools" / "score")
    assert commands.program("tools/score", tmp_path) == str(tmp_path / "tools" / "score")
    assert commands.program("./score", tmp_path) is None
    assert commands.program("tools/data", tmp_path) is None
