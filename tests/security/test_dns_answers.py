"""A container forges answers of Docker's DNS in its own namespace: other containers' VIPs do not
change.

A container with NET_RAW can answer faster than Docker's DNS on its own loopback device. One with
NET_ADMIN can replace it. Here the attacker's namespace has its own name server.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from driver.kernel.namespace import in_netns
from driver.resolver import SERVER, EmbeddedDns
from driver.sync import Syncer
from testbed.kernel_hosts import new_namespace
from tests.unit.dns_server import DnsServer
from tests.unit.test_sync import BOTH, NET, VIP, Host, at, service


def name_server(namespace: int) -> DnsServer:
    """A name server that replaces Docker's."""

    def make() -> DnsServer:
        with IPRoute() as route:
            route.link("set", index=1, state="up")
        return DnsServer(place=SERVER)

    return in_netns(namespace, make)


class Attacked(Host):
    """A host whose containers have namespaces and name servers, by container number."""

    def __init__(self, directory: Path) -> None:
        self.namespaces: list[int] = []
        self.servers: dict[int, DnsServer] = {}
        super().__init__(directory)

    def restart(self) -> None:
        self.syncer = Syncer(
            self.driver,
            self.engine,
            EmbeddedDns(),
            self.balancer,
            sandboxes=self.sandboxes,
            interval=0.5,
            clock=lambda: self.now,
        )
        self.driver.on_change(self.syncer.wake, self.syncer.endpoint_joined)

    def appear(self, sandbox: Path) -> None:
        namespace = new_namespace()
        self.namespaces.append(namespace)
        sandbox.symlink_to(f"/proc/{os.getpid()}/fd/{namespace}")
        self.balancer.there.add(sandbox)
        server = name_server(namespace)
        server.records = {"web.backend": [VIP], "tasks.web.backend": [at(7), at(8)]}
        self.servers[int(sandbox.name[1:])] = server

    def close(self) -> None:
        for server in self.servers.values():
            # From inside, because its address belongs to its namespace.
            server.end()
        for namespace in self.namespaces:
            os.close(namespace)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Attacked]:
    with contextlib.closing(Attacked(tmp_path)) as made:
        yield made


LIES = {"no tasks": [], "one of them": [at(8)], "its own": [at(200)]}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
@pytest.mark.parametrize("attacker", [20, 21], ids=["first", "later"])
def test_forged_answers(host: Attacked, attacker: int, lie: list[IPv4Address]) -> None:
    """Forged answers in one container remove no task from a VIP elsewhere, and add none."""
    sandboxes = [host.join(number) for number in (20, 21, 22)]
    host.servers[attacker].records["tasks.web.backend"] = lie
    for _ in range(6):
        host.look()
        for sandbox in sandboxes:
            assert host.balancer.tables[sandbox] == BOTH
    # They do not keep a task that leaves.
    for number, server in host.servers.items():
        if number != attacker:
            server.records["tasks.web.backend"] = [at(7)]
    host.servers[attacker].records["tasks.web.backend"] = [at(7), at(8)]
    for _ in range(3):
        host.look()
    for number, sandbox in zip((20, 21, 22), sandboxes, strict=True):
        assert number == attacker or host.balancer.tables[sandbox] == {VIP: (at(7),)}


def test_forged_answers_to_one_other(host: Attacked) -> None:
    """With only the attacker and one other container, no task is removed from its VIP."""
    host.join(20)
    other = host.join(21)
    host.servers[20].records["tasks.web.backend"] = []
    for _ in range(6):
        host.look()
        assert host.balancer.tables[other] == BOTH


def test_silence_takes_nothing(host: Attacked) -> None:
    """An attacker that does not answer, or truncates its answers, changes nothing for others."""
    host.join(20)
    other = host.join(21)
    host.list(NET, service("web", VIP, 7, 8))
    host.servers[20].silent = {"tasks.web.backend"}
    for _ in range(4):
        host.look()
        assert host.balancer.tables[other] == BOTH
    host.servers[20].silent = set()
    host.servers[20].truncated = {"tasks.web.backend"}
    for _ in range(4):
        host.look()
        assert host.balancer.tables[other] == BOTH
