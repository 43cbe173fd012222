"""What `freeflow status` and the metrics show of the paths to other hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dataplane import control
from dataplane.router.devices import DeviceScan
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.remote import Remotes
from dataplane.router.remote_events import LIVE, Transport
from dataplane.router.remote_hosts import RemoteHost
from dataplane.router.sessions import Sessions

_ENCRYPTION: Final = ("off", "messages", "all")
"""The values of `RELAY_ENCRYPTION`. The later one of two hosts' counts."""


def rdma_facts(
    remotes: Remotes[Sessions],
    scan: DeviceScan,
    settings: control.RouterSettings,
    counters: dict[str, int],
    now: float,
) -> control.RdmaFacts:
    """RDMA, sessions, and the other hosts. `counters` are the relay's."""
    counts = remotes.connections.counts[Transport.RDMA]
    return control.RdmaFacts(
        on=settings.rdma,
        device="" if scan.device is None else str(scan.device),
        why=remotes.why[Transport.RDMA],
        skipped=tuple(
            f"{one.device} port {one.port}: {one.why}" if one.port else f"{one.device}: {one.why}"
            for one in scan.unusable
        ),
        no_sessions=remotes.sessions.reason,
        node=remotes.sessions.node,
        hosts=tuple(
            _peer(remotes, address, reason, settings, now)
            for address, reason in sorted(remotes.sessions.reasons().items(), key=str)
        ),
        connections=_live(remotes, Transport.RDMA),
        memory=remotes.connections.room.registered,
        granted=counts.granted,
        broken=counts.broken,
        left=counts.left,
        refused=_by_word(remotes.requests.refused),
        relay=counters,
    )


def relay_facts(remotes: Remotes[Sessions], settings: control.RouterSettings) -> control.RelayFacts:
    """TCP between relays."""
    counts = remotes.connections.counts[Transport.RELAY]
    return control.RelayFacts(
        on=settings.relay,
        why=remotes.why[Transport.RELAY],
        encryption=settings.relay_encryption,
        connections=_live(remotes, Transport.RELAY),
        granted=counts.granted,
        broken=counts.broken,
        left=counts.left,
    )


def encryption_facts(remotes: Remotes[Sessions]) -> control.EncryptionFacts:
    """The keys that hosts with a session have announced. The node is the certificate's."""
    return control.EncryptionFacts(
        node=remotes.sessions.node,
        peers=tuple(
            control.PeerKeys(
                address=str(host.address),
                node=host.hello.node,
                keys=host.hello.wireguard,
                proofs=host.hello.wireguard_proofs,
                slot=host.hello.wireguard_slot,
                port=host.hello.wireguard_port,
            )
            for host in remotes.hosts
            if host.hello is not None
        ),
    )


def _live(remotes: Remotes[Sessions], transport: Transport) -> int:
    return sum(
        one.state.phase in LIVE and one.state.transport is transport for one in remotes.connections
    )


def _peer(
    remotes: Remotes[Sessions],
    address: IPAddress,
    reason: str,
    settings: control.RouterSettings,
    now: float,
) -> control.PeerFact:
    host = remotes.hosts.get(address)
    link = remotes.links.link(address)
    hello = None if host is None else host.hello
    relay = link.number != 0 and link.transport is Transport.RELAY
    both = [settings.relay_encryption, "" if hello is None else hello.relay_encryption]
    known = [word for word in both if word in _ENCRYPTION]
    return control.PeerFact(
        address=str(address),
        node="" if host is None else host.node,
        session=hello is not None,
        reason=reason,
        rdma=hello is not None and hello.rdma,
        relay=hello is not None and hello.relay,
        data_path="" if hello is None else hello.data_path,
        link=link.state.value,
        link_reason=link.reason,
        transport=link.transport.value if link.number else "",
        encryption=max(known, key=_ENCRYPTION.index) if relay and known else "",
        why_not_rdma=_why_not_rdma(remotes, host, settings, now) if relay and host else "",
        connections=0 if host is None else len(remotes.connections.of(host)),
    )


def _why_not_rdma(
    remotes: Remotes[Sessions], host: RemoteHost, settings: control.RouterSettings, now: float
) -> str:
    """Why the link to a host doesn't use RDMA."""
    trials = remotes.links.link(host.address).trials.rdma
    if not settings.rdma:
        return "RDMA=off"
    if not remotes.ready(Transport.RDMA):
        return remotes.why[Transport.RDMA]
    if host.hello is not None and not host.hello.rdma:
        return "its host has no RDMA device"
    if Transport.RDMA not in remotes.transports(host.address):
        return "it is off for all networks that the two hosts share"
    if trials.until > now:
        return f"the devices don't reach each other: {trials.reason}"
    return "as soon as the link has no connections"


def _by_word(counts: Mapping[int, int]) -> dict[str, int]:
    return {Reason(number).word: count for number, count in counts.items()}
