"""The container's interfaces: names, addresses, MAC addresses and MTU."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path
from typing import Any

_SIOCGIFADDR = 0x8915


def interfaces() -> list[dict[str, Any]]:
    """All but the loopback."""
    sixes: dict[str, list[str]] = {}
    try:
        with Path("/proc/net/if_inet6").open() as file:
            for line in file:
                words = line.split()
                # Scope 0x20 is link-local.
                if words[3] != "20":
                    address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0]))
                    sixes.setdefault(words[5], []).append(address)
    except OSError:
        pass
    found = []
    for _, name in socket.if_nameindex():
        if name == "lo":
            continue
        found.append(
            {
                "name": name,
                "ipv4": _ipv4(name),
                "ipv6": sixes.get(name, []),
                "mac": _read(name, "address"),
                "mtu": int(_read(name, "mtu") or 0),
            }
        )
    return found


def interface_of(address: str) -> dict[str, Any]:
    """The interface that has an address. Raises OSError."""
    for each in interfaces():
        if address == each["ipv4"] or address in each["ipv6"]:
            return each
    raise OSError(f"no interface has the address {address}")


def _ipv4(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            request = struct.pack("256s", name.encode()[:15])
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _read(name: str, what: str) -> str:
    try:
        return Path(f"/sys/class/net/{name}/{what}").read_text().strip()
    except OSError:
        return ""
