"""The report: HTML files that need no network, made from the results on disk and nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from autoeval_hooks import fsio
from eval_runner.results import detail_pages, scores_csv, store
from eval_runner.results.comparisons import latest
from eval_runner.results.page import sections
from eval_runner.results.page.charts import chart_data
from eval_runner.results.page.markup import Safe, data, join
from eval_runner.results.schema import Detail, Instance, Result
from eval_runner.results.series import rows
from eval_runner.results.store import Contents


@dataclass(frozen=True)
class Generated:
    """The files written, and a line for each finished ticket or file that could not be read."""

    index: Path
    csv: Path
    problems: tuple[str, ...]


def generate(queue_root: Path, out_dir: Path, csv: Path | None = None) -> Generated:
    """Write `out_dir/index.html`, the pages of questions that it links to, and the scores (by default
    `out_dir/scores.csv`) from a queue's results."""
    contents = store.collect(queue_root)
    csv = csv or out_dir / "scores.csv"
    scores_csv.write(contents.results, csv)

    def instances(result: Result) -> Iterable[Instance]:
        return store.instances(store.path_of(queue_root, result))

    def details(result: Result) -> Iterable[Detail]:
        return store.details(store.path_of(queue_root, result))

    index, problems = build(contents, out_dir, instances, details, csv_link=os.path.relpath(csv, out_dir))
    return Generated(index, csv, problems)


def build(
    contents: Contents, out_dir: Path, instances: Callable[[Result], Iterable[Instance]],
    details: Callable[[Result], Iterable[Detail]] = lambda result: (), *, csv_link: str = "",
) -> tuple[Path, tuple[str, ...]]:  # fmt: skip
    """Replace `out_dir/index.html`, and add the pages of questions that are not there yet. `instances` gives a result's
    per-instance values, `details` the texts behind them, or they raise ResultError.

    Returns its path and all problems, which the page lists too. The page depends on its input alone.
    """
    table = rows(contents.results)
    compared, unread = latest(table, instances)
    links, torn = detail_pages.write(contents.results, out_dir, details)
    problems = (*contents.problems, *unread, *torn)
    drawn = chart_data(table)
    parts = [sections.header(contents, table, csv_link), sections.problems(problems)]
    if table:
        parts += [sections.latest(compared, links), sections.charts(drawn)]
    else:
        parts.append(sections.nothing_yet())
    parts.append(sections.failed(contents))
    if table:
        parts += [sections.scores(table, links), sections.superseded(table, links), sections.reading()]
    path = out_dir / "index.html"
    out_dir.mkdir(parents=True, exist_ok=True)
    fsio.replace(str(path.absolute()), _page(join(*parts), drawn).encode())
    return path, problems


def _page(body: Safe, drawn: dict[str, Any]) -> str:
    from plotly.offline import get_plotlyjs  # slow to import, and only a report needs it

    plotly, script = get_plotlyjs(), _template("page.js")
    # Only these two scripts may run and nothing may be loaded, even if a name's markup should get through.
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, script))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    return Template(_template("page.html")).substitute(
        policy=policy, style=_template("page.css"), body=body, data=data(drawn, id="data"), plotly=plotly, script=script
    )


def _template(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
