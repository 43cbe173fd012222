"""What a run checks: the checks by name, what each options leaves out, and who is paired with whom.

All pairs of hosts are checked, in rounds in which no host is in two pairs, so that hosts don't
disturb each other's measurements.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

T = TypeVar("T")


class Check(enum.StrEnum):
    """The names that reports have; each is a line of docs/connectivity-test.md."""

    PROBE = "probe"
    REACH = "reach"
    DNS = "dns"
    VIP = "vip"
    MTU = "mtu"
    UDP = "udp"
    TRANSFER = "transfer"
    IPV6 = "ipv6"
    SPOOFING = "spoofing"
    SHM = "shm"
    RDMA = "rdma"
    RELAY = "relay"
    VERBS = "verbs"
    PORTS = "ports"
    MEASURE = "measure"
    CLEANUP = "cleanup"


QUICK: Final = frozenset({Check.DNS, Check.VIP, Check.MTU, Check.UDP, Check.TRANSFER, Check.SHM})
_ALWAYS: Final = frozenset({Check.PROBE, Check.REACH, Check.CLEANUP})
SIZES: Final = (64, 1000, 1422, 1423, 1472, 1500, 2800, 9000, 30000, 60000)
"""Of datagrams, with their heads."""


@dataclass(frozen=True, slots=True)
class TestPlan:
    """What the user wants. `seconds` bounds the time until all probes run."""

    __test__ = False

    image: str = ""
    registry: str = ""
    network: str = ""
    quick: bool = False
    perf: bool = False
    seconds: float = 90.0

    def has(self, check: Check) -> bool:
        """Whether a run does this check."""
        if check in _ALWAYS:
            return True
        if self.perf:
            return check is Check.MEASURE
        return not self.quick or check in QUICK

    @property
    def transfer(self) -> int:
        """Bytes of a transfer, in each direction."""
        return 4 << 20 if self.quick else 32 << 20

    @property
    def measuring(self) -> float:
        """Seconds of one measurement of throughput."""
        return 3.0 if self.perf else 1.0


def rounds(hosts: Sequence[T]) -> list[list[tuple[T, T]]]:
    """Each two hosts once, and each host with itself, in rounds without a host in two pairs."""
    found = [[(host, host) for host in hosts]] if hosts else []
    # The circle method: the first stays, the others move on by one.
    circle: list[T | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return [pairs for pairs in found if pairs]
