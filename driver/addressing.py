"""Addresses of an endpoint: those that Docker chose, those that the user asked for, derived ones.

In a Swarm each host's engine takes IPv6 addresses from a subnet of its own, which no other host
knows. There the endpoint gets an address that is derived from its IPv4 address instead.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from typing import Final

from driver import allocate, options
from driver.errors import InvalidRequest
from driver.model import Endpoint, IPNetwork, Network

_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def mac(wanted: str | None, endpoint_id: str, ipv4: IPv4Interface | None) -> str:
    """The endpoint's MAC address: the wanted one, or a derived one.

    Raises:
        InvalidRequest: the wanted one is not a unicast address.
    """
    if not wanted:
        return allocate.mac_for_id(endpoint_id) if ipv4 is None else allocate.mac_for(ipv4.ip)
    if not _MAC.fullmatch(wanted) or int(wanted[:2], 16) & 1 or wanted == "00:00:00:00:00:00":
        raise InvalidRequest(
            f"MAC address {wanted!r}",
            cause="not an address that a host can have",
            remedy="for example --mac-address 02:42:0a:00:00:05",
        )
    return wanted.lower()


def _derived_ipv6(network: Network, ipv4: IPv4Interface | None) -> IPv6Interface | None:
    if not network.ipv6 or ipv4 is None:
        return None
    address = allocate.ipv6_for(network.prefix6, ipv4.ip)
    return IPv6Interface((address, network.prefix6.prefixlen))


def ipv6(
    network: Network, ipv4: IPv4Interface | None, requested: IPv6Interface | None
) -> tuple[IPv6Interface | None, IPv6Interface | None]:
    """The endpoint's IPv6 address, and the engine's where that must not be used."""
    derived = _derived_ipv6(network, ipv4)
    if requested is None:
        return derived, None
    if derived is None or not allocate.numbered_by_hosts(network.id):
        return requested, None
    return (requested, None) if requested.ip in network.prefix6 else (derived, requested)


def chosen_ipv6(
    network: Network,
    ipv4: IPv4Interface | None,
    requested: IPv6Interface | None,
    chosen: IPv6Address,
) -> tuple[IPv6Interface, IPv6Interface | None]:
    """As `ipv6`, where the user chose an address by the driver-opt ip6.

    Raises:
        InvalidRequest: the network can't have it, or it may be another container's.
    """
    what, prefix = f"driver-opt {options.IP6}={chosen}", network.prefix6
    example = f"for example driver-opt={options.IP6}={prefix.network_address + (1 << 32) + 5}"
    if requested is not None and not allocate.numbered_by_hosts(network.id):
        raise InvalidRequest(
            what,
            cause="Docker numbers the IPv6 addresses of this network",
            remedy="use --ip6",
        )
    if not network.ipv6:
        raise InvalidRequest(
            what,
            cause=f"network {network.id} has no IPv6",
            remedy="create it with -o ipv6=on",
        )
    if chosen not in prefix:
        raise InvalidRequest(what, cause=f"not in {prefix}, the network's prefix", remedy=example)
    derived = int(chosen) - int(prefix.network_address)
    if derived < 1 << 32 and (not derived or ipv4 is None or derived != int(ipv4.ip)):
        raise InvalidRequest(
            what,
            cause=f"belongs to the container with the IPv4 address {IPv4Address(derived)}",
            remedy=example,
        )
    own = IPv6Interface((chosen, prefix.prefixlen))
    return own, None if requested == own else requested


def same(known: Endpoint, requested: Endpoint) -> bool:
    """Whether two requests to create an endpoint ask for the same."""
    return (known.network_id, known.ipv4, known.ipv6, known.mac) == (
        requested.network_id,
        requested.ipv4,
        requested.ipv6,
        requested.mac,
    )


def other_subnets(network: Network, endpoint: Endpoint) -> tuple[IPNetwork, ...]:
    """Subnets of the network other than the endpoint's own: all are on the same link."""
    own = [item.network for item in (endpoint.ipv4, endpoint.ipv6) if item is not None]
    pools: list[IPNetwork] = [
        subnet.pool
        for subnet in network.subnets
        if subnet.pool.prefixlen
        # A subnet that this host's engine chose by itself: no container has an address of it.
        and not (
            subnet.pool.version == 6
            and subnet.gateway is None
            and allocate.numbered_by_hosts(network.id)
        )
    ]
    families = {item.version for item in own}
    return tuple(
        dict.fromkeys(pool for pool in pools if pool not in own and pool.version in families)
    )
