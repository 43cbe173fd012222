"""ARP on the networks: frames that hint at new services and tasks are read, once."""

from __future__ import annotations

import time
from ipaddress import IPv4Address

from driver import names
from driver.kernel import announce
from driver.model import ArpFrame
from testbed.kernel_hosts import KernelHost, Lab, a_network

NOBODY = IPv4Address("10.9.0.99")


def _hear(host: KernelHost, seconds: float) -> frozenset[ArpFrame]:
    return host.do(lambda: host.kernel.hear(seconds))


def _heard(host: KernelHost, wanted: ArpFrame, seconds: float = 3.0) -> bool:
    """Whether this frame is received in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if wanted in _hear(host, 0.2):
            return True
    return False


def test_a_question_for_an_address_that_nobody_has_is_heard_on_its_host(two: Lab) -> None:
    """A connection attempt to an unknown VIP causes ARP on all hosts that share the network."""
    network = a_network()
    near, far = (
        host.container(network, number) for host, number in zip(two.hosts, (2, 3), strict=True)
    )
    two.mesh(network)
    for host in two.hosts:
        _hear(host, 0.2)
    assert not near.echoes(NOBODY, tries=1)
    question = ArpFrame(names.short(network.id), near.ipv4, NOBODY)
    assert not question.is_announcement
    assert _heard(two.hosts[0], question)
    assert _heard(two.hosts[1], question)
    del far


def test_an_announcement_is_heard_on_other_hosts(two: Lab) -> None:
    """A repeated announcement reaches every host with the network."""
    network = a_network()
    near, _ = (
        host.container(network, number) for host, number in zip(two.hosts, (2, 3), strict=True)
    )
    two.mesh(network)
    _hear(two.hosts[1], 0.2)
    two.hosts[0].do(lambda: two.hosts[0].kernel.announce(network.id, [near.endpoint]))
    assert _heard(two.hosts[1], ArpFrame(names.short(network.id), near.ipv4, near.ipv4))


def test_an_announcement_for_others_is_not_heard(one: Lab) -> None:
    """A container can't announce another container's address."""
    network = a_network()
    box = one.hosts[0].container(network, 2)
    _hear(one.hosts[0], 0.2)
    box.packets().send(announce.gratuitous_arp(box.endpoint.mac, NOBODY))
    assert not _heard(one.hosts[0], ArpFrame(names.short(network.id), NOBODY, NOBODY), 0.6)


def test_hearing_outlives_a_cleanup(one: Lab) -> None:
    """After the overlay namespace was removed and made again, ARP is read in the new one."""
    host = one.hosts[0]
    host.container(a_network(1), 2)
    host.do(host.kernel.cleanup)
    assert not _hear(host, 0.05)
    network = a_network(2)
    box = host.container(network, 3)
    assert not box.echoes(NOBODY, tries=1)
    assert _heard(host, ArpFrame(names.short(network.id), box.ipv4, NOBODY))
