"""IPv6 in a Swarm whose engines do not allocate it together: one address per container, by the same
rule on every host.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest

from testbed import Bed, Host, wait_until
from tests.swarm.conftest import (
    NGINX,
    address,
    logged,
    make_network,
    make_service,
    run_container,
)

PREFIX = IPv6Network("fd91::/64")

RECEIVE = """
import hashlib, socket
l = socket.create_server(("::", 7000), family=socket.AF_INET6)
while True:
    s, _ = l.accept(); h = hashlib.sha256()
    while d := s.recv(1 << 20): h.update(d)
    s.sendall(h.hexdigest().encode()); s.close()
"""
SEND = """
import hashlib, os, socket, sys
s = socket.create_connection((sys.argv[1], 7000), timeout=10)
h = hashlib.sha256()
for i in range(64):
    d = os.urandom(65536); h.update(d); s.sendall(d)
s.shutdown(socket.SHUT_WR)
print("same" if s.makefile().read() == h.hexdigest() else "different")
"""


def _preferred(host: Host, box: str) -> list[IPv6Address]:
    """The container's global IPv6 addresses that connections may use."""
    links = json.loads(host.exec(box, "ip", "-j", "-6", "addr", "show", "eth0"))
    return [
        IPv6Address(item["local"])
        for link in links
        for item in link.get("addr_info", ())
        if item.get("scope") == "global" and not item.get("deprecated")
    ]


def _derived(prefix: IPv6Network, ipv4: str) -> IPv6Address:
    return prefix[int(IPv4Address(ipv4))]


def _pings(host: Host, box: str, target: IPv6Address, *options: str) -> bool:
    command = ("ping", "-6", "-c1", "-W1", *options, str(target))
    return " 0% packet loss" in host.exec(box, *command, check=False)


def _prefix(host: Host, network: str) -> IPv6Network:
    options = host.inspect("network", "inspect", network)["Options"]
    return IPv6Network(options["freeflow.prefix6"])


def test_all_engines_reach_each_other(bed: Bed, manager: Host) -> None:
    """With -o ipv6=PREFIX every container has the prefix with its IPv4 address, docker inspect
    shows it, and every pair of engines exchanges pings and TCP data, checked by hash.
    """
    network = make_network(manager, "-o", f"ipv6={PREFIX}", "--subnet", "10.91.0.0/24")
    boxes = [
        (host, run_container(host, network, command=f"exec python3 -c '{RECEIVE}'"))
        for host in (*bed.hosts, manager)
    ]
    addresses = []
    for host, box in boxes:
        own = _derived(PREFIX, address(host, box, network))
        assert _preferred(host, box) == [own], host.engine
        endpoint = host.inspect("inspect", box)["NetworkSettings"]["Networks"][network]
        assert IPv6Address(endpoint["GlobalIPv6Address"]) == own, host.engine
        addresses.append(own)
    assert len(set(addresses)) == len(boxes)
    for host, box in boxes:
        for target in addresses:
            wait_until(
                f"{target} from {host.engine}",
                lambda h=host, b=box, t=target: _pings(h, b, t),  # type: ignore[misc]
                15,
            )
            sent = host.exec(box, "python3", "-c", SEND, str(target))
            assert sent.strip() == "same", (host.engine, target)


def test_the_networks_own_prefix(bed: Bed, manager: Host) -> None:
    """With -o ipv6=on the prefix is a unique local one, chosen once: tasks of a service have
    addresses in it on all hosts.
    """
    network = make_network(manager, "-o", "ipv6=on")
    service = make_service(manager, network, NGINX, replicas=8)
    prefix = _prefix(manager, network)
    assert prefix.subnet_of(IPv6Network("fd00::/8"))
    tasks = []
    for host in bed.hosts:
        for box in host.docker("ps", "-q", "-f", f"name={service}").split():
            own = _derived(prefix, address(host, box, network))
            assert _preferred(host, box) == [own], host.engine
            tasks.append((host, box, own))
    assert len({own for _, _, own in tasks}) == 8
    client = run_container(bed.hosts[2], network)
    for _, _, own in tasks:
        wait_until(f"{own}", lambda t=own: _pings(bed.hosts[2], client, t), 15)  # type: ignore[misc]
    # The VIP is IPv4 and continues to work.
    wait_until(
        "the VIP",
        lambda: bed.hosts[2].exec(client, "curl", "-s", "-m3", f"http://{service}/", check=False),
        20,
    )


def test_dockers_own_flag(bed: Bed, manager: Host) -> None:
    """With --ipv6, engines since 28 allocate addresses from a subnet of their own. The containers
    get the network's instead, keep no other, and reach each other.
    """
    network = make_network(manager, "--ipv6")
    prefix = _prefix(manager, network)
    hosts = [host for host in bed.hosts if host.engine.startswith("28")]
    assert len(hosts) > 1
    boxes = [(host, run_container(host, network)) for host in (*hosts, manager)]
    for host, box in boxes:
        own = _derived(prefix, address(host, box, network))
        wait_until(f"{own}", lambda h=host, b=box, o=own: _preferred(h, b) == [o], 5)  # type: ignore[misc]
        for other_host, other in boxes:
            target = _derived(prefix, address(other_host, other, network))
            wait_until(f"{target}", lambda h=host, b=box, t=target: _pings(h, b, t), 15)  # type: ignore[misc]

    def only_own() -> bool:
        listed = manager.exec(boxes[0][1], "ip", "-6", "addr", "show", "eth0", "scope", "global")
        return listed.count("inet6") == 1

    wait_until("the engine's address to go", only_own, 30, 1)
    # The engine's announcement of its own address is not reported as an attack.
    assert manager.status()["problems"] == []


def test_dockers_own_flag_with_a_restart(bed: Bed, manager: Host) -> None:
    """A container that is started again, and one whose plugin was killed while it started, have the
    address of the same rule.
    """
    network = make_network(manager, "--ipv6")
    prefix = _prefix(manager, network)
    box = run_container(manager, network)
    manager.docker("restart", "-t", "0", box)
    own = _derived(prefix, address(manager, box, network))
    wait_until("its address", lambda: _preferred(manager, box) == [own], 5)
    late = run_container(manager, network)
    manager.kill_plugin()
    own = _derived(prefix, address(manager, late, network))
    wait_until("its address after the kill", lambda: _preferred(manager, late) == [own], 40)
    assert _pings(manager, box, own)


def test_an_address_of_ones_own(bed: Bed, manager: Host) -> None:
    """driver-opt ip6: the container has that address, on every engine, and is reached there."""
    network = make_network(manager, "-o", f"ipv6={PREFIX}", "--subnet", "10.92.0.0/24")
    client = run_container(manager, network)
    for number, host in enumerate(bed.hosts, start=1):
        wanted = PREFIX.network_address + (1 << 32) + number
        box = run_container(host, f"name={network},driver-opt=ip6={wanted}")
        assert _preferred(host, box) == [wanted]
        wait_until(f"{wanted}", lambda t=wanted: _pings(manager, client, t), 15)  # type: ignore[misc]


def test_the_largest_packet(bed: Bed, manager: Host) -> None:
    """A packet of exactly the MTU passes over IPv6 between hosts; one byte more is not sent
    unfragmented.
    """
    network = make_network(manager, "-o", "ipv6=on")
    near, far = run_container(manager, network), run_container(bed.hosts[2], network)
    target = _derived(_prefix(manager, network), address(bed.hosts[2], far, network))
    wait_until("the other host", lambda: _pings(manager, near, target), 15)
    assert _pings(manager, near, target, "-M", "do", "-s", str(1450 - 48))
    assert not _pings(manager, near, target, "-M", "do", "-s", str(1450 - 47))


def test_an_address_that_moves(bed: Bed, manager: Host) -> None:
    """An address that moves to another host is reachable there at once."""
    network = make_network(manager, "-o", f"ipv6={PREFIX}", "--subnet", "10.94.0.0/24")
    client = run_container(manager, network)
    target = _derived(PREFIX, "10.94.0.50")
    for host in (*bed.hosts[1:], manager):
        box = run_container(host, network, "--ip", "10.94.0.50")
        wait_until(f"it on {host.name}", lambda: _pings(manager, client, target), 5)
        host.docker("rm", "-f", box)


def test_names_are_of_ipv4(bed: Bed, manager: Host) -> None:
    """Docker's DNS answers for a Swarm's network with IPv4 addresses only, and at once: no program
    waits for an AAAA record.
    """
    network = make_network(manager, "-o", "ipv6=on")
    for host in bed.hosts:
        box, other = run_container(host, network), run_container(bed.hosts[0], network)
        wait_until(
            "the name",
            lambda h=host, b=box, o=other: h.exec(b, "getent", "ahostsv4", o, check=False),  # type: ignore[misc]
            15,
        )
        listed = host.exec(box, "getent", "ahostsv6", other, check=False).split()
        assert not [item for item in listed if item.startswith("fd")]


@pytest.mark.parametrize("value", ["fd91::/48", "yes"])
def test_a_bad_prefix(bed: Bed, manager: Host, value: str) -> None:
    """An invalid -o ipv6 leaves the network unallocated; the leader's log shows a valid example."""
    name = f"bad-{value[:2]}-{len(value)}"
    manager.docker(
        *("network", "create", "-d", "freeflow:latest", "-o", f"ipv6={value}", name), check=False
    )
    wait_until("the refusal", lambda: logged(bed, f"option ipv6={value}"), 10)
    manager.docker("network", "rm", name, check=False)
