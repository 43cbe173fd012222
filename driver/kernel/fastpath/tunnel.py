"""Encapsulation by the fast path: on while nothing of the host would have handled those packets.

Encapsulated packets bypass the host's IPsec policies and firewall. So both are checked again and
again, and the result holds for `LEASE` seconds: if the plugin dies, no packet stays on a path that
may have become wrong. All methods are called under the upkeep lock (see `fastpath.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.ebpf import FastPathSettings, Programs
from dataplane.errors import KernelRefused
from driver import names
from driver.errors import FreeFlowError, KernelError
from driver.kernel import tc_ingress
from driver.kernel.fastpath.endpoints import Endpoints
from driver.kernel.fastpath.neighbours import IDLE, Neighbours
from driver.kernel.firewall import Firewall
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import Sockets, requesting
from driver.kernel.underlay import Underlay
from driver.kernel.xfrm import Policies

log = structlog.get_logger()

LEASE: Final = 300.0
"""Seconds."""
REATTACH_EVERY: Final = 10.0
"""Seconds after which a program is attached again: another process may have detached it."""
_NOT_CHECKED: Final = "not checked yet"
_MTU: Final = 65535
_UP: Final = 1
_NO_ADDRESSES: Final = {
    "attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})],
}
"""IN6_ADDR_GEN_MODE_NONE: the kernel gives the pair no addresses."""
_PORT_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TTL: Final = Path("/proc/sys/net/ipv4/ip_default_ttl")


@dataclass(slots=True, eq=False)
class Tunnel:
    """The stage "tunnel": programs on the host's devices, and the veth pair between the namespaces.

    `inner` are the hooks of the overlay namespace, `outer` those of the host's.
    """

    programs: Programs
    endpoints: Endpoints
    neighbours: Neighbours
    overlay: Sockets
    host: Sockets
    host_namespace: int
    inner: tc_ingress.Hooks
    outer: tc_ingress.Hooks
    underlay: Callable[[], Underlay]
    clock: Callable[[], float]
    firewall: Firewall = field(init=False)
    reason: str = _NOT_CHECKED
    """Why the stage is off; empty: it is on."""
    attached: dict[int, float] = field(init=False)
    """The host's devices with our program, and when this process attached it."""
    _policies: Policies = field(init=False)
    _pair: tuple[int, int] | None = None
    """Indexes of the veth pair to which this process has attached programs."""
    _sysctls: tuple[int, int, int] = (32768, 60999, 64)
    _device_names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.firewall = Firewall(self.host_namespace)
        self._policies = Policies(self.host_namespace)
        earlier = self.outer.devices() - {self.host.index(names.OUTSIDE)}
        self.attached = dict.fromkeys(earlier, float("-inf"))

    def read_host(self) -> None:
        """Read the names of the host's devices and the sysctls that shape outer headers."""
        self._sysctls = in_netns(self.host_namespace, _host_sysctls)
        self._device_names = {link.index: link.name for link in self.host.links()}

    def refresh(self) -> None:
        """Turn the stage on or off by the current state of the host."""
        before, self.reason = self.reason, self._switch()
        if self.reason != before and before != _NOT_CHECKED:
            log.info("fast path tunnel", on=not self.reason, reason=self.reason)

    def _switch(self) -> str:
        reason, devices = self._obstacle()
        if not reason:
            try:
                self._make_pair()
                self._attach_to_host(devices)
            except (FreeFlowError, KernelRefused, OSError, NetlinkError) as error:
                reason = str(error)
        # Encapsulation starts after decapsulation is ready, and ends before it goes.
        self._write_settings(0 if reason else self.programs.support.flags)
        for index in self.attached.keys() - (set() if reason else devices):
            self.outer.detach(index)
            del self.attached[index]
        return reason

    def _attach_to_host(self, devices: set[int]) -> None:
        now = self.clock()
        for index in devices:
            if now - self.attached.get(index, float("-inf")) > REATTACH_EVERY:
                self.outer.attach(index, self.programs.descriptor("ff_nic"))
                self.attached[index] = now

    def _obstacle(self) -> tuple[str, set[int]]:
        """Why the stage must be off, and the devices that lead to peers."""
        lacking = self.programs.support.why_not.get("tunnel")
        if lacking:
            return lacking, set()
        overlays = [local for local in self.endpoints.networks().values() if local.vxlan]
        if not overlays:
            return "no network here has other hosts", set()
        underlay = self.underlay()
        if underlay.address is not None and underlay.address.version != 4:
            return "the underlay's address is IPv6, which needs an outer checksum", set()
        routes = self.neighbours.routes
        devices = {way.index for way in routes.values()}
        if not devices:
            missing = next(iter(self.neighbours.unreachable.items()), None)
            return (f"peer {missing[0]}: {missing[1]}" if missing else "no peers are known"), set()
        if self._policies.exist():
            return "the host has IPsec policies, which the fast path would bypass", set()
        if not devices <= self._device_names.keys():
            self.neighbours.refresh_soon()
            return "a device is new; its name is not known yet", set()
        blocked = self.firewall.obstacle(
            ports={local.network.port for local in overlays},
            devices={index: self._device_names[index] for index in devices},
            own={way.source for way in routes.values()},
            peers={peer for _, peer in routes},
        )
        return blocked, devices

    def _write_settings(self, flags: int) -> None:
        inside, outside = self._pair or (0, 0)
        low, high, ttl = self._sysctls
        self.programs.maps.decide(
            FastPathSettings(
                lease=time.monotonic_ns() + int(LEASE * 1e9),
                idle=int(IDLE * 1e9),
                inside=inside,
                outside=outside,
                flags=flags,
                ports=(low, high),
                ttl=ttl,
            )
        )

    def _make_pair(self) -> None:
        """The veth pair between the namespaces, up, with its programs; made if absent."""
        pair = self._find_pair()
        if pair is None:
            self.overlay.delete(names.INSIDE)
            self.host.delete(names.OUTSIDE)
            self._add_pair()
            pair = self._find_pair()
            if pair is None:
                raise KernelError(
                    f"veth pair {names.INSIDE}",
                    cause="another process removed it while it was made",
                    remedy="it is made again within a second",
                )
        inside, outside = pair
        if self._pair != pair:
            self.inner.attach(inside, self.programs.descriptor("ff_in"))
            self.outer.attach(outside, self.programs.descriptor("ff_out"))
            self._pair = pair
        for sockets, index in ((self.overlay, inside), (self.host, outside)):
            _set_up(sockets, index)

    def _find_pair(self) -> tuple[int, int] | None:
        inside, outside = self.overlay.index(names.INSIDE), self.host.index(names.OUTSIDE)
        return None if inside is None or outside is None else (inside, outside)

    def _add_pair(self) -> None:
        peer = {"ifname": names.OUTSIDE, "mtu": _MTU, "net_ns_fd": self.host_namespace}
        with requesting(f"making veth pair {names.INSIDE}"), self.overlay.take() as route:
            route.link("add", ifname=names.INSIDE, kind="veth", mtu=_MTU, state="up", peer=peer)

    def close(self) -> None:
        self.firewall.close()
        self._policies.close()


def _set_up(sockets: Sockets, index: int) -> None:
    with requesting(f"setting up device {index}"), sockets.take() as route:
        link = route.link("get", index=index)[0]
        if not link["flags"] & _UP:
            with contextlib.suppress(NetlinkError):
                route.link("set", index=index, IFLA_AF_SPEC=_NO_ADDRESSES)
            route.link("set", index=index, state="up")


def _host_sysctls() -> tuple[int, int, int]:
    """Lowest and highest UDP source port, and the TTL, of the calling thread's namespace."""
    low, high = _PORT_RANGE.read_text().split()
    return int(low), int(high), int(_TTL.read_text())
