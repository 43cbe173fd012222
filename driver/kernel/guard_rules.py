"""The nftables rules of `guard.py`, which limit who may send to the overlay's UDP port.

For the ports of this host's networks:

- input: only from peers. Nothing from this host itself, and nothing through a bridge, veth or
  tunnel that leads to no peer.
- output: nothing that a socket of this namespace sends to a peer's port. Packets of the kernel's
  VXLAN device have no socket here. Packet sockets bypass this hook, so a process needs CAP_NET_RAW
  in the host's namespace to send.
- forward, postrouting: nothing of containers that was masqueraded with this host's address, or that
  carries a peer's. The same for the port of the routers' sessions, since a router accepts
  connections from its peers' addresses alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final

from driver import names
from driver.model import IPAddress

FAMILY: Final = "inet"
NAME: Final = "freeflow_guard"
TABLE: Final = f"{FAMILY} {NAME}"
STRANGERS: Final = 256
"""Addresses of hosts that are no peers which the kernel remembers, for ten minutes."""

_SUSPECTS: Final = '{ "bridge", "veth", "netkit", "vxlan", "geneve", "dummy" }'
"""Kinds of devices behind which containers are, unless one of them leads to peers."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The content of the table.

    `peers` by UDP port; `devices` lead to them; all hosts in the networks `near` may send.
    `routers` are hosts with which only the routers have to do, on networks of other drivers.
    """

    peers: Mapping[int, frozenset[IPAddress]] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()
    sessions: int | None = None
    near: frozenset[IPv4Network | IPv6Network] = frozenset()
    routers: frozenset[IPAddress] = frozenset()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to guard."""
        return not self.peers and not self.routers

    def commands(self) -> str:
        """Commands that replace the whole table, in one transaction."""
        pairs = [(port, peer) for port in sorted(self.peers) for peer in self.peers[port]]
        hosts = self.routers.union(peer for _, peer in pairs)
        lists: dict[str, list[str]] = {
            "ports": [str(port) for port in sorted(self.peers)],
            "sessions": [str(self.sessions)] if self.sessions and hosts else [],
            "underlay": [f'"{name}"' for name in sorted(self.devices)],
        }
        for version in (4, 6):
            lists[f"peers{version}"] = [
                f"{port} . {peer}" for port, peer in pairs if peer.version == version
            ]
            lists[f"hosts{version}"] = [str(peer) for peer in hosts if peer.version == version]
            lists[f"near{version}"] = [str(net) for net in self.near if net.version == version]
        body = "".join(_set(name, _TYPES[name], lists.get(name, ())) for name in _TYPES)
        return f"add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{body}{_CHAINS}}}\n"


_TYPES: Final = {
    "ports": "type inet_service;",
    "sessions": "type inet_service;",
    "underlay": "type ifname;",
    "peers4": "type inet_service . ipv4_addr;",
    "peers6": "type inet_service . ipv6_addr;",
    "hosts4": "type ipv4_addr;",
    "hosts6": "type ipv6_addr;",
    "near4": "type ipv4_addr; flags interval; auto-merge;",
    "near6": "type ipv6_addr; flags interval; auto-merge;",
    "strangers4": f"type ipv4_addr; size {STRANGERS}; flags dynamic,timeout; timeout 10m;",
    "strangers6": f"type ipv6_addr; size {STRANGERS}; flags dynamic,timeout; timeout 10m;",
}


def _set(name: str, kind: str, elements: Collection[str]) -> str:
    values = f" elements = {{ {', '.join(elements)} }};" if elements else ""
    return f" set {name} {{ {kind}{values} }}\n"


def _both(rule: str) -> str:
    """A rule for IPv4 and for IPv6: `%` stands for the protocol's name, `#` for its version."""
    return "".join(
        f"  {rule.replace('%', protocol).replace('#', version)}\n"
        for protocol, version in (("ip", "4"), ("ip6", "6"))
    )


_TO_PEER: Final = "udp dport . % daddr @peers#"
_TO_NEAR: Final = "udp dport @ports % daddr @near#"
_TO_ROUTER: Final = "tcp dport @sessions % daddr @hosts#"
_SUSPECT: Final = f"meta iifkind {_SUSPECTS} iifname != @underlay"
# Packets that this host encapsulates come from a VXLAN device, those that it sends itself from
# none.
_FORWARDED: Final = f'iif != 0 iifname != "{names.VXLAN}*"'
_CHAINS: Final = (
    " chain strangers {\n"
    '  iifname "lo" counter drop\n'
    f"  {_SUSPECT} counter drop\n"
    + _both("udp dport . % saddr @peers# return")
    + _both("% saddr @near# return")
    # A rule of its own: where the set is full, the rule ends there.
    + _both("add @strangers# { % saddr }")
    + "  counter drop\n }\n"
    " chain input {\n  type filter hook input priority -150; policy accept;\n"
    "  udp dport @ports goto strangers\n }\n"
    " chain output {\n  type filter hook output priority -150; policy accept;\n"
    # True for every packet with a socket in this namespace: others have no uid.
    + _both(f"{_TO_PEER} meta skuid >= 0 counter drop")
    + _both(f"{_TO_NEAR} meta skuid >= 0 counter drop")
    + _both(f"{_TO_ROUTER} meta skuid != 0 counter drop")
    + " }\n chain forward {\n  type filter hook forward priority -150; policy accept;\n"
    + _both(f"{_SUSPECT} {_TO_PEER} % saddr @hosts# counter drop")
    + _both(f"{_SUSPECT} {_TO_NEAR} % saddr @near# counter drop")
    + _both(f"{_SUSPECT} {_TO_ROUTER} % saddr @hosts# counter drop")
    + " }\n chain postrouting {\n  type filter hook postrouting priority 200; policy accept;\n"
    + _both(f"{_FORWARDED} ct status snat {_TO_PEER} counter drop")
    + _both(f"{_FORWARDED} ct status snat {_TO_NEAR} counter drop")
    + _both(f"{_FORWARDED} ct status snat {_TO_ROUTER} counter drop")
    + " }\n"
)


def own(item: Mapping[str, Any]) -> bool:
    """Whether an object of a listing (libnftables-json(5)) is of this table."""
    body = next(iter(item.values()), None)
    if not isinstance(body, Mapping):
        return False
    table = body.get("name") if "table" in item else body.get("table")
    return body.get("family") == FAMILY and table == NAME
