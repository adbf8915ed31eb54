"""The older watcher's YAML with a judge, as it is, key in clear: from the directory to the scores, and to the files for
each step. The judge is a stand-in on loopback that wants the key; so is the checkpoints' server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks import manifest
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import config as configs
from eval_runner import registry, secrets
from eval_runner.cli import cli
from eval_runner.results import store
from tests.gpt_lab import QUESTIONS, Judge, points, write_files
from tests.judge_stand_in import Body, JudgeStandIn
from tests.older_yaml import documented, write
from tests.unit.test_watch import huggingface

KEY = "plain-key-of-a-user-0123456789"
ORGANIZATION = "org-of-ours"
STEPS = (10, 20)
WATCH = "watch --eval-type gpt --begin-iteration 10 --iteration-interval 10 --end-iteration 20 --check-iterval 0.2s"


def score(question: str, answer: str) -> float:
    """Questions 1 and 3 are won by checkpoints, 2 and 4 lost; anchors are tied."""
    number = question.split()[-1].strip("?.")
    return 9.0 if answer.startswith("mine") == (number in ("1", "3")) else 4.0


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge(lambda body: points(score, body), key=KEY) as judge:
        yield judge


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeStandIn]:
    """In the place of `transformers serve`, which an older file with `huggingface` stands for."""
    def answer(body: Body) -> str:
        return f" mine {body['prompt'].split()[3]}\nQuestion: What else?"

    with JudgeStandIn(answer) as stand_in:
        real = registry.build_server

        def external(config: configs.Config) -> Any:
            assert config.server == {"type": "transformers"}
            return real(replace(config, server={"type": "external", "url": stand_in.url}))

        monkeypatch.setattr(registry, "build_server", external)
        yield stand_in


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge, served: JudgeStandIn) -> Iterator[Path]:
    """The file, which its owner alone can read. `helm` stands in it, too, and nothing that it names is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    write_files(tmp_path)
    gpt = {
        "question_file": "questions.jsonl", "baseline_file": "baseline.jsonl", "prompt_file": "prompts.jsonl",
        "reviewer_file": "reviewers.jsonl", "max_retry": 2, "openai_api_key": KEY, "openai_organization": ORGANIZATION,
    }  # fmt: skip
    sections: dict[str, Any] = {"huggingface": {"checkpoint_path": "out"}, "gpt_evaluation": gpt}
    file = write(tmp_path, documented(megatron=None, wandb=None, **sections))
    file.chmod(0o600)
    served.models = []
    for step in STEPS:
        path = huggingface(tmp_path / "out", step)
        (path / "config.json").write_text('{"max_position_embeddings": 2048}')
        found = manifest.build(str(path), path=str(path), step=step, run=RunIdentity("run"))
        served.models.append(f"{path.name}-{found.weights_digest[:16]}")
    yield file
    secrets.hold({}, {}, ())
    secrets._hidden.discard(KEY)


def call(command: str, status: int = 0) -> str:
    """What the command says."""
    done = CliRunner().invoke(cli, [*command.split(), "--config", "old.yaml"], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


def places_of_the_key(older: Path) -> list[Path]:
    files = [path for path in older.parent.rglob("*") if path.is_file() and path != older]
    assert len(files) > 20
    return [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_from_the_directory_to_scores_and_files(older: Path, judge: Judge, served: JudgeStandIn) -> None:
    here = older.parent
    said = call(WATCH) + call("run --drain --eval-type gpt --verbose") + call("status") + call("report --out report")

    results = sorted(store.collect(here / "cache/autoeval").results, key=lambda result: result.step)
    assert [(r.step, r.run.name, r.suite) for r in results] == [(s, "proj-tiny", "gpt") for s in STEPS]
    for result in results:
        assert {(s.benchmark, s.metric): s.value for s in result.scores}["questions", "win_rate"] == 0.5
    for step in STEPS:
        answers = [json.loads(x) for x in (here / f"answers/answer-{step}.jsonl").read_text().splitlines()]
        assert [(a["question_id"], a["text"]) for a in answers] == [(q.id, f"mine {q.id}") for q in QUESTIONS]
        reviews = (here / f"reviews/result-{step}.jsonl").read_text().splitlines()
        assert len(reviews) >= len(QUESTIONS)

    headers = [request.headers for request in judge.requests]
    assert {(h["authorization"], h["openai-organization"]) for h in headers} == {(f"Bearer {KEY}", ORGANIZATION)}
    assert not any(KEY in text for request in served.requests for text in request.headers.values())
    assert KEY not in said
    assert places_of_the_key(older) == []


def test_a_judge_that_refuses_the_key_and_says_it_again(older: Path, judge: Judge) -> None:
    judge.key = "another"
    said = call(WATCH) + call("run --drain --eval-type gpt --verbose", status=1) + call("status")
    assert "the key in $AUTOEVAL_JUDGE_API_KEY" in said
    failed = store.collect(older.parent / "cache/autoeval").failed
    assert [f.failure and f.failure.kind for f in failed] == ["configuration"] * len(STEPS)
    assert KEY in judge.others[0].headers["authorization"]      # it was sent, and the refusal quotes it
    assert KEY not in said
    assert places_of_the_key(older) == []
