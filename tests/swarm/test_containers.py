"""Containers on attachable networks: addresses, several networks, connect and disconnect,
isolation, published ports.
"""

from __future__ import annotations

import json
import time
from functools import partial

import pytest

from testbed import Bed, CommandError, Host, wait_until
from testbed.patience import within
from tests.swarm.conftest import address, logged, make_network, run_container, unique


def _reaches(host: Host, container: str, target: str, *options: str) -> bool:
    return " 0% packet loss" in host.exec(
        container, "ping", "-c2", "-i0.2", "-W1", *options, target, check=False
    )


def test_containers_of_all_engines_reach_each_other(bed: Bed, manager: Host) -> None:
    """Every container reaches every other one by name and address, on all engines."""
    network = make_network(manager)
    boxes = [(host, run_container(host, network)) for host in bed.hosts]
    addresses = [address(host, box, network) for host, box in boxes]
    for host, box in boxes:
        for (_, other), target in zip(boxes, addresses, strict=True):
            wait_until(
                f"{host.engine} to reach {other}",
                lambda h=host, b=box, t=target: _reaches(h, b, t),  # type: ignore[misc]
                15,
            )
            if other != box:
                wait_until(
                    f"{other} by name from {host.engine}",
                    lambda h=host, b=box, o=other: _reaches(h, b, o),  # type: ignore[misc]
                    15,
                )


def test_addresses_as_asked_for(manager: Host) -> None:
    """--subnet, --gateway, --ip and --mac-address are honoured, and inspect shows them."""
    network = make_network(manager, "--subnet", "10.77.0.0/24", "--gateway", "10.77.0.254")
    box = run_container(
        manager, network, "--ip", "10.77.0.99", "--mac-address", "02:42:aa:bb:cc:dd"
    )
    assert address(manager, box, network) == "10.77.0.99"
    link = json.loads(manager.exec(box, "ip", "-j", "addr", "show", "eth0"))[0]
    assert link["address"] == "02:42:aa:bb:cc:dd"
    assert link["addr_info"][0]["local"] == "10.77.0.99"
    endpoint = manager.inspect("inspect", box)["NetworkSettings"]["Networks"][network]
    assert endpoint["MacAddress"] == "02:42:aa:bb:cc:dd"


def test_inspect_shows_the_derived_mac_address(manager: Host) -> None:
    """docker inspect shows the driver's MAC address (TestDockerNetworkMacInspect)."""
    network = make_network(manager)
    box = run_container(manager, network)
    endpoint = manager.inspect("inspect", box)["NetworkSettings"]["Networks"][network]
    assert endpoint["MacAddress"].startswith("02:42:")
    assert manager.exec(box, "cat", "/sys/class/net/eth0/address").strip() == endpoint["MacAddress"]


def test_several_subnets_of_one_network(bed: Bed, manager: Host) -> None:
    """Containers in different subnets of one network reach each other."""
    network = make_network(manager, "--subnet", "10.78.1.0/24", "--subnet", "10.78.2.0/24")
    first = run_container(manager, network, "--ip", "10.78.1.10")
    second = run_container(bed.hosts[1], network, "--ip", "10.78.2.10")
    wait_until("the other subnet", lambda: _reaches(manager, first, "10.78.2.10"), 15)
    assert _reaches(bed.hosts[1], second, "10.78.1.10")


def test_connect_and_disconnect_while_running(bed: Bed, manager: Host) -> None:
    """A running container joins a second network and leaves it again."""
    first, second = make_network(manager), make_network(manager)
    for host in bed.hosts[:3]:
        box = run_container(host, first)
        other = run_container(manager, second)
        host.docker("network", "connect", second, box)
        target = address(manager, other, second)
        wait_until("the second network", lambda h=host, b=box, t=target: _reaches(h, b, t), 15)  # type: ignore[misc]
        host.docker("network", "disconnect", second, box)
        assert not _reaches(host, box, target)
        links = json.loads(host.exec(box, "ip", "-j", "-4", "addr"))
        assert second not in host.inspect("inspect", box)["NetworkSettings"]["Networks"]
        assert len([link for link in links if link["ifname"] != "lo"]) == 2


def test_networks_are_apart(bed: Bed, manager: Host) -> None:
    """Containers of different networks do not reach each other, even with the other's route added
    by hand.
    """
    first, second = make_network(manager), make_network(manager)
    box = run_container(manager, first, "--cap-add", "NET_ADMIN")
    target = address(manager, run_container(manager, second), second)
    manager.exec(box, "ip", "route", "add", target, "dev", "eth0")
    assert not _reaches(manager, box, target)


def test_internal_network_has_no_way_out(bed: Bed, manager: Host) -> None:
    """--internal: containers reach each other and nothing else."""
    network = make_network(manager, "--internal")
    one = run_container(manager, network)
    two = run_container(bed.hosts[1], network)
    target = address(bed.hosts[1], two, network)
    wait_until("the other", lambda: _reaches(manager, one, target), 15)
    assert "default" not in manager.exec(one, "ip", "route")
    assert not _reaches(manager, one, str(bed.hosts[2].address))


def test_egress_and_published_ports(bed: Bed, manager: Host) -> None:
    """A container on a normal network reaches the outside, and its published ports are reachable
    from there.
    """
    network = make_network(manager)
    server = "echo served > /var/www/html/index.html; exec nginx -g 'daemon off;'"
    box = run_container(manager, network, "-p", "8088:80", command=server)
    assert _reaches(manager, box, str(bed.hosts[1].address))
    client = run_container(bed.hosts[1], network)
    url = f"http://{manager.address}:8088/"
    served = wait_until(
        "the published port",
        lambda: bed.hosts[1].exec(client, "curl", "-s", "-m", "5", url, check=False),
    )
    assert served.strip() == "served"


def test_names_that_look_like_ids(manager: Host) -> None:
    """A network whose name is the beginning of another's ID is not confused with it
    (TestSwarmNetworkCreateIssue27866).
    """
    first = make_network(manager)
    identifier = manager.docker("network", "inspect", "-f", "{{.Id}}", first).strip()
    manager.docker("network", "create", "-d", "freeflow:latest", "--attachable", identifier[:2])
    assert manager.docker("network", "inspect", "-f", "{{.Name}}", first).strip() == first
    manager.docker("network", "rm", identifier[:2])


def test_a_name_is_given_once(manager: Host) -> None:
    """Docker refuses a second network of the same name (TestSwarmNetworkCreateDup)."""
    network = make_network(manager)
    with pytest.raises(CommandError):
        manager.docker("network", "create", "-d", "freeflow:latest", network)


def test_attach_by_network_id(bed: Bed, manager: Host) -> None:
    """A container attaches by the network's ID (TestSwarmContainerAttachByNetworkId)."""
    network = make_network(manager)
    identifier = manager.docker("network", "inspect", "-f", "{{.Id}}", network).strip()
    box = run_container(bed.hosts[1], identifier)
    assert address(bed.hosts[1], box, network)


def _knows(host: Host, network: str, peer: Host) -> bool:
    """Whether an engine lists a host as a peer of a network."""
    peers = host.inspect("network", "inspect", network).get("Peers") or ()
    return any(each["IP"] == str(peer.address) for each in peers)


def test_the_same_address_again_after_a_container_moved(bed: Bed, manager: Host) -> None:
    """An address that moves to another host is reachable there as soon as Docker's gossip has told
    of the new host, because the move is announced: whether its former host stays on the network
    (the first) or leaves it.
    """
    network = make_network(manager, "--subnet", "10.79.0.0/24")
    client = run_container(manager, network)
    run_container(bed.hosts[1], network)
    for host in (*bed.hosts[1:], bed.hosts[1]):
        name = run_container(host, network, "--ip", "10.79.0.50", "--hostname", unique("moved"))
        begin = time.monotonic()
        # Docker repeats lost gossip after up to 30 s.
        wait_until(f"gossip of {host.name}", partial(_knows, manager, network, host), 40)
        gossip = time.monotonic() - begin
        wait_until(f"the address on {host.name}", lambda: _reaches(manager, client, "10.79.0.50"))
        # An announcement comes at the latest after twice the time that the gossip took.
        assert time.monotonic() - begin < 2 * gossip + within(5)
        host.docker("rm", "-f", name)


def test_options_of_a_network(manager: Host) -> None:
    """-o mtu and vni apply on every host; docker network inspect shows the manager's choices."""
    network = make_network(manager, "-o", "mtu=1400", "-o", "vni=4242", "-o", "acceleration=off")
    options = manager.inspect("network", "inspect", network)["Options"]
    assert options["freeflow.vni"] == "4242"
    assert options["mtu"] == "1400"
    box = run_container(manager, network)
    assert manager.exec(box, "cat", "/sys/class/net/eth0/mtu").strip() == "1400"


def test_an_unknown_option_is_refused_by_name(bed: Bed, manager: Host) -> None:
    """An unknown -o leaves the network without a driver, and the leader's log names option and
    remedy.
    """
    name = unique("bad")
    manager.docker(
        "network", "create", "-d", "freeflow:latest", "-o", "mtuu=9000", name, check=False
    )
    wait_until("the refusal in the log", lambda: logged(bed, "unknown option mtuu"), 10)
    manager.docker("network", "rm", name, check=False)


def test_spoofed_frames_are_dropped_and_counted(bed: Bed, manager: Host) -> None:
    """A container that takes another address cannot send from it, and status says so."""
    network = make_network(manager, "--subnet", "10.80.0.0/24")
    honest = run_container(bed.hosts[1], network, "--ip", "10.80.0.10")
    liar = run_container(manager, network, "--ip", "10.80.0.20", "--cap-add", "NET_ADMIN")
    wait_until("the honest way", lambda: _reaches(manager, liar, "10.80.0.10"), 15)
    manager.exec(liar, "ip", "addr", "add", "10.80.0.66/24", "dev", "eth0")
    assert not _reaches(manager, liar, "10.80.0.10", "-I", "10.80.0.66")

    def told() -> bool:
        problems = manager.status()["problems"]
        return any(liar in each["what"] and "dropped" in each["what"] for each in problems)

    wait_until("the dropped frames in status", told, 10)
    assert honest
