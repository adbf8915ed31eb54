"""Plugins by entry point, from packages that are laid out as pip lays them out; and `validate`, which builds them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import ConfigError
from eval_runner import environments, registry
from eval_runner.cli.validate import validate
from eval_runner.config import load

ROOT = Path(__file__).parents[2]
WHERE = "autoeval.yaml: suites.quick.evaluators[0].type"

PLUGIN = """
from autoeval_hooks.errors import ConfigError

class Fake:
    def __init__(self, settings, context):
        self.settings, self.context = settings, context
        if "bad" in settings:
            raise ConfigError(f"{context.config_file}: {context.where}.bad: wrong; remove it")
    def check(self):
        if "missing" in self.settings:
            raise ConfigError(f"{self.context.config_file}: {self.context.where}: no environment; run env create")
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution: its metadata, entry points by group, and modules, on a path of its own."""

    def make(name: str, points: dict[str, dict[str, str]], modules: dict[str, str] | None = None) -> None:
        site = tmp_path / "site" / name
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        text = "".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in p.items()) for g, p in points.items())
        (info / "entry_points.txt").write_text(text)
        for module, code in (modules or {}).items():
            (site / f"{module}.py").write_text(code)
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(site))

    return make


@pytest.fixture
def fake(install: Install) -> None:
    """A package with an evaluator `fake` and a sink `fakesink`."""
    points = {"autoeval.evaluators": {"fake": "ae_fake:Fake"}, "autoeval.sinks": {"fakesink": "ae_fake:Fake"}}
    install("ae-fake", points, {"ae_fake": PLUGIN})


def builtin() -> dict[str, dict[str, str]]:
    points: dict[str, dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    return points


def test_built_in_plugins_are_the_entry_points_of_pyproject(install: Install) -> None:
    install(registry.DISTRIBUTION, builtin())
    assert "helm" in registry.names("evaluators")
    assert "wandb" in registry.names("sinks")
    for group, points in builtin().items():
        kind = group.removeprefix("autoeval.")
        assert set(points) <= set(registry.names(kind))  # type: ignore[arg-type]
        for name, value in points.items():
            plugin = registry.get(kind, name, WHERE)  # type: ignore[arg-type]
            assert f"{plugin.__module__}".startswith(value.partition(":")[0])


def test_get_loads_only_what_is_named(install: Install) -> None:
    points = {"autoeval.evaluators": {"good": "ae_good:Fake", "other": "ae_other:Fake"}}
    install("ae-two", points, {"ae_good": PLUGIN, "ae_other": PLUGIN})
    assert {"good", "other"} <= set(registry.names("evaluators"))
    assert "ae_good" not in sys.modules
    assert registry.get("evaluators", "good", WHERE).__name__ == "Fake"
    assert "ae_other" not in sys.modules
    assert "good" not in registry.names("sinks")


def test_unknown_name_says_what_is_near_and_how_to_install(fake: None) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.get("evaluators", "fakee", WHERE)
    assert str(caught.value).startswith(f"{WHERE}: no evaluator is named 'fakee'; did you mean 'fake'?")
    assert "pip install" in str(caught.value)


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DISTRIBUTION", "ae-nobody-has-this")
    with pytest.raises(ConfigError, match=r"ae-nobody-has-this is not installed here: run `pip install -e \.`"):
        registry.get("executors", "nowhere", WHERE)


def test_one_name_from_two_packages_names_both(install: Install) -> None:
    for package in ("ae-one", "ae-two"):
        install(package, {"autoeval.sinks": {"same": "ae_same:Fake"}}, {"ae_same": PLUGIN})
    with pytest.raises(ConfigError, match=r"'same' is given by ae-one 1.0 and ae-two 1.0; uninstall one"):
        registry.get("sinks", "same", WHERE)
    assert registry.names("sinks").count("same") == 1


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("import ae_no_such_module", "ModuleNotFoundError: No module named 'ae_no_such_module'"),
        ("raise RuntimeError('no GPU\\nat all')", "RuntimeError: no GPU"),
        ("x = (", "SyntaxError"),
        ("", "AttributeError"),
    ],
)
def test_a_broken_plugin_harms_only_who_names_it(install: Install, fake: None, code: str, cause: str) -> None:
    install("ae-broken", {"autoeval.evaluators": {"broken": "ae_broken:Fake"}}, {"ae_broken": code})
    assert "broken" in registry.names("evaluators")
    assert registry.get("evaluators", "fake", WHERE)
    with pytest.raises(ConfigError) as caught:
        registry.get("evaluators", "broken", WHERE)
    assert str(caught.value).startswith(f"{WHERE}: 'broken' of ae-broken 1.0 cannot be loaded ({cause}")
    assert "\n" not in str(caught.value)


def write(tmp_path: Path, evaluators: str, sinks: str = "[{type: fakesink}]", more: str = "") -> Path:
    path = tmp_path / "autoeval.yaml"
    path.write_text(f"queue: q\nsuites: {{s: {{evaluators: {evaluators}}}}}\nsinks: {sinks}\n{more}")
    return path


def test_build_gives_settings_and_context(tmp_path: Path, fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AE_X", "filled")
    path = write(tmp_path, "[{type: fake, x: '${AE_X}'}, {type: fake}]", more="environments: envs\n")
    config = load(path)
    first, second = registry.build_evaluators(config, config.suites["s"])
    assert first.settings == {"x": "filled"}    # type: ignore[attr-defined]
    context = second.context    # type: ignore[attr-defined]
    assert (context.base_dir, context.environments) == (tmp_path, tmp_path / "envs")
    assert (context.where, context.config_file) == ("suites.s.evaluators[1]", str(path))
    plain = load(write(tmp_path, "[{type: fake}]", more="path_map: {/a: /b}\n"))
    [evaluator] = registry.build_evaluators(plain, plain.suites["s"])
    assert evaluator.context.environments == environments.default_root()    # type: ignore[attr-defined]
    [sink] = registry.build_sinks(plain, "me", lambda: True)
    context = sink.context  # type: ignore[attr-defined]
    assert (context.where, context.config_file, context.runner) == ("sinks[0]", str(path), "me")
    assert (context.queue, context.path_map, context.stopping()) == (tmp_path / "q", {"/a": "/b"}, True)
    names = {registry.build_sinks(plain)[0].context.runner for _ in range(2)}   # type: ignore[attr-defined]
    assert len(names) == 2


def test_two_evaluators_of_one_name_are_told_before_anything_is_paid_for(tmp_path: Path) -> None:
    gpt = {"type": "gpt", "questions": "general-en", "mode": "single"}
    path = tmp_path / "autoeval.yaml"

    def built(*entries: dict[str, str]) -> int:
        path.write_text(json.dumps({"queue": "q", "suites": {"s": {"evaluators": entries}}}))
        config = load(str(path))
        return len(registry.build_evaluators(config, config.suites["s"]))

    assert built(gpt, gpt | {"name": "other"}) == 2
    with pytest.raises(ConfigError, match=r"suites\.s\.evaluators\[1\]: its scores have the name 'general-en'"):
        built(gpt, gpt)


def test_build_says_what_is_wrong_with_all(tmp_path: Path, fake: None) -> None:
    path = write(tmp_path, "[{type: fake, bad: 1}, {type: fake}, {type: fakee}]")
    config = load(path)
    with pytest.raises(ConfigError) as caught:
        registry.build_evaluators(config, config.suites["s"])
    first, second = str(caught.value).splitlines()
    assert first == f"{path}: suites.s.evaluators[0].bad: wrong; remove it"
    assert second.startswith(f"{path}: suites.s.evaluators[2].type: no evaluator is named 'fakee'")


def test_validate_prints_the_effective_configuration(
    tmp_path: Path, fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AE_X", "s3cret")
    path = write(tmp_path, "[{type: fake, x: '${AE_X}'}]")
    result = CliRunner().invoke(validate, ["--config", str(path)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "s3cret" not in result.stdout
    assert "x: ${AE_X}" in result.stdout
    path.write_text(result.stdout)
    assert CliRunner().invoke(validate, ["--config", str(path)]).stdout == result.stdout


@pytest.mark.parametrize(
    ("evaluators", "sinks", "expected"),
    [
        ("[{type: fake, bad: 1}]", "[{type: fakesink, bad: 1}]",
         ["suites.s.evaluators[0].bad: wrong; remove it", "sinks[0].bad: wrong; remove it"]),
        ("[{type: fake, missing: 1}]", "[]", ["suites.s.evaluators[0]: no environment; run env create"]),
        ("[{type: fake, x: '${AE_NO}'}]", "[]",
         ["suites.s.evaluators[0].x: environment variable AE_NO is not set; export it, or write ${AE_NO:-default}"]),
        ("[]", "[]", ["suites.s.evaluators: names no evaluator; give a list such as [{type: helm, ...}]"]),
    ],
)
def test_validate_says_all_errors(
    tmp_path: Path, fake: None, evaluators: str, sinks: str, expected: list[str]
) -> None:
    path = write(tmp_path, evaluators, sinks)
    result = CliRunner().invoke(validate, ["--config", str(path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [f"{path}: {line}" for line in expected]


def test_validate_prints_the_schema(tmp_path: Path) -> None:
    result = CliRunner().invoke(validate, ["--schema", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["title"] == "autoeval.yaml"


def test_reading_the_configuration_loads_no_plugin() -> None:
    code = (
        "import sys, eval_runner.config, eval_runner.registry; "
        "print(sorted({'torch', 'transformers', 'wandb', 'plotly', 'helm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
