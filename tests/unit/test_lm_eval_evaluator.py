"""The lm_eval evaluator over a stand-in for the program inside (tests/lm_eval_stand_in.py) that leaves real output."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner import environments
from eval_runner.evaluators.base import Context, Job, Limits, Outcome, Parts
from eval_runner.evaluators.lm_eval import LmEvalEvaluator, plan, reason
from eval_runner.process import Stopped
from tests import lm_eval_stand_in

WHERE = "suites.quick.evaluators[0]"
AT = re.escape(WHERE)
TASKS = {
    "tiny": {"tasks": ["tiny_choice", "tiny_gen"], "groups": ["tiny"], "unsafe": [], "files": []},
    "tiny_text": {"tasks": ["tiny_text"], "groups": [], "unsafe": [], "files": []},
}


class Memory(Parts):
    """Parts that are kept, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Outcome] = {}

    def get(self, key: str) -> Outcome | None:
        return self.kept.get(key)

    def put(self, key: str, outcome: Outcome) -> None:
        assert key not in self.kept
        self.kept[key] = outcome


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "inside"
    inside.mkdir()
    root = str(Path(__file__).parents[2])
    (inside / "autoeval_lm_eval.py").write_text(
        f"import sys\nsys.path.insert(0, {root!r})\nfrom tests.lm_eval_stand_in import main\nmain()\n"
    )
    said = {"tasks": TASKS, "skipped": [], "versions": {"lm_eval": "0.4.13"}, "device": "cpu"}
    monkeypatch.setattr(plan, "INSIDE", inside)
    monkeypatch.setattr(plan, "_probe", lambda *args: said)
    monkeypatch.setattr(environments, "find", lambda *args: Path(sys.executable))
    monkeypatch.setattr("eval_runner.evaluators.lm_eval.evaluator.LOOK_S", 0.05)
    (tmp_path / "checkpoint-100").mkdir()
    return tmp_path


@pytest.fixture
def evaluate(base: Path) -> Callable[..., Outcome]:
    """Evaluate a checkpoint, the program behaving as told; `parts` are those of its ticket."""
    turn = iter(range(100))

    def go(behaviour: dict[str, Any] | None = None, parts: Parts | None = None, **options: Any) -> Outcome:
        (base / "behaviour.json").write_text(json.dumps(behaviour or {}))
        settings = {"tasks": list(TASKS)} | options.pop("settings", {})
        evaluator = LmEvalEvaluator(settings, Context(base, base / "envs", WHERE, "autoeval.yaml"))
        work = base / f"work{next(turn)}"
        work.mkdir()
        path = base / "checkpoint-100"
        job = Job(path, path, "checkpoint-100-0a", work, base / "log", finished=parts or Parts(), **options)
        return evaluator.evaluate(job)

    return go


def test_scores_of_all_tasks_in_their_order(evaluate: Callable[..., Outcome], base: Path) -> None:
    seen: list[tuple[float, str]] = []
    found = evaluate(progress=lambda fraction, what: seen.append((fraction, what)), facts={"converter": "x 1"})
    names = [(s.benchmark, s.metric) for s in found.evaluation.scores]
    assert names[0] == ("tiny_choice", "acc")
    assert names[-1] == ("tiny_text", "bits_per_byte")
    assert len(names) == 7
    assert found.evaluation.evaluator == "lm_eval"
    assert found.evaluation.versions["converter"] == "x 1"
    assert found.evaluation.versions["dtype"] == "torch.float32"
    assert len(list(found.instances)) == 12 + 12 + 5 + 5 + 12 + 3 + 3
    assert [fraction for fraction, _ in seen] == sorted(fraction for fraction, _ in seen)
    assert (seen[0][0], seen[-1][0]) == (0.0, 1.0)


def test_metrics_are_chosen_and_named(evaluate: Callable[..., Outcome]) -> None:
    settings = {"metrics": {"tiny_choice": ["acc"], "tiny_text": ["bits_per_byte"]}, "name": "few shots"}
    found = evaluate(settings=settings)
    assert [(s.benchmark, s.metric) for s in found.evaluation.scores] == [
        ("few_shots.tiny_choice", "acc"), ("few_shots.tiny_gen", "exact_match.number"),
        ("few_shots.tiny_gen", "exact_match.whole"), ("few_shots.tiny", "acc"),
        ("few_shots.tiny_text", "bits_per_byte"),
    ]  # fmt: skip
    assert {(i.benchmark, i.metric) for i in found.instances} == {
        (s.benchmark, s.metric) for s in found.evaluation.scores
    }
    with pytest.raises(ConfigError, match=rf"^{AT}.tasks\[0\] \(tiny\): tiny_choice has no metric 'ac'; did you me"):
        evaluate(settings={"metrics": {"tiny_choice": ["ac"]}})


def test_a_task_that_an_attempt_finished_is_not_run_again(
    evaluate: Callable[..., Outcome], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was never looked at before the end."""
    monkeypatch.setattr("eval_runner.evaluators.lm_eval.evaluator.LOOK_S", 60.0)
    parts = Memory()
    failure = {"stage": "run", "task": "tiny_text", "types": ["E"], "message": "E: x", "status": None}
    with pytest.raises(AutoEvalError, match=rf"^{AT} \(tiny_text\): lm_eval failed: E: x; log: {base}/log"):
        evaluate({"fails": {"tiny_text": failure}}, parts)
    assert len(parts.kept) == 1
    (base / "log").unlink()
    found = evaluate(parts=parts)
    assert "task 1 of 1: tiny_text" in (base / "log").read_text()
    assert found.evaluation.versions["autoeval resume"] == "1 of 2 tasks are of an earlier attempt"
    assert found.evaluation.scores == evaluate().evaluation.scores
    (base / "log").unlink()
    evaluate(parts=parts)
    assert not (base / "log").exists()          # nothing was left to run


@pytest.mark.parametrize(
    "other",
    [{"settings": {"limit": 3}}, {"settings": {"model_args": {"dtype": "bfloat16"}}}, {"facts": {"converter": "2"}},
     {"trust_remote_code": True}],
)  # fmt: skip
def test_a_part_of_another_question_is_no_part_of_this(evaluate: Callable[..., Outcome], other: dict[str, Any]) -> None:
    parts = Memory()
    evaluate(parts=parts)
    evaluate(parts=parts, **other)
    assert len(parts.kept) == 4


def test_a_part_of_other_documents_is_no_part_of_this(
    evaluate: Callable[..., Outcome], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = base / "text.jsonl"
    data.write_text("one")
    monkeypatch.setitem(TASKS["tiny_text"], "files", [str(data)])
    parts = Memory()
    first = evaluate(parts=parts)
    assert str(data) in first.evaluation.provenance
    data.write_text("two")
    evaluate(parts=parts)
    assert len(parts.kept) == 3


def test_what_is_missing_is_an_error_that_names_it(evaluate: Callable[..., Outcome], base: Path) -> None:
    with pytest.raises(AutoEvalError, match=r"tasks\[1\] \(tiny_text\): .*no results file of lm_eval; log: /"):
        evaluate({"writes_nothing": ["tiny_text"]})
    spoilt = base / "spoilt"
    shutil.copytree(lm_eval_stand_in.RECORDED / "group", spoilt)
    (results,) = spoilt.glob("results*")
    data = json.loads(results.read_text())
    del data["results"]["tiny_gen"]
    results.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"tasks\[0\] \(tiny\): tiny lacks its tasks tiny_gen; log: "):
        evaluate({"recorded": {"tiny": str(spoilt)}})


def test_a_model_that_is_broken_is_the_checkpoints_fault(evaluate: Callable[..., Outcome], base: Path) -> None:
    spoilt = base / "spoilt"
    shutil.copytree(lm_eval_stand_in.RECORDED / "text", spoilt)
    (path,) = spoilt.glob("samples*")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["resps"] = [["nan"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match=r"tiny_text has log-likelihoods that are not a number; the model's"):
        evaluate({"recorded": {"tiny_text": str(spoilt)}})


def test_a_stop_ends_it_and_keeps_what_was_finished(evaluate: Callable[..., Outcome], base: Path) -> None:
    parts, seen = Memory(), list[str]()
    began = time.monotonic()

    def stopping() -> bool:
        return len(parts.kept) == 1 and any("1 of 2" in line for line in seen)

    with pytest.raises(Stopped):
        evaluate({"waits": ["tiny_text"]}, parts, stopping=stopping,
                 progress=lambda fraction, what: seen.append(f"{what} {fraction:.3f}"))  # fmt: skip
    assert time.monotonic() - began < 60
    assert "lm_eval: 1 of 2 tasks 0.725" in seen        # half of the second is done


def test_time_is_limited(evaluate: Callable[..., Outcome]) -> None:
    with pytest.raises(AutoEvalError, match="not done after 2 s"):
        evaluate({"waits": ["tiny"]}, limits=Limits(timeout=2.0))


def test_an_environment_that_is_not_there(tmp_path: Path) -> None:
    context = Context(tmp_path, tmp_path / "envs", WHERE, "autoeval.yaml")
    remedy = r"not built; run `autoeval-runner env create lm_eval`"
    with pytest.raises(ConfigError, match=rf"^autoeval.yaml: suites.quick.evaluators\[0\].env: .*{remedy}"):
        LmEvalEvaluator({"tasks": ["a"]}, context).check()


CASES = [
    ("load", ["ConnectionError", "OSError"], "ConnectionError: Couldn't reach 'x' on the Hub", None, "transient"),
    ("load", ["ConnectionError", "OSError"], "ConnectionError: Couldn't reach the Hub: Offline mode is enabled.", None,
     "configuration"),
    ("load", ["ConnectionError", "OSError"], "ConnectionError: Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)",
     None, "configuration"),
    ("load", ["DatasetNotFoundError", "FileNotFoundError"], "DatasetNotFoundError: x doesn't exist", None,
     "configuration"),
    ("load", ["HfHubHTTPError", "HTTPStatusError"], "HfHubHTTPError: 503", 503, "transient"),
    ("load", ["Empty"], "Empty: task x has no documents to evaluate", None, "configuration"),
    ("load", ["ModuleNotFoundError", "ImportError"], "ModuleNotFoundError: No module named 'z'", None, "configuration"),
    ("load", ["UndefinedError", "TemplateError"], "UndefinedError: 'q' is undefined", None, "configuration"),
    ("load", ["OSError"], "OSError: [Errno 28] No space left on device", None, "transient"),
    ("model", ["SafetensorError"], "SafetensorError: incomplete metadata", None, "checkpoint"),
    ("model", ["TypeError"], "TypeError: unexpected keyword argument 'dtypo'", None, "configuration"),
    ("model", ["OutOfMemoryError", "RuntimeError"], "OutOfMemoryError: CUDA out of memory", None, "transient"),
    ("run", ["OutOfMemoryError", "RuntimeError"], "OutOfMemoryError: CUDA out of memory", None, "transient"),
    ("run", ["Unusable"], "Unusable: no log-probabilities", None, "configuration"),
    ("run", ["HTTPError"], "HTTPError: 422", 422, "configuration"),
    ("run", ["HTTPError"], "HTTPError: 503", 503, "transient"),
    ("run", ["HTTPError"], "HTTPError: 429", 429, "transient"),
    ("run", ["ConnectionError"], "ConnectionError: refused", None, "transient"),
    ("run", ["NotImplementedError", "RuntimeError"], "NotImplementedError: Loglikelihood", None, "configuration"),
    ("run", ["ValueError"], "ValueError: Cannot use chat template functions", None, "configuration"),
    ("run", ["RuntimeError"], "RuntimeError: probability tensor contains either `inf`, `nan`", None, "checkpoint"),
    ("run", ["RuntimeError"], "RuntimeError: something else", None, "transient"),
    ("write", ["OSError"], "OSError: lm_eval could not write", None, "transient"),
    ("start", ["ValueError"], "ValueError: x", None, "configuration"),
]


@pytest.mark.parametrize(("stage", "types", "message", "status", "kind"), CASES)
def test_kinds_of_failure(
    tmp_path: Path, stage: str, types: list[str], message: str, status: int | None, kind: str
) -> None:
    left = tmp_path / "failure.json"
    left.write_text(json.dumps({"stage": stage, "task": "t", "types": types, "message": message, "status": status}))
    found = reason.failure(1, left, tmp_path / "log", "here")
    assert found.kind == kind, found
    assert str(found).startswith("here (t): lm_eval ")
    assert message in str(found)
    assert str(found).endswith(f"; log: {tmp_path / 'log'}")


def test_a_program_that_says_nothing_is_told_by_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("Loading\nBus error\n")
    found = reason.failure(1, tmp_path / "none", tmp_path / "log", "here")
    assert str(found).startswith("here: lm_eval ended with exit status 1: Loading | Bus error; log: ")
    assert found.kind == "transient"
    killed = reason.failure(-9, tmp_path / "none", tmp_path / "log", "here")
    assert "here: killed by signal 9 (SIGKILL: out of memory?" in str(killed)
