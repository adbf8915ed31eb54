"""HELM on a served checkpoint: what the evaluator asks for, and why it failed. HELM's processes are a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import environments, process
from eval_runner.evaluators.base import Context, Job, Parts
from eval_runner.evaluators.helm import HelmEvaluator, deployment, reason
from eval_runner.servers.base import Endpoint
from tests.unit.test_helm_plan import Remembers, StandIn


@dataclass
class Server:
    """A stand-in for a ticket's server: counts how often it is asked for."""

    starts: int = 0

    def __call__(self) -> Endpoint:
        self.starts += 1
        return Endpoint("http://127.0.0.1:1", "openai", "r1-step-2")


@pytest.fixture
def helm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """In place of HELM's processes."""
    stand_in = StandIn()
    stand_in.answer = {"versions": {"crfm-helm": "1", "device": "cuda"}}
    monkeypatch.setattr(process, "run", stand_in.run)
    monkeypatch.setattr(environments, "find", lambda *_: tmp_path / "env" / "bin" / "python")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return stand_in


@pytest.fixture
def evaluator(tmp_path: Path) -> Callable[..., HelmEvaluator]:
    def make(**settings: object) -> HelmEvaluator:
        context = Context(tmp_path, tmp_path / "envs", "suites.quick.evaluators[0]", "autoeval.yaml")
        return HelmEvaluator({"entries": ["a", "b"]} | settings, context)

    return make


def _job(base: Path, name: str, finished: Parts | None = None, **more: Any) -> Job:
    (base / name).mkdir()
    (base / "tokenizer").mkdir(exist_ok=True)
    facts = {"megatron": "0.19.2"}
    served_by = {"endpoint": Server(), "loadable": False, "max_length": 32, "server_facts": facts} | more
    finished = finished or Parts()
    return Job(
        base, base / "tokenizer", "model", base / name, base / f"{name}.log", finished=finished, **served_by
    )


def test_helm_is_told_of_the_server_and_of_no_weights(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv: list[list[str]] = []
    run = helm.run
    monkeypatch.setattr(process, "run", lambda a, **more: argv.append(a) or run(a, **more))
    job = _job(tmp_path, "a")
    outcome = evaluator().evaluate(job)
    (told,) = json.loads((job.work_dir / "models" / "model_deployments.yaml").read_text())["model_deployments"]
    assert told["client_spec"] == {
        "class_name": "autoeval_served.ServedClient",
        "args": {"url": "http://127.0.0.1:1", "api": "openai", "model": "r1-step-2"},
    }
    assert told["window_service_spec"]["class_name"] == "autoeval_served.ServedWindow"
    assert told["window_service_spec"]["args"]["max_length"] == 32
    assert argv[-1][argv[-1].index("--num-threads") + 1] == "1"
    assert outcome.evaluation.versions == {"crfm-helm": "1", "megatron": "0.19.2"} | _nltk(outcome.evaluation.versions)


def _nltk(versions: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in versions.items() if k.startswith("nltk")}


def test_the_server_is_started_only_for_what_is_missing(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path
) -> None:
    parts, server = Remembers(), Server()
    one = evaluator()
    one.evaluate(_job(tmp_path, "a", parts, endpoint=server))
    assert server.starts == 1
    one.evaluate(_job(tmp_path, "b", parts, endpoint=server))
    assert server.starts == 1
    assert helm.ran == [["a", "b"]]
    del parts.kept[next(iter(parts.kept))]
    one.evaluate(_job(tmp_path, "c", parts, endpoint=server))
    assert server.starts == 2
    assert helm.ran == [["a", "b"], ["a"]]


@pytest.mark.parametrize("change", [{"server_facts": {"megatron": "0.19.3"}}, {"max_length": 31}])
def test_what_serves_belongs_to_the_key_of_a_part(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path, change: dict[str, Any]
) -> None:
    parts, one = Remembers(), evaluator()
    one.evaluate(_job(tmp_path, "a", parts))
    one.evaluate(_job(tmp_path, "b", parts, **change))
    assert helm.ran == [["a", "b"], ["a", "b"]]


def test_facts_of_a_conversion_are_told_too(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path
) -> None:
    job = _job(tmp_path, "a", endpoint=None, loadable=True, max_length=None, server_facts={}, facts={"converter": "x"})
    versions = evaluator().evaluate(job).evaluation.versions
    assert (versions["converter"], versions["device"]) == ("x", "cuda")
    job = _job(tmp_path, "b", facts={"converter": "x"})
    assert {"converter", "megatron"} <= evaluator().evaluate(job).evaluation.versions.keys()


def test_a_checkpoint_that_helm_can_load_is_not_asked_of_a_server(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path
) -> None:
    """A server that is there for other evaluators changes nothing: not the scores' keys, nor the settings it takes."""
    parts, server = Remembers(), Server()
    alone: dict[str, Any] = {"endpoint": None, "loadable": True, "max_length": None, "server_facts": {}}
    beside = alone | {"endpoint": server, "server_facts": {"server": "vllm", "vllm": "0.11"}}
    first = evaluator(torch_dtype="float16").evaluate(_job(tmp_path, "a", parts, **alone))
    again = evaluator(torch_dtype="float16").evaluate(_job(tmp_path, "b", parts, **beside))
    assert helm.ran == [["a", "b"]]
    assert server.starts == 0
    assert again.evaluation.versions["device"] == "cuda"
    assert set(again.evaluation.versions) - {"autoeval resume"} == set(first.evaluation.versions)
    job = _job(tmp_path, "c", **beside)
    evaluator().evaluate(job)
    (told,) = json.loads((job.work_dir / "models" / "model_deployments.yaml").read_text())["model_deployments"]
    assert told["client_spec"]["class_name"] == "autoeval_helm.CheckpointClient"
    assert server.starts == 0


def test_a_checkpoint_that_nothing_can_answer_for(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="HELM cannot load it, and no server is configured that answers for it"):
        evaluator().evaluate(_job(tmp_path, "a", endpoint=None))


def test_what_a_served_checkpoint_cannot_be_evaluated_with(
    helm: StandIn, evaluator: Callable[..., HelmEvaluator], tmp_path: Path
) -> None:
    job = _job(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"autoeval.yaml: suites.quick.evaluators\[0\].torch_dtype: .* server's arg"):
        evaluator(torch_dtype="float16").evaluate(job)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: nothing says how many tokens its model takes"):
        evaluator().evaluate(replace(job, max_length=None))
    assert job.endpoint is not None
    assert (job.endpoint.starts, helm.ran) == (0, [])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (f"{reason.CANNOT_ASK}: http://127.0.0.1:1/api: ConnectionError: refused", AutoEvalError, "refused; log"),
        (f"{reason.CANNOT_ASK}: http://x answers 500: FileNotFoundError", AutoEvalError, "FileNotFoundError; log"),
        (f"{reason.UNUSABLE}: http://x says: top_k must be an integer", ConfigError, "top_k must be an integer; log"),
        (f"{reason.BROKEN}: http://x gives nan", CheckpointError, "gives nan; the model's outputs are broken; log"),
    ],
)
def test_a_server_is_not_mistaken_for_data(
    tmp_path: Path, said: str, kind: type[AutoEvalError], message: str
) -> None:
    log = tmp_path / "log"
    log.write_text(
        f"helm.benchmark.executor.ExecutorError: {said} Request: Request(prompt='FileNotFoundError')\n"
        "FileNotFoundError: [Errno 2] No such file or directory: 'x'\nhelm.x.RunnerError: Failed\n"
    )
    error = reason.failure(1, log, "HELM failed at entries[0] (mmlu)")
    assert type(error) is kind
    assert message in str(error)
    assert "data_dir" not in str(error)


def test_the_markers_of_the_client_are_those_that_the_runner_looks_for() -> None:
    text = (deployment.INSIDE / "autoeval_served.py").read_text()
    for name in ("CANNOT_ASK", "UNUSABLE", "BROKEN"):
        assert f'{name} = "{getattr(reason, name)}"' in text
