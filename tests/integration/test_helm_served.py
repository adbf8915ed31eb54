"""Real HELM on a checkpoint behind a server. The server is a stand-in: it repeats what Megatron's own answered, and
for prompts that were not recorded it makes up a log-probability for every token."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import environments
from eval_runner.evaluators.base import Context, Job
from eval_runner.evaluators.helm import HelmEvaluator, reason
from eval_runner.results.statistics import ratio_values
from eval_runner.servers.base import Endpoint
from tests import served

pytestmark = pytest.mark.helm

RECORDED = "def tiny(x): return"
"""Short enough for one window, and asked for with the end of text before it, as was recorded."""
LONG = "def quite_long(x):\n    return [x] * 12  # éé\n" * 4
LENGTH = 48
ENTRIES = ["autoeval_bpb:path=documents.jsonl,name=code", "dyck_language:num_parenthesis_pairs=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    documents = [{"id": "recorded", "text": RECORDED}, {"id": "long", "text": LONG}]
    (path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return path


@pytest.fixture(scope="module")
def evaluator(base: Path) -> Callable[..., HelmEvaluator]:
    given = os.environ.get("AUTOEVAL_TEST_HELM_ENV")
    try:
        environments.find(given, "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    context = Context(base, environments.default_root(), "suites.quick.evaluators[0]", "autoeval.yaml")

    def make(*entries: str) -> HelmEvaluator:
        return HelmEvaluator(
            {"entries": list(entries), "env": given, "data_dir": "helm-data", "max_instances": 3}, context
        )

    return make


def _job(base: Path, name: str, url: str, api: str) -> Job:
    work = base / "work" / name
    work.mkdir(parents=True)
    return Job(
        base / "iter_0000010", served.TOKENIZER, name, work, base / f"{name}.log", max_length=LENGTH,
        endpoint=lambda: Endpoint(url, api, name), loadable=False,  # type: ignore[arg-type]
        server_facts={"server": "stand-in"},
    )  # fmt: skip


def _ids(body: dict[str, Any]) -> list[int]:
    if "prompts" in body:
        ids: list[int] = AutoTokenizer.from_pretrained(served.TOKENIZER)(body["prompts"][0]).input_ids
        return ids
    return list(body["prompt"])


def _logprob(token: int) -> float:
    """Made up; of the token alone, so that a document's bits do not depend on its windows."""
    return -1 - token / 100


def _answer(path: str, body: dict[str, Any]) -> tuple[int, object]:
    """What was recorded, with the model's name as it is asked for now, else made up."""
    status, answer = served.recorded(path, body | ({"model": "autoeval/recorded"} if "model" in body else {}))
    if status != 418:
        return status, answer
    ids = _ids(body)
    wanted = body.get("tokens_to_generate", body.get("max_tokens"))
    if len(ids) + wanted > LENGTH:
        return 400, f"{len(ids)} + {wanted} tokens are more than {LENGTH}"
    added = [30] * wanted
    numbers = [_logprob(i) for i in [*ids[1:], *added]]
    if "prompts" in body:
        return 200, {"tokens": [ids + added], "logprobs": [numbers]}
    shown = [*ids, *added] if body["echo"] else added
    told = {"tokens": ["?"] * len(shown), "token_logprobs": [None, *numbers[-len(shown) + body["echo"] :]]}
    choice = {"text": "?", "prompt_token_ids": ids, "generation_token_ids": added, "logprobs": told}
    return 200, {"choices": [choice]}


@pytest.mark.parametrize("api", ["megatron", "openai"])
def test_a_served_checkpoint_is_scored(evaluator: Callable[..., HelmEvaluator], base: Path, api: str) -> None:
    with served.stand_in(_answer) as server:
        outcome = evaluator(*ENTRIES).evaluate(_job(base, f"step-10-{api}", server.url, api))
    scores = {s.benchmark: s for s in outcome.evaluation.scores}
    tokenizer = AutoTokenizer.from_pretrained(served.TOKENIZER)
    recorded = next(e for e in served.EXCHANGES if e["body"].get("tokens_to_generate") == 1)
    bits = {
        "recorded": -sum(recorded["answer"]["logprobs"][0][:11]) / math.log(2),
        "long": -sum(map(_logprob, tokenizer(LONG).input_ids)) / math.log(2),
    }
    sizes = {"recorded": len(RECORDED.encode()), "long": len(LONG.encode())}
    assert len(tokenizer(LONG).input_ids) > 2 * LENGTH
    each = {i.id: i.value for i in outcome.instances if i.metric == "bits_per_byte"}
    assert scores["autoeval_bpb.code"].value == pytest.approx(sum(bits.values()) / sum(sizes.values()), rel=1e-6)
    wanted = ratio_values(list(bits.values()), list(sizes.values()))
    assert each == pytest.approx(dict(zip(bits, wanted, strict=True)), rel=1e-6)
    assert scores["dyck_language.2"].n == 3
    assert outcome.evaluation.versions["server"] == "stand-in"
    assert "device" not in outcome.evaluation.versions
    paths = {"megatron": "/api", "openai": "/v1/completions"}
    assert {path for _, path, _ in server.requests} == {paths[api]}


@pytest.mark.parametrize(
    ("name", "answer", "kind", "message"),
    [
        ("died", None, AutoEvalError, f"{reason.CANNOT_ASK}: http://.*RemoteDisconnected"),
        ("refuses", (200, '"top_k must be an integer"'), ConfigError, "says: top_k must be an integer"),
    ],
)
@pytest.mark.slow
def test_why_a_server_could_not_be_used(
    evaluator: Callable[..., HelmEvaluator], base: Path, name: str, answer: Any, kind: type[AutoEvalError], message: str
) -> None:
    with (
        served.stand_in(lambda path, body: answer) as server,
        pytest.raises(AutoEvalError, match=message) as caught,
    ):
        evaluator(ENTRIES[0]).evaluate(_job(base, name, server.url, "megatron"))
    assert type(caught.value) is kind
    assert "suites.quick.evaluators[0].entries[0] (autoeval_bpb:" in str(caught.value)
    assert "data_dir" not in str(caught.value)
    assert len(server.requests) == 1
    assert not isinstance(caught.value, CheckpointError)
