"""All scores as one flat file for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from autoeval_hooks import fsio
from eval_runner.results.schema import Result
from eval_runner.results.series import rows
from eval_runner.results.statistics import bounds

COLUMNS = ("run", "step", "suite", "benchmark", "metric", "split", "value", "stderr", "n", "low", "high")


def write(results: Iterable[Result], path: Path) -> None:
    """Replace the file `path` by one row for each score of the ok results, numbers with full precision, sorted by run,
    suite, benchmark, metric, split and step.

    `stderr` is empty where it is unknown; so are `low` and `high`, the ends of the 95 % interval
    (`statistics.bounds`). `eval_runner.results.series` says what a name with an ``@`` means.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in sorted(rows(results), key=lambda row: (row.run, *row.key, row.result.step)):
        s = row.score
        error = "" if s.stderr is None else repr(s.stderr)
        low, high = ("", "") if (ends := bounds(s)) is None else map(repr, ends)
        table.writerow(
            (row.run, row.result.step, row.suite, s.benchmark, s.metric, s.split, repr(s.value), error, s.n, low, high)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fsio.replace(str(path.absolute()), text.getvalue().encode())
