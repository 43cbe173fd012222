"""The source filter: a container sends only from its own MAC and IP addresses.

`table bridge freeflow` in the overlay namespace. One map from the host-side veth to the endpoint's own chain, so
that a frame costs one look-up and one rule however many endpoints there are:

    prerouting:  iifname vmap { ffh…: goto ep…, … };  iifname "ffh*" drop
    ep…:         own MAC, own IPv4 → accept;  own MAC in ARP (RFC 826), own or no IPv4 (probe, RFC 5227) → accept;
                 own MAC, own IPv6, link-local or :: (RFC 4862) → accept, neighbour advertisements only for own targets;
                 count, drop

Frames that come from other hosts aren't looked at: their host did it.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any, Final

from driver import names
from driver.errors import KernelError
from driver.kernel import nft
from driver.model import Endpoint

TABLE: Final = "bridge freeflow"
_CHAIN: Final = "ep"

_BASE: Final = f"""
add table {TABLE}
add map {TABLE} ports {{ type ifname : verdict; }}
add chain {TABLE} prerouting {{ type filter hook prerouting priority -300; policy accept; }}
flush chain {TABLE} prerouting
add rule {TABLE} prerouting iifname vmap @ports
add rule {TABLE} prerouting iifname "{names.HOST_VETH}*" counter drop
"""


def chain(endpoint_id: str) -> str:
    return _CHAIN + names.short(endpoint_id)


def link_local(mac: str) -> IPv6Address:
    """The EUI-64 link-local address of a MAC address (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes((octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]))
    return IPv6Address(bytes.fromhex("fe80000000000000") + identifier)


def base() -> str:
    """Commands that make the table; harmless when it is there."""
    return _BASE


def add(endpoint: Endpoint) -> str:
    """Commands that (re)make an endpoint's chain and its entry in the map."""
    name, port, mac = chain(endpoint.id), names.host_veth(endpoint.id), endpoint.mac
    rule = f"add rule {TABLE} {name} ether saddr {mac}"
    lines = [
        f"{verb} chain {TABLE} {own}" for own in (name, name + "6") for verb in ("add", "flush")
    ]
    arp_sources = ["0.0.0.0"]
    if endpoint.ipv4 is not None:
        lines.append(f"{rule} ip saddr {endpoint.ipv4.ip} accept")
        arp_sources.append(str(endpoint.ipv4.ip))
    # DHCP clients and IPv4 link-local probes start from 0.0.0.0; nothing of ours answers, so no rule for them.
    lines.append(f"{rule} arp saddr ether {mac} arp saddr ip {{ {', '.join(arp_sources)} }} accept")
    own6 = [link_local(mac)] + ([endpoint.ipv6.ip] if endpoint.ipv6 is not None else [])
    advertise = f"add rule {TABLE} {name} icmpv6 type nd-neighbor-advert"
    lines += [f"{advertise} @th,64,128 {int(own):#034x} goto {name}6" for own in own6]
    lines.append(f"{advertise} counter drop")
    lines.append(f"add rule {TABLE} {name} goto {name}6")
    sources = ", ".join(["::", *(str(own) for own in own6)])
    lines.append(f"add rule {TABLE} {name}6 ether saddr {mac} ip6 saddr {{ {sources} }} accept")
    lines.append(f"add rule {TABLE} {name}6 counter drop")
    lines.append(f'add element {TABLE} ports {{ "{port}" : goto {name} }}')
    return "\n".join(lines) + "\n"


def remove(endpoint_id: str) -> str:
    """Commands that remove an endpoint; they fail if it isn't there."""
    name, port = chain(endpoint_id), names.host_veth(endpoint_id)
    return (
        f'delete element {TABLE} ports {{ "{port}" }}\n'
        f"flush chain {TABLE} {name}\n"
        f"delete chain {TABLE} {name}\n"
        f"delete chain {TABLE} {name}6\n"
    )


def dropped(namespace: int) -> dict[str, int]:
    """Frames dropped by the filter since the endpoint came, by the endpoint's short ID."""
    try:
        objects = nft.query(f"list table {TABLE}", namespace)
    except KernelError:
        return {}
    counts: dict[str, int] = {}
    for item in objects:
        rule: dict[str, Any] = item.get("rule", {})
        name = str(rule.get("chain", ""))
        if not name.startswith(_CHAIN):
            continue
        identifier = name[len(_CHAIN) : len(_CHAIN) + names.SHORT_ID]
        for expression in rule.get("expr", ()):
            packets = expression.get("counter", {}).get("packets", 0) if expression else 0
            counts[identifier] = counts.get(identifier, 0) + int(packets)
    return counts
