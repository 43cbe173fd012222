"""Containers of another driver's network that want more than the network gives them.

The real router, in the namespace of a bridge, is asked for shared memory between ends that are no
connection.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

from dataplane.control import RouterSettings, Rule
from dataplane.router import library_wire as wire
from testbed.namespace_bed import TRACKING, BedContainer, NamespaceBed, bed
from testbed.process import wait_until
from tests.dataplane.library import Library, dial, listen

PORT: Final = 7700
CLIENT_PORT: Final = 40000
_TCP_REPAIR: Final = 19
_OFF_WITHOUT_A_PROBE: Final = -1


@pytest.fixture
def made() -> Iterator[NamespaceBed]:
    """Three containers on a bridge whose packets pass the host's rules."""
    if not Path("/proc/sys/net/bridge").exists():
        pytest.skip("needs br_netfilter")
    with bed(
        *("a", "b", "c"), settings=RouterSettings(rule=Rule(operations=2, age=0)), bridged=True
    ) as made:
        netfilter(made, on=True)
        nft(made, TRACKING)
        yield made


def netfilter(made: NamespaceBed, *, on: bool) -> None:
    setting = f"net.bridge.bridge-nf-call-iptables={int(on)}"
    made.on_host(lambda: subprocess.run(["sysctl", "-qw", setting], check=True))


def nft(made: NamespaceBed, rules: str) -> None:
    made.on_host(lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True))


def process(made: NamespaceBed, container: str) -> Library:
    library = Library.connect(made.shared / "router.sock", made.containers[container].namespace)
    library.hear(wire.Welcome)
    return library


def forge(
    container: BedContainer, local: tuple[IPv4Address, int], remote: tuple[IPv4Address, int]
) -> socket.socket:
    """A connected socket that has never sent a packet (CAP_NET_ADMIN; `man 7 tcp_repair` of
    CRIU)."""

    def make() -> socket.socket:
        tcp = socket.socket()
        tcp.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind((str(local[0]), local[1]))
        tcp.connect((str(remote[0]), remote[1]))
        tcp.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _OFF_WITHOUT_A_PROBE)
        return tcp

    return container.do(make)


def forged_pair(made: NamespaceBed) -> list[tuple[Library, socket.socket]]:
    """Processes of a and b, each with a socket that claims to be connected with the other's."""
    a, b = made.containers["a"], made.containers["b"]
    ends = (a.ipv4, CLIENT_PORT), (b.ipv4, PORT)
    # The kernel may still have half a connection from before.
    far = wait_until("b's address to be free", lambda: forge(b, *reversed(ends)))
    return [(process(made, "a"), forge(a, *ends)), (process(made, "b"), far)]


def address(container: BedContainer, verb: str, ip: IPv4Address) -> None:
    container.run(["ip", "address", verb, f"{ip}/24", "dev", "eth0"], accelerated=False)


def test_two_containers_that_a_rule_keeps_apart(made: NamespaceBed) -> None:
    """Two containers that a rule of the host keeps apart get no shared memory by sockets that both
    have forged; without netfilter on the bridge, so without such rules, they would.
    """
    nft(made, "add rule inet tracking forward drop")
    forged = forged_pair(made)
    for library, tcp in forged:
        library.ask(tcp)
    for library, _ in forged:
        refused, _ = library.hear(wire.Refuse)
        assert not refused.passes
    netfilter(made, on=False)
    for library, tcp in forged:
        library.ask(tcp)
    for library, _ in forged:
        library.hear(wire.Grant)


def test_rules_that_drop_the_answers(made: NamespaceBed) -> None:
    """Nor do two containers of which the firewall lets one reach the other, without answers, and
    whose sockets are forged after the first packet.
    """
    a, b, _ = made.containers.values()
    nft(made, f"insert rule inet tracking forward ip saddr {b.ipv4} drop")
    listener = listen(b.namespace, "0.0.0.0")
    client = a.do(socket.socket)
    client.settimeout(0.3)
    client.bind((str(a.ipv4), CLIENT_PORT))
    with pytest.raises(TimeoutError):
        client.connect((str(b.ipv4), PORT))
    client.close()
    listener.close()
    forged = forged_pair(made)
    for library, tcp in forged:
        library.ask(tcp)
    for library, _ in forged:
        refused, _ = library.hear(wire.Refuse)
        assert not refused.passes


def test_rules_that_nothing_tracks(made: NamespaceBed) -> None:
    """A container that rewrites its own packets without connection tracking, as a load balancer in
    it may, is joined neither with the container whose address its socket has, nor with the one that
    it talks to.
    """
    a, b, c = made.containers.values()
    rules = f"""
        table ip own {{
            chain output {{
                type filter hook output priority -400
                ip daddr {b.ipv4} tcp dport {PORT} notrack ip daddr set {c.ipv4}
            }}
            chain prerouting {{
                type filter hook prerouting priority -400
                ip saddr {c.ipv4} tcp sport {PORT} notrack ip saddr set {b.ipv4}
            }}
        }}
    """
    a.do(lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True))
    listener = listen(c.namespace, "0.0.0.0")
    client = dial(a.namespace, str(b.ipv4))
    accepted, _ = listener.accept()
    one, forger, server = (process(made, name) for name in "abc")
    one.ask(client)
    server.ask(accepted)
    assert one.silent()
    assert server.silent()
    forger.ask(forge(b, (b.ipv4, PORT), (a.ipv4, client.getsockname()[1])))
    refused, _ = one.hear(wire.Refuse)
    assert not refused.passes
    assert server.silent()


def test_an_address_of_another_container(made: NamespaceBed) -> None:
    """A container that takes another one's address, and has sockets with it, gets nothing by
    them, and the other one gets its connection.
    """
    a, b, c = made.containers.values()
    listener = listen(b.namespace, "0.0.0.0")
    thief, owner, server = (process(made, name) for name in "cab")
    client = dial(a.namespace, str(b.ipv4))
    accepted, _ = listener.accept()
    address(c, "add", a.ipv4)
    stolen = forge(c, (a.ipv4, client.getsockname()[1]), (b.ipv4, b_port(client)))
    thief.ask(stolen)
    thief.hear(wire.Refuse)
    server.ask(accepted)
    owner.ask(client)
    mine, _ = owner.hear(wire.Grant)
    other, _ = server.hear(wire.Grant)
    assert mine.incarnation == other.incarnation
    assert thief.silent()


def b_port(client: socket.socket) -> int:
    return int(client.getpeername()[1])


def test_one_address_on_two_bridges(made: NamespaceBed) -> None:
    """A container with the same address on another network is nobody's peer on this one, whoever
    asks first.
    """
    a, b, c = made.containers.values()
    # Another bridge, on which c is alone.
    made.on_host(
        lambda: subprocess.run(["ip", "link", "set", f"v{c.number}", "nomaster"], check=True)
    )
    address(c, "del", c.ipv4)
    address(c, "add", b.ipv4)
    facts = made.facts()
    other = replace(facts.networks[0], id="n2")
    moved = tuple(
        replace(each, network="n2", addresses=(str(b.ipv4),)) if each.container == "c" else each
        for each in facts.endpoints
    )
    made.router.replace_snapshot(replace(facts, networks=(*facts.networks, other), endpoints=moved))
    listener = listen(b.namespace, "0.0.0.0")
    client = dial(a.namespace, str(b.ipv4))
    accepted, _ = listener.accept()
    stranger, one, server = (process(made, name) for name in "cab")
    port = client.getsockname()[1]
    stranger.ask(forge(c, (b.ipv4, b_port(client)), (a.ipv4, port)))
    one.ask(client)
    assert one.silent()
    server.ask(accepted)
    mine, _ = one.hear(wire.Grant)
    answer, _ = server.hear(wire.Grant)
    assert mine.incarnation == answer.incarnation


def test_the_number_of_a_namespace_that_has_gone(made: NamespaceBed) -> None:
    """A container whose namespace got the number of one that has gone is not taken for that one's
    container, though it has its address; both ends may ask again, and are paired when the driver
    says who it is.
    """
    _, b, c = made.containers.values()
    listener = listen(b.namespace, "0.0.0.0")
    client = dial(c.namespace, str(b.ipv4))
    accepted, _ = listener.accept()
    facts = made.facts()
    stale = tuple(
        replace(each, path="/run/docker/netns/gone") if each.container == "c" else each
        for each in facts.endpoints
    )
    made.learn(endpoints=stale)
    newcomer, server = process(made, "c"), process(made, "b")
    newcomer.ask(client)
    server.ask(accepted)
    for library in (newcomer, server):
        refused, _ = library.hear(wire.Refuse)
        assert refused.passes
    made.learn()
    newcomer.ask(client)
    server.ask(accepted)
    mine, _ = newcomer.hear(wire.Grant)
    other, _ = server.hear(wire.Grant)
    assert mine.incarnation == other.incarnation


def again(made: NamespaceBed, *names: str) -> dict[str, Any]:
    """Facts with the same subnet on a network that was made again, with these containers on it."""
    facts = made.facts()
    return {
        "networks": tuple(replace(each, id="n9") for each in facts.networks),
        "endpoints": tuple(
            replace(each, id=f"{each.id}9", network="n9")
            for each in facts.endpoints
            if each.container in names
        ),
    }


def test_a_network_that_is_made_again(made: NamespaceBed) -> None:
    """With a network that is removed its connections leave shared memory; one with the same subnet
    has nothing to do with it, and pairs its own.
    """
    a, b, _ = made.containers.values()
    listener = listen(b.namespace, "0.0.0.0")
    one, server = process(made, "a"), process(made, "b")
    client = dial(a.namespace, str(b.ipv4))
    accepted, _ = listener.accept()
    one.ask(client)
    assert one.silent()
    made.learn(networks=(), endpoints=())
    one.hear(wire.Welcome)
    one.hear(wire.Refuse)
    made.learn(**again(made, "a"))
    one.hear(wire.Welcome)
    one.ask(client)
    refused, _ = one.hear(wire.Refuse)
    assert refused.passes
    made.learn(**again(made, "a", "b"))
    one.ask(client)
    server.ask(accepted)
    mine, _ = one.hear(wire.Grant)
    assert server.hear_all()
    assert mine.slot >= 0


def test_rules_within_a_container(made: NamespaceBed) -> None:
    """A connection that a container's own rules lead to another one isn't paired with that whose
    address its socket has, though that one has forged the other end.
    """
    a, b, c = made.containers.values()
    rules = f"""
        table ip own {{
            chain output {{
                type nat hook output priority -100
                ip daddr {b.ipv4} tcp dport {PORT} dnat to {c.ipv4}
            }}
        }}
    """
    a.do(lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True))
    listener = c.do(lambda: socket.create_server(("0.0.0.0", PORT)))
    client = a.do(lambda: socket.create_connection((str(b.ipv4), PORT), 5))
    accepted, _ = listener.accept()
    one, forger, server = (process(made, name) for name in "abc")
    port = client.getsockname()[1]
    forger.ask(forge(b, (b.ipv4, PORT), (a.ipv4, port)))
    one.ask(client)
    refused, _ = one.hear(wire.Refuse)
    assert not refused.passes
    server.ask(accepted)
    assert server.silent()
