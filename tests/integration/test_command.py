"""`type: command` from the queue to the result, with real programs: good ones, hostile ones, and the example."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoeval_hooks import submit
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from autoeval_hooks.queue import Queue
from eval_runner import config as configs
from eval_runner import registry
from eval_runner.evaluators.base import Context, Job
from eval_runner.evaluators.command import CommandEvaluator
from eval_runner.results import store
from eval_runner.results.series import definition
from eval_runner.runner import Runner
from eval_runner.servers.base import Endpoint
from tests.processes import MARK, marked

ROOT = Path(__file__).parents[2]
MakeCheckpoint = Callable[..., Path]
Run = Callable[..., Runner]

PROGRAM = """
import json, os, sys
checkpoint, output, step = sys.argv[1:4]
size = os.path.getsize(checkpoint + "/model.safetensors")
rows = [{"id": i, "right": (i + size) % 3 > 0} for i in range(30)]
with open(output + "/samples.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
scores = {"size": size, "acc": sum(row["right"] for row in rows) / 30, "step": int(step)}
json.dump({"results": scores}, open(output + "/scores.json", "w"))
print("the key is", os.environ.get("JUDGE_KEY"))
"""
ENTRY: dict[str, Any] = {
    "type": "command", "name": "mine",
    "command": ["{python}", "eval.py", "{checkpoint}", "{output}", "{step}", "--key=${JUDGE_KEY:-none}"],
    "files": ["eval.py"],
    "metrics": {"size": "results.size", "acc": "results.acc", "step": "results.step"},
    "instances": {"file": "samples.jsonl", "values": {"acc": "right"}},
}  # fmt: skip


def configured(config_file: Path, program: str, **runner: Any) -> Callable[[], CommandEvaluator]:
    """Write configuration and program; what is returned builds the evaluator."""
    (config_file.parent / "eval.py").write_text(program)
    config_file.write_text(yaml.safe_dump({
        "queue": "queue", "runner": {"lease": 20.0, "order": "oldest", **runner}, "sinks": [],
        "suites": {"quick": {"evaluators": [ENTRY]}},
    }))  # fmt: skip

    def build() -> CommandEvaluator:
        config = configs.load(str(config_file))
        (evaluator,) = registry.build_evaluators(config, config.suites["quick"])
        assert isinstance(evaluator, CommandEvaluator)
        evaluator.check()
        return evaluator

    return build


def test_from_save_to_result(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "a-secret-that-nobody-may-read")
    build = configured(config_file, PROGRAM)
    for step in (100, 200):
        submit(checkpoint(step, b"w" * step), step=step, config=config_file)
    run(build())
    first, second = sorted(store.done(tmp_path / "queue")[0], key=lambda r: r.step)
    for result in (first, second):
        by_name = {s.metric: s for s in result.scores}
        assert (by_name["size"].value, by_name["step"].value) == (result.step, result.step)
        assert (by_name["acc"].value, by_name["acc"].n, by_name["acc"].benchmark) == (pytest.approx(2 / 3), 30, "mine")
        assert by_name["acc"].stderr == pytest.approx((2 / 9 / 29) ** 0.5)
        assert len(list(store.instances(store.path_of(tmp_path / "queue", result)))) == 30
        (evaluation,) = result.evaluations
        assert evaluation.versions == {"command": "'{python}' eval.py '{checkpoint}' '{output}' '{step}' '--key=***'"}
        assert list(evaluation.provenance) == [str(tmp_path / "eval.py")]
    (tmp_path / "eval.py").write_text(PROGRAM + "# mended")
    submit(checkpoint(300), step=300, config=config_file)
    run(build())
    third = next(r for r in store.done(tmp_path / "queue")[0] if r.step == 300)
    assert definition(first) == definition(second) != definition(third)
    logs = "".join(p.read_text() for p in (tmp_path / "queue" / "logs").iterdir())
    assert "the key is ***" in logs
    assert "a-secret" not in logs


WRITE = 'import json, os, sys; os.chdir(sys.argv[2]); write = lambda s: open("scores.json", "w").write(s)\n'
HOSTILE = {
    "links out": ('os.symlink("/etc/hostname", "scores.json")', r"scores\.json: leads out of \{output\}"),
    "is a link to itself": ('os.symlink("scores.json", "scores.json")', r"scores\.json: cannot be read"),
    "leaves a pipe": ('os.mkfifo("scores.json")', r"scores\.json: is no regular file"),
    "leaves a device": ('os.symlink("/dev/zero", "scores.json")', r"scores\.json: leads out of"),
    "leaves a huge file": ('write(""); os.truncate("scores.json", 1 << 42)', r"has 4398046511104 bytes, the limit"),
    "leaves no text": ('open("scores.json", "wb").write(os.urandom(9999) + b"\\xff")', r"scores\.json: is no JSON"),
    "leaves deep JSON": ('write("[" * 1_000_000)', r"scores\.json: is no JSON"),
    "puts a link in the directory's place": (
        'os.chdir("/"); os.rmdir(sys.argv[2]); os.symlink("/etc", sys.argv[2])', r"leads out of|no such file"),
    "removes the directory": ('os.chdir("/"); os.rmdir(sys.argv[2])', r"no such file in \{output\}; it is gone"),
    "fails": ('print("out of luck"); sys.exit(3)', "exit status 3; it said: out of luck; log: "),
    "hides its progress": ('os.mkfifo("progress"); import time; time.sleep(1.5)', r"scores\.json: the program left no"),
    "leaves a daemon": (
        'import subprocess; subprocess.Popen(["sleep", "300"], start_new_session=True); sys.exit(1)', "exit status 1"),
}  # fmt: skip


def test_a_hostile_program_harms_its_own_ticket_only(
    tmp_path: Path, checkpoint: MakeCheckpoint, config_file: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One checkpoint for each way, and at last one that is well."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv(MARK, mark := uuid.uuid4().hex)
    codes = [WRITE + code for code, _ in HOSTILE.values()]
    program = f"import sys\nexec(({codes!r} + [{PROGRAM!r}])[int(sys.argv[3])])\n"
    build = configured(config_file, program, max_attempts=1, breaker=100)
    for step in range(len(HOSTILE) + 1):
        submit(checkpoint(step, b"w" * (step + 1)), step=step, config=config_file)
    run(build())
    contents = store.collect(tmp_path / "queue")
    said = {f.step: f.failure.message for f in contents.failed}
    assert sorted(said) == list(range(len(HOSTILE)))
    for step, (how, (_, reason)) in enumerate(HOSTILE.items()):
        assert re.search(reason, said[step]), (how, said[step])
        assert said[step].startswith(f"{config_file}: suites.quick.evaluators[0]"), how
        assert "; log: " in said[step], how
    assert [r.step for r in contents.results] == [len(HOSTILE)]
    assert marked(mark) == []
    assert os.listdir(tmp_path / "tmp") == []


# ---------------------------------------------------------------------- one job, without a runner


def evaluator(tmp_path: Path, code: str, *arguments: str, server: str = "", **settings: Any) -> CommandEvaluator:
    (tmp_path / "program.py").write_text(code)
    command = ["{python}", "program.py", *(arguments or ("{checkpoint}",)), "{output}"]
    made = {"command": command, "name": "mine", "metrics": {"m": "m"}} | settings
    return CommandEvaluator(made, Context(tmp_path, tmp_path, "here", "autoeval.yaml", server))


def job(tmp_path: Path, **options: Any) -> Job:
    (tmp_path / "work").mkdir()
    values: dict[str, Any] = {"path": tmp_path, "tokenizer": tmp_path, "name": "model"} | options
    return Job(work_dir=tmp_path / "work", log=tmp_path / "log", **values)


DUMP = """
import json, os, sys
said = {"m": 1, "argv": sys.argv[1:], "cwd": os.getcwd(), "env": os.environ["GIVEN"]}
json.dump(said, open(sys.argv[-1] + "/scores.json", "w"))
open("here.json", "w").write(json.dumps(said))
"""


def test_no_value_is_ever_interpreted(tmp_path: Path) -> None:
    """Neither by a shell, nor as a placeholder, nor as several arguments."""
    odd = tmp_path / "a b;touch pwned $(touch pwned) `touch pwned` {output} {{x}} * \"'\n"
    odd.mkdir()
    one = evaluator(
        tmp_path, DUMP, "{checkpoint}", "x={name}={step}", "$(touch pwned)", "{{name}}", env={"GIVEN": "<{name}>"}
    )
    one.evaluate(job(tmp_path, path=odd, name="{step}; touch pwned", step=7))
    said = json.loads((tmp_path / "here.json").read_text())
    assert said["argv"][:-1] == [str(odd), "x={step}; touch pwned=7", "$(touch pwned)", "{name}"]
    assert said["argv"][-1] == str(tmp_path / "work" / "output")
    assert said["env"] == "<{step}; touch pwned>"
    assert said["cwd"] == str(tmp_path)         # where autoeval.yaml is, as its paths are relative to it
    assert not (tmp_path / "pwned").exists()


def test_the_working_directory_may_be_the_attempts_own(tmp_path: Path) -> None:
    command = ["{python}", "{config_dir}/program.py", "{checkpoint}", "{output}"]
    one = evaluator(tmp_path, DUMP, command=command, env={"GIVEN": ""}, working_directory="{work_dir}")
    one.evaluate(job(tmp_path))
    assert (tmp_path / "work" / "work" / "here.json").exists()


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (1, AutoEvalError, "exit status 1; it said: no luck"), (2, ConfigError, "a wrong call"),
        (64, ConfigError, "a wrong call"), (65, CheckpointError, "the checkpoint cannot be evaluated"),
        (75, AutoEvalError, "try later"), (78, ConfigError, "a mistake in its configuration"),
    ],
)  # fmt: skip
def test_the_exit_status_says_whose_fault_it_is(
    tmp_path: Path, status: int, kind: type[AutoEvalError], says: str
) -> None:
    with pytest.raises(AutoEvalError, match=says) as caught:
        evaluator(tmp_path, f"import sys; print('no luck'); sys.exit({status})").evaluate(job(tmp_path))
    assert type(caught.value) is kind
    assert str(caught.value).startswith("autoeval.yaml: here.command: ")
    assert str(caught.value).endswith(f"log: {tmp_path}/log")


def test_a_program_that_cannot_be_run_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"\x7fELF nothing")
    (tmp_path / "tool").chmod(0o755)
    one = evaluator(tmp_path, "", command=["./tool", "{checkpoint}", "{output}"])
    with pytest.raises(ConfigError, match=r"here\.command: \./tool cannot be run \(Exec format error\)"):
        one.evaluate(job(tmp_path))


def test_files_that_are_changed_meanwhile_leave_no_score(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    code = "import sys, json; json.dump({'m': 1}, open(sys.argv[-1] + '/scores.json', 'w')); open('data/x', 'w')"
    with pytest.raises(AutoEvalError, match=r"here\.files: were changed while they were used") as caught:
        evaluator(tmp_path, code, files=["data/"]).evaluate(job(tmp_path))
    assert caught.value.kind == "transient"


def test_the_server_is_started_where_its_address_is_asked_for(tmp_path: Path) -> None:
    calls: list[str] = []

    def endpoint() -> Endpoint:
        calls.append("start")
        return Endpoint("http://127.0.0.1:9", "openai", "served-name")

    served = {"endpoint": endpoint, "release": lambda: calls.append("release"), "server_facts": {"server": "s 1"}}
    code = DUMP.replace('"m": 1', '"m": 2')
    outcome = evaluator(tmp_path, code, env={"GIVEN": ""}, server="vllm").evaluate(job(tmp_path, **served))
    assert calls == []
    assert "server" not in outcome.evaluation.versions
    shutil.rmtree(tmp_path / "work")
    one = evaluator(tmp_path, code, "{server_url}/v1", env={"GIVEN": "{server_model}"}, server="vllm")
    outcome = one.evaluate(job(tmp_path, **served))
    said = json.loads((tmp_path / "here.json").read_text())
    assert (said["argv"][0], said["env"]) == ("http://127.0.0.1:9/v1", "served-name")
    assert calls == ["start", "release"]
    assert outcome.evaluation.versions["server"] == "s 1"
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(ConfigError, match="is served by nothing here; configure `server:`"):
        one.evaluate(job(tmp_path))


def test_a_program_may_say_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval_runner.evaluators.command.progress.PERIOD_S", 0.0)
    monkeypatch.setenv("JUDGE_KEY", "a-secret-to-keep")
    told: list[tuple[float, str]] = []
    code = """
import json, sys, time
for line in ("0.25 first\\x1b[31m\\n", "0.5\\n", "nonsense\\n", "nan\\n", "0.6 by a-secret-to-keep\\n",
             "7 last\\n0.9 half a li"):
    with open(sys.argv[-1] + "/progress", "a") as file:
        file.write(line)
    time.sleep(0.4)
json.dump({"m": 1}, open(sys.argv[-1] + "/scores.json", "w"))
"""
    evaluator(tmp_path, code).evaluate(job(tmp_path, progress=lambda fraction, what: told.append((fraction, what))))
    assert {(0.25, "first?[31m"), (0.5, ""), (0.6, "by ***"), (1.0, "last")} <= set(told)
    assert all(0 <= fraction <= 1 for fraction, _ in told)
    assert not any("half" in what for _, what in told)


# ---------------------------------------------------------------------- the example


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, config_file: Path) -> None:
    example = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "command", example, ignore=shutil.ignore_patterns("out", "__pycache__"))
    shutil.copy(example / "autoeval.yaml", config_file)       # that of the `run` fixture
    for name in ("evaluate.py", "held_out.txt"):
        shutil.copy(example / name, tmp_path / name)
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile((example / "train.py").read_text(), "train.py", "exec"), namespace)
    monkeypatch.chdir(tmp_path)
    namespace["main"]()
    config = configs.load(str(config_file))
    (one,) = registry.build_evaluators(config, config.suites["quick"])
    one.check()
    run(one)
    results = sorted(store.done(config.queue)[0], key=lambda r: r.step)
    assert [r.step for r in results] == [1, 2, 3]
    values = [{s.metric: s.value for s in r.scores} for r in results]
    assert all(0 < v["accuracy"] < 1 and v["bits_per_character"] > 0 for v in values)
    assert values[2]["bits_per_character"] < values[0]["bits_per_character"]
    assert not list(Queue(str(config.queue)).tokens("failed", "pending"))
