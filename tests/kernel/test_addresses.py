"""Exchanging the engine's IPv6 address for ours in a container's own namespace."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv6Interface
from pathlib import Path

from driver import names
from driver.kernel.addresses import LIFETIME, exchange
from testbed.kernel_hosts import (
    Container,
    KernelHost,
    Lab,
    a_network,
    an_endpoint,
    eventually,
    heard,
)
from tests.kernel.frames import ALL_NODES_MAC, IPV6, advertisement, ethernet, send

COUNTED = IPv6Interface("fd42:7::2/64")
FOREVER = 0xFFFFFFFF


def _counted(host: KernelHost, number: int) -> Container:
    """A container to which its engine gave fd42:7::2, whatever its own address is."""
    network = a_network()
    endpoint = replace(an_endpoint(network, number), engine_ipv6=COUNTED)
    box = Container(host, network, replace(endpoint, ipv6=COUNTED))
    host.containers.append(box)
    host.do(lambda: host.kernel.attach(network, endpoint))
    box.plug_in()
    box.serve()
    box.endpoint = endpoint
    return box


def _addresses(box: Container) -> dict[str, tuple[int, int]]:
    """The global addresses of eth0 with their preferred and valid lifetimes, in seconds."""
    listed = json.loads(box.run("ip", "-j", "-6", "addr", "show", "dev", "eth0", "scope", "global"))
    return {
        item["local"]: (item["preferred_life_time"], item["valid_life_time"])
        for link in listed
        for item in link.get("addr_info", ())
        if item  # what is filtered is listed as an empty one
    }


def _exchange(box: Container, lifetime: int = LIFETIME) -> bool:
    own = box.endpoint.ipv6
    assert isinstance(own, IPv6Interface)
    path = Path(f"/proc/self/fd/{box.namespace}")
    return exchange(path, box.endpoint.mac, COUNTED, own, lifetime)


def test_containers_with_the_same_counted_address_get_their_own(two: Lab) -> None:
    """Containers of two hosts with the same engine's address reach each other by their own; the
    engine's address stays deprecated for a while, and then goes without the subnet's route."""
    near, far = (_counted(host, 10 + n) for n, host in enumerate(two.hosts))
    two.mesh(near.network)
    assert list(_addresses(near)) == list(_addresses(far)) == ["fd42:7::2"]
    for box in (near, far):
        assert _exchange(box, lifetime=2)
        assert _addresses(box)[str(box.ipv6)] == (FOREVER, FOREVER)
        preferred, valid = _addresses(box)["fd42:7::2"]
        assert preferred == 0
        assert valid <= 2
    assert near.pings(far.ipv6)
    with near.udp(far.ipv6) as datagrams:
        assert datagrams.getsockname()[0] == str(near.ipv6)
    eventually("the counted address to go", lambda: list(_addresses(near)) == [str(near.ipv6)], 10)
    assert "expires" not in near.run("ip", "-6", "route", "show", "dev", "eth0")
    assert far.send(near.ipv6, b"by its own")
    assert near.send(far.ipv6, b"by its own")


def test_an_exchange_may_be_repeated(one: Lab) -> None:
    """A second exchange, by the next plugin process, succeeds at once, with or without the engine's
    address."""
    box = _counted(one.hosts[0], 9)
    assert _exchange(box)
    assert _exchange(box)
    box.run("ip", "addr", "del", str(COUNTED), "dev", "eth0")
    assert _exchange(box)
    assert list(_addresses(box)) == [str(box.ipv6)]


def test_nothing_is_exchanged_before_it_is_there(two: Lab, tmp_path: Path) -> None:
    """Without namespace, interface or address the result is false, and nothing changes."""
    own = IPv6Interface("fd42:7::9/64")
    assert not exchange(tmp_path / "none", "02:42:0a:09:00:09", COUNTED, own)
    (tmp_path / "file").touch()
    assert not exchange(tmp_path / "file", "02:42:0a:09:00:09", COUNTED, own)
    box = _counted(two.hosts[0], 9)
    box.run("ip", "addr", "del", str(COUNTED), "dev", "eth0")
    assert not _exchange(box)
    assert not _addresses(box)
    assert not exchange(Path(f"/proc/self/fd/{box.namespace}"), "02:00:00:00:00:00", COUNTED, own)


def test_the_counted_address_is_kept_off_the_network_in_silence(two: Lab) -> None:
    """Packets from the engine's address reach no other container, and don't count as forged."""
    near = _counted(two.hosts[0], 10)
    far = two.hosts[1].container(near.network, 11)
    two.mesh(near.network)
    assert near.echoes(far.ipv4)
    listening = far.packets()
    frame = ethernet(
        near.endpoint.mac,
        ALL_NODES_MAC,
        IPV6,
        advertisement(near.endpoint.mac, COUNTED.ip, COUNTED.ip),
    )
    with near.packets() as packets:
        send(packets, frame)
    assert not near.pings(far.ipv6, 1, 0.3)
    assert COUNTED.ip.packed not in {item[22:38] for item in heard(listening)}
    host = two.hosts[0]
    assert host.do(host.kernel.spoofed).get(names.short(near.endpoint.id), 0) == 0
