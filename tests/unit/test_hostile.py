"""Every reader of what somebody else may have written, given what nobody should write.

The property: a reader returns an object that reads the same after it was written again, or raises exactly its
documented error, which names the file; it never takes long, and it never follows what stands in the file's place.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoeval_hooks import config as hook_config
from autoeval_hooks import handover, manifest, relay_files
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import AutoEvalError, CheckpointError, ConfigError, TicketError
from autoeval_hooks.queue import Queue, Token
from autoeval_hooks.relay_files import Announcement, Ended, Point
from autoeval_hooks.run_identity import RunIdentity
from eval_runner import breaker
from eval_runner import config as runner_config
from eval_runner.results import lines, store
from eval_runner.results.schema import Instance
from eval_runner.sinks import wandb_writer
from tests.results_samples import result, score
from tests.unit.test_ticket import BASE, MEGATRON

ID = "7" * 64
CPU_S = 5.0
"""Seconds of this process's own time that one reading may take: other processes' load does not count."""


@dataclass(frozen=True)
class Reader:
    """`read` takes the file's path. `error` is None where anything that does not fit counts as nothing at all."""

    name: str
    valid: bytes
    read: Callable[[Path], Any]
    error: type[AutoEvalError] | None
    dump: Callable[[Any], bytes]


def _json(record: Any) -> bytes:
    return json.dumps(asdict(record)).encode()


def _queue(path: Path) -> Queue:
    return Queue(str(path.parents[1]), runner="reader")


def _packed(values: list[Instance]) -> bytes:
    return lines.dump_instances(values)


IDENTITY = RunIdentity("id1", "a run", "p", "e", "w1", "g", "http://h", "offline", "/w/wandb")
RESULT = result(5, score(0.5, 0.1), score(0.25, benchmark="b", split="valid"), tokens=7)
YAML = b"""version: 1
queue: /q
run: {name: a, tokens_per_step: 5}
hook: {pin: auto, max_pins: 3}
path_map: {/a: /b}
suites: {quick: {every_steps: 5, priority: 7, evaluators: [{type: helm, entries: [a]}]}}
runner: {lease: 60, order: newest}
sinks: [{type: wandb}]
"""
READERS = (
    Reader("pending/ticket", tickets.dump(BASE), lambda p: _queue(p)._read(str(p), BASE.id), TicketError,
           tickets.dump),
    Reader("claimed/megatron", tickets.dump(MEGATRON), lambda p: _queue(p)._read(str(p), MEGATRON.id), TicketError,
           tickets.dump),
    Reader(f"points/{ID}.json", relay_files.encode(Point(1, ID, 5, 0.5, {"bench/s/a/b": 0.5, "bench/lag_s": 2.0})),
           lambda p: relay_files.read_point(str(p.parents[1]), p.name), TicketError, relay_files.encode),
    Reader("r/run.json", _json(Announcement(1, IDENTITY, "abc", True, 10)),
           lambda p: relay_files.parse(Announcement, p.read_bytes(), str(p)), TicketError, relay_files.encode),
    Reader("r/ended.json", _json(Ended(1, "abc", 10, True)),
           lambda p: relay_files.parse(Ended, p.read_bytes(), str(p)), TicketError, relay_files.encode),
    Reader("r/identity.json", _json(IDENTITY), lambda p: relay_files.parse(RunIdentity, p.read_bytes(), str(p)),
           TicketError, relay_files.encode),
    Reader("results/result.json", store._dump(RESULT), lambda p: store.read(p.parent), store.ResultError, store._dump),
    Reader("results/instances.jsonl.gz", _packed([Instance("b", "m", "test", f"i{n}", n / 3) for n in range(3)]),
           lambda p: list(store.instances(p.parent)), store.ResultError, _packed),
    Reader(".autoeval/run.json", _json(IDENTITY), lambda p: handover.remembered(str(p.parents[1])), None, _json),
    Reader(f"breakers/{'5' * 64}.json", _json(breaker.Record("quick", "5" * 64, ("a",), True, 1, "why")),
           lambda p: next(breaker._records(p.parents[1], Queue("").ops), None), None, _json),
    Reader("hb/me", b"%020d" % 5, lambda p: _queue(p).heartbeat("me"), None, lambda data: data),
    Reader("relay/heartbeat", b"abc 005\n", lambda p: wandb_writer.heartbeat(str(p)), None, str.encode),
    Reader("x/autoeval.yaml", YAML, hook_config.load, ConfigError, lambda config: YAML),
    Reader("x/autoeval-runner.yaml", YAML, runner_config.load, ConfigError, lambda config: YAML),
)  # fmt: skip
BY_NAME = {reader.name: reader for reader in READERS}


def outcome(reader: Reader, path: Path) -> Any:
    """What is read, or the error; anything else is a failure, and so is a reading that takes long."""
    started = time.process_time()
    found: Any
    try:
        found = reader.read(path)
    except AutoEvalError as error:
        found = error
    assert time.process_time() - started < CPU_S
    if isinstance(found, AutoEvalError):
        said = str(found)
        assert type(found) is reader.error, repr(found)
        assert path.name in said or path.name.partition("-")[0] in said, said
        assert len(said) < 30_000
    return found


def check(reader: Reader, data: bytes) -> Any:
    """The property, for one content of the file."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / reader.name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        found = outcome(reader, path)
        if found is None or isinstance(found, AutoEvalError) or reader.dump(found) == YAML:
            return found
        path.write_bytes(reader.dump(found))
        assert outcome(reader, path) == found
        return found


# ---------------------------------------------------------------------- contents

RAW = "@@RAW@@"
VALUES: tuple[Any, ...] = (
    10**400, -(10**400), 2**63, -(2**63), 10**18, 1e308, -1.0, -0.0, -1, 0, 0.5, True, None,
    "", " ", ".", "..", "../../etc", "/", "/etc/passwd", "a/../b", "a//b", "a\0b", "\ud800",
    "\u202eabc", "e\u0301", "\u00e9", "\x1b[2J", "a\nb", "x" * 300, "x" * 100_000, "é" * 200, "NaN",
    [], {}, [[[[]]]], [None], {"a": 1}, {"\ud800": 1.0}, {"a\0": 1.0}, {"bench/x": 10**400},
)  # fmt: skip
TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "1" * 5000, "0x10", "1_0", "[" * 2000 + "]" * 2000)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def _paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for key, value in items for p in [(*path, key), *_paths(value, (*path, key))]]


@st.composite
def contents(draw: st.DrawFn, reader: Reader) -> bytes:
    """A file that somebody else may have left: torn, flipped, doubled, in another coding, or odd in one value."""
    packed = reader.name.endswith(".gz")
    text = gzip.decompress(reader.valid) if packed else reader.valid
    kinds = ("value", "value", "value", "key", "token", "torn", "flipped", "bytes", "coded", "json")
    kind = draw(st.sampled_from(kinds))
    structured = reader.valid[:1] == b"{" or packed
    if kind in ("value", "key", "token") and structured:
        data = json.loads(text.split(b"\n")[0] if packed else text)
        path = draw(st.sampled_from(_paths(data)))
        at = data
        for key in path[:-1]:
            at = at[key]
        if kind == "key" and isinstance(at, dict):
            at[draw(st.sampled_from([v for v in VALUES if isinstance(v, str)]))] = at.pop(path[-1])
        else:
            at[path[-1]] = RAW if kind == "token" else copy.deepcopy(draw(st.sampled_from(VALUES) | ANY_JSON))
        out = json.dumps(data)
        text = out.replace(f'"{RAW}"', draw(st.sampled_from(TOKENS))).encode()
    elif kind == "torn":
        text = text[: draw(st.integers(0, len(text)))]
    elif kind == "flipped":
        raw = bytearray(reader.valid)
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(raw)
    elif kind == "bytes":
        return draw(st.binary(max_size=200))
    elif kind == "coded":
        plain = text.decode()
        text = draw(st.sampled_from((
            b"\xef\xbb\xbf" + text, plain.encode("utf-16"), plain.encode("utf-32"), text + b"\0", text + text,
            b" \n" + text, b'{"version": 1, ' + text.lstrip(b"{"), b"[" * 100_000, b'{"a":' * 100_000,
            text + b" " * 100_000,
        )))  # fmt: skip
    elif kind == "json":
        text = json.dumps(draw(ANY_JSON)).encode()
    return gzip.compress(text) if packed else text


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_right_is_read(name: str) -> None:
    found = check(BY_NAME[name], BY_NAME[name].valid)
    assert found is not None
    assert not isinstance(found, AutoEvalError)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_file_is_read_or_refused(name: str, data: st.DataObject) -> None:
    check(BY_NAME[name], data.draw(contents(BY_NAME[name])))


@pytest.mark.parametrize("value", VALUES, ids=lambda v: repr(v)[:20])
def test_every_odd_value_in_every_place_of_a_ticket(value: Any) -> None:
    """Enumerated, so that it does not hang on chance."""
    reader = BY_NAME["pending/ticket"]
    text = json.loads(reader.valid)
    for path in _paths(text):
        at = changed = copy.deepcopy(text)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        check(reader, json.dumps(changed).encode())


HUGE = {
    "unknown keys": b"{" + b",".join(b'"k%d":1' % i for i in range(500_000)) + b"}",
    "a long key": b'{"' + b"k" * (7 << 20) + b'": 1}',
    "wrong items": b'{"version":1,"manifest":{"files":[' + b"1," * 3_000_000 + b"1]}}",
    "a long text": b'{"suite":"' + b"x" * (7 << 20) + b'"}',
    "many lists": b"[" + b"[]," * 2_000_000 + b"[]]",
    "too large": b" " * (tickets.MAX_BYTES + 1),
}


@pytest.mark.parametrize("kind", HUGE)
def test_eight_megabytes_of_nonsense_cost_little(kind: str) -> None:
    found = check(BY_NAME["pending/ticket"], HUGE[kind])
    assert isinstance(found, TicketError)
    assert len(str(found)) < 2000


def test_a_few_kilobytes_that_unpack_to_gigabytes_are_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = BY_NAME["results/instances.jsonl.gz"]
    line = gzip.decompress(reader.valid).split(b"\n")[0] + b"\n"
    monkeypatch.setattr(lines, "MAX_UNPACKED_BYTES", 1000 * len(line))
    assert len(check(reader, gzip.compress(line * 1000))) == 1000
    assert "it holds more than" in str(check(reader, gzip.compress(line * 1001)))


# ---------------------------------------------------------------------- what stands in a file's place


def _link(path: Path) -> None:
    secret = path.parent / "elsewhere"
    secret.write_bytes(BY_NAME[path.relative_to(path.parents[1]).as_posix()].valid)
    path.symlink_to(secret)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


PLACES: dict[str, Callable[[Path], Any]] = {
    "a link to a right one": _link, "a link to itself": lambda p: p.symlink_to(p), "a directory": Path.mkdir,
    "a pipe": os.mkfifo, "a socket": _socket,
}  # fmt: skip
BY_PATH = [r.name for r in READERS if not r.name.startswith("r/") and not r.name.startswith("x/")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BY_PATH)
@pytest.mark.timeout(60)
def test_no_link_is_followed_and_no_pipe_waited_for(name: str, place: str) -> None:
    reader = BY_NAME[name]
    with tempfile.TemporaryDirectory(dir="/tmp") as root:       # a socket's path must be short
        path = Path(root) / name
        path.parent.mkdir(parents=True)
        PLACES[place](path)
        try:
            found = outcome(reader, path)
        except OSError:     # which every caller takes for a file system that fails for now
            assert name == "relay/heartbeat"
            return
        assert found is None or found in (b"", "") or isinstance(found, AutoEvalError)


def test_a_manifests_file_that_is_none_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        manifest.record(str(tmp_path), "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        manifest.record("/dev", "null")


def test_a_manifests_link_is_taken_by_its_content(tmp_path: Path) -> None:
    """Model caches are made of links: what is digested is what is loaded."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model.safetensors").symlink_to(tmp_path / "blob")
    before = manifest.record(str(tmp_path / "c"), "model.safetensors")
    (tmp_path / "other").write_bytes(b"other..")
    os.utime(tmp_path / "other", ns=(0, before.mtime_ns))
    (tmp_path / "c" / "model.safetensors").unlink()
    (tmp_path / "c" / "model.safetensors").symlink_to(tmp_path / "other")
    assert manifest.record(str(tmp_path / "c"), "model.safetensors") != before


# ---------------------------------------------------------------------- names

PARTS = st.sampled_from(
    ("..", ".", "", "out", ".autoeval", "pins", "a" * 64, "A" * 64, ".new-h-1-ab", "x\0", "pins/", "/")
)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PARTS, max_size=8))
@example(parts=["out", ".autoeval", "pins", "a" * 64])
@example(parts=["out", ".autoeval", "pins", "..", "pins", "a" * 64])
@example(parts=["out", ".autoeval", "pins", ".new-h-1-ab"])
def test_no_pin_of_a_ticket_leads_elsewhere(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    data = json.loads(tickets.dump(BASE)) | {"pin": path}
    try:
        pin = tickets.load(json.dumps(data).encode(), "here").pin
    except TicketError:
        return
    assert Path(pin).name == "a" * 64
    assert os.path.normpath(pin).endswith(f"/.autoeval/pins/{'a' * 64}")
    assert ".." not in Path(pin).parts


NAMES = st.from_regex(r"\A[0-9]-\d{1,20}-[0-9a-f]{64}~g\d{1,9}f\d{1,9}(~[A-Za-z0-9._-]{1,20})?\Z") | st.text()


@settings(max_examples=300, deadline=None)
@given(name=NAMES, state=st.sampled_from(("pending", "claimed", "done")))
@example(name=f"5-1-{'a' * 64}~g007f0", state="pending")
@example(name=f"5-1-{'a' * 64}~g\u0667f0", state="pending")     # an Arabic seven, which int() takes
@example(name=f"5-1-{'a' * 64}~g0f0", state="pending")
def test_a_tokens_name_is_its_own_or_none(name: str, state: str) -> None:
    """What is taken for a token can be renamed by the name that it is given."""
    token = Token.parse(state, name)
    assert token is None or token.name == name


@pytest.mark.parametrize(
    "name", ["x" * 250 + ".json", "a\udcff.json", "..json", "a b.json", "-.json", "a\n.json", "\u202e.json", "a.txt"]
)
def test_a_point_of_any_name_can_be_set_aside(tmp_path: Path, name: str) -> None:
    points = tmp_path / "points"
    points.mkdir()
    (points / name).write_bytes(b"{}")
    waiting = relay_files.waiting(str(tmp_path))
    if not waiting:
        assert name.startswith(".")
        return
    with pytest.raises(TicketError) as raised:
        relay_files.read_point(str(tmp_path), waiting[0])
    relay_files.set_aside(str(tmp_path), waiting[0], str(raised.value))
    assert relay_files.waiting(str(tmp_path)) == []
    assert len(list((tmp_path / "refused").iterdir())) == 2


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("wandb_id", "../../x", "none that W&B takes"), ("wandb_id", "..", "none that W&B takes"),
        ("wandb_id", "x" * 129, "none that W&B takes"), ("wandb_dir", "wandb", "not absolute and plain"),
        ("wandb_dir", "/w/../etc", "not absolute and plain"), ("name", "x" * 5000, "more than 4096 bytes"),
    ],
)  # fmt: skip
def test_an_identity_names_no_path_of_its_own(tmp_path: Path, field: str, value: str, says: str) -> None:
    data = json.dumps(asdict(IDENTITY) | {field: value}).encode()
    (tmp_path / ".autoeval").mkdir()
    (tmp_path / ".autoeval" / "run.json").write_bytes(data)
    assert handover.remembered(str(tmp_path)) is None
    with pytest.raises(TicketError, match=says):
        relay_files.parse(RunIdentity, data, "identity.json")
    ticket = json.loads(tickets.dump(BASE))
    ticket["manifest"]["run"][field] = value
    with pytest.raises(TicketError, match=says):
        tickets.load(json.dumps(ticket).encode(), "here")


@pytest.mark.parametrize("name", [r.name for r in READERS if r.valid.startswith(b"{")])
def test_only_utf_8_is_text(name: str) -> None:
    """Python's JSON reader takes UTF-16 and UTF-32 too, which no tool that searches for a name would find."""
    reader = BY_NAME[name]
    for data in (reader.valid.decode().encode("utf-16"), b"\xef\xbb\xbf" + reader.valid):
        found = check(reader, data)
        assert found is None or isinstance(found, AutoEvalError)


@pytest.mark.parametrize("key", ["bench/\ud800", "bench/\0"])
def test_a_metric_has_a_name_that_can_be_written(key: str) -> None:
    text = json.dumps({"version": 1, "ticket": ID, "step": 5, "tokens": None, "metrics": {key: 1.0}}).encode()
    found = check(BY_NAME[f"points/{ID}.json"], text)
    assert "is not text that a name may hold" in str(found)
