"""Counters of a TCP connection, in the kernel's struct tcp_info (linux/tcp.h).

sock_diag(7) returns it as the attribute INET_DIAG_INFO. A kernel may have a longer or a shorter
struct.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

INET_DIAG_INFO: Final = 2
INFO_WANTED: Final = 1 << (INET_DIAG_INFO - 1)
"""In struct inet_diag_req_v2."""

_ATTRIBUTE: Final = struct.Struct("=HH")
_SEGMENT: Final = struct.Struct("=16xI")
_ROUND_TRIP: Final = struct.Struct("=68xI")
_RETRANSMITS: Final = struct.Struct("=100xI")
_RECEIVED: Final = struct.Struct("=128xQ")
_SEGMENTS: Final = struct.Struct("=152xII")
_SENT: Final = struct.Struct("=200xQ")
LEAST: Final = _SENT.size
"""Bytes of the struct since Linux 4.19."""


class TcpCounters(NamedTuple):
    """Since the connection began. Segments are counted modulo 2³²."""

    segments_in: int
    """Segments with data, as received."""
    segments_out: int
    """Segments with data, those that were sent again too."""
    bytes_in: int
    bytes_out: int
    segment: int
    """Bytes of data in a full segment."""
    retransmits: int = 0
    """Segments that were sent again."""
    round_trip: int = 0
    """Microseconds, smoothed; 0: not measured yet."""


def find(attributes: bytes) -> TcpCounters | None:
    """The counters in the attributes of a struct inet_diag_msg; None: there are none."""
    offset = 0
    while offset + _ATTRIBUTE.size <= len(attributes):
        size, kind = _ATTRIBUTE.unpack_from(attributes, offset)
        if size < _ATTRIBUTE.size:
            return None
        if kind == INET_DIAG_INFO:
            return _read(attributes[offset + _ATTRIBUTE.size : offset + size])
        offset += (size + 3) & ~3
    return None


def _read(info: bytes) -> TcpCounters | None:
    if len(info) < LEAST:
        return None
    (segment,) = _SEGMENT.unpack_from(info)
    (received,) = _RECEIVED.unpack_from(info)
    segments_in, segments_out = _SEGMENTS.unpack_from(info)
    (sent,) = _SENT.unpack_from(info)
    (again,) = _RETRANSMITS.unpack_from(info)
    (round_trip,) = _ROUND_TRIP.unpack_from(info)
    return TcpCounters(segments_in, segments_out, received, sent, segment, again, round_trip)
