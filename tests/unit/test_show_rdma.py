"""What status, doctor, ping and metrics say of paths to other hosts: the RDMA device or why none,
each host, its link, each path.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest

from dataplane.control import PathCount, PeerFact, RdmaFacts, RelayFacts
from plugin.cli.doctor import check_session_port, remote_notes
from plugin.cli.show import show_status
from plugin.metrics import render
from plugin.status import Status
from tests.unit.documented import is_documented
from tests.unit.facts import engine_view
from tests.unit.statuses import NET, status
from tests.unit.test_snapshot import World


def host(**fields: object) -> PeerFact:
    made = PeerFact(
        name="host2",
        address="192.0.2.2",
        session=True,
        rdma=True,
        link="up",
        transport="rdma",
        connections=3,
    )
    return msgspec.structs.replace(made, **fields)


def over_tcp(**fields: object) -> PeerFact:
    made = host(
        rdma=False,
        relay=True,
        transport="relay",
        encryption="messages",
        why_not_rdma="its host has no RDMA device",
    )
    return msgspec.structs.replace(made, **fields)


RELAY = RelayFacts(encryption="messages", connections=4, granted=6, broken=1, left=2)


def with_rdma(*hosts: PeerFact, relay: RelayFacts = RELAY, **fields: object) -> Status:
    made = RdmaFacts(
        on=True,
        device="mlx5_0 port 1, RoCE v2 192.0.2.1 (GID 3)",
        why="",
        skipped=("mlx5_1 port 1: port 1 is not active",),
        no_sessions="",
        hosts=hosts,
        connections=3,
        memory=3 << 20,
        granted=9,
        broken=1,
        left=2,
        relay={"bytes_out": 500, "bytes_in": 400},
    )
    known = status()
    assert known.router is not None
    router = msgspec.structs.replace(
        known.router,
        rdma=msgspec.structs.replace(made, **fields),
        relay=relay,
        paths=(*known.router.paths, PathCount(NET, "rdma", "", 3), PathCount(NET, "relay", "", 4)),
    )
    return msgspec.structs.replace(known, router=router)


def test_status_shows_device_and_hosts() -> None:
    """The status shows device, registered memory, and each host's session, device, link and
    connections.
    """
    lost = host(name="", address="192.0.2.3", session=False, reason="silent", link="down")
    lines = show_status(with_rdma(host(), lost)).splitlines()
    assert (
        "rdma mlx5_0 port 1, RoCE v2 192.0.2.1 (GID 3), 3 connections in 3.0 MiB of its memory"
        in lines
    )
    rows = [line.split() for line in lines]
    assert ["host2", "192.0.2.2", "up", "yes", "up", "rdma", "3", "-"] in rows
    assert ["-", "192.0.2.3", "silent", "?", "down", "rdma", "3", "-"] in rows
    assert (
        "  connections: 2 on shm, 3 on rdma, 4 on relay, 3 on overlay (remote 1, short 2)" in lines
    )


@pytest.mark.parametrize(
    ("encryption", "shown"),
    [
        ("messages", "relay, encrypted but for bulk"),
        ("all", "relay, encrypted"),
        ("off", "relay, not encrypted"),
        ("", "relay, encryption not known"),
    ],
)
def test_status_shows_transport_and_encryption(encryption: str, shown: str) -> None:
    """The status says of each host which transport its link has, what is encrypted there, and why
    it isn't RDMA; doctor too.
    """
    found = with_rdma(over_tcp(encryption=encryption))
    (line,) = (line for line in show_status(found).splitlines() if shown in line)
    assert line.split()[0] == "host2"
    assert "its host has no RDMA device" in line
    assert "relay on, encrypts messages, 4 connections" in show_status(found).splitlines()
    assert (
        f"host host2: link up over {shown}; no RDMA: its host has no RDMA device"
        in remote_notes(found)
    )


@pytest.mark.parametrize(
    ("relay", "line"),
    [
        (RelayFacts(on=False, why="RELAY=off"), "relay off (RELAY=off)"),
        (RelayFacts(why="no other host has it"), "relay not used: no other host has it"),
        (RelayFacts(encryption="off"), "relay on, encrypts nothing"),
    ],
)
def test_status_says_why_no_relay(relay: RelayFacts, line: str) -> None:
    """The status says in one line whether there is TCP between relays, and why not."""
    assert line in show_status(with_rdma(relay=relay)).splitlines()


def test_status_says_why_not() -> None:
    """A host without a device, or with RDMA off, says so in one line and has no problem."""
    found = with_rdma(device="", why="this host has no RDMA device", connections=0, memory=0)
    assert found.healthy
    assert "rdma not used: this host has no RDMA device" in show_status(found).splitlines()
    off = with_rdma(on=False, connections=0, memory=0)
    assert "rdma off (RDMA=off)" in show_status(off).splitlines()


def test_doctor_names_each_device_and_host() -> None:
    """doctor's notes name the devices, used or not and why, and the state of each host."""
    notes = remote_notes(
        with_rdma(
            host(),
            host(name="host3", rdma=False),
            host(name="host4", session=False, reason="silent"),
        )
    )
    assert notes == [
        "rdma: mlx5_0 port 1, RoCE v2 192.0.2.1 (GID 3)",
        "rdma: not mlx5_1 port 1: port 1 is not active",
        "relay: on, encrypts messages",
        "host host2: link up over rdma",
        "host host3: it has no RDMA device, and its relay no TCP",
        "host host4: no session: silent",
    ]
    assert remote_notes(status()) == []


def test_doctor_finds_a_closed_port() -> None:
    """An unreachable router is a finding with its port, where RDMA or TCP between relays need it;
    without both nothing is tried.
    """
    lost = host(session=False, reason="can't be reached")
    (found,) = check_session_port(with_rdma(host(), lost), lambda address, port: False)
    assert found.what == "the router of host2 can't be reached on TCP port 4799"
    assert is_documented(found.what)
    assert check_session_port(with_rdma(lost), lambda address, port: True) == []
    assert check_session_port(with_rdma(lost, device=""), lambda address, port: False)
    neither = with_rdma(lost, relay=RelayFacts(on=False), device="")
    assert check_session_port(neither, lambda address, port: False) == []


def test_metrics() -> None:
    """Paths, sessions, links and bytes are exported."""
    text = render(with_rdma(host(), over_tcp(), host(session=False, link="down"))).decode()
    for line in (
        'freeflow_connections{network="backend",path="rdma",reason=""} 3.0',
        "freeflow_rdma_up 1.0",
        'freeflow_connections{network="backend",path="relay",reason=""} 4.0',
        "freeflow_sessions 2.0",
        "freeflow_sessions_missing 1.0",
        'freeflow_links{state="up",transport="rdma"} 1.0',
        'freeflow_links{state="up",transport="relay"} 1.0',
        'freeflow_links{state="down",transport="rdma"} 1.0',
        "freeflow_relay_up 1.0",
        "freeflow_relay_upgrades_total 6.0",
        'freeflow_relay_cpu_seconds_total{container="web.1.abc"} 2.5',
        "freeflow_relay_broken_total 1.0",
        "freeflow_relay_returned_total 2.0",
        "freeflow_rdma_broken_total 1.0",
        "freeflow_rdma_returned_total 2.0",
        "freeflow_rdma_sent_bytes_total 500.0",
    ):
        assert line in text
    neither = with_rdma(host(session=False), relay=RelayFacts(on=False), device="")
    assert "freeflow_sessions_missing 0.0" in render(neither).decode()


def test_snapshot(tmp_path: Path) -> None:
    """The router's facts become the status, with the names of hosts."""
    world = World(tmp_path)
    assert world.router.said is not None
    facts = RdmaFacts(
        device="rxe0 port 1, RoCE v2 192.0.2.1 (GID 1)",
        hosts=(PeerFact(address="192.0.2.2", session=True, rdma=True, link="up"),),
        connections=2,
    )
    world.router.said = msgspec.structs.replace(world.router.said, rdma=facts)
    world.sync.view = engine_view(hostnames={IPv4Address("192.0.2.2"): "host2"})
    found = world.status().router
    assert found is not None
    assert found.rdma is not None
    assert found.rdma.device == "rxe0 port 1, RoCE v2 192.0.2.1 (GID 1)"
    (peer,) = found.rdma.hosts
    assert (peer.name, peer.address, peer.link) == ("host2", "192.0.2.2", "up")


def test_status_shows_who_uses_the_relay() -> None:
    """The status names the containers for which the relay has worked."""
    assert "relay's processor time 2.5 s: web.1.abc 2.5 s\n" in show_status(with_rdma(over_tcp()))
