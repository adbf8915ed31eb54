"""The report's pages of questions, read back by an HTML parser, and what the index says of judges."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from eval_runner.results import detail_pages, store
from eval_runner.results.page import questions
from eval_runner.results.report import build, generate
from eval_runner.results.schema import Detail, Evaluation, Failure, Result
from eval_runner.results.store import Contents, ResultError
from tests.results_samples import instances_of, publish, queue, result, score
from tests.unit.test_report import EVIL, Page


def detail(number: int, *, category: str = "writing", outcome: str = "win", benchmark: str = "general") -> Detail:
    texts = (("Question", f"Why {number}?"), ("Answer", "Because."), ("Review 1", "9 4"), ("Review 2", "4 9"))
    return Detail(benchmark, str(number), category, outcome, texts)


DETAILS = [detail(1), detail(2, outcome="loss"), detail(3, category="maths"), detail(4, outcome="tie")]
GENERAL = score(0.5, 0.1, n=4, benchmark="general", metric="win_rate")


def judged(step: int, judge: str, value: float = 0.5, **names: str) -> Result:
    s = replace(GENERAL, value=value, **names)
    return replace(result(step, s), evaluations=(Evaluation("gpt", 1.0, (s,), {"judge": judge} if judge else {}),))


def made(out: Path, details: Iterable[Detail], *results: Result) -> tuple[Page, list[Page]]:
    """The index and the first result's pages."""
    kept = list(details)
    results = results or (result(5, GENERAL),)
    index, problems = build(Contents(results), out, lambda r: [], lambda r: kept if r is results[0] else [])
    assert problems == ()
    return Page(index.read_text()), [Page(p.read_text()) for p in sorted((out / "details").glob("*.html"))]


def test_every_question_stands_on_the_page_that_its_score_links_to(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    r = result(5, replace(GENERAL, low=0.2, high=0.75), score(0.5, benchmark="other"), tokens=None)
    publish(root, r, details=DETAILS)
    publish(root, result(6, GENERAL))
    report = generate(root, tmp_path / "report")
    assert report.problems == ()
    index = Page(report.index.read_text())
    hrefs = {a["href"] for tag, a in index.elements if tag == "a" and str(a["href"]).startswith("details/")}
    (href,) = hrefs                     # of the step with details alone, and of the benchmark that has them
    shown = Page((tmp_path / "report" / str(href)).read_text())
    for text in ("general", "demo · quick · step 5 · checkpoint-5", "0.50 ± 0.10", "95 %: 0.2 to 0.75; n = 4"):
        assert text in shown.text
    for d in DETAILS:
        for heading, text in d.texts:
            assert heading in shown.text
            assert text in shown.text
    assert shown.text.count("Because.") == 4
    assert ("a", {"href": "../index.html"}) in shown.elements


def test_questions_are_chosen_by_outcome_and_category_without_a_script(tmp_path: Path) -> None:
    _, (page,) = made(tmp_path, DETAILS)
    text = next((tmp_path / "details").glob("*.html")).read_text()
    boxes = [a["id"] for tag, a in page.elements if tag == "input"]
    assert boxes == ["o0", "o1", "o2", "c0", "c1"]
    assert [a["for"] for tag, a in page.elements if tag == "label"] == boxes
    assert all("checked" in a for tag, a in page.elements if tag == "input")
    for box in boxes:
        assert f"#{box}:not(:checked) ~ .questions > .{box} {{ display: none; }}" in text
    classes = [a["class"] for tag, a in page.elements if tag == "details"]
    assert classes == ["o2 c1", "o0 c1", "o2 c0", "o1 c1"]      # loss, tie, win; maths, writing
    assert page.scripts == []


def test_a_single_outcome_or_too_many_leave_nothing_to_choose(tmp_path: Path) -> None:
    many = [detail(i, category=f"c{i}") for i in range(questions.MAX_FILTERS + 1)]
    _, (page,) = made(tmp_path, many)
    assert not any(tag == "input" for tag, _ in page.elements)


def test_a_long_list_goes_on_on_other_pages_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "MAX_PAGE_CHARS", 150)
    _, pages = made(tmp_path, [detail(i) for i in range(10)])
    assert len(pages) == 4
    assert [int(n) for page in pages for n in re.findall(r"Why (\d)\?", page.text)[::2]] == list(range(10))
    names = sorted(p.name for p in (tmp_path / "details").glob("*.html"))
    others = [a["href"] for tag, a in pages[1].elements if tag == "a"]
    assert others == ["../index.html", names[0], *names[2:]]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    s = score(0.5, 0.1, benchmark=EVIL, metric=EVIL)
    details = [
        Detail(EVIL, EVIL, f"{EVIL}{i}", f"{EVIL}{i}", ((EVIL, f"{EVIL}</pre></details></body>"), ("", "\u202egnol")))
        for i in range(3)
    ]  # fmt: skip
    publish(root, result(1, s, run=EVIL, suite=EVIL), instances_of(s, [0.0, 1.0]), details=details)
    index = Page(generate(root, tmp_path / "report").index.read_text())
    (file,) = (tmp_path / "report" / "details").glob("*.html")
    page = Page(file.read_text())
    allowed = {
        "html", "head", "meta", "title", "style", "body", "p", "a", "header", "h1", "dl", "div", "dt", "dd", "small",
        "br", "input", "label", "main", "details", "summary", "span", "section", "h2", "pre",
    }  # fmt: skip
    assert {tag for tag, _ in page.elements} <= allowed
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert {str(a["href"]) for tag, a in page.elements if tag == "a"} == {"../index.html"}
    assert page.text.count(EVIL) >= 15
    assert file.read_text().count(":not(:checked) ~ .questions > .") == 6
    assert re.fullmatch(r"[0-9a-f]{20}-0\.html", file.name)
    assert all(a.get("dir") == "auto" for tag, a in page.elements if tag == "pre")
    assert len([a for tag, a in index.elements if tag == "a" and str(a["href"]).startswith("details/")]) == 2
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_pages_are_written_once_and_again_where_one_is_missing(tmp_path: Path) -> None:
    reads = []

    def details(r: Result) -> list[Detail]:
        reads.append(r.step)
        return DETAILS

    contents = Contents((result(5, GENERAL), result(6, failure=Failure("transient", "died"))))
    (links, problems) = detail_pages.write(contents.results, tmp_path, details)
    assert (reads, problems) == ([5], [])
    (name,) = links.values()
    before = (tmp_path / name).read_bytes()
    assert detail_pages.write(contents.results, tmp_path, details) == (links, [])
    assert reads == [5]
    (listing,) = (tmp_path / "details").glob("*.json")
    (tmp_path / "index.html").touch()
    (tmp_path / name).unlink()
    assert detail_pages.write(contents.results, tmp_path, details) == (links, [])
    for torn in ("{", "[]", '{"general": 5}', '{"general": ["../index.html"]}', '{"general": []}'):
        listing.write_text(torn)
        assert detail_pages.write(contents.results, tmp_path, details) == (links, [])
    assert reads == [5] * 7
    assert (tmp_path / name).read_bytes() == before


def test_a_new_version_of_the_page_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [result(5, GENERAL)]
    links, _ = detail_pages.write(results, tmp_path, lambda r: DETAILS)
    monkeypatch.setattr(detail_pages, "_sources", lambda: "another")
    assert set(detail_pages.write(results, tmp_path, lambda r: DETAILS)[0].values()).isdisjoint(links.values())


def test_torn_details_are_said_on_the_page_and_leave_no_link(tmp_path: Path) -> None:
    root = queue(tmp_path / "queue")
    for step in (1, 2):
        publish(root, result(step, GENERAL), details=DETAILS)
    file = store.path_of(root, result(1, GENERAL)) / store.DETAILS
    file.write_bytes(file.read_bytes()[:-20])
    report = generate(root, tmp_path / "report")
    (problem,) = report.problems
    assert str(file) in problem
    assert problem in Page(report.index.read_text()).text
    assert len(list((tmp_path / "report" / "details").glob("*.html"))) == 1


def test_details_of_no_score_and_of_no_ok_result_make_no_page(tmp_path: Path) -> None:
    made(tmp_path, [detail(1, benchmark="elsewhere")])
    assert not (tmp_path / "details").exists()


def test_thousands_of_questions_take_seconds(tmp_path: Path) -> None:
    texts = (("Question", "why " * 250), *(("Answer", "so " * 700),) * 4)
    long = [replace(detail(i), texts=texts) for i in range(3000)]
    started = time.process_time()
    detail_pages.write([result(5, GENERAL)], tmp_path, lambda r: long)
    assert time.process_time() - started < 10
    pages = list((tmp_path / "details").glob("*.html"))
    assert len(pages) == 8
    assert max(page.stat().st_size for page in pages) < 6_000_000


# ---------------------------------------------------------------------- judges


def test_a_change_of_the_judge_is_drawn_and_said(tmp_path: Path) -> None:
    results = [judged(step, judge) for step, judge in ((1, "gpt-a"), (2, "gpt-a"), (3, f"gpt-{EVIL}"))]
    page, _ = made(tmp_path, [], *results, judged(1, "gpt-z", benchmark="z"))
    (line,) = page.data["charts"][0]["metrics"][0]["lines"]
    assert line["judges"] == [[2, f"gpt-a → gpt-{EVIL}"]]
    (row,) = [r for r in page.tables[0] if r[0].startswith("general")]
    assert row[3] == f"not testedstep 2; the judge changed: gpt-a → gpt-{EVIL}"
    steps = [r[0] for r in page.tables[-1][1:]]
    assert steps == [f"3judge changed: gpt-a → gpt-{EVIL}", "2", "1"]
    assert "Where the judge changed between two checkpoints" in " ".join(page.text.split())


def test_judges_are_named_where_there_are_any(tmp_path: Path) -> None:
    results = [judged(1, "gpt-b"), judged(2, f"gpt-{EVIL}"), judged(3, "gpt-b"), judged(4, "")]
    index, (page,) = made(tmp_path, DETAILS, *results)
    assert f"Judged bygpt-{EVIL}, gpt-bas it reports its own name" in index.text
    assert "demo · quick · step 1 · checkpoint-1 · judged by gpt-b" in page.text
    index, (page,) = made(tmp_path / "none", DETAILS, judged(4, ""))
    assert "judged by" not in (index.text + page.text).lower()


def test_only_the_judge_of_the_benchmark_stands_on_its_page(tmp_path: Path) -> None:
    r = judged(1, "gpt-b")
    other = Evaluation("gpt", 1.0, (score(0.5, benchmark="other"),), {"judge": "gpt-other"})
    _, (page,) = made(tmp_path, DETAILS, replace(r, evaluations=(other, *r.evaluations)))
    assert "checkpoint-1 · judged by gpt-b" in page.text
    assert "gpt-other" not in page.text


@pytest.mark.parametrize(("length", "shown"), [(140, "x" * 140), (141, "x" * 140 + "…")])
def test_a_preview_that_is_cut_says_so(tmp_path: Path, length: int, shown: str) -> None:
    _, (page,) = made(tmp_path, [replace(detail(1), texts=(("Question", "x" * length),))])
    assert page.text.split("1 · writing  ")[1].startswith(f"{shown}Question")


def test_without_a_change_nothing_is_said_of_judges(tmp_path: Path) -> None:
    page, _ = made(tmp_path, [], *(judged(step, judge) for step, judge in ((1, "gpt-a"), (2, "gpt-a"))))
    (line,) = page.data["charts"][0]["metrics"][0]["lines"]
    assert "judges" not in line
    assert not any("judge changed" in cell for table in page.tables for r in table for cell in r)


def test_the_line_of_a_change_is_drawn_by_the_script() -> None:
    """What page.js does with it; a browser's part is not tested here."""
    script = (Path(questions.__file__).parent / "page.js").read_text()
    for part in ("line.judges", "shapes: judges", 'text: "judge changed"', "changes.map(plain)"):
        assert part in script


def test_an_evaluators_own_interval_is_drawn_and_listed(tmp_path: Path) -> None:
    own = replace(score(1.0, 0.0, n=20, benchmark="general"), low=0.75, high=1.0)
    page, _ = made(tmp_path, [], result(1, own))
    (line,) = page.data["charts"][0]["metrics"][0]["lines"]
    assert (line["low"], line["high"]) == ([0.75], [1.0])
    assert page.tables[0][1][2] == "1 [0.75, 1]  n = 20"


def test_what_was_paid_is_said(tmp_path: Path) -> None:
    usages = ({"requests": 160.0, "cached": 20.0, "cost_usd": 1.25}, {"requests": 10.0, "cached": 150.0})
    results = [
        replace(result(step, GENERAL), evaluations=(Evaluation("gpt", 1.0, (GENERAL,), usage=usage),))
        for step, usage in zip(itertools.count(1), usages, strict=False)
    ]
    page, _ = made(tmp_path, [], *results)
    told = "for 160 of 170 requests; the price of the others is not known; 170 known before"
    assert f"Judge and models$1.25{told}" in page.text
    priced, _ = made(tmp_path / "priced", [], results[0])
    assert "Judge and models$1.25160 asked, 20 known before" in priced.text
    free, _ = made(tmp_path / "free", [], results[1])
    assert "Judge and models10 requests" in free.text
    assert "Judge and models" not in made(tmp_path / "none", [], result(1, GENERAL))[0].text


def test_the_listing_is_ours_and_json(tmp_path: Path) -> None:
    made(tmp_path, DETAILS)
    (listing,) = (tmp_path / "details").glob("*.json")
    assert json.loads(listing.read_text()) == {"general": [f"{listing.stem}-0.html"]}
    assert sorted(os.listdir(tmp_path / "details")) == [f"{listing.stem}-0.html", listing.name]


def test_details_that_cannot_be_read_do_not_stop_the_others(tmp_path: Path) -> None:
    def details(r: Result) -> list[Detail]:
        if r.step == 1:
            raise ResultError("torn")
        return DETAILS

    links, problems = detail_pages.write([result(1, GENERAL), result(2, GENERAL)], tmp_path, details)
    assert (len(links), problems) == (1, ["torn"])
