"""The journal of the GPT evaluator: what is kept, what is passed over, and what cannot be written."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from autoeval_hooks.errors import AutoEvalError, ConfigError
from eval_runner.evaluators.gpt import journal as module
from eval_runner.evaluators.gpt import wire
from eval_runner.evaluators.gpt.journal import Journal, key_of
from eval_runner.evaluators.gpt.records import Reply, Request

REPLY = Reply("答え", False, "stop", "judge-1", 10, 20)


def request(i: int = 0) -> Request:
    return Request("/chat/completions", {"model": "judge-1", "messages": [{"role": "user", "content": f"質問 {i}"}]})


def keep(journal: Journal, i: int = 0, **more: Any) -> str:
    journal.replied("judge", request(i), "", REPLY, **more)
    return key_of("judge", request(i))


def test_keys_tell_requests_apart() -> None:
    body = {"model": "m", "prompt": "p"}
    plain = Request("/completions", body)
    others = [
        key_of("judge", plain), key_of("other", plain), key_of("judge", plain, "salt"),
        key_of("judge", Request("/chat/completions", body)), key_of("judge", Request("/completions", body | {"n": 1})),
    ]  # fmt: skip
    assert len(set(others)) == 5
    assert key_of("judge", Request("/completions", {"prompt": "p", "model": "m"})) == others[0]
    with pytest.raises(ConfigError):
        key_of("judge", Request("/completions", {"temperature": float("nan")}))


def test_a_reply_is_kept_for_other_processes(tmp_path: Path) -> None:
    with_reply = Journal(tmp_path / "a" / "scope")
    key = keep(with_reply, evaluation="e", cost=0.5)
    later = Journal(tmp_path / "a" / "scope")
    assert later.get(key) == Reply("答え", False, "stop", "judge-1", 10, 20, cached=True)
    entry = later.entry(key)
    assert entry
    assert (entry.evaluation, entry.cost) == ("e", 0.5)
    assert later.get("0" * 64) is None


def test_the_largest_request_with_the_largest_reply_is_read_again(tmp_path: Path) -> None:
    body = {"model": "m", "prompt": "あ" * ((module.MAX_REQUEST - 200) // 6)}
    largest = Request("/completions", body)
    writer = Journal(tmp_path)
    # A byte that is no UTF-8 is shown as U+FFFD, which is six characters in ASCII.
    writer.replied("judge", largest, "", Reply("\ufffd" * wire.MOST_BYTES, False, "stop", "m", 1, 1))
    assert Journal(tmp_path).get(key_of("judge", largest))
    with pytest.raises(ConfigError, match="shorten it"):
        key_of("judge", Request("/completions", body | {"prompt": body["prompt"] * 2}))


def test_a_line_that_nobody_would_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE", 2000)
    writer = Journal(tmp_path)
    with pytest.raises(AssertionError, match="nobody would read"):
        writer.append({"kind": "batch", "name": "x" * 2000})
    key = keep(writer, 1)
    assert Journal(tmp_path).get(key)


def test_nothing_is_made_before_something_is_written(tmp_path: Path) -> None:
    Journal(tmp_path / "scope")
    assert not (tmp_path / "scope").exists()


def test_two_writers_at_the_same_time(tmp_path: Path) -> None:
    first, second = Journal(tmp_path), Journal(tmp_path)

    def write(journal: Journal, start: int) -> None:
        for i in range(start, start + 50):
            keep(journal, i)

    threads = [threading.Thread(target=write, args=a) for a in ((first, 0), (first, 50), (second, 100), (second, 150))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(list(tmp_path.iterdir())) == 2
    third = Journal(tmp_path)
    assert all(third.get(key_of("judge", request(i))) for i in range(200))
    assert first.get(key_of("judge", request(150))) is None
    first.refresh()
    assert first.get(key_of("judge", request(150)))


def test_two_writers_of_one_name_lose_nothing(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "w"), Journal(tmp_path, "w")
    keys = [keep(first, 1), keep(second, 2), keep(first, 3)]
    assert all(map(Journal(tmp_path).get, keys))


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_read_once_it_is_whole(tmp_path: Path, cut: int) -> None:
    writer = Journal(tmp_path, "w")
    key = keep(writer, 1)
    other = keep(writer, 2)
    data = (tmp_path / "w.jsonl").read_bytes()
    (tmp_path / "w.jsonl").write_bytes(data[:-cut])
    reader = Journal(tmp_path)
    assert reader.get(key)
    assert reader.get(other) is None
    (tmp_path / "w.jsonl").write_bytes(data)
    reader.refresh()
    assert reader.get(other)


def test_a_writer_goes_on_after_a_torn_line_of_its_name(tmp_path: Path) -> None:
    before = keep(Journal(tmp_path, "w"), 1)
    with (tmp_path / "w.jsonl").open("ab") as file:
        file.write(b'{"kind": "reply", "key"')
    writer = Journal(tmp_path, "w")
    after = keep(writer, 2)
    assert writer.get(before)
    assert all(map(Journal(tmp_path).get, (before, after)))


def lines(key: str, good: dict[str, Any]) -> dict[str, bytes]:
    reply = good["reply"]
    bad: dict[str, Any] = {
        "empty": {}, "no kind": {"key": key}, "list": [1], "number": 1, "null": None,
        "no reply": {k: v for k, v in good.items() if k != "reply"}, "wrong key": good | {"key": "1" * 64},
        "other request": good | {"request": {"model": "other"}},
        "text is a number": good | {"reply": reply | {"text": 1}},
        "tokens are text": good | {"reply": reply | {"input_tokens": "1"}},
        "tokens are negative": good | {"reply": reply | {"input_tokens": -1}},
        "refused is a number": good | {"reply": reply | {"refused": 1}},
        "a field less": good | {"reply": {"text": "x"}},
        "reply is a list": good | {"reply": []}, "salt is none": good | {"salt": None},
        "cost is negative": good | {"cost": -5}, "cost is true": good | {"cost": True},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in bad.items()} | {
        "no text": b"\xff\xfe\x00", "torn": json.dumps(good).encode()[:-3], "deep": b"[" * 100_000,
        "deep request": json.dumps(good).replace('"judge-1"', "[" * 50_000 + "]" * 50_000).encode(),
        "long": b'{"kind": "reply", "x": "' + b"x" * 5000 + b'"}', "infinite": b'{"kind": "asked", "bound": Infinity}',
    }  # fmt: skip


def test_foreign_and_hostile_lines_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE", 2000)
    key = keep(Journal(tmp_path / "good", "w"), 1)
    [good] = (tmp_path / "good" / "w.jsonl").read_text().splitlines()
    for name, line in lines(key, json.loads(good)).items():
        scope = tmp_path / name
        scope.mkdir()
        (scope / "a.jsonl").write_bytes(line + b"\n")
        assert Journal(scope).get(key) is None, name
        (scope / "a.jsonl").write_bytes(line + b"\n" + good.encode() + b"\n")
        assert Journal(scope).get(key), name
    # No part of a long line is a line.
    for pad in range(1990, 2010):
        (tmp_path / "long" / "a.jsonl").write_bytes(b" " * pad + good.encode() + b"\n")
        assert (Journal(tmp_path / "long").get(key) is None) is (pad + len(good) > 2000)


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    key = keep(Journal(tmp_path, "w"), 1)
    (tmp_path / "dir.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    assert Journal(tmp_path).get(key)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, "configuration"), (errno.EACCES, "configuration"),
                                              (errno.ENOSPC, "transient"), (errno.EIO, "transient")])  # fmt: skip
def test_what_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: str
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_WRONLY:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(module.os, "open", refuse)
    with pytest.raises(AutoEvalError, match="cannot write the cache of the GPT evaluator") as raised:
        Journal(tmp_path, "w").open()
    assert raised.value.kind == kind


def test_a_full_disk_is_an_error_and_nothing_follows_the_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Journal(tmp_path, "w")
    first = keep(writer, 1)
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: real(fd, data[:40]))
    with pytest.raises(AutoEvalError, match="40 of"):
        keep(writer, 2)
    monkeypatch.undo()
    with pytest.raises(AutoEvalError, match="40 of"):
        keep(writer, 3)
    assert writer.get(key_of("judge", request(2))) is None
    assert Journal(tmp_path).get(first)
    assert b"\n" not in (tmp_path / "w.jsonl").read_bytes()[-40:]


def test_a_reply_is_durable_before_anyone_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path, "w")
    writer.open()
    synced: list[int] = []

    def fail(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        raise OSError(errno.EIO, "fsync")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(AutoEvalError):
        keep(writer, 1)
    assert synced == [(tmp_path / "w.jsonl").stat().st_size]
    assert writer.get(key_of("judge", request(1))) is None


def test_one_write_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path, "w")
    writer.open()
    written: list[bytes] = []
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: (written.append(data), real(fd, data))[1])
    keep(writer, 1)
    assert len(written) == 1
    assert written[0].endswith(b"\n")
    assert written[0].count(b"\n") == 1


def test_a_closed_journal(tmp_path: Path) -> None:
    writer = Journal(tmp_path, "w")
    keep(writer, 1)
    writer.close()
    with pytest.raises(AutoEvalError, match="closed"):
        keep(writer, 2)


def test_what_was_spent(tmp_path: Path) -> None:
    writer = Journal(tmp_path)
    for name, who in (("a", "e"), ("b", "e"), ("c", "e"), ("d", "other")):
        writer.asked(name, who, 3.0)
    keep(writer, 1, evaluation="e", asked="a", cost=1.0)
    writer.settled("b", 0.0)
    for journal in (writer, Journal(tmp_path)):
        assert dict(journal.spent("e")) == {"a": 1.0, "b": 0.0, "c": 3.0}


def test_batches_that_are_not_done(tmp_path: Path) -> None:
    writer = Journal(tmp_path)
    for name, id_ in (("x", ""), ("x", "batch_1"), ("y", "batch_2")):
        writer.append({"kind": "batch", "name": name, "id": id_})
    writer.append({"kind": "batch_done", "name": "y"})
    for journal in (writer, Journal(tmp_path)):
        assert [b["id"] for b in journal.batches()] == ["batch_1"]
