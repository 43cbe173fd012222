"""The real kernel behind `ports.Kernel`: netlink and nftables, one overlay namespace.

What exists is asked of the kernel, not remembered, except interface indexes, which are looked up anew when they
fail. Order in `attach`: filter, bridge, VXLAN device, veth pair; a container never has an unfiltered port.
`detach` is the mirror. Every step tolerates that it was done before.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver import names
from driver.errors import KernelError
from driver.kernel import announce, filter, nft, underlay
from driver.kernel.namespace import OverlayNamespace, in_netns
from driver.model import Endpoint, IPAddress, Network
from driver.ports import Inventory

_ANY_MAC: Final = "00:00:00:00:00:00"
_SPARE_SOCKETS: Final = 16
_GONE: Final = (errno.ENODEV, errno.ENOENT, errno.EINVAL)


class _Sockets:
    """Netlink sockets of one namespace, each used by one thread at a time."""

    def __init__(self, make: Callable[[], IPRoute]) -> None:
        self._make = make
        self._spare: queue.LifoQueue[IPRoute] = queue.LifoQueue(_SPARE_SOCKETS)

    @contextmanager
    def take(self) -> Iterator[IPRoute]:
        try:
            route = self._spare.get_nowait()
        except queue.Empty:
            route = self._make()
        try:
            yield route
        except NetlinkError:
            self._return(route)
            raise
        except BaseException:
            # Half of an answer may still be in the socket.
            route.close()
            raise
        else:
            self._return(route)

    def _return(self, route: IPRoute) -> None:
        try:
            self._spare.put_nowait(route)
        except queue.Full:
            route.close()

    def close(self) -> None:
        while True:
            try:
                self._spare.get_nowait().close()
            except queue.Empty:
                return


def _translate(error: NetlinkError, what: str) -> KernelError:
    return KernelError(f"{what}: {os.strerror(error.code) if error.code else error}")


class LinuxKernel:
    """`ports.Kernel` of this host.

    `host_run` is the host's /run; `choice` the setting UNDERLAY; `hint` answers what Docker says this host's
    address is, if it has said it.
    """

    def __init__(
        self,
        host_run: Path,
        choice: str = "",
        hint: Callable[[], IPAddress | None] = lambda: None,
    ) -> None:
        self.namespace = OverlayNamespace(host_run)
        self._choice = choice
        self._hint = hint
        self._host = _Sockets(IPRoute)
        self._overlay = _Sockets(lambda: in_netns(self.namespace.descriptor(), IPRoute))
        self._host_namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._filter_lock = threading.Lock()
        self._peers: dict[str, frozenset[IPAddress]] = {}

    def prepare(self) -> None:
        # A namespace that was replaced (reboot, cleanup) leaves sockets of the old one behind.
        self._overlay.close()
        self._peers.clear()
        nft.run(filter.base(), self.namespace.descriptor())

    def underlay(self) -> underlay.Underlay:
        """Device, MTU and address that carry the overlay. Raises SettingError, KernelError."""
        return underlay.find(self._choice, self._hint())

    def underlay_mtu(self) -> int:
        found = self.underlay()
        return found.mtu - found.overhead

    # --- endpoints

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        if not self.namespace.exists:
            self.prepare()
        with self._filter_lock:
            nft.run(filter.add(endpoint), self.namespace.descriptor())
        with self._overlay.take() as overlay:
            bridge = self._ensure_bridge(overlay, network)
            if network.overlay:
                self._ensure_vxlan(overlay, network, bridge)
            self._ensure_veth(overlay, network, endpoint, bridge)

    def _index(self, route: IPRoute, name: str) -> int | None:
        try:
            return int(route.link("get", ifname=name)[0]["index"])
        except NetlinkError as error:
            if error.code in _GONE:
                return None
            raise _translate(error, f"looking up {name}") from error

    def _ensure_bridge(self, overlay: IPRoute, network: Network) -> int:
        name = names.bridge(network.id)
        index = self._index(overlay, name)
        if index is None:
            try:
                overlay.link(
                    "add",
                    ifname=name,
                    kind="bridge",
                    mtu=network.mtu,
                    br_stp_state=0,
                    br_mcast_snooping=0,
                    br_forward_delay=0,
                    state="up",
                )
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise _translate(error, f"making bridge {name}") from error
            index = self._index(overlay, name)
            if index is None:
                raise KernelError(f"bridge {name} vanished while it was made; try again")
        return index

    def _ensure_vxlan(self, overlay: IPRoute, network: Network, bridge: int) -> None:
        name = names.vxlan(network.id)
        index = self._index(overlay, name)
        if index is None:
            carrier = self.underlay()
            attributes: dict[str, Any] = {
                "ifname": name,
                "kind": "vxlan",
                "vxlan_id": network.vni,
                "vxlan_port": network.port,
                "vxlan_learning": 1,
                # As Docker's overlay: the inner packet has its own checksums.
                "vxlan_udp_csum": 0,
                "vxlan_udp_zero_csum6_rx": 1,
                "mtu": network.mtu,
                "net_ns_fd": self.namespace.descriptor(),
            }
            if carrier.address is not None:
                key = "vxlan_local" if carrier.address.version == 4 else "vxlan_local6"
                attributes[key] = str(carrier.address)
            try:
                # From the host's namespace: the device's UDP socket stays where it was made.
                with self._host.take() as host:
                    host.link("add", **attributes)
            except NetlinkError as error:
                if error.code == errno.EADDRINUSE or (
                    error.code == errno.EEXIST and self._index(overlay, name) is None
                ):
                    raise KernelError(
                        f"network {network.id}: VNI {network.vni} on UDP port {network.port} is taken by another "
                        "VXLAN device of this host; create the network with another -o vni="
                    ) from error
                if error.code != errno.EEXIST:
                    raise _translate(error, f"making VXLAN device {name}") from error
            index = self._index(overlay, name)
        overlay.link("set", index=index, master=bridge, state="up")

    def _ensure_veth(
        self, overlay: IPRoute, network: Network, endpoint: Endpoint, bridge: int
    ) -> None:
        port, inner = names.host_veth(endpoint.id), names.container_veth(endpoint.id)
        try:
            overlay.link(
                "add",
                ifname=port,
                kind="veth",
                mtu=network.mtu,
                master=bridge,
                state="up",
                peer={
                    "ifname": inner,
                    "mtu": network.mtu,
                    "address": endpoint.mac,
                    "net_ns_fd": self._host_namespace,
                },
            )
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise _translate(error, f"making veth pair {port}") from error
            index = self._index(overlay, port)
            if index is None:
                # The name is taken on the host's side: the rest of a container that was never joined.
                with self._host.take() as host:
                    self._delete(host, inner)
                self._ensure_veth(overlay, network, endpoint, bridge)
                return
            overlay.link("set", index=index, master=bridge, state="up")

    def detach(self, network_id: str, endpoint_id: str) -> None:
        if not self.namespace.exists:
            return
        with self._overlay.take() as overlay:
            self._delete(overlay, names.host_veth(endpoint_id))
        with self._filter_lock:
            try:
                nft.run(filter.remove(endpoint_id), self.namespace.descriptor())
            except KernelError:
                # One transaction: all of it is there, or nothing is.
                if filter.chain(endpoint_id) in self._chains():
                    raise

    def _chains(self) -> set[str]:
        objects = nft.query("list chains bridge", self.namespace.descriptor())
        return {str(item["chain"]["name"]) for item in objects if "chain" in item}

    def _delete(self, route: IPRoute, name: str) -> bool:
        index = self._index(route, name)
        if index is None:
            return False
        try:
            route.link("del", index=index)
        except NetlinkError as error:
            if error.code not in _GONE:
                raise _translate(error, f"removing {name}") from error
        return True

    def remove_network(self, network_id: str) -> None:
        self._peers.pop(network_id, None)
        if not self.namespace.exists:
            return
        with self._overlay.take() as overlay:
            self._delete(overlay, names.vxlan(network_id))
            self._delete(overlay, names.bridge(network_id))

    # --- peers

    def set_peers(self, network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        wanted = frozenset(peers)
        if self._peers.get(network_id) == wanted or not self.namespace.exists:
            return frozenset()
        with self._overlay.take() as overlay:
            index = self._index(overlay, names.vxlan(network_id))
            if index is None:
                return frozenset()
            present = self._flood_list(overlay, index)
            for address in wanted - present:
                self._forward(overlay, "append", index, address)
            for address in present - wanted:
                self._forward(overlay, "del", index, address)
        self._peers[network_id] = wanted
        return wanted - present

    def _flood_list(self, overlay: IPRoute, index: int) -> frozenset[IPAddress]:
        return frozenset(
            ip_address(entry.get_attr("NDA_DST"))
            for entry in overlay.fdb("dump", ifindex=index)
            if entry["ifindex"] == index
            and entry.get_attr("NDA_LLADDR") == _ANY_MAC
            and entry.get_attr("NDA_DST")
        )

    def _forward(self, overlay: IPRoute, action: str, index: int, address: IPAddress) -> None:
        try:
            overlay.fdb(action, ifindex=index, lladdr=_ANY_MAC, dst=str(address))
        except NetlinkError as error:
            if error.code not in (errno.EEXIST, errno.ENOENT):
                raise _translate(error, f"peer {address}: {action} in the flood list") from error

    def announce(self, network_id: str, endpoints: Iterable[Endpoint]) -> None:
        if not self.namespace.exists:
            return
        try:
            announce.send(self.namespace.descriptor(), names.bridge(network_id), endpoints)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.ENXIO, errno.ENETDOWN):
                raise KernelError(
                    f"announcing endpoints of network {network_id}: {error.strerror}"
                ) from error

    def locate(self, network_id: str, mac: str) -> IPAddress | None:
        """The peer behind which the VXLAN device has learned a MAC address; None: local, or not learned."""
        if not self.namespace.exists:
            return None
        with self._overlay.take() as overlay:
            index = self._index(overlay, names.vxlan(network_id))
            if index is None:
                return None
            for entry in overlay.fdb("dump", ifindex=index):
                if (
                    entry["ifindex"] == index
                    and entry.get_attr("NDA_LLADDR") == mac.lower()
                    and entry.get_attr("NDA_DST")
                ):
                    return ip_address(entry.get_attr("NDA_DST"))
        return None

    # --- what exists

    def _names(self, route: IPRoute) -> list[str]:
        return [str(link.get_attr("IFLA_IFNAME")) for link in route.get_links()]

    def inventory(self) -> Inventory:
        if not self.namespace.exists:
            return Inventory(frozenset(), frozenset())
        with self._overlay.take() as overlay:
            found = self._names(overlay)
        return Inventory(
            networks=frozenset(
                name[3:] for name in found if name.startswith((names.BRIDGE, names.VXLAN))
            ),
            endpoints=frozenset(name[3:] for name in found if name.startswith(names.HOST_VETH))
            | frozenset(
                chain[2 : 2 + names.SHORT_ID] for chain in self._chains() if chain.startswith("ep")
            ),
        )

    def links(self) -> dict[str, dict[str, int]]:
        """Counters of our links in the overlay namespace by name: bytes and packets each way, drops (rtnl_link_stats64)."""
        if not self.namespace.exists:
            return {}
        result: dict[str, dict[str, int]] = {}
        with self._overlay.take() as overlay:
            for link in overlay.get_links():
                stats = link.get_attr("IFLA_STATS64")
                name = str(link.get_attr("IFLA_IFNAME"))
                if stats and name.startswith(names.PREFIXES):
                    result[name] = {
                        key: int(stats[key])
                        for key in (
                            "rx_bytes",
                            "tx_bytes",
                            "rx_packets",
                            "tx_packets",
                            "rx_dropped",
                            "tx_dropped",
                        )
                    }
        return result

    def spoofed(self) -> dict[str, int]:
        """Frames that the source filter dropped, by the endpoint's short ID."""
        return filter.dropped(self.namespace.descriptor()) if self.namespace.exists else {}

    def cleanup(self) -> list[str]:
        removed: list[str] = []
        with self._host.take() as host:
            for name in self._names(host):
                if name.startswith(names.CONTAINER_VETH) and self._delete(host, name):
                    removed.append(name)
        if self.namespace.exists:
            with self._overlay.take() as overlay:
                for name in self._names(overlay):
                    if name.startswith(names.PREFIXES) and self._delete(overlay, name):
                        removed.append(name)
        self._overlay.close()
        self._peers.clear()
        if self.namespace.remove():
            removed.append(str(self.namespace.path))
        return removed
