"""Virtual environments for evaluators, so that HELM's hundred dependencies never meet the training ones.

A managed environment is `<root>/<name>-<digest>`, the digest taken over the locked requirements that this
package ships and the Python version: another lock is another environment, and one that is in use is never
changed. It is built under a file lock, and `.complete` is written last; without it the directory is rubbish
of an interrupted build and is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from autoeval_hooks.errors import AutoEvalError, ConfigError
from autoeval_hooks.strict import near
from eval_runner import process

COMPLETE = ".complete"
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Kind:
    """What an environment must hold: a distribution, in a version from `least` to below `below`."""

    distribution: str
    least: tuple[int, ...]
    below: tuple[int, ...]


KINDS = {"helm": Kind("crfm-helm", (0, 5, 16), (0, 6)), "lm_eval": Kind("lm_eval", (0, 4, 13), (0, 5))}


@dataclass(frozen=True)
class Listed:
    """A directory of a managed environment. `current` ones are what this version of autoeval would use."""

    name: str
    path: Path
    complete: bool
    current: bool


def default_root() -> Path:
    """`$AUTOEVAL_ENVS`, else `$XDG_CACHE_HOME/autoeval/envs`, else `~/.cache/autoeval/envs`."""
    if chosen := os.environ.get("AUTOEVAL_ENVS"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "autoeval" / "envs"


def location(name: str, root: Path) -> Path:
    """The directory that the managed environment `name` has, or would have. Raises ConfigError for an unknown name."""
    if name not in KINDS:
        raise ConfigError(f"environment {name!r} is not known{near(name, KINDS)}")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256(f"{_lock(name)}{python} {platform.machine()}".encode()).hexdigest()[:12]
    return root / f"{name}-{digest}"


def listing(root: Path) -> list[Listed]:
    """The managed environments under `root`, complete or not."""
    if not root.is_dir():
        return []
    found = []
    for path in sorted(root.iterdir()):
        name, _, digest = path.name.rpartition("-")
        if name in KINDS and re.fullmatch("[0-9a-f]{12}", digest) and path.is_dir():
            found.append(Listed(name, path, (path / COMPLETE).exists(), path == location(name, root)))
    return found


def create(name: str, root: Path, *, progress: Progress = lambda fraction, what: None) -> Path:
    """Build the managed environment `name` unless it is there, and return its directory.

    An unfinished one is built anew. One that was finished and does not work here may work for others that share it:
    it is left alone. Raises ConfigError for such a one and for an unknown name, and AutoEvalError, with the end of
    pip's output, for a build that failed. What pip writes is kept in `<directory>.log`.
    """
    from filelock import FileLock, Timeout

    directory = location(name, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{directory}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(0.0, "waiting for another process that builds the same environment")
            lock.acquire()
    except OSError as error:
        raise AutoEvalError(f"{root}: cannot hold environments ({error}); set AUTOEVAL_ENVS") from error
    try:
        if (directory / COMPLETE).exists():
            _check_finished(name, directory)
        else:
            _remove(directory, root)
            _build(name, directory, progress)
    finally:
        lock.release()
    return directory


def find(spec: str | None, name: str, root: Path) -> Path:
    """The Python of the environment that `spec` names, checked: None is the managed one, else a path or `conda:NAME`.

    Raises ConfigError, with the remedy, where it is missing or broken.
    """
    if spec is None:
        directory = location(name, root)
        if not (directory / COMPLETE).exists():
            raise ConfigError(f"{directory}: the {name} environment is not built; {_remedy(name)}")
    elif spec.startswith("conda:"):
        directory = _conda(spec.removeprefix("conda:"), name)
    else:
        directory = Path(spec).expanduser()
        if not directory.is_dir():
            raise ConfigError(f"env: {spec}: no such directory; name a virtual environment, or {_instead(name)}")
    python = directory / "bin" / "python"
    _check(python, name, _remedy(name) if spec is None else _instead(name))
    return python


def _check_finished(name: str, directory: Path) -> None:
    try:
        _check(directory / "bin" / "python", name, _remedy(name))
    except ConfigError as error:
        remedy = f"it was complete once: if no other host uses it, remove {directory} first"
        raise ConfigError(f"{error}; {remedy}") from error


def _remedy(name: str) -> str:
    return f"run `autoeval-runner env create {name}`"


def _instead(name: str) -> str:
    """Where the user named an environment: how to have ours."""
    older = " (in an older file: `helm_env_name`)" if name == "helm" else ""
    return f"remove the key `env`{older} and {_remedy(name)}, to use autoeval's own"


def _lock(name: str) -> str:
    return resources.files("eval_runner").joinpath("requirements", f"{name}.txt").read_text(encoding="utf-8")


def _remove(directory: Path, root: Path) -> None:
    """Delete an unfinished environment: a real directory right under `root`, and nothing else."""
    if not directory.exists() and not directory.is_symlink():
        return
    if directory.is_symlink() or not directory.is_dir() or directory.resolve().parent != root.resolve():
        raise AutoEvalError(f"{directory}: is no directory of ours; refusing to delete it, remove it yourself")
    shutil.rmtree(directory)


def _build(name: str, directory: Path, progress: Progress) -> None:
    log = directory.with_name(f"{directory.name}.log")
    log.write_bytes(b"")
    pins = dict(
        line.split("==") for line in _lock(name).splitlines() if line.strip() and not line.startswith("#")
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    python = str(directory / "bin" / "python")
    # --compile, whatever pip's configuration says: without bytecode each start of HELM takes 20 s instead of 9.
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--compile"]

    def step(argv: list[str], start: float, share: float, what: str, total: int) -> None:
        before = _seen(log)

        def tick() -> None:
            done = min(_seen(log) - before, total)
            progress(start + share * done / total, f"{what} ({done} of {total})" if done else what)

        tick()
        status = process.run(argv, log=log, env=environment, cwd=directory, on_tick=tick)
        if status != 0:
            raise AutoEvalError(f"{directory}: {what} failed: {process.tail(log)}; all of it: {log}")

    directory.mkdir()
    step([sys.executable, "-m", "venv", str(directory)], 0.0, 0.02, "making the virtual environment", 1)
    lock = directory / "requirements.txt"
    lock.write_text("".join(f"{k}=={v}\n" for k, v in pins.items()), encoding="utf-8")
    if "torch" in pins:
        step([*pip, "-c", str(lock), f"torch=={pins['torch']}"], 0.02, 0.4, "installing torch", 12)
        if "torchvision" in pins and _is_cpu_torch(python, environment):
            stub = _stub(directory, "torchvision", pins["torchvision"])
            _note(log, f"torch is a CPU build: an empty stand-in for torchvision is installed from {stub}")
            step([*pip, "--no-deps", "--no-index", str(stub)], 0.42, 0.01, "installing a stand-in for torchvision", 1)
            pins.pop("torchvision")
        pins.pop("torch")
    lock.write_text("".join(f"{k}=={v}\n" for k, v in pins.items()), encoding="utf-8")
    # The lock is closed under dependencies, so pip has nothing to resolve, and `pip check` proves it.
    step([*pip, "--no-deps", "-r", str(lock)], 0.43, 0.55, "installing the locked requirements", len(pins))
    step([python, "-m", "pip", "--disable-pip-version-check", "check"], 0.98, 0.01, "checking the requirements", 1)
    _check(Path(python), name, _remedy(name))
    (directory / COMPLETE).write_text(_lock(name), encoding="utf-8")
    progress(1.0, "complete")


def _seen(log: Path) -> int:
    """How many distributions pip has begun to fetch, by its log."""
    return sum(line.startswith(b"Collecting ") for line in log.read_bytes().splitlines())


def _note(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as out:
        out.write(f"[autoeval] {text}\n")


def _is_cpu_torch(python: str, environment: dict[str, str]) -> bool:
    code = "import torch; print(torch.version.cuda is None and torch.version.hip is None)"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if out.returncode:
        raise AutoEvalError(f"{python}: torch was installed but does not start: {_last_line(out.stderr)}")
    return out.stdout.strip() == "True"


def _stub(directory: Path, name: str, version: str) -> Path:
    """A wheel with no modules. With a CPU torch the wheel of torchvision breaks every import of transformers."""
    info = f"{name}-{version}+stub.dist-info"
    wheel = directory / f"{name}-{version}+stub-py3-none-any.whl"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}+stub\n"
        "Summary: An empty stand-in, made by autoeval\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: autoeval\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return wheel


def _check(python: Path, name: str, remedy: str) -> None:
    """Raise ConfigError, with the remedy, unless `python` starts and has the distribution in a version that fits."""
    kind = KINDS[name]
    code = f"import importlib.metadata as m, json; print(json.dumps(m.version({kind.distribution!r})))"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    again = f"; {remedy}"
    try:
        out = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python}: does not start ({error}){again}") from error
    if out.returncode:
        raise ConfigError(f"{python}: {kind.distribution} cannot be imported ({_last_line(out.stderr)}){again}")
    version = json.loads(out.stdout)
    parts = tuple(int("".join(c for c in p if c.isdigit()) or 0) for p in version.split(".")[:3])
    if not kind.least <= parts < kind.below:
        wanted = f"{'.'.join(map(str, kind.least))} or later, below {'.'.join(map(str, kind.below))}"
        raise ConfigError(f"{python}: has {kind.distribution} {version}, autoeval needs {wanted}{again}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _conda(name: str, kind: str) -> Path:
    """The directory of a conda environment: of the active installation, of `conda` on PATH, or of a usual place. `kind`
    is what it is for."""
    bases = [Path(os.environ[key]) for key in ("CONDA_PREFIX", "MAMBA_ROOT_PREFIX") if os.environ.get(key)]
    for executable in (os.environ.get("CONDA_EXE"), shutil.which("conda")):
        if executable:
            out = subprocess.run([executable, "info", "--base"], capture_output=True, text=True, check=False)
            if out.returncode == 0 and out.stdout.strip():
                bases.append(Path(out.stdout.strip().splitlines()[-1]))
    bases += [Path.home() / d for d in ("miniconda3", "anaconda3", "miniforge3", "mambaforge", ".conda")]
    bases.append(Path("/opt/conda"))
    for base in bases:
        # $CONDA_PREFIX is the active environment: itself, or a neighbour of the one that is sought
        for candidate in (base / "envs" / name, base.parent / name if base.parent.name == "envs" else None,
                          base if name == "base" and (base / "conda-meta").is_dir() else None):  # fmt: skip
            if candidate and (candidate / "bin" / "python").exists():
                return candidate
    raise ConfigError(
        f"env: conda:{name}: no conda environment of that name under {', '.join(map(str, dict.fromkeys(bases)))}; "
        f"give the path of the environment instead, or {_instead(kind)}"
    )
