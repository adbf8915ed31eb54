"""Read a SentencePiece model file, without sentencepiece or protobuf.

Field numbers and defaults are those of sentencepiece_model.proto (github.com/google/sentencepiece, src/), the wire
format that of protobuf (protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from autoeval_hooks.errors import ConfigError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Value = int | bytes


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What is needed to encode. `kind` is `UNIGRAM` or `BPE`, `charsmap` the compiled normalization, empty for none;
    `special` has the texts of the pieces for unknown, begin, end and padding."""

    pieces: tuple[Piece, ...]
    kind: int
    unk_id: int
    byte_fallback: bool
    suffix_space: bool
    charsmap: bytes
    dummy_prefix: bool
    fewer_spaces: bool
    escaped_spaces: bool
    special: dict[str, str]


def read(data: bytes, name: str) -> Model:
    """The model in the bytes of a file called `name`. Raises ConfigError where they are none."""
    try:
        return _model(data)
    except (ValueError, LookupError, struct.error) as error:
        raise ConfigError(f"{name}: is no SentencePiece model ({error}); name the .model file of training") from error


def _model(data: bytes) -> Model:
    fields = list(_fields(data))
    trainer = dict(_fields(_bytes(next((v for n, v in fields if n == 2), b""))))
    normalizer = dict(_fields(_bytes(next((v for n, v in fields if n == 3), b""))))
    pieces = tuple(_piece(_bytes(value)) for number, value in fields if number == 1)
    if not pieces or all(number != 2 for number, _ in fields):
        raise ValueError("it has no pieces, or does not say how it was trained")

    def word(number: int, default: str) -> str:
        return _bytes(trainer.get(number, default.encode())).decode()

    return Model(
        pieces=pieces,
        kind=_int(trainer.get(3, UNIGRAM)),
        unk_id=_int(trainer.get(40, 0)),
        byte_fallback=bool(trainer.get(35, 0)),
        suffix_space=bool(trainer.get(24, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        fewer_spaces=bool(normalizer.get(4, 1)),
        escaped_spaces=bool(normalizer.get(5, 1)),
        special={"unk": word(45, "<unk>"), "bos": word(46, "<s>"), "eos": word(47, "</s>"), "pad": word(48, "<pad>")},
    )


def _piece(data: bytes) -> Piece:
    found = dict(_fields(data))
    score = struct.unpack("<f", _bytes(found.get(2, bytes(4))))[0]
    return Piece(_bytes(found[1]).decode(), score, _int(found.get(3, NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field: an int for a varint, bytes for all others. ValueError for what is no message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {at} is of no message")
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} is of no message")


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a text belongs")
    return value


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a text stands where a number belongs")
    return value
