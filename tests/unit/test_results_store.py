from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError, QueueError
from autoeval_hooks.fsio import FileOps
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.ticket import Ticket
from eval_runner.results import lines, store
from eval_runner.results.schema import Detail, Evaluation, Failure, Instance, Result, Score
from tests.results_samples import digest, instances_of, publish, queue, result, score


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return queue(tmp_path / "queue")


def name_of(r: Result) -> str:
    return f"{r.ticket}~g{r.generation}~{r.runner}"


def written(root: Path, r: Result) -> Path:
    return store.write(root, name_of(r), r, ())


def interval_of(low: float | None, high: float | None) -> Score:
    return dataclasses.replace(score(0.5), low=low, high=high)


# ---------------------------------------------------------------------- writing and reading


def test_a_result_comes_back_as_it_was(root: Path) -> None:
    s = score(1 / 3, 0.1 + 0.2, n=4)
    s = dataclasses.replace(s, low=0.1, high=0.6)
    evaluation = Evaluation("helm", 12.5, (s,), {"crfm-helm": "0.5.16"}, {"data.jsonl": "ab"}, {"cost_usd": 0.1})
    r = dataclasses.replace(result(7, s, tokens=1 << 40), evaluations=(evaluation,), suite_text='{"a": "\N{SNOWMAN}"}')
    values = [Instance("b", "m", "test", "id\n\N{SNOWMAN}", 0.1), Instance("b", "m", "test", "2", -1e-300)]
    path = store.write(root, name_of(r), r, iter(values))
    assert path == root / "results" / name_of(r) == store.path_of(root, r)
    assert store.read(path) == r
    assert list(store.instances(path)) == values
    assert os.listdir(root / "tmp") == []


def test_a_failed_and_a_refiled_result_come_back(root: Path) -> None:
    failed = result(1, failure=Failure("checkpoint", "no weights", "/log"))
    refiled = dataclasses.replace(result(2), status="refiled", refiled_as=digest("other"))
    for r in (failed, refiled):
        path = written(root, r)
        assert store.read(path) == r
        assert list(store.instances(path)) == []
        assert r.scores == ()


def test_whole_numbers_come_back_as_the_same_values(root: Path) -> None:
    r = result(1, score(1, 0))
    path = store.write(root, name_of(r), r, [Instance("b", "m", "test", "1", 1)])
    assert store.read(path) == r
    assert [i.value for i in store.instances(path)] == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error_that_names_it(root: Path, bad: float) -> None:
    with pytest.raises(CheckpointError, match=r"score python/bits_per_byte \(valid\): its value is .*evaluator helm"):
        written(root, result(1, score(bad, 0.1, benchmark="python", metric="bits_per_byte", split="valid")))
    with pytest.raises(CheckpointError, match=r"score mcqa/exact_match \(test\): its stderr is"):
        written(root, result(1, score(0.5, bad)))
    with pytest.raises(CheckpointError, match=r"score mcqa/exact_match \(test\): its high is"):
        written(root, result(1, interval_of(0.1, bad)))
    used = Evaluation("gpt", 1.0, (score(0.5),), usage={"cost_usd": bad})
    with pytest.raises(store.ResultError, match="evaluator gpt: its usage 'cost_usd' is"):
        written(root, dataclasses.replace(result(1), evaluations=(used,)))
    r = result(1, score(0.5))
    with pytest.raises(CheckpointError, match=r"instance 'id1' of mcqa/exact_match \(test\)"):
        store.write(root, name_of(r), r, instances_of(score(0.5), [0.5, bad]))
    assert os.listdir(root / "results") == os.listdir(root / "tmp") == []


def test_a_score_given_twice_is_an_error(root: Path) -> None:
    r = result(1, score(0.5))
    r = dataclasses.replace(r, evaluations=(*r.evaluations, *r.evaluations))
    with pytest.raises(ConfigError, match=r"suite quick: score mcqa/exact_match \(test\) is given twice"):
        written(root, r)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluations": ()}, "an ok result without a score"),
        ({"status": "failed"}, "a failed result without its failure"),
        ({"status": "refiled"}, "does not say as what"),
        ({"evaluations": (Evaluation("e", 1.0, (score(0.5, n=0),)),)}, "has no instances"),
        ({"evaluations": (Evaluation("e", 1.0, (score(0.5, -0.1),)),)}, "negative error"),
        ({"evaluations": (Evaluation("e", 1.0, (interval_of(0.1, None),)),)}, "half an interval"),
        ({"evaluations": (Evaluation("e", 1.0, (interval_of(None, 0.1),)),)}, "half an interval"),
        ({"evaluations": (Evaluation("e", 1.0, (interval_of(0.6, 0.4),)),)}, "one inside out"),
        ({"evaluations": (Evaluation("e", 1.0, (score(0.5),), usage={"cost_usd": -0.01}),)}, "usage that is negative"),
        ({"step": -1}, "a negative step"),
        ({"finished_at": 1e300}, "a time that is none"),
        ({"version": 0}, "version 0 is not 1"),
        ({"runner": "a\0b"}, "runner: text with a character"),
    ],
)
def test_a_record_that_contradicts_itself_is_neither_written_nor_read(
    root: Path, change: dict[str, object], message: str
) -> None:
    good = result(1, score(0.5, 0.1))
    bad = dataclasses.replace(good, **change)  # type: ignore[arg-type]
    with pytest.raises(store.ResultError, match=message):
        store.write(root, "x", bad, ())
    path = written(root, good)
    (path / store.RECORD).write_text(json.dumps(dataclasses.asdict(bad)))
    with pytest.raises(store.ResultError, match=message) as caught:
        store.read(path)
    assert str(path / store.RECORD) in str(caught.value)


def test_a_failure_message_from_a_broken_log_can_be_kept(root: Path) -> None:
    r = result(1, failure=Failure("transient", "died: \udcff\0", "/log/\udcff"))
    kept = store.read(written(root, r)).failure
    assert kept is not None
    assert kept.message == "died: ?\N{REPLACEMENT CHARACTER}"


# ---------------------------------------------------------------------- crashes


class Power(BaseException):
    """A power cut: nothing after it happens."""


class Cut(FileOps):
    """Counts the calls that change or sync the file system, and fails before the `at`-th."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, []

    def _call(self, what: str) -> None:
        if isinstance(self.error, Power) and len(self.calls) >= self.at:
            raise self.error
        self.calls.append(what)
        if len(self.calls) - 1 == self.at:
            raise self.error

    def __getattribute__(self, name: str) -> object:
        found = object.__getattribute__(self, name)
        if name in ("create", "write", "fsync", "close", "rename", "mkdir", "sync_dir", "unlink"):
            def called(*args: object) -> object:
                self._call(name)
                return found(*args)

            return called
        return found


STEPS = ["mkdir", *["create", "write", "fsync", "close"] * 2, "sync_dir", "rename", "sync_dir"]


def test_everything_is_synced_before_it_is_published_and_the_name_after(root: Path) -> None:
    ops = Cut(10**6, Power())
    r = result(1, score(0.5))
    store.write(root, name_of(r), r, (), ops=ops)
    assert ops.calls == STEPS


@pytest.mark.parametrize("at", range(len(STEPS)))
def test_a_power_cut_leaves_the_whole_result_or_none(root: Path, at: int) -> None:
    r = result(1, score(0.5))
    with pytest.raises(Power):
        store.write(root, name_of(r), r, instances_of(score(0.5), [0, 1]), ops=Cut(at, Power()))
    if at <= STEPS.index("rename"):
        assert os.listdir(root / "results") == []
    else:
        assert store.read(store.path_of(root, r)) == r
        assert len(list(store.instances(store.path_of(root, r)))) == 2


@pytest.mark.parametrize("at", range(len(STEPS) - 1))
def test_a_full_disk_leaves_nothing_behind(root: Path, at: int) -> None:
    r = result(1, score(0.5))
    with pytest.raises(OSError, match="No space"):
        store.write(root, name_of(r), r, (), ops=Cut(at, OSError(28, "No space left on device")))
    assert os.listdir(root / "results") == os.listdir(root / "tmp") == []


def test_a_lost_reply_to_the_rename_is_no_failure(root: Path) -> None:
    class Lossy(FileOps):
        def rename(self, src: str, dst: str) -> None:
            super().rename(src, dst)
            raise FileNotFoundError(2, "No such file or directory", src)

    r = result(1, score(0.5))
    assert store.read(store.write(root, name_of(r), r, (), ops=Lossy())) == r


def test_a_name_is_used_once(root: Path) -> None:
    first, second = result(1, score(0.5)), result(1, score(0.6))
    written(root, first)
    with pytest.raises(QueueError, match="is there already"):
        written(root, second)
    assert store.read(store.path_of(root, first)) == first
    assert os.listdir(root / "tmp") == []


def test_the_unfinished_is_no_ticket_to_the_queues_housekeeping(root: Path) -> None:
    r = result(1, score(0.5))
    with pytest.raises(Power):
        store.write(root, name_of(r), r, (), ops=Cut(STEPS.index("rename"), Power()))
    (left,) = os.listdir(root / "tmp")
    assert Token.parse("pending", left.rpartition("~")[0]) is None


# ---------------------------------------------------------------------- hostile and torn records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a mapping"),
        (b'{"version": 2, "something": "new"}', "version 2 was written by a newer autoeval; upgrade"),
        (b'{"version": 1}', "ticket: missing"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_torn_or_newer_record_is_one_error_that_names_its_file(root: Path, text: bytes, message: str) -> None:
    path = written(root, result(1, score(0.5)))
    (path / store.RECORD).write_bytes(text)
    with pytest.raises(AutoEvalError, match=message) as caught:
        store.read(path)
    assert str(path / store.RECORD) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"value": 0.5', '"value": NaN', "NaN is not a number"),
        ('"value": 0.5', '"value": 1e999', "not a finite number"),
        ('"value": 0.5', '"value": "0.5"', r"evaluations\[0\].scores\[0\].value: expected a number"),
        ('"value": 0.5', '"value": 0.5, "value": 0.6', "a key stands twice"),
        ('"step": 1', '"step": 1, "command": "rm"', "command: unknown key"),
        ('"step": 1', '"step": true', "step: expected a whole number"),
        ('"status": "ok"', '"status": "great"', "'great' is not one of"),
    ],
)
def test_a_hostile_record_is_refused(root: Path, old: str, new: str, message: str) -> None:
    path = written(root, result(1, score(0.5)))
    text = (path / store.RECORD).read_text()
    assert text.count(old) == 1
    (path / store.RECORD).write_text(text.replace(old, new))
    with pytest.raises(store.ResultError, match=message):
        store.read(path)


def test_a_record_that_is_a_link_is_not_followed(root: Path, tmp_path: Path) -> None:
    path = written(root, result(1, score(0.5)))
    (path / store.RECORD).rename(tmp_path / "elsewhere.json")
    (path / store.RECORD).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(store.ResultError, match=r"result\.json: cannot be read"):
        store.read(path)


def test_torn_instances_are_an_error_after_what_could_be_read(root: Path) -> None:
    s, r = score(0.5), result(1, score(0.5))
    path = store.write(root, name_of(r), r, instances_of(s, [float(i % 2) for i in range(5000)]))
    file = path / store.INSTANCES
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], whole[:-8] + b"\0" * 8, b"no gzip", b""):
        file.write_bytes(torn)
        with pytest.raises(store.ResultError, match=r"instances\.jsonl\.gz: cannot be read after line \d+"):
            list(store.instances(path))
    file.unlink()
    with pytest.raises(store.ResultError, match="torn or missing"):
        list(store.instances(path))


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"benchmark":"b"}', '{"benchmark":"b","metric":"m","split":"t","id":"1","value":NaN}',
     '{"benchmark":"b","metric":"m","split":"t","id":"1","value":1e999}',
     '{"benchmark":"b","metric":"m","split":"t","id":1,"value":1.0}',
     '{"benchmark":"b","metric":"m","split":"t","id":"1","value":true}',
     '{"benchmark":"b","metric":"m","split":"t","id":"1","value":1.0,"more":1}'],
)  # fmt: skip
def test_a_bad_line_of_instances_is_an_error_that_names_it(root: Path, line: str) -> None:
    path = written(root, result(1, score(0.5)))
    good = json.dumps(dataclasses.asdict(Instance("b", "m", "t", "1", 1.0)))
    (path / store.INSTANCES).write_bytes(gzip.compress(f"{good}\n{line}\n".encode()))
    with pytest.raises(store.ResultError, match=r"instances\.jsonl\.gz: line 2: not"):
        list(store.instances(path))


# ---------------------------------------------------------------------- details

DETAIL = Detail("general", "7", "writing", "win", (("Question", "Why?\n\N{SNOWMAN}"), ("Answer", "")))


def test_details_come_back_as_they_were_and_are_no_must(root: Path) -> None:
    r, old = result(1, score(0.5)), result(2, score(0.5))
    path = store.write(root, name_of(r), r, (), details=iter([DETAIL, dataclasses.replace(DETAIL, id="8")]))
    assert list(store.details(path)) == [DETAIL, dataclasses.replace(DETAIL, id="8")]
    before = written(root, old)
    assert list(store.details(before)) == []
    assert sorted(os.listdir(before)) == [store.INSTANCES, store.RECORD]


def test_details_are_synced_before_they_are_published(root: Path) -> None:
    ops = Cut(10**6, Power())
    r = result(1, score(0.5))
    store.write(root, name_of(r), r, (), details=[DETAIL], ops=ops)
    assert ops.calls == [STEPS[0], *STEPS[1:5] * 3, *STEPS[9:]]
    for at in range(len(ops.calls)):
        again = result(2 + at, score(0.5))
        with pytest.raises(Power):
            store.write(root, name_of(again), again, (), details=[DETAIL], ops=Cut(at, Power()))
        if (root / "results" / name_of(again)).exists():
            assert list(store.details(store.path_of(root, again))) == [DETAIL]


def test_texts_that_no_file_can_hold_or_nobody_reads_are_mended(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "open-sesame-12345")
    text = "a\udcff\0b" + "x" * lines.MAX_TEXT_CHARS
    texts = (("Review", text), ("Error", "wrong key open-sesame-12345"))
    r = result(1, score(0.5))
    path = store.write(root, name_of(r), r, (), details=[dataclasses.replace(DETAIL, texts=texts)])
    ((_, shown), (_, error)) = next(store.details(path)).texts
    assert shown.startswith("a?\N{REPLACEMENT CHARACTER}bxxx")
    assert shown.endswith(f"x … [cut: {lines.MAX_TEXT_CHARS + 4:,} characters]")
    assert len(shown) < lines.MAX_TEXT_CHARS + 100
    assert error == "wrong key ***"


def test_more_details_than_can_be_read_are_not_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = result(1, score(0.5))
    many = dataclasses.replace(DETAIL, texts=DETAIL.texts * lines.MAX_TEXTS)
    with pytest.raises(store.ResultError, match="question '7' of general: not the detail"):
        store.write(root, name_of(r), r, (), details=[many])
    long = dataclasses.replace(DETAIL, texts=(("\u3042" * lines.MAX_TEXT_CHARS,) * 2,) * 20)
    with pytest.raises(store.ResultError, match="details are too large"):
        store.write(root, name_of(r), r, (), details=[long])
    monkeypatch.setattr(lines, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(store.ResultError, match="details are too large"):
        store.write(root, name_of(r), r, (), details=[DETAIL] * 20)
    assert os.listdir(root / "results") == os.listdir(root / "tmp") == []


GOOD = {"benchmark": "b", "id": "1", "category": "c", "outcome": "win", "texts": [["Question", "?"]]}


@pytest.mark.parametrize("wrong", [
    "{", "[]", '"x"', "[" * 100_000, {"id": 1}, {"more": 1}, {"texts": {}}, {"texts": [["Question"]]},
    {"texts": ["ab"]},
    {"texts": [["Question", None]]}, {"texts": [["Q", "?"]] * 51}, {"outcome": "\0"}, {"category": "\ud800"},
    {"texts": [["Question", "x" * 20_200]]},
], ids=str)  # fmt: skip
def test_a_bad_line_of_details_is_an_error_that_names_it(root: Path, wrong: str | dict[str, object]) -> None:
    path = written(root, result(1, score(0.5)))
    line = wrong if isinstance(wrong, str) else json.dumps(GOOD | wrong)
    (path / store.DETAILS).write_bytes(gzip.compress(f"{json.dumps(GOOD)}\n{line}\n".encode()))
    found = store.details(path)
    assert next(found).id == "1"
    with pytest.raises(store.ResultError, match=r"details\.jsonl\.gz: line 2: not"):
        next(found)


def test_torn_details_bombs_and_links_are_errors(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = result(1, score(0.5))
    path = store.write(root, name_of(r), r, (), details=[DETAIL] * 500)
    file = path / store.DETAILS
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], b"no gzip", b""):
        file.write_bytes(torn)
        with pytest.raises(store.ResultError, match=r"details\.jsonl\.gz: cannot be read after line \d+"):
            list(store.details(path))
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(whole)
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(store.ResultError, match="cannot be read after line 0"):
        list(store.details(path))
    file.unlink()
    file.write_bytes(whole)
    monkeypatch.setattr(lines, "MAX_UNPACKED_BYTES", 10_000)
    with pytest.raises(store.ResultError, match="it holds more than"):
        list(store.details(path))


# ---------------------------------------------------------------------- what counts


def test_only_results_that_done_names_count(root: Path) -> None:
    real, zombie = result(1, score(0.5)), result(1, score(0.9), generation=1, runner="zombie")
    publish(root, real)
    written(root, zombie)
    (root / "done" / ".nfs0001").touch()
    assert store.collect(root) == store.Contents(results=(real,))


def test_a_done_ticket_without_a_readable_result_is_reported(root: Path) -> None:
    good, missing, torn = result(1, score(0.5)), result(2, score(0.5)), result(3, score(0.5))
    publish(root, good)
    publish(root, missing, record=False)
    publish(root, torn)
    (store.path_of(root, torn) / store.RECORD).write_bytes(b'{"version": 1')
    results, problems = store.done(root)
    assert results == [good]
    assert len(problems) == 2
    assert any(missing.ticket[:12] in p and "cannot be read (No such file" in p for p in problems)
    assert any(torn.ticket[:12] in p and "not valid JSON" in p for p in problems)


def test_a_record_of_another_attempt_does_not_count(root: Path) -> None:
    mine, other = result(1, score(0.5)), result(2, score(0.9))
    publish(root, mine)
    written(root, other)
    shutil.copy(store.path_of(root, other) / store.RECORD, store.path_of(root, mine) / store.RECORD)
    results, problems = store.done(root)
    assert results == []
    assert "the record of another attempt" in problems[0]


def test_failed_tickets_come_with_their_reason(root: Path) -> None:
    publish(root, result(5, failure=Failure("checkpoint", "no tokenizer", "/log"), generation=2), state="failed")
    (found,) = store.collect(root).failed
    assert (found.state, found.attempts, found.run, found.suite, found.step) == ("failed", 3, "demo", "quick", 5)
    assert found.failure == Failure("checkpoint", "no tokenizer", "/log")


Make = Callable[..., Ticket]


def test_a_ticket_whose_runners_died_is_told_from_the_ticket(root: Path, new_ticket: Make) -> None:
    """No runner left a record; the ticket itself says what was to be evaluated."""
    q = Queue(str(root), runner="dead-1")
    q.enqueue(new_ticket(9))
    token = q.claim()
    assert token is not None
    q.fail(token)
    (found,) = store.collect(root).failed
    assert (found.run, found.suite, found.step) == ("run1", "quick", 9)
    assert found.checkpoint.endswith("/checkpoint-9")
    assert found.failure.kind == "transient"
    assert "runner dead-1 died or lost its lease" in found.failure.message


def test_a_ticket_in_quarantine_comes_with_the_reason(root: Path, new_ticket: Make) -> None:
    q = Queue(str(root), runner="eval-1")
    q.enqueue(new_ticket(9))
    token = q.claim()
    assert token is not None
    q.quarantine(token, "path '../x' is not absolute")
    found = store.collect(root).failed
    assert [(f.state, f.failure.message) for f in found] == [("quarantine", "path '../x' is not absolute")]


def test_a_ticket_that_was_retried_meanwhile_has_not_failed(root: Path, new_ticket: Make) -> None:
    q = Queue(str(root), runner="eval-1")
    q.enqueue(new_ticket(9))
    token = q.claim()
    assert token is not None
    q.fail(token)
    failed = dataclasses.replace(token, state="failed")
    q.retry(failed)
    assert store._failed(root, failed) is None


def test_no_queue_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(QueueError, match="nowhere: is not there"):
        store.collect(tmp_path / "nowhere")
