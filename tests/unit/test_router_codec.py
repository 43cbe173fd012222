"""Messages are packed to the bytes that their classes declare, and read from them."""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
import pytest

from dataplane.errors import WrongMessage
from dataplane.router.codec import U32, U64, Codec, WireField


class Number(IntEnum):
    ONE = 1
    TWO = 2
    THREE = 3


codec = Codec()


def _even(value: int) -> int:
    if value % 2:
        raise WrongMessage("odd")
    return value // 2


Half = Annotated[int, WireField("H2x", lambda value: 2 * value, _even)]


@codec.message(Number.ONE, Number.TWO, order=("small", "large"))
class Reordered(msgspec.Struct, frozen=True):
    kind: int
    large: U64
    small: U32 = 7


@codec.message(Number.THREE, tail=3)
class Long(msgspec.Struct, frozen=True):
    half: Half
    data: bytes


def test_kinds_that_share_a_class() -> None:
    """A class of several kinds keeps the kind of each message, and its bytes may have another
    order.
    """
    for kind in (Number.ONE, Number.TWO):
        data = codec.pack(Reordered(kind, 1))
        assert data == bytes([kind, 0, 16, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
        assert codec.unpack(data) == Reordered(kind, 1)
        assert codec.unpack(data).kind is kind


def test_conversions_and_padding() -> None:
    """A field is converted in both directions; the contents of its padding don't matter."""
    assert codec.pack(Long(3, b"ab")) == b"\x03\x00\x0a\x00\x06\x00\x00\x00ab"
    assert codec.unpack(b"\x03\x00\x0a\x00\x06\x00\xff\xffab") == Long(3, b"ab")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x03\x00\x08",
        b"\x04\x00\x04\x00",
        b"\x03\x00\x07\x00\x06\x00\x00",
        b"\x03\x00\x09\x00\x06\x00\x00\x00",
        b"\x03\x00\x0c\x00\x06\x00\x00\x00abcd",
        b"\x03\x00\x08\x00\x05\x00\x00\x00",
        b"\x01\x00\x11\x00" + bytes(13),
    ],
    ids=["empty", "head", "kind", "short", "size", "tail", "value", "long"],
)
def test_what_is_no_message(data: bytes) -> None:
    """A packet that isn't exactly one message of a known kind is refused."""
    with pytest.raises(WrongMessage):
        codec.unpack(data)
