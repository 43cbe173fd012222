"""Which devices lie below the underlay's."""

from __future__ import annotations

from driver.kernel.offload import below
from driver.kernel.rtnl import Link

LINKS = [
    Link(1, "lo", "", 0, 0),
    Link(2, "eth0", "", 0, 4),
    Link(3, "eth1", "", 0, 4),
    Link(4, "bond0", "bond", 0, 0),
    Link(5, "bond0.7", "vlan", 4, 0),
    Link(6, "br0", "bridge", 0, 0),
    Link(7, "eth2", "", 0, 6),
    Link(8, "vnet1", "tun", 0, 6),
    Link(9, "veth1", "veth", 10, 0),
    Link(10, "veth0", "veth", 9, 0),
    Link(11, "loop", "vlan", 11, 0),
]


def test_stacks() -> None:
    """A VLAN's device, a bond's members and a bridge's hardware are below it; a veth's peer and a
    guest's port aren't.
    """
    assert below("eth2", LINKS) == ["eth2"]
    assert below("bond0.7", LINKS) == ["bond0.7", "bond0", "eth0", "eth1"]
    assert below("br0", LINKS) == ["br0", "eth2"]
    assert below("veth0", LINKS) == ["veth0"]
    assert below("loop", LINKS) == ["loop"]
    assert below("eth9", LINKS) == []
