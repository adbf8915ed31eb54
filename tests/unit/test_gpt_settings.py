"""The settings of a GPT entry: what is refused, and what they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.evaluators.base import Context
from eval_runner.evaluators.gpt.settings import SETS, built_in, locate, output_path, parse

PAIR: dict[str, Any] = {"questions": "general-en", "baseline_file": "baseline.jsonl"}
MODEL: dict[str, Any] = {"questions": "general-en", "baseline": {"model": "large"}}
PRICE = {"input": 1, "output": 2.5}


@pytest.fixture(autouse=True)
def no_base_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tmp_path / "envs", "suites.quick.evaluators[0]", "autoeval.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PAIR | {"question_files": "q.jsonl"}, "question_files: unknown key; did you mean 'question_file'"),
        (PAIR | {"judge": {"modell": "m"}}, r"judge\.modell: unknown key; did you mean 'model'"),
        (PAIR | {"judge": "gpt"}, "judge: expected a mapping, found 'gpt'"),
        (PAIR | {"answers": {"max_tokens": "512"}}, r"answers\.max_tokens: expected a whole number, found '512'"),
        (PAIR | {"answers": {"max_tokens": 0}}, r"answers\.max_tokens: must be 1 or more"),
        (PAIR | {"answers": {"temperature": 2.5}}, r"answers\.temperature: must be from 0 to 2"),
        (PAIR | {"answers": {"concurrency": 0}}, r"answers\.concurrency: must be from 1 to 1000"),
        (PAIR | {"answers": {"timeout": 0}}, r"answers\.timeout: must be more than 0 seconds"),
        (PAIR | {"answers": {"format": "raw"}}, r"answers\.format: 'raw' is not one of 'auto', 'chat', 'plain'"),
        (PAIR | {"answers": {"template": "Answer:"}}, r"answers\.template: must have \{question\}"),
        (PAIR | {"answers": {"stop": ["\n", ""]}}, r"answers\.stop: an empty text would stop every answer"),
        (PAIR | {"judge": {"model": " m"}}, r"judge\.model: expected the name of a model"),
        (PAIR | {"judge": {"model": ""}}, r"judge\.model: expected the name of a model"),
        (PAIR | {"judge": {"temperature": -0.1}}, r"judge\.temperature: must be from 0 to 2"),
        (PAIR | {"judge": {"attempts": 0}}, r"judge\.attempts: must be from 1 to 100"),
        (PAIR | {"judge": {"requests_per_minute": 0}}, r"judge\.requests_per_minute: must be more than 0"),
        (PAIR | {"judge": {"tokens_per_minute": -1}}, r"judge\.tokens_per_minute: must be more than 0"),
        (PAIR | {"judge": {"price": {"input": 1}}}, r"judge\.price\.output: missing"),
        (PAIR | {"judge": {"price": {"input": -1, "output": 1}}}, r"judge\.price\.input: must be 0 or more"),
        (PAIR | {"judge": {"structured": "yes"}}, r"judge\.structured: 'yes' is not one of"),
        (PAIR | {"judge": {"temperature": 0.1, "omit": ["temperature"]}}, r"judge\.temperature: stands in `omit`, too"),
        (PAIR | {"max_unreviewed": 1.5}, "max_unreviewed: must be from 0 to 1"),
        (PAIR | {"budget_usd": 0, "judge": {"price": PRICE}}, "budget_usd: must be more than 0"),
        (PAIR | {"budget_usd": 2}, r"judge\.price: missing; budget_usd needs it"),
        (MODEL | {"budget_usd": 2, "judge": {"price": PRICE}}, r"baseline\.price: missing; budget_usd needs it"),
        (PAIR | {"questions": "general-fr"}, "no built-in set 'general-fr'; did you mean 'general-"),
        (PAIR | {"question_file": "q.jsonl"}, "give either `questions` .* or `question_file`"),
        ({"baseline_file": "b.jsonl"}, "give either `questions` .* or `question_file`"),
        ({"questions": "general-en"}, "mode 'pairwise' needs either `baseline_file` or `baseline`"),
        (PAIR | MODEL, "mode 'pairwise' needs either `baseline_file` or `baseline`"),
        (PAIR | {"mode": "single"}, "mode 'single' has no baseline"),
        (MODEL | {"mode": "reference"}, "mode 'reference' has no baseline"),
        (PAIR | {"mode": "double"}, "mode: 'double' is not one of 'pairwise'"),
        (PAIR | {"baseline_file": ""}, "baseline_file: expected a path"),
        (PAIR | {"name": "質問"}, "name: '質問' has no letter or digit"),
        ({"question_file": "質問.jsonl", "mode": "single"}, "name: '質問' has no letter or digit"),
        (PAIR | {"answer_file": "{sept}/{step}.jsonl"}, r"answer_file: .* only {step} and {model} may stand in braces"),
        (PAIR | {"result_file": "r/{step.jsonl"}, r"result_file: .* only {step} and {model} may stand in braces"),
        (PAIR | {"result_file": "r.jsonl"}, r"result_file: .* put {step} or {model} into it"),
        (PAIR | {"answer_file": "{step}.jsonl", "result_file": "{step}.jsonl"}, "result_file: is the answer_file, too"),
        (PAIR | {"judge": {"base_url": "api.example.com/v1"}}, r"judge\.base_url: expected a URL such as https://"),
        (PAIR | {"judge": {"base_url": "https://host:port/v1"}}, r"judge\.base_url: expected a URL such as"),
        (PAIR | {"judge": {"base_url": "https:///v1"}}, r"judge\.base_url: expected a URL such as"),
        (PAIR | {"judge": {"base_url": "https://a b/v1"}}, r"judge\.base_url: expected a URL such as"),
        (PAIR | {"judge": {"base_url": "https://a/v1/chat/completions"}}, "base_url: is one of the API's paths"),
        (MODEL | {"baseline": {"model": "m", "base_url": "ftp://a"}}, r"baseline\.base_url: expected a URL such as"),
        (MODEL | {"baseline": {"max_tokens": 5}}, r"baseline\.model: missing"),
        (MODEL | {"baseline": {"model": "m", "attempts": 0}}, r"baseline\.attempts: must be from 1 to 100"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(context: Context, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(settings, context)
    assert str(caught.value).startswith("autoeval.yaml: suites.quick.evaluators[0]")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"openai_api_key": "sk-0123456789abcdef"}, "write `judge.api_key_env: NAME"),
        ({"openai_organization": "sk-0123456789abcdef"}, "write `judge.organization_env: NAME"),
        ({"judge": {"openai_api_key": "sk-0123456789abcdef"}}, r"judge\.openai_api_key: .* write `api_key_env: NAME"),
        ({"judge": {"api_key": "sk-0123456789abcdef"}}, r"judge\.api_key: unknown key; did you mean 'api_key_env'"),
        ({"judge": {"api_key_env": "sk-0123456789abcdef"}}, "expected the name of an environment variable, no key"),
        ({"judge": {"organization_env": "sk-0123456789abcdef"}}, "expected the name of an environment variable"),
        ({"judge": {"base_url": "https://me:sk-0123456789abcdef@host/v1"}}, "a user, a password"),
        ({"judge": {"base_url": "https://host/v1?api-key=sk-0123456789abcdef"}}, "a user, a password"),
    ],
)
def test_no_secret_stands_in_the_settings_and_none_is_shown(
    context: Context, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(PAIR | settings, context)
    assert "0123456789" not in str(caught.value)
    assert "known:" not in str(caught.value)


def test_all_errors_are_told_at_once(context: Context) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"max_unreviewed": -1, "judge": {"base_url": "x", "attempts": 0}, "openai_api_key": "k"}, context)
    for part in ("max_unreviewed", "base_url", "attempts", "question_file", "baseline_file", "openai_api_key"):
        assert part in str(caught.value)


def test_defaults(context: Context) -> None:
    settings = parse(PAIR, context)
    assert settings == parse(dict(PAIR), context)
    assert (settings.name, settings.mode, settings.max_unreviewed) == ("general-en", "pairwise", 0.1)
    assert (settings.answers.max_tokens, settings.answers.temperature) == (512, 0.0)
    judge = settings.judge
    assert (judge.base_url, judge.api_key_env, judge.omit) == ("https://api.openai.com/v1", "OPENAI_API_KEY", ())
    assert (judge.model, judge.temperature, judge.structured) == (None, None, "auto")


def test_null_is_what_is_not_sent_and_true_is_a_word(context: Context) -> None:
    written = PAIR | {"judge": {"temperature": None, "max_tokens": 9, "structured": False, "api_key_env": None}}
    judge = parse(written, context).judge
    assert (judge.temperature, judge.max_tokens, judge.omit) == (None, 9, ("temperature",))
    assert (judge.structured, judge.api_key_env) == ("false", None)
    assert written["judge"] == {"temperature": None, "max_tokens": 9, "structured": False, "api_key_env": None}
    assert parse(PAIR | {"judge": {"structured": True}}, context).judge.structured == "true"


def test_a_base_url_is_the_written_one_else_that_of_the_environment(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1/")
    settings = parse(MODEL | {"judge": {"base_url": "https://judge.example/v1//"}}, context)
    assert settings.judge.base_url == "https://judge.example/v1"
    assert settings.baseline
    assert settings.baseline.base_url == "http://127.0.0.1:8000/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(ConfigError, match=r"judge\.base_url \(\$OPENAI_BASE_URL\): expected a URL"):
        parse(PAIR, context)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"questions": "general-ja"}, "general-ja"),
        ({"question_file": "sub/our questions.v2.jsonl"}, "our_questions.v2"),
        ({"question_file": "質問.jsonl", "name": "shitsumon"}, "shitsumon"),
    ],
)
def test_names(context: Context, settings: dict[str, Any], name: str) -> None:
    assert parse(settings | {"baseline_file": "b"}, context).name == name


def test_where_the_files_are(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    ours = locate(parse(MODEL | {"questions": "general-ko"}, context), context)
    assert (ours.questions, ours.prompts) == (built_in("general-ko.jsonl"), built_in("prompts-pairwise.jsonl"))
    assert (ours.reviewers, ours.anchors) == (built_in("reviewers.jsonl"), built_in("anchors.jsonl"))
    assert ours.baseline is None
    theirs = locate(parse({
        "question_file": "q.jsonl", "baseline_file": "~/b.jsonl", "prompt_file": "/p.jsonl",
        "reviewer_file": "x/r.jsonl", "anchors": "a.jsonl",
    }, context), context)  # fmt: skip
    assert (theirs.questions, theirs.baseline) == (tmp_path / "q.jsonl", Path("/home/someone/b.jsonl"))
    assert (theirs.prompts, theirs.reviewers) == (Path("/p.jsonl"), tmp_path / "x/r.jsonl")
    assert theirs.anchors == tmp_path / "a.jsonl"
    single = locate(parse({"questions": "general-en", "mode": "single", "anchors": "none"}, context), context)
    assert (single.prompts, single.anchors) == (built_in("prompts-single.jsonl"), None)


def test_the_built_in_files_are_in_the_package(context: Context) -> None:
    for name in SETS:
        for mode in ("pairwise", "single", "reference"):
            entry: dict[str, Any] = {"questions": name, "mode": mode}
            found = locate(parse(entry | ({"baseline_file": "b"} if mode == "pairwise" else {}), context), context)
            for path in (found.questions, found.prompts, found.reviewers, found.anchors):
                assert path
                assert path.is_file(), path


def test_a_home_that_is_not_there(context: Context) -> None:
    settings = parse(PAIR | {"prompt_file": "~no-such-user-at-all/p.jsonl"}, context)
    with pytest.raises(ConfigError, match=r"evaluators\[0\]\.prompt_file: ~no-such.*no such home directory"):
        locate(settings, context)


def test_an_output_is_one_of_each_checkpoint_and_stays_in_its_place(context: Context, tmp_path: Path) -> None:
    assert output_path("out/{step}/{model}.jsonl", context, step=7, model="run/../{step}") == (
        tmp_path / "out/7/run_.._step.jsonl"
    )
