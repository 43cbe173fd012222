"""The fast path of this host: opened with the overlay namespace, refreshed each second.

It has three stages, each of which includes those before (`dataplane/ebpf/probe.py`). Invariants:

- Bridge and VXLAN device can always do without it: a packet that the programs don't know in every
  respect takes the kernel path. A failure here is reported by status and stops nothing.
- The maps follow the kernel: an entry for a link or network that no longer exists is dropped.

Two locks. The *endpoint lock* guards the entries of this host's containers and which overlay
namespace is open. Docker's calls wait for it, so nobody holds it while the kernel works on more
than a few map entries. The *upkeep lock* guards everything else: opening and closing, peers,
programs on links, the tunnel. It may be held for long. A thread that needs both takes the upkeep
lock first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.ebpf import STAGES, Count, KernelSupport, Programs, probe_kernel
from dataplane.errors import KernelRefused
from driver import names
from driver.errors import FreeFlowError, KernelError
from driver.kernel import bpffs, forwarding_check, tc_ingress, underlay_routes
from driver.kernel.fastpath.attachments import Attachments
from driver.kernel.fastpath.endpoints import Endpoints
from driver.kernel.fastpath.neighbours import Cleaner, FullTables, Neighbours
from driver.kernel.fastpath.reader import FastPathReader, Stage
from driver.kernel.fastpath.tunnel import Tunnel
from driver.kernel.netlink import Sockets
from driver.kernel.overlay import Overlay
from driver.kernel.underlay import Underlay
from driver.model import Endpoint, IPAddress, Network

log = structlog.get_logger()

_FAILURES = (FreeFlowError, KernelRefused, OSError, NetlinkError)


@dataclass(frozen=True, slots=True)
class Opened:
    """The parts that belong to one overlay namespace."""

    programs: Programs
    hooks: tc_ingress.Hooks
    """Of the overlay namespace."""
    endpoints: Endpoints
    neighbours: Neighbours
    cleaner: Cleaner
    tunnel: Tunnel
    status: FastPathReader

    def close(self) -> None:
        self.programs.close()
        self.neighbours.close()
        self.tunnel.close()


class FastPath:
    """The fast path of this host.

    `programs` is the object file; None turns the fast path off, and `open` then removes what an
    earlier process left. `host` are sockets of the host's namespace; `tcx` false: do without tcx,
    as Linux before 6.6 does. Methods are safe from any thread and raise nothing.
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
        """The endpoint lock."""
        self.upkeep = threading.RLock()
        self._attachments = Attachments(self.attach_programs)
        self._peers: dict[str, frozenset[IPAddress]] = {}
        """By short ID of the network; guarded by the endpoint lock."""
        self._opened: Opened | None = None
        """Changed under both locks, read under either."""
        self._support: KernelSupport | None = None
        self._failure = "" if programs is not None else "setting EBPF=off"
        self._logged = ""

    @contextlib.contextmanager
    def _log_failures(self, what: str) -> Iterator[None]:
        """Log a failure, once for a row of equal ones, and go on."""
        try:
            yield
        except _FAILURES as error:
            text = f"{what}: {error}"
            if text != self._logged:
                self._logged = text
                log.warning("packets stay on the kernel path", reason=text)

    # --- with the overlay namespace

    def open(self, overlay: Overlay) -> None:
        """Load the programs, and take over what an earlier process left in this namespace."""
        with self.upkeep, self._lock:
            if self._programs is not None:
                try:
                    self._opened = self._open(overlay, self._programs)
                    self._failure = ""
                    return
                except _FAILURES as error:
                    self._failure = str(error)
                    log.warning("packets stay on the kernel path", reason=str(error))
            with self._log_failures("removing what an earlier process attached"):
                self._remove(overlay)

    def _open(self, overlay: Overlay, path: Path) -> Opened:
        if self._support is None:
            self._support = probe_kernel(path)
        support = self._support
        if not support.stages:
            raise KernelError(support.why_not[STAGES[0]])
        programs = Programs(path, bpffs.make(self._host_run), support)
        try:
            return self._assemble(overlay, programs)
        except BaseException:
            programs.close()
            raise

    def _assemble(self, overlay: Overlay, programs: Programs) -> Opened:
        maps, links, host, support = programs.maps, overlay.links, self._host, programs.support
        if maps.current().inside != (links.index(names.INSIDE) or 0):
            # Left by an earlier overlay namespace, whose interface indexes meant other links.
            maps.clear()
        inner, outer = self._hooks(overlay)
        full = FullTables()
        endpoints = Endpoints(
            self._lock,
            links,
            maps,
            self._attachments,
            self._peers,
            receives="receive" in support.stages,
        )
        changes = underlay_routes.RouteChanges(self._host_namespace)
        neighbours = Neighbours(maps, endpoints, host, links, changes, self._underlay, full)
        tunnel = Tunnel(
            programs,
            endpoints,
            neighbours,
            links,
            host,
            self._host_namespace,
            inner,
            outer,
            self._underlay,
            self._clock,
        )
        return Opened(
            programs,
            inner,
            endpoints,
            neighbours,
            Cleaner(maps, endpoints, neighbours, links, inner, full),
            tunnel,
            FastPathReader(maps, support.why_not, endpoints, tunnel, full, host),
        )

    def close(self) -> None:
        """Close what is open; programs and maps stay in the kernel."""
        with self.upkeep, self._lock:
            self._attachments.clear()
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    def remove(self, overlay: Overlay | None) -> list[str]:
        """Take everything of it out of the kernel; returns the names of what was removed."""
        with self.upkeep, self._lock:
            return self._remove(overlay)

    def _remove(self, overlay: Overlay | None) -> list[str]:
        removed = []
        if self._opened is not None:
            with contextlib.suppress(KernelRefused):
                self._opened.programs.maps.clear()
            self.close()
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

    def _hooks(self, overlay: Overlay | None) -> tuple[tc_ingress.Hooks, tc_ingress.Hooks]:
        """Those of the overlay namespace, and those of the host's."""
        admin = (self._host_run / bpffs.PINS).parent
        host = self._host_namespace, self._host
        # Devices of an overlay namespace that is gone went with it: only pins are left.
        there = (overlay.namespace, overlay.links) if overlay is not None else host
        return (
            tc_ingress.Hooks("overlay", *there, admin, tcx=self._tcx),
            tc_ingress.Hooks("host", *host, admin, tcx=self._tcx),
        )

    # --- endpoints and networks: the endpoint lock

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        """Let packets of an endpoint whose link exists take the fast path.

        Packets that it sends do so once its program is attached, a moment later.
        """
        with self._lock, self._log_failures(f"endpoint {endpoint.id}"):
            if self._opened is not None:
                self._opened.endpoints.add(network, endpoint)

    def detach(self, endpoint_id: str) -> None:
        """Stop sending to an endpoint whose link is about to be deleted."""
        with self._lock, self._log_failures(f"endpoint {endpoint_id}"):
            if self._opened is not None:
                self._opened.endpoints.remove(endpoint_id)

    def remove_network(self, network_id: str) -> None:
        """Forget a network whose links are about to be deleted."""
        with self._lock, self._log_failures(f"network {network_id}"):
            self._peers.pop(names.short(network_id), None)
            if self._opened is not None:
                self._opened.endpoints.remove_network(network_id)

    def check_forwarding(self, endpoint_id: str, sandbox: Path | int) -> None:
        """Check whether a container forwards packets that are addressed to it.

        Packets for such a container take the kernel path: see `forwarding_check.py`.
        """
        with self._lock:
            if self._opened is None or not self._opened.endpoints.knows(endpoint_id):
                return
        with self._log_failures(f"endpoint {endpoint_id}"):
            # Reading the container's rules may take a while: not under the lock.
            forwards = forwarding_check.may_forward(sandbox)
            with self._lock:
                opened = self._opened
                if opened and opened.endpoints.set_forwards(endpoint_id, forwards=forwards):
                    log.info("container forwards packets", endpoint=endpoint_id, so=forwards)

    # --- upkeep: the upkeep lock

    def set_peers(self, network_id: str, peers: frozenset[IPAddress]) -> None:
        """The hosts that share a network."""
        with self.upkeep, self._log_failures(f"network {network_id}"):
            with self._lock:
                before = self._peers.get(names.short(network_id))
                self._peers[names.short(network_id)] = peers
                opened = self._opened
                local = opened.endpoints.network(network_id) if opened is not None else None
            if opened is None or local is None or before == peers:
                return
            opened.neighbours.write()
            if before is None or not before <= peers:
                # Only now: the programs learn from a host as long as it is in the map of peers.
                opened.neighbours.forget_strangers(local.bridge, peers)

    def attach_programs(self) -> None:
        """Attach the programs of new links and detach those of old ones now.

        A thread does so by itself once no more containers start.
        """
        with self.upkeep:
            attach, detach = self._attachments.take()
            opened = self._opened
            if opened is None:
                return
            for index in detach:
                with self._log_failures(f"device {index}"):
                    opened.hooks.detach(index)
            for index, program in attach.items():
                with self._log_failures(f"device {index}"):
                    opened.hooks.attach(index, opened.programs.descriptor(program))
            if opened.endpoints.take_lost_network():
                with self._log_failures("forgetting networks"):
                    opened.cleaner.drop_networks_except(opened.endpoints.bridges())

    def refresh(self) -> None:
        """Check what may have changed outside the plugin, and act on it. Call it every second."""
        with self.upkeep, self._log_failures("refreshing"):
            opened = self._opened
            if opened is None:
                return
            now = self._clock()
            if opened.neighbours.are_due(now):
                opened.tunnel.read_host()
                opened.neighbours.write()
            if now >= opened.cleaner.due:
                opened.cleaner.clean(now)
                opened.neighbours.refresh_bridges()
            opened.tunnel.refresh()

    # --- status: the endpoint lock

    def opened(self) -> Opened | None:
        """The open parts, for the inspection by tests."""
        return self._opened

    def stage(self) -> Stage:
        """Which stage runs."""
        with self._lock:
            opened, failure = self._opened, self._failure
        if opened is None:
            return Stage("", failure or "no network here")
        return opened.status.stage()

    def counts(self) -> dict[str, Count]:
        """What the fast path carried for each endpoint, by the name of its link."""
        with self._lock, self._log_failures("reading counters"):
            if self._opened is not None:
                return self._opened.endpoints.counts()
        return {}

    def learned(self, network_id: str) -> dict[str, IPAddress]:
        """See `FastPathReader.learned`."""
        with self._log_failures("reading the FDB"):
            opened = self._opened
            if opened is not None:
                return opened.status.learned(network_id)
        return {}

    def carries(self, network_id: str, mac: str) -> bool:
        """See `FastPathReader.carries`."""
        with self._lock, self._log_failures("reading the FDB"):
            if self._opened is not None:
                return self._opened.status.carries(network_id, mac)
        return False
