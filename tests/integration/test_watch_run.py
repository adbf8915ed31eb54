"""The older watcher's YAML and one command: real checkpoints and real HELM, from the directory to the scores; and to a
W&B run of their own, with the real client and a stand-in for the service."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import environments, registry
from eval_runner.results import store
from eval_runner.watching.plan import Options, plan
from tests.older_yaml import documented, files, write
from tests.processes import wait_for
from tests.results_samples import result as made
from tests.results_samples import score
from tests.wandb_runs import Backend, backend, environment

COMMAND = [sys.executable, "-c", "from eval_runner.cli import main; main()", "watch", "--config", "old.yaml"]
DOCUMENT = "def f(x):\n    return x + 1\n" * 3


def older(base: Path, **sections: object) -> None:
    """An older file for Hugging Face checkpoints in `out`, with a task of local text and one whose data an earlier HELM
    left below `helm_output`."""
    from tests.helm_output import questions

    questions(base / "helm_output" / "scenarios" / "mmlu" / "data")
    (base / "documents.jsonl").write_text(json.dumps({"id": "a", "text": DOCUMENT}))
    entries = [f"autoeval_bpb:model=<model>,path={base}/documents.jsonl,name=code",
               "mmlu:model=<model>,subject=anatomy,method=multiple_choice_separate_original"]  # fmt: skip
    helm = {"helm_env_name": None, "helm_output_path": "helm_output", "eval_instances": 5}
    hf = {"checkpoint_path": "out"}
    write(base, documented(megatron=None, gpt_evaluation=None, helm=helm, huggingface=hf, **sections))
    written = [{"description": entry, "priority": 1} for entry in entries]
    (base / "spec.conf").write_text(json.dumps({"entries": written}))


@pytest.mark.helm
@pytest.mark.slow
def test_one_command_replaces_the_older_one(tmp_path: Path) -> None:
    """20 was deleted before anybody looked; 25 is not asked for."""
    from tests.helm_models import tiny_model

    try:
        environments.find(None, "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    files(tmp_path)
    older(tmp_path, wandb=None)
    for step in (10, 25):
        tiny_model(tmp_path / "out" / f"checkpoint-{step}", step)
    call = [*COMMAND, "--begin-iteration", "10", "--iteration-interval", "10", "--end-iteration", "20",
            "--check-iterval", "2s", "--run"]  # fmt: skip
    watch = subprocess.run(call, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=200, check=False)
    assert watch.returncode == 0, watch.stderr
    assert sum("passed over, for a later checkpoint is there and these are not" in line and line.endswith(": 20")
               for line in watch.stderr.splitlines()) == 1  # fmt: skip
    root = tmp_path / "cache" / "autoeval"
    queue = Queue(str(root))
    (result,) = [store.read(root / "results" / token.result_name) for token in queue.tokens("done")]
    assert (result.step, result.run.name, result.suite) == (10, "proj-tiny", "helm")
    found, other = result.scores
    assert (found.benchmark, found.metric, found.n) == ("autoeval_bpb.code", "bits_per_byte", 1)
    assert (other.benchmark.split(".")[:2], other.n) == (["mmlu", "anatomy"], 5)
    kept = tmp_path / "helm_output/runs/proj-tiny/autoeval_bpb:name=code,model=autoeval_proj-tiny_10"
    stats = {row["name"]["name"]: row for row in json.loads((kept / "stats.json").read_text())}
    assert stats["bits_per_byte"]["mean"] == found.value


def test_scores_reach_a_run_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: Backend
) -> None:
    """No hook, and no training in W&B: a run in the older file's project, which the runner writes alone."""
    from tests.unit.test_watch import huggingface

    for name, value in environment(tmp_path / "wandb", "online", service.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    older(tmp_path, wandb={"project": "scores", "base_url": service.url})
    for step in (10, 20):
        huggingface(tmp_path / "out", step)
    planned = plan(Options("old.yaml", begin=10, end=20, interval=10), lambda text: None)
    assert [planned.watcher.look() for _ in range(2)] == [False, True]
    config = configs.load("old.yaml")
    queue = Queue(str(config.queue))
    (sink,) = registry.build_sinks(config)
    for token in reversed(list(queue.tokens("pending"))):       # out of order
        manifest = queue.ticket(token.ticket).manifest
        sink.publish(replace(made(manifest.step, score(manifest.step / 100), suite="helm"), run=manifest.run))
    assert sink.flush()
    run = service.run("scores", "proj-tiny-eval")
    rows = [row for row in run.history() if "bench/helm/mcqa/exact_match" in row]
    assert sorted((row["bench/step"], row["bench/helm/mcqa/exact_match"]) for row in rows) == [(10, 0.1), (20, 0.2)]
    assert (run.group, run.job_type, run.state) == ("proj-tiny", "eval", "finished")


@pytest.fixture
def service() -> Iterator[Backend]:
    with backend() as b:
        yield b


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_what_it_runs(tmp_path: Path, number: int) -> None:
    files(tmp_path)
    older(tmp_path, wandb=None)
    (tmp_path / "out").mkdir()
    with subprocess.Popen([*COMMAND, "--check-interval", "1h", "--run"], cwd=tmp_path, stderr=subprocess.PIPE) as watch:
        wait_for(lambda: (tmp_path / "cache/autoeval/logs/watch-run.log").exists(), 60)
        below = _below(watch.pid)
        assert below
        started = time.monotonic()
        watch.send_signal(number)
        watch.communicate(timeout=60)
    assert watch.returncode == 0
    assert time.monotonic() - started < 45
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 10)


def _below(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(path.parent.name), *_below(int(path.parent.name))]
    return found
