"""Scans for the RDMA device of the underlay: `devices.py --address IP` prints it, or why there is
none, as JSON.

It runs in a process of its own, because libibverbs is C code that opens devices: a crash or a hang
there must not reach the router. It needs only pyverbs and the standard library. The device has a
GID that belongs to the underlay's address. With RoCE v2 the GID is the IP address. With InfiniBand
the address is that of an IPoIB interface, whose hardware address ends in the port's GID.
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
"""Bytes, which are also the last ones of an IPoIB interface's hardware address (RFC 4391, section
9.1.1).
"""
# linux/rtnetlink.h, linux/if_addr.h
_RTM_NEWADDR: Final = 20
_RTM_GETADDR: Final = 22
_NLM_F_DUMP: Final = 0x301
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_MESSAGE: Final = struct.Struct("=IHHII")
_IFADDR: Final = struct.Struct("=BBBBI")
_ATTRIBUTE: Final = struct.Struct("=HH")


@dataclass(frozen=True)
class Gid:
    """An entry of a port's GID table."""

    index: int
    kind: str
    address: IPv6Address


@dataclass(frozen=True)
class DevicePort:
    """A port of a device that can be opened. `mtu` is in bytes."""

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
    """The device that the relay opens. `mtu` is in bytes."""

    name: str
    port: int
    gid_index: int
    gid: str
    kind: str
    mtu: int

    def __str__(self) -> str:
        gid = ip_address(self.gid)
        mapped = gid.ipv4_mapped if isinstance(gid, IPv6Address) else None
        return f"{self.name} port {self.port}, {self.kind} {mapped or gid} (GID {self.gid_index})"


@dataclass(frozen=True)
class DeviceScan:
    """The result of a scan. `why` is empty if there is a device. `unusable`: the others, if any."""

    device: Device | None
    why: str
    unusable: tuple[Unusable, ...] = ()


def choose(
    address: IPAddress,
    ports: Iterable[DevicePort | Unusable],
    ipoib: frozenset[bytes] = frozenset(),
) -> DeviceScan:
    """The first port with the underlay's address. `ipoib`: the GIDs of IPoIB interfaces with it."""
    device: Device | None = None
    unusable: list[Unusable] = []
    for port in ports:
        if isinstance(port, Unusable):
            unusable.append(port)
            continue
        gid, why = _gid(address, port, ipoib)
        if gid is None:
            unusable.append(Unusable(port.device, port.number, why))
        elif device is not None:
            unusable.append(Unusable(port.device, port.number, f"{device.name} is used"))
        else:
            device = Device(
                port.device, port.number, gid.index, str(gid.address), gid.kind, port.mtu
            )
    if device is not None:
        return DeviceScan(device, "", tuple(unusable))
    if not unusable:
        return DeviceScan(None, NO_DEVICE)
    first = unusable[0]
    more = "" if len(unusable) == 1 else f" ({len(unusable) - 1} more: freeflow doctor)"
    return DeviceScan(None, f"{first.device}: {first.why}{more}", tuple(unusable))


def _gid(address: IPAddress, port: DevicePort, ipoib: frozenset[bytes]) -> tuple[Gid | None, str]:
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


def _ports() -> Iterator[DevicePort | Unusable]:
    """The ports of all devices.

    Raises:
        ImportError: pyverbs is not installed.
    """
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
        # Also raised if the kernel has no InfiniBand. Devices that only the kernel knows are added
        # below.
        devices = []
    names = [device.name.decode() for device in devices]
    for name in names:
        try:
            context = verbs.Context(name=name)
        except PyverbsError as error:
            yield Unusable(name, 0, f"it can't be opened ({_short(error)})")
            continue
        try:
            yield from _of_device(name, context, enums)
        except PyverbsError as error:
            yield Unusable(name, 0, f"it can't be queried ({_short(error)})")
        finally:
            context.close()
    for missing in sorted(_in_kernel() - set(names)):
        yield Unusable(
            missing,
            0,
            "the kernel has it, libibverbs doesn't: load ib_uverbs, install its libibverbs provider",
        )


def _of_device(name: str, context: Any, enums: Any) -> Iterator[DevicePort]:
    kinds = {
        enums.IBV_GID_TYPE_IB: INFINIBAND,
        enums.IBV_GID_TYPE_ROCE_V1: ROCE_V1,
        enums.IBV_GID_TYPE_ROCE_V2: ROCE,
    }
    ports = range(1, context.query_device().phys_port_cnt + 1)
    attributes = {number: context.query_port(number) for number in ports}
    most = sum(attribute.gid_tbl_len for attribute in attributes.values())
    gids = context.query_gid_table(most) if most else []
    for number, attribute in attributes.items():
        yield DevicePort(
            name,
            number,
            attribute.state == enums.IBV_PORT_ACTIVE,
            128 << attribute.active_mtu,
            tuple(
                Gid(gid.gid_index, kinds[gid.gid_type], IPv6Address(gid.gid_str()))
                for gid in gids
                if gid.port_num == number and gid.gid_type in kinds
            ),
        )


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(". ")[:120]


def _in_kernel() -> set[str]:
    try:
        return {entry.name for entry in _SYSFS.iterdir()}
    except OSError:
        return set()


def ipoib_gids(address: IPAddress, sysfs: Path = Path("/sys/class/net")) -> frozenset[bytes]:
    """The GIDs of the IPoIB interfaces in this network namespace that have an address."""
    gids = set()
    for index in _interfaces(address):
        try:
            folder = sysfs / socket.if_indextoname(index)
            if (folder / "type").read_text().strip() != _ARPHRD_INFINIBAND:
                continue
            hardware = bytes.fromhex((folder / "address").read_text().strip().replace(":", ""))
        except (OSError, ValueError):
            continue
        gids.add(hardware[-_GID:])
    return frozenset(gids)


def _interfaces(address: IPAddress) -> set[int]:
    """The indices of the interfaces that have an address.

    Speaks rtnetlink(7) by hand, since this process has no library for it.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    indices = set()
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
                    indices.add(_IFADDR.unpack_from(data, offset + _MESSAGE.size)[4])
                elif kind != _RTM_NEWADDR:
                    # NLMSG_DONE, or an error.
                    return indices
                offset += max(_MESSAGE.size, (length + 3) & ~3)


def _addresses(message: bytes) -> set[IPAddress]:
    addresses: set[IPAddress] = set()
    offset = _MESSAGE.size + _IFADDR.size
    while offset + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind in (_IFA_ADDRESS, _IFA_LOCAL):
            addresses.add(ip_address(message[offset + _ATTRIBUTE.size : offset + length]))
        offset += (length + 3) & ~3
    return addresses


def find(
    address: IPAddress, ports: Callable[[], Iterable[DevicePort | Unusable]] = _ports
) -> DeviceScan:
    """Scan for the device of an address."""
    try:
        return choose(address, ports(), ipoib_gids(address))
    except ImportError:
        return DeviceScan(None, NO_PYVERBS)


def encode(result: DeviceScan) -> str:
    """A result as JSON, which `device_scanner.decode` reads."""
    return json.dumps(dataclasses.asdict(result))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result of a scan."""
    parser = argparse.ArgumentParser(
        prog="freeflow-devices", description="Scan for the RDMA device of an address."
    )
    parser.add_argument(
        "--address", required=True, type=ip_address, help="the underlay's IP address"
    )
    print(encode(find(parser.parse_args(arguments).address)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
