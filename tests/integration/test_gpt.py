"""Judged evaluations from ticket to result, by the real runner, its real children and the real client.

The judge is a stand-in on loopback. So is the checkpoint's server, but for the tests of `transformers serve`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from autoeval_hooks import manifest, submit
from autoeval_hooks.run_identity import RunIdentity
from eval_runner.cli import cli, main
from eval_runner.evaluators.gpt.files import read_questions
from eval_runner.evaluators.gpt.settings import built_in
from eval_runner.results import lines as lines_of_results
from eval_runner.results import store
from eval_runner.results.schema import Result as Record
from tests.gpt_lab import QUESTIONS, Judge, asked, entry, lines, points, write_files
from tests.judge_stand_in import Body, JudgeStandIn
from tests.processes import MARK, marked, wait_for

RUNNER = "from eval_runner.cli import main; main()"
ANCHORS = 1 + 4
"""Requests for two pairs: a first look, and both orders of each."""


def score(question: str, answer: str) -> float:
    """Questions 1 and 3 are won by the checkpoint, 2 and 4 lost; anchors are tied."""
    number = question.split()[-1].strip("?.")
    return 9.0 if answer.startswith("mine") == (number in ("1", "3")) else 4.0


def mine(body: Body) -> str:
    return f" mine {body['prompt'].split()[3]}\nQuestion: What else?"


@dataclass
class Lab:
    """A queue with its configuration, a judge, and a server that goes by the checkpoint's name."""

    directory: Path
    judge: Judge
    served: JudgeStandIn

    @property
    def file(self) -> Path:
        return self.directory / "autoeval.yaml"

    def configure(self, *entries: dict[str, Any], **sections: Any) -> None:
        content = {
            "queue": "queue", "suites": {"quick": {"evaluators": list(entries)}}, "sinks": [],
            "server": {"type": "external", "url": self.served.url},
            "runner": {"lease": 20.0, "max_attempts": 1},
        }  # fmt: skip
        self.file.write_text(yaml.safe_dump(content | sections, allow_unicode=True))

    def entry(self, **more: Any) -> dict[str, Any]:
        judge = {"base_url": self.judge.url, "api_key_env": None} | more.pop("judge", {})
        return entry("", **more) | {"judge": judge}

    def hand_over(self, path: Path, step: int = 10) -> None:
        found = manifest.build(str(path), path=str(path), step=step, run=RunIdentity("run"))
        self.served.models = [f"{path.name}-{found.weights_digest[:16]}"]
        submit(path, step=step, config=self.file)

    def invoke(self, *argv: str) -> Result:
        return CliRunner().invoke(cli, [argv[0], "--config", str(self.file), *argv[1:]], catch_exceptions=False)

    def run(self) -> Record:
        """The one result of a run that goes well."""
        found = self.invoke("run", "--drain")
        assert found.exit_code == 0, found.output
        return self.results()[-1]

    def results(self) -> list[Record]:
        return sorted(store.collect(self.directory / "queue").results, key=lambda r: r.finished_at)

    def failure(self) -> str:
        """Why the one ticket of a run failed."""
        assert self.invoke("run", "--drain").exit_code == 1
        (found,) = store.collect(self.directory / "queue").failed
        return f"{found.failure.kind}: {found.failure.message}"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    mark = uuid.uuid4().hex
    for name, value in {MARK: mark, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("eval_runner.servers.shared.SETTLE_S", 0.2)
    write_files(tmp_path)
    with Judge(lambda body: points(score, body)) as judge, JudgeStandIn(mine) as served:
        yield Lab(tmp_path, judge, served)
    wait_for(lambda: marked(mark) == [])


def about(question: int) -> Callable[[Body], bool]:
    """Whether the judge is asked about this question."""
    return lambda body: bool(body) and f"{question} and {question}" in asked(body)[0]


def repeated(lab: Lab) -> list[str]:
    """What was asked more than once; the judge's first look is at a pair that it is shown again later."""
    counts = lab.judge.counts + lab.served.counts
    counts[lab.judge.requests[0].content] -= 1
    return [content for content, n in counts.items() for _ in range(n - 1)]


def values(result: Record) -> dict[tuple[str, str], float]:
    return {(s.benchmark, s.metric): s.value for s in result.scores}


# ---------------------------------------------------------------------- the real server


@pytest.mark.slow
def test_with_transformers_serve_in_japanese_and_by_a_chat_template(lab: Lab) -> None:
    """Our Japanese set as a plain prompt would be; a file of questions as a chat. One server answers both, and what the
    win rates are is counted from what the judge was shown."""
    from tests.integration.test_transformers_server import tiny_llama

    questions = read_questions(built_in("general-ja.jsonl"), "pairwise")
    lines(lab.directory / "ja.jsonl", (
        {"question_id": q.id, "model_id": "基準", "text": "わかりません。"} for q in questions
    ))  # fmt: skip
    lab.judge.reply = lambda body: points(lambda q, a: 1.0 + len(a) % 9, body)
    japanese = {
        "type": "gpt", "questions": "general-ja", "baseline_file": "ja.jsonl",
        "answers": {"max_tokens": 8, "format": "plain"}, "result_file": "ja-{step}.jsonl",
        "judge": {"base_url": lab.judge.url, "api_key_env": None, "model": "judge-1"},
    }  # fmt: skip
    lab.configure(japanese, {"type": "gpt"} | lab.entry(answer_file="{step}.jsonl"), server={"type": "transformers"})
    path = tiny_llama(lab.directory / "out" / "checkpoint-10", 1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))   # Japanese is long here
    lab.hand_over(path)
    result = lab.run()
    found = values(result)
    written = [json.loads(line) for line in (lab.directory / "ja-10.jsonl").read_text().splitlines()[:-1]]
    assert [one["question_id"] for one in written] == [q.id for q in questions]
    wins = [(a > b) + 0.5 * (a == b) for one in written for a, b in [one["score1"], one["score2"][::-1]]]
    assert found["general-ja", "win_rate"] == pytest.approx(sum(wins) / 80, abs=1e-12)
    assert len({one["score1"][0] for one in written}) > 1       # the model says something
    assert found["general-ja", "position_consistency"] == 1.0
    (first, second) = result.evaluations
    assert (first.versions["answers"], second.versions["answers"]) == ("plain", "chat")
    assert first.versions["server"] == "transformers"
    assert first.versions["structured outputs"] == "true"
    assert first.usage["requests"] == 80 + 1 + 32
    shown = [r.body["messages"][-1]["content"] for r in lab.judge.requests]
    assert all(any(q.text in text for text in shown) for q in questions)
    answers = [json.loads(line)["text"] for line in (lab.directory / "10.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    (log,) = (lab.directory / "queue" / "logs").glob("*.server.log")
    posts = [line.split('"')[1].split()[1] for line in log.read_text().splitlines() if '"POST' in line]
    assert (posts.count("/v1/completions"), posts.count("/v1/chat/completions")) == (40 + 1, 4)      # 1: its probe
    details = {(d.benchmark, d.id): d for d in lines_of_results.details(store.path_of(lab.directory / "queue", result))}
    assert len(details) == 40 + 4
    assert dict(details["general-ja", str(questions[0].id)].texts)["Baseline (基準)"] == "わかりません。"


# ---------------------------------------------------------------------- faults of the judge


def test_faults_that_pass_change_no_score(lab: Lab, checkpoint: Callable[..., Path]) -> None:
    """A limit, an error of the server, a timeout, a cut and an unreadable body: each reply that counts came whole."""
    lab.configure({"type": "gpt"} | lab.entry(judge={"timeout": 1.0, "concurrency": 2}))
    lab.hand_over(checkpoint(10))
    lab.judge.fault("429", times=2, headers={"Retry-After": "0"}, when=bool)
    for i, kind in enumerate(("500", "cut", "invalid", "reset"), 1):
        lab.judge.fault(kind, when=about(i))
    lab.judge.fault("timeout", seconds=3.0, when=about(1))
    lab.served.fault("500", when=bool)
    result = lab.run()
    found = values(result)
    assert (found["questions", "win_rate"], found["questions", "unreviewed"]) == (0.5, 0.0)
    assert (found["questions.sums", "win_rate"], found["questions.words", "win_rate"]) == (1.0, 0.0)
    assert found["questions.judge_anchors", "win_rate"] == 0.5
    assert len(lab.judge.requests) == 8 + ANCHORS + 7
    assert len(lab.served.requests) == 4 + 1
    (evaluation,) = result.evaluations
    assert evaluation.usage["requests"] == 8 + ANCHORS


def test_a_fault_that_stays_fails_the_ticket(lab: Lab, checkpoint: Callable[..., Path]) -> None:
    """In mid-review, with the right reason; what was answered before is not asked again, and a refusal is no score."""
    lab.configure({"type": "gpt"} | lab.entry(judge={"concurrency": 1}, max_unreviewed=0.25))
    lab.hand_over(checkpoint(10))
    lab.judge.fault("wrong model", when=about(4))
    assert "configuration: the judge was asked for the model 'judge-1' and answers as 'another-model'" in lab.failure()
    lab.judge.fault("refusal", times=2, when=about(4))
    lab.invoke("retry", "--all")
    found = values(lab.run())
    assert (found["questions", "unreviewed"], found["questions", "win_rate"]) == (0.25, 2 / 3)
    (again,) = repeated(lab)
    assert "4 and 4" in again       # the one that failed


def test_a_budget_stops_before_it_is_passed_and_goes_on_where_it_stopped(
    lab: Lab, checkpoint: Callable[..., Path]
) -> None:
    price = {"price": {"input": 10.0, "output": 100.0}, "concurrency": 1}
    lab.judge.tokens = lambda body, text: (200, 50)      # 0.007 USD; at most 0.065 of a pair of anchors, 0.035 of ours
    lab.configure({"type": "gpt"} | lab.entry(judge=price, budget_usd=0.1))
    lab.hand_over(checkpoint(10))
    why = lab.failure()
    assert why.startswith("configuration: suites.quick.evaluators[0].budget_usd: 0.1 USD are not enough: ")
    assert "Nothing is lost" in why
    before = len(lab.judge.requests)
    assert ANCHORS < before < 8 + ANCHORS
    assert before * 0.007 <= 0.1
    lab.configure({"type": "gpt"} | lab.entry(judge=price, budget_usd=0.2))
    lab.invoke("retry", "--all")
    (evaluation,) = lab.run().evaluations
    assert repeated(lab) == []
    assert len(lab.judge.requests) == 8 + ANCHORS
    assert evaluation.usage["cost_usd"] == pytest.approx(0.007 * (8 + ANCHORS))
    assert (evaluation.usage["requests"], evaluation.usage["cached"]) == (8 + ANCHORS, 0)


# ---------------------------------------------------------------------- killed anywhere


@pytest.mark.slow
def test_a_runner_that_is_ended_at_random_repeats_nothing_that_was_finished(
    lab: Lab, checkpoint: Callable[..., Path]
) -> None:
    """By SIGKILL or SIGTERM, again and again, until one gets through. One request is in flight at a time, to the judge
    or the checkpoint's server: as many may be asked twice as runners were ended, and no more, but for the answers of
    an external server that nobody looked at again."""
    calm = lab.entry(judge={"concurrency": 1}, answers={"max_tokens": 16, "concurrency": 1})
    lab.configure({"type": "gpt"} | calm, runner={"lease": 2.0, "max_attempts": 50})
    lab.hand_over(checkpoint(10))
    lab.judge.delay = lab.served.delay = 0.1
    chance = random.Random(5)
    argv = [sys.executable, "-c", RUNNER, "run", "--drain", "--config", str(lab.file)]
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        before, wanted = total(lab), chance.randint(2, 5)
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runner:
            try:
                wait_for(lambda: total(lab) >= before + wanted, 120)    # noqa: B023  # called at once
                time.sleep(chance.uniform(0, 0.1))
                assert runner.poll() is None
            finally:
                runner.send_signal(how)
    assert lab.results() == []
    result = lab.run()
    attempts = len(list((lab.directory / "queue" / "logs").glob("*-gpt.log")))
    assert attempts >= 4
    again = repeated(lab)
    assert sum(content in lab.judge.counts for content in again) <= attempts - 1
    assert max(lab.served.counts.values()) <= attempts      # not kept before its server was looked at again
    assert len(lab.judge.counts + lab.served.counts) == 4 + 8 + ANCHORS - 1
    found = values(result)
    assert (found["questions", "win_rate"], found["questions.judge_anchors", "win_rate"]) == (0.5, 0.5)
    (evaluation,) = result.evaluations
    assert evaluation.usage["requests"] == 8 + ANCHORS


def total(lab: Lab) -> int:
    return len(lab.judge.requests) + len(lab.served.requests)


# ---------------------------------------------------------------------- before anything is asked


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"judge": {"api_key_env": "NO_SUCH_KEY"}}, "$NO_SUCH_KEY is not set"),
        ({"judge": {"base_url": "127.0.0.1/v1"}}, "judge.base_url: expected a URL such as"),
        ({"prompt_file": "sums.jsonl"}, "no prompt for the category 'words', and none for 'general'"),
        ({"prompt_file": "odd.jsonl"}, "odd.jsonl"),
        ({"question_file": "twice.jsonl"}, "twice.jsonl: line 2: `question_id`: '1' stands in line 1, too"),
        ({"question_file": "shift.jsonl"}, "shift.jsonl: line 1: is not UTF-8"),
        ({"baseline_file": "empty.jsonl"}, "empty.jsonl: every answer is empty"),
        ({"openai_api_key": "sk-0123456789"}, "openai_api_key"),
        ({"server": None}, "configure `server:`"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked(
    lab: Lab, change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = json.loads((lab.directory / "prompts.jsonl").read_text())
    lines(lab.directory / "sums.jsonl", [prompt | {"category": "sums"}])
    lines(lab.directory / "odd.jsonl", [prompt | {"prompt_template": prompt["prompt_template"] + "{weather}"}])
    lines(lab.directory / "twice.jsonl", [{"question_id": i, "text": "?", "category": "x"} for i in (1, "1")])
    lines(lab.directory / "empty.jsonl", (
        {"question_id": q.id, "model_id": "base", "text": " "} for q in QUESTIONS
    ))  # fmt: skip
    text = '{"question_id": 1, "text": "日本の首都はどこですか。", "category": "x"}\n'
    (lab.directory / "shift.jsonl").write_bytes(text.encode("cp932"))
    sections = {"server": None} if "server" in change else {}
    lab.configure({"type": "gpt"} | lab.entry(**{k: v for k, v in change.items() if k != "server"}), **sections)
    monkeypatch.setattr(sys, "argv", ["autoeval-runner", "run", "--drain", "--config", str(lab.file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert says in told
    assert [lab.judge.requests, lab.judge.others, lab.served.requests, lab.served.others] == [[], [], [], []]
    assert not os.path.exists(lab.directory / "queue" / "cache")


def test_a_judge_that_is_not_there_starts_no_server(lab: Lab, checkpoint: Callable[..., Path]) -> None:
    lab.configure({"type": "gpt"} | lab.entry(judge={"base_url": "http://127.0.0.1:9/v1", "attempts": 1}))
    lab.hand_over(checkpoint(10))
    assert lab.failure().startswith("transient: the judge at http://127.0.0.1:9/v1: no answer after 1 attempts: ")
    assert lab.served.others == lab.served.requests == []
