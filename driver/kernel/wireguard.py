"""WireGuard devices of one network namespace, over generic netlink.

A private key is written to the kernel and never read, logged or stored: what the kernel answers
with it is dropped here.
"""

from __future__ import annotations

import base64
import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Final, Protocol

from pyroute2 import WireGuard
from pyroute2.netlink.exceptions import NetlinkError

from driver.errors import KernelError, reporting
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import requesting
from driver.model import IPAddress, IPNetwork

KEEPALIVE: Final = 25
"""Seconds between packets of an idle peer. So there is always a recent handshake: a key that will
be used later is known to work, and status can tell whether the ports are open."""
LACKING: Final = (errno.EOPNOTSUPP, errno.ENOENT, errno.EPROTONOSUPPORT)
"""What the kernel answers if it has no WireGuard."""
_NO_KEY: Final = base64.b64encode(bytes(32)).decode()


@dataclass(frozen=True, slots=True)
class WireGuardPeer:
    """A peer of a device: packets to `inner` are encrypted for `key`, and only packets from there
    are accepted of it."""

    key: str
    endpoint: IPAddress
    port: int
    inner: IPv6Address


@dataclass(frozen=True, slots=True)
class PeerState:
    """A peer as the kernel has it. `handshake`: time of the last one, 0 without."""

    endpoint: tuple[str, int] | None
    allowed: frozenset[IPNetwork]
    handshake: float
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device as the kernel has it. `key` is the public one, "" without; peers by their keys."""

    key: str
    port: int
    peers: dict[str, PeerState]


class WireGuardDevices(Protocol):
    """Implemented by `WireGuardSocket`. Raises KernelError."""

    def state(self, name: str) -> DeviceState: ...

    def set_key(self, name: str, private: bytes) -> None: ...

    def set_port(self, name: str, port: int) -> None: ...

    def put(self, name: str, peer: WireGuardPeer) -> None: ...

    def drop(self, name: str, key: str) -> None: ...

    def close(self) -> None: ...


def no_wireguard() -> KernelError:
    """What is raised on a kernel without WireGuard."""
    return KernelError(
        "encrypted networks are not possible on this host",
        cause="its kernel has no WireGuard",
        remedy="use a kernel that has it (CONFIG_WIREGUARD; modprobe wireguard tells why it isn't "
        "loaded), or run the container on another host",
    )


class WireGuardSocket:
    """`WireGuardDevices` of a namespace. Safe from any thread."""

    def __init__(self, namespace: int) -> None:
        self._lock = threading.Lock()
        try:
            self._netlink = in_netns(namespace, WireGuard)
        except NetlinkError as error:
            if error.code in LACKING:
                raise no_wireguard() from error
            raise KernelError("WireGuard's netlink can't be opened", cause=str(error)) from error

    @contextmanager
    def _requesting(self, what: str) -> Iterator[Any]:
        with self._lock, requesting(what), reporting(what):
            yield self._netlink

    def state(self, name: str) -> DeviceState:
        """A device and its peers."""
        with self._requesting(f"reading WireGuard device {name}") as netlink:
            messages = list(netlink.info(name))
        peers: dict[str, PeerState] = {}
        for message in messages:
            for peer in message.get_attr("WGDEVICE_A_PEERS") or ():
                peers[_text(peer.get_attr("WGPEER_A_PUBLIC_KEY"))] = _peer(peer)
        first = messages[0]
        key = first.get_attr("WGDEVICE_A_PUBLIC_KEY")
        text = "" if key is None else _text(key)
        port = first.get_attr("WGDEVICE_A_LISTEN_PORT") or 0
        return DeviceState("" if text == _NO_KEY else text, port, peers)

    def set_key(self, name: str, private: bytes) -> None:
        with self._requesting(f"setting the key of {name}") as netlink:
            netlink.set(name, private_key=base64.b64encode(private))

    def set_port(self, name: str, port: int) -> None:
        with self._requesting(f"setting UDP port {port} of {name}") as netlink:
            netlink.set(name, listen_port=port)

    def put(self, name: str, peer: WireGuardPeer) -> None:
        """Add or change a peer; an address that another peer had is taken from it."""
        with self._requesting(f"setting peer {peer.endpoint} of {name}") as netlink:
            netlink.set(
                name,
                peer={
                    "public_key": peer.key.encode(),
                    "endpoint_addr": str(peer.endpoint),
                    "endpoint_port": peer.port,
                    "persistent_keepalive": KEEPALIVE,
                    "allowed_ips": [f"{peer.inner}/128"],
                },
            )

    def drop(self, name: str, key: str) -> None:
        with self._requesting(f"removing a peer of {name}") as netlink:
            netlink.set(name, peer={"public_key": key.encode(), "remove": True})

    def close(self) -> None:
        with self._lock:
            self._netlink.close()


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _peer(peer: Any) -> PeerState:
    endpoint = peer.get_attr("WGPEER_A_ENDPOINT")
    handshake = peer.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME")
    return PeerState(
        endpoint=None
        if endpoint is None
        else (str(ip_address(endpoint["addr"])), int(endpoint["port"])),
        allowed=frozenset(
            ip_network(item["addr"]) for item in peer.get_attr("WGPEER_A_ALLOWEDIPS") or ()
        ),
        handshake=0.0 if handshake is None else handshake["tv_sec"] + handshake["tv_nsec"] / 1e9,
        received=int(peer.get_attr("WGPEER_A_RX_BYTES") or 0),
        sent=int(peer.get_attr("WGPEER_A_TX_BYTES") or 0),
    )


Opener = Callable[[int], WireGuardDevices]
"""Opens the devices of a namespace, given by its descriptor."""
