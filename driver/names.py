"""Names of our objects on a host, derived from Docker's IDs, so that removal needs no memory.

An interface name is a three-letter prefix and the first twelve characters of the ID: IFNAMSIZ
allows fifteen.
"""

from __future__ import annotations

from typing import Final

BRIDGE: Final = "ffb"
VXLAN: Final = "ffx"
ENCRYPTED: Final = "ffe"
"""VXLAN devices of encrypted networks: the name says where their packets go."""
WIREGUARD: Final = "ffw"
HOST_VETH: Final = "ffh"
CONTAINER_VETH: Final = "ffc"
PAIR: Final = "ffu"
PREFIXES: Final = (BRIDGE, VXLAN, ENCRYPTED, HOST_VETH, CONTAINER_VETH, PAIR)

INSIDE: Final = PAIR + "0"
"""The veth pair between the namespaces: its end in the overlay namespace,"""
OUTSIDE: Final = PAIR + "1"
"""and its end in the host's namespace."""

SHORT_ID: Final = 12


def is_freeflow(driver: str) -> bool:
    """Whether a network driver is FreeFlow, from any registry and with any tag."""
    return driver.rpartition("/")[2].partition(":")[0] == "freeflow"


def short(identifier: str) -> str:
    """The part of a network's or endpoint's ID that is in its interface names."""
    return identifier[:SHORT_ID]


def bridge(network_id: str) -> str:
    return BRIDGE + short(network_id)


def vxlan(network_id: str, *, encrypted: bool = False) -> str:
    return (ENCRYPTED if encrypted else VXLAN) + short(network_id)


def wireguard(slot: int) -> str:
    return f"{WIREGUARD}{slot}"


def host_veth(endpoint_id: str) -> str:
    return HOST_VETH + short(endpoint_id)


def container_veth(endpoint_id: str) -> str:
    return CONTAINER_VETH + short(endpoint_id)
