"""The kernel's table of a container's TCP sockets, by sock_diag(7) in the container's namespace.

A netlink socket belongs to the namespace that it was made in, so one is kept per namespace. It is
closed after a while without use, since it keeps the namespace of an ended container alive. pyroute2
isn't used: decoding one reply with it takes longer than the rest of pairing a connection, and
importing it as long as the router's start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from dataplane.control import ANY_DEVICE
from dataplane.errors import KernelRefused
from dataplane.nlmsg import DONE, DUMP, ERROR, Netlink
from dataplane.router import tcp_counters
from dataplane.router.bridge_netfilter import has_tables, is_filtered
from dataplane.router.conntrack import Conntrack
from dataplane.router.library_wire import Address, IPAddress, ip_of
from dataplane.router.local_addresses import LocalAddresses
from dataplane.router.netlink_socket import netlink_in, netlink_in_each
from dataplane.router.seams import SocketEnd
from dataplane.router.tcp_counters import INFO_WANTED, TcpCounters

NETLINK_SOCK_DIAG: Final = 4
SIOCGSKNS: Final = 0x894C
"""The network namespace of a socket, as a descriptor (linux/sockios.h)."""
KEEP: Final = 10.0
"""Seconds that an unused netlink socket is kept."""

SOCK_DIAG_BY_FAMILY: Final = 20
"""linux/sock_diag.h."""
_SOCK_DIAG: Final = "sock_diag"

# Plain numbers: calculating with the socket module's is slow.
_AF_INET: Final = int(socket.AF_INET)
_AF_INET6: Final = int(socket.AF_INET6)
_IPPROTO_TCP: Final = int(socket.IPPROTO_TCP)

# struct inet_diag_req_v2: family, protocol, extensions, padding, states;
# then struct inet_diag_sockid.
_REQUEST: Final = struct.Struct("=BBBxI")
_ID: Final = struct.Struct("!HH16s16s")
_ID_REST: Final = struct.Struct("=IQ")
# struct inet_diag_msg: family, state, …, the sockid at _ID_OFFSET, …, the inode at the end.
_STATE: Final = struct.Struct("=BB")
_INODE: Final = struct.Struct("=I")
_ID_OFFSET: Final = 4
_INODE_OFFSET: Final = _ID_OFFSET + _ID.size + _ID_REST.size + 16
_MESSAGE_SIZE: Final = _INODE_OFFSET + _INODE.size
_NO_COOKIE: Final = (1 << 64) - 1
AT_ONCE: Final = 32
"""Sockets whose counters are requested at once: the replies have to fit into a socket's buffer."""

ESTABLISHED: Final = 1
FIN_WAIT1: Final = 4
FIN_WAIT2: Final = 5
CLOSE_WAIT: Final = 8
LISTEN: Final = 10
OPEN: Final = frozenset({ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT})
"""States (net/tcp_states.h) in which bytes may still move in one direction."""
_OPEN_MASK: Final = sum(1 << state for state in OPEN)

T = TypeVar("T")


class TcpSocket(msgspec.Struct, frozen=True, gc=False):
    """A connected socket."""

    local: Address
    remote: Address
    cookie: int
    inode: int
    """0: no process has the socket any more; the kernel is closing it."""
    counters: TcpCounters | None = None
    """If they were requested."""


class Diag:
    """Looks up the sockets of one namespace, through a sock_diag socket in it."""

    def __init__(self, channel: socket.socket) -> None:
        self._netlink = Netlink(channel)

    def close(self) -> None:
        """Release the namespace."""
        self._netlink.close()

    def state(self, local: Address, remote: Address, cookie: int | None = None) -> int | None:
        """The state of the socket with these addresses, and this cookie if one is given.

        None: there is no such socket.

        Raises:
            KernelRefused: the kernel doesn't answer.
        """
        body = self._body(local, remote, _NO_COOKIE if cookie is None else cookie)
        # A listener answers for addresses that no connection has.
        return None if body is None or body[1] == LISTEN else body[1]

    def is_held(self, local: Address, remote: Address, cookie: int) -> bool:
        """Whether a process has the socket. If none has, the kernel is closing it.

        Raises:
            KernelRefused: the kernel doesn't answer.
        """
        body = self._body(local, remote, cookie)
        return body is not None and bool(_read(body).inode)

    def _body(self, local: Address, remote: Address, cookie: int) -> bytes | None:
        try:
            return self._netlink.get(SOCK_DIAG_BY_FAMILY, _question(local, remote, cookie))
        except OSError as error:
            # ESTALE: there is a socket with another cookie.
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None
            raise KernelRefused(
                f"cannot look up the socket {local} → {remote}", cause=error.strerror or str(error)
            ) from error

    def counters(self, ends: Sequence[SocketEnd]) -> list[TcpCounters | None]:
        """The counters of connections, `AT_ONCE` at most; None: no process has an open
        socket with this cookie.

        Raises:
            KernelRefused: the kernel doesn't answer.
        """
        assert len(ends) <= AT_ONCE
        requests = [_question(*end, INFO_WANTED) for end in ends]
        try:
            answers = self._netlink.get_each(SOCK_DIAG_BY_FAMILY, requests)
        except OSError as error:
            raise KernelRefused("cannot list TCP sockets", cause=str(error)) from error
        return [None if body is None else _counters(body) for body in answers]

    def connected(self, wanted: int = 0) -> Iterator[TcpSocket | None]:
        """All connected TCP sockets; a None now and then, where the caller may do other work.

        `wanted`: INFO_WANTED, for those with their counters, or 0.

        Raises:
            KernelRefused: the kernel doesn't answer.
        """
        for family in (socket.AF_INET, socket.AF_INET6):
            request = _REQUEST.pack(family, socket.IPPROTO_TCP, wanted, _OPEN_MASK) + bytes(48)
            try:
                yield from self._list(request, wanted)
            except OSError as error:
                raise KernelRefused("cannot list TCP sockets", cause=str(error)) from error

    def _list(self, request: bytes, wanted: int) -> Iterator[TcpSocket | None]:
        self._netlink.send(SOCK_DIAG_BY_FAMILY, DUMP, request)
        while True:
            for kind, _, body in self._netlink.receive():
                if kind == SOCK_DIAG_BY_FAMILY:
                    yield _read(body, wanted)
                elif kind in (DONE, ERROR):
                    # An error: no IPv6 here.
                    yield None
                    return
            yield None


def diag_in(namespace: int) -> Diag:
    """For the namespace of a descriptor, which stays the caller's. Raises KernelRefused."""
    return Diag(netlink_in(namespace, NETLINK_SOCK_DIAG, _SOCK_DIAG))


def _question(local: Address, remote: Address, cookie: int, wanted: int = 0) -> bytes:
    family = _AF_INET if local.ip.version == 4 else _AF_INET6
    return b"".join(
        (
            _REQUEST.pack(family, _IPPROTO_TCP, wanted, 0),
            _ID.pack(local.port, remote.port, local.ip.packed, remote.ip.packed),
            _ID_REST.pack(0, cookie),
        )
    )


def _counters(body: bytes) -> TcpCounters | None:
    if body[1] not in OPEN or not any(_INODE.unpack_from(body, _INODE_OFFSET)):
        return None
    return tcp_counters.find(body[_MESSAGE_SIZE:])


def _read(body: bytes, wanted: int = 0) -> TcpSocket:
    """struct inet_diag_msg."""
    family, _ = _STATE.unpack_from(body)
    local_port, remote_port, local, remote = _ID.unpack_from(body, _ID_OFFSET)
    _, cookie = _ID_REST.unpack_from(body, _ID_OFFSET + _ID.size)
    (inode,) = _INODE.unpack_from(body, _INODE_OFFSET)
    return TcpSocket(
        local=Address(ip_of(family, local), local_port),
        remote=Address(ip_of(family, remote), remote_port),
        cookie=cookie,
        inode=inode,
        counters=tcp_counters.find(body[_MESSAGE_SIZE:]) if wanted else None,
    )


class Namespaces:
    """Namespaces by inode: a descriptor of each that has clients, and netlink sockets in them."""

    def __init__(self, path_of: Callable[[int], Path | None], clock: Callable[[], float]) -> None:
        self._path_of = path_of
        self._clock = clock
        self._held: dict[int, list[int]] = {}
        self._diags: dict[int, tuple[Diag, float]] = {}
        self._tracks: dict[int, tuple[Conntrack, float]] = {}
        self._addresses: dict[int, tuple[LocalAddresses, float]] = {}
        self.own = self.hold(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        """The host's own namespace, which is this process's."""

    def hold(self, descriptor: int) -> int:
        """Take over a namespace's descriptor. Its inode, to be released as often as it was held."""
        inode = os.fstat(descriptor).st_ino
        held = self._held.get(inode)
        if held is None:
            self._held[inode] = [descriptor, 1]
        else:
            held[1] += 1
            os.close(descriptor)
        return inode

    def is_listed(self, inode: int) -> bool:
        """Whether the path of a namespace, as the driver's snapshot has it, still leads to it."""
        path = self._path_of(inode)
        try:
            return path is not None and path.stat().st_ino == inode
        except OSError:
            return False

    def release(self, inode: int) -> None:
        """Release a namespace; the last release closes it."""
        held = self._held[inode]
        held[1] -= 1
        if not held[1]:
            del self._held[inode]
            os.close(held[0])
            self._drop(inode)

    def diag(self, inode: int) -> Diag:
        """The sockets of a namespace. Raises KernelRefused."""
        return self._kept(self._diags, inode, diag_in)

    @contextlib.contextmanager
    def lists(self, inodes: Sequence[int]) -> Iterator[dict[int, Diag]]:
        """A netlink socket in each of these namespaces that can be entered, for one list of each.

        A list is read in steps, and `diag` is used in between.
        """
        with contextlib.ExitStack() as stack:
            held: dict[int, int] = {}
            for inode in inodes:
                with contextlib.suppress(KernelRefused):
                    held[inode] = stack.enter_context(self._descriptor(inode))
            made = netlink_in_each(tuple(held.values()), NETLINK_SOCK_DIAG, _SOCK_DIAG)
        diags = {
            inode: Diag(channel)
            for inode, channel in zip(held, made, strict=True)
            if isinstance(channel, socket.socket)
        }
        try:
            yield diags
        finally:
            for diag in diags.values():
                diag.close()

    def conntrack(self, inode: int) -> Conntrack:
        """The translated connections of a namespace. Raises KernelRefused."""
        return self._kept(self._tracks, inode, Conntrack)

    def addresses(self, inode: int) -> LocalAddresses:
        """The addresses of a namespace. Raises KernelRefused."""
        return self._kept(self._addresses, inode, LocalAddresses)

    def _kept(self, of: dict[int, tuple[T, float]], inode: int, kind: Callable[[int], T]) -> T:
        known = of.get(inode)
        opened = known[0] if known is not None else self._open(inode, kind)
        of[inode] = (opened, self._clock())
        return opened

    def _open(self, inode: int, kind: Callable[[int], T]) -> T:
        with self._descriptor(inode) as descriptor:
            return kind(descriptor)

    @contextlib.contextmanager
    def _descriptor(self, inode: int) -> Iterator[int]:
        """A descriptor of a namespace, only for this block. Raises KernelRefused."""
        held = self._held.get(inode)
        if held is not None:
            yield held[0]
            return
        path = self._path_of(inode)
        if path is None:
            raise KernelRefused(
                f"namespace {inode} is unknown", cause="its container may have ended"
            )
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelRefused(
                f"cannot open the namespace {path}", cause=error.strerror or str(error)
            ) from error
        try:
            if os.fstat(descriptor).st_ino != inode:
                raise KernelRefused(
                    f"cannot open the namespace {path}", cause="it is another one by now"
                )
            yield descriptor
        finally:
            os.close(descriptor)

    def _drop(self, inode: int) -> None:
        for of in (self._diags, self._tracks, self._addresses):
            known = of.pop(inode, None)
            if known is not None:
                known[0].close()

    def tidy(self) -> None:
        """Close netlink sockets that were not used for a while."""
        limit = self._clock() - KEEP
        for of in (self._diags, self._tracks, self._addresses):
            for inode in [inode for inode, (_, used) in of.items() if used < limit]:
                of.pop(inode)[0].close()

    def close(self) -> None:
        """Close everything."""
        for inode in [*self._diags, *self._tracks, *self._addresses]:
            self._drop(inode)
        for descriptor, _ in self._held.values():
            os.close(descriptor)
        self._held.clear()


class LinuxSocketTable:
    """The `SocketTable` of this kernel. If the kernel doesn't answer, there is no socket."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    def is_open(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        return self._state(namespace, local, remote, cookie) in OPEN

    def exists(self, namespace: int, local: Address, remote: Address) -> bool:
        return self._state(namespace, local, remote, None) is not None

    def is_held(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        if local.ip.version != remote.ip.version or cookie == _NO_COOKIE:
            return False
        try:
            return self._namespaces.diag(namespace).is_held(local, remote, cookie)
        except KernelRefused:
            return False

    def counters(self, namespace: int, ends: Sequence[SocketEnd]) -> list[TcpCounters | None]:
        try:
            return self._namespaces.diag(namespace).counters(ends)
        except KernelRefused:
            return [None] * len(ends)

    def translated(
        self, namespace: int, local: Address, remote: Address
    ) -> tuple[Address, Address] | None:
        try:
            return self._namespaces.conntrack(namespace).translated(local, remote)
        except KernelRefused:
            return None

    def is_translated(self, namespace: int, local: Address, remote: Address) -> bool:
        try:
            entry = self._namespaces.conntrack(namespace).find(local, remote)
        except KernelRefused:
            return True
        return entry is not None and entry.is_translated

    def is_listed(self, namespace: int) -> bool:
        return self._namespaces.is_listed(namespace)

    def has_address(self, namespace: int, ip: IPAddress) -> bool:
        try:
            return ip in self._namespaces.addresses(namespace)
        except KernelRefused:
            return False

    def is_carried(self, bridge: str, local: Address, remote: Address, *, trusted: bool) -> bool:
        host = self._namespaces.own
        try:
            diag, track = self._namespaces.diag(host), self._namespaces.conntrack(host)
            # A proxy of the host's may have taken over both addresses (IP_TRANSPARENT).
            ends = ((local, remote), (remote, local))
            if any(diag.state(*end) is not None for end in ends):
                return False
            known = [entry for end in ends if (entry := track.find(*end)) is not None]
        except KernelRefused:
            return False
        if any(entry.is_translated for entry in known):
            return False
        # Two containers that rules keep apart could make sockets that claim to be connected. Rules
        # for IP have let pass what connection tracking knows; others don't tell.
        if trusted or any(entry.established for entry in known):
            return True
        if bridge == ANY_DEVICE:
            return False
        return not (is_filtered(bridge, local.ip.version) or has_tables())

    def _state(
        self, namespace: int, local: Address, remote: Address, cookie: int | None
    ) -> int | None:
        if local.ip.version != remote.ip.version or cookie == _NO_COOKIE:
            return None
        try:
            return self._namespaces.diag(namespace).state(local, remote, cookie)
        except KernelRefused:
            return None
