"""The source filter: a container sends only from its own MAC and IP addresses.

`table netdev freeflow` in the overlay namespace has one chain per endpoint, at the ingress hook of
its veth: before the bridge learns from its frames, and for no other device. So a frame passes only
the rules of its own endpoint, and frames from other hosts pass none: their host has checked them.

    own MAC, own IPv4                      accept   nearly all frames end in these two rules
    own MAC, own IPv6, not ICMPv6          accept
    own MAC in ARP, own or no IPv4         accept   RFC 826; no IPv4: a probe, RFC 5227
    neighbour advertisement of others      drop     RFC 4861
    router advertisement, redirect         drop     no container is another's router
    own MAC, own or link-local or no IPv6  accept   no IPv6: duplicate address detection, RFC 4862
    own MAC, not ARP, IP, or a tunnel      accept
    anything else                          drop, counted

The rules compare single values: making an anonymous set costs the kernel a millisecond.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any, Final

from driver import names
from driver.kernel.nft import Session
from driver.model import Endpoint

TABLE: Final = "netdev freeflow"
_PREFIX: Final = "ep"

_WRAPPED: Final = "ip, arp, ip6, 8021q, 8021ad, 0x8847, 0x8848, 0x8863, 0x8864, 0x894f"
"""Ethernet types that carry IP packets: plain, VLAN, MPLS, PPPoE and NSH."""

_BASE: Final = f"""
add table {TABLE}
add set {TABLE} wrapped {{ type ether_type; }}
add element {TABLE} wrapped {{ {_WRAPPED} }}
"""


def chain(endpoint_id: str) -> str:
    return _PREFIX + names.short(endpoint_id)


def link_local(mac: str) -> IPv6Address:
    """The EUI-64 link-local address of a MAC address (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes((octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]))
    return IPv6Address(bytes.fromhex("fe80000000000000") + identifier)


def _rules(endpoint: Endpoint) -> list[str]:
    own = f"ether saddr {endpoint.mac}"
    ipv4 = endpoint.ipv4.ip if endpoint.ipv4 is not None else None
    ipv6 = endpoint.ipv6.ip if endpoint.ipv6 is not None else None
    own6 = [link_local(endpoint.mac)] + ([ipv6] if ipv6 is not None else [])
    # The target is at byte 8 of the message; nft before 1.0.8 has no name for it.
    others = " ".join(f"@th,64,128 != {int(address):#034x}" for address in own6)
    rules = []
    if ipv4 is not None:
        rules.append(f"{own} ip saddr {ipv4} accept")
    if ipv6 is not None:
        rules.append(f"{own} ip6 saddr {ipv6} meta l4proto != icmpv6 accept")
    rules += [
        f"{own} arp saddr ether {endpoint.mac} arp saddr ip {source} accept"
        for source in ("0.0.0.0", ipv4)
        if source is not None
    ]
    if endpoint.engine_ipv6 is not None:
        # The engine announces it, and the container may use it for a moment: dropped, not counted.
        unused = endpoint.engine_ipv6.ip
        rules += [
            f"icmpv6 type nd-neighbor-advert @th,64,128 {int(unused):#034x} drop",
            f"{own} ip6 saddr {unused} drop",
        ]
    rules += [
        f"icmpv6 type nd-neighbor-advert {others} counter drop",
        "icmpv6 type nd-router-advert counter drop",
        "icmpv6 type nd-redirect counter drop",
    ]
    rules += [f"{own} ip6 saddr {source} accept" for source in ("::", *own6)]
    return [*rules, f"{own} ether type != @wrapped accept", "counter drop"]


def base() -> str:
    """Commands that make the table unless it exists."""
    return _BASE


def add(endpoint: Endpoint) -> str:
    """Commands that make an endpoint's chain, or replace it; its veth must exist."""
    name, device = chain(endpoint.id), names.host_veth(endpoint.id)
    hook = f'type filter hook ingress device "{device}" priority 0; policy accept;'
    lines = [f"add chain {TABLE} {name} {{ {hook} }}", f"flush chain {TABLE} {name}"]
    lines += [f"add rule {TABLE} {name} {rule}" for rule in _rules(endpoint)]
    return "\n".join(lines) + "\n"


def remove(endpoint_id: str) -> str:
    """Commands that remove an endpoint's chain if there is one.

    Linux before 6.16 removes it together with the device, later ones keep it.
    """
    name = chain(endpoint_id)
    return f"add chain {TABLE} {name}\nflush chain {TABLE} {name}\ndelete chain {TABLE} {name}\n"


def present(session: Session) -> set[str]:
    """Short IDs of the endpoints that have a chain."""
    objects = session.query("list chains netdev")
    chains = [item["chain"] for item in objects if "chain" in item]
    return {
        str(item["name"])[len(_PREFIX) :]
        for item in chains
        if f"{item['family']} {item['table']}" == TABLE
    }


def dropped(session: Session) -> dict[str, int]:
    """Dropped frames since the endpoint's rules were made, by the endpoint's short ID."""
    counts: dict[str, int] = {}
    for item in session.query(f"list table {TABLE}"):
        rule: dict[str, Any] = item.get("rule", {})
        identifier = str(rule.get("chain", ""))[len(_PREFIX) :]
        for expression in rule.get("expr", ()):
            counter = expression.get("counter") if expression else None
            if counter:
                counts[identifier] = counts.get(identifier, 0) + int(counter["packets"])
    return counts
