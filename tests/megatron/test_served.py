"""A checkpoint that Megatron trained, served by Megatron's own servers, scored by the real HELM: all on the CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner import environments
from eval_runner.results import store
from eval_runner.results.schema import Result
from tests.helm_models import END, tiny_tokenizer
from tests.megatron.conftest import SITE, Place

pytestmark = [pytest.mark.megatron, pytest.mark.helm]

SCRIPT = Path(__file__).with_name("serve_cpu.py")
LENGTH = 48
DOCUMENTS = ["def f(x):\n    return x\n", "the quick brown fox é", "tokenizer = Tokenizer(models.BPE())", "0 1 2 3 4"]
"""Each fits into one window, where HELM asks for the same tokens as a single pass has."""
WAYS = {2: "static", 4: "dynamic"}
"""Which server answers for which step."""


@pytest.fixture(scope="module")
def trained(place: Callable[[str, str], Place]) -> Place:
    try:
        environments.find(None, "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    at = place("served", _config("static"))
    tiny_tokenizer(at.path / "tokenizer")
    (at.path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    at.train(
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(at.path / "tokenizer"),
        "--seq-length", str(LENGTH), "--max-position-embeddings", str(LENGTH), "--train-iters", "4", "--lr", "1e-2",
        "--ckpt-format", "torch_dist", "--autoeval-config", "autoeval.yaml",
    )  # fmt: skip
    return at


def _config(mode: str) -> str:
    helm = {
        "type": "helm", "max_instances": 4, "data_dir": "helm-data",
        "entries": ["autoeval_bpb:path=documents.jsonl,name=text", "dyck_language:num_parenthesis_pairs=2"],
    }  # fmt: skip
    server = {
        "type": "megatron", "checkout": str(SITE), "mode": mode, "script": str(SCRIPT), "arguments": ["--serve", mode],
    }  # fmt: skip
    runner = {"order": "oldest", "allow_pickled_weights": True, "max_attempts": 1}
    suites = {"quick": {"evaluators": [helm]}}
    return json.dumps({"queue": "queue", "suites": suites, "server": server, "runner": runner, "sinks": []})


@pytest.fixture(scope="module")
def results(trained: Place) -> dict[int, Result]:
    """Each step by its own server, one after the other."""
    for mode in WAYS.values():
        (trained.path / "autoeval.yaml").write_text(_config(mode))
        code = "from eval_runner.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "run", "--once", "--config", "autoeval.yaml"], cwd=trained.path,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250,
        )  # fmt: skip
        logs = sorted((trained.queue / "logs").glob("*"), key=lambda path: path.stat().st_mtime)
        assert done.returncode == 0, done.stderr + "".join(path.read_text()[-3000:] for path in logs[-2:])
    return {result.step: result for result in store.done(trained.queue)[0]}


def _forward(at: Place, step: int) -> list[float]:
    """Bits of each document, by a single pass of the same weights."""
    texts = at.path / f"texts-{step}.json"
    texts.write_text(json.dumps([END + text for text in DOCUMENTS]))
    subprocess.run(
        [sys.executable, SCRIPT, "--serve", "forward", "--texts", texts, "--load", at.save, "--ckpt-step", str(step),
         "--use-checkpoint-args", "--micro-batch-size", "1"],
        cwd=at.path, env=at.environment(), check=True, timeout=150, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    logprobs = json.loads(texts.with_suffix(".logprobs").read_text())
    return [-sum(each) / math.log(2) for each in logprobs]


@pytest.mark.parametrize("step", list(WAYS))
def test_bits_per_byte_are_those_of_a_single_pass(trained: Place, results: dict[int, Result], step: int) -> None:
    (evaluation,) = results[step].evaluations
    bits, dyck = evaluation.scores
    assert (bits.benchmark, bits.metric, bits.n) == ("autoeval_bpb.text", "bits_per_byte", len(DOCUMENTS))
    assert (dyck.benchmark, dyck.n) == ("dyck_language.2", 4)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    assert bits.value == pytest.approx(sum(_forward(trained, step)) / size, abs=1e-4)
    assert evaluation.versions["server"] == f"megatron {WAYS[step]}"
    assert evaluation.versions["megatron"].startswith("0.19")
    assert "device" not in evaluation.versions


def test_training_shows_in_the_scores(results: dict[int, Result]) -> None:
    first, second = (results[step].evaluations[0].scores[0].value for step in WAYS)
    assert abs(first - second) > 0.01
