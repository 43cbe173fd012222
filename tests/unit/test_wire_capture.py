"""The capture of the wire between guests: what frames are, and which of them hold a mark."""

from __future__ import annotations

import struct
from typing import Final

import pytest

from testbed.patience import patience
from testbed.process import wait_until
from testbed.vm.capture import kind
from testbed.vm.switch import Switch

ETHERNET: Final = b"\xff" * 6 + bytes(6)
MARK: Final = b"in the clear"


def ipv4(protocol: int, payload: bytes, options: int = 0) -> bytes:
    header = struct.pack("!BBHHHBBH", 0x45 + options, 0, 0, 0, 0, 64, protocol, 0)
    return ETHERNET + b"\x08\x00" + header + bytes(8 + 4 * options) + payload


def ipv6(protocol: int, payload: bytes) -> bytes:
    return (
        ETHERNET
        + b"\x86\xdd"
        + struct.pack("!IHBB", 6 << 28, 0, protocol, 64)
        + bytes(32)
        + payload
    )


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (ipv4(17, struct.pack("!HH", 1, 4797)), "udp/4797"),
        (ipv4(17, struct.pack("!HH", 1, 4797), options=2), "udp/4797"),
        (ipv6(6, struct.pack("!HH", 1, 80)), "tcp/80"),
        (ipv4(50, b""), "esp"),
        (ipv6(58, b""), "icmp6"),
        (ipv4(132, b""), "132"),
        (ipv4(17, b"\x01"), "udp"),
        (ETHERNET + b"\x08\x06" + bytes(28), "0806"),
    ],
)
def test_what_a_frame_is(frame: bytes, said: str) -> None:
    """A frame is counted by its protocol and destination port, also behind IP options."""
    assert kind(frame) == said


def test_a_capture_finds_marks() -> None:
    """Every frame of each guest is counted, those for a guest that was cut off too, and a mark is
    found wherever it is in a frame.
    """
    wire = Switch()
    first, second = wire.plug(1), wire.plug(2)
    try:
        with wire.capture(b"elsewhere", MARK) as capture:
            first.send(ipv4(17, struct.pack("!HH", 1, 9) + b"xx" + MARK))
            wire.cut(2)
            second.send(ipv4(1, b""))
            wait_until("two frames", lambda: capture.counts.total() == 2, 10)
        wire.heal(2)
        first.send(ipv4(17, struct.pack("!HH", 1, 9) + MARK))
        second.settimeout(patience(10))
        assert MARK in second.recv(2048)
    finally:
        wire.close()
        for end in (first, second):
            end.close()
    assert capture.counts == {(1, "udp/9"): 1, (2, "icmp"): 1}
    assert capture.sent("udp/9") == 1
    assert [found[:2] for found in capture.found] == [(1, "udp/9")]
