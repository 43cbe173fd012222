"""What crosses the wire between guests, and whether it holds bytes that must not be in the clear.

The switch shows every frame that a guest sends, so nothing escapes a capture: not a guest's first
frame after it was switched on, nor one that a guest's own capture would miss.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Final

_IPV4: Final = b"\x08\x00"
_IPV6: Final = b"\x86\xdd"
_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp", 50: "esp", 58: "icmp6"}
_KEPT: Final = 20


def kind(frame: bytes) -> str:
    """What a frame carries, such as `udp/4799` (by its destination port), `esp` or `0806`."""
    if frame[12:14] == _IPV4:
        protocol, header = frame[23], 14 + (frame[14] & 15) * 4
    elif frame[12:14] == _IPV6:
        protocol, header = frame[20], 54
    else:
        return frame[12:14].hex()
    name = _PROTOCOLS.get(protocol, str(protocol))
    if name in ("tcp", "udp") and len(frame) >= header + 4:
        return f"{name}/{struct.unpack_from('!H', frame, header + 2)[0]}"
    return name


class WireCapture:
    """Counts the frames of each guest by their kinds, and keeps those that hold one of `marks`."""

    def __init__(self, marks: tuple[bytes, ...]) -> None:
        self.marks = marks
        self.counts: Counter[tuple[int, str]] = Counter()
        """Frames by the number of the guest that sent them and their kind."""
        self.sizes: Counter[tuple[int, str]] = Counter()
        """Their bytes."""
        self.found: list[tuple[int, str, bytes]] = []
        """The first frames with a mark: sender, kind, content."""

    def take(self, sender: int, frame: bytes) -> None:
        """Handle a frame; only the switch calls this, in its own thread."""
        what = (sender, kind(frame))
        self.counts[what] += 1
        self.sizes[what] += len(frame)
        if len(self.found) < _KEPT and any(mark in frame for mark in self.marks):
            self.found.append((*what, frame))

    def sent(self, what: str) -> int:
        """The number of frames of a kind that guests have sent."""
        return sum(count for (_, name), count in self.counts.items() if name == what)
