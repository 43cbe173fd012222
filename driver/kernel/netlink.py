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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final, Generic, Protocol, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver.errors import DOCTOR, KernelError, reporting
from driver.kernel.namespace import in_netns
from driver.kernel.rtnl import NetDevice, Rtnl

_SPARE: Final = 16
# asm-generic/socket.h; the first is in Python's socket module on some builds only.
_SO_BINDTODEVICE: Final = 25
_SO_BINDTOIFINDEX: Final = 62
_SIOCETHTOOL: Final = 0x8946
"""linux/sockios.h."""
_IFREQ: Final = struct.Struct("@16sP16x")
_GONE: Final = (errno.ENODEV, errno.ENOENT, errno.ENXIO)


def translate(error: NetlinkError, what: str) -> KernelError:
    """Our exception for a request that the kernel refused; `what` names the request."""
    cause = os.strerror(error.code) if error.code > 0 else str(error)
    return KernelError(what, cause=cause, remedy=DOCTOR)


@contextmanager
def requesting(what: str, *, ignore: Collection[int] = ()) -> Iterator[None]:
    """As `errors.reporting`, for requests by pyroute2."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in ignore:
            raise translate(error, what) from error


class _Closable(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=_Closable)


class _Pool(Generic[S]):
    """Sockets of one namespace. `refusal`: after this exception the socket can be used again."""

    def __init__(self, namespace: int, make: Callable[[], S], refusal: type[Exception]) -> None:
        self._namespace = namespace
        self._make = make
        self._refusal = refusal
        self._spare: queue.LifoQueue[S] = queue.LifoQueue(_SPARE)
        self._closed = False

    @contextmanager
    def take(self) -> Iterator[S]:
        """A socket, for the calling thread until the end of the block."""
        try:
            taken = self._spare.get_nowait()
        except queue.Empty:
            taken = in_netns(self._namespace, self._make)
        whole = False
        try:
            yield taken
            whole = True
        except self._refusal as error:
            whole = not isinstance(error, TimeoutError)
            raise
        finally:
            # Part of an answer may still be in the socket, or come later.
            if not (whole and self._put_back(taken)):
                taken.close()

    def _put_back(self, taken: S) -> bool:
        with contextlib.suppress(queue.Full):
            if not self._closed:
                self._spare.put_nowait(taken)
                return True
        return False

    def close(self) -> None:
        """Close what no thread uses; the others when they come back."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._spare.get_nowait().close()


class Sockets:
    """Netlink sockets of one network namespace. `namespace` is its descriptor, owned by the
    caller.

    `take` gives a socket of pyroute2. `raw` gives one for messages of `nlmsg`: a request that the
    kernel refuses raises OSError there.
    """

    def __init__(self, namespace: int) -> None:
        self._routes = _Pool(namespace, IPRoute, NetlinkError)
        self._raw = _Pool(namespace, Rtnl, OSError)
        self.take = self._routes.take
        self.raw = self._raw.take
        self._binding = threading.Lock()
        self._any = in_netns(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    def close(self) -> None:
        """Close what no thread uses; the others when they come back."""
        self._any.close()
        self._raw.close()
        self._routes.close()

    def index(self, name: str) -> int | None:
        """The index of an interface, None if there is none of this name."""
        # Not SIOCGIFINDEX: for an unknown name it starts modprobe (dev_load in the kernel's
        # dev_ioctl.c).
        with self._binding, reporting(f"looking up {name}", ignore=_GONE):
            self._any.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, name.encode())
            return self._any.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX) or None
        return None

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
        with requesting(f"removing {name}", ignore=(*_GONE, errno.EINVAL)), self.take() as route:
            route.link("del", index=index)
        return True

    def links(self) -> list[NetDevice]:
        """All interfaces of the namespace."""
        with reporting("listing links"), self.raw() as netlink:
            return netlink.links()
