"""A pool of netlink sockets in one namespace, shared by threads.

A pyroute2 socket serves one request at a time: `Sockets` gives each to one thread at a time and
keeps a few open, since opening one in another namespace costs a thread. `index` doesn't use
netlink, so it doesn't wait for the kernel's lock of all links.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_NEWLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from driver.errors import DOCTOR, TRY_AGAIN, KernelError
from driver.kernel.namespace import in_netns
from driver.kernel.rtnl import Rtnl

T = TypeVar("T")

_SPARE: Final = 16
_DUMP_TRIES: Final = 20
# asm-generic/socket.h; the first is in Python's socket module on some builds only.
_SO_BINDTODEVICE: Final = 25
_SO_BINDTOIFINDEX: Final = 62
_GONE: Final = (errno.ENODEV, errno.ENOENT, errno.ENXIO)

_SIOCETHTOOL: Final = 0x8946  # linux/sockios.h
_IFREQ: Final = struct.Struct("@16sP16x")

_IFLA_IFNAME: Final = 3
_IFLA_STATS64: Final = 23
_HEADER: Final = struct.Struct("=IHHII")
_IFINFO: Final = struct.Struct("=BxHiII")
_ATTRIBUTE: Final = struct.Struct("=HH")
# The first of struct rtnl_link_stats64 (if_link.h).
_COUNTERS: Final = (
    "rx_packets",
    "tx_packets",
    "rx_bytes",
    "tx_bytes",
    "rx_errors",
    "tx_errors",
    "rx_dropped",
    "tx_dropped",
)
_STATS: Final = struct.Struct("=8Q")


def translate(error: NetlinkError, what: str) -> KernelError:
    """Our exception for a request that the kernel refused; `what` names the request."""
    cause = os.strerror(error.code) if error.code > 0 else str(error)
    return KernelError(what, cause=cause, remedy=DOCTOR)


@dataclass(frozen=True, slots=True)
class Link:
    """An interface, with its own counters of bytes and packets since it was made."""

    index: int
    name: str
    counters: dict[str, int]


class Sockets:
    """Netlink sockets of one network namespace. `namespace` is its descriptor, owned by the
    caller."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self._spare: queue.LifoQueue[IPRoute] = queue.LifoQueue(_SPARE)
        self._raw: queue.LifoQueue[Rtnl] = queue.LifoQueue(_SPARE)
        self._closed = False
        self._binding = threading.Lock()
        self._any = in_netns(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    @contextmanager
    def take(self) -> Iterator[IPRoute]:
        """A socket, for the calling thread until the end of the block."""
        try:
            route = self._spare.get_nowait()
        except queue.Empty:
            route = in_netns(self._namespace, IPRoute)
        try:
            yield route
        except NetlinkError:
            self._put_back(route)
            raise
        except BaseException:
            # Part of an answer may still be in the socket.
            route.close()
            raise
        self._put_back(route)

    def _put_back(self, route: IPRoute) -> None:
        if not self._closed:
            try:
                self._spare.put_nowait(route)
                return
            except queue.Full:
                pass
        route.close()

    @contextmanager
    def raw(self) -> Iterator[Rtnl]:
        """The same for messages of `nlmsg`. A request that the kernel refuses raises OSError."""
        try:
            route = self._raw.get_nowait()
        except queue.Empty:
            route = in_netns(self._namespace, Rtnl)
        try:
            yield route
        except TimeoutError:
            # The answer may still come.
            route.close()
            raise
        except OSError:
            self._keep(route)
            raise
        except BaseException:
            route.close()
            raise
        self._keep(route)

    def _keep(self, route: Rtnl) -> None:
        if not self._closed:
            with contextlib.suppress(queue.Full):
                self._raw.put_nowait(route)
                return
        route.close()

    def close(self) -> None:
        """Close what no thread uses; the others when they come back."""
        self._closed = True
        self._any.close()
        with contextlib.suppress(queue.Empty):
            while True:
                self._raw.get_nowait().close()
        while True:
            try:
                self._spare.get_nowait().close()
            except queue.Empty:
                return

    def index(self, name: str) -> int | None:
        """The index of an interface, None if there is none of this name."""
        # Not SIOCGIFINDEX: for an unknown name it starts modprobe (dev_load in the kernel's
        # dev_ioctl.c).
        with self._binding:
            try:
                self._any.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, name.encode())
                return self._any.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX) or None
            except OSError as error:
                if error.errno in _GONE:
                    return None
                raise KernelError(
                    f"looking up {name}", cause=str(error.strerror), remedy=DOCTOR
                ) from error

    def ethtool(self, device: str, request: bytes) -> bytes:
        """The answer to a command of linux/ethtool.h, of the request's length. Raises OSError.

        `device` has to exist: for an unknown name the kernel starts modprobe.
        """
        buffer = ctypes.create_string_buffer(request, len(request))
        asked = _IFREQ.pack(device.encode(), ctypes.addressof(buffer))
        fcntl.ioctl(self._any, _SIOCETHTOOL, asked)
        return buffer.raw

    def delete(self, name: str) -> bool:
        """Delete an interface; false if there is none of this name."""
        index = self.index(name)
        if index is None:
            return False
        with self.take() as route:
            try:
                route.link("del", index=index)
            except NetlinkError as error:
                if error.code not in (*_GONE, errno.EINVAL):
                    raise translate(error, f"removing {name}") from error
        return True

    def links(self) -> list[Link]:
        """All interfaces of the namespace."""

        def ask(route: IPRoute) -> list[Link]:
            found: list[Link] = []

            def parse(data: bytes, offset: int, length: int) -> Any:
                size, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
                if kind != RTM_NEWLINK:
                    return route.marshal.parse_one_message(
                        kind, flags, sequence, data, offset, length
                    )
                found.append(_link(data, offset + _HEADER.size, offset + size))
                header = {"type": kind, "flags": flags, "sequence_number": sequence}
                return {"header": {**header, "error": None}}

            request = ifinfmsg()
            route.nlm_request(
                request, RTM_GETLINK, msg_flags=NLM_F_REQUEST | NLM_F_DUMP, parser=parse
            )
            return found

        return self.dump(ask)

    def dump(self, ask: Callable[[IPRoute], T]) -> T:
        """A consistent listing by `ask`: repeated if the objects change meanwhile
        (NLM_F_DUMP_INTR)."""
        for _ in range(_DUMP_TRIES):
            with self.take() as route:
                try:
                    return ask(route)
                except NetlinkDumpInterrupted:
                    continue
                except NetlinkError as error:
                    raise translate(error, "listing links or forwarding entries") from error
        raise KernelError(
            "listing links",
            cause="they change faster than they can be listed",
            remedy=TRY_AGAIN,
        )


def _link(data: bytes, offset: int, end: int) -> Link:
    """Decode RTM_NEWLINK. pyroute2's decoder costs a hundred times as much, too much for 200
    links."""
    index = _IFINFO.unpack_from(data, offset)[2]
    offset += _IFINFO.size
    name, counters = "", dict.fromkeys(_COUNTERS, 0)
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == _IFLA_IFNAME:
            name = bytes(data[offset + 4 : offset + length - 1]).decode()
        elif kind == _IFLA_STATS64:
            counters = dict(zip(_COUNTERS, _STATS.unpack_from(data, offset + 4), strict=True))
        offset += (length + 3) & ~3
    return Link(index, name, counters)
