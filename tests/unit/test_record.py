"""`autoeval-runner record --print-only`: the three documented kinds of file, and our own results. No W&B."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoeval_hooks.errors import ConfigError, QueueError
from eval_runner.cli import cli
from eval_runner.recorder import board_wandb, sources
from eval_runner.recorder.settings import Settings
from tests.recorder_files import SUMMARY, old_suite, recorder_yaml, write_tables
from tests.results_samples import publish, queue, result, score

FILE = """
project: board
base_url: http://127.0.0.1:9
evals:
  - eval_type: helm
    model_name: llama-7b
    source: file
    token_num: 1000
    eval_result:
      mmlu:
        EM: 0.345
      msmarco_trec:
        NDCG@10: 0.482
"""


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports wandb fails."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)


def printed(file: Path, *options: str, status: int = 0) -> Result:
    found = CliRunner().invoke(cli, ["record", "--config", str(file), "--print-only", *options])
    assert found.exit_code == status, (found.output, found.exception)
    return found


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recorder.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("options", [(), ("--summary-only",)])
def test_helm_output_is_printed_by_step_in_the_order_asked_for(tmp_path: Path, options: tuple[str, ...]) -> None:
    old_suite(tmp_path / "out")
    found = printed(recorder_yaml(tmp_path, tmp_path / "out"), *options)
    assert found.stdout.splitlines() == [
        f"mymodel\t{step}\t{key}\t{value}" for step, row in SUMMARY.items() for key, value in row.items()
    ]
    assert "evals[0]: mmlu: from HELM's table" in found.stderr


def test_values_of_the_file(tmp_path: Path) -> None:
    assert printed(write(tmp_path, FILE)).stdout == (
        "llama-7b\t0\tmmlu.EM\t0.345\nllama-7b\t0\tmsmarco_trec.NDCG@10\t0.482\n"
    )


def test_a_benchmark_that_is_asked_for_and_missing_is_named_and_the_rest_printed(tmp_path: Path) -> None:
    old_suite(tmp_path / "out")
    more = "      - {name: quac, metrics: [F1]}\n      - {name: raft, metrics: [EM]}\n"
    text = recorder_yaml(tmp_path, tmp_path / "out").read_text() + more
    found = printed(write(tmp_path, text), status=1)
    assert len(found.stdout.splitlines()) == 9
    assert f"missing: evals[0]: {tmp_path}/out/runs/demo has nothing of quac, raft" in found.stderr


def test_the_sixteen_default_ones_are_looked_for_and_those_that_are_not_there_are_said(tmp_path: Path) -> None:
    old_suite(tmp_path / "out")
    found = printed(recorder_yaml(tmp_path, tmp_path / "out", benchmarks=""))
    assert len(found.stdout.splitlines()) == 9
    assert "has nothing of raft, imdb, truthful_qa, summarization_cnndm" in found.stderr
    assert "missing" not in found.stderr


def test_nothing_at_all_is_missing(tmp_path: Path) -> None:
    write_tables(tmp_path / "out", "demo", "gsm", ("", ["EM"], {"m/1": [0.5]}))
    found = printed(recorder_yaml(tmp_path, tmp_path / "out", benchmarks=""), status=1)
    assert found.stdout == ""
    assert "missing: evals[0]: nothing to record of mymodel" in found.stderr


def test_several_entries_of_one_model_are_one_curve(tmp_path: Path) -> None:
    entry = FILE.partition("evals:\n")[2]
    text = FILE + entry.replace("token_num: 1000", "default_iteration: 5") + entry.replace("mmlu", "boolq")
    found = sources.gather(write(tmp_path, text))
    (curve,) = found.curves
    assert {step: [*row] for step, row in curve.rows.items()} == {
        0: ["mmlu.EM", "msmarco_trec.NDCG@10", "boolq.EM"], 5: ["mmlu.EM", "msmarco_trec.NDCG@10"],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"two entries give mmlu\.EM of 'llama-7b' at step 0 differently"):
        sources.gather(write(tmp_path, FILE + entry.replace("0.345", "0.5")))


def test_a_runs_configuration_is_what_all_its_entries_say(tmp_path: Path) -> None:
    entry = FILE.partition("evals:\n")[2]
    step = "    default_iteration: {}\n    token_num: {}"
    others = [entry.replace("    token_num: 1000", step.format(i, n)) for i, n in ((5, 1000), (6, 2000), (7, 1000))]
    alike, different = (sources.gather(write(tmp_path, FILE + "".join(some))) for some in (others[:1], others))
    assert alike.curves[0].config == {"token_num": 1000.0}
    assert different.curves[0].config == {}
    assert different.curves[0].tokens == {0: 1000.0, 5: 1000.0, 6: 2000.0, 7: 1000.0}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("source: helm, helm_output_dir: {}, helm_suite_name: s", "helm_output_dir: {} has no directory `runs`"),
        ("source: autoeval, results: {}", "results: {} is not there; name a queue, or the autoeval.yaml"),
    ],
)
def test_a_directory_that_is_not_there_keeps_no_other_entry_back(tmp_path: Path, entry: str, said: str) -> None:
    gone = tmp_path / "gone"
    text = FILE.replace("evals:\n", f"evals:\n  - {{model_name: a, {entry.format(gone)}}}\n")
    found = printed(write(tmp_path, text), status=1)
    assert len(found.stdout.splitlines()) == 2
    assert f"missing: evals[0]: {said.format(gone)}" in found.stderr


def test_the_curves_are_a_run_for_each_benchmark_and_the_summary(tmp_path: Path) -> None:
    old_suite(tmp_path / "out")
    file = recorder_yaml(tmp_path, tmp_path / "out")
    found = sources.gather(file)
    assert [curve.run_id("board") for curve in found.curves] == [
        "board-mymodel-mmlu", "board-mymodel-boolq", "board-mymodel-narrative_qa", "board-mymodel-summary",
    ]  # fmt: skip
    assert [curve.tag for curve in found.curves] == ["detail", "detail", "detail", "summary"]
    assert found.curves[-1].config == {"token_per_iteration": 0.004}
    assert found.curves[-1].tokens == {1000: 4.0, 2000: 8.0, 3000: 12.0}
    assert [c.name for c in sources.gather(file, summary_only=True).curves] == ["summary"]


# ---------------------------------------------------------------------- our own results


def own(tmp_path: Path, more: str = "") -> Path:
    file = tmp_path / "autoeval.yaml"
    file.write_text(f"queue: queue\nsuites: {{quick: {{evaluators: [{{type: helm, entries: [a]}}]}}}}\n{more}")
    root = queue(tmp_path / "queue")
    for step in (200, 100):
        publish(root, result(
            step, score(step / 1000, benchmark="mmlu.a"), score(step / 500, benchmark="mmlu.b"),
            score(0.5, benchmark="web", metric="bits_per_byte"), tokens=step * 10**9,
        ))  # fmt: skip
    return file


def test_our_results_by_their_own_names_and_the_core_metrics_by_theirs(tmp_path: Path) -> None:
    assert printed(own(tmp_path)).stdout.splitlines() == [
        "demo\t100\tmmlu.EM\t0.15000000000000002", "demo\t100\tmmlu.a.exact_match\t0.1",
        "demo\t100\tmmlu.b.exact_match\t0.2", "demo\t100\tweb.bits_per_byte\t0.5",
        "demo\t200\tmmlu.EM\t0.30000000000000004", "demo\t200\tmmlu.a.exact_match\t0.2",
        "demo\t200\tmmlu.b.exact_match\t0.4", "demo\t200\tweb.bits_per_byte\t0.5",
    ]  # fmt: skip


def test_each_suite_and_definition_is_a_curve_of_its_own(tmp_path: Path) -> None:
    file = own(tmp_path)
    publish(tmp_path / "queue", result(300, score(0.7, benchmark="web", metric="bits_per_byte"), suite_digest="f" * 64))
    publish(tmp_path / "queue", result(300, score(0.8), suite="deep", finished=9e9))
    found = sources.gather(file)
    names = {curve.name.partition("@")[0]: curve.key for curve in found.curves}
    assert [curve.name.partition("@")[0] for curve in found.curves] == ["deep", "quick", "quick"]
    assert len({curve.run_id("p") for curve in found.curves}) == 3
    assert names["quick"].startswith("quick-")
    assert found.curves[0].tokens == {}
    (earlier,) = [curve for curve in found.curves if "@" in curve.name]
    assert earlier.tokens == {100: 100.0, 200: 200.0}
    assert [curve.tag for curve in found.curves] == [
        "earlier" if curve is earlier else "summary" for curve in found.curves
    ]  # fmt: skip
    assert len({(curve.config["suite"], curve.config["definition"]) for curve in found.curves}) == 3
    assert all(line.startswith("demo/") for line in found.lines)


def test_of_a_checkpoint_that_was_written_again_the_last_counts(tmp_path: Path) -> None:
    file = own(tmp_path)
    again = replace(result(200, score(0.9), checkpoint_digest="a" * 64, finished=9e9), saved_at=8e9)
    publish(tmp_path / "queue", again)
    (curve,) = sources.gather(file).curves
    assert curve.rows[200] == {"mcqa.exact_match": 0.9}
    assert curve.model == "demo"


def test_of_several_results_at_one_step_the_last_counts(tmp_path: Path) -> None:
    file = own(tmp_path)
    scores = (score(0.5, benchmark="mmlu.a"), score(0.7, benchmark="mmlu.b"))
    publish(tmp_path / "queue", replace(result(200, *scores, finished=9e9), ticket="b" * 64))
    (curve,) = sources.gather(file).curves
    assert curve.rows[200]["mmlu.a.exact_match"] == 0.5
    assert curve.rows[200]["mmlu.EM"] == pytest.approx(0.6)


def test_a_recorder_file_names_our_results_with_run_suite_and_benchmarks(tmp_path: Path) -> None:
    file = own(tmp_path)
    publish(tmp_path / "queue", result(300, score(0.9, benchmark="mmlu.a"), run="other"))
    entry = f"model_name: mine, source: autoeval, results: {file}, run: demo, suite: quick, token_per_iteration: 0.5"
    asked = "[{name: mmlu, metrics: [EM]}, {name: boolq, metrics: [EM]}]"
    text = f"project: p\nevals: [{{{entry}, benchmarks: {asked}}}]\n"
    found = printed(write(tmp_path, text), status=1)
    assert found.stdout == "mine\t100\tmmlu.EM\t0.15000000000000002\nmine\t200\tmmlu.EM\t0.30000000000000004\n"
    assert "missing: evals[0]: demo, suite quick: boolq.EM: nothing of step 100, 200" in found.stderr
    with pytest.raises(ConfigError, match=r"evals\[0\].run: the results are of several runs: demo, other; name one"):
        sources.gather(write(tmp_path, text.replace("run: demo, ", "")))
    with pytest.raises(ConfigError, match="no result is of a run called 'dem'; did you mean 'demo'"):
        sources.gather(write(tmp_path, text.replace("run: demo", "run: dem")))
    with pytest.raises(ConfigError, match="no result is of a suite called 'slow'"):
        sources.gather(write(tmp_path, text.replace("suite: quick", "suite: slow")))


def test_an_older_watchers_file_with_its_own_choice_of_benchmarks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, """
auto_eval:
  project_name: proj
  model_name: tiny
  cache_dir: cache
  megatron: {checkpoint_path: ckpt, tokenizer_type: gpt2, vocab_path: v, merge_path: m, token_per_iteration: 0.5}
  helm:
    helm_spec_template_path: spec.conf
    helm_output_path: out
    benchmarks: [{name: mmlu, metrics: [EM]}]
  wandb: {project: board, base_url: http://127.0.0.1:9}
""")
    root = queue(tmp_path / "cache" / "autoeval")
    scores = (score(0.1, benchmark="mmlu.a"), score(0.3, benchmark="mmlu.b"), score(0.9))
    publish(root, result(100, *scores, run="proj-tiny"))
    found = sources.gather(file)
    assert found.lines == ["proj-tiny\t100\tmmlu.EM\t0.2"]
    assert (found.place.project, found.place.base_url) == ("board", "http://127.0.0.1:9")
    (curve,) = found.curves
    assert curve.tokens == {100: 50.0}
    assert curve.config["token_per_iteration"] == 0.5


def test_an_average_without_all_parts_is_no_value(tmp_path: Path) -> None:
    file = own(tmp_path)
    publish(tmp_path / "queue", result(300, score(0.9, benchmark="mmlu.a")))
    found = printed(file, status=1)
    assert "300\tmmlu.EM" not in found.stdout
    assert "300\tmmlu.a.exact_match\t0.9" in found.stdout
    assert "missing: demo, suite quick: mmlu.EM at step 300: lacks mmlu.b, so that there is no average" in found.stderr


def test_a_queue_without_results_and_one_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "autoeval.yaml"
    file.write_text("queue: queue\nsuites: {quick: {evaluators: [{type: helm, entries: [a]}]}}\n")
    with pytest.raises(QueueError, match="is not there"):
        sources.gather(file)
    queue(tmp_path / "queue")
    assert "has no results yet" in printed(file, status=1).stderr


def test_without_print_only_a_project_is_needed_before_anything_is_asked(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["record", "--config", str(own(tmp_path))])
    assert isinstance(found.exception, ConfigError)
    assert "run.project: missing; name the W&B project" in str(found.exception)


def test_terminals_are_safe_from_names(tmp_path: Path) -> None:
    text = FILE.replace("llama-7b", '"a\\e[2Jb"')
    assert printed(write(tmp_path, text)).stdout.startswith("a\\x1b[2Jb\t0\t")


def test_a_file_with_a_leaderboard_makes_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def make(settings: Settings, *, print_only: bool) -> list[str]:
        asked.append((settings.project, print_only))
        return ["the\tboard"]

    monkeypatch.setattr(board_wandb, "make", make)
    assert printed(write(tmp_path, FILE + "leaderboard: True\n")).stdout.splitlines()[-1] == "the\tboard"
    assert printed(write(tmp_path, "project: board\nleaderboard: True\n")).stdout == "the\tboard\n"
    printed(write(tmp_path, FILE))
    assert asked == [("board", True)] * 2
