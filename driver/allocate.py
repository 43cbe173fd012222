"""Chooses what all hosts of a network must agree on: VNI, port, MTU, IPv6 prefix, format.

On a Swarm the leader chooses once, in AllocateNetwork, and Docker passes the answer on to every
host and to the next leader. The choices are derived from the network's ID, so two leaders choose
the same even if neither knows the other's choices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Final

from driver import options as opt
from driver.errors import Conflict, InvalidRequest
from driver.model import ENCRYPTED_FORMAT, FORMAT, Network, Subnet

_SWARM_ID_LENGTH: Final = 25


def _digest(network_id: str, purpose: str) -> bytes:
    return hashlib.sha256(f"freeflow {purpose} {network_id}".encode()).digest()


def vni_for(network_id: str, taken: Collection[int]) -> int:
    """A free VNI, 1 to 2^24-1: the ID's hash, or the next free number after it. Raises Conflict."""
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
    """Whether a network is a Swarm's.

    Its manager numbers IPv4 addresses; each host's engine numbers IPv6 addresses by itself.
    """
    return len(network_id) == _SWARM_ID_LENGTH


def check_subnets(network_id: str, subnets: Collection[Subnet]) -> None:
    """Refuse IPv6 subnets that Docker's Swarm can't number.

    Managers up to 26 treat an IPv6 subnet as another IPv4 one: each task gets an address from only
    one of them, and its host's engine numbers the other by itself, so containers on two hosts get
    the same IPv4 address. Later managers don't allocate the network. A subnet that an engine chose
    by itself has no gateway, since we ask it not to reserve one (GwAllocCheck, since 28).

    Raises:
        InvalidRequest: names the option to use instead.
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
    """The IPv6 address derived from an IPv4 address, which is in its last 32 bits."""
    return prefix[int(address)]


def mac_for(address: IPv4Address) -> str:
    """The MAC address derived from an IPv4 address. A neighbour entry stays right when the address
    moves."""
    return "02:42:" + address.packed.hex(":")


def mac_for_id(endpoint_id: str) -> str:
    """The MAC address of an endpoint without an IPv4 address; its prefix differs from that of
    `mac_for`."""
    return "06:" + _digest(endpoint_id, "mac")[:5].hex(":")


def network(
    network_id: str,
    generic: Mapping[str, str],
    *,
    port: int,
    default_mtu: Callable[[bool], int],
    taken: Mapping[int, str],
    subnets: tuple[Subnet, ...] = (),
    ipv6: bool = False,
    internal: bool = False,
    overlay: bool = True,
) -> Network:
    """The network with these options.

    `generic` are the user's options (-o) and those that an earlier allocation added. `taken` maps
    VNIs in use to their networks; `default_mtu` is called only if no option gives the MTU, with
    whether the network is encrypted.

    Raises:
        InvalidRequest: see `options.parse` and `check_subnets`.
        Conflict: another network has the VNI that the user chose.
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
        mtu=parsed.own_mtu or parsed.mtu or default_mtu(parsed.encrypted),
        prefix6=parsed.prefix6 or parsed.own_prefix6 or prefix6_for(network_id),
        subnets=subnets,
        ipv6=ipv6 or parsed.ipv6,
        internal=internal,
        acceleration=parsed.acceleration,
        overlay=overlay,
        encrypted=parsed.encrypted,
        format=parsed.own_format or (ENCRYPTED_FORMAT if parsed.encrypted else FORMAT),
        options=dict(generic),
    )


def choices(chosen: Network) -> dict[str, str]:
    """The choices, as options."""
    # Under the user's name of it: hosts of an earlier version refuse it.
    encrypted = {opt.ENCRYPTED: "true"} if chosen.encrypted else {}
    return encrypted | {
        opt.FORMAT: str(chosen.format),
        opt.VNI: str(chosen.vni),
        opt.PORT: str(chosen.port),
        opt.MTU: str(chosen.mtu),
        opt.PREFIX6: str(chosen.prefix6),
    }


def answer(chosen: Network) -> dict[str, str]:
    """AllocateNetwork's answer: the user's options and ours, since Docker replaces the options by
    it."""
    return {**chosen.options, **choices(chosen)}
