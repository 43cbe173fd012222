"""What connections carry per second: the difference of two reports of the router.

A connection is the same as in the report before if namespace and cookie are. One that is new has no
rates yet. Connections that begin and end between two reports are not seen.
"""

from __future__ import annotations

from typing import Final

import msgspec

from dataplane.control import RING_MOST, ConnectionTraffic, RingTraffic, TcpTraffic
from plugin.traffic_names import NamedTraffic, TrafficReport

_WRAP: Final = 1 << 32


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Per second, seen from one end. Messages are null where nobody counts them."""

    bytes_in: float = 0.0
    bytes_out: float = 0.0
    messages_in: float | None = 0.0
    """Segments with data on TCP, and writes into the ring."""
    messages_out: float | None = 0.0
    retransmits: float = 0.0
    """Segments of TCP that this end has sent again."""

    @property
    def bytes(self) -> float:
        """In both directions."""
        return self.bytes_in + self.bytes_out

    @property
    def messages(self) -> float | None:
        """In both directions."""
        return _sum(self.messages_in, self.messages_out)

    def plus(self, other: Rates) -> Rates:
        """Of two together."""
        return Rates(
            bytes_in=self.bytes_in + other.bytes_in,
            bytes_out=self.bytes_out + other.bytes_out,
            messages_in=_sum(self.messages_in, other.messages_in),
            messages_out=_sum(self.messages_out, other.messages_out),
            retransmits=self.retransmits + other.retransmits,
        )


class MeasuredConnection(msgspec.Struct, frozen=True):
    """A connection and its rates; null: they aren't known yet."""

    connection: NamedTraffic
    rates: Rates | None


class MeasuredTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """All connections of this host. Processors are parts of one; null: not known."""

    connections: tuple[MeasuredConnection, ...]
    router: float | None
    relay: float | None
    relay_by_container: dict[int, float]


def measure(now: TrafficReport, before: TrafficReport | None) -> MeasuredTraffic:
    """The rates between two reports. Without the first one, or after a router's restart, none are
    known.
    """
    known = {} if before is None else {_key(each): each for each in before.connections}
    seconds = 0.0 if before is None else now.read - before.read
    relays = {} if before is None else before.containers_relay_cpu
    return MeasuredTraffic(
        connections=tuple(
            MeasuredConnection(each, rates_of(each, known.get(_key(each))))
            for each in now.connections
        ),
        router=_part(now.router_cpu, None if before is None else before.router_cpu, seconds),
        relay=_part(now.relay_cpu, None if before is None else before.relay_cpu, seconds),
        relay_by_container={
            namespace: part
            for namespace, used in now.containers_relay_cpu.items()
            if (part := _part(used, relays.get(namespace, 0.0), seconds)) is not None
        },
    )


def rates_of(now: ConnectionTraffic, before: ConnectionTraffic | None) -> Rates | None:
    """The rates of a connection; None: they aren't known."""
    if before is None or now.read <= before.read:
        return None
    seconds = now.read - before.read
    tcp, ring = _tcp(now.tcp, before.tcp, seconds), _ring(now, before.ring, seconds)
    return None if tcp is None and ring is None else (tcp or Rates()).plus(ring or Rates())


def _tcp(now: TcpTraffic | None, before: TcpTraffic | None, seconds: float) -> Rates | None:
    if now is None or before is None:
        return None
    return Rates(
        bytes_in=max(0, now.bytes_in - before.bytes_in) / seconds,
        bytes_out=max(0, now.bytes_out - before.bytes_out) / seconds,
        messages_in=(now.segments_in - before.segments_in) % _WRAP / seconds,
        messages_out=(now.segments_out - before.segments_out) % _WRAP / seconds,
        retransmits=(now.retransmits - before.retransmits) % _WRAP / seconds,
    )


def _ring(now: ConnectionTraffic, before: RingTraffic | None, seconds: float) -> Rates | None:
    ring = now.ring
    if ring is None:
        return None
    if before is None or before.incarnation != ring.incarnation:
        if now.age is None or now.age > seconds:
            return None
        # The slot is younger than the report before.
        before = RingTraffic(incarnation=0, bytes_in=0, bytes_out=0)
    came, went = ring.bytes_in - before.bytes_in, ring.bytes_out - before.bytes_out
    if not all(0 <= grown <= RING_MOST * seconds for grown in (came, went)):
        return None
    return Rates(
        bytes_in=came / seconds,
        bytes_out=went / seconds,
        messages_in=_messages(ring.messages_in, before.messages_in, came, seconds),
        messages_out=_messages(ring.messages_out, before.messages_out, went, seconds),
    )


def _messages(now: int | None, before: int | None, grown: int, seconds: float) -> float | None:
    if not grown:
        return 0.0
    # A message has a byte at least.
    return None if now is None else min(max(0, now - (before or 0)), grown) / seconds


def _key(connection: ConnectionTraffic) -> tuple[int, int]:
    return connection.namespace, connection.cookie


def _part(now: float | None, before: float | None, seconds: float) -> float | None:
    """The part of a processor; None: the process is another one by now."""
    if now is None or before is None or seconds <= 0 or now < before:
        return None
    return (now - before) / seconds


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
