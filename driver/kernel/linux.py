"""`ports.Kernel` of a real host: netlink and nftables in one overlay namespace.

The kernel is asked what exists. Cached facts only save requests, and are keyed by interface index,
which the kernel doesn't reuse. `attach` makes bridge, VXLAN device, veth pair and filter. The
container's end stays down and in the host's namespace until the caller has answered, so no
container ever has an unfiltered port. `detach` is the mirror. Every step may be repeated.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final

from driver import names
from driver.errors import DOCTOR, TRY_AGAIN, FreeFlowError, KernelError, reporting
from driver.inner_addresses import other_slot
from driver.kernel import (
    announce,
    fdb,
    filter,
    guard_rules,
    interfaces,
    offload,
    pin,
    underlay,
    underlay_routes,
)
from driver.kernel.encryption_namespace import EncryptionNamespace, encrypted_overhead
from driver.kernel.fastpath import FastPath, Stage
from driver.kernel.guard import Guard, Guarded
from driver.kernel.namespace import OVERLAY_PIN
from driver.kernel.netlink import Sockets
from driver.kernel.overlay import Overlay
from driver.kernel.underlay import Underlay
from driver.model import ArpFrame, Endpoint, IPAddress, IPNetwork, Network
from driver.ports import Inventory

_ROUTES_EVERY: Final = 10.0
"""Seconds after which the devices that lead to peers are read again; sooner if links or routes
change."""
ENCRYPTION_PORT: Final = 4797
_INTERFACE_GONE: Final = (errno.ENODEV, errno.ENXIO, errno.ENETDOWN)


class LinuxKernel:
    """`ports.Kernel` of this host.

    `host_run` is the host's /run; `choice` the setting UNDERLAY; `hint` returns this host's address
    as Docker reported it, if it has; `listed` the address under which other hosts list it, by
    default the same; `programs` the object file of the fast path, None: off; `sessions` the port of
    the routers' sessions. The host's namespace is the calling thread's.
    """

    def __init__(
        self,
        host_run: Path,
        choice: str = "",
        hint: Callable[[], IPAddress | None] = lambda: None,
        programs: Path | None = None,
        *,
        tcx: bool = True,
        sessions: int | None = None,
        listed: Callable[[], IPAddress | None] | None = None,
        encryption_port: int = ENCRYPTION_PORT,
    ) -> None:
        self._host_run = host_run
        self._choice = choice
        self._hint = hint
        self._listed = listed or hint
        self._host_namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._host = Sockets(self._host_namespace)
        self._opening = threading.Lock()
        self._making = threading.Lock()
        self._opened: Overlay | None = None
        self._made: dict[str, tuple[int, int]] = {}
        """Indexes of bridge and VXLAN device (0: none) of each network, made or checked by us."""
        self._guard = Guard(self._host_namespace, sessions)
        self._changes = underlay_routes.RouteChanges(self._host_namespace)
        self._routes_due = 0.0
        self._near: frozenset[IPNetwork] = frozenset()
        self.encryption = EncryptionNamespace(host_run, self._host, self.underlay, encryption_port)
        self.outer: Callable[[], Mapping[IPAddress, IPAddress]] = dict
        """The peers' addresses by their inner ones; set by who knows them."""
        self.fastpath = FastPath(
            programs, host_run, self._host_namespace, self._host, self.underlay, tcx=tcx
        )

    # --- the overlay namespace

    def prepare(self) -> None:
        pin.quiet(self._make_overlay().namespace)

    def _overlay(self) -> Overlay | None:
        """The open overlay namespace, None if there is none."""
        identity = pin.identity(self._host_run)
        opened = self._opened
        if opened is not None and opened.identity == identity:
            return opened
        with self._opening:
            if self._opened is not None and self._opened.identity != identity:
                # The namespace was removed: by `freeflow cleanup`, most likely.
                self._forget()
            if identity is not None and self._opened is None:
                opened = Overlay(self._host_run, identity)
                opened.nft.run(filter.base())
                self.fastpath.open(opened)
                self._opened = opened
            return self._opened

    def _make_overlay(self) -> Overlay:
        opened = self._overlay()
        if opened is None:
            with self._opening:
                pin.make(self._host_run)
            opened = self._overlay()
        if opened is None:
            raise KernelError(
                f"overlay namespace {self._host_run / OVERLAY_PIN}",
                cause="it was removed while it was made",
                remedy=TRY_AGAIN,
            )
        return opened

    def _forget(self) -> None:
        self.fastpath.close()
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        self._made.clear()

    # --- the underlay

    def underlay(self) -> Underlay:
        """Device, MTU and address of the underlay. Raises SettingError, KernelError."""
        return underlay.find(self._host, self._choice, self._hint())

    def underlay_mtu(self, *, encrypted: bool = False) -> int:
        found = self.underlay()
        return found.mtu - (encrypted_overhead(found) if encrypted else found.overhead)

    def segments_tunnels(self) -> bool | None:
        """Whether the underlay's device segments UDP tunnels; None: the kernel doesn't say.

        Raises SettingError, KernelError.
        """
        return offload.segments_tunnels(self._host, self.underlay().device)

    # --- endpoints

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        overlay = self._make_overlay()
        bridge = self._bridge(overlay, network)
        if network.overlay and not network.encrypted:
            self._guard.network(names.short(network.id), network.port)
        interfaces.make_veth(
            self._host, overlay.links, self._host_namespace, network, endpoint, bridge
        )
        self._filter(overlay, filter.add(endpoint))
        self.fastpath.attach(network, endpoint)

    @staticmethod
    def _filter(overlay: Overlay, commands: str) -> None:
        try:
            overlay.nft.run(commands)
        except KernelError:
            # Our table may be gone (nft flush ruleset). Otherwise this fails for the same reason.
            overlay.nft.run(filter.base() + commands)

    def _bridge(self, overlay: Overlay, network: Network) -> int:
        """Index of the network's bridge, made with the VXLAN device if absent."""
        made = self._made.get(names.short(network.id))
        whole = not network.encrypted or self.encryption.keys() is not None
        if whole and made is not None and made == self._present(overlay, network):
            return made[0]
        with self._making:
            # br_netfilter may have been loaded since: it then filters in all namespaces.
            pin.quiet(overlay.namespace)
            bridge = interfaces.make_bridge(overlay.links, network)
            if network.overlay:
                routed = self.encryption.make() if network.encrypted else self._host
                interfaces.make_vxlan(
                    routed, overlay.links, overlay.namespace, network, self.underlay(), bridge
                )
            self._made[names.short(network.id)] = self._present(overlay, network)
        return bridge

    @staticmethod
    def _present(overlay: Overlay, network: Network) -> tuple[int, int]:
        name = names.vxlan(network.id, encrypted=network.encrypted)
        vxlan = overlay.links.index(name) if network.overlay else None
        return overlay.links.index(names.bridge(network.id)) or 0, vxlan or 0

    @staticmethod
    def _vxlan(overlay: Overlay | None, network_id: str) -> tuple[int | None, bool]:
        """Index of a network's VXLAN device, and whether it is that of an encrypted network."""
        if overlay is not None:
            for encrypted in (True, False):
                index = overlay.links.index(names.vxlan(network_id, encrypted=encrypted))
                if index is not None:
                    return index, encrypted
        return None, False

    def detach(self, network_id: str, endpoint_id: str) -> None:
        overlay = self._overlay()
        if overlay is not None:
            self.fastpath.detach(endpoint_id)
            overlay.links.delete(names.host_veth(endpoint_id))
            self._filter(overlay, filter.remove(endpoint_id))
        # It went with its other end, unless that was in an earlier overlay namespace.
        self._host.delete(names.container_veth(endpoint_id))

    def remove_network(self, network_id: str) -> None:
        self._made.pop(names.short(network_id), None)
        self._guard.forget(names.short(network_id))
        overlay = self._overlay()
        if overlay is not None:
            self.fastpath.remove_network(network_id)
            overlay.links.delete(names.vxlan(network_id))
            overlay.links.delete(names.vxlan(network_id, encrypted=True))
            overlay.links.delete(names.bridge(network_id))

    # --- peers

    def set_peers(self, network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        overlay, wanted = self._overlay(), frozenset(peers)
        index, encrypted = self._vxlan(overlay, network_id)
        self.fastpath.set_peers(network_id, frozenset() if encrypted else wanted)
        if overlay is None or index is None:
            return frozenset()
        if encrypted:
            moved: dict[IPAddress, IPAddress] = {
                other_slot(peer): peer for peer in wanted if isinstance(peer, IPv6Address)
            }
            fdb.move(overlay.links, index, moved)
            return fdb.set_peers(overlay.links, index, wanted, moved.__contains__)
        self._guard.peers(names.short(network_id), wanted)
        try:
            # Each time: others may have changed the list, or sent frames from which the device
            # learned.
            return fdb.set_peers(overlay.links, index, wanted, self._trusted)
        finally:
            self._routes_due = 0.0
            self._refresh_guard()

    # --- the guard of the overlay's port

    def set_routers(self, hosts: frozenset[IPAddress]) -> None:
        """The other hosts on networks of other drivers. The rules follow at the next `refresh`."""
        self._guard.routers(hosts)
        self._routes_due = 0.0

    def _refresh_guard(self) -> None:
        """Make the host's rules match the peers that are known now."""
        now = time.monotonic()
        if self._changes or now >= self._routes_due:
            self._routes_due = now + _ROUTES_EVERY
            try:
                found = self.underlay()
            except FreeFlowError:
                # Without an underlay there are no peers either: the rules stay.
                return
            peers = sorted(self._guard.everybody(), key=str)
            reached = underlay_routes.devices(self._host, peers, found.address)
            self._near = self._beside(found)
            self._guard.reached(reached | {found.device}, self._near)
        if self._guard.refresh() or self._guard.failed:
            self._unlearn()

    def _beside(self, found: Underlay) -> frozenset[IPNetwork]:
        """Networks from which peers may send, besides their addresses in the Swarm's list.

        Where this host's overlay uses another address than the listed one (UNDERLAY,
        --data-path-addr), those of the peers do too, and no API tells which.
        """
        if found.address is None or found.address == self._listed():
            return frozenset()
        return underlay.networks(self._host, found.device)

    def _trusted(self, address: IPAddress) -> bool:
        return any(address in network for network in self._near)

    def _unlearn(self) -> None:
        """Remove FDB entries that VXLAN devices learned from hosts that are no peers."""
        overlay = self._overlay()
        for short, peers in self._guard.known().items():
            index = overlay.links.index(names.VXLAN + short) if overlay is not None else None
            if overlay is not None and index is not None:
                fdb.drop_strangers(overlay.links, index, peers, self._trusted)

    def guarded(self) -> Guarded:
        """Which ports are guarded, and which addresses were refused."""
        return self._guard.facts()

    def announce(
        self, network_id: str, endpoints: Iterable[Endpoint], *, again: bool = False
    ) -> None:
        overlay = self._overlay()
        if overlay is None:
            return
        vxlan, _ = self._vxlan(overlay, network_id)
        present = []
        for endpoint in endpoints:
            port = overlay.links.index(names.host_veth(endpoint.id))
            if port is None:
                # It has gone since the caller looked, and its address may be on another host.
                continue
            present.append(endpoint)
            if not again:
                fdb.place(overlay.links, port, vxlan, endpoint.mac)
        with reporting(f"announcing endpoints of network {network_id}", ignore=_INTERFACE_GONE):
            announce.send(overlay.packets, names.bridge(network_id), present)

    def hear(self, seconds: float) -> frozenset[ArpFrame]:
        overlay = self._overlay()
        if overlay is None:
            time.sleep(seconds)
            return frozenset()
        try:
            return overlay.hear(seconds)
        except (OSError, ValueError) as error:
            # A cleanup has closed it.
            raise KernelError("reading ARP", cause=str(error), remedy=DOCTOR) from error

    def learned(self, network_id: str) -> dict[str, IPAddress]:
        """MAC address → the peer behind it, learned by the VXLAN device or by the fast path."""
        overlay = self._overlay()
        index, encrypted = self._vxlan(overlay, network_id)
        if overlay is None or index is None:
            return {}
        if encrypted:
            outer, learned = self.outer(), fdb.learned(overlay.links, index)
            return {mac: outer.get(peer, peer) for mac, peer in learned.items()}
        return fdb.learned(overlay.links, index) | self.fastpath.learned(network_id)

    def locate(self, network_id: str, mac: str) -> IPAddress | None:
        """The peer behind a MAC address; None: it is on this host, or not learned."""
        return self.learned(network_id).get(mac.lower())

    # --- the fast path

    def refresh(self) -> None:
        """Check what may have changed outside the plugin. To be called every second."""
        has_overlay = self._overlay() is not None
        if has_overlay or self._guard.has_routers:
            self._refresh_guard()
        if has_overlay:
            self.fastpath.refresh()

    def attach_programs(self) -> None:
        """Attach the programs of new links now; otherwise a thread does so a moment later."""
        self.fastpath.attach_programs()

    def check_forwarding(self, endpoint_id: str, sandbox: Path | int) -> None:
        """Check whether a container forwards packets that are addressed to it."""
        self.fastpath.check_forwarding(endpoint_id, sandbox)

    def stage(self) -> Stage:
        """Which stage of the fast path runs on this host."""
        return self.fastpath.stage()

    def uses_fastpath(self, network_id: str, mac: str) -> bool:
        """Whether packets from this host's containers to a MAC address take the fast path now."""
        return self.fastpath.carries(network_id, mac)

    # --- what exists

    def inventory(self) -> Inventory:
        overlay = self._overlay()
        if overlay is None:
            return Inventory(frozenset(), frozenset())
        found = {name: name[len(names.BRIDGE) :] for name in self.links()}
        endpoints = {short for name, short in found.items() if name.startswith(names.HOST_VETH)}
        return Inventory(
            networks=frozenset(
                short
                for name, short in found.items()
                if name.startswith((names.BRIDGE, names.VXLAN, names.ENCRYPTED))
            ),
            endpoints=frozenset(endpoints),
            filters=frozenset(filter.present(overlay.nft) - endpoints),
        )

    def links(self) -> dict[str, dict[str, int]]:
        """Our links in the overlay namespace by name, with their counters: bytes, packets and drops
        each way.

        Packets of the fast path bypass the link's own counters; they are added here.
        """
        overlay = self._overlay()
        if overlay is None:
            return {}
        found = {
            link.name: dict(link.counters)
            for link in overlay.links.links()
            if link.name.startswith(names.PREFIXES)
        }
        for name, count in self.fastpath.counts().items():
            if name in found:
                found[name]["tx_packets"] += count.received_packets
                found[name]["tx_bytes"] += count.received_bytes
        return found

    def spoofed(self) -> dict[str, int]:
        """Frames that the source filter dropped, by the endpoint's short ID."""
        overlay = self._overlay()
        return filter.dropped(overlay.nft) if overlay is not None else {}

    def cleanup(self) -> list[str]:
        removed = [
            link.name
            for link in self._host.links()
            if link.name.startswith(names.CONTAINER_VETH) and self._host.delete(link.name)
        ]
        overlay = self._overlay()
        removed += self.fastpath.remove(overlay)
        if overlay is not None:
            # One by one: the namespace lives on while any process has it open.
            removed += [name for name in self.links() if overlay.links.delete(name)]
            overlay.nft.run(f"add table {filter.TABLE}\ndelete table {filter.TABLE}\n")
        if self._guard.remove():
            removed.append(f"nftables table {guard_rules.TABLE}")
        with self._opening:
            self._forget()
        removed += self.encryption.remove()
        if pin.remove(self._host_run):
            removed.append(str(OVERLAY_PIN))
        return removed

    def close(self) -> None:
        """Close all descriptors; links and rules stay in the kernel. For the end of a process, and
        tests."""
        with self._opening:
            self._forget()
        self.encryption.close()
        self._guard.close()
        self._changes.close()
        self._host.close()
        os.close(self._host_namespace)
