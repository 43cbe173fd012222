"""Which devices lie below the underlay's."""

from __future__ import annotations

from driver.kernel.offload import below
from driver.kernel.rtnl import NetDevice

LINKS = [
    NetDevice(1, "lo", "", 0, 0),
    NetDevice(2, "eth0", "", 0, 4),
    NetDevice(3, "eth1", "", 0, 4),
    NetDevice(4, "bond0", "bond", 0, 0),
    NetDevice(5, "bond0.7", "vlan", 4, 0),
    NetDevice(6, "br0", "bridge", 0, 0),
    NetDevice(7, "eth2", "", 0, 6),
    NetDevice(8, "vnet1", "tun", 0, 6),
    NetDevice(9, "veth1", "veth", 10, 0),
    NetDevice(10, "veth0", "veth", 9, 0),
    NetDevice(11, "loop", "vlan", 11, 0),
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
