"""Which RDMA device of this host carries the underlay, or why none does: `devices.py --address IP` prints it as JSON.

A process of its own, because libibverbs is C code that opens devices: what it does to a process must not be the router's
trouble, and finding nothing must cost nothing. It needs pyverbs and the standard library, nothing else. The device is the one
with a GID that is the underlay's address: RoCE v2, where the GID is the IP address; or InfiniBand, where the address is that
of an IPoIB interface, whose hardware address ends in the port's GID.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final

ROCE: Final = "RoCE v2"
ROCE_V1: Final = "RoCE v1"
INFINIBAND: Final = "InfiniBand"

NO_PYVERBS: Final = "pyverbs is not installed"
NO_DEVICE: Final = "this host has no RDMA device"

IPAddress = IPv4Address | IPv6Address

_SYSFS: Final = Path("/sys/class/infiniband")
_ARPHRD_INFINIBAND: Final = "32"
_GID: Final = 16
"""Bytes, which are also the last ones of an IPoIB interface's hardware address (RFC 4391, section 9.1.1)."""
# linux/rtnetlink.h, linux/if_addr.h
_RTM_NEWADDR: Final = 20
_RTM_GETADDR: Final = 22
_NLMSG_DONE: Final = 3
_NLM_F_DUMP: Final = 0x301
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_MESSAGE: Final = struct.Struct("=IHHII")
_IFADDR: Final = struct.Struct("=BBBBI")
_ATTRIBUTE: Final = struct.Struct("=HH")


@dataclass(frozen=True)
class Gid:
    """An address of a port."""

    index: int
    kind: str
    address: IPv6Address


@dataclass(frozen=True)
class Port:
    """A port of a device that could be opened. `mtu` in bytes."""

    device: str
    number: int
    active: bool
    mtu: int
    gids: tuple[Gid, ...]


@dataclass(frozen=True)
class Unusable:
    """A device, or a port of it, that can't be used."""

    device: str
    port: int
    """0: all."""
    why: str


@dataclass(frozen=True)
class Device:
    """What the relay opens."""

    name: str
    port: int
    gid_index: int
    gid: str
    kind: str
    mtu: int


@dataclass(frozen=True)
class Found:
    """The answer. `why` is empty if there is a device."""

    device: Device | None
    why: str
    looked: tuple[Unusable, ...] = ()


def choose(
    address: IPAddress, ports: Iterable[Port | Unusable], ipoib: frozenset[bytes] = frozenset()
) -> Found:
    """The port that has the underlay's address. `ipoib`: GIDs of InfiniBand interfaces that have it."""
    device: Device | None = None
    looked: list[Unusable] = []
    for port in ports:
        if isinstance(port, Unusable):
            looked.append(port)
            continue
        gid, why = _gid(address, port, ipoib)
        if gid is None:
            looked.append(Unusable(port.device, port.number, why))
        elif device is not None:
            looked.append(Unusable(port.device, port.number, f"{device.name} is used"))
        else:
            device = Device(
                port.device, port.number, gid.index, str(gid.address), gid.kind, port.mtu
            )
    if device is not None:
        return Found(device, "", tuple(looked))
    if not looked:
        return Found(None, NO_DEVICE)
    first = looked[0]
    more = "" if len(looked) == 1 else f" ({len(looked) - 1} more: freeflow doctor)"
    return Found(None, f"{first.device}: {first.why}{more}", tuple(looked))


def _gid(address: IPAddress, port: Port, ipoib: frozenset[bytes]) -> tuple[Gid | None, str]:
    if not port.active:
        return None, f"port {port.number} is not active"
    mapped = IPv6Address(f"::ffff:{address}") if address.version == 4 else address
    old = False
    for gid in port.gids:
        if gid.kind == ROCE and gid.address == mapped:
            return gid, ""
        if gid.kind == INFINIBAND and gid.address.packed in ipoib:
            return gid, ""
        old = old or (gid.kind == ROCE_V1 and gid.address == mapped)
    if old:
        return None, f"it has {address} for RoCE v1 only"
    return None, f"port {port.number} doesn't have the underlay's address {address}"


def _ports() -> Iterator[Port | Unusable]:
    """What libibverbs knows. Raises ImportError."""
    import pyverbs.device as verbs
    from pyverbs.pyverbs_error import PyverbsError

    try:
        import pyverbs.libibverbs_enums as enums
    except ImportError:
        # Its name up to rdma-core 52.
        import pyverbs.enums as enums

    try:
        devices = verbs.get_device_list()
    except PyverbsError:
        # Also how a kernel without InfiniBand looks. What the kernel has and libibverbs doesn't is said below.
        devices = []
    names = [each.name.decode() for each in devices]
    for name in names:
        try:
            context = verbs.Context(name=name)
        except PyverbsError as error:
            yield Unusable(name, 0, f"it can't be opened ({_short(error)})")
            continue
        try:
            yield from _of_device(name, context, enums)
        except PyverbsError as error:
            yield Unusable(name, 0, f"it can't be asked ({_short(error)})")
        finally:
            context.close()
    for missing in sorted(_kernels() - set(names)):
        yield Unusable(
            missing,
            0,
            "the kernel has it, libibverbs doesn't: is ib_uverbs loaded, is there a provider?",
        )


def _of_device(name: str, context: Any, enums: Any) -> Iterator[Port]:
    kinds = {
        enums.IBV_GID_TYPE_IB: INFINIBAND,
        enums.IBV_GID_TYPE_ROCE_V1: ROCE_V1,
        enums.IBV_GID_TYPE_ROCE_V2: ROCE,
    }
    ports = range(1, context.query_device().phys_port_cnt + 1)
    attributes = {number: context.query_port(number) for number in ports}
    most = sum(each.gid_tbl_len for each in attributes.values())
    gids = context.query_gid_table(most) if most else []
    for number, attribute in attributes.items():
        yield Port(
            name,
            number,
            attribute.state == enums.IBV_PORT_ACTIVE,
            128 << attribute.active_mtu,
            tuple(
                Gid(each.gid_index, kinds[each.gid_type], IPv6Address(each.gid_str()))
                for each in gids
                if each.port_num == number and each.gid_type in kinds
            ),
        )


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(". ")[:120]


def _kernels() -> set[str]:
    try:
        return {each.name for each in _SYSFS.iterdir()}
    except OSError:
        return set()


def ipoib_gids(address: IPAddress, sysfs: Path = Path("/sys/class/net")) -> frozenset[bytes]:
    """GIDs of the InfiniBand interfaces of this namespace that have an address."""
    found = set()
    for index in _interfaces(address):
        try:
            folder = sysfs / socket.if_indextoname(index)
            if (folder / "type").read_text().strip() != _ARPHRD_INFINIBAND:
                continue
            hardware = bytes.fromhex((folder / "address").read_text().strip().replace(":", ""))
        except (OSError, ValueError):
            continue
        found.add(hardware[-_GID:])
    return frozenset(found)


def _interfaces(address: IPAddress) -> set[int]:
    """Indices of the interfaces that have an address: rtnetlink(7), by hand, since this process has no library for it."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    found = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        size = _MESSAGE.size + _IFADDR.size
        route.send(
            _MESSAGE.pack(size, _RTM_GETADDR, _NLM_F_DUMP, 1, 0) + _IFADDR.pack(family, 0, 0, 0, 0)
        )
        while True:
            data = route.recv(1 << 16)
            offset = 0
            while offset + _MESSAGE.size <= len(data):
                length, kind, *_ = _MESSAGE.unpack_from(data, offset)
                if kind == _RTM_NEWADDR and address in _addresses(data[offset : offset + length]):
                    found.add(_IFADDR.unpack_from(data, offset + _MESSAGE.size)[4])
                elif kind != _RTM_NEWADDR:
                    # NLMSG_DONE, or an error.
                    return found
                offset += max(_MESSAGE.size, (length + 3) & ~3)


def _addresses(message: bytes) -> set[IPAddress]:
    found: set[IPAddress] = set()
    offset = _MESSAGE.size + _IFADDR.size
    while offset + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind in (_IFA_ADDRESS, _IFA_LOCAL):
            found.add(ip_address(message[offset + _ATTRIBUTE.size : offset + length]))
        offset += (length + 3) & ~3
    return found


def find(address: IPAddress, ports: Callable[[], Iterable[Port | Unusable]] = _ports) -> Found:
    """Look."""
    try:
        return choose(address, ports(), ipoib_gids(address))
    except ImportError:
        return Found(None, NO_PYVERBS)


def encode(found: Found) -> str:
    """As the router reads it."""
    return json.dumps(dataclasses.asdict(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(prog="freeflow-devices", description="Looks for RDMA devices.")
    parser.add_argument("--address", required=True, type=ip_address, help="the underlay's")
    print(encode(find(parser.parse_args(arguments).address)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
