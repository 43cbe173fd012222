"""Complete routers of two hosts, with sessions over an underlay, and their faults.

The relays share this machine's memory (path `rdma`), or have TCP connections on an underlay of IPv6
(path `relay`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import (
    EndpointFact,
    NetworkFact,
    RdmaFacts,
    RelayFacts,
    RouterSettings,
    RouterSnapshot,
)
from dataplane.errors import DataplaneError
from dataplane.router import library_wire as wire
from dataplane.router_client import RouterClient
from testbed import wait_until
from testbed.kernel_hosts import PREFIX6, Container, KernelHost, Lab, a_network, lab
from testbed.patience import patience
from tests.dataplane.library import Library, dial, listen
from tests.dataplane.places import ROOT
from tests.unit.swarm_ca import Authority, write

PORT: Final = 4799


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The relay, built."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is missing")
    to = tmp_path_factory.mktemp("relay") / "freeflow-relay"
    subprocess.run(
        [ROOT / "dataplane/relay/build.sh", "--memory", to], check=True, capture_output=True
    )
    return to


@dataclass
class Router:
    """A host's router, with one container."""

    host: KernelHost
    other: KernelHost
    box: Container
    folder: Path
    relay: Path
    settings: RouterSettings = field(default_factory=lambda: RouterSettings(session_port=PORT))
    path: str = "rdma"
    """The path of connections with the other host: rdma or relay."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "router.sock"

    @property
    def client(self) -> RouterClient:
        return RouterClient(self.folder / "admin.sock")

    def start(self) -> None:
        """Start the router and send it its snapshot."""
        command = [
            *(sys.executable, "-m", "dataplane.router"),
            "--memory-relay" if self.path == "rdma" else "--open-relay",
            *(f"--socket={self.socket}", f"--control={self.folder / 'admin.sock'}"),
            *(f"--relay={self.relay}", f"--swarm={self.folder / 'swarm'}"),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = self.host.do(lambda: subprocess.Popen(command, stdout=log, stderr=log))
        wait_until("the router", self._tell, 20)

    def _tell(self) -> bool:
        try:
            self.client.replace_snapshot(self.facts())
        except DataplaneError:
            return False
        return True

    def facts(self) -> RouterSnapshot:
        box = self.box
        return RouterSnapshot(
            endpoints=(
                EndpointFact(
                    id=box.endpoint.id,
                    network=box.network.id,
                    addresses=(str(box.ipv4), str(box.ipv6)),
                    namespace=os.fstat(box.namespace).st_ino,
                    path=f"/proc/{os.getpid()}/fd/{box.namespace}",
                    container=f"box{self.host.number}",
                ),
            ),
            networks=(
                NetworkFact(
                    id=box.network.id,
                    subnets=("10.9.0.0/24", str(PREFIX6)),
                    peers=(str(self.other.address),),
                ),
            ),
            settings=self.settings,
            underlay=str(self.host.address),
        )

    def rdma(self) -> RdmaFacts:
        """Its facts about other hosts."""
        found = self.client.statistics().rdma
        assert found is not None
        return found

    def counts(self) -> RdmaFacts | RelayFacts:
        """What it counts about the path."""
        found = self.client.statistics()
        return found.rdma if self.path == "rdma" else found.relay

    def linked(self) -> bool:
        """Whether there is a link to the other host."""
        hosts = [(each.session, each.link, each.transport) for each in self.rdma().hosts]
        return hosts == [(True, "up", self.path)]

    def process_inside(self) -> Library:
        """A process of the container that has been welcomed."""
        made = Library.connect(self.socket, self.box.namespace)
        made.connection.settimeout(patience(10))
        made.hear(wire.Welcome)
        return made

    def kill(self) -> None:
        """Kill it, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(patience(10))


@dataclass
class Pair:
    """Two routers."""

    lab: Lab
    one: Router
    other: Router
    listener: socket.socket

    def connection(self) -> tuple[socket.socket, socket.socket]:
        """A TCP connection between the containers: `one`'s end, and `other`'s."""
        client = dial(self.one.box.namespace, str(self.other.box.ipv4))
        return client, self.listener.accept()[0]

    def linked(self) -> bool:
        return self.one.linked() and self.other.linked()

    def answers(self) -> tuple[wire.Answer, wire.Answer]:
        """The answers to both ends of a new connection."""
        a, b = self.one.process_inside(), self.other.process_inside()
        client, server = self.connection()
        with contextlib.closing(a), contextlib.closing(b), client, server:
            a.ask(client)
            b.ask(server)
            return a.hear(wire.Answer)[0], b.hear(wire.Answer)[0]  # type: ignore[arg-type]

    def connections(self) -> list[int]:
        """The number of connections on the path, by host."""
        return [router.counts().connections for router in (self.one, self.other)]

    def nothing_left(self) -> None:
        """Wait until nothing is left of any connection."""

        def clean() -> bool:
            memory = self.one.rdma().memory + self.other.rdma().memory
            return memory == 0 and self.connections() == [0, 0]

        wait_until("nothing to be left", clean, 20)

    def granted(self) -> bool:
        return all(isinstance(each, wire.Grant) for each in self.answers())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module", params=["rdma", "relay"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    relay: Path,
    authority: Authority,
) -> Iterator[Pair]:
    """Two hosts with a container each and a link between their relays. Each scenario restores that
    state.
    """
    network = a_network()
    top = tmp_path_factory.mktemp("hosts")
    with lab(2, ipv6_underlay=request.param == "relay") as made:
        boxes = [host.container(network, number) for number, host in enumerate(made.hosts, 1)]
        made.mesh(network)
        routers = []
        for host, other, box in zip(made.hosts, reversed(made.hosts), boxes, strict=True):
            folder = top / f"host{host.number}"
            folder.mkdir()
            write(folder / "swarm", authority.root, authority.node(f"node{host.number}"))
            routers.append(Router(host, other, box, folder, relay, path=request.param))
        try:
            for router in routers:
                router.start()
            with listen(boxes[1].namespace, "0.0.0.0") as listener:
                both = Pair(made, routers[0], routers[1], listener)
                wait_until("a link", both.linked, 30)
                yield both
        finally:
            for router in routers:
                if router.process is not None:
                    router.kill()


def test_a_connection_between_hosts(pair: Pair) -> None:
    """Both ends of a connection get memory of their own host, which both relays know; after it is
    closed nothing is left.
    """
    with (
        contextlib.closing(pair.one.process_inside()) as a,
        contextlib.closing(pair.other.process_inside()) as b,
    ):
        client, server = pair.connection()
        with client, server:
            a.ask(client)
            b.ask(server)
            (grant, memory), (answer, other) = a.hear(wire.Grant), b.hear(wire.Grant)
            assert memory is not None
            assert other is not None
            assert os.fstat(memory).st_ino != os.fstat(other).st_ino
            assert (grant.side, answer.side) == (0, 0)
            wait_until("it", lambda: pair.connections() == [1, 1], 10)
            listed = pair.one.client.connections().connections
            assert [each.path for each in listed if each.path != "overlay"] == [pair.one.path]
    pair.nothing_left()


@pytest.fixture
def kept(pair: Pair) -> Iterator[tuple[Library, Library]]:
    """A paired connection, which must not be affected by what happens."""
    before = [router.counts().broken for router in (pair.one, pair.other)]
    a, b = pair.one.process_inside(), pair.other.process_inside()
    client, server = pair.connection()
    with contextlib.closing(a), contextlib.closing(b), client, server:
        a.ask(client)
        b.ask(server)
        a.hear(wire.Grant)
        b.hear(wire.Grant)
        yield a, b
        wait_until("it to be the only one", lambda: pair.connections() == [1, 1], 20)
        assert [router.counts().broken for router in (pair.one, pair.other)] == before
    pair.nothing_left()


def test_a_lost_session(pair: Pair, kept: tuple[Library, Library]) -> None:
    """While the routers have no session, new connections stay on TCP and old ones keep their path;
    afterwards new ones are paired again.
    """
    a, b = kept
    later, accepted = pair.connection()
    pair.lab.link(pair.one.host, "down")
    wait_until(
        "both to miss it",
        lambda: not any(each.session for r in (pair.one, pair.other) for each in r.rdma().hosts),
        20,
    )
    a.ask(later)
    b.ask(accepted)
    a.hear(wire.Refuse)
    b.hear(wire.Refuse)
    pair.lab.link(pair.one.host, "up")
    wait_until("the link", pair.linked, 30)
    for end in (later, accepted):
        end.close()
    assert pair.granted()


def test_a_renewed_certificate(
    pair: Pair, authority: Authority, kept: tuple[Library, Library]
) -> None:
    """A renewed certificate replaces the sessions and has no other effect."""
    routers = (pair.one, pair.other)

    def sessions() -> list[int]:
        return [(router.folder / "log").read_text().count('"session up"') for router in routers]

    before = sessions()
    write(pair.one.folder / "swarm", authority.root, authority.node("node1", "swarm-manager"))
    wait_until("new sessions", lambda: sessions() == [each + 1 for each in before], 20)
    wait_until("the link", pair.linked, 20)
    assert pair.granted()


def test_a_secret(pair: Pair) -> None:
    """A secret in place of certificates gives the hosts new node IDs; they soon pair connections
    again.
    """
    for router in (pair.one, pair.other):
        router.settings = RouterSettings(session_port=PORT, session_key="s" * 32)
        router.client.replace_snapshot(router.facts())
    nodes = ("node1", "node2")

    def others() -> bool:
        return not any(
            each.node in nodes for r in (pair.one, pair.other) for each in r.rdma().hosts
        )

    wait_until("the other nodes", lambda: others() and pair.linked(), 30)
    assert pair.granted()


@pytest.mark.parametrize("dies", ["one", "other"])
def test_a_killed_router(pair: Pair, dies: str) -> None:
    """A killed and restarted router is a new one to its peer; connections are soon paired again."""
    assert pair.granted()
    killed: Router = getattr(pair, dies)
    killed.kill()
    killed.start()
    wait_until("the link", pair.linked, 45)
    wait_until("a connection", pair.granted, 20)
