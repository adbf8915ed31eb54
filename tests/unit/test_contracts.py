"""What every evaluator and every sink must do, whoever wrote it: one test over all that are installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.evaluators import base as evaluators
from eval_runner.sinks import base as sinks

ODD = {"no_such_setting": 1}


def load(tmp_path: Path, evaluator: dict[str, object], sink: dict[str, object]) -> configs.Config:
    path = tmp_path / "autoeval.yaml"
    path.write_text(f"queue: queue\nsuites: {{quick: {{evaluators: [{evaluator}]}}}}\nsinks: [{sink}]\n")
    return configs.load(str(path))


@pytest.mark.parametrize("name", registry.names("evaluators"))
def test_an_evaluator_refuses_what_it_does_not_know(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, {"type": name, **ODD}, {"type": "wandb"})
    with pytest.raises(ConfigError, match=r"autoeval.yaml: suites.quick.evaluators\[0\].*no_such_setting"):
        registry.build_evaluators(config, config.suites["quick"])


@pytest.mark.parametrize("name", registry.names("sinks"))
def test_a_sink_refuses_what_it_does_not_know(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, {"type": "helm"}, {"type": name, **ODD})
    with pytest.raises(ConfigError, match=r"autoeval.yaml: sinks\[0\].*no_such_setting"):
        registry.build_sinks(config)


@pytest.mark.parametrize("name", registry.names("sinks"))
def test_a_sink_with_nothing_to_show_waits_for_nothing(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, {"type": "helm"}, {"type": name})
    (sink,) = registry.build_sinks(config)
    assert sink.flush()


def test_the_protocols_are_what_the_plugins_have() -> None:
    for kind, methods in (("evaluators", evaluators.Evaluator), ("sinks", sinks.Sink)):
        for name in registry.names(kind):  # type: ignore[arg-type]
            plugin = registry.get(kind, name, "here")  # type: ignore[arg-type]
            wanted = {m for m in vars(methods) if not m.startswith("_") and callable(getattr(methods, m))}
            assert wanted <= set(dir(plugin)), name
