"""The patches for Megatron-LM, as far as they can be checked without it: tests/megatron applies them to a release."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "patches/megatron-lm"
PAGE = (DIRECTORY / "README.md").read_text(encoding="utf-8")
PATCHES = sorted(DIRECTORY.glob("*.patch"))


@pytest.fixture(params=PATCHES, ids=lambda path: path.name)
def lines(request: pytest.FixtureRequest) -> list[str]:
    return request.param.read_text(encoding="utf-8").splitlines()  # type: ignore[no-any-return]


def test_the_page_names_every_patch() -> None:
    assert PATCHES
    assert {path.name for path in PATCHES} == set(re.findall(r"[\w-]+\.patch", PAGE))


def test_a_patch_is_one_hunk_that_only_adds(lines: list[str]) -> None:
    assert [line for line in lines if line.startswith(("--- ", "+++ "))] == [
        "--- a/megatron/training/arguments.py", "+++ b/megatron/training/arguments.py",
    ]  # fmt: skip
    assert len([line for line in lines if line.startswith("@@ ")]) == 1
    hunk = lines[4:]
    assert {line[:1] for line in hunk} == {" ", "+"}
    assert " " + "    parser = add_megatron_arguments(parser)" in hunk      # older Megatron has no such function
    assert all(len(line) <= 101 for line in hunk)


@pytest.mark.parametrize("installed", [True, False])
def test_what_it_adds_calls_install_if_there_is_one(
    lines: list[str], installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("autoeval_hooks.megatron")
    module.install = lambda parser: [*parser, "ours"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module if installed else None)  # type: ignore[arg-type]
    added = "\n".join(line[1:] for line in lines if line.startswith("+    "))
    body = f"def parse(parser):\n{added}\n    return parser\n"
    scope: dict[str, types.FunctionType] = {}
    exec(body, scope)
    assert scope["parse"](["theirs"]) == (["theirs", "ours"] if installed else ["theirs"])


def test_what_install_is_given_is_what_it_takes() -> None:
    """The stand-in above is called as the real one is defined."""
    from autoeval_hooks import megatron

    parser = types.SimpleNamespace(_option_string_actions={megatron.FLAG: None})
    assert megatron.install(parser) is parser  # type: ignore[arg-type]


def test_every_version_in_the_table_has_an_outcome() -> None:
    rows = re.findall(r"^\| (0\.\d.*?|`main`.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 10
    for version, fits, parsed, trained in rows:
        assert fits in ("yes", "no"), version
        assert parsed == ("yes" if fits == "yes" else ""), version
        assert trained == "" if fits == "no" else trained, version
