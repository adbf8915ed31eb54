"""The HELM evaluator with real HELM, on tiny models of random weights."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks import submit
from autoeval_hooks.errors import CheckpointError, ConfigError
from eval_runner import environments
from eval_runner.evaluators.base import Context, Job, Outcome
from eval_runner.evaluators.helm import HelmEvaluator, deployment, place, reason
from eval_runner.process import Stopped
from eval_runner.results import store
from eval_runner.results.schema import Result
from eval_runner.results.statistics import ratio_values
from tests.processes import marked, wait_for

pytestmark = pytest.mark.helm

DOCUMENTS = {
    "short": "def f(x):\n    return x\n",
    "long": "\n".join(f"value_{i} = {i * i}  # a line of some length" for i in range(12)),
    "other": "The quick brown fox jumps over the lazy dog, " * 4,
}
ENTRIES = [
    "autoeval_bpb:path=documents.jsonl,name=code",
    {"description": "custom_mcqa:path=questions.jsonl,method=multiple_choice_separate_original", "name": "choices"},
    "dyck_language:num_parenthesis_pairs=2",
]


@pytest.fixture(scope="module")
def python_env() -> str | None:
    """AUTOEVAL_TEST_HELM_ENV, else the managed environment, which is None in the settings."""
    given = os.environ.get("AUTOEVAL_TEST_HELM_ENV")
    try:
        environments.find(given, "helm", environments.default_root())
    except ConfigError as error:
        pytest.skip(str(error))
    return given


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as that of an autoeval.yaml, with data, and two runs' checkpoints of one name."""
    from tests.helm_models import tiny_model

    path = tmp_path_factory.mktemp("helm")
    documents = [json.dumps({"id": key, "text": text}) for key, text in DOCUMENTS.items()]
    (path / "documents.jsonl").write_text("\n".join(documents))
    questions = [_question(f"q{i}", correct=i % 3, split="test") for i in range(24)]
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (path / "none.jsonl").write_text(json.dumps(_question("t", correct=0, split="train")))
    tiny_model(path / "run-a" / "step-100", 1)
    tiny_model(path / "run-b" / "step-100", 2, adds_start=True)
    return path


def _question(key: str, correct: int, split: str) -> dict[str, object]:
    references = [
        {"output": {"text": text}, "tags": ["correct"] if i == correct else []}
        for i, text in enumerate(("return x", "yield from y", "pass"))
    ]
    return {"id": key, "split": split, "input": {"text": f"def {key}(x):"}, "references": references}


@pytest.fixture(scope="module")
def evaluator(python_env: str | None, base: Path) -> Callable[..., HelmEvaluator]:
    def make(entries: list[object] | None, **settings: object) -> HelmEvaluator:
        context = Context(base, environments.default_root(), "suites.quick.evaluators[0]", "autoeval.yaml")
        named = {"entries": entries} if entries else {}
        return HelmEvaluator(named | {"env": python_env, "data_dir": "helm-data"} | settings, context)

    return make


def _job(base: Path, name: str, path: Path, **options: object) -> Job:
    work = base / "work" / name
    work.mkdir(parents=True)
    return Job(path, path, name, work, base / f"{name}.log", **options)


@pytest.fixture(scope="module")
def outcomes(evaluator: Callable[..., HelmEvaluator], base: Path) -> dict[str, Outcome]:
    """What one evaluator makes of the two runs' checkpoints, one after the other, as a runner would."""
    one = evaluator(ENTRIES, max_instances=20)
    one.check()
    found = {}
    for run in ("run-a", "run-b"):
        seen: list[float] = []
        job = _job(base, f"step-100-{run}", base / run / "step-100", progress=lambda f, what, to=seen: to.append(f))
        found[run] = one.evaluate(job)
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == (0, 1)
        assert len(set(seen)) > 2
    return found


def _completions(base: Path, run: str) -> list[str]:
    (state,) = (base / "work" / f"step-100-{run}" / "output" / "runs").rglob("dyck*/scenario_state.json")
    return [r["result"]["completions"][0]["text"] for r in json.loads(state.read_text())["request_states"]]


def test_all_scores_are_there_with_their_metric_split_and_size(outcomes: dict[str, Outcome], base: Path) -> None:
    for run, outcome in outcomes.items():
        found = [(s.benchmark, s.metric, s.split, s.n, s.higher_is_better) for s in outcome.evaluation.scores]
        assert found == [
            ("autoeval_bpb.code", "bits_per_byte", "test", 3, False),
            ("choices", "exact_match", "test", 20, True),
            ("dyck_language.2", "exact_match_indicator", "test", 20, True),
        ]
        assert {"crfm-helm", "transformers", "torch"} <= outcome.evaluation.versions.keys()
        log = (base / f"step-100-{run}.log").read_text()
        assert f'device set to "{outcome.evaluation.versions["device"]}' in log
        assert sorted(Path(p).name for p in outcome.evaluation.provenance) == ["documents.jsonl", "questions.jsonl"]
        assert all(d.startswith("sha256:") for d in outcome.evaluation.provenance.values())


def test_two_checkpoints_of_one_name_share_no_completion(outcomes: dict[str, Outcome], base: Path) -> None:
    a, b = _completions(base, "run-a"), _completions(base, "run-b")
    assert len(a) == len(b) == 20
    assert all(x != y for x, y in zip(a, b, strict=True))
    bits = [o.evaluation.scores[0].value for o in outcomes.values()]
    assert abs(bits[0] - bits[1]) > 0.01


def test_paired_instances_are_those_of_both(outcomes: dict[str, Outcome]) -> None:
    a, b = ([(i.benchmark, i.id) for i in o.instances] for o in outcomes.values())
    assert a == b
    assert len(set(a)) == len(a) == 3 + 20 + 20


def test_bits_per_byte_is_what_the_model_says(outcomes: dict[str, Outcome], base: Path) -> None:
    """Against transformers alone: every token of a document given what the window of 64 holds before it.

    The tokenizer of run-a adds no start token: the first window begins with one. That of run-b adds it to
    every window.
    """
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for run, outcome in outcomes.items():
        tokenizer = AutoTokenizer.from_pretrained(base / run / "step-100")
        model = AutoModelForCausalLM.from_pretrained(base / run / "step-100", dtype=torch.float32).eval()
        bits, sizes = {}, {}
        for key, text in DOCUMENTS.items():
            ids, nats, done = tokenizer(text, add_special_tokens=False).input_ids, 0.0, 0
            adds = run == "run-b"
            assert tokenizer(text).input_ids == [tokenizer.bos_token_id] * adds + ids
            size = 63 if adds else 64
            while done < len(ids):
                end = min(len(ids), done + (size - 1 if done else 63))
                window = ids[max(0, end - size) : end] if done else ids[:end]
                window = [tokenizer.bos_token_id] * (adds or done == 0) + window
                with torch.no_grad():
                    logp = torch.log_softmax(model(torch.tensor([window])).logits[0], -1)
                first = len(window) - (end - done)
                nats -= sum(logp[i - 1, window[i]].item() for i in range(first, len(window)))
                done = end
            bits[key], sizes[key] = nats / math.log(2), len(text.encode())
        score = outcome.evaluation.scores[0]
        each = {i.id: i.value for i in outcome.instances if i.metric == "bits_per_byte"}
        # at a window's edge HELM sends text, and the tokenizer may cut it otherwise than in the whole
        wanted = ratio_values(list(bits.values()), [sizes[k] for k in bits])
        assert each == pytest.approx(dict(zip(bits, wanted, strict=True)), rel=1e-2)
        assert score.value == pytest.approx(sum(bits.values()) / sum(sizes.values()), rel=5e-3)
        left_out = [
            sum(bits[k] for k in bits if k != out) / sum(sizes[k] for k in bits if k != out) for out in bits
        ]
        spread = sum((x - statistics.fmean(left_out)) ** 2 for x in left_out)
        assert score.stderr == pytest.approx(math.sqrt(2 / 3 * spread), rel=0.6)   # the jackknife, of three documents


def test_choices_are_scored_by_their_mean_log_probability(outcomes: dict[str, Outcome], base: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    questions = {q["id"]: q for q in map(json.loads, (base / "questions.jsonl").read_text().splitlines())}
    for run, outcome in outcomes.items():
        tokenizer = AutoTokenizer.from_pretrained(base / run / "step-100")
        model = AutoModelForCausalLM.from_pretrained(base / run / "step-100", dtype=torch.float32).eval()
        values = {i.id: i.value for i in outcome.instances if i.benchmark == "choices"}
        assert len(values) == 20
        for key, value in values.items():
            means = []
            for reference in questions[key]["references"]:
                answer = len(tokenizer.tokenize(f" {reference['output']['text']}"))
                ids = tokenizer(f"{questions[key]['input']['text']} {reference['output']['text']}").input_ids
                with torch.no_grad():
                    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
                means.append(statistics.fmean(logp[i - 1, ids[i]].item() for i in range(len(ids) - answer, len(ids))))
            best = means.index(max(means))
            assert value == float("correct" in questions[key]["references"][best]["tags"])
        score = outcome.evaluation.scores[1]
        assert score.value == pytest.approx(statistics.fmean(values.values()))
        assert score.stderr == pytest.approx(statistics.stdev(values.values()) / math.sqrt(20))


def test_check_names_every_entry_that_helm_does_not_know(
    evaluator: Callable[..., HelmEvaluator], base: Path
) -> None:
    (base / "runs.conf").write_text(
        "entries: [\n"
        '  {description: "dyck_lanuage:num_parenthesis_pairs=2,model=<model>", priority: 1}\n'
        '  {description: "mmlu:subjct=anatomy,model=<model>", priority: 1}\n'
        '  {description: "simple_mcqa:model=<model>", priority: 2}  # no main metric in any schema\n'
        '  {description: "left_out:model=<model>", priority: 3}\n'
        "]\n"
    )
    with pytest.raises(ConfigError) as caught:
        evaluator(None, entries_file="runs.conf", max_priority=2, metrics={"mlu": ["exact_match"]}).check()
    said = str(caught.value)
    assert "autoeval.yaml: suites.quick.evaluators[0].entries_file[0]: HELM has no run spec 'dyck_lanuage'" in said
    assert "did you mean 'dyck_language'" in said
    assert "entries_file[1]: run spec 'mmlu' has no argument 'subjct'; did you mean 'subject'" in said
    assert "entries_file[2]: HELM names no main metric for 'simple_mcqa'; choose one by `metrics:" in said
    assert "metrics.mlu: no such benchmark; did you mean 'mmlu'" in said
    assert "left_out" not in said


@pytest.mark.parametrize(
    ("schema", "text", "message"),
    [
        ("schema_clasic.yaml", None, "schema_clasic.yaml is no file, .*; did you mean 'schema_classic.yaml'"),
        ("broken.yaml", "metrics: [", "broken.yaml is not a schema of HELM: while parsing"),
        ("other.yaml", "metrics: 3", "other.yaml is not a schema of HELM: "),
    ],
)
def test_a_schema_that_cannot_be_read(
    evaluator: Callable[..., HelmEvaluator], base: Path, schema: str, text: str | None, message: str
) -> None:
    if text:
        (base / schema).write_text(text)
    with pytest.raises(ConfigError, match=rf"^autoeval.yaml: suites.quick.evaluators\[0\].schema: /.*{message}"):
        evaluator(ENTRIES, schema=schema).check()


@pytest.fixture(scope="module")
def half_empty(evaluator: Callable[..., HelmEvaluator]) -> HelmEvaluator:
    """A suite whose second entry has data, and no instance to evaluate in them."""
    return evaluator([ENTRIES[0], "custom_mcqa:path=none.jsonl,method=multiple_choice_separate_original"])


def test_a_run_without_instances_fails_and_says_so(half_empty: HelmEvaluator, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"custom_mcqa.*no instances of the split 'test'; HELM found no data"):
        half_empty.evaluate(_job(base, "empty", base / "run-a" / "step-100"))


def test_a_checkpoint_that_cannot_be_loaded_is_a_checkpoint_error(half_empty: HelmEvaluator, base: Path) -> None:
    from tests.helm_models import tiny_model

    path = tiny_model(base / "torn", 3)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=reason.CANNOT_LOAD) as caught:
        half_empty.evaluate(_job(base, "torn", path))
    assert str(base / "torn.log") in str(caught.value)
    assert "suites.quick.evaluators[0].entries[0] (autoeval_bpb:" in str(caught.value)


def test_stop_ends_helm_at_once(half_empty: HelmEvaluator, base: Path) -> None:
    stopped: list[float] = []

    def stopping() -> bool:
        log = base / "stopped.log"
        if log.exists() and b"helm_run" in log.read_bytes():
            stopped.append(time.monotonic())
        return bool(stopped)

    job = _job(base, "stopped", base / "run-a" / "step-100", stopping=stopping)
    with pytest.raises(Stopped):
        half_empty.evaluate(job)
    assert time.monotonic() - stopped[0] < 7
    assert not [p for p in Path("/proc").glob("[0-9]*/cwd") if _target(p) == str(job.work_dir)]


RUNNER = """
import sys
from eval_runner import config, registry
from eval_runner.progress import Progress
from eval_runner.runner import Runner

loaded = config.load(sys.argv[1])
with Progress() as progress:
    evaluators = registry.build_evaluators(loaded, loaded.suites["quick"])
    Runner(loaded, {"quick": evaluators}, {}, progress).run("drain")
"""


@pytest.mark.slow
def test_a_killed_runner_keeps_the_runs_that_helm_finished(python_env: str | None, base: Path) -> None:
    """Against the same checkpoint evaluated without a break: every score and every instance the same."""
    suite = {"type": "helm", "env": python_env, "data_dir": "helm-data", "max_instances": 40, "entries": ENTRIES[::2]}
    results: list[tuple[Result, list[object]]] = []
    for way in ("whole", "broken"):
        config = base / f"{way}.yaml"
        text = {"queue": f"queue-{way}", "runner": {"lease": 8}, "sinks": [], "hook": {"pin": "none"}}
        config.write_text(json.dumps(text | {"suites": {"quick": {"evaluators": [suite]}}}))
        submit(base / "run-a" / "step-100", step=100, config=config)
        queue = base / f"queue-{way}"
        environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "AUTOEVAL_TEST_MARK": way}
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(config)], env=environ)
        try:
            if way == "broken":
                wait_for(lambda: list(queue.glob("partial/*/*")), 200)      # noqa: B023  # asked at once
                runner.kill()
                runner.wait()
                wait_for(lambda: not marked("broken"))
                assert len(list(queue.glob("partial/*/*"))) == 1
                subprocess.run([sys.executable, "-c", RUNNER, str(config)], env=environ, check=True, timeout=250)
            else:
                assert runner.wait(250) == 0
        finally:
            runner.kill()
            runner.wait()
        (result,) = store.done(queue)[0]
        results.append((result, list(store.instances(store.path_of(queue, result)))))
        assert list(queue.glob("partial/*")) == []
    (whole, all_values), (resumed, values) = results
    assert resumed.scores == whole.scores
    assert values == all_values
    assert len({v.benchmark for v in values}) == 2  # type: ignore[attr-defined]
    said = resumed.evaluations[0].versions.pop("autoeval resume")
    assert said == "1 of 2 entries are of an earlier attempt"
    assert resumed.evaluations[0].versions == whole.evaluations[0].versions
    assert resumed.evaluations[0].provenance == whole.evaluations[0].provenance
    assert resumed.evaluations[0].seconds > 0
    logs = sorted((base / "queue-broken" / "logs").iterdir(), key=lambda path: path.name.split("~")[1])
    ran = [re.findall(r"Running (autoeval_bpb|dyck_language)", log.read_text()) for log in logs]
    assert ran == [["autoeval_bpb", "dyck_language"], ["dyck_language"]]


def test_temperature_zero_is_greedy(python_env: str | None, tmp_path: Path) -> None:
    """All logits of a model without weights are equal: HELM's own sampling at 1e-7 draws among all tokens."""
    from tests.helm_models import tiny_model

    python = environments.find(python_env, "helm", environments.default_root())
    code = f"""
import autoeval_helm, torch
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
tokenizer = HuggingFaceTokenizer.get_tokenizer("autoeval/x", {str(tiny_model(tmp_path / "m", 1))!r})
server = autoeval_helm.GreedyServer({str(tmp_path / "m")!r}, tokenizer)
for weight in server.model.parameters():
    torch.nn.init.zeros_(weight)
request = dict(prompt="def", temperature=1e-7, num_return_sequences=1, max_new_tokens=20, top_p=1,
               echo_prompt=False, stop_sequences=[])
print(len({{t for r in (request, request | {{"temperature": 1.0}})
          for t in [server.serve_request(r)["completions"][0]["text"]]}}))
request["max_new_tokens"] = 1
print(sorted({{server.serve_request(request)["completions"][0]["text"] for _ in range(5)}}), server.model.dtype)
"""
    environ, _ = place.environment(python, tmp_path)
    out = subprocess.run([python, "-c", code], env=environ, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-2:] == ["2", "['<|endoftext|>'] torch.float32"]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def test_the_marker_of_our_client_is_the_one_that_the_runner_looks_for() -> None:
    assert f'CANNOT_LOAD = "{reason.CANNOT_LOAD}"' in (deployment.INSIDE / "autoeval_helm.py").read_text()
