"""What all hosts must agree on for a network, chosen once: VNI, port, MTU, IPv6 prefix, format.

On a Swarm the leader chooses, in AllocateNetwork, and Docker carries the answer to every host and back to the next
leader. Choices are derived from the network's ID, so that two leaders that can't see each other's choose alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Final

from driver import options as opt
from driver.errors import Conflict, InvalidRequest
from driver.model import FORMAT, Network, Subnet

_SWARM_ID_LENGTH: Final = 25


def _digest(network_id: str, purpose: str) -> bytes:
    return hashlib.sha256(f"freeflow {purpose} {network_id}".encode()).digest()


def vni_for(network_id: str, taken: Collection[int]) -> int:
    """A free VNI, 1 to 2^24-1: the ID's hash, or the next free one after it."""
    start = int.from_bytes(_digest(network_id, "vni")[:3], "big")
    for step in range(1 << 24):
        vni = (start + step) % ((1 << 24) - 1) + 1
        if vni not in taken:
            return vni
    raise Conflict(f"network {network_id}", cause="every VNI is taken", remedy="remove a network")


def prefix6_for(network_id: str) -> IPv6Network:
    """The network's unique local /64 (RFC 4193: fd, 40 bits global ID, 16 bits subnet)."""
    head = bytes([0xFD]) + _digest(network_id, "prefix6")[:7]
    return IPv6Network((head + bytes(8), 64))


def numbered_by_hosts(network_id: str) -> bool:
    """Whether it is a Swarm's network: its IPv4 addresses come from the manager, IPv6 addresses from each host's engine,
    which knows nothing of the others'."""
    return len(network_id) == _SWARM_ID_LENGTH


def check_subnets(network_id: str, subnets: Collection[Subnet]) -> None:
    """Refuse what Docker's Swarm can't number.

    Managers up to 26 take an IPv6 subnet for one more of IPv4: each task gets an address from either, and its host's engine
    counts the other up for itself, so that containers of two hosts have the same IPv4 address. Later managers leave the
    network unallocated. A subnet that an engine chose by itself has no gateway: we tell it so (GwAllocCheck, since 28).

    Raises:
        InvalidRequest: with what to use instead.
    """
    for item in subnets:
        if item.pool.version == 6 and item.gateway is not None and numbered_by_hosts(network_id):
            raise InvalidRequest(
                f"network {network_id}",
                cause=f"with the IPv6 subnet {item.pool} Docker's Swarm would give containers on "
                "different hosts the same address",
                remedy="create the network without --ipv6 and without that --subnet, with "
                f"-o ipv6={item.pool if item.pool.prefixlen == 64 else 'on'}",
            )


def ipv6_for(prefix: IPv6Network, address: IPv4Address) -> IPv6Address:
    """The IPv6 address that goes with an IPv4 address: it in the prefix's last 32 bits."""
    return prefix[int(address)]


def mac_for(address: IPv4Address) -> str:
    """The MAC address that goes with an IPv4 address, locally administered, so that neighbour entries don't age wrong."""
    return "02:42:" + address.packed.hex(":")


def mac_for_id(endpoint_id: str) -> str:
    """The MAC address of an endpoint without IPv4 address (null IPAM, IPv6 only); its prefix is apart from `mac_for`'s."""
    return "06:" + _digest(endpoint_id, "mac")[:5].hex(":")


def network(
    network_id: str,
    generic: Mapping[str, str],
    *,
    port: int,
    default_mtu: Callable[[], int],
    taken: Mapping[int, str],
    subnets: tuple[Subnet, ...] = (),
    ipv6: bool = False,
    internal: bool = False,
    overlay: bool = True,
) -> Network:
    """The network that these options make.

    `generic` is what the user gave with -o, and what an earlier allocation added. `taken` maps VNIs in use to the
    network that has them; `default_mtu` is asked only when no option says.

    Raises:
        InvalidRequest: see `options.parse` and `check_subnets`.
        Conflict: the VNI asked for belongs to another network.
    """
    check_subnets(network_id, subnets)
    parsed = opt.parse(generic)
    others = {vni: owner for vni, owner in taken.items() if owner != network_id}
    vni = parsed.own_vni or parsed.vni
    if vni in others and parsed.own_vni is None:
        raise Conflict(
            f"network {network_id}",
            cause=f"option vni={vni} is taken by network {others[vni]}",
            remedy="choose another",
        )
    return Network(
        id=network_id,
        vni=vni or vni_for(network_id, others),
        port=parsed.own_port or port,
        mtu=parsed.own_mtu or parsed.mtu or default_mtu(),
        prefix6=parsed.prefix6 or parsed.own_prefix6 or prefix6_for(network_id),
        subnets=subnets,
        ipv6=ipv6 or parsed.ipv6,
        internal=internal,
        acceleration=parsed.acceleration,
        overlay=overlay,
        format=parsed.own_format or FORMAT,
        options=dict(generic),
    )


def choices(chosen: Network) -> dict[str, str]:
    """What was chosen, as options."""
    return {
        opt.FORMAT: str(chosen.format),
        opt.VNI: str(chosen.vni),
        opt.PORT: str(chosen.port),
        opt.MTU: str(chosen.mtu),
        opt.PREFIX6: str(chosen.prefix6),
    }


def answer(chosen: Network) -> dict[str, str]:
    """AllocateNetwork's answer: the user's options and ours, for Docker replaces the former by what is returned."""
    return {**chosen.options, **choices(chosen)}
