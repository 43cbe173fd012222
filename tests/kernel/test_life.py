"""The life of kernel objects: attach, detach, repetition, cleanup, survival of the plugin."""

from __future__ import annotations

import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from driver import names
from driver.errors import KernelError
from testbed.kernel_hosts import RUN, KernelHost, Lab, a_network, an_endpoint, eventually

TOP = Path(__file__).resolve().parents[2]


def _left(host: KernelHost) -> dict[str, object]:
    """Everything that a plugin could leave on a host: links, rules, forwarding entries, files,
    mounts."""

    def links() -> list[str]:
        with IPRoute() as route:
            return sorted(str(link.get_attr("IFLA_IFNAME")) for link in route.get_links())

    def files() -> list[str]:
        return sorted(str(path) for path in RUN.rglob("*"))

    def mounts() -> list[str]:
        lines = Path("/proc/thread-self/mountinfo").read_text().splitlines()
        return sorted(line.split()[4] for line in lines)

    return {
        "links": host.do(links),
        "rules": host.run("nft", "list", "ruleset"),
        "files": host.do(files),
        "mounts": host.do(mounts),
    }


def _overlay_links(host: KernelHost) -> list[str]:
    listed = json.loads(host.in_overlay("ip", "-j", "link"))
    return sorted(link["ifname"] for link in listed if link["ifname"] != "lo")


def test_attach_makes_the_parts_and_detach_leaves_none(two: Lab) -> None:
    """The first endpoint makes bridge, VXLAN device, veth pair and filter; nothing is left after
    detach, removal and cleanup."""
    host = two.hosts[0]
    before = _left(host)
    network = a_network()
    endpoint = an_endpoint(network, 2)
    host.do(lambda: host.kernel.attach(network, endpoint))
    host.set_peers(network, two.hosts[1])
    expected = [f(network.id) for f in (names.bridge, names.vxlan)] + [names.host_veth(endpoint.id)]
    assert _overlay_links(host) == sorted(expected)
    assert names.container_veth(endpoint.id) in str(_left(host)["links"])
    assert str(two.hosts[1].address) in host.in_overlay("bridge", "fdb", "show")

    host.do(lambda: host.kernel.detach(network.id, endpoint.id))
    assert _overlay_links(host) == sorted(expected[:2])
    assert names.host_veth(endpoint.id) not in host.in_overlay("nft", "list", "ruleset")
    host.do(lambda: host.kernel.remove_network(network.id))
    assert _overlay_links(host) == []
    assert "dst" not in host.in_overlay("bridge", "fdb", "show")
    inventory = host.do(host.kernel.inventory)
    assert (inventory.networks, inventory.endpoints, inventory.filters) == (frozenset(),) * 3

    host.do(host.kernel.cleanup)
    after = _left(host)
    # The directory is the administration socket's too.
    assert [path for path in after.pop("files") if path != "/run/freeflow-admin"] == before.pop(  # type: ignore[attr-defined]
        "files"
    )
    assert after == before


def test_cleanup_of_a_host_in_use_leaves_nothing(two: Lab) -> None:
    """Cleanup with networks, peers and running containers leaves nothing, not even the overlay
    namespace."""
    host = two.hosts[0]
    before = _left(host)
    containers = [host.container(a_network(number), 2 + number) for number in range(3)]
    for container in containers:
        host.set_peers(container.network, two.hosts[1])

    def witness() -> None:
        overlay = os.open(RUN / "freeflow-admin/netns/overlay", os.O_RDONLY)
        with IPRoute() as route:
            route.link("add", ifname="w0", kind="veth", peer={"ifname": "w1", "net_ns_fd": overlay})
        os.close(overlay)

    host.do(witness)
    removed = host.do(host.kernel.cleanup)
    assert {names.bridge(item.network.id) for item in containers} <= set(removed)
    # A veth goes with the namespace of its other end.
    eventually("the overlay namespace to go", lambda: "w0" not in str(_left(host)["links"]))
    after = _left(host)
    assert (after["links"], after["rules"], after["mounts"]) == (
        before["links"],
        before["rules"],
        before["mounts"],
    )
    for container in containers:
        assert "eth0" not in container.run("ip", "link")


def test_repeated_calls_change_nothing(two: Lab) -> None:
    """Each call may be repeated: interfaces, entries and rules stay the same."""
    host, other = two.hosts
    network = a_network()
    box = host.container(network, 2)
    far = other.container(network, 3)
    two.mesh(network)
    assert box.pings(far.ipv4)

    def state() -> tuple[str, str, str]:
        links = json.loads(host.in_overlay("ip", "-j", "-d", "link"))
        kept = [{key: link.get(key) for key in ("ifindex", "ifname", "master")} for link in links]
        return (
            json.dumps(kept),
            host.in_overlay("bridge", "fdb", "show"),
            host.in_overlay("nft", "-s", "list", "ruleset"),
        )

    before = state()
    host.do(host.kernel.prepare)
    host.do(lambda: host.kernel.attach(network, box.endpoint))
    assert host.set_peers(network, other) == frozenset()
    assert state() == before
    assert box.pings(far.ipv4)
    for _ in range(2):
        host.do(lambda: host.kernel.detach(network.id, box.endpoint.id))
        host.do(lambda: host.kernel.remove_network(network.id))
        host.do(lambda: host.kernel.announce(network.id, [box.endpoint]))
        assert host.set_peers(network, other) == frozenset()
    for _ in range(2):
        host.do(host.kernel.cleanup)
    assert host.do(host.kernel.inventory).networks == frozenset()


def test_removal_of_what_never_was(one: Lab) -> None:
    """Removing unknown endpoints and networks succeeds, also without an overlay namespace."""
    host = one.hosts[0]
    network = a_network()
    before = _left(host)
    host.do(lambda: host.kernel.detach(network.id, an_endpoint(network, 2).id))
    host.do(lambda: host.kernel.remove_network(network.id))
    assert host.do(host.kernel.cleanup) == []
    assert host.do(host.kernel.spoofed) == {}
    assert _left(host) == before


def test_a_missing_part_is_made_again(two: Lab) -> None:
    """Whichever part of a network was removed, the next attach and set_peers restore its
    traffic."""
    host, other = two.hosts
    # The fast path doesn't need these links.
    host.without_fast_path()
    network = a_network()
    box, far = host.container(network, 2), other.container(network, 3)
    two.mesh(network)
    for link in (names.vxlan(network.id), names.bridge(network.id)):
        host.in_overlay("ip", "link", "del", link)
        assert not box.echoes(far.ipv4, tries=1)
        host.do(lambda: host.kernel.attach(network, box.endpoint))
        host.set_peers(network, other)
        assert box.echoes(far.ipv4), link
    host.in_overlay("nft", "flush", "ruleset")
    host.do(lambda: host.kernel.attach(network, box.endpoint))
    assert names.host_veth(box.endpoint.id) in host.in_overlay("nft", "list", "ruleset")
    host.in_overlay("ip", "link", "set", names.host_veth(box.endpoint.id), "nomaster", "down")
    host.do(lambda: host.kernel.attach(network, box.endpoint))
    assert box.echoes(far.ipv4)


_FIRST = """
import os, signal, sys, time
from ipaddress import ip_address
from pathlib import Path
from driver.kernel.linux import LinuxKernel
from testbed.kernel_hosts import a_network, an_endpoint
network = a_network()
kernel = LinuxKernel(Path("/run"), hint=lambda: ip_address(sys.argv[1]))
kernel.attach(network, an_endpoint(network, 2))
kernel.set_peers(network.id, [ip_address(sys.argv[2])])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_made_lives_on(two: Lab) -> None:
    """The overlay namespace and its content outlive the process that made them; the next process
    uses them."""
    host, other = two.hosts
    network = a_network()
    addresses = (str(host.address), str(other.address))
    host.run(
        *("env", f"PYTHONPATH={TOP}", sys.executable, "-c", _FIRST, *addresses),
        check=False,
    )
    inventory = host.do(host.kernel.inventory)
    endpoint = an_endpoint(network, 2)
    assert inventory.endpoints == {names.short(endpoint.id)}
    assert inventory.networks == {names.short(network.id)}
    listed = host.in_overlay("ip", "-br", "link")
    box = host.container(network, 2)
    assert host.in_overlay("ip", "-br", "link").splitlines()[:-1] == listed.splitlines()[:-1]
    far = other.container(network, 3)
    other.set_peers(network, host)
    # The flood list is the first process's.
    assert box.pings(far.ipv4)
    second = host.new_kernel()
    host.do(second.prepare)
    assert host.do(second.inventory) == inventory
    assert host.do(lambda: second.set_peers(network.id, [other.address])) == frozenset()
    host.do(lambda: second.detach(network.id, endpoint.id))
    assert host.do(host.kernel.inventory).endpoints == frozenset()


def test_a_run_that_is_not_shared_is_refused(one: Lab) -> None:
    """Where a pin would go with the plugin, none is made, and the error has the command to type."""
    host = one.hosts[0]
    host.run("mount", "--make-private", str(RUN))
    with pytest.raises(KernelError, match="mount --make-rshared /run"):
        host.do(host.kernel.prepare)
    assert not host.do(lambda: (RUN / "freeflow-admin").exists())
    host.run("mount", "--make-shared", str(RUN))
    host.do(host.kernel.prepare)


def test_the_overlay_namespace_is_layer_two_only(one: Lab) -> None:
    """Nothing in the overlay namespace has an address, forwards packets, or passes bridged frames
    to iptables."""
    host = one.hosts[0]
    host.container(a_network(), 2)
    addresses = json.loads(host.in_overlay("ip", "-j", "addr"))
    assert all(not link.get("addr_info") for link in addresses)
    assert host.in_overlay("sysctl", "-n", "net.ipv4.ip_forward").strip() == "0"
    bridged = host.in_overlay(
        "sh", "-c", "cat /proc/sys/net/bridge/bridge-nf-call-* 2>/dev/null || :"
    )
    assert set(bridged.split()) <= {"0"}


def test_a_vni_that_another_device_has_is_named(one: Lab) -> None:
    """If another VXLAN device has the VNI and port, the error names it and the remedy, and nothing
    is left."""
    host = one.hosts[0]
    network = a_network(vni=77)
    host.run(
        *("ip", "link", "add", "theirs", "type", "vxlan", "id", "77"),
        *("dstport", str(network.port), "local", str(host.address)),
    )
    host.run("ip", "link", "set", "theirs", "up")
    with pytest.raises(KernelError, match="theirs") as caught:
        host.do(lambda: host.kernel.attach(network, an_endpoint(network, 2)))
    assert "-o vni=" in str(caught.value)
    assert "VNI 77" in str(caught.value)
    host.do(lambda: host.kernel.detach(network.id, an_endpoint(network, 2).id))
    host.do(lambda: host.kernel.remove_network(network.id))
    assert _overlay_links(host) == []
    host.run("ip", "link", "del", "theirs")
    host.container(network, 2)


def test_a_port_that_a_program_has_is_named(one: Lab) -> None:
    """If a program has our UDP port, the error names the port and the setting."""
    host = one.hosts[0]
    network = a_network()

    def bind() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("0.0.0.0", network.port))
        return made

    with host.do(bind), pytest.raises(KernelError, match=f"UDP port {network.port}.*VXLAN_PORT="):
        host.do(lambda: host.kernel.attach(network, an_endpoint(network, 2)))
    host.container(network, 2)


def test_a_foreign_device_under_our_name_is_named(one: Lab) -> None:
    """If another kind of device has our bridge's name, the error names it."""
    host = one.hosts[0]
    host.do(host.kernel.prepare)
    network = a_network()
    name = names.bridge(network.id)
    host.in_overlay("ip", "link", "add", name, "type", "veth")
    with pytest.raises(KernelError, match=name) as caught:
        host.do(lambda: host.kernel.attach(network, an_endpoint(network, 2)))
    assert "veth" in str(caught.value)
    host.in_overlay("ip", "link", "del", name)
    host.container(network, 2)


def test_a_foreign_device_under_a_veths_name_is_named(one: Lab) -> None:
    """If another kind of device has our veth's name, the error names it."""
    host = one.hosts[0]
    host.do(host.kernel.prepare)
    network = a_network()
    endpoint = an_endpoint(network, 2)
    name = names.host_veth(endpoint.id)
    host.in_overlay("ip", "link", "add", name, "type", "bridge")
    with pytest.raises(KernelError, match=name) as caught:
        host.do(lambda: host.kernel.attach(network, endpoint))
    assert "a bridge device" in str(caught.value)


def test_a_vxlan_device_with_other_properties_is_replaced(two: Lab) -> None:
    """After a change of VNI, port or own address, the device has the new properties."""
    host, other = two.hosts
    network = a_network()
    endpoint = an_endpoint(network, 2)
    host.do(lambda: host.kernel.attach(network, endpoint))
    changed = replace(network, vni=network.vni + 1)
    # A new process: the old one asks the kernel only what it doesn't know.
    host.kernel = host.new_kernel()
    near, far = host.container(changed, 3), other.container(changed, 4)
    two.mesh(changed)
    assert near.echoes(far.ipv4)


def test_two_hundred_endpoints_come_and_go(one: Lab) -> None:
    """Several threads make two hundred endpoints on one network, and remove them completely."""
    host = one.hosts[0]
    network = a_network()
    endpoints = [an_endpoint(network, number) for number in range(2, 202)]
    host.do(host.kernel.prepare)

    def each(action: str) -> None:
        def body() -> None:
            with ThreadPoolExecutor(8) as pool:
                method = getattr(host.kernel, action)
                if action == "attach":
                    list(pool.map(lambda item: method(network, item), endpoints))
                else:
                    list(pool.map(lambda item: method(network.id, item.id), endpoints))

        host.do(body)

    each("attach")
    inventory = host.do(host.kernel.inventory)
    assert inventory.endpoints == {names.short(item.id) for item in endpoints}
    assert len(host.do(host.kernel.links)) == len(endpoints) + 2
    each("detach")
    host.do(lambda: host.kernel.remove_network(network.id))
    assert _overlay_links(host) == []
    assert host.do(host.kernel.inventory).filters == frozenset()


def test_descriptors_are_not_leaked(one: Lab) -> None:
    """After many endpoints and queries the process has as many descriptors open as before."""
    host = one.hosts[0]
    network = a_network()

    def cycle() -> None:
        for number in range(2, 12):
            endpoint = an_endpoint(network, number)
            host.kernel.attach(network, endpoint)
            host.kernel.announce(network.id, [endpoint])
            host.kernel.inventory()
            host.kernel.spoofed()
            host.kernel.detach(network.id, endpoint.id)
        host.kernel.remove_network(network.id)

    host.do(cycle)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    host.do(cycle)
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
