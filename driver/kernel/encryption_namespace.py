"""The encryption namespace: what is routed there leaves this host encrypted, or not at all.

It has two WireGuard devices, a route that leads to one of them, and nothing else. The VXLAN devices
of encrypted networks are made in it and moved to the overlay namespace, so their packets are routed
here whatever fails: without a device, a key or a peer they are dropped. Only the UDP sockets of the
WireGuard devices are in the host's namespace.

Each device has a key of its own and knows both keys of each peer. So a host changes the device by
which it sends with one route, and both old and new packets are accepted.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, Final

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from driver import names
from driver.errors import FreeFlowError, KernelError
from driver.inner_addresses import PREFIX, SLOTS, inner_address
from driver.kernel import pin
from driver.kernel.namespace import ENCRYPTION_PIN
from driver.kernel.netlink import Sockets, requesting, translate
from driver.kernel.underlay import Underlay
from driver.kernel.wireguard import (
    DeviceState,
    Opener,
    PeerState,
    WireGuardDevices,
    WireGuardPeer,
    WireGuardSocket,
    no_wireguard,
)
from driver.model import EncryptedPeer

log = structlog.get_logger()

OVERHEAD_IPV4: Final = 60
"""Outer IPv4, UDP, and WireGuard's header and authentication tag, in bytes."""
OVERHEAD_IPV6: Final = 80
VXLAN_OVERHEAD: Final = 70
"""Outer IPv6, UDP, VXLAN, and inner Ethernet, in bytes."""
_KIND: Final = "wireguard"
_KEY: Final = 32
_FAMILY: Final = 10
"""AF_INET6."""
_NODAD: Final = 0x02
"""IFA_F_NODAD of linux/if_addr.h."""


def overhead(underlay: Underlay) -> int:
    """Bytes that WireGuard takes of a packet of the underlay."""
    address = underlay.address
    return OVERHEAD_IPV6 if address is not None and address.version == 6 else OVERHEAD_IPV4


def encrypted_overhead(underlay: Underlay) -> int:
    """Bytes that WireGuard and VXLAN take of a packet of the underlay."""
    return overhead(underlay) + VXLAN_OVERHEAD


class EncryptionNamespace:
    """The encryption namespace of this host. Methods are safe from any thread, and raise
    KernelError.

    `port`: UDP port of the device of slot 0; that of slot 1 is the next one. `kind`, `opener` and
    `secret` are for tests: the kind of the devices, what sets their keys, and what makes these.
    """

    def __init__(
        self,
        host_run: Path,
        host: Sockets,
        underlay: Callable[[], Underlay],
        port: int,
        *,
        kind: str = _KIND,
        opener: Opener = WireGuardSocket,
        secret: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._host_run = host_run
        self._host = host
        self._underlay = underlay
        self.port = port
        self._kind = kind
        self._opener = opener
        self._secret = secret
        self._lock = threading.RLock()
        self._identity: tuple[int, int] | None = None
        self._descriptor = -1
        self._links: Sockets | None = None
        self._devices: WireGuardDevices | None = None
        self._node = ""
        self._own: dict[int, tuple[int, str]] = {}
        """Index and public key of each slot's device, as last read: only this process sets keys."""
        self._configured: dict[str, dict[str, WireGuardPeer]] = {}
        """By device and key, as this process has set them."""

    # --- the namespace and its devices

    def links(self) -> Sockets | None:
        """Sockets of the namespace; None if there is none."""
        with self._lock:
            identity = pin.identity(self._host_run, ENCRYPTION_PIN)
            if self._links is not None and self._identity != identity:
                # It was removed: by `freeflow cleanup`, most likely.
                self._forget()
            if self._links is None and identity is not None:
                path = self._host_run / ENCRYPTION_PIN
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._links = Sockets(self._descriptor)
                self._identity = identity
            return self._links

    def make(self) -> Sockets:
        """Make what is missing of namespace and devices; returns sockets of the namespace."""
        with self._lock:
            links = self.links()
            if links is None:
                pin.make(self._host_run, ENCRYPTION_PIN)
                links = self.links()
                log.info("encryption namespace made")
            if links is None:
                raise KernelError(f"{ENCRYPTION_PIN} was removed while it was made")
            for slot in SLOTS:
                self._make_device(links, slot)
            return links

    def _make_device(self, links: Sockets, slot: int) -> None:
        name, mtu = names.wireguard(slot), self._mtu()
        if links.index(name) is None:
            with self._host.take() as route:
                try:
                    # From the host's namespace: there its UDP socket stays.
                    route.link(
                        "add", ifname=name, kind=self._kind, mtu=mtu, net_ns_fd=self._descriptor
                    )
                except NetlinkError as error:
                    if error.code == errno.EOPNOTSUPP:
                        raise no_wireguard() from error
                    raise translate(error, f"making WireGuard device {name}") from error
        devices = self._open_devices()
        state = devices.state(name)
        if not state.key:
            # Peers never see it: the first one that they are told comes by renew().
            self._set_key(devices, slot, self._secret(_KEY))
        if state.port != self.port + slot:
            self._set_port(devices, slot)
        self._set_up(links, name, mtu)

    def _mtu(self) -> int:
        found = self._underlay()
        return found.mtu - overhead(found)

    def _open_devices(self) -> WireGuardDevices:
        if self._devices is None:
            self._devices = self._opener(self._descriptor)
        return self._devices

    def _set_port(self, devices: WireGuardDevices, slot: int) -> None:
        port = self.port + slot
        try:
            devices.set_port(names.wireguard(slot), port)
        except KernelError as error:
            raise KernelError(
                "encrypted networks are not possible on this host",
                cause=f"UDP port {port} can't be used by WireGuard ({error.cause})",
                remedy=f"ss -ulpn 'sport = :{port}' shows who has it; stop that, or docker plugin "
                "set freeflow:latest ENCRYPTION_PORT=PORT",
            ) from error

    def _set_up(self, links: Sockets, name: str, mtu: int) -> None:
        with requesting(f"setting up {name}"), links.take() as route:
            link = route.link("get", ifname=name)[0]
            if not link["flags"] & 1 or link.get_attr("IFLA_MTU") != mtu:
                try:
                    route.link("set", index=link["index"], mtu=mtu, state="up")
                except NetlinkError as error:
                    if error.code == errno.EADDRINUSE:
                        self._set_port(self._open_devices(), int(name[-1]))
                    raise

    def _set_key(self, devices: WireGuardDevices, slot: int, private: bytes) -> None:
        self._own.pop(slot, None)
        devices.set_key(names.wireguard(slot), private)

    # --- keys

    def keys(self) -> tuple[str, str] | None:
        """The public keys of both slots; None while there are none."""
        with self._lock:
            links = self.links()
            if links is None:
                return None
            found = [self._key(links, slot) for slot in SLOTS]
        return (found[0], found[1]) if all(found) else None

    def _key(self, links: Sockets, slot: int) -> str:
        index = links.index(names.wireguard(slot))
        known = self._own.get(slot)
        if index is None:
            return ""
        if known is None or known[0] != index:
            known = self._own[slot] = (index, self._state(slot).key)
        return known[1]

    def renew(self, slot: int, private: bytes) -> None:
        """Give a slot a new key."""
        with self._lock:
            self.make()
            self._set_key(self._open_devices(), slot, private)
            log.info("encryption key made", slot=slot)

    def slot(self) -> int:
        """The slot by which this host sends."""
        with self._lock:
            links = self.links()
            if links is None:
                return 0
            device = _device(links)
            return int(device is not None and device == links.index(names.wireguard(1)))

    def activate(self, slot: int) -> None:
        """Send by a slot from now on."""
        with self._lock:
            links = self.links()
            index = None if links is None else links.index(names.wireguard(slot))
            if links is None or index is None or not self._node:
                raise KernelError(
                    "the key can't be changed",
                    cause="the devices are gone, or this host's node ID isn't known",
                    remedy="they are made again within seconds",
                )
            with requesting("setting the route of encrypted packets"), links.take() as route:
                route.route(
                    "replace",
                    family=_FAMILY,
                    dst=str(PREFIX),
                    oif=index,
                    prefsrc=str(inner_address(self._node, slot)),
                )

    # --- peers

    def apply(self, node: str, peers: Iterable[EncryptedPeer]) -> None:
        """Make the devices have these peers, and this host the inner addresses of its node ID.

        Raises:
            KernelError: a peer is refused; all others are set.
        """
        with self._lock:
            links = self.links()
            if links is None:
                return
            self.make()
            if node and (node != self._node or _device(links) is None):
                slot = self.slot()
                self._set_addresses(links, node)
                self._node = node
                self.activate(slot)
            refusals: list[FreeFlowError] = []
            for slot in SLOTS:
                self._set_peers(names.wireguard(slot), _wanted(peers), refusals)
            if refusals:
                raise refusals[0]

    def _set_addresses(self, links: Sockets, node: str) -> None:
        for slot in SLOTS:
            wanted = inner_address(node, slot)
            name = names.wireguard(slot)
            index = links.index(name)
            ignore = (errno.EEXIST, errno.EADDRNOTAVAIL)
            with requesting(f"setting the address of {name}", ignore=ignore), links.take() as route:
                for item in route.get_addr(index=index, family=_FAMILY):
                    known = IPv6Address(item.get_attr("IFA_ADDRESS"))
                    if known in PREFIX and known != wanted:
                        route.addr("del", index=index, address=str(known), prefixlen=128)
                # Without duplicate address detection, usable at once: the route names it.
                route.addr("replace", index=index, address=str(wanted), prefixlen=128, flags=_NODAD)

    def _set_peers(
        self, name: str, wanted: dict[str, WireGuardPeer], refusals: list[FreeFlowError]
    ) -> None:
        devices = self._open_devices()
        present = devices.state(name).peers
        known = self._configured.setdefault(name, {})
        for key in present.keys() - wanted.keys():
            devices.drop(name, key)
            known.pop(key, None)
        for key, peer in wanted.items():
            state = present.get(key)
            whole = state is not None and _is_exactly(state, peer.inner)
            if whole and known.get(key) == peer:
                continue
            try:
                devices.put(name, peer)
                known[key] = peer
            except KernelError as error:
                known.pop(key, None)
                refusals.append(error)

    def states(self, slot: int) -> dict[str, PeerState]:
        """The peers of a slot's device, by their keys."""
        with self._lock:
            return {} if self.links() is None else self._state(slot).peers

    def _state(self, slot: int) -> DeviceState:
        links = self.links()
        if links is None or links.index(names.wireguard(slot)) is None:
            return DeviceState("", 0, {})
        return self._open_devices().state(names.wireguard(slot))

    # --- the end

    def remove(self) -> list[str]:
        """Remove devices and namespace; returns their names."""
        with self._lock:
            links = self.links()
            removed = [
                name
                for name in map(names.wireguard, SLOTS)
                if links is not None and links.delete(name)
            ]
            self._forget()
            if pin.remove(self._host_run, ENCRYPTION_PIN):
                removed.append(str(ENCRYPTION_PIN))
        return removed

    def close(self) -> None:
        """Close all descriptors; namespace and devices stay."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._devices is not None:
            self._devices.close()
        if self._links is not None:
            self._links.close()
            os.close(self._descriptor)
        self._devices = self._links = self._identity = None
        self._node = ""
        self._own = {}
        self._configured = {}


def _device(links: Sockets) -> int | None:
    """Index of the device to which encrypted packets are routed; None: there is no route."""
    with requesting("reading the route of encrypted packets"), links.take() as route:
        for item in route.get_routes(family=_FAMILY, table=254):
            if _is_ours(item):
                return int(item.get_attr("RTA_OIF"))
    return None


def _wanted(peers: Iterable[EncryptedPeer]) -> dict[str, WireGuardPeer]:
    return {
        peer.keys[slot]: WireGuardPeer(
            peer.keys[slot], peer.address, peer.port + slot, inner_address(peer.node, slot)
        )
        for peer in peers
        for slot in SLOTS
    }


def _is_exactly(state: PeerState, inner: IPv6Address) -> bool:
    return {str(network) for network in state.allowed} == {f"{inner}/128"}


def _is_ours(item: Any) -> bool:
    return item["dst_len"] == PREFIX.prefixlen and IPv6Address(item.get_attr("RTA_DST")) in PREFIX
