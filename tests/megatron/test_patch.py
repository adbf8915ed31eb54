"""The patch of patches/megatron-lm, on the released tree that is installed for these tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.megatron.conftest import ROOT, SITE, Place, losses, of_ours

pytestmark = pytest.mark.megatron
Make = Callable[[str], Place]

PATCH = ROOT / "patches/megatron-lm/parse_args.patch"
FLAG = ("--autoeval-config", "autoeval.yaml")


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A module path with the patched Megatron first."""
    tree = tmp_path_factory.mktemp("patched")
    shutil.copytree(SITE / "megatron", tree / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-v", PATCH], cwd=tree, check=True, timeout=60)
    assert "autoeval_hooks" in (tree / "megatron/training/arguments.py").read_text()    # git can skip a patch silently
    return os.pathsep.join(map(str, (tree, SITE, ROOT)))


@pytest.mark.parametrize("entry", ["", "autoeval_hooks.megatron"])
def test_a_patched_megatron_hands_over(place: Make, patched: str, entry: str) -> None:
    """By its own script, and by our way in as well: once."""
    at = place("patched")
    output = at.train("--train-iters", "4", *FLAG, entry=entry, PYTHONPATH=patched)
    assert sorted(at.tickets()) == [("quick", 2), ("quick", 4), ("slow", 4)]
    assert of_ours(output) == []


def test_a_patched_megatron_trains_where_autoeval_is_not_installed(place: Make, patched: str, tmp_path: Path) -> None:
    """A stand-in for a machine without it: a package of its name that cannot be imported."""
    (tmp_path / "autoeval_hooks").mkdir()
    (tmp_path / "autoeval_hooks/__init__.py").write_text("raise ModuleNotFoundError('No module named autoeval_hooks')")
    without = f"{tmp_path}{os.pathsep}{patched}"
    at = place("without")
    output = at.train("--train-iters", "2", entry="", PYTHONPATH=without)
    assert sorted(losses(output)) == [1, 2]
    assert not (at.save / ".autoeval").exists()
    refused = at.train(*FLAG, entry="", status=2, PYTHONPATH=without)
    assert "unrecognized arguments: --autoeval-config autoeval.yaml" in refused
