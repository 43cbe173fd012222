"""The inner addresses of hosts: between these WireGuard carries the packets of encrypted networks.

Each host has two, one for each of its WireGuard devices (slots 0 and 1). Both are derived from the
node ID in its certificate, so nobody claims an address, and nobody can claim another's.
"""

from __future__ import annotations

import hashlib
from ipaddress import IPv6Address, IPv6Network
from typing import Final

PREFIX: Final = IPv6Network("fd66:6677::/32")
"""Unique local addresses (RFC 4193), used in the encryption namespaces alone."""
SLOTS: Final = (0, 1)
_DERIVED: Final = (1 << 96) - 2


def inner_address(node: str, slot: int) -> IPv6Address:
    """A node's address of a slot: the prefix, 95 bits of a hash, and the slot."""
    digest = hashlib.sha256(f"freeflow inner {node}".encode()).digest()
    derived = int.from_bytes(digest[:12], "big") & _DERIVED
    return PREFIX[derived | slot]


def other_slot(address: IPv6Address) -> IPv6Address:
    """The same host's address of the other slot."""
    return IPv6Address(int(address) ^ 1)
