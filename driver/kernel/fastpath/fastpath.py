"""The fast path of packets, put into the kernel beside bridge and VXLAN, which stay for all that it doesn't take.

Three stages, each with what the one before has (`dataplane/ebpf/probe.py`). Invariants:

- What it takes away is never missed: a packet that isn't known in every respect goes the ordinary way, and whatever fails
  here is said in status and stops nothing.
- The tunnel's stage is on only while nothing of the host would have looked at its packets: no IPsec policy, no rule of the
  firewall that may mean them. That is looked at again and again; what was found holds for `LEASE` seconds, so that a plugin
  that has died leaves no packet on a way that may have become wrong.
- Maps are rebuilt from facts: an entry for a link or a network that the kernel doesn't have any more is dropped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.ebpf import (
    NOWHERE,
    STAGES,
    Count,
    Found,
    Maps,
    Place,
    Port,
    Programs,
    Settings,
    Way,
    find_out,
)
from dataplane.errors import KernelRefused
from driver import names, options
from driver.errors import FreeFlowError, KernelError
from driver.kernel import bpffs, fdb, forwarding_check, traffic, underlay_routes
from driver.kernel.firewall import Firewall
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import Sockets, translate
from driver.kernel.overlay import Overlay
from driver.kernel.underlay import Underlay
from driver.kernel.xfrm import Policies
from driver.model import Endpoint, IPAddress, Network

log = structlog.get_logger()

LEASE: Final = 300.0
"""Seconds."""
IDLE: Final = 60.0
"""Seconds after which an address that isn't heard is looked for the ordinary way."""
FORGET: Final = 600.0
"""Seconds after which it isn't kept any more."""
WAYS_EVERY: Final = 10.0
TIDY_EVERY: Final = 10.0
QUIET: Final = 0.25
"""Seconds without a new endpoint before programs are put on links: each takes the kernel's lock of all links for 10 ms
(synchronize_rcu), for which starting containers wait, too."""
PATIENCE: Final = 5.0
"""Seconds after which it is done all the same."""
_MTU: Final = 65535
_UP: Final = 1
_NO_ADDRESSES: Final = {
    "attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})],
}
"""IN6_ADDR_GEN_MODE_NONE: the pair is nobody's interface."""
_PORT_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TTL: Final = Path("/proc/sys/net/ipv4/ip_default_ttl")


@dataclass(frozen=True, slots=True)
class Stage:
    """Which stage runs on this host (empty: none), and why no higher one does.

    `devices` are the host's with a program; `networks` those whose packets may take it, by short ID; `full`: what didn't fit
    into its tables, and goes the ordinary way.
    """

    stage: str = ""
    reason: str = ""
    devices: tuple[str, ...] = ()
    networks: frozenset[str] = frozenset()
    full: tuple[str, ...] = ()


@dataclass(slots=True)
class _Net:
    """A network with endpoints here: its links, and who shares it."""

    network: Network
    net: int
    vxlan: int
    peers: frozenset[IPAddress] = frozenset()


@dataclass(slots=True)
class _Endpoint:
    net: int
    mac: str
    place: Place

    @property
    def index(self) -> int:
        return self.place.index


@dataclass(slots=True)
class _State:
    """What belongs to one overlay namespace."""

    overlay: Overlay
    programs: Programs
    inner: traffic.Hooks
    outer: traffic.Hooks
    changes: underlay_routes.Changes
    firewall: Firewall
    policies: Policies
    nets: dict[str, _Net] = field(default_factory=dict)
    endpoints: dict[str, _Endpoint] = field(default_factory=dict)
    present: dict[tuple[int, IPv4Address], Way] = field(default_factory=dict)
    """What the map of peers holds."""
    slots: dict[int, int] = field(default_factory=dict)
    """Which slot of the counters a link has."""
    full: dict[str, str] = field(default_factory=dict)
    """What didn't fit into a map, by the map's name."""
    refused: dict[str, str] = field(default_factory=dict)
    """Endpoints for which there was no room, and why."""
    left: bool = False
    """Whether a network has gone of which maps may hold something."""
    ways_due: float = 0.0
    tidy_due: float = 0.0
    reason: str = "not looked at yet"
    missing: dict[IPAddress, str] = field(default_factory=dict)
    attached: dict[int, float] = field(default_factory=dict)
    """Devices of the host to which this process has attached its program, and when."""
    paired: tuple[int, int] | None = None
    """The pair to which it has."""
    sysctls: tuple[int, int, int] = (32768, 60999, 64)
    names: dict[int, str] = field(default_factory=dict)
    """Of the host's devices."""

    @property
    def maps(self) -> Maps:
        return self.programs.maps

    def close(self) -> None:
        self.programs.close()
        self.changes.close()
        self.firewall.close()
        self.policies.close()


class FastPath:
    """The fast path on this host. `programs` is the object file; None: it is off, and what an earlier process left goes.

    `host` are sockets of the host's namespace; `tcx`: false to do without (Linux before 6.6 does). Methods are safe from any thread, and none but `open` raises.
    """

    def __init__(
        self,
        programs: Path | None,
        host_run: Path,
        host_namespace: int,
        host: Sockets,
        underlay: Callable[[], Underlay],
        clock: Callable[[], float] = time.monotonic,
        *,
        tcx: bool = True,
    ) -> None:
        self._programs = programs
        self._tcx = tcx
        self._host_run = host_run
        self._host_namespace = host_namespace
        self._host = host
        self._underlay = underlay
        self._clock = clock
        self._lock = threading.RLock()
        """Never held while the kernel is asked for more than a few map entries: calls of Docker's wait for it."""
        self._keeping = threading.RLock()
        """Of whoever opens, closes or keeps it up; taken before the other."""
        self._waiting = threading.Condition()
        self._new: dict[int, str] = {}
        self._gone: set[int] = set()
        self._worker: threading.Thread | None = None
        self._stirred = 0.0
        self._peers: dict[str, frozenset[IPAddress]] = {}
        self._state: _State | None = None
        self._found: Found | None = None
        self._failure = "" if programs is not None else "setting EBPF=off"
        self._complained = ""

    # --- with the overlay namespace

    def open(self, overlay: Overlay) -> None:
        """Load the programs, and take over what an earlier process has left in this overlay namespace."""
        with self._keeping, self._lock:
            if self._programs is None:
                with self._complaining("taking off what an earlier process attached"):
                    self._remove(overlay)
                return
            try:
                self._open(overlay, self._programs)
            except (FreeFlowError, KernelRefused, OSError, NetlinkError) as error:
                self._failure = str(error)
                log.warning("packets stay on the ordinary way", reason=str(error))
                with self._complaining("taking off what an earlier process attached"):
                    self._remove(overlay)

    def _open(self, overlay: Overlay, path: Path) -> None:
        if self._found is None:
            self._found = find_out(path)
        if not self._found.stages:
            raise KernelError(self._found.why_not[STAGES[0]])
        pins = bpffs.make(self._host_run)
        programs = Programs(path, pins, self._found)
        inner, outer = self._hooks(overlay)
        state = _State(
            overlay,
            programs,
            inner,
            outer,
            underlay_routes.Changes(self._host_namespace),
            Firewall(self._host_namespace),
            Policies(self._host_namespace),
        )
        pair = self._host.index(names.OUTSIDE)
        state.attached = dict.fromkeys(outer.devices() - {pair}, float("-inf"))
        self._state = state
        self._failure = ""
        if state.maps.current().inside != (overlay.links.index(names.INSIDE) or 0):
            # Of an earlier overlay namespace: its indexes mean other links here.
            state.maps.clear()
        state.present = state.maps.all_peers()
        state.slots = state.maps.slots()

    def forget(self) -> None:
        """Close what is open; what is in the kernel stays."""
        with self._keeping, self._lock:
            with self._waiting:
                self._new.clear()
                self._gone.clear()
                self._waiting.notify_all()
            if self._state is not None:
                self._state.close()
                self._state = None

    def remove(self, overlay: Overlay | None) -> list[str]:
        """Take everything of it out of the kernel; returns the names of what was removed."""
        with self._keeping, self._lock:
            return self._remove(overlay)

    def _remove(self, overlay: Overlay | None) -> list[str]:
        removed = []
        if self._state is not None:
            with contextlib.suppress(KernelRefused):
                self._state.maps.clear()
            self.forget()
        inner, outer = self._hooks(overlay)
        pair = self._host.index(names.OUTSIDE)
        removed += [f"program at device {index}" for index in outer.detach_all() if index != pair]
        inner.detach_all()
        if overlay is not None and overlay.links.delete(names.INSIDE):
            removed.append(names.INSIDE)
        self._host.delete(names.OUTSIDE)
        if bpffs.remove(self._host_run):
            removed.append(str(bpffs.PINS))
        return removed

    def _hooks(self, overlay: Overlay | None) -> tuple[traffic.Hooks, traffic.Hooks]:
        """Of the overlay namespace, and of the host's."""
        admin = (self._host_run / bpffs.PINS).parent
        host = self._host_namespace, self._host
        # Devices of an overlay namespace that is gone went with it: only pins are left.
        there = (overlay.namespace, overlay.links) if overlay is not None else host
        return (
            traffic.Hooks("overlay", *there, admin, tcx=self._tcx),
            traffic.Hooks("host", *host, admin, tcx=self._tcx),
        )

    @contextlib.contextmanager
    def _complaining(self, what: str) -> Iterator[None]:
        """What fails is said once, and is no reason to fail for who asked."""
        try:
            yield
        except (FreeFlowError, KernelRefused, OSError, NetlinkError) as error:
            text = f"{what}: {error}"
            if text != self._complained:
                self._complained = text
                log.warning("packets stay on the ordinary way", reason=text)

    # --- endpoints and networks

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        """An endpoint's link is there: its packets may take the fast path, those that it sends a moment later."""
        with self._lock, self._complaining(f"endpoint {endpoint.id}"):
            state = self._state
            if state is None:
                return
            links = state.overlay.links
            index = links.index(names.host_veth(endpoint.id))
            bridge = links.index(names.bridge(network.id))
            if index is None or bridge is None:
                return
            if not options.ebpf(network.options):
                self._leave_alone(state, network, index)
                return
            short = names.short(endpoint.id)
            try:
                self._write_endpoint(state, network, endpoint, bridge, index)
            except KernelRefused as error:
                # No room, most likely: what the maps don't have goes the ordinary way.
                state.refused[short] = str(error)
                state.maps.drop_port(index)
                raise
            state.refused.pop(short, None)
            self._came(index, "ff_port")

    def _write_endpoint(
        self, state: _State, network: Network, endpoint: Endpoint, bridge: int, index: int
    ) -> None:
        self._know(state, network, bridge)
        ipv4 = endpoint.ipv4.ip if endpoint.ipv4 is not None else None
        ipv6 = endpoint.ipv6.ip if endpoint.ipv6 is not None else None
        slot = self._take_slot(state, index)
        port = Port(bridge, network.vni, network.port, endpoint.mac, ipv4, ipv6, slot)
        state.maps.put_port(index, port)
        known = state.endpoints.get(names.short(endpoint.id))
        ends = known is None or known.place.ends
        place = Place(index, NOWHERE, 0, ipv4, ipv6, slot, ends)
        self._put_place(state, bridge, endpoint.mac, place)
        state.endpoints[names.short(endpoint.id)] = _Endpoint(bridge, endpoint.mac, place)

    def _came(self, index: int, program: str) -> None:
        """A link is to get a program."""
        with self._waiting:
            self._gone.discard(index)
            self._new[index] = program
            self._stir()

    def _went(self, index: int) -> None:
        """A link is to be without one; or goes, and takes it with it."""
        with self._waiting:
            self._new.pop(index, None)
            self._gone.add(index)
            self._stir()

    def _stir(self) -> None:
        """See that what is to be done is done by itself. With `_waiting`."""
        self._stirred = time.monotonic()
        if self._worker is None:
            self._worker = threading.Thread(target=self._run, name="fast-path", daemon=True)
            self._worker.start()

    def _run(self) -> None:
        while True:
            with self._waiting:
                first = time.monotonic()
                while (self._new or self._gone) and (now := time.monotonic()) < min(
                    self._stirred + QUIET, first + PATIENCE
                ):
                    self._waiting.wait(self._stirred + QUIET - now)
                if not self._new and not self._gone:
                    self._worker = None
                    return
            self.attach_programs()

    def attach_programs(self) -> None:
        """Put programs on links that have come since, and take them off those that have gone; else done soon by itself."""
        with self._keeping:
            with self._waiting:
                new, self._new = self._new, {}
                gone, self._gone = self._gone, set()
            state = self._state
            if state is None:
                return
            for index in gone:
                with self._complaining(f"device {index}"):
                    state.inner.detach(index)
            for index, program in new.items():
                with self._complaining(f"device {index}"):
                    state.inner.attach(index, state.programs.descriptor(program))
            if state.left:
                state.left = False
                with self._lock:
                    nets = {each.net for each in state.nets.values()}
                with self._complaining("forgetting networks"):
                    self._forget_networks(state, nets)

    @staticmethod
    def _take_slot(state: _State, index: int) -> int:
        """A link's slot of the counters: the one that it has, or a free one."""
        slot = state.slots.get(index)
        if slot is None:
            slot = state.maps.take_slot(set(state.slots.values()))
            state.slots[index] = slot
        return slot

    @staticmethod
    def _put_place(state: _State, net: int, mac: str, place: Place) -> None:
        """A container of this host is more important than any that was heard elsewhere."""
        try:
            state.maps.put_place(net, mac, place)
        except KernelRefused:
            state.maps.make_room()
            state.maps.put_place(net, mac, place)

    def check_forwarding(self, endpoint_id: str, sandbox: Path | int) -> None:
        """See whether a container passes packets on: those for it come the kernel's way then."""
        with self._lock:
            if self._state is None or names.short(endpoint_id) not in self._state.endpoints:
                return
        with self._complaining(f"endpoint {endpoint_id}"):
            # It may take a while: not under the lock.
            ends = not forwarding_check.may_forward(sandbox)
            with self._lock:
                state = self._state
                known = state.endpoints.get(names.short(endpoint_id)) if state else None
                if state is None or known is None or known.place.ends == ends:
                    return
                known.place = replace(known.place, ends=ends)
                state.maps.put_place(known.net, known.mac, known.place)
                log.info("container passes packets on", endpoint=endpoint_id, so=not ends)

    def _know(self, state: _State, network: Network, bridge: int) -> None:
        """The network's own part: its VXLAN device, and what its header means."""
        short = names.short(network.id)
        vxlan = state.overlay.links.index(names.vxlan(network.id)) or 0
        known = state.nets.get(short)
        if known is not None and (known.net, known.vxlan, known.network) == (
            bridge,
            vxlan,
            network,
        ):
            return
        if known is not None and known.net != bridge:
            state.left = True
        if vxlan and "receive" in state.programs.found.stages:
            state.maps.put_vxlan(vxlan, bridge)
            self._came(vxlan, "ff_vxlan")
        if network.overlay:
            state.maps.put_network(network.vni, network.port, bridge)
        state.nets[short] = _Net(network, bridge, vxlan, self._peers.get(short, frozenset()))
        state.ways_due = 0.0

    def _leave_alone(self, state: _State, network: Network, index: int) -> None:
        """A network without it: also after it had it."""
        vxlan = state.overlay.links.index(names.vxlan(network.id))
        for each in [index] if vxlan is None else [index, vxlan]:
            state.maps.drop_port(each)
            state.slots.pop(each, None)
            self._went(each)
        if state.nets.pop(names.short(network.id), None) is not None:
            for short in [
                short
                for short, each in state.endpoints.items()
                if each.net == state.overlay.links.index(names.bridge(network.id))
            ]:
                known = state.endpoints.pop(short)
                state.maps.drop_port(known.index)
                state.maps.drop_place(known.net, known.mac)
            state.left = True

    def detach(self, endpoint_id: str) -> None:
        """An endpoint's link is about to go: no packet is to be sent to it any more."""
        with self._lock, self._complaining(f"endpoint {endpoint_id}"):
            state = self._state
            if state is not None:
                state.refused.pop(names.short(endpoint_id), None)
            known = state.endpoints.pop(names.short(endpoint_id), None) if state else None
            if state is None or known is None:
                return
            place = state.maps.place(known.net, known.mac)
            if place is not None and place.index == known.index:
                state.maps.drop_place(known.net, known.mac)
            state.maps.drop_port(known.index)
            state.slots.pop(known.index, None)
            self._went(known.index)

    def remove_network(self, network_id: str) -> None:
        """A network's links are about to go."""
        with self._lock, self._complaining(f"network {network_id}"):
            self._peers.pop(names.short(network_id), None)
            state = self._state
            known = state.nets.pop(names.short(network_id), None) if state else None
            if state is None or known is None:
                return
            state.maps.drop_port(known.vxlan)
            if known.vxlan:
                self._went(known.vxlan)
            state.left = True

    def _forget_networks(self, state: _State, alive: set[int]) -> None:
        """Drop what is about networks that aren't. With `_keeping`."""
        # There may be very many entries: they are looked for without the lock, and what has come since stays.
        stale = state.maps.networks_but(alive)
        with self._lock:
            stale -= {each.net for each in state.nets.values()}
        if stale:
            state.maps.forget_networks(stale)
        for key in [key for key in state.present if key[0] in stale]:
            del state.present[key]

    def set_peers(self, network_id: str, peers: frozenset[IPAddress]) -> None:
        """Who shares a network."""
        with self._keeping, self._complaining(f"network {network_id}"):
            with self._lock:
                self._peers[names.short(network_id)] = peers
                state = self._state
                known = state.nets.get(names.short(network_id)) if state else None
                if state is None or known is None or known.peers == peers:
                    return
                known.peers = peers
            self._write_peers(state)

    # --- what may change by itself

    def keep(self) -> None:
        """Look at what may have changed since, and act on it. To be called every second or so."""
        with self._keeping, self._complaining("keeping it up"):
            state = self._state
            if state is None:
                return
            now = self._clock()
            changed = bool(state.changes)
            if changed or now >= state.ways_due:
                if now >= state.ways_due:
                    state.present = state.maps.all_peers()
                state.ways_due = now + WAYS_EVERY
                state.sysctls = in_netns(self._host_namespace, _host_sysctls)
                state.names = {link.index: link.name for link in self._host.links()}
                self._write_peers(state)
            if now >= state.tidy_due:
                state.tidy_due = now + TIDY_EVERY
                self._tidy(state)
                self._refresh(state)
            before = state.reason
            state.reason = self._decide(state)
            if state.reason != before and before != "not looked at yet":
                log.info("tunnel of the fast path", on=not state.reason, reason=state.reason)

    def _write_peers(self, state: _State) -> None:
        """Where all peers are reached now. With `_keeping`."""
        with self._lock:
            members = [(known.net, known.peers) for known in state.nets.values()]
        try:
            local = self._underlay().address
        except FreeFlowError:
            members, local = [], None
        wanted = {peer for _, peers in members for peer in peers}
        found = underlay_routes.to(self._host, sorted(wanted, key=str), local)
        state.missing = found.refused
        should = {
            (net, peer): found.found[peer]
            for net, peers in members
            for peer in peers
            if isinstance(peer, IPv4Address) and peer in found.found
        }
        # Those that go make room for those that come.
        for key in state.present.keys() - should.keys():
            state.maps.drop_peer(*key)
            del state.present[key]
        left_out, why = 0, ""
        for key, way in should.items():
            if state.present.get(key) == way:
                continue
            try:
                state.maps.put_peer(*key, way)
                state.present[key] = way
            except KernelRefused as error:
                left_out, why = left_out + 1, str(error)
        self._say_full(state, "peers", f"{left_out} peers of networks: {why}" if left_out else "")

    @staticmethod
    def _say_full(state: _State, table: str, what: str) -> None:
        """Note what doesn't fit into a table; empty: all does."""
        if not what:
            state.full.pop(table, None)
        elif state.full.get(table) != what:
            state.full[table] = what
            log.warning("a table of the fast path is full", table=table, left_out=what)

    def _tidy(self, state: _State) -> None:
        """Drop what is about links that the kernel doesn't have. With `_keeping`."""
        alive = {link.index for link in state.overlay.links.links()}
        for index in state.inner.devices() - alive:
            state.inner.detach(index)
        # What has come since stays.
        with self._lock:
            alive |= {known.index for known in state.endpoints.values()}
            nets = {each.net for each in state.nets.values()} & alive
        state.maps.forget_ports(alive)
        state.maps.forget_silent(time.monotonic_ns() - int(FORGET * 1e9))
        with self._lock:
            for index in state.slots.keys() - alive:
                del state.slots[index]
        self._forget_networks(state, nets)
        used = state.maps.places_used()
        self._say_full(
            state,
            "places",
            "addresses of containers elsewhere" if used >= state.maps.places.capacity else "",
        )

    def _refresh(self, state: _State) -> None:
        """Tell bridges and VXLAN devices of addresses whose packets they don't see: what goes the ordinary way would be
        flooded."""
        now = time.monotonic_ns()
        live: dict[int, dict[str, IPAddress]] = {}
        for net, mac, place in state.maps.all_places():
            if not place.index and now - place.seen < IDLE * 1e9:
                live.setdefault(net, {})[mac] = place.peer
        for known in list(state.nets.values()):
            if known.vxlan and known.net in live:
                fdb.remember(state.overlay.links, known.vxlan, live[known.net])

    def _decide(self, state: _State) -> str:
        """Switch the tunnel's stage on or off; returns why it is off, empty if it is on."""
        reason, devices = self._obstacle(state)
        if not reason:
            try:
                self._make_pair(state)
                self._attach_to_host(state, devices)
            except (FreeFlowError, KernelRefused, OSError, NetlinkError) as error:
                reason = str(error)
        # Headers are put on only where they are taken off, and not any more before they aren't.
        self._set(state, 0 if reason else state.programs.found.flags)
        for index in state.attached.keys() - (set() if reason else devices):
            state.outer.detach(index)
            del state.attached[index]
        return reason

    def _attach_to_host(self, state: _State, devices: set[int]) -> None:
        """Now and then again: somebody else may have taken all programs off a device."""
        now = self._clock()
        for index in devices:
            if now - state.attached.get(index, float("-inf")) > WAYS_EVERY:
                state.outer.attach(index, state.programs.descriptor("ff_nic"))
                state.attached[index] = now

    def _obstacle(self, state: _State) -> tuple[str, set[int]]:
        """Why headers can't be ours to make, and the devices by which peers are reached."""
        lacking = state.programs.found.why_not.get("tunnel")
        if lacking:
            return lacking, set()
        overlays = [known for known in list(state.nets.values()) if known.vxlan]
        if not overlays:
            return "no network here has other hosts", set()
        underlay = self._underlay()
        if underlay.address is not None and underlay.address.version != 4:
            return (
                "the underlay's address is IPv6: the outer checksum would have to be made too",
                set(),
            )
        present = state.present
        devices = {way.index for way in present.values()}
        if not devices:
            missing = next(iter(state.missing.items()), None)
            return (f"peer {missing[0]}: {missing[1]}" if missing else "no peers are known"), set()
        if state.policies.exist():
            return "the host has IPsec policies, which would be passed by", set()
        if not devices <= state.names.keys():
            state.ways_due = 0.0
            return "a device has just come", set()
        blocked = state.firewall.obstacle(
            ports={known.network.port for known in overlays},
            devices={index: state.names[index] for index in devices},
            own={way.source for way in present.values()},
            peers={peer for _, peer in present},
        )
        return blocked, devices

    def _set(self, state: _State, flags: int) -> None:
        near, far = state.paired or (0, 0)
        low, high, ttl = state.sysctls
        state.maps.decide(
            Settings(
                lease=time.monotonic_ns() + int(LEASE * 1e9),
                idle=int(IDLE * 1e9),
                inside=near,
                outside=far,
                flags=flags,
                ports=(low, high),
                ttl=ttl,
            )
        )

    def _make_pair(self, state: _State) -> None:
        """The veth pair between the namespaces, up, with its programs."""
        links = state.overlay.links
        near, far = links.index(names.INSIDE), self._host.index(names.OUTSIDE)
        if near is None or far is None:
            links.delete(names.INSIDE)
            self._host.delete(names.OUTSIDE)
            with links.take() as route:
                try:
                    route.link(
                        "add",
                        ifname=names.INSIDE,
                        kind="veth",
                        mtu=_MTU,
                        state="up",
                        peer={
                            "ifname": names.OUTSIDE,
                            "mtu": _MTU,
                            "net_ns_fd": self._host_namespace,
                        },
                    )
                except NetlinkError as error:
                    raise translate(error, f"making veth pair {names.INSIDE}") from error
            near, far = links.index(names.INSIDE), self._host.index(names.OUTSIDE)
            if near is None or far is None:
                raise KernelError(f"veth pair {names.INSIDE} vanished while it was made")
        if state.paired != (near, far):
            state.inner.attach(near, state.programs.descriptor("ff_in"))
            state.outer.attach(far, state.programs.descriptor("ff_out"))
            state.paired = (near, far)
        for sockets, index in ((links, near), (self._host, far)):
            _set_up(sockets, index)

    # --- what others see

    def stage(self) -> Stage:
        """Which stage runs."""
        with self._lock:
            state = self._state
            if state is None:
                return Stage("", self._failure or "no network here")
            why_not, reason = state.programs.found.why_not, state.reason
            nets, attached = frozenset(state.nets), set(state.attached)
            full = [f"{table}: {what}" for table, what in sorted(state.full.items())]
            if state.refused:
                why = next(iter(state.refused.values()))
                full.append(f"{len(state.refused)} containers: {why}")
        on_host = tuple(sorted(link.name for link in self._host.links() if link.index in attached))
        if not reason:
            return Stage("tunnel", "", on_host, nets, tuple(full))
        for stage in ("receive", "same-host"):
            if stage not in why_not:
                return Stage(stage, reason, on_host, nets, tuple(full))
        return Stage("", reason)

    def counts(self) -> dict[str, Count]:
        """What endpoints had of it, by the names of their links."""
        with self._lock:
            state = self._state
            if state is None:
                return {}
            found: dict[str, Count] = {}
            with self._complaining("reading counters"):
                for short, known in state.endpoints.items():
                    count = state.maps.count(known.index)
                    if count is not None:
                        found[names.HOST_VETH + short] = count
            return found

    def learned(self, network_id: str) -> dict[str, IPAddress]:
        """MAC address → the peer where it was heard lately."""
        with self._lock:
            state = self._state
            known = state.nets.get(names.short(network_id)) if state else None
            if state is None or known is None:
                return {}
            maps, own = state.maps, known.net
        now = time.monotonic_ns()
        found: dict[str, IPAddress] = {}
        with self._complaining("reading places"):
            for net, mac, place in maps.all_places():
                heard = not place.index and now - place.seen < IDLE * 1e9
                if net == own and heard and place.peer != NOWHERE:
                    found[mac] = place.peer
        return found

    def takes(self, network_id: str, mac: str) -> bool:
        """Whether packets from this host's containers to a MAC address take it now."""
        with self._lock:
            state = self._state
            known = state.nets.get(names.short(network_id)) if state else None
            if state is None or known is None:
                return False
            with self._complaining("reading places"):
                place = state.maps.place(known.net, mac.lower())
                if place is None or place.index:
                    return place is not None
                fresh = time.monotonic_ns() - place.seen < IDLE * 1e9
                return fresh and not state.reason and place.peer in known.peers
            return False


def _set_up(sockets: Sockets, index: int) -> None:
    with sockets.take() as route:
        try:
            link = route.link("get", index=index)[0]
            if not link["flags"] & _UP:
                with contextlib.suppress(NetlinkError):
                    route.link("set", index=index, IFLA_AF_SPEC=_NO_ADDRESSES)
                route.link("set", index=index, state="up")
        except NetlinkError as error:
            raise translate(error, f"setting up device {index}") from error


def _host_sysctls() -> tuple[int, int, int]:
    """The kernel's range of UDP source ports, and how far its packets go: of the calling thread's namespace."""
    low, high = _PORT_RANGE.read_text().split()
    return int(low), int(high), int(_TTL.read_text())
