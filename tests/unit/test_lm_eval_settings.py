"""The settings of a `type: lm_eval` entry, what lm_eval is told, and what it says of the tasks' names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import CheckpointError, ConfigError
from eval_runner import environments
from eval_runner.evaluators.base import Context, Job
from eval_runner.evaluators.lm_eval import LmEvalEvaluator, command, plan
from eval_runner.evaluators.lm_eval.settings import parse
from eval_runner.servers.base import Endpoint

WHERE = "suites.quick.evaluators[0]"


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tmp_path / "envs", WHERE, "autoeval.yaml", server="vllm")


def test_the_lock_pins_every_distribution_exactly_and_is_not_helms() -> None:
    lines = [line for line in environments._lock("lm_eval").splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert all(line.count("==") == 1 and "@" not in line and "+" not in line for line in lines)
    assert {"lm_eval", "torch", "transformers", "peft", "tenacity", "aiohttp"} <= {x.split("==")[0] for x in lines}
    assert environments.location("lm_eval", Path("/envs")).name != environments.location("helm", Path("/envs")).name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tasks: missing"),
        ({"tasks": []}, "tasks: name at least one task"),
        ({"tasks": ["a"], "limits": 5}, "limits: unknown key; did you mean 'limit'"),
        ({"tasks": ["a"], "limit": 0}, "limit: must be 1 or more"),
        ({"tasks": ["a"], "concurrency": 0}, "concurrency: must be 1 or more"),
        ({"tasks": ["a"], "num_fewshot": -1}, "num_fewshot: must be 0 or more"),
        ({"tasks": ["a"], "batch_size": "auto:4"}, "batch_size: write a number; what \"auto\" finds depends on"),
        ({"tasks": ["a,b"]}, r"tasks\[0\]: 'a,b' is no name"),
        ({"tasks": ["mmlu*"]}, r"tasks\[0\]: 'mmlu\*' is no name"),
        ({"tasks": ["a.yaml"]}, r"tasks\[0\]: 'a.yaml' is a file: write the name that stands in it"),
        ({"tasks": ["a", "a"]}, "tasks: 'a' stands there twice"),
        ({"tasks": ["a"], "through": "api"}, "through: 'api' is not one of 'model', 'server', 'chat'"),
        ({"tasks": ["a"], "through": "chat"}, "through: a chat is asked with `apply_chat_template: true`"),
        ({"tasks": ["a"], "fewshot_as_multiturn": True}, "fewshot_as_multiturn: goes with"),
        ({"tasks": ["a"], "model_args": {"pretrained": "gpt2"}}, "model_args.pretrained: is not for a suite to choose"),
        ({"tasks": ["a"], "model_args": {"trust_remote_code": True}}, "trust_remote_code: .*runner.trust_remote_code"),
        ({"tasks": ["a"], "model_args": {"auth_token": "x"}}, "auth_token: .*no secret stands in a file"),
        ({"tasks": ["a"], "model_args": ["dtype"]}, "model_args: expected a mapping"),
        ({"tasks": ["a"], "gen_kwargs": {1: 2}}, "gen_kwargs: the key 1 is not text"),
        ({"tasks": ["a"], "metrics": {"a": "acc"}}, "metrics.a: expected a list"),
        ({"tasks": ["a"], "metrics": {"a": []}}, "metrics.a: name at least one metric"),
        ({"tasks": ["a"], "include_path": "nowhere"}, "include_path: /.*/nowhere is no directory"),
    ],
)
def test_settings_that_do_not_fit(context: Context, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LmEvalEvaluator(settings, context)
    assert str(caught.value).startswith(f"autoeval.yaml: {WHERE}")


def test_all_errors_at_once(context: Context) -> None:
    with pytest.raises(ConfigError) as caught:
        LmEvalEvaluator({"tasks": ["a"], "limit": 0, "batch_size": 0, "model_args": {"model": 1}}, context)
    assert all(key in str(caught.value) for key in ("limit", "batch_size", "model_args.model"))


def test_a_suite_that_asks_a_server_needs_one(context: Context) -> None:
    with pytest.raises(ConfigError, match=r"^autoeval.yaml: .*\.through: no server is configured; add `server:`"):
        LmEvalEvaluator({"tasks": ["a"], "through": "server"}, replace(context, server=""))


def entry(name: str = "a", tasks: tuple[str, ...] = ("a",)) -> plan.Entry:
    return plan.Entry(name, f"{WHERE}.tasks[0]", tasks, (), ())


def job(context: Context, **options: Any) -> Job:
    path = context.base_dir / "checkpoint-100"
    path.mkdir(exist_ok=True)
    return Job(path, path, "checkpoint-100-0a", context.base_dir / "work", context.base_dir / "log", **options)


def told(context: Context, settings: dict[str, Any], one: Job) -> dict[str, Any]:
    parsed = parse({"tasks": ["a"]} | settings, context)
    return command.plan(parsed, context, one, command.through(parsed, context, one), [entry()])


def test_a_checkpoint_is_loaded_by_lm_eval_and_runs_no_code_of_its_own(context: Context) -> None:
    (context.base_dir / "tasks").mkdir()
    found = told(context, {"include_path": "tasks", "model_args": {"dtype": "bfloat16"}, "limit": 7}, job(context))
    path = str(context.base_dir / "checkpoint-100")
    assert found["model"] == "hf"
    assert found["model_args"] == {
        "pretrained": path, "tokenizer": path, "trust_remote_code": False, "dtype": "bfloat16",
        "offload_folder": str(context.base_dir / "work" / "offload"),
    }  # fmt: skip
    assert found["include_path"] == str(context.base_dir / "tasks")
    assert found["directory"] == str(context.base_dir)
    assert found["batch_size"] == 8
    assert found["options"]["limit"] == 7
    assert found["options"]["confirm_run_unsafe_code"] is False
    assert found["options"]["fewshot_as_multiturn"] is False
    assert "random_seed" not in found["options"]        # lm_eval's own hold
    assert found["entries"] == [{"task": "a", "output": str(context.base_dir / "work" / "output" / "0")}]
    assert told(context, {}, job(context, trust_remote_code=True))["model_args"]["trust_remote_code"] is True
    assert told(context, {"seed": 3}, job(context))["options"]["fewshot_random_seed"] == 3
    assert told(context, {"apply_chat_template": True}, job(context))["options"]["fewshot_as_multiturn"] is True


def served(context: Context, api: Any = "openai", key: str | None = None, **options: Any) -> Job:
    endpoint = Endpoint("http://127.0.0.1:1234", api, "served-name", key)
    return job(context, endpoint=lambda: endpoint, loadable=False, **options)


def test_a_server_is_asked_by_its_name_and_address(context: Context) -> None:
    found = told(context, {"concurrency": 4}, served(context, max_length=512))
    assert found["model"] == "local-completions"
    assert found["model_args"] == {
        "model": "served-name", "base_url": "http://127.0.0.1:1234/v1/completions", "num_concurrent": 4,
        "tokenizer": str(context.base_dir / "checkpoint-100"), "tokenizer_backend": "huggingface", "max_length": 512,
        "trust_remote_code": False,
    }  # fmt: skip
    assert found["batch_size"] == 1
    chat = told(context, {"through": "chat", "apply_chat_template": True}, served(context, max_length=512))
    assert chat["model"] == "local-chat-completions"
    assert chat["model_args"]["base_url"] == "http://127.0.0.1:1234/v1/chat/completions"
    assert chat["model_args"]["tokenizer_backend"] is None


def test_transformers_serve_is_sent_text(context: Context) -> None:
    context = replace(context, server="transformers")
    assert told(context, {}, served(context, max_length=9))["model_args"]["tokenized_requests"] is False
    with pytest.raises(ConfigError, match="write `through: chat`"):
        told(context, {"apply_chat_template": True}, served(context, max_length=9))


def test_the_length_is_told_by_somebody(context: Context) -> None:
    with pytest.raises(CheckpointError, match=r"nothing says how many tokens .*`model_args: {max_length: N}`"):
        told(context, {}, served(context))
    assert told(context, {"model_args": {"max_length": 5}}, served(context))["model_args"]["max_length"] == 5
    config = context.base_dir / "checkpoint-100" / "config.json"
    config.write_text(json.dumps({"text_config": {"max_position_embeddings": 77}}))
    assert told(context, {}, served(context))["model_args"]["max_length"] == 77


def test_ways_that_a_checkpoint_cannot_be_asked(context: Context) -> None:
    with pytest.raises(ConfigError, match=r"\.through: lm_eval cannot load .*`through: server`"):
        told(context, {"through": "model"}, served(context))
    with pytest.raises(ConfigError, match=r"\.through: no server answers for .*`through: model`"):
        told(context, {"through": "server"}, job(context))
    with pytest.raises(ConfigError, match=r"static server loses tokens .*`server.mode: dynamic`"):
        told(context, {}, served(context, api="megatron", max_length=9))


def test_a_server_gets_its_own_key_and_no_other(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    monkeypatch.setenv("SERVER_KEY", "of-the-server")
    monkeypatch.setenv("NO_PROXY", "intranet")
    near = Endpoint("http://127.0.0.1:1", "openai", "m")
    assert command.key_for(near) == {
        "OPENAI_API_KEY": "", "NO_PROXY": "intranet,127.0.0.1", "no_proxy": "intranet,127.0.0.1"
    }  # fmt: skip
    assert command.key_for(Endpoint("https://host", "openai", "m", "SERVER_KEY")) == {"OPENAI_API_KEY": "of-the-server"}


def test_the_environment_runs_no_code_unless_the_suite_lets_it(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "HF_ALLOW_CODE_EVAL": "1", "HF_DATASETS_TRUST_REMOTE_CODE": "1", "PYTHONPATH": "/x", "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    env = plan.environment(parse({"tasks": ["a"]}, context))
    assert (env["HF_ALLOW_CODE_EVAL"], env["HF_DATASETS_TRUST_REMOTE_CODE"]) == ("0", "0")
    assert "PYTHONPATH" not in env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert plan.environment(parse({"tasks": ["a"], "allow_unsafe_code": True}, context))["HF_ALLOW_CODE_EVAL"] == "1"


def answer(**tasks: dict[str, Any]) -> dict[str, Any]:
    full = {"tasks": [], "groups": [], "unsafe": [], "files": []}
    found = {name: one if "wrong" in one else full | one for name, one in tasks.items()}
    return {"tasks": found, "skipped": [], "versions": {"lm_eval": "0.4.13"}, "device": "cpu"}


def made(
    context: Context, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], **settings: Any
) -> plan.Plan:
    monkeypatch.setattr(plan, "_probe", lambda *args: said)
    return plan.make(parse({"tasks": list(said["tasks"])} | settings, context), context, Path("python"))


def test_what_lm_eval_says_of_names_is_told_all_at_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(
        arc_esy={"wrong": "lm_eval has no task 'arc_esy'", "near": ["arc_easy"]},
        broken={"wrong": "group 'broken' names the task 'gone', which there is not", "near": ["goner"]},
        humaneval={"tasks": ["humaneval"], "unsafe": ["humaneval"]},
        mmlu={"tasks": ["mmlu_anatomy"], "groups": ["mmlu"]},
        mmlu_anatomy={"tasks": ["mmlu_anatomy"]},
        nothing={},
    )
    with pytest.raises(ConfigError) as caught:
        made(context, monkeypatch, said)
    text = str(caught.value)
    assert f"autoeval.yaml: {WHERE}.tasks[0]: lm_eval has no task 'arc_esy'; did you mean 'arc_easy'?" in text
    assert "tasks[1]: group 'broken' names the task 'gone', which there is not; did you mean 'goner'?" in text
    assert "tasks[2]: humaneval runs code that the model writes; if this machine may, set `allow_unsafe_code" in text
    assert f"tasks[4]: 'mmlu_anatomy' is in {WHERE}.tasks[3] (mmlu), too; leave one of them out" in text
    assert "tasks[5]: 'nothing' stands for no task" in text
    assert made(context, monkeypatch, answer(h={"tasks": ["h"], "unsafe": ["h"]}), allow_unsafe_code=True).entries


def test_a_definition_that_lm_eval_passes_over_is_named_where_a_task_is_missing(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answer(mine={"wrong": "lm_eval has no task 'mine'", "near": []})
    said["skipped"] = ["/base/tasks/mine.yaml (while parsing)"]
    with pytest.raises(ConfigError, match=r"no task 'mine'; lm_eval cannot read /base/tasks/mine.yaml \(while parsing"):
        made(context, monkeypatch, said)


def test_metrics_are_of_tasks_that_are_there(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(mmlu={"tasks": ["mmlu_anatomy"], "groups": ["mmlu"]})
    with pytest.raises(ConfigError, match=r"metrics.mmlu_anatmy: no such task .*did you mean 'mmlu_anatomy'"):
        made(context, monkeypatch, said, metrics={"mmlu_anatmy": ["acc"]})
    assert made(context, monkeypatch, said, metrics={"mmlu": ["acc"]}).entries[0].groups == ("mmlu",)


def test_a_plan_is_old_once_a_definition_has_changed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = context.base_dir / "tasks"
    tasks.mkdir()
    (tasks / "a.yaml").write_text("task: a")
    found = made(context, monkeypatch, answer(a={"tasks": ["a"]}), include_path="tasks")
    assert found.is_current()
    (tasks / "a.yaml").write_text("task: a # other")
    assert not found.is_current()
