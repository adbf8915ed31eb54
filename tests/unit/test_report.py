"""The report is read back as a browser would: by an HTML parser, and its charts' data by a JSON parser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autoeval_hooks.errors import QueueError
from eval_runner.cli.report import report as command
from eval_runner.results import store
from eval_runner.results.page.words import duration, number
from eval_runner.results.report import build, generate
from eval_runner.results.schema import Failure, Result
from eval_runner.results.statistics import Z95, mean_stderr, wilson
from eval_runner.results.store import Contents
from tests.results_samples import digest, instances_of, publish, queue, result, score

VOID = {"meta", "br", "input"}


class Page(HTMLParser):
    """All elements, the visible text, each table's cells, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif "style" not in self.open:
            self.text += data
            if any(tag in self.open for tag in ("td", "th")):
                self.tables[-1][-1][-1] += data

    @property
    def data(self) -> Any:
        (found,) = [text for attrs, text in self.scripts if attrs.get("id") == "data"]
        return json.loads(found)


def page(tmp_path: Path, *results: Result, failed: tuple[store.FailedTicket, ...] = ()) -> Page:
    path, _ = build(Contents(results, failed), tmp_path, lambda r: [])
    return Page(path.read_text())


def test_charts_hold_the_numbers_with_their_intervals(tmp_path: Path) -> None:
    names = {"benchmark": "text", "metric": "bits_per_byte"}
    bits = [score(v, e, n=40, higher=False, **names) for v, e in ((3.5, 0.1), (2.5, 0.2))]
    right = score(0.0, 0.0, n=20)
    data = page(
        tmp_path, result(200, bits[1], tokens=4_000_000), result(100, bits[0], right, tokens=2_000_000),
        result(100, score(0.4), run="other", tokens=1_000_000),
    ).data  # fmt: skip
    assert [run["name"] for run in data["runs"]] == ["demo", "other"]
    assert [(c["step"], c["tokens"], c["checkpoint"]) for c in data["runs"][0]["checkpoints"]] == [
        (100, 2_000_000, "checkpoint-100"), (200, 4_000_000, "checkpoint-200"),
    ]  # fmt: skip
    mcqa, text = data["charts"]
    assert (mcqa["title"], text["title"]) == ("mcqa", "text")
    (metric,) = text["metrics"]
    assert (metric["name"], metric["direction"]) == ("bits_per_byte (test)", "↓ lower is better")
    (line,) = metric["lines"]
    assert (line["run"], line["at"], line["value"], line["n"]) == (0, [0, 1], [3.5, 2.5], [40, 40])
    assert line["low"] == [3.5 - Z95 * 0.1, 2.5 - Z95 * 0.2]
    assert line["high"] == [3.5 + Z95 * 0.1, 2.5 + Z95 * 0.2]
    first, second = mcqa["metrics"][0]["lines"]
    assert [first["low"], first["high"]] == [[0.0], [wilson(0.0, 20)[1]]]
    assert (second["run"], second["low"], second["high"]) == (1, [None], [None])
    assert data["tokens"] is True


def test_several_metrics_of_a_benchmark_share_its_chart(tmp_path: Path) -> None:
    found = page(tmp_path, result(1, score(0.5), score(0.6, metric="f1"), score(0.7, split="valid")))
    (chart,) = found.data["charts"]
    assert [m["name"] for m in chart["metrics"]] == ["exact_match (test)", "f1 (test)", "exact_match (valid)"]
    assert sum(tag == "select" for tag, _ in found.elements) == 1
    assert sum(tag == "option" for tag, _ in found.elements) == 3


def test_metrics_stand_as_the_evaluator_gives_them(tmp_path: Path) -> None:
    """In charts and tables, of a run too that lacks the first one."""
    names = ["win_rate", "score", "answer_length"]
    given = [score(0.5, metric=m) for m in names]
    found = page(tmp_path, result(1, *given[1:], run="a", finished=1.0), result(2, *given, run="b", finished=2.0))
    (chart,) = found.data["charts"]
    assert [m["name"] for m in chart["metrics"]] == [f"{name} (test)" for name in names]
    latest = found.tables[1]
    assert [line[0] for line in latest[1:]] == [f"mcqaquick · {name} (test) ↑" for name in names]
    assert [cell.split(" ")[0] for cell in found.tables[-1][0][1:]] == [f"mcqa{name}" for name in names]


def test_categories_are_folded_where_their_benchmark_stands_too(tmp_path: Path) -> None:
    names = ["set", "set.maths", "set.judge_anchors", "other.maths"]
    scores = [score(0.5, benchmark=name) for name in names]
    found = page(tmp_path, result(1, *scores), result(2, *scores))
    latest, latest_folded, table, table_folded = found.tables
    assert [line[0].split("quick")[0] for line in latest[1:]] == ["other.maths", "set", "set.judge_anchors"]
    assert [line[0].split("quick")[0] for line in latest_folded[1:]] == ["set.maths"]
    assert [cell.split("exact")[0] for cell in table[0]] == ["Step", "other.maths", "set", "set.judge_anchors"]
    assert [cell.split("exact")[0] for cell in table_folded[0]] == ["Step", "set.maths"]
    assert [len(line) for line in (*table[1:], *table_folded[1:])] == [4, 4, 2, 2]
    assert "By category  against the previous checkpoint: 1 not tested" in found.text
    details = [attrs for tag, attrs in found.elements if tag == "details"]
    assert details == [{"open": None}, {}, {}]
    assert len(page(tmp_path, result(1, *scores[1:])).tables) == 2


def test_tokens_are_offered_only_where_all_are_known(tmp_path: Path) -> None:
    found = page(tmp_path, result(1, score(0.5), tokens=5), result(2, score(0.5)))
    assert found.data["tokens"] is False
    assert not any(attrs.get("aria-label") == "Horizontal axis" for _, attrs in found.elements)


def test_the_table_has_the_latest_step_first_and_a_gap_is_no_zero(tmp_path: Path) -> None:
    found = page(
        tmp_path, result(100, score(0.5, 0.05), score(2.25, 0.1, benchmark="text")),
        result(1200, score(0.0, 0.0, n=20)), result(200, score(0.625, n=50)),
    )  # fmt: skip
    head, *lines = found.tables[-1]
    assert head == ["Step", "mcqaexact_match (test)", "textexact_match (test)n = 100"]
    assert lines == [
        ["1,200", "0 [0, 0.16]  n = 20", "–"],  # noqa: RUF001
        ["200", "0.625  n = 50", "–"],  # noqa: RUF001
        ["100", "0.500 ± 0.050  n = 100", "2.25 ± 0.10"],
    ]


def test_the_latest_checkpoint_is_judged(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    for step, values in ((100, [0.0] * 20), (200, [1.0] * 20), (300, [0.0] * 19 + [1.0])):
        value, stderr = mean_stderr(values)
        s = score(value, stderr, n=20)
        publish(root, result(step, s), instances_of(s, values))
    made = generate(root, tmp_path / "report")
    head, (name, step, shown, previous, best) = Page(made.index.read_text()).tables[0]
    assert head[3:] == ["Against the previous checkpoint", "Against the best earlier one"]
    assert (name, step) == ("mcqaquick · exact_match (test) ↑", "300")
    assert shown == "0.050 ± 0.050  n = 20"
    assert previous == "worse−0.950 ± 0.050step 200, p < 0.001, n = 20"  # noqa: RUF001
    assert best == "the previous one is the best"
    assert made.problems == ()
    assert made.csv.read_text().count("\n") == 4
    assert 'href="scores.csv"' in made.index.read_text()


def test_what_failed_is_said_in_words(tmp_path: Path) -> None:
    found = page(
        tmp_path,
        result(100, score(0.5)),
        result(200, failure=Failure("checkpoint", "model.safetensors changed", "/q/log"), generation=1),
        failed=(store.FailedTicket("t", "quarantine", 1, Failure("checkpoint", "path '../x'")),),
    )
    (table,) = [t for t in found.tables if t[0][-1] == "Why"]
    assert table[1] == ["–", "–", "–", "Refused: it could not be trustedpath '../x'1 attempt"]  # noqa: RUF001
    why = "The checkpoint cannot be evaluatedmodel.safetensors changed2 attempts; log: /q/log"
    assert table[2] == ["demo", "quick", "200", why]
    assert "Failed2reasons below" in found.text


def test_what_cannot_be_read_is_said_on_the_page(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    publish(root, result(1, score(0.5, 0.1)))
    publish(root, result(2, score(0.6, 0.1)))
    (store.path_of(root, result(1)) / store.INSTANCES).unlink()
    publish(root, result(3, score(0.5)), record=False)
    made = generate(root, tmp_path / "report", tmp_path / "scores.csv")
    text = Page(made.index.read_text()).text
    assert len(made.problems) == 2
    assert "2 files could not be read" in text
    for problem in made.problems:
        assert problem in text
    assert 'href="../scores.csv"' in made.index.read_text()


def test_the_superseded_is_listed_and_not_drawn(tmp_path: Path) -> None:
    old = digest("old")
    found = page(
        tmp_path, result(1, score(0.25), checkpoint_digest=old, finished=1.0), result(1, score(0.75), finished=2.0)
    )
    assert [run["name"] for run in found.data["runs"]] == ["demo"]
    assert [line["value"] for line in found.data["charts"][0]["metrics"][0]["lines"]] == [[0.75]]
    assert "Scores of 1 earlier checkpoint" in found.text
    assert found.tables[-1][1][0] == f"demo@{old[:8]}"
    assert found.tables[-1][1][3].startswith("0.25")


def test_no_results_give_a_page_that_says_so(tmp_path: Path) -> None:
    found = page(tmp_path)
    assert "No scores yet" in found.text
    assert found.data["charts"] == []
    failing = page(tmp_path, result(1, failure=Failure("configuration", "no environment")))
    assert "No scores yet" in failing.text
    assert "no environment" in failing.text


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=alert(3) x='</script><!--&amp;]]>"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    s = score(0.5, 0.1, benchmark=EVIL, metric=EVIL, split=EVIL)
    for step in (1, 2):
        publish(root, result(step, s, run=EVIL, run_id="a", suite=EVIL), instances_of(s, [0.0, 1.0]))
    publish(root, result(1, s, score(0.1, benchmark=EVIL, metric="other"), run="second", suite=EVIL))
    again = result(1, s, run=EVIL, run_id="a", suite=EVIL, checkpoint_digest=digest("again"), finished=3e9)
    publish(root, again)
    publish(root, result(9, failure=Failure(EVIL, EVIL, EVIL), run=EVIL, suite=EVIL), state="failed")
    text = generate(root, tmp_path / "report").index.read_text()
    found = Page(text)
    assert {tag for tag, _ in found.elements if tag in ("img", "script", "iframe", "svg")} == {"script"}
    assert len(found.scripts) == 3
    assert not any(name.startswith("on") for _, attrs in found.elements for name in attrs)
    assert found.text.count(EVIL) > 10
    assert EVIL in [run["name"] for run in found.data["runs"]]
    assert found.data["charts"][0]["title"] == EVIL


def test_the_page_needs_no_network_and_runs_its_own_scripts_only(tmp_path: Path) -> None:
    path, _ = build(Contents((result(1, score(0.5)),)), tmp_path, lambda r: [])
    found = Page(path.read_text())
    assert not any(attrs.get(name) for _, attrs in found.elements for name in ("src", "href", "action"))
    assert not any(tag in ("link", "iframe", "form") for tag, _ in found.elements)
    (policy,) = [a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    code = [text for attrs, text in found.scripts if "type" not in attrs]
    assert [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code] == allowed


def test_the_page_depends_on_its_input_alone(tmp_path: Path) -> None:
    results = (result(1, score(0.5)), result(2, score(0.6)))
    one, _ = build(Contents(results), tmp_path / "1", lambda r: [])
    two, _ = build(Contents(results[::-1]), tmp_path / "2", lambda r: [])
    assert one.read_bytes() == two.read_bytes()


def test_many_points_stay_small_and_quick(tmp_path: Path) -> None:
    """200 checkpoints by 30 benchmarks: the library is 4.8 MB of it, the data well below that."""
    small, _ = build(Contents((result(1, score(0.5)),)), tmp_path / "small", lambda r: [])
    scores = [score(0.5, 0.049, benchmark=f"benchmark_{i}") for i in range(30)]
    results = tuple(result(100 * k, *scores) for k in range(1, 201))
    started = time.perf_counter()
    large, _ = build(Contents(results), tmp_path / "large", lambda r: [])
    assert time.perf_counter() - started < 20
    assert large.stat().st_size - small.stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (0.81234, 0.0123, "0.812 ± 0.012"), (3.3339, 0.0291, "3.334 ± 0.029"), (12345.678, 120.0, "12346 ± 120"),
        (0.5, None, "0.5"), (-0.25, 0.1, "−0.25 ± 0.10"), (2 / 3, 0.0, "0.6667"),  # noqa: RUF001
        (1e-7, 2e-12, "1e−07 ± 2.0e−12"),  # noqa: RUF001
    ],
)  # fmt: skip
def test_numbers_have_the_digits_that_mean_something(value: float, stderr: float | None, shown: str) -> None:
    assert number(value, stderr) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (42.4, "42 s"), (59.7, "1 min 0 s"), (190, "3 min 10 s"), (3599.8, "1 h 0 min"),
     (7500, "2 h 5 min"), (9.96, "10 s"), (-3, "−3.0 s")],  # noqa: RUF001
)  # fmt: skip
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# ---------------------------------------------------------------------- command


def config(tmp_path: Path) -> Path:
    file = tmp_path / "autoeval.yaml"
    file.write_text("version: 1\nqueue: queue\nsuites:\n  quick:\n    every_steps: 1\n    evaluators: [{type: helm}]\n")
    return file


def test_the_command_writes_both_files_and_says_where(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    publish(root, result(1, score(0.5)))
    publish(root, result(2, score(0.5)), record=False)
    out, table = tmp_path / "out" / "report", tmp_path / "out" / "scores.csv"
    ran = CliRunner().invoke(command, ["--config", str(config(tmp_path)), "--out", str(out), "--csv", str(table)])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.splitlines() == [str(out / "index.html"), str(table)]
    assert ran.stderr.startswith("warning: ticket ")
    assert table.read_text().count("demo,1,") == 1
    assert (out / "index.html").exists()


def test_the_command_names_a_queue_that_is_not_there(tmp_path: Path) -> None:
    argv = ["--config", str(config(tmp_path)), "--out", str(tmp_path / "r")]
    with pytest.raises(QueueError, match=f"queue {tmp_path / 'queue'}: is not there"):
        CliRunner().invoke(command, argv, catch_exceptions=False)
