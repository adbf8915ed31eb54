"""What every evaluator, server, adapter and sink must do, whoever wrote it: one test over all that are installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.ticket import Ticket
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.checkpoints.base import Request
from eval_runner.evaluators import base as evaluators
from eval_runner.evaluators.base import Job, Limits, Outcome, Parts
from eval_runner.process import Stopped, TimedOut
from eval_runner.results.schema import Evaluation
from eval_runner.servers import base as servers
from eval_runner.sinks import base as sinks

ODD = {"no_such_setting": 1}
SINKS = {"mlflow": {"tracking_uri": "http://127.0.0.1:9"}}
"""What a sink cannot do without."""


def load(tmp_path: Path, evaluator: dict[str, object], sink: dict[str, object]) -> configs.Config:
    path = tmp_path / "autoeval.yaml"
    path.write_text(f"queue: queue\nsuites: {{quick: {{evaluators: [{evaluator}]}}}}\nsinks: [{sink}]\n")
    return configs.load(str(path))


@pytest.mark.parametrize("name", registry.names("evaluators"))
def test_an_evaluator_refuses_what_it_does_not_know(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, {"type": name, **ODD}, {"type": "wandb"})
    with pytest.raises(ConfigError, match=r"autoeval.yaml: suites.quick.evaluators\[0\].*no_such_setting"):
        registry.build_evaluators(config, config.suites["quick"])


def test_every_evaluator_of_ours_is_looked_at() -> None:
    assert {"helm", "gpt"} <= set(registry.names("evaluators"))


@pytest.mark.parametrize("name", registry.names("evaluators"))
def test_an_evaluator_without_settings_is_a_mistake_that_names_its_place(tmp_path: Path, name: str) -> None:
    """Either at once, or by its check; nothing is made or asked for by then."""
    config = load(tmp_path, {"type": name}, {"type": "wandb"})
    with pytest.raises(ConfigError, match=r"autoeval.yaml: suites.quick.evaluators\[0\]"):
        registry.build_evaluators(config, config.suites["quick"])[0].check()
    assert [p.name for p in tmp_path.iterdir()] == ["autoeval.yaml"]


@pytest.mark.parametrize("name", registry.names("evaluators"))
def test_an_evaluator_is_light_to_load(name: str) -> None:
    """What computes or asks runs in a child, so that the runner can end it."""
    code = f"import sys; from eval_runner.registry import get; get('evaluators', {name!r}, ''); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {module.split(".")[0] for module in out.split()} & {"torch", "transformers", "openai", "helm", "wandb"}


@pytest.mark.parametrize("name", registry.names("sinks"))
def test_a_sink_refuses_what_it_does_not_know(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, {"type": "helm"}, {"type": name, **ODD})
    with pytest.raises(ConfigError, match=r"autoeval.yaml: sinks\[0\].*no_such_setting"):
        registry.build_sinks(config)


@pytest.mark.parametrize("name", registry.names("sinks"))
def test_a_sink_with_nothing_to_show_waits_for_nothing(tmp_path: Path, name: str) -> None:
    config = load(tmp_path, {"type": "helm"}, {"type": name, **SINKS.get(name, {})})
    (sink,) = registry.build_sinks(config)
    assert sink.flush()
    assert sink.compare([], repair=True) == []


def test_every_sink_of_ours_is_looked_at() -> None:
    assert {"wandb", "mlflow", "trackio", "tensorboard"} <= set(registry.names("sinks"))


@pytest.mark.parametrize("name", registry.names("sinks"))
def test_a_sink_is_light_to_load(name: str) -> None:
    """What loads the tracker's client runs in a child, which can be ended."""
    code = f"import sys; from eval_runner.registry import get; get('sinks', {name!r}, ''); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {module.split(".")[0] for module in out.split()} & {"wandb", "mlflow", "trackio", "tensorboard", "numpy"}


def load_server(tmp_path: Path, server: dict[str, object]) -> configs.Config:
    path = tmp_path / "autoeval.yaml"
    path.write_text(f"queue: queue\nsuites: {{quick: {{evaluators: [{{type: helm}}]}}}}\nserver: {server}\n")
    return configs.load(str(path))


@pytest.mark.parametrize("name", registry.names("servers"))
def test_a_server_refuses_what_it_does_not_know(tmp_path: Path, name: str) -> None:
    config = load_server(tmp_path, {"type": name, **ODD})
    with pytest.raises(ConfigError, match=r"autoeval.yaml: server\.no_such_setting: unknown key"):
        registry.build_server(config)


@pytest.mark.parametrize("name", registry.names("checkpoints"))
def test_an_adapter_refuses_a_checkpoint_that_is_gone(
    tmp_path: Path, name: str, new_ticket: Callable[..., Ticket], checkpoint: Callable[..., Path]
) -> None:
    """And leaves nothing behind but what lies in its working directory."""
    ticket = new_ticket(10)
    ticket = replace(ticket, manifest=replace(ticket.manifest, kind=name, path=f"{tmp_path}/gone/iter_0000010"))
    config = load(tmp_path, {"type": "helm"}, {"type": "wandb"})
    config = replace(config, runner=config.runner.model_copy(update={"allow_pickled_weights": True}))
    (tmp_path / "work").mkdir()
    prepare = registry.get("checkpoints", name, "here")
    before = {p for p in tmp_path.rglob("*") if tmp_path / "work" not in p.parents}
    with pytest.raises(CheckpointError, match=r"/gone/iter_0000010: .* is gone"):
        prepare(Request(ticket, config, tmp_path / "work", tmp_path / "log")).__enter__()
    assert {p for p in tmp_path.rglob("*") if tmp_path / "work" not in p.parents} == before


def test_the_protocols_are_what_the_plugins_have() -> None:
    for kind, methods in (
        ("evaluators", evaluators.Evaluator), ("servers", servers.Server), ("sinks", sinks.Sink)
    ):  # fmt: skip
        for name in registry.names(kind):  # type: ignore[arg-type]
            plugin = registry.get(kind, name, "here")  # type: ignore[arg-type]
            wanted = {m for m in vars(methods) if not m.startswith("_") and callable(getattr(methods, m))}
            assert wanted <= set(dir(plugin)), name


def job(tmp_path: Path, **options: object) -> Job:
    (tmp_path / "work").mkdir()
    return Job(tmp_path, tmp_path, "model", tmp_path / "work", tmp_path / "log", **options)  # type: ignore[arg-type]


SLEEP = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(300)"]


def test_a_job_that_is_to_stop_ends_its_program(tmp_path: Path) -> None:
    def stopping() -> bool:
        return bool((tmp_path / "log").exists() and (tmp_path / "log").read_text())

    with pytest.raises(Stopped):
        job(tmp_path, stopping=stopping).run(SLEEP, env=None)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


def test_a_jobs_time_is_for_all_that_it_runs_and_running_out_of_it_may_pass(tmp_path: Path) -> None:
    one = job(tmp_path, limits=Limits(timeout=3.0))
    assert one.run([sys.executable, "-c", "import time; time.sleep(1.5)"], env=None) == 0
    began = time.monotonic()
    with pytest.raises(AutoEvalError, match=r"^not done after 3 s, .*`runner.timeout`; log: ") as caught:
        one.run([sys.executable, "-c", "import time; time.sleep(300)"], env=None)
    assert caught.value.kind == "transient"
    assert isinstance(caught.value.__cause__, TimedOut)
    assert time.monotonic() - began < 200
    assert float(str(caught.value.__cause__).partition("longer than ")[2].partition(" s")[0]) < 1.5


def test_without_a_ticket_no_part_is_kept(tmp_path: Path) -> None:
    one = job(tmp_path)
    one.finished.put("key", Outcome(Evaluation("helm", 1.0)))
    assert one.finished.get("key") is None
    assert type(one.finished) is Parts
