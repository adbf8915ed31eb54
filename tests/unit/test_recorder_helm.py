"""HELM's output as the recorder reads it: the older tables, today's, and run directories; numbers by hand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from autoeval_hooks.errors import ConfigError
from eval_runner.recorder import helm_output
from eval_runner.recorder.helm_output import Found, split_step
from eval_runner.recorder.settings import Benchmark, HelmSource
from tests.recorder_files import SUMMARY, old_suite, write_run, write_tables

RECORDED = Path(__file__).parents[1] / "recorded" / "helm"
ASKED = (Benchmark("mmlu", ("EM",)), Benchmark("boolq", ("EM",)), Benchmark("narrative_qa", ("F1",)))


def read(
    output: Path, *asked: Benchmark, suite: str = "demo", model: str = "mymodel", given: str = "", default: int = 0
) -> Found:
    return helm_output.read(HelmSource(output, suite, given), model, asked or ASKED, default, "r.yaml: evals[0]")


@pytest.mark.parametrize("name", ["mymodel/demo/{}", "mymodel/demo_{}", "demo/{}", "demo_{}"])
def test_the_older_tables_give_the_older_numbers(tmp_path: Path, name: str) -> None:
    old_suite(tmp_path, name)
    found = read(tmp_path)
    assert found.summary == SUMMARY
    assert (found.missing, found.absent) == ([], [])
    assert found.notes == ["mmlu: from HELM's table", "boolq: from HELM's table", "narrative_qa: from HELM's table"]
    assert found.details["mmlu"][2000] == {
        "mmlu.EM": 0.5, "mmlu.subject: anatomy.EM": 0.25, "mmlu.subject: virology.EM": 0.75,
    }  # fmt: skip
    assert found.details["boolq"] == {1000: {"boolq.EM": 0.1}, 2000: {"boolq.EM": 0.2}, 3000: {"boolq.EM": 0.3}}


@pytest.mark.parametrize(
    ("name", "step"),
    [("a/100", 100), ("a_100", 100), ("m/a_b/7", 7), ("a/100 [method: x, y: 2]", 100), ("gpt2", None), ("a-100", None)],
)
def test_a_models_step_stands_at_the_end_of_its_name(name: str, step: int | None) -> None:
    assert split_step(name)[1] == step


def test_a_model_without_a_step_has_the_default_one(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["EM"], {"openai/gpt2": [0.5]}))
    assert read(tmp_path, ASKED[1], default=70).summary == {70: {"boolq.EM": 0.5}}


def test_a_column_of_perturbed_data_or_of_another_benchmark_is_not_taken(tmp_path: Path) -> None:
    write_tables(
        tmp_path, "demo", "boolq", ("", ["EM (Robustness)", "BoolQ - EM"], {"m/1": [0.9, 0.5]}), metadata=False
    )
    assert read(tmp_path, ASKED[1]).summary == {1: {"boolq.EM": 0.5}}


def test_an_empty_cell_is_missing_and_not_zero(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["EM"], {"m/1": [0.5], "m/2": [None], "m/3": [float("nan")]}))
    found = read(tmp_path, ASKED[1])
    assert found.summary == {1: {"boolq.EM": 0.5}}
    assert found.missing == [f"boolq.EM at step {step}: HELM has no value there" for step in (2, 3)]


def test_an_average_without_all_parts_is_named_and_not_taken(tmp_path: Path) -> None:
    write_tables(
        tmp_path, "demo", "mmlu",
        ("MMLU", ["EM"], {"m/1": [0.5], "m/2": [0.7]}),
        ("subject: a", ["EM"], {"m/1": [0.2]}),
        ("subject: b", ["EM"], {"m/1": [0.8], "m/2": [0.7]}),
        ("subject: of another", ["EM"], {"other/1": [0.8]}),
        metadata=True,
    )  # fmt: skip
    found = read(tmp_path, ASKED[0])
    assert found.summary == {1: {"mmlu.EM": 0.5}}
    assert found.missing == ["mmlu.EM at step 2: lacks subject: a, so that there is no average"]
    assert found.details["mmlu"][2] == {"mmlu.subject: b.EM": 0.7}


def test_all_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["PEM"], {"m/1": [0.5]}))
    write_tables(tmp_path, "demo", "mmlu", ("", ["EM"], {"m/1": [0.5], "m/2": [0.5]}))
    write_tables(tmp_path, "demo", "imdb", ("", ["EM"], {"m/1": [0.5]}))
    found = read(tmp_path, *ASKED, Benchmark("imdb", ("EM",)), Benchmark("quac", ("F1",)))
    assert found.absent == ["narrative_qa", "quac"]
    assert found.missing == [
        "boolq.EM: no run has such a metric; its table has PEM", "imdb.EM: nothing of step 2",
    ]  # fmt: skip


def test_a_benchmark_of_other_models_only_is_missing(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["EM"], {"other/1": [0.5]}))
    write_tables(tmp_path, "demo", "mmlu", ("", ["EM"], {"mymodel/1": [0.5]}))
    found = read(tmp_path, *ASKED[:2])
    assert found.summary == {1: {"mmlu.EM": 0.5}}
    assert found.missing == ["boolq.EM: HELM has nothing of this model"]


def test_two_rows_of_one_step_that_disagree_are_no_value(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["EM"], {"m/1 [k: 1]": [0.5], "m/1 [k: 2]": [0.6], "m/2": [0.7]}))
    found = read(tmp_path, ASKED[1])
    assert found.summary == {2: {"boolq.EM": 0.7}}
    assert found.missing == ["boolq.EM at step 1: has 2 different values there, and which to take is not clear"]


def test_of_several_models_only_the_named_one_is_recorded(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["EM"], {"x/mymodel/1": [0.5], "x/other/1": [0.9], "gpt2": [0.8]}))
    found = read(tmp_path, ASKED[1])
    assert found.summary == {1: {"boolq.EM": 0.5}}
    assert found.notes[-1] == "other models of the suite are left out: gpt2, x/other"
    assert read(tmp_path, ASKED[1], given="x/other").summary == {1: {"boolq.EM": 0.9}}
    with pytest.raises(ConfigError, match=r"model_name: the suite's models are gpt2, x/mymodel, x/other, and none is"):
        read(tmp_path, ASKED[1], model="llama")
    with pytest.raises(ConfigError, match="helm_model: the suite's models are"):
        read(tmp_path, ASKED[1], given="mymodel")


def test_run_directories_give_what_the_table_would(tmp_path: Path) -> None:
    for step, (a, b) in {1: (0.0, 0.5), 2: (0.25, 1.0)}.items():
        for subject, value in (("a", a), ("b", b)):
            write_run(tmp_path, "demo", f"m/{step}", "mmlu", {"exact_match": value, "quasi_exact_match": 0.99},
                      args={"subject": subject}, older=step == 1)  # fmt: skip
        stats = {"exact_match": 0.0, "quasi_exact_match": step / 4}
        write_run(tmp_path, "demo", f"m/{step}", "boolq", stats, split="valid")
    write_run(tmp_path, "demo", "m/1", "boolq", {"quasi_exact_match": 0.9}, split="valid", args={"only_contrast": True},
              groups=["robustness_contrast_sets"])  # fmt: skip
    found = read(tmp_path, *ASKED[:2])
    assert found.summary == {1: {"mmlu.EM": 0.25, "boolq.EM": 0.25}, 2: {"mmlu.EM": 0.625, "boolq.EM": 0.5}}
    assert found.details["mmlu"][2]["mmlu.subject: b.EM"] == 1.0
    assert found.notes[0] == "mmlu: from run directories: HELM has no table with EM (see helm-summarize)"
    assert found.missing == []


def test_a_run_that_is_not_finished_leaves_no_average(tmp_path: Path) -> None:
    for subject in "ab":
        write_run(tmp_path, "demo", "m/1", "mmlu", {"exact_match": 0.5}, args={"subject": subject})
        write_run(tmp_path, "demo", "m/2", "mmlu", {"exact_match": 0.5}, args={"subject": subject},
                  complete=subject == "a")  # fmt: skip
    found = read(tmp_path, ASKED[0])
    assert found.summary == {1: {"mmlu.EM": 0.5}}
    assert found.missing == ["mmlu.EM at step 2: lacks subject: b, so that there is no average"]


def test_runs_that_came_after_the_table_are_read_too(tmp_path: Path) -> None:
    write_tables(tmp_path, "demo", "boolq", ("", ["EM"], {"m/1": [0.5]}))
    for step in (1, 2):
        write_run(tmp_path, "demo", f"m/{step}", "boolq", {"quasi_exact_match": 0.75}, split="valid")
    found = read(tmp_path, ASKED[1])
    assert found.summary == {1: {"boolq.EM": 0.5}, 2: {"boolq.EM": 0.75}}
    assert found.notes == ["boolq: from HELM's table and run directories that came after it"]


def test_what_no_schema_tells_is_not_guessed(tmp_path: Path) -> None:
    write_run(tmp_path, "demo", "m/1", "ours", {"exact_match": 0.5, "quasi_exact_match": 0.6})
    found = read(tmp_path, Benchmark("ours", ("EM", "exact_match")))
    assert found.summary == {1: {"ours.exact_match": 0.5}}
    assert found.missing == [
        "ours.EM: may be exact_match or quasi_exact_match; ask for one by that name, or run helm-summarize"
    ]


def test_a_suite_that_is_not_there_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert read(tmp_path).missing == [
        f"helm_output_dir: {tmp_path} has no directory `runs`; name HELM's output directory"
    ]
    old_suite(tmp_path)
    assert read(tmp_path, suite="dem").missing == [
        f"helm_suite_name: {tmp_path / 'runs'} has no suite 'dem'; it has demo"
    ]
    file = tmp_path / "runs" / "demo" / "groups" / "mmlu.json"
    for torn in ('[{"title": "x"', '{"a": 1}', '[{"title": "x", "header": [{"value": "EM"}], "rows": [[]]}]', "[3]"):
        file.write_text(torn)
        found = read(tmp_path)
        assert re.fullmatch(r".*mmlu\.json: holds no tables of HELM's .*; make it anew.*", found.missing[0])
        assert [(step, {*row}) for step, row in sorted(found.summary.items())] == [
            (step, {"boolq.EM", "narrative_qa.F1"}) for step in SUMMARY
        ]


def test_a_metric_that_the_average_lacks_is_not_taken_from_a_part(tmp_path: Path) -> None:
    write_tables(
        tmp_path, "demo", "mmlu",
        ("MMLU", ["ECE"], {"m/1": [0.9]}),
        ("subject: a", ["EM"], {"m/1": [0.7]}),
        ("subject: b", ["EM"], {"m/1": [0.1]}),
    )  # fmt: skip
    found = read(tmp_path, ASKED[0])
    assert found.summary == {}
    assert found.missing == ["mmlu.EM: no run has such a metric; its table has ECE"]
    for subject, value in (("a", 0.75), ("b", 0.25)):
        write_run(tmp_path, "demo", "m/1", "mmlu", {"exact_match": value}, args={"subject": subject})
    assert read(tmp_path, ASKED[0]).summary == {1: {"mmlu.EM": 0.5}}


@pytest.mark.parametrize("torn", ["run_spec.json", "stats.json"])
def test_a_run_that_cannot_be_read_is_named_and_leaves_no_average_of_its_own(tmp_path: Path, torn: str) -> None:
    """HELM may be writing it."""
    write_run(tmp_path, "demo", "m/1", "boolq", {"quasi_exact_match": 0.5}, split="valid")
    for step, subject in ((1, "a"), (2, "a"), (2, "b"), (1, "b")):
        run = write_run(tmp_path, "demo", f"m/{step}", "mmlu", {"exact_match": 0.5}, args={"subject": subject})
    (run / torn).write_text("")
    found = read(tmp_path, *ASKED[:2])
    assert found.summary == {1: {"boolq.EM": 0.5}, 2: {"mmlu.EM": 0.5}}
    assert torn in found.missing[0]
    assert "if HELM is done" in found.missing[0]
    assert found.missing[1:] == [
        "mmlu.EM at step 1: HELM has no value there" if torn == "run_spec.json" else
        "mmlu.EM at step 1: lacks subject: b, so that there is no average",
        "boolq.EM: nothing of step 2",
    ]  # fmt: skip


def test_what_helm_itself_wrote(tmp_path: Path) -> None:
    """Sums by hand of the runs' stats.json: mmlu has 2 and 3 of 8 right at step 100, 2 and 2 of 8 at step 200."""
    asked = (Benchmark("mmlu", ("EM",)), Benchmark("dyck_language", ("EM",)))
    wanted = {
        100: {"mmlu.EM": 5 / 16, "dyck_language.EM": 0.0}, 200: {"mmlu.EM": 4 / 16, "dyck_language.EM": 0.0},
    }  # fmt: skip
    tables = read(RECORDED, *asked, suite="demo-tiny")
    assert tables.summary == wanted
    assert tables.details["mmlu"][100] == {
        "mmlu.EM": 5 / 16, "mmlu.subject: anatomy.EM": 2 / 8, "mmlu.subject: virology.EM": 3 / 8,
    }  # fmt: skip
    shutil.copytree(RECORDED, tmp_path / "helm")
    shutil.rmtree(tmp_path / "helm" / "runs" / "demo-tiny" / "groups")
    (tmp_path / "helm" / "runs" / "demo-tiny" / "schema.json").unlink()
    runs = read(tmp_path / "helm", *asked, suite="demo-tiny")
    assert (runs.summary, runs.details) == (wanted, tables.details)
    assert "from run directories" in runs.notes[0]
