"""Queries for A records (RFC 1035; EDNS size: RFC 6891). Answers are not trusted."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Final

_TYPE_A: Final = 1
_TYPE_OPT: Final = 41
_CLASS_IN: Final = 1
_MAX_LABEL: Final = 63
_MAX_NAME: Final = 255
_POINTER: Final = 0xC0
_QUERY_FLAGS: Final = 0x0100
_ANSWER_BIT: Final = 0x8000
_TRUNCATED_BIT: Final = 0x0200
_CODE_BITS: Final = 0x000F
_HEADER: Final = struct.Struct("!6H")
SIZE: Final = 60000
"""The EDNS size that we announce, in bytes: room for a thousand tasks in one datagram on
loopback."""


SMALLEST: Final = 512
"""Bytes that are reserved for an answer of unknown size."""


class BadNameError(ValueError):
    """The name can't be encoded."""


class MalformedAnswerError(ValueError):
    """The message is not an answer to our question."""


def _encode_name(name: str) -> bytes:
    encoded = b""
    for label in name.split("."):
        octets = label.encode()
        if not 0 < len(octets) <= _MAX_LABEL:
            raise BadNameError(f"{name!r} has a label that DNS can't carry")
        encoded += bytes([len(octets)]) + octets
    if len(encoded) >= _MAX_NAME:
        raise BadNameError(f"{name!r} is too long for DNS")
    return encoded + b"\0"


def _question(name: str) -> bytes:
    return _encode_name(name) + struct.pack("!2H", _TYPE_A, _CLASS_IN)


def encode_query(identifier: int, name: str) -> bytes:
    """A query for the A records of `name`.

    Raises:
        BadNameError
    """
    header = _HEADER.pack(identifier, _QUERY_FLAGS, 1, 0, 0, 1)
    option = b"\0" + struct.pack("!HHIH", _TYPE_OPT, SIZE, 0, 0)
    return header + _question(name) + option


def identifier(message: bytes) -> int:
    """The identifier of a message; -1: it is too short to have one."""
    return int.from_bytes(message[:2], "big") if len(message) >= 2 else -1


def _skip_name(message: bytes, offset: int) -> int:
    while True:
        if offset >= len(message):
            raise MalformedAnswerError("a name runs past the end")
        length = message[offset]
        if length >= _POINTER:
            return offset + 2
        if length > _MAX_LABEL:
            raise MalformedAnswerError("a label's length is reserved")
        offset += 1 + length
        if length == 0:
            return offset


def decode_answer(message: bytes, name: str) -> frozenset[IPv4Address] | None:
    """The addresses in an answer to a query for `name`; None: the server has truncated the answer.

    Raises:
        MalformedAnswerError: not an answer to that query, or not DNS at all.
    """
    if len(message) < _HEADER.size:
        raise MalformedAnswerError("shorter than a header")
    _, flags, questions, answers, _, _ = _HEADER.unpack_from(message)
    offset = _HEADER.size
    try:
        question = _question(name)
    except BadNameError as error:
        raise MalformedAnswerError("no such question") from error
    asked = message[offset : offset + len(question)]
    if not flags & _ANSWER_BIT or questions != 1 or asked.lower() != question.lower():
        raise MalformedAnswerError("not the answer to this query")
    if flags & _TRUNCATED_BIT:
        return None
    if flags & _CODE_BITS:
        return frozenset()
    offset += len(question)
    addresses = set()
    for _ in range(answers):
        offset = _skip_name(message, offset)
        if offset + 10 > len(message):
            raise MalformedAnswerError("a record runs past the end")
        kind, family, _, length = struct.unpack_from("!HHIH", message, offset)
        offset += 10
        if offset + length > len(message):
            raise MalformedAnswerError("a record's data runs past the end")
        if kind == _TYPE_A and family == _CLASS_IN and length == 4:
            addresses.add(IPv4Address(message[offset : offset + 4]))
        offset += length
    return frozenset(addresses)
