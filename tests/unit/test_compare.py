"""`autoeval-runner compare A B`: which checkpoints are meant, what can be compared, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import ConfigError
from eval_runner.cli import cli
from eval_runner.results.compare import Compared, compare, find
from eval_runner.results.schema import Evaluation, Instance, Result, Score
from eval_runner.results.statistics import mean_stderr
from tests.results_samples import instances_of, publish, queue, result, score

BAD, GOOD = [0.0] * 12 + [1.0] * 28, [0.0] * 2 + [1.0] * 38


def answered(values: Sequence[float], **names: object) -> tuple[Score, list[Instance]]:
    value, stderr = mean_stderr(values)
    s = score(value, stderr, n=len(values), **names)  # type: ignore[arg-type]
    return s, instances_of(s, values)


class Made:
    """Results with their instances."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.kept: dict[str, list[Instance]] = {}

    def add(self, step: int, *given: tuple[Score, list[Instance]], **names: object) -> Result:
        made = result(step, *(s for s, _ in given), **names)  # type: ignore[arg-type]
        self.put(made, [i for _, some in given for i in some])
        return made

    def put(self, made: Result, kept: list[Instance]) -> None:
        self.results.append(made)
        self.kept[made.ticket] = kept

    def compare(self, a: str, b: str, **how: object) -> Compared:
        sides = find(self.results, a), find(self.results, b)
        return compare(*sides, lambda r: self.kept[r.ticket], **how)  # type: ignore[arg-type]


@pytest.fixture
def made() -> Made:
    return Made()


def test_better_worse_and_noise_with_holms_correction(made: Made) -> None:
    lower = {"benchmark": "web", "metric": "bpb", "higher": False}
    loss = [1.0 + i / 100 for i in range(40)]
    made.add(1, answered(BAD), answered(loss, **lower), answered(BAD, benchmark="c"))
    slower = [value + 0.1 + 0.001 * (i % 3) for i, value in enumerate(loss)]
    made.add(2, answered(GOOD), answered(slower, **lower), answered([1.0, *BAD[1:]], benchmark="c"))
    found = made.compare("1", "2")
    mcqa, web, c = found.pairs
    assert (mcqa.verdict, web.verdict, c.verdict) == ("better", "worse", "within noise")
    assert mcqa.tested is not None
    assert (mcqa.tested.difference.test, mcqa.tested.difference.p) == ("McNemar", 2 / 2**10)
    assert mcqa.adjusted == pytest.approx(2 * 2 / 2**10)    # the second smallest of three
    assert c.adjusted == 1.0
    assert web.tested is not None and web.tested.difference.test == "paired t"  # noqa: PT018
    assert found.sentence == (
        "demo@2 against demo@1, on 3 scores: better on 1 (mcqa.exact_match), worse on 1 (web.bpb), within noise on 1."
    )


def test_without_a_correction_more_is_found(made: Made) -> None:
    changed = [1.0] * 6 + [0.0] * 6 + [1.0] * 28           # 6 up, none down: p = 2 / 2**6 = 0.031
    made.add(1, answered(BAD), answered(BAD, benchmark="b"))
    made.add(2, answered(changed), answered(changed, benchmark="b"))
    assert made.compare("1", "2", correction="none").count("better") == 2
    assert made.compare("1", "2", correction="bh").count("better") == 2
    assert made.compare("1", "2").count("within noise") == 2
    assert made.compare("1", "2", wanted=["b.EM"]).count("better") == 1


def test_what_is_not_comparable_and_why(made: Made) -> None:
    made.add(1, answered(BAD), suite_digest="a" * 64)
    made.add(2, answered(GOOD), suite_digest="b" * 64)
    (pair,) = made.compare("1", "2").pairs
    assert (pair.verdict, pair.note) == ("not comparable", "the suite's definition is another")
    assert made.compare("1", "2").sentence == "demo@2 cannot be compared with demo@1: no score could be tested."


def judged(made: Made, step: int, judge: str, digest: str = "") -> None:
    given = answered(BAD, metric="win_rate")
    plain = result(step, given[0])
    evaluation = Evaluation("gpt", 1.0, plain.scores, {"judge": judge}, {"questions": digest} if digest else {})
    made.put(replace(plain, evaluations=(evaluation,)), given[1])


def test_another_judge_and_other_files(made: Made) -> None:
    judged(made, 1, "gpt-4o", "a")
    judged(made, 2, "gpt-5", "a")
    judged(made, 3, "gpt-5", "b")
    assert made.compare("1", "2").pairs[0].note == "the judge is another: gpt-4o → gpt-5"
    assert made.compare("2", "3").pairs[0].note == "the evaluators read other files, such as questions"


def test_other_questions_and_some_of_them(made: Made) -> None:
    s, kept = answered(BAD)
    made.add(1, (s, kept))
    made.add(2, (s, [replace(i, id=f"other-{i.id}") for i in kept]))
    made.add(3, (s, [i if n < 30 else replace(i, id=f"other-{i.id}") for n, i in enumerate(kept)]))
    assert made.compare("1", "2").pairs[0].note == "other questions: 0 of 40 are in both"
    (pair,) = made.compare("1", "3").pairs
    assert (pair.verdict, pair.note) == ("within noise", "on the 30 instances that both have")


def test_one_instance_is_too_few(made: Made) -> None:
    made.add(1, answered([0.0]))
    made.add(2, answered([1.0]))
    assert made.compare("1", "2").pairs[0].note == "too few instances: 1"


def test_so_many_scores_that_the_bootstrap_can_tell_none_are_refused(made: Made) -> None:
    many = [f"b{i}" for i in range(201)]
    made.add(1, *(answered([0.0] * 40, benchmark=name) for name in many))
    made.add(2, *(answered([1.0] * 30 + [0.0] * 10, benchmark=name) for name in many))
    with pytest.raises(ConfigError, match=r"4000 resamples tell no p below 0\.00025, so that of 201 scores"):
        made.compare("1", "2", resampled=True)
    with pytest.raises(ConfigError, match="--bootstrap"):
        made.compare("1", "2", resampled=True, correction="bh")
    assert made.compare("1", "2").count("better") == 201
    assert made.compare("1", "2", resampled=True, wanted=["b7.EM"]).count("better") == 1


def test_no_instances_leave_the_standard_errors(made: Made) -> None:
    made.add(1, (score(0.2, 0.03), []), (score(0.2, None, benchmark="b"), []))
    made.add(2, (score(0.5, 0.04), []), (score(0.5, None, benchmark="b"), []))
    known, unknown = made.compare("1", "2", resampled=True).pairs
    assert (known.verdict, known.note) == ("better", "not paired: no per-instance values, so no bootstrap")
    assert (unknown.verdict, unknown.adjusted) == ("not tested", None)


def test_a_score_that_one_lacks(made: Made) -> None:
    made.add(1, answered(BAD), answered(BAD, benchmark="b"))
    made.add(2, answered(GOOD), answered(GOOD, benchmark="c"))
    notes = {pair.benchmark: pair.note for pair in made.compare("1", "2").pairs}
    assert notes == {"mcqa": "", "b": "B has no such score", "c": "A has no such score"}
    assert made.compare("1", "2").sentence.endswith("better on 1 (mcqa.exact_match); 2 could not be compared.")


def test_without_a_direction_it_is_higher_or_lower(made: Made) -> None:
    made.add(1, answered(BAD, higher=None))
    made.add(2, answered(GOOD, higher=None))
    assert (made.compare("1", "2").pairs[0].verdict, made.compare("2", "1").pairs[0].verdict) == ("higher", "lower")


# ---------------------------------------------------------------------- which checkpoints


def test_what_a_checkpoint_is_called(made: Made) -> None:
    made.add(1, answered(BAD))
    made.add(2, answered(GOOD))
    last = made.add(3, answered(BAD))
    names = {"1": 1, "demo@2": 2, "id-demo@2": 2, "demo@latest": 3, "latest": 3, "demo@best": 2, last.ticket[:8]: 3}
    for called, step in names.items():
        assert find(made.results, called).name == f"demo@{step}"


@pytest.mark.parametrize(
    ("called", "says"),
    [
        ("7", "there are several runs, so write RUN@7; they are demo, other"),
        ("demo@7", "'demo@7': demo has no scores at step 7; it has steps 1, 2"),
        ("demmo@1", "no result is of a run called so; did you mean 'demo'"),
        ("demo@newest", "is no [RUN@]STEP, RUN@latest, RUN@best or ticket"),
        ("fffffffff", "no ticket with scores begins so"),
    ],
)
def test_nobody_is_called_so(made: Made, called: str, says: str) -> None:
    made.add(1, answered(BAD))
    made.add(2, answered(BAD))
    made.add(1, answered(BAD), run="other")
    with pytest.raises(ConfigError) as caught:
        find(made.results, called)
    assert says in str(caught.value)


def test_no_results_at_all() -> None:
    with pytest.raises(ConfigError, match="there are no results yet"):
        find([], "latest")


def test_a_checkpoint_that_was_written_again_has_its_digest(made: Made) -> None:
    made.add(1, answered(BAD), checkpoint_digest="a" * 64)
    made.put(replace(result(1, answered(GOOD)[0], checkpoint_digest="b" * 64), saved_at=2e9), answered(GOOD)[1])
    assert find(made.results, "demo@1").rows[0].result.checkpoint_digest == "b" * 64
    assert made.compare("demo@aaaaaaaa@1", "1").count("better") == 1


# ---------------------------------------------------------------------- the command


@pytest.fixture
def config(tmp_path: Path) -> Path:
    root = queue(tmp_path / "queue")
    path = tmp_path / "autoeval.yaml"
    path.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\nsinks: []\n")
    for step, values in ((100, GOOD), (200, BAD)):
        s, kept = answered(values)
        publish(root, result(step, s), kept)
    return path


def test_the_command(config: Path) -> None:
    def run(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["compare", "--config", str(config), *args])
        return done.exit_code, done.output

    status, out = run("100", "200")
    assert status == 0
    assert "worse" in out
    assert out.splitlines()[-1] == "demo@200 against demo@100, on 1 score: worse on 1 (mcqa.exact_match)."
    assert run("100", "200", "--fail-on-regression")[0] == 1
    assert run("200", "100", "--fail-on-regression")[0] == 0
    data = json.loads(run("100", "200", "--json")[1])
    assert data["pairs"][0]["verdict"] == "worse"
    assert data["pairs"][0]["tested"]["difference"] == {
        "value": pytest.approx(-0.25), "stderr": pytest.approx(0.06934, abs=1e-4), "n": 40, "p": 2 / 2**10,
        "test": "McNemar",
    }  # fmt: skip
    assert "| mcqa | exact\\_match |" in run("100", "200", "--markdown")[1]
    assert "bootstrap, n = 40" in run("100", "200", "--bootstrap")[1]


def test_nothing_that_could_be_compared_is_no_pass(config: Path) -> None:
    s, kept = answered(GOOD)
    publish(config.parent / "queue", result(300, s, suite_digest="f" * 64, finished=3e9), kept)
    done = CliRunner().invoke(cli, ["compare", "--config", str(config), "100", "300", "--fail-on-regression"])
    assert done.exit_code == 1
    assert "the suite's definition is another" in done.output
