"""Scores out of HELM's result files; the uncertainty against computations of another kind."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError
from eval_runner.evaluators.helm import reason, scores


def _row(name: str, values: list[float], split: str = "test", **extra: Any) -> dict[str, Any]:
    row = {"name": {"name": name, "split": split, **extra}, "count": len(values), "sum": sum(values)}
    return row | ({"mean": sum(values) / len(values)} if values else {})


def _instance(key: str, trial: int = 0, /, **values: float) -> dict[str, Any]:
    stats = [_row(name, [value]) for name, value in values.items()]
    return {"instance_id": key, "train_trial_index": trial, "stats": stats}


def _write(path: Path, stats: list[dict[str, Any]], instances: list[dict[str, Any]]) -> Path:
    (path / "stats.json").write_text(json.dumps(stats))
    (path / "per_instance_stats.json").write_text(json.dumps(instances))
    return path


def test_a_mean_with_its_standard_error(tmp_path: Path) -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    perturbed = _row("em", [0.0], perturbation={"name": "robustness", "computed_on": "worst"})
    stats = [perturbed, _row("em", [sum(values) / 5]), _row("em", [0.9], split="valid"), _row("num_instances", [5.0])]
    instances = [_instance(f"id{i}", em=v) for i, v in enumerate(values)]
    instances.append(_instance("id0", em=0.0) | {"perturbation": {"name": "typos"}})
    score, found = scores.read(_write(tmp_path, stats, instances), "b", "em", "test", False)
    assert (score.value, score.n, score.split, score.higher_is_better) == (0.6, 5, "test", True)
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert {i.id: i.value for i in found} == {f"id{i}": v for i, v in enumerate(values)}


def test_trials_of_an_instance_are_averaged_before_anything_else(tmp_path: Path) -> None:
    per_trial = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}
    instances = [_instance(key, t, em=v) for key, vs in per_trial.items() for t, v in enumerate(vs)]
    stats = [_row("em", [2 / 3, 1 / 3]), _row("num_instances", [3.0, 3.0])]
    score, found = scores.read(_write(tmp_path, stats, instances), "b", "em", "test", None)
    assert (score.n, score.value, score.higher_is_better) == (3, 0.5, None)
    assert score.stderr == pytest.approx(statistics.stdev([0.5, 1.0, 0.0]) / math.sqrt(3))
    assert [i.value for i in found] == [0.5, 1.0, 0.0]


def test_bits_per_byte_is_a_ratio_and_so_is_its_standard_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    sizes = [float(chance.randint(50, 5000)) for _ in range(40)]
    bits = [size * chance.uniform(2, 4) for size in sizes]
    instances = []
    for i, (b, s) in enumerate(zip(bits, sizes, strict=True)):   # two windows of each document
        instances += [_instance(f"id{i}", logprob=-b * math.log(2) / 4, num_bytes=s / 4)]
        instances += [_instance(f"id{i}", logprob=-b * math.log(2) * 3 / 4, num_bytes=s * 3 / 4)]
    stats = [_row("bits_per_byte", [sum(bits) / sum(sizes)]), _row("num_instances", [40.0])]
    score, found = scores.read(_write(tmp_path, stats, instances), "b", "bits_per_byte", "test", True)
    assert score.higher_is_better is False
    assert statistics.fmean(i.value for i in found) == pytest.approx(score.value)       # for paired tests
    left_out = [(sum(bits) - b) / (sum(sizes) - s) for b, s in zip(bits, sizes, strict=True)]
    jackknife = math.sqrt(39 / 40 * sum((x - statistics.fmean(left_out)) ** 2 for x in left_out))
    assert score.stderr == pytest.approx(jackknife, rel=0.05)
    wrong = statistics.stdev(b / s for b, s in zip(bits, sizes, strict=True)) / math.sqrt(40)
    assert abs(wrong - jackknife) > 0.05 * jackknife    # or this test could not tell the two apart


def test_a_metric_of_the_whole_corpus_has_no_standard_error(tmp_path: Path) -> None:
    stats = [_row("macro_f1", [0.7]), _row("num_instances", [2.0])]
    instances = [_instance("a", macro_f1=1.0), _instance("b", macro_f1=0.0)]
    score, found = scores.read(_write(tmp_path, stats, instances), "b", "macro_f1", "test", False)
    assert (score.value, score.stderr, found) == (0.7, None, [])


def test_sub_splits_are_pooled_by_their_sizes(tmp_path: Path) -> None:
    stats = [
        _row("em", [1.0], sub_split="toxic"), _row("num_instances", [1.0], sub_split="toxic"),
        _row("em", [0.0], sub_split="other"), _row("num_instances", [3.0], sub_split="other"),
    ]  # fmt: skip
    score, _ = scores.read(_write(tmp_path, stats, []), "b", "em", "test", False)
    assert (score.value, score.n) == (0.25, 4)


@pytest.mark.parametrize(
    ("was_nan", "error", "message"),
    [
        (True, CheckpointError, "em covers only 10 of 100 instances of the split 'test', for it is not a number"),
        (False, ConfigError, "em covers only 10 of 100 instances of the split 'test'; choose a metric"),
    ],
)
@pytest.mark.parametrize("other", [{"sub_split": "toxic"}, {}])
def test_a_metric_of_some_sub_splits_is_no_score(
    tmp_path: Path, other: dict[str, str], was_nan: bool, error: type[Exception], message: str
) -> None:
    stats = [
        _row("num_instances", [90.0], **other), _row("num_instances", [10.0], sub_split="clean"),
        _row("em", [1.0], sub_split="clean"),
    ]  # fmt: skip
    with pytest.raises(error, match=message):
        scores.read(_write(tmp_path, stats, []), "b", "em", "test", False, was_nan)


def test_instances_in_no_sub_split_are_pooled_with_the_others(tmp_path: Path) -> None:
    stats = [
        _row("num_instances", [3.0]), _row("num_instances", [1.0], sub_split="a"),
        _row("em", [1.0]), _row("em", [0.0], sub_split="a"),
    ]  # fmt: skip
    score, _ = scores.read(_write(tmp_path, stats, []), "b", "em", "test", False)
    assert (score.value, score.n) == (0.75, 4)


def test_a_metric_over_all_sub_splits_at_once(tmp_path: Path) -> None:
    stats = [_row("num_instances", [float(n)], sub_split=s) for n, s in ((3, "a"), (1, "b"))]
    score, _ = scores.read(_write(tmp_path, [*stats, _row("macro_f1", [0.7])], []), "b", "macro_f1", "test", False)
    assert (score.value, score.n) == (0.7, 4)


def test_n_counts_the_instances_that_have_the_metric(tmp_path: Path) -> None:
    """HELM computes a metric of references only for instances that have some."""
    values = [0.0, 1.0, 1.0, 1.0, 1.0]
    instances = [_instance(f"id{i}", em=v) for i, v in enumerate(values)]
    instances += [_instance(f"id{i}", num_prompt_tokens=3.0) for i in range(5, 100)]
    stats = [_row("num_instances", [100.0]), _row("em", [0.8])]
    score, found = scores.read(_write(tmp_path, stats, instances), "b", "em", "test", False)
    assert (score.value, score.n, len(found)) == (0.8, 5, 5)
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(5))


@pytest.mark.parametrize(
    ("stats", "error", "message"),
    [
        ([], ConfigError, "no instances of the split 'test'; HELM found no data"),
        ([_row("em", [1.0]), _row("num_instances", [])], ConfigError, "no instances"),
        ([_row("em", [1.0], "valid"), _row("num_instances", [3.0], "valid")], ConfigError, r"\(it has valid\)"),
        ([_row("exact_match", [1.0]), _row("num_instances", [3.0])], ConfigError, "no metric 'em'"),
        ([_row("em", []), _row("num_instances", [3.0])], ConfigError, "no metric 'em'"),
        ([_row("em", [math.inf]), _row("num_instances", [3.0])], CheckpointError, "em is inf"),
    ],
)
def test_what_is_missing_is_an_error_and_never_a_zero(
    tmp_path: Path, stats: list[dict[str, Any]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scores.read(_write(tmp_path, stats, []), "b", "em", "test", False)


def test_a_metric_that_helm_dropped_for_being_nan_is_the_checkpoints_fault(tmp_path: Path) -> None:
    _write(tmp_path, [_row("num_instances", [3.0])], [])
    with pytest.raises(CheckpointError, match="em is not a number"):
        scores.read(tmp_path, "b", "em", "test", False, was_nan=True)


def test_a_dropped_metric_belongs_to_its_own_run_and_its_last_try(tmp_path: Path) -> None:
    dropped, head = "x WARNING   Removing stat {} because its value is NaN\n", "x INFO  Running {} {{\n"
    lines = [
        dropped.format("of_no_run"),
        head.format("a:b=held out,groups=0"), dropped.format("em"),
        head.format("c"), dropped.format("f1"), dropped.format("f1"), "x INFO  }} [0.1s]\n",
        head.format("a:b=held out,groups=0"), dropped.format("f1"),
        head.format("d"),
    ]  # fmt: skip
    (tmp_path / "log").write_text("".join(lines))
    assert reason.dropped_nan(tmp_path / "log") == {"a:b=held out,groups=0": {"f1"}, "c": {"f1"}, "d": set()}
    assert reason.dropped_nan(tmp_path / "none") == {}


def test_files_that_are_missing_or_torn(tmp_path: Path) -> None:
    with pytest.raises(AutoEvalError, match=r"stats\.json: HELM left no readable results"):
        scores.read(tmp_path, "b", "em", "test", False)
    (tmp_path / "stats.json").write_text("[{")
    with pytest.raises(AutoEvalError, match="no readable results"):
        scores.read(tmp_path, "b", "em", "test", False)


@pytest.mark.parametrize(
    ("log", "kind", "message"),
    [
        (f"helm.CannotLoad: {reason.CANNOT_LOAD}: the model in /m: E: bad\nFileNotFoundError: x\nRunnerError: ",
         CheckpointError, "the model in /m: E: bad; log: "),
        ("helm.benchmark.executor.ExecutorError: Log probs have NaN Request: Request(prompt='long')",
         CheckpointError, "ExecutorError: Log probs have NaN; the model's outputs are broken; log"),
        ("AssertionError: Log probs have NaN for RequestState: RequestState(x)", CheckpointError, "have NaN; the"),
        ("urllib.error.URLError: <urlopen error [Errno -2] Name or service not known>\nhelm.x.RunnerError: Failed",
         ConfigError, "put the data under data_dir"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'x.csv'", ConfigError, "x.csv"),
        ("ModuleNotFoundError: No module named 'gdown'", ConfigError, "install it in the HELM environment"),
        ("torch.OutOfMemoryError: CUDA out of memory.", AutoEvalError, "CUDA out of memory"),
        ("", AutoEvalError, "exit status 1, and no exception in the log"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure(tmp_path: Path, log: str, kind: type[AutoEvalError], message: str) -> None:
    (tmp_path / "log").write_text(log)
    error = reason.failure(1, tmp_path / "log", "HELM failed at entries[0] (mmlu)")
    assert type(error) is kind
    assert message in str(error)
    assert str(error).startswith("HELM failed at entries[0] (mmlu): ")
    assert str(error).endswith(f"log: {tmp_path / 'log'}")
    assert "\n" not in str(error)


def test_a_run_that_was_killed_is_not_blamed_on_what_its_log_says_last(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("FileNotFoundError: [Errno 2] No such file or directory: 'x', so something else\n")
    error = reason.failure(-9, tmp_path / "log", "HELM failed at entries[0]")
    assert type(error) is AutoEvalError
    assert str(error).startswith("HELM failed at entries[0]: killed by signal 9 (SIGKILL: out of memory? ")
