"""Tickets and manifests as somebody else may have written them: everything odd is refused, nothing is executed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoeval_hooks import manifest as manifests
from autoeval_hooks import ticket as tickets
from autoeval_hooks.errors import TicketError
from autoeval_hooks.manifest import FileRecord, Manifest, MegatronRecord
from autoeval_hooks.run_identity import RunIdentity
from autoeval_hooks.ticket import Ticket

MakeTicket = Callable[..., Ticket]


def test_a_ticket_round_trips(new_ticket: MakeTicket) -> None:
    ticket = new_ticket()
    assert tickets.load(tickets.dump(ticket), "here") == ticket


def change(ticket: Ticket, path: str, value: Any) -> bytes:
    """The ticket's text with one value replaced, or one key added."""
    data = json.loads(tickets.dump(ticket))
    at = data
    *parents, last = path.split(".")
    for key in parents:
        at = at[int(key)] if key.isdigit() else at[key]
    at[int(last) if last.isdigit() else last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("command", "rm -rf /", "command: unknown key"),
        ("manifest.env", {"PATH": "/evil"}, "manifest.env: unknown key"),
        ("manifest.step", True, "manifest.step: expected a whole number"),
        ("manifest.step", -1, "negative"),
        ("manifest.step", 10**30, "64 bits"),
        ("manifest.step", "5", "expected a whole number"),
        ("manifest.files.0.path", "../../etc/passwd", "would escape"),
        ("manifest.files.0.path", "/etc/passwd", "would escape"),
        ("manifest.files.0.path", "a//b", "would escape"),
        ("manifest.files.0.digest", "0" * 64, "not that of its content"),
        ("manifest.digest", "0" * 64, "not that of its content"),
        ("manifest.digest", "Z" * 64, "64 hexadecimal"),
        ("manifest.weights_digest", "0" * 64, "not that of its content"),
        ("manifest.path", "relative", "not absolute"),
        ("manifest.path", "/a/../b", "not absolute and plain"),
        ("manifest.path", "", "no checkpoint path"),
        ("manifest.path", "/a\0b", "no path or name may hold"),
        ("manifest.tokenizer", "../tokenizer", "not absolute"),
        ("manifest.saved_at", float("nan"), "not valid JSON"),
        ("pin", "/home/you", "not under .autoeval/pins"),
        ("pin", "/out/.autoeval/pins/../../..", "not absolute and plain"),
        ("manifest.saved_at", 1e300, "is no time"),
        ("manifest.saved_at", -1.0, "is no time"),
        ("manifest.files.0.size", -1, "a negative step, size"),
        ("manifest.files.0.path", "x" * 300, "a name that no file can have"),
        ("manifest.path", "/" + "x" * 5000, "more than 4096 bytes"),
        ("pin", "/out/.autoeval/pins/.new-h-1-ab", "not under .autoeval/pins"),
        ("suite", "../../x", "is not a name"),
        ("suite", "..", "is not a name"),
        ("suite", "x" * 65, "is not a name"),
        ("priority", 99, "priority 99"),
        ("id", "0" * 64, "id is not that of its content"),
        ("version", 2, "version 2"),
        ("manifest.version", 7, "manifest 7"),
        ("manifest.run.id", None, "expected text"),
        ("manifest.files", {}, "expected a list"),
    ],
)
def test_whatever_is_odd_is_refused(new_ticket: MakeTicket, path: str, value: Any, says: str) -> None:
    with pytest.raises(TicketError, match=says):
        tickets.load(change(new_ticket(), path, value), "here")


def test_a_newer_version_is_named_as_such(new_ticket: MakeTicket) -> None:
    data = json.loads(change(new_ticket(), "version", 9)) | {"new_field": 1}
    with pytest.raises(TicketError, match="here: ticket version 9 was written by a newer autoeval; upgrade"):
        tickets.load(json.dumps(data, separators=(",", ":")).encode(), "here")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected a mapping"),
        (b'{"version": 1, "version": 1}', "a key stands twice"),
        (b"x" * (tickets.MAX_BYTES + 1), "the limit is"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"version":' + b"[" * 20 + b"]" * 20 + b"}", "nested deeper"),
    ],
)
def test_text_that_is_no_ticket(text: bytes, says: str) -> None:
    with pytest.raises(TicketError, match=says):
        tickets.load(text, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(text=st.binary(max_size=200) | JSON.map(lambda data: json.dumps(data).encode()))
def test_no_text_does_more_than_be_refused(text: bytes) -> None:
    with pytest.raises(TicketError):
        tickets.load(text, "here")


def _paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for key, value in items for p in [(*path, key), *_paths(value, (*path, key))]]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_one_changed_value_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever one value is changed to, the result is refused, or is a ticket of the same identity."""
    original = data.draw(st.sampled_from((BASE, MEGATRON)))
    text = json.loads(tickets.dump(original))
    path = data.draw(st.sampled_from(_paths(text)))
    at = changed = copy.deepcopy(text)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(JSON)
    try:
        loaded = tickets.load(json.dumps(changed).encode(), "here")
    except TicketError:
        return
    assert loaded.id == original.id
    assert loaded.manifest.weights_digest == original.manifest.weights_digest


def _base() -> Ticket:
    files = (FileRecord("model.safetensors", 1, 1, "a" * 64), FileRecord("config.json", 2, 2, "c" * 64))
    draft = Manifest(
        version=1, path="/out/checkpoint-7", kind="huggingface", step=7, samples=None, tokens=5, files=files,
        weights_digest=manifests.weights_digest_of(files), digest="", run=RunIdentity("run", "name"), tokenizer="/t",
        host="h", saved_at=0.0,
    )  # fmt: skip
    found = replace(draft, digest=manifests.digest_of(draft))
    return tickets.new(found, "quick", "5" * 64, 5, pin=f"/out/.autoeval/pins/{'d' * 64}")


BASE = _base()


def _megatron() -> Ticket:
    files = (FileRecord("mp_rank_00/model_optim_rng.pt", 1, 1, "a" * 64),)
    record = MegatronRecord(
        format="torch", version="0.19.2", world_size=1, tensor_parallel=1, pipeline_parallel=1, seq_length=64,
        tokenizer_type="HuggingFaceTokenizer", tokenizer={"tokenizer_model": "/t"},
        tokenizer_files=(FileRecord("/t/tokenizer.json", 2, 2, "b" * 64),),
    )  # fmt: skip
    draft = replace(
        BASE.manifest, path="/out/iter_0000007", kind="megatron", files=files, megatron=record,
        weights_digest=manifests.weights_digest_of(files),
    )  # fmt: skip
    return tickets.new(replace(draft, digest=manifests.digest_of(draft)), "quick", "5" * 64, 5)


MEGATRON = _megatron()


@pytest.mark.parametrize("ticket", [BASE, MEGATRON], ids=["huggingface", "megatron"])
def test_the_base_is_a_ticket(ticket: Ticket) -> None:
    """Else the tests here could not fail."""
    assert tickets.load(tickets.dump(ticket), "here") == ticket


def _renamed(name: str) -> bytes:
    """A ticket of Megatron's that is right but for the name of its file."""
    files = (replace(MEGATRON.manifest.files[0], path=name),)
    draft = replace(MEGATRON.manifest, files=files, weights_digest=manifests.weights_digest_of(files))
    new = tickets.new(replace(draft, digest=manifests.digest_of(draft)), "quick", "5" * 64, 5)
    return tickets.dump(new)


@pytest.mark.parametrize(
    "name",
    [
        "mp_rank_00%2Fmodel_optim_rng.pt", "mp_rank_00/x/model_optim_rng.pt", "mp_rank_00/distrib_optim.pt",
        "x/__0_0.distcp", "modelopt_state/x/__0_0.distcp", "model.safetensors", "a b.distcp", "\u00e9.distcp",
    ],
)  # fmt: skip
def test_a_file_that_megatron_does_not_write_is_refused(name: str) -> None:
    assert tickets.load(_renamed("__0_0.distcp"), "here")
    with pytest.raises(TicketError, match="is none of a checkpoint of Megatron's"):
        tickets.load(_renamed(name), "here")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("manifest.kind", "huggingface", "kind 'huggingface' is unknown, or not what the manifest describes"),
        ("manifest.kind", "nemo", "kind 'nemo' is unknown"),
        ("manifest.megatron", None, "kind 'megatron' is unknown, or not what"),
        ("manifest.megatron.format", "zarr", "format 'zarr' is unknown"),
        ("manifest.megatron.format", "", "format '' is unknown"),
        ("manifest.megatron.env", {}, "manifest.megatron.env: unknown key"),
        ("manifest.megatron.world_size", -1, "a number out of range"),
        ("manifest.megatron.seq_length", 1 << 60, "a number out of range"),
        ("manifest.megatron.seq_length", True, "expected a whole number"),
        ("manifest.megatron.version", "x" * 5000, "a text that no argument can have"),
        ("manifest.megatron.tokenizer", {"--load": "/x"}, "a key that is no argument's name"),
        ("manifest.megatron.tokenizer", {"": "/x"}, "a key that is no argument's name"),
        ("manifest.megatron.tokenizer", {"tokenizer_model": 1}, "expected text"),
        ("manifest.megatron.tokenizer", {f"k{i}": "" for i in range(40)}, "a text that no argument can have"),
        ("manifest.megatron.tokenizer_files.0.path", "t/tokenizer.json", "is not absolute and plain"),
        ("manifest.megatron.tokenizer_files.0.path", "/t/../etc/passwd", "is not absolute and plain"),
        ("manifest.megatron.tokenizer_files.0.digest", "x", "has no size or digest"),
        ("manifest.megatron.tokenizer_files.0.size", -1, "has no size or digest"),
        ("manifest.files.0.path", "mp_rank_00/../x", "would escape"),
    ],
)
def test_what_is_odd_in_a_megatron_ticket_is_refused(path: str, value: Any, says: str) -> None:
    with pytest.raises(TicketError, match=says):
        tickets.load(change(MEGATRON, path, value), "here")
