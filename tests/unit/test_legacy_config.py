"""The older watcher's YAML, as documented, stands for one configuration of ours; what does not fit is told by its own
key paths, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks import config as hook_config
from autoeval_hooks.errors import ConfigError
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.cli.validate import dump
from eval_runner.config import legacy
from eval_runner.config.loader import effective
from eval_runner.config.narrowed import narrowed
from tests.older_yaml import documented, files, write

Load = Any


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    return tmp_path


def read(here: Path, **sections: Any) -> legacy.Older:
    found = legacy.read(write(here, documented(**sections)))
    assert found is not None
    return found


def errors(here: Path, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configs.load(path := write(here, documented(**sections)))
    found = [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]
    return found[1:] if len(found) > 1 else found


def test_the_documented_example(here: Path) -> None:
    at = str(here)
    assert read(here).raw == {
        "queue": f"{at}/cache/autoeval",
        "run": {"name": "proj-tiny", "project": "scores", "tokens_per_step": 4194304},
        "suites": {
            "helm": {"evaluators": [{
                "type": "helm", "entries_file": f"{at}/spec.conf", "max_instances": 100,
                "output_path": f"{at}/helm_output", "output_suite": "proj-tiny", "env": "conda:helm-env",
            }]},
            "gpt": {"evaluators": [{
                "type": "gpt", "question_file": f"{at}/question.jsonl", "baseline_file": f"{at}/baseline.jsonl",
                "prompt_file": f"{at}/prompt.jsonl", "reviewer_file": f"{at}/reviewer.jsonl",
                "answer_file": f"{at}/answers/answer-{{step}}.jsonl",
                "result_file": f"{at}/reviews/result-{{step}}.jsonl", "answers": {"max_tokens": 256},
            }]},
        },
        "runner": {"order": "oldest", "allow_pickled_weights": True},
        "server": {"type": "megatron", "checkout": f"{at}/Megatron-LM"},
        "sinks": [{"type": "wandb", "late": "companion", "base_url": "https://wandb.example"}],
    }  # fmt: skip


def test_every_plugin_takes_what_it_is_given(here: Path) -> None:
    files(here)
    config = configs.load(write(here, documented()))
    assert config.queue == here / "cache" / "autoeval"
    assert {n: registry.build_evaluators(config, s) for n, s in config.suites.items()}.keys() == {"helm", "gpt"}
    assert registry.build_server(config) is not None
    assert len(registry.build_sinks(config)) == 1
    assert effective(config)["runner"]["order"] == "oldest"
    assert "checkout:" in dump(effective(config))


def test_all_that_is_optional_is_left_out(here: Path) -> None:
    older = read(
        here, cache_dir=None, gpt_evaluation=None, wandb=None,
        helm={"helm_env_name": None, "eval_instances": 7, "benchmarks": [{"name": "mmlu", "metrics": ["EM"]}]},
        megatron={"megatron_home": None, "token_per_iteration": 0, "port": 5000, "log_path": "m.log", "max_tokens": 9},
    )  # fmt: skip
    assert older.raw["queue"] == f"{here}/cache/autoeval"
    assert older.raw["run"] == {"name": "proj-tiny", "project": "proj"}
    assert "env" not in older.raw["suites"]["helm"]["evaluators"][0]
    assert older.raw["suites"]["helm"]["evaluators"][0]["max_instances"] == 7
    assert older.raw["server"]["checkout"] == str(here)
    assert older.raw["sinks"] == []
    said = "\n".join(older.notes)
    assert all(key in said for key in ("megatron.port", "log_path", "helm_env_name", "benchmarks", "pickles"))


def test_sentencepiece_needs_a_layout_of_it(here: Path) -> None:
    older = read(here, megatron={"tokenizer_type": "sentencepiece", "tokenizer_path": "t.model"})
    assert older.tokenizer == older.raw["run"]["tokenizer"] == f"{here}/cache/tokenizer"
    assert older.files["auto_eval.megatron.tokenizer_path"] == f"{here}/t.model"
    assert "auto_eval.megatron.vocab_path" not in older.files


def test_hugging_face_is_ours(here: Path) -> None:
    older = read(here, megatron=None, huggingface={"checkpoint_path": "out", "tokenizer_path": "~/tok"})
    assert older.raw["server"] == {"type": "transformers"}
    assert "allow_pickled_weights" not in older.raw["runner"]
    assert older.raw["run"]["tokenizer"] == str(Path("~/tok").expanduser())
    older = read(here, megatron=None, gpt_evaluation=None)
    assert "server" not in older.raw


def test_a_variable_names_the_key_and_is_not_filled_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-value")
    keys = {"openai_api_key": "${MY_KEY}", "openai_organization": "${ORG}", "worker_num": 2, "max_retry": 3}
    older = read(here, gpt_evaluation=keys)
    judge = older.raw["suites"]["gpt"]["evaluators"][0]["judge"]
    assert judge == {"api_key_env": "MY_KEY", "organization_env": "ORG", "concurrency": 2, "attempts": 3}
    assert "secret-value" not in str(older)
    empty = read(here, gpt_evaluation={"openai_api_key": "EMPTY"})
    assert empty.raw["suites"]["gpt"]["evaluators"][0]["judge"] == {"api_key_env": None}


def test_variables_are_filled_in_and_dollars_stay(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT", "/data")
    monkeypatch.setenv("ODD", "a${b}")
    config = configs.load(write(here, documented(cache_dir="${ROOT}/c$1", model_name="t", gpt_evaluation=None,
                                                 helm={"helm_output_path": "/o/${ODD}"})))  # fmt: skip
    assert str(config.queue) == "/data/c$1/autoeval"
    assert config.suites["helm"].evaluators[0]["output_path"] == "/o/a${b}"


def test_a_placeholder_stays(here: Path) -> None:
    gpt = read(here, gpt_evaluation={"answer_file": "a/{model}.jsonl", "result_file": "{step}/r"})
    entry = gpt.raw["suites"]["gpt"]["evaluators"][0]
    assert (entry["answer_file"], entry["result_file"]) == (f"{here}/a/{{model}}.jsonl", f"{here}/{{step}}/r")


def test_all_errors_at_once_by_the_old_key_paths(here: Path) -> None:
    found = errors(
        here, project_nam="x", model_name=None,
        megatron={"process_num": "4", "tokenizer_type": "bpe", "tokenizer_pat": "x"},
        helm={"eval_instance": 3, "helm_spec_template_path": None}, wandb={"projekt": "x"},
    )  # fmt: skip
    text = "\n".join(found)
    for wanted in (
        "auto_eval.project_nam: unknown key; did you mean 'project_name'?", "auto_eval.model_name: missing",
        "auto_eval.megatron.process_num: expected a whole number, found '4'",
        "auto_eval.megatron.tokenizer_type: 'bpe' is not one of 'gpt2', 'sentencepiece'",
        "auto_eval.megatron.tokenizer_pat: unknown key; did you mean 'tokenizer_path'?",
        "auto_eval.helm.eval_instance: unknown key; did you mean 'eval_instances'?",
        "auto_eval.helm.helm_spec_template_path: expected text, found nothing",
        "auto_eval.wandb.projekt: unknown key; did you mean 'project'?",
    ):  # fmt: skip
        assert wanted in text
    assert len(found) == 8


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"megatron": {"process_num": 0}}, "auto_eval.megatron.process_num: must be at least 1, found 0"),
        ({"megatron": {"token_per_iteration": -1}}, "token_per_iteration: must be at least 0, found -1"),
        ({"megatron": {"seq_length": 0}}, "auto_eval.megatron.seq_length: must be at least 1"),
        ({"helm": {"eval_instances": 0}}, "auto_eval.helm.eval_instances: must be at least 1"),
        ({"gpt_evaluation": {"worker_num": 0}}, "auto_eval.gpt_evaluation.worker_num: must be at least 1"),
        ({"gpt_evaluation": {"debug": True}}, "auto_eval.gpt_evaluation.debug: made scores without a judge"),
        ({"megatron": {"vocab_path": None}}, "auto_eval.megatron.vocab_path: missing; tokenizer_type 'gpt2' needs it"),
        ({"megatron": {"tokenizer_type": "sentencepiece"}}, "auto_eval.megatron.tokenizer_path: missing"),
        ({"model_name": "a/b"}, "auto_eval.model_name: 'proj-a/b' names HELM's suite"),
        ({"project_name": " "}, "auto_eval.project_name: empty"),
        ({"helm": None, "gpt_evaluation": None}, "auto_eval: has neither `helm` nor `gpt_evaluation`"),
        ({"huggingface": {}}, "auto_eval.huggingface: stands beside `megatron`"),
        ({"cache_dir": "${NOT_SET_ANYWHERE}"}, "environment variable NOT_SET_ANYWHERE is not set"),
    ],
)
def test_values_that_do_not_fit(here: Path, sections: dict[str, Any], wanted: str) -> None:
    (found,) = errors(here, **sections)
    assert wanted in found


def test_nothing_stands_beside_it_and_it_is_a_mapping(here: Path) -> None:
    (here / "old.yaml").write_text("auto_eval: []\nqueue: q\n")
    with pytest.raises(ConfigError, match="auto_eval: expected a mapping, found a list") as caught:
        configs.load(here / "old.yaml")
    assert "queue: unknown key; a file with `auto_eval:` holds nothing beside it" in str(caught.value)


def test_the_hook_says_whose_file_it_is(here: Path) -> None:
    with pytest.raises(ConfigError, match="auto_eval: is the older watcher's configuration"):
        hook_config.load(write(here, documented()))


def test_our_own_file_is_no_older_one(here: Path) -> None:
    (here / "autoeval.yaml").write_text("queue: q\nsuites: {a: {evaluators: [{type: helm}]}}\n")
    assert legacy.read(here / "autoeval.yaml") is None


def test_where_output_is_kept_is_no_part_of_what_is_evaluated() -> None:
    def digest(**settings: str) -> str:
        return hook_config.suite_digest({"evaluators": [{"type": "helm", "entries": ["a"], **settings}]})

    assert digest(output_path="/a", output_suite="s") == digest(output_path="/b", output_suite="t") == digest()
    assert digest(data_dir="/a") != digest()
    other = [{"evaluators": [{"type": "command", "output_path": p}]} for p in ("/a", "/b")]
    assert hook_config.suite_digest(other[0]) != hook_config.suite_digest(other[1])


def test_narrowed_to_one_type(here: Path) -> None:
    config = configs.load(write(here, documented()))
    only = narrowed(config, "helm")
    assert list(only.suites) == ["helm"]
    assert only.server is not None      # Megatron-LM's, which HELM asks
    hf = configs.load(write(here, documented(megatron=None)))
    assert narrowed(hf, "helm").server is None
    assert narrowed(hf, "gpt").server == {"type": "transformers"}
    with pytest.raises(ConfigError, match="no suite has an evaluator of the type 'lm_eval'"):
        narrowed(config, "lm_eval")
