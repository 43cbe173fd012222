"""Which path packets take that aren't in shared memory, as status and connections say it."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest
from msgspec.structs import replace

from dataplane.control import ConnectionFact, Connections, PathCount
from driver.kernel.fastpath import Stage
from plugin.cli.show import show_status
from plugin.paths import FAST, PathLabels, relabel
from plugin.status import FastPathStatus, OtherNetworkStatus
from tests.unit.facts import FakeKernelFacts
from tests.unit.statuses import NET, network, status
from tests.unit.test_snapshot import World

NEAR_MAC = "02:42:0a:00:04:07"
FAR_MAC = "02:42:0a:00:04:09"


@pytest.fixture
def world(tmp_path: Path) -> tuple[PathLabels, FakeKernelFacts]:
    """A local endpoint, 10.0.4.7; a service with the VIP 10.0.4.2 and a remote task, 10.0.4.9."""
    made = World(tmp_path)
    made.change_state(table={IPv4Address("10.0.4.2"): (IPv4Address("10.0.4.9"),)})
    return PathLabels(made.driver, made.kernel, made.sync), made.kernel


def connection(remote: str, path: str = "overlay") -> ConnectionFact:
    return ConnectionFact(
        namespace=1, container="c", network=NET, local="10.0.4.7:1", remote=remote, path=path
    )


@pytest.mark.parametrize(
    ("remote", "taken", "path"),
    [
        ("10.0.4.7:80", {NEAR_MAC}, FAST),
        ("10.0.4.9:80", {FAR_MAC}, FAST),
        ("10.0.4.9:80", set(), "overlay"),
        ("10.0.4.2:80", {FAR_MAC}, FAST),
        ("10.0.4.2:80", {NEAR_MAC}, "overlay"),
        ("[2001:db8::1]:80", {NEAR_MAC, FAR_MAC}, "overlay"),
    ],
)
def test_a_connection_is_where_its_packets_are(
    world: tuple[PathLabels, FakeKernelFacts], remote: str, taken: set[str], path: str
) -> None:
    """A connection's path is that of packets to its peer, by address or VIP; unknown ones are on
    overlay.
    """
    labels, kernel = world
    kernel.taken = taken
    found = labels.connections(Connections(connections=(connection(remote),), reasons={}))
    assert [each.path for each in found.connections] == [path]


def test_an_ipv6_address_is_its_ipv4_addresss(world: tuple[PathLabels, FakeKernelFacts]) -> None:
    """The IPv6 address of another host's container has the MAC address of the IPv4 address in
    it.
    """
    labels, kernel = world
    kernel.taken = {FAR_MAC}
    prefix = labels.driver.store.networks()[0].prefix6
    remote = f"[{prefix[int(IPv4Address('10.0.4.9'))]}]:80"
    found = labels.connections(Connections(connections=(connection(remote),), reasons={}))
    assert found.connections[0].path == FAST


def test_what_is_faster_stays(world: tuple[PathLabels, FakeKernelFacts]) -> None:
    """A connection in shared memory is shown as shm, whatever path its packets have."""
    labels, kernel = world
    kernel.taken = {NEAR_MAC}
    found = labels.connections(
        Connections(connections=(connection("10.0.4.7:80", "shm"),), reasons={})
    )
    assert found.connections[0].path == "shm"


def test_counts_are_by_what_runs() -> None:
    """Counts of remote peers are on the fast path if its tunnel stage runs, foreign ones never."""
    counts = [PathCount(NET, "overlay", reason, 1) for reason in ("remote", "short", "foreign")]
    counts.append(PathCount(NET, "shm", "", 1))
    local = relabel(counts, lambda network, elsewhere: not elsewhere)
    assert [each.path for each in local] == ["overlay", FAST, "overlay", "shm"]
    both = relabel(counts, lambda network, elsewhere: True)
    assert [each.path for each in both] == [FAST, FAST, "overlay", "shm"]
    assert relabel(counts, lambda network, elsewhere: False) == counts


@pytest.mark.parametrize(
    ("fastpath", "line"),
    [
        (FastPathStatus("tunnel", "", ["eth0"]), "overlay+ebpf tunnel on eth0"),
        (
            FastPathStatus("receive", "the host has IPsec"),
            "overlay+ebpf receive; no higher stage: the host has IPsec",
        ),
        (FastPathStatus("", "setting EBPF=off"), "overlay+ebpf off: setting EBPF=off"),
    ],
)
def test_status_says_which_stage_runs(fastpath: FastPathStatus, line: str) -> None:
    """`freeflow status` shows the fast path's stage, and why there is no higher one."""
    assert line in show_status(status(fastpath=fastpath)).splitlines()


def test_status_counts_connections_by_path() -> None:
    """The line of a network's connections names each path once."""
    made = status(networks=[network()])
    assert made.router is not None
    router = replace(made.router, paths=[PathCount(NET, FAST, "remote", 3)])
    assert "0 on shm, 3 on overlay+ebpf, 0 on overlay (remote 3)" in show_status(
        replace(made, router=router)
    )
    assert Stage().networks == frozenset()


def test_status_shows_networks_of_other_drivers() -> None:
    """A network of another driver is shown with its containers and its connections, those on TCP
    by the driver's name; or with the reason why it isn't accelerated.
    """
    made = status(
        networks=[],
        other_networks=[
            OtherNetworkStatus(
                "b" * 64,
                "app",
                "bridge",
                subnets=["172.20.0.0/16"],
                containers={"db": ["172.20.0.2"]},
            ),
            OtherNetworkStatus("c" * 64, "lan", "macvlan", reason="it is a macvlan"),
        ],
    )
    assert made.router is not None
    counts = [PathCount("b" * 64, "shm", "", 4), PathCount("b" * 64, "bridge", "short", 1)]
    text = show_status(replace(made, router=replace(made.router, paths=counts)))
    assert "network app  bbbbbbbbbbbb  bridge, 172.20.0.0/16" in text
    assert "db" in text
    assert "172.20.0.2" in text
    assert "connections: 4 on shm, 1 on bridge (short 1)" in text
    assert "network lan  cccccccccccc  macvlan: not accelerated, it is a macvlan" in text
