"""Statuses for tests of what shows them."""

from __future__ import annotations

from typing import Any

import msgspec

from dataplane.control import (
    ConnectionFact,
    Connections,
    ContainerCounts,
    PathCount,
    QueuePairFact,
    RingTraffic,
    TcpTraffic,
    VerbsDeviceFact,
    VerbsFacts,
    VerbsObjects,
)
from plugin.admin import AdminAnswers
from plugin.runtime_networks import RuntimeAnswer
from plugin.status import (
    CallStatus,
    EncryptedPeerStatus,
    EncryptionStatus,
    EndpointStatus,
    FastPathStatus,
    Finding,
    HostStatus,
    NetworkStatus,
    PeerStatus,
    RouterStatus,
    ServiceStatus,
    Status,
)
from plugin.traffic_names import AddressBook, AddressOwner, NamedTraffic, TrafficReport

NET = "p3l8f1w0gk2c9d7h5m6n4b0aq"
NET2 = "q7x2r5v8sl3b6c1j9k4m0d8ez"
EP = "9f0c12ab34de" + "e" * 52


LISTED = Connections(
    connections=(
        ConnectionFact(
            namespace=4026532177,
            container="web.1.abc",
            network=NET,
            local="10.0.4.7:5000",
            remote="10.0.9.9:80",
            path="overlay",
            reason="remote",
        ),
        ConnectionFact(
            namespace=4026532177,
            container="web.1.abc",
            network=NET,
            local="10.0.4.7:4000",
            remote="10.0.4.8:80",
            path="shm",
            age=3.5,
        ),
    ),
    reasons={"remote": "the peer is on another host"},
)

TRAFFIC = TrafficReport(
    connections=(
        NamedTraffic(
            namespace=4026532177,
            container="web.1.abc",
            network=NET,
            local="10.0.4.7:5000",
            remote="10.0.9.9:80",
            path="overlay",
            reason="remote",
            cookie=21,
            read=1000.0,
            tcp=TcpTraffic(
                bytes_in=1000,
                bytes_out=2000,
                segments_in=10,
                segments_out=20,
                retransmits=1,
                round_trip=1500,
            ),
            service="web",
        ),
        NamedTraffic(
            namespace=4026532177,
            container="web.1.abc",
            network=NET,
            local="10.0.4.7:4000",
            remote="10.0.4.8:80",
            path="shm",
            age=3.5,
            cookie=22,
            read=1000.0,
            tcp=TcpTraffic(bytes_in=0, bytes_out=400, segments_in=0, segments_out=4),
            ring=RingTraffic(
                incarnation=7,
                bytes_in=5 << 20,
                bytes_out=1 << 20,
                messages_in=500,
                messages_out=100,
            ),
            service="web",
            peer="db.1.def",
            peer_service="db",
            host="host1",
        ),
    ),
    reasons={"remote": "the peer is on another host"},
    read=1000.0,
    router_cpu=5.0,
    relay_cpu=2.0,
    containers_relay_cpu={4026532177: 0.5},
    host="host1",
    networks={NET: "backend"},
)

ADDRESSES = AddressBook(
    networks={
        NET: {
            "10.0.4.7": AddressOwner(name="web.1.abc", service="web", host="host1"),
            "10.0.4.8": AddressOwner(name="db.1.def", service="db", host="host2"),
            "10.0.4.2": AddressOwner(name="web", service="web", vip=True),
        }
    }
)

LISTED_VERBS = VerbsObjects(
    devices=(
        VerbsDeviceFact(
            namespace=4026532177,
            container="web.1.abc",
            pid=4711,
            guid="024646ff0a000407",
            gids=("10.0.4.7", "fd00::7"),
            qpn_first=0x5000,
            queue_pairs=2,
        ),
    ),
    queue_pairs=(
        QueuePairFact(
            namespace=4026532177,
            container="web.1.abc",
            network=NET,
            pid=4711,
            type="RC",
            local="10.0.4.7",
            qpn=0x5001,
            peer="10.0.4.9",
            peer_qpn=0x7000,
            path="",
            reason="waiting",
            age=1.5,
        ),
        QueuePairFact(
            namespace=4026532177,
            container="web.1.abc",
            network=NET,
            pid=4711,
            type="UC",
            local="10.0.4.7",
            qpn=0x5000,
            peer="10.0.4.8",
            peer_qpn=0x9000,
            path="shm",
            age=3.5,
            operations=12,
            bytes=4096,
        ),
    ),
    reasons={"waiting": "the peer has not asked for this queue pair yet"},
)


def endpoint(**fields: Any) -> EndpointStatus:
    made = EndpointStatus(
        id=EP,
        container="web.1.abc",
        ipv4="10.0.4.7/24",
        ipv6="",
        mac="02:42:0a:00:04:07",
        joined=True,
        rx_bytes=2048,
        tx_bytes=100,
    )
    return msgspec.structs.replace(made, **fields)


def network(**fields: Any) -> NetworkStatus:
    made = NetworkStatus(
        id=NET,
        name="backend",
        vni=70012,
        port=4799,
        mtu=1450,
        prefix6="",
        subnets=["10.0.4.0/24"],
        internal=False,
        ipv6=False,
        path="overlay",
        acceleration=True,
        endpoints=[endpoint()],
        peers=[PeerStatus("host1", "192.0.2.1", own=True), PeerStatus("host2", "192.0.2.2")],
        services=[
            ServiceStatus("web", "10.0.4.2", ["10.0.4.7", "10.0.4.8"]),
            ServiceStatus("db", "", ["10.0.4.9"]),
        ],
        synced=0.3,
        rx_bytes=5000,
        tx_bytes=600,
        spoofed=2,
    )
    return msgspec.structs.replace(made, **fields)


def host(**fields: Any) -> HostStatus:
    made = HostStatus(
        hostname="host1",
        engine="28.5.2",
        swarm=True,
        manager=True,
        node_id="n1",
        address="192.0.2.1",
        underlay="eth0",
        underlay_mtu=1500,
        kernel="6.1.0",
    )
    return msgspec.structs.replace(made, **fields)


def finding(severity: str = "error") -> Finding:
    return Finding(severity, "something is wrong", "its cause", "freeflow doctor")


def encryption(**fields: Any) -> EncryptionStatus:
    """Of a host with two peers, one of which doesn't answer."""
    peers = [
        EncryptedPeerStatus(
            address="192.0.2.2",
            name="host2",
            node="n2",
            inner="fd66:6677::2",
            control="tls1.3",
            data="wireguard",
            handshake=42.5,
            received=3000,
            sent=4000,
        ),
        EncryptedPeerStatus(
            address="192.0.2.3", node="n3", inner="fd66:6677::4", reason="no handshake yet"
        ),
    ]
    made = EncryptionStatus(slot=0, port=4797, rotated=7300.0, peers=peers)
    return msgspec.structs.replace(made, **fields)


def status(**fields: Any) -> Status:
    made = Status(
        version="0.1.0",
        healthy=not fields.get("problems"),
        uptime=12.5,
        host=host(),
        settings={"SCOPE": "global", "VXLAN_PORT": "4799", "VERBS_QPS": "4096", "RELAY_CPU": "25"},
        networks=[network()],
        problems=[],
        calls=[CallStatus("Join", 7, 1, 1.5, 20.0)],
        path_counts={"overlay": 3, "shm": 2},
        fastpath=FastPathStatus("receive", "the host has IPsec policies", []),
        encryption=encryption(),
        router=RouterStatus(
            up=True,
            uptime=10.0,
            processes=4,
            waiting=1,
            connections=1,
            memory=24576,
            granted=8,
            refused={"remote": 6},
            noted={"option": 5},
            wrong_messages=7,
            verbs=VerbsFacts(
                processes=1,
                queue_pairs=3,
                waiting=1,
                paired=4,
                refused={"remote": 2},
                operations=12,
                bytes=4096,
                direct_files=2,
                direct_bytes=8192,
            ),
            paths=(
                PathCount(NET, "overlay", "remote", 1),
                PathCount(NET, "overlay", "short", 2),
                PathCount(NET, "shm", "", 2),
            ),
            containers=(
                ContainerCounts(
                    relay_cpu=2.5,
                    namespace=4026532177,
                    container="web.1.abc",
                    processes=4,
                    waiting=1,
                    connections=2,
                    queue_pairs=3,
                    memory=24576,
                    builds={"0123abcd": 4},
                ),
            ),
        ),
    )
    return msgspec.structs.replace(made, **fields)


def admin_answers(**changes: Any) -> AdminAnswers:
    """What a healthy plugin answers its command, but for `changes`."""
    known: dict[str, Any] = {
        "status": status,
        "ping": lambda wanted: wanted,
        "connections": lambda: LISTED,
        "verbs": lambda: LISTED_VERBS,
        "traffic": lambda: TRAFFIC,
        "addresses": lambda: ADDRESSES,
        "runtime": lambda _question: RuntimeAnswer(True),
    }
    return AdminAnswers(**{**known, **changes})
