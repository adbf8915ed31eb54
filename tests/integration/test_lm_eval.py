"""The real lm-evaluation-harness of the managed environment, on tiny models of random weights and local tasks."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autoeval_hooks import submit
from autoeval_hooks.errors import CheckpointError, ConfigError
from eval_runner import config as configs
from eval_runner import environments, registry
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.lm_eval import LmEvalEvaluator
from eval_runner.progress import Progress
from eval_runner.results import store
from eval_runner.results.schema import Instance, Result
from eval_runner.results.statistics import paired
from eval_runner.runner import Runner
from eval_runner.servers.base import Endpoint
from tests import lm_eval_tasks
from tests.helm_models import tiny_model
from tests.integration.test_transformers_server import tiny_llama
from tests.served import stand_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def env() -> str | None:
    """AUTOEVAL_TEST_LM_EVAL_ENV, else the managed environment, which is None in the settings."""
    given = os.environ.get("AUTOEVAL_TEST_LM_EVAL_ENV")
    try:
        environments.find(given, "lm_eval", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    return given


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    for name, value in {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(base / "cache"), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as that of an autoeval.yaml, with tasks and checkpoints; two of these are equal."""
    path = tmp_path_factory.mktemp("lm_eval")
    lm_eval_tasks.write(path)
    tiny_model(path / "run" / "checkpoint-100", 1)
    tiny_model(path / "run" / "checkpoint-200", 2)
    shutil.copytree(path / "run" / "checkpoint-100", path / "run" / "checkpoint-300")
    return path


def evaluator(base: Path, env: str | None, server: str = "", **settings: Any) -> LmEvalEvaluator:
    context = Context(base, environments.default_root(), "suites.quick.evaluators[0]", "autoeval.yaml", server)
    return LmEvalEvaluator({"include_path": "tasks", "env": env} | settings, context)


def job(base: Path, path: Path, name: str, **options: Any) -> Job:
    work = base / "work" / name
    work.mkdir(parents=True)
    return Job(path, path, f"{path.name}-0a", work, base / f"{name}.log", **options)


@pytest.fixture(scope="module")
def results(base: Path, env: str | None) -> dict[int, tuple[Result, list[Instance]]]:
    """What a runner makes of the three checkpoints, by their step."""
    config = base / "autoeval.yaml"
    suite = {"type": "lm_eval", "tasks": ["tiny", "tiny_text"], "include_path": "tasks", "env": env, "batch_size": 4}
    text: dict[str, Any] = {"queue": "queue", "sinks": [], "hook": {"pin": "none"}}
    config.write_text(json.dumps(text | {"suites": {"quick": {"evaluators": [suite]}}}))
    for step in (100, 200, 300):
        submit(base / "run" / f"checkpoint-{step}", step=step, config=config)
    loaded = configs.load(str(config))
    evaluators = registry.build_evaluators(loaded, loaded.suites["quick"])
    with pytest.MonkeyPatch.context() as patch, Progress() as progress:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(base / "cache"))
        evaluators[0].check()
        Runner(loaded, {"quick": evaluators}, {}, progress).run("drain")
    contents = store.collect(loaded.queue)
    assert contents.failed == ()
    return {r.step: (r, list(store.instances(store.path_of(loaded.queue, r)))) for r in contents.results}


def test_the_runner_has_all_scores(results: dict[int, tuple[Result, list[Instance]]]) -> None:
    for result, instances in results.values():
        assert result.status == "ok", result.failure
        assert [(s.benchmark, s.metric, s.split, s.n, s.higher_is_better) for s in result.scores] == [
            ("tiny_choice", "acc", "test", 12, True), ("tiny_choice", "acc_norm", "test", 12, True),
            ("tiny_gen", "exact_match.number", "validation", 5, True),
            ("tiny_gen", "exact_match.whole", "validation", 5, True), ("tiny", "acc", "test", 12, True),
            ("tiny_text", "word_perplexity", "test", 3, False), ("tiny_text", "bits_per_byte", "test", 3, False),
        ]  # fmt: skip
        (evaluation,) = result.evaluations
        assert evaluation.versions["task tiny_choice"] == "1.5, 0-shot"
        assert {"lm_eval", "transformers", "torch", "device", "dtype"} <= evaluation.versions.keys()
        assert {Path(p).name for p in evaluation.provenance} == {
            "tasks", "choice.jsonl", "gen.jsonl", "text.jsonl"
        }
        assert len(instances) == 12 + 12 + 5 + 5 + 12 + 3 + 3


def test_the_same_weights_have_the_same_scores_and_others_have_others(
    results: dict[int, tuple[Result, list[Instance]]],
) -> None:
    (a, of_a), (b, of_b), (c, of_c) = (results[step] for step in (100, 200, 300))
    assert a.scores == c.scores
    assert of_a == of_c
    bits = [next(s.value for s in r.scores if s.metric == "bits_per_byte") for r in (a, b)]
    assert abs(bits[0] - bits[1]) > 0.01
    each = [{i.id: i.value for i in of if i.metric == "bits_per_byte"} for of in (of_a, of_b)]
    difference = paired(*each)
    assert difference is not None
    assert (difference.n, difference.value) == (3, pytest.approx(bits[1] - bits[0]))


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    start = len(tokenizer(context).input_ids)
    ids = tokenizer(context + continuation).input_ids
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_choices_are_those_of_the_model(results: dict[int, tuple[Result, list[Instance]]], base: Path) -> None:
    """By transformers alone."""
    for step, (_, instances) in results.items():
        path = base / "run" / f"checkpoint-{step}"
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
        right = []
        for one in lm_eval_tasks.QUESTIONS:
            each = [log_likelihood(model, tokenizer, str(one["question"]), f" {c}") for c in list(one["choices"])]
            right.append(float(each.index(max(each)) == one["gold"]))
        found = [i.value for i in instances if (i.benchmark, i.metric) == ("tiny_choice", "acc")]
        assert sorted(found) == sorted(right)
        assert math.fsum(found) == math.fsum(right)


def test_names_that_lm_eval_does_not_know(base: Path, env: str | None) -> None:
    more = base / "more"
    more.mkdir()
    (more / "group.yaml").write_text("group: holey\ntask: [arc_easy, arc_chalenge]\n")
    (more / "broken.yaml").write_text("task: broken\nmetric_list: [\n")
    (more / "unsafe.yaml").write_text(lm_eval_tasks.GEN.replace("tiny_gen", "unsafe") + "unsafe_code: true\n")
    tasks = ["arc_easi", "holey", "broken", "unsafe", "mmlu", "mmlu_anatomy", "ai2_arc"]
    with pytest.raises(ConfigError) as caught:
        evaluator(base, env, tasks=tasks, include_path="more").check()
    said = str(caught.value)
    for text in (
        "autoeval.yaml: suites.quick.evaluators[0].tasks[0]: lm_eval has no task 'arc_easi'; did you mean 'arc_easy'?",
        "tasks[1]: group 'holey' names the task 'arc_chalenge', which there is not; did you mean 'arc_challenge'?",
        "tasks[2]: lm_eval has no task 'broken'",
        f"lm_eval cannot read {more}/broken.yaml (while parsing",
        "tasks[3]: unsafe runs code that the model writes",
        "tasks[5]: 'mmlu_anatomy' is in suites.quick.evaluators[0].tasks[4] (mmlu), too",
    ):
        assert text in said
    assert "tasks[6]" not in said


def spoilt(path: Path, seed: int) -> Path:
    """A model whose output weights are not a number."""
    tiny_model(path, seed)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    model.save_pretrained(path)
    return path


def test_a_model_of_no_numbers_has_no_accuracy(base: Path, env: str | None) -> None:
    path = spoilt(base / "spoilt", 3)
    with pytest.raises(CheckpointError, match=r"tasks\[0\] \(tiny_choice\): tiny_choice has log-likelihoods that are"):
        evaluator(base, env, tasks=["tiny_choice"]).evaluate(job(base, path, "spoilt"))


def test_a_checkpoint_that_cannot_be_loaded(base: Path, env: str | None) -> None:
    path = tiny_model(base / "torn", 3)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"lm_eval cannot load the checkpoint: .*; log: ") as caught:
        evaluator(base, env, tasks=["tiny_choice"]).evaluate(job(base, path, "torn"))
    assert str(base / "torn.log") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("tasks/choice.jsonl", "tasks/none.jsonl"), r"\(odd\): lm_eval cannot load: .*none\.jsonl"),
        (("arc", "autoeval/no_such_data"), r"\(odd\): lm_eval cannot load: .*OfflineModeIsEnabled.*load them once"),
        (("{{question}}", "{{nothing.at_all}}"), r"\(odd\): lm_eval cannot load: UndefinedError: 'nothing'"),
        (("none", "process_docs"), r"\(odd\): lm_eval cannot load: Empty: odd, or a task in it, has no documents"),
    ],
    ids=["no file", "not in the cache", "template", "empty"],
)
def test_data_that_are_not_there(
    base: Path, env: str | None, change: tuple[str, str], says: str, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    text = lm_eval_tasks.CHOICE.replace("tiny_choice", "odd")
    if change[0] == "arc":
        text = text.replace("dataset_path: json", f"dataset_path: {change[1]}").replace("dataset_kwargs", "# kwargs")
    elif change[1] == "process_docs":
        (odd / "utils.py").write_text("def none(docs):\n    return docs.select([])\n")
        text += "process_docs: !function utils.none\n"
    else:
        text = text.replace(*change)
    (odd / "odd.yaml").write_text(text)
    one = evaluator(base, env, tasks=["odd"], include_path=str(odd))
    with pytest.raises(ConfigError, match=says):
        one.evaluate(job(base, base / "run" / "checkpoint-100", f"odd-{tmp_path.name}"))


class Model:
    """Answers `/v1/completions` as vLLM does, by transformers: a stand-in for the server, with a real model."""

    def __init__(self, path: Path, *, echoes: bool = True) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.echoes = echoes

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
        assert path == "/v1/completions"
        assert body["model"] == "served-name"
        return 200, {"choices": [self._choice(i, ids, body) for i, ids in enumerate(body["prompt"])]}

    def _choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        out = self.model.generate(torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False)[0].tolist()
        text = self.tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
        for stop in body.get("stop") or []:
            text = text.partition(stop)[0]
        choice: dict[str, Any] = {"index": index, "text": text}
        if "logprobs" in body:
            with torch.no_grad():
                logp = torch.log_softmax(self.model(torch.tensor([out])).logits[0], -1)
            best = [{"best": float(row.max())} for row in logp[:-1]]
            own = [float(logp[i - 1, out[i]]) for i in range(1, len(out))]
            start = 0 if self.echoes else len(ids)
            choice["logprobs"] = {"token_logprobs": [None, *own][start:], "top_logprobs": [None, *best][start:]}
        return choice


def ask(base: Path, env: str | None, served: Model, name: str, **settings: Any) -> Outcome:
    with stand_in(served) as asked:
        endpoint = Endpoint(asked.url, "openai", "served-name")
        one = evaluator(base, env, "vllm", through="server", **settings)
        path = base / "run" / "checkpoint-100"
        return one.evaluate(job(base, path, name, endpoint=lambda: endpoint, server_facts={"server": "stand-in"}))


def test_a_server_of_the_same_model_gives_the_same_scores(
    base: Path, env: str | None, results: dict[int, tuple[Result, list[Instance]]]
) -> None:
    served = Model(base / "run" / "checkpoint-100")
    found = ask(base, env, served, "served", tasks=["tiny", "tiny_text"], concurrency=2)
    loaded, instances = results[100]
    assert [(s.benchmark, s.metric, s.n) for s in found.evaluation.scores] == [
        (s.benchmark, s.metric, s.n) for s in loaded.scores
    ]
    assert [s.value for s in found.evaluation.scores] == pytest.approx([s.value for s in loaded.scores], rel=1e-4)
    assert [i.id for i in found.instances] == [i.id for i in instances]
    assert found.evaluation.versions["server"] == "stand-in"
    assert "device" not in found.evaluation.versions


def test_a_server_that_does_not_echo_the_prompt_is_refused(base: Path, env: str | None) -> None:
    served = Model(base / "run" / "checkpoint-100", echoes=False)
    with pytest.raises(ConfigError, match=r"\(tiny_choice\): lm_eval failed: Unusable: .*`through: model`"):
        ask(base, env, served, "no-echo", tasks=["tiny_choice"])


def test_transformers_serve_answers_for_a_task_that_generates(
    base: Path, env: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the runner, its server and lm_eval; three of five targets are what the model writes, by transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")       # as its own tests
    where = base / "served"
    where.mkdir()
    path = tiny_llama(where / "checkpoint-5", 1)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    (where / "tasks").mkdir()
    rows = []
    for i, row in enumerate(lm_eval_tasks.GENERATE):
        ids = tokenizer(row["q"], return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True).partition("\n")[0]
        assert text.strip()
        rows.append({"q": row["q"], "a": text if i % 2 == 0 else f"{text}?"})
    (where / "tasks" / "gen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "tasks" / "gen.yaml").write_text(lm_eval_tasks.GEN)
    suite = {"type": "lm_eval", "tasks": ["tiny_gen"], "include_path": "tasks", "through": "server", "env": env}
    text: dict[str, Any] = {"queue": "queue", "sinks": [], "hook": {"pin": "none"}, "server": {"type": "transformers"}}
    (where / "autoeval.yaml").write_text(json.dumps(text | {"suites": {"quick": {"evaluators": [suite]}}}))
    submit(path, step=5, config=where / "autoeval.yaml")
    loaded = configs.load(str(where / "autoeval.yaml"))
    server = registry.build_server(loaded)
    assert server is not None
    with Progress() as progress:
        evaluators = registry.build_evaluators(loaded, loaded.suites["quick"])
        Runner(loaded, {"quick": evaluators}, {}, progress, server=server).run("drain")
    contents = store.collect(loaded.queue)
    assert contents.failed == ()
    (result,) = contents.results
    assert {s.metric: s.value for s in result.scores}["exact_match.whole"] == 0.6
    assert result.evaluations[0].versions["server"] == "transformers"
