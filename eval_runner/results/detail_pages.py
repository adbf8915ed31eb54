"""The report's pages of questions: which there are, and where they lie.

    details/DIGEST-N.html      page N of one benchmark of one result
    details/DIGEST.json        the pages of one result, written after them

A result is never changed, so neither are its pages: DIGEST is of the result's name and of all that a page is made of,
and what is there is kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from autoeval_hooks import fsio
from eval_runner.results import page
from eval_runner.results.page import questions
from eval_runner.results.schema import Detail, Result
from eval_runner.results.store import ResultError

FOLDER = "details"

Links = dict[tuple[str, int, str, str], str]
"""The first page by ticket, generation, runner and benchmark, relative to the report."""


def write(
    results: Iterable[Result], out_dir: Path, details: Callable[[Result], Iterable[Detail]]
) -> tuple[Links, list[str]]:
    """Write the pages of all ok results that have details of a benchmark with a score; and a line for each file of
    details that cannot be read."""
    links: Links = {}
    problems = []
    for r in (r for r in results if r.status == "ok"):
        listing = out_dir / FOLDER / f"{_digest(r)}.json"
        try:
            found = _kept(listing) or _write(r, listing, details(r))
        except ResultError as error:
            problems.append(str(error))
            continue
        for benchmark, names in found.items():
            links[r.ticket, r.generation, r.runner, benchmark] = f"{FOLDER}/{names[0]}"
    return links, problems


def _kept(listing: Path) -> dict[str, list[str]]:
    """The names of a result's pages by benchmark, if all of them were written; else none."""
    try:
        found = json.loads(listing.read_bytes())
        shown = {str(benchmark): [str(name) for name in names] for benchmark, names in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    names = [name for pages in shown.values() for name in pages]
    ours = [f"{listing.stem}-{i}.html" for i in range(len(names))]
    whole = names == ours and all(shown.values()) and all((listing.parent / name).is_file() for name in names)
    return shown if whole else {}


def _write(result: Result, listing: Path, details: Iterable[Detail]) -> dict[str, list[str]]:
    groups: dict[str, list[Detail]] = {}
    scored = {s.benchmark for s in result.scores}
    for d in details:
        if d.benchmark in scored:
            groups.setdefault(d.benchmark, []).append(d)
    shown: dict[str, list[str]] = {}
    count = 0
    for benchmark, members in sorted(groups.items()):
        listing.parent.mkdir(parents=True, exist_ok=True)
        names = [f"{listing.stem}-{count + i}.html" for i in range(len(questions.split(members)))]
        count += len(names)
        for name, text in zip(names, questions.pages(result, benchmark, members, names), strict=True):
            fsio.replace(str((listing.parent / name).absolute()), text.encode())
        shown[benchmark] = names
    if shown:
        fsio.replace(str(listing.absolute()), json.dumps(shown).encode())
    return shown


def _digest(result: Result) -> str:
    name = [_sources(), result.ticket, result.generation, result.runner]
    return hashlib.sha256(json.dumps(name).encode()).hexdigest()[:20]


@functools.cache
def _sources() -> str:
    """The digest of all that makes a page look as it does: a new version of ours writes its own."""
    files = [Path(*page.__path__) / name for name in questions.SOURCES]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
