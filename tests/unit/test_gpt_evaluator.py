"""The GPT evaluator from settings to outcome; servers and judge are stand-ins, and the worker runs in this process.

As the child that it is, it runs in `tests/integration/test_gpt.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner.evaluators.base import Context, Job
from eval_runner.evaluators.gpt import GptEvaluator, spec, worker
from eval_runner.evaluators.gpt import evaluator as evaluators
from eval_runner.evaluators.gpt.evaluator import WORKER, _window
from eval_runner.evaluators.gpt.records import Question
from eval_runner.results.schema import Evaluation
from eval_runner.servers.base import Endpoint
from tests.gpt_lab import QUESTIONS, Judge, asked, entry, lines, points, write_files
from tests.judge_stand_in import Body, JudgeStandIn

URL = "http://127.0.0.1:9/v1"


def evaluator(tmp_path: Path, url: str = URL, *, server: str = "external", **more: Any) -> GptEvaluator:
    write_files(tmp_path)
    context = Context(
        tmp_path, tmp_path, "suites.quick.evaluators[0]", "autoeval.yaml", server, cache=tmp_path / "cache"
    )
    return GptEvaluator(entry(url, **more), context)


@pytest.mark.parametrize("what", ["gpt", "gpt.evaluator"])
def test_the_runner_loads_no_client(what: str) -> None:
    code = f"import sys, eval_runner.evaluators.{what}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {name.split(".")[0] for name in out.split()} & {"openai", "torch", "transformers"}


def test_the_worker_loads_no_torch() -> None:
    code = "import sys, eval_runner.evaluators.gpt.worker; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {name.split(".")[0] for name in out.split()} & {"torch", "transformers"}


# ---------------------------------------------------------------------- before anything is asked


def test_what_is_in_order_is_so(tmp_path: Path) -> None:
    evaluator(tmp_path).check()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"judge": {"base_url": URL, "api_key_env": "NO_SUCH_KEY"}}, r"judge\.api_key_env: \$NO_SUCH_KEY is not set"),
        ({"judge": {"base_url": URL, "api_key_env": "gsk_aSecret123"}}, "the variable that it names is not set"),
        ({"judge": {"api_key_env": None, "organization_env": "NO_SUCH"}}, r"organization_env: \$NO_SUCH is not set"),
        ({"question_file": "none.jsonl"}, r"none\.jsonl: there is no such file"),
        ({"budget_usd": 1.0, "judge": {"api_key_env": None, "price": {"input": 1, "output": 1}},
          "reviewer_file": "bare.jsonl"}, r"judge\.max_tokens: missing; budget_usd needs it"),
        ({"anchors": "questions.jsonl"}, r"questions\.jsonl: line 1: `answer_1`: missing"),
        ({"reviewer_file": "sums.jsonl"}, "no reviewer for the category 'words', and none for 'general'"),
        ({"server": ""}, r"the checkpoint's answers are asked of a server; configure `server:`"),
    ],
)  # fmt: skip
def test_what_is_missing(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    lines(tmp_path / "bare.jsonl", [{"category": "general", "metadata": {"model": "judge-1"}}])
    lines(tmp_path / "sums.jsonl", [{"category": "sums", "metadata": {"model": "judge-1", "max_tokens": 9}}])
    with pytest.raises(ConfigError, match=says) as caught:
        evaluator(tmp_path, **settings).check()
    assert "\n" not in str(caught.value)


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluator(
            tmp_path, server="", question_file="none.jsonl", judge={"base_url": URL, "api_key_env": "NO_SUCH_KEY"}
        ).check()
    assert all(word in str(caught.value) for word in ("none.jsonl", "$NO_SUCH_KEY", "`server:`"))


def test_a_client_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"has no openai; run `.* -m pip install 'autoeval-hooks\[gpt\]'`"):
        evaluator(tmp_path).check()


# ---------------------------------------------------------------------- a checkpoint


def mine(body: Body) -> str:
    return f" mine {body['prompt'].split()[3]}"


def score(question: str, answer: str) -> float:
    """Questions 1 and 3 are won, 2 and 4 lost; anchors are tied."""
    number = question.split()[-1].strip("?.")
    return 9.0 if answer.startswith("mine") == (int(number) % 2 == 1) else 4.0


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge(lambda body: points(score, body)) as made:
        yield made


@pytest.fixture
def served() -> Iterator[JudgeStandIn]:
    with JudgeStandIn(mine) as made:
        yield made


class InProcess(Job):
    """Its worker is called, and not started: three starts of Python take longer than all that is tested here."""

    def run(self, argv: list[str], **options: Any) -> int:
        return worker.main(argv[3:]) if argv[2] == WORKER else super().run(argv, **options)


Make = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path, served: JudgeStandIn) -> Make:
    """A job for the checkpoint `name`; `starts` counts how often its server was wanted."""
    (tmp_path / "checkpoint").mkdir()
    made: list[Path] = []

    def make(name: str = "weights-1", starts: list[int] | None = None, **more: Any) -> Job:
        made.append(tmp_path / f"work-{len(made)}")
        made[-1].mkdir()

        def endpoint() -> Endpoint:
            (starts if starts is not None else []).append(1)
            return Endpoint(served.url.removesuffix("/v1"), "openai", name)

        options = {"endpoint": endpoint, "server_facts": {"server": "stand-in"}, "step": 7} | more
        path = tmp_path / "checkpoint"
        return InProcess(path, path, name, made[-1], tmp_path / "log", **options)

    return make


def told(evaluation: Evaluation) -> Evaluation:
    """Without what differs from one time to the next: how long it took."""
    return replace(evaluation, seconds=0.0)


def test_an_evaluation(tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn) -> None:
    """What it asks, its scores by hand, its files; and a second time nothing is asked, and the result is the same."""
    starts: list[int] = []
    files = {"answer_file": "a-{step}.jsonl", "result_file": "out/r-{model}.jsonl"}
    seen: list[tuple[float, str]] = []
    one = evaluator(tmp_path, judge.url, **files)
    one.check()
    assert judge.requests == judge.others == served.requests == []
    first = one.evaluate(job(starts=starts, progress=lambda *what: seen.append(what)))
    assert (len(served.requests), len(judge.requests), starts) == (4, 8 + 1 + 4, [1])
    scores = {(s.benchmark, s.metric): s.value for s in first.evaluation.scores}
    assert scores["questions", "win_rate"] == 0.5
    assert (scores["questions.sums", "win_rate"], scores["questions.words", "win_rate"]) == (1.0, 0.0)
    assert scores["questions", "score"] == (9 + 4) / 2
    assert scores["questions", "position_consistency"] == 1.0
    assert scores["questions", "unreviewed"] == 0.0
    assert scores["questions.judge_anchors", "win_rate"] == 0.5
    versions = first.evaluation.versions
    assert versions == {
        "server": "stand-in", "judge": "judge-1", "judge asked": "judge-1", "openai": versions["openai"],
        "structured outputs": "not asked for", "answers": "plain",
    }  # fmt: skip
    usage = first.evaluation.usage
    assert (usage["requests"], usage["cached"]) == (13, 0)
    assert usage["input_tokens"] == sum(spent[0] for spent in judge.spent)
    assert "cost_usd" not in usage
    assert [d.outcome for d in first.details] == ["win", "loss", "win", "loss"]
    assert {Path(name).name for name in first.evaluation.provenance} == {
        "questions.jsonl", "baseline.jsonl", "prompts.jsonl", "reviewers.jsonl", "anchors.jsonl",
        "prompts-pairwise.jsonl",
    }  # fmt: skip
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert seen[-1] == (1.0, "GPT: judged")
    answers = [json.loads(line) for line in (tmp_path / "a-7.jsonl").read_text().splitlines()]
    assert answers[0] == {"question_id": 1, "model_id": "weights-1", "text": "mine 1"}
    results = (tmp_path / "out" / "r-weights-1.jsonl").read_text().splitlines()
    assert json.loads(results[-1]) == {"weights-1": 6.5, "base": 6.5}

    second = evaluator(tmp_path, judge.url, **files).evaluate(job(starts=starts))
    assert (len(served.requests), len(judge.requests), starts) == (4, 13, [1])
    assert told(second.evaluation) == told(first.evaluation)
    assert (second.instances, second.details) == (first.instances, first.details)


def test_what_is_shared_is_asked_once_and_another_checkpoint_is_asked_anew(
    tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn
) -> None:
    one = evaluator(tmp_path, judge.url)
    one.evaluate(job())
    second = one.evaluate(job("weights-2"))
    assert (len(served.requests), len(judge.requests)) == (8, 13 + 8)
    assert (second.evaluation.usage["requests"], second.evaluation.usage["cached"]) == (8, 5)


@pytest.mark.parametrize("facts", [{}, {"server": "external"}])
def test_equal_weights_with_another_template_are_another_checkpoint(
    tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn, facts: dict[str, str]
) -> None:
    one = evaluator(tmp_path, judge.url)
    one.evaluate(job(digest="old", server_facts=facts))
    assert one._spec(job(digest="old")).evaluation != one._spec(job(digest="new")).evaluation
    served.reply = lambda body: f" other {body['prompt'].split()[3]}"
    outcome = one.evaluate(job(digest="new", server_facts=facts))
    assert (len(served.requests), len(judge.requests)) == (8, 13 + 8)
    shown = [dict(detail.texts)["Answer of the checkpoint"] for detail in outcome.details]
    assert shown == [f"other {i}" for i in range(1, 5)]
    one.evaluate(job(digest="old", server_facts=facts))
    assert (len(served.requests), len(judge.requests)) == (8, 13 + 8)


def test_what_an_external_server_answered_is_kept_once_it_was_looked_at_again(
    tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn
) -> None:
    """A swap that is seen then leaves nothing in the cache; without one, another attempt asks nothing."""
    one, external = evaluator(tmp_path, judge.url), {"server": "external"}

    def swapped() -> None:
        raise AutoEvalError("the server was swapped in mid-evaluation")

    with pytest.raises(AutoEvalError, match="was swapped"):
        one.evaluate(job(server_facts=external, release=swapped))
    assert (len(served.requests), len(judge.requests)) == (4, 5)
    assert not (tmp_path / "cache" / "gpt" / "weights-1").exists()
    starts: list[int] = []
    for _ in range(2):
        one.evaluate(job(starts=starts, server_facts=external))
        assert (len(served.requests), len(judge.requests), starts) == (4 + 4, 13, [1])
    write_files(tmp_path, [*QUESTIONS, Question(5, "What is 5 and 5?", "sums")])
    one.evaluate(job(server_facts=external))
    assert (len(served.requests), len(judge.requests)) == (4 + 4 + 1, 13 + 2)     # only what is new
    kept = sorted((tmp_path / "cache" / "gpt" / "weights-1").iterdir())
    assert all(path.suffix == ".jsonl" for path in kept)


def test_the_server_is_released_before_the_judge_is_asked(
    tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn
) -> None:
    """Also where it was not needed: an earlier evaluator may have had it started."""
    seen: list[tuple[int, int]] = []
    one = evaluator(tmp_path, judge.url)
    for _ in range(2):
        one.evaluate(job(release=lambda: seen.append((len(served.requests), len(judge.requests)))))
    assert seen == [(4, 5), (4, 13)]


def test_a_changed_file_is_another_result(tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn) -> None:
    one = evaluator(tmp_path, judge.url)
    first = one.evaluate(job())
    lines(tmp_path / "questions.jsonl", (
        {"question_id": q.id, "text": q.text if q.id != 2 else "What is it with 6?", "category": q.category}
        for q in QUESTIONS
    ))  # fmt: skip
    second = one.evaluate(job())
    changed = {name for name, was in second.evaluation.provenance.items() if first.evaluation.provenance[name] != was}
    assert changed == {str(tmp_path / "questions.jsonl")}
    assert (len(served.requests), len(judge.requests)) == (4 + 1, 13 + 2)


def test_a_file_that_changes_meanwhile(tmp_path: Path, job: Make, judge: Judge) -> None:
    def endpoint() -> Endpoint:
        (tmp_path / "prompts.jsonl").write_text((tmp_path / "prompts.jsonl").read_text() + "\n")
        return task.endpoint()  # type: ignore[misc]

    task = job()
    with pytest.raises(AutoEvalError, match="its files were changed while it was evaluated") as caught:
        evaluator(tmp_path, judge.url).evaluate(replace(job(), endpoint=endpoint))
    assert caught.value.kind == "transient"


def test_questions_that_change_before_the_review(tmp_path: Path, job: Make, judge: Judge) -> None:
    """Answers that are missing then are no mistake in the configuration; nor is a file that is gone."""
    one = evaluator(tmp_path, judge.url)
    for change in (
        lambda: write_files(tmp_path, [*QUESTIONS, Question(5, "What is 5 and 5?", "sums")]),
        lambda: (tmp_path / "questions.jsonl").unlink(),
    ):
        with pytest.raises(AutoEvalError, match="its files were changed while it was evaluated") as caught:
            one.evaluate(job(release=change))
        assert caught.value.kind == "transient"


def test_anchors_that_the_judge_cannot_answer_cost_nothing_else(
    tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn
) -> None:
    starts: list[int] = []
    judge.reply = lambda body: "8 9" if "ANSWER 1>>>" in str(body) else points(score, body)
    with pytest.raises(ConfigError, match=r"evaluators\[0\]\.anchors: none of the 2 anchor pairs was reviewed"):
        evaluator(tmp_path, judge.url).evaluate(job(starts=starts))
    assert (starts, served.requests) == ([], [])
    assert all("ANSWER 1>>>" in str(request.body) for request in judge.requests)
    evaluator(tmp_path, judge.url, anchors="none").evaluate(job())


def test_a_new_version_of_the_judge(tmp_path: Path, job: Make, judge: Judge) -> None:
    """The anchors are judged again, once, and the version is told. The new one likes the first answers."""
    one = evaluator(tmp_path, judge.url)
    judge.version = "judge-1-2026-01-01"
    before = one.evaluate(job())
    judge.version = "judge-1-2026-02-02"
    judge.reply = lambda body: points(lambda q, a: 9.5 if "Say" in q and a != "no" else score(q, a), body)
    served_again = [one.evaluate(job(name, server_facts={"server": name})) for name in ("weights-2", "weights-3")]
    assert len(judge.requests) == 13 + (8 + 4) + 8
    for after in served_again:
        assert after.evaluation.versions["judge"] == "judge-1-2026-02-02"
        anchors = [s.value for s in after.evaluation.scores if s.benchmark == "questions.judge_anchors"]
        assert anchors == [1.0]
    assert before.evaluation.versions["judge"] == "judge-1-2026-01-01"


def test_reviewers_by_category(tmp_path: Path, job: Make, judge: Judge) -> None:
    """Two models judge; the anchors, whose category the file does not know, go to one of them."""
    lines(tmp_path / "two.jsonl", (
        {"category": category, "metadata": {"model": model, "max_tokens": 256}}
        for category, model in (("sums", "judge-2"), ("words", "judge-1"))
    ))  # fmt: skip
    judge.models = ("judge-1", "judge-2")
    one = evaluator(tmp_path, judge.url, reviewer_file="two.jsonl")
    one.check()
    versions = one.evaluate(job()).evaluation.versions
    assert (versions["judge"], versions["judge asked"]) == ("judge-1 and judge-2", "judge-1 and judge-2")
    models = [r.body["model"] for r in judge.requests]
    assert (models.count("judge-1"), models.count("judge-2")) == (4, 4 + 5)


def test_without_anchors_there_is_no_score_of_them(tmp_path: Path, job: Make, judge: Judge) -> None:
    outcome = evaluator(tmp_path, judge.url, anchors="none").evaluate(job())
    assert not [s for s in outcome.evaluation.scores if "anchors" in s.benchmark]
    assert len(judge.requests) == 8


def test_a_baseline_of_an_api_model(tmp_path: Path, job: Make, judge: Judge) -> None:
    """It is asked once for all checkpoints, on the account of the one that came first."""
    with JudgeStandIn(lambda body: f"base {body['messages'][0]['content']}", models=["gpt"]) as api:
        baseline = {"model": "gpt", "base_url": api.url, "api_key_env": None, "price": {"input": 0, "output": 2}}
        settings = {"baseline_file": None, "baseline": baseline, "budget_usd": 1.0, "judge": {
            "base_url": judge.url, "api_key_env": None, "price": {"input": 1, "output": 1},
        }}  # fmt: skip
        one = evaluator(tmp_path, **settings)
        one.check()
        first, second = (one.evaluate(job(name)).evaluation for name in ("weights-1", "weights-2"))
        assert len(api.requests) == 4
        assert (first.usage["requests"], first.usage["cached"]) == (13 + 4, 0)
        assert (second.usage["requests"], second.usage["cached"]) == (8, 5 + 4)
        paid = sum(out for _, out in api.spent) * 2e-6 + sum(sum(both) for both in judge.spent[:13]) * 1e-6
        assert first.usage["cost_usd"] == pytest.approx(paid)
        assert second.usage["cost_usd"] == pytest.approx(sum(sum(both) for both in judge.spent[13:]) * 1e-6)
        assert {s.value for s in first.scores if (s.benchmark, s.metric) == ("questions", "win_rate")} == {0.5}
        baseline["model"] = "gpt-2"
        with pytest.raises(ConfigError, match=r"baseline\.model: .* lists no model 'gpt-2'; did you mean 'gpt'\?"):
            evaluator(tmp_path, **settings).evaluate(job("weights-3"))


@pytest.mark.parametrize("mode", ["single", "reference"])
def test_one_answer_alone(tmp_path: Path, job: Make, judge: Judge, mode: str) -> None:
    """With the package's own prompts; the anchors are still pairs."""
    judge.reply = lambda body: json.dumps({"explanation": "", "score": 7}) if "answer_1" not in str(body) and (
        "ANSWER 1" not in str(body)
    ) else points(score, body)  # fmt: skip
    one = evaluator(tmp_path, judge.url, mode=mode, baseline_file=None, prompt_file=None)
    questions = ({"question_id": q.id, "text": q.text, "category": q.category, "reference": "4"} for q in QUESTIONS)
    lines(tmp_path / "questions.jsonl", questions)
    outcome = one.evaluate(job())
    found = {(s.benchmark, s.metric): s.value for s in outcome.evaluation.scores}
    assert found["questions", "score"] == 7.0
    assert found["questions.judge_anchors", "win_rate"] == 0.5
    assert ("questions", "win_rate") not in found
    assert len(judge.requests) == 4 + 5
    assert [d.outcome for d in outcome.details] == ["7"] * 4
    assert outcome.evaluation.versions["structured outputs"] == "true"


# ---------------------------------------------------------------------- what goes wrong


def test_a_checkpoint_that_nothing_serves(tmp_path: Path, job: Make, judge: Judge) -> None:
    with pytest.raises(ConfigError, match=r"is served by nothing here; configure `server:`"):
        evaluator(tmp_path, judge.url).evaluate(replace(job(), endpoint=None))
    assert judge.requests == judge.others == []


def test_a_judge_that_is_not_there_costs_no_server(tmp_path: Path, job: Make) -> None:
    starts: list[int] = []
    settings = {"base_url": URL, "api_key_env": None, "attempts": 1}
    with pytest.raises(AutoEvalError, match=r"the judge at http://127\.0\.0\.1:9/v1") as caught:
        evaluator(tmp_path, judge=settings).evaluate(job(starts=starts))
    assert (caught.value.kind, starts) == ("transient", [])


def test_a_wrong_key_and_a_wrong_model_cost_nothing(
    tmp_path: Path, job: Make, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []
    judge.key = "sk-right-0123456789"
    monkeypatch.setenv("MY_KEY", "sk-wrong-9876543210")
    settings = {"base_url": judge.url, "api_key_env": "MY_KEY"}
    with pytest.raises(ConfigError, match=r"check the key in \$MY_KEY .*; log: ") as caught:
        evaluator(tmp_path, judge=settings).evaluate(job(starts=starts))
    monkeypatch.setenv("MY_KEY", judge.key)
    with pytest.raises(ConfigError, match=r"\]\.judge\.model: .* lists no model 'judge-2'; did you mean 'judge-1'\?"):
        evaluator(tmp_path, judge=settings | {"model": "judge-2"}).evaluate(job(starts=starts))
    assert (judge.requests, starts) == ([], [])
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any("0123456789" in text or "9876543210" in text for text in [*written, str(caught.value)])
    judge.models = None
    evaluator(tmp_path, judge=settings).evaluate(job())


def test_a_judge_that_lists_no_models_is_asked_once_before_the_checkpoint_is(
    tmp_path: Path, job: Make, judge: Judge, served: JudgeStandIn
) -> None:
    starts: list[int] = []
    judge.models = None
    tie = json.dumps({"explanation": "", "score_1": 5, "score_2": 5})
    judge.reply = lambda body: tie if "<<<QUESTION" in str(body) else points(score, body)
    wrong = {"base_url": judge.url.removesuffix("/v1"), "api_key_env": None}
    with pytest.raises(ConfigError, match="404"):
        evaluator(tmp_path, anchors="none", judge=wrong).evaluate(job(starts=starts))
    assert (starts, served.requests) == ([], [])
    for name in ("weights-1", "weights-2"):
        evaluator(tmp_path, judge.url, anchors="none").evaluate(job(name))
    assert len(judge.requests) == 1 + 8 + 8
    judge.models = ["judge-1"]
    evaluator(tmp_path, judge.url, anchors="none").evaluate(job("weights-3"))
    assert len(judge.requests) == 1 + 8 + 8 + 8


def test_too_much_that_was_not_reviewed(tmp_path: Path, job: Make, judge: Judge) -> None:
    """The files are there to look into; what was reviewed is kept."""
    judge.reply = lambda body: "No." if "2 and 2" in asked(body)[0] else points(score, body)
    one = evaluator(tmp_path, judge.url, result_file="{step}.jsonl")
    with pytest.raises(ConfigError, match=r"evaluators\[0\]\.max_unreviewed: 1 of 4 questions have no scores"):
        one.evaluate(job())
    assert json.loads((tmp_path / "7.jsonl").read_text().splitlines()[1])["score1"] is None
    asked_so_far = len(judge.requests)
    outcome = evaluator(tmp_path, judge.url, max_unreviewed=0.25).evaluate(job())
    assert len(judge.requests) == asked_so_far
    found = {(s.benchmark, s.metric): (s.value, s.n) for s in outcome.evaluation.scores}
    assert found["questions", "unreviewed"] == (0.25, 4)
    assert found["questions", "win_rate"] == (2 / 3, 3)
    assert [d.outcome for d in outcome.details] == ["win", "unreviewed", "win", "loss"]


def test_a_worker_that_dies(tmp_path: Path, job: Make, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "WORKER", "no.such.module")
    with pytest.raises(AutoEvalError, match=r"GPT evaluator's prepare failed: exit status 1: .*no.*; log: ") as caught:
        evaluator(tmp_path, judge.url).evaluate(job())
    assert caught.value.kind == "transient"


@pytest.mark.parametrize(
    ("kind", "is_"), [("configuration", ConfigError), ("checkpoint", CheckpointError), ("transient", AutoEvalError)]
)
def test_the_workers_error_is_ours(tmp_path: Path, kind: str, is_: type[AutoEvalError]) -> None:
    path = tmp_path / spec.ERROR
    assert spec.error_of(path) is None
    spec.write(path, spec.Failed(kind, "so it is"))
    error = spec.error_of(path)
    assert type(error) is is_
    assert str(error) == "so it is"


def test_the_last_whole_line_of_progress_counts(tmp_path: Path) -> None:
    path = tmp_path / spec.PROGRESS
    assert spec.last_progress(path) is None
    spec.tell(path, 0.25, "x")
    with path.open("a") as file:
        file.write('{"fraction": 0.5')
    assert spec.last_progress(path) == spec.Progress(0.25, "x")
    path.write_text("nonsense\n")
    assert spec.last_progress(path) is None


def test_an_outcome_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(AutoEvalError, match=r"left no outcome\.json"):
        spec.read_outcome(tmp_path / spec.OUTCOME)
    (tmp_path / spec.OUTCOME).write_text("{}")
    with pytest.raises(AutoEvalError, match="wrote what it does not read"):
        spec.read_outcome(tmp_path / spec.OUTCOME)


@pytest.mark.parametrize(
    ("config", "window"),
    [({"n_positions": 64}, 64), ({"text_config": {"max_position_embeddings": 8}}, 8), ({}, None), ([], None)],
)
def test_how_many_tokens_the_model_takes(tmp_path: Path, job: Make, config: Any, window: int | None) -> None:
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    assert _window(job()) == window
    assert _window(job(max_length=5, loadable=False)) == 5
    assert _window(job(loadable=False)) is None
