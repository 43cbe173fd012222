"""Whether the underlay's device segments UDP tunnels, so that bulk data on the overlay is cheap.

The feature is `tx-udp_tnl-segmentation` of `ethtool -k`. A packet passes every device below the
one that has the address (VLAN, bond, bridge), and each that lacks the feature has the kernel
segment it. Requests: linux/ethtool.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from driver.kernel.netlink import Sockets
from driver.kernel.rtnl import NetDevice

FEATURE: Final = b"tx-udp_tnl-segmentation"
_UPON_ONE: Final = ("vlan", "macvlan", "ipvlan")
_UPON_MANY: Final = ("bond", "team", "bridge")
_VIRTUAL: Final = ("veth", "tun", "vxlan")
"""Ports of a bridge that lead to guests of this host."""

_STRINGS_INFO, _STRINGS, _FEATURES = 0x37, 0x1B, 0x3A
_SET: Final = 4
"""ETH_SS_FEATURES."""
_STRING: Final = 32
_INFO: Final = struct.Struct("=IIQI")
_HEAD: Final = struct.Struct("=III")
_ASKED: Final = struct.Struct("=II")
_BLOCK: Final = struct.Struct("=IIII")
"""32 features: available, requested, active, never changed."""


def segments_tunnels(host: Sockets, device: str) -> bool | None:
    """Whether a device and those below it segment UDP tunnels; None: the kernel doesn't say."""
    try:
        with host.raw() as netlink:
            stack = below(device, netlink.links())
        return all(_has(host, name) for name in stack) if stack else None
    except OSError:
        return None


def below(device: str, links: Iterable[NetDevice]) -> list[str]:
    """The device and those below it, by name; empty if it doesn't exist."""
    known = list(links)
    found = [link for link in known if link.name == device]
    for link in found:
        under = []
        if link.type in _UPON_ONE:
            under = [other for other in known if other.index == link.upon]
        elif link.type in _UPON_MANY:
            under = [
                other
                for other in known
                if other.master == link.index and other.type not in _VIRTUAL
            ]
        found += [other for other in under if other not in found]
    return [link.name for link in found]


def _has(host: Sockets, device: str) -> bool:
    """Raises OSError."""
    info = host.ethtool(device, _INFO.pack(_STRINGS_INFO, 0, 1 << _SET, 0))
    count = _INFO.unpack(info)[3]
    head = _HEAD.pack(_STRINGS, _SET, count)
    answer = host.ethtool(device, head + bytes(count * _STRING))
    strings = answer[_HEAD.size :]
    features = [
        strings[at : at + _STRING].partition(b"\0")[0] for at in range(0, len(strings), _STRING)
    ]
    if FEATURE not in features:
        return False
    number = features.index(FEATURE)
    blocks = (count + 31) // 32
    answer = host.ethtool(device, _ASKED.pack(_FEATURES, blocks) + bytes(blocks * _BLOCK.size))
    active = _BLOCK.unpack_from(answer, _ASKED.size + number // 32 * _BLOCK.size)[2]
    return bool(active >> number % 32 & 1)
