"""Managed environments: real ones, small: a virtual environment that holds pip and nothing else."""

from __future__ import annotations

import ensurepip
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner import environments

INSTEAD = (
    r"remove the key `env` \(in an older file: `helm_env_name`\) and run `autoeval-runner env create helm`, to use "
    "autoeval's own"
)
LOCK = f"# nothing but pip\npip=={ensurepip.version()}\n"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `helm` mean an environment with pip, which every new virtual environment has."""
    monkeypatch.setattr(environments, "KINDS", {"helm": environments.Kind("pip", (1,), (999,))})
    monkeypatch.setattr(environments, "_lock", lambda name: LOCK)


def _python(directory: Path, script: str) -> Path:
    """A stand-in for an environment: its `bin/python` is a shell script."""
    (directory / "bin").mkdir(parents=True)
    python = directory / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def _wheel(directory: Path) -> Path:
    """A directory with the wheel of a distribution of one module."""
    wheels = directory / "wheels"
    wheels.mkdir()
    info = "autoeval_tiny-1.dist-info"
    with zipfile.ZipFile(wheels / "autoeval_tiny-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("autoeval_tiny.py", "X = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: autoeval-tiny\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"autoeval_tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheels


def test_the_lock_pins_every_distribution_exactly() -> None:
    lines = [line for line in environments._lock("helm").splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert all(line.count("==") == 1 and "@" not in line and "+" not in line for line in lines)
    assert {"crfm-helm", "torch", "torchvision", "transformers"} <= {line.split("==")[0] for line in lines}


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOEVAL_ENVS", str(tmp_path / "a"))
    assert environments.default_root() == tmp_path / "a"
    monkeypatch.delenv("AUTOEVAL_ENVS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert environments.default_root() == tmp_path / "b" / "autoeval" / "envs"


def test_a_missing_environment_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="autoeval-runner env create helm"):
        environments.find(None, "helm", tmp_path)
    with pytest.raises(ConfigError, match=r"no such directory; name a virtual environment, or remove the key"):
        environments.find(str(tmp_path / "nowhere"), "helm", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'helm'"):
        environments.find(None, "hlem", tmp_path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 126", "no message"),
        ("echo 'PackageNotFoundError: crfm-helm' >&2; exit 1", "crfm-helm cannot be imported .PackageNotFound"),
        ("echo '\"0.5.4\"'", r"has crfm-helm 0\.5\.4, autoeval needs 0\.5\.16 or later, below 0\.6"),
        ("echo '\"0.6.0\"'", r"has crfm-helm 0\.6\.0"),
    ],
)
def test_a_broken_environment_says_why(tmp_path: Path, script: str, reason: str) -> None:
    _python(tmp_path / "env", script)
    with pytest.raises(ConfigError, match=rf"{reason}.*; {INSTEAD}"):
        environments.find(str(tmp_path / "env"), "helm", tmp_path)
    (tmp_path / "env" / "bin" / "python").unlink()
    with pytest.raises(ConfigError, match="does not start"):
        environments.find(str(tmp_path / "env"), "helm", tmp_path)


def test_conda_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for key in ("CONDA_PREFIX", "CONDA_EXE", "MAMBA_ROOT_PREFIX"):
        monkeypatch.delenv(key, raising=False)
    fits = "echo '\"0.5.16\"'"
    usual = _python(tmp_path / "miniconda3" / "envs" / "crfm-helm", fits)
    assert environments.find("conda:crfm-helm", "helm", tmp_path) == usual
    with pytest.raises(ConfigError, match=f"conda:other: no conda environment of that name.*, or {INSTEAD}"):
        environments.find("conda:other", "helm", tmp_path)
    neighbour = _python(tmp_path / "elsewhere" / "envs" / "other", fits)
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "elsewhere" / "envs" / "training"))
    assert environments.find("conda:other", "helm", tmp_path) == neighbour
    monkeypatch.delenv("CONDA_PREFIX")
    conda = _python(tmp_path / "conda", f"echo {tmp_path / 'elsewhere'}")
    monkeypatch.setenv("CONDA_EXE", str(conda))
    assert environments.find("conda:other", "helm", tmp_path) == neighbour


def test_create_builds_once_again_what_is_unfinished_and_leaves_the_finished_alone(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_COMPILE", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(_wheel(tmp_path)))
    monkeypatch.setattr(environments, "_lock", lambda name: f"{LOCK}autoeval-tiny==1\n")
    said: list[str] = []
    location = environments.location("helm", tmp_path)
    (location / "bin").mkdir(parents=True)
    (location / "rubbish").touch()
    assert environments.create("helm", tmp_path, progress=lambda fraction, what: said.append(what)) == location
    assert said[-1] == "complete"
    assert not (location / "rubbish").exists()
    assert environments.find(None, "helm", tmp_path) == location / "bin" / "python"
    assert list(location.rglob("__pycache__/autoeval_tiny.*.pyc"))
    (location / "mark").touch()
    environments.create("helm", tmp_path)
    assert (location / "mark").exists()
    (tmp_path / "helm-data").mkdir()    # the evaluator's data stand beside
    assert [(e.name, e.path, e.complete, e.current) for e in environments.listing(tmp_path)] == [
        ("helm", location, True, True)
    ]
    (location / "bin" / "python").unlink()
    with pytest.raises(ConfigError, match=rf"if no other host uses it, remove {location} first"):
        environments.create("helm", tmp_path)
    assert (location / "mark").exists()
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert environments.location("helm", tmp_path) != location


def test_a_build_that_fails_is_no_environment_and_says_why(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_lock", lambda name: "autoeval-no-such-thing==1\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AutoEvalError, match=r"installing the locked requirements failed: .*No matching") as caught:
        environments.create("helm", tmp_path)
    location = environments.location("helm", tmp_path)
    assert f"{location}.log" in str(caught.value)
    with pytest.raises(ConfigError, match="is not built"):
        environments.find(None, "helm", tmp_path)
    assert [e.complete for e in environments.listing(tmp_path)] == [False]


def test_nothing_outside_the_root_is_deleted(small: None, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    root = tmp_path / "root"
    root.mkdir()
    environments.location("helm", root).symlink_to(precious)
    with pytest.raises(AutoEvalError, match="refusing to delete"):
        environments.create("helm", root)
    assert (precious / "file").exists()


def test_two_builds_at_once_make_one_environment(small: None, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from eval_runner import environments as e
e.KINDS = {{"helm": e.Kind("pip", (1,), (999,))}}
e._lock = lambda name: {LOCK!r}
build, e._build = e._build, lambda *a: (print("built"), build(*a))
e.create("helm", Path({str(tmp_path)!r}))
"""
    environ = os.environ | {"PYTHONPATH": str(Path.cwd())}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ) for _ in range(2)
    ]
    said = [child.communicate(timeout=120)[0] for child in both]
    assert [child.returncode for child in both] == [0, 0]
    assert sorted(said) == ["", "built\n"]


def test_the_stand_in_for_torchvision_is_a_wheel_that_pip_takes(tmp_path: Path) -> None:
    wheel = environments._stub(tmp_path, "torchvision", "0.28.0")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "out"), str(wheel)], check=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["torchvision-0.28.0+stub.dist-info"]
