"""Makes the status of this host from the facts of driver, kernel, sync loop and router."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from dataplane.control import RdmaFacts
from dataplane.errors import DataplaneError
from driver import names, options
from driver.driver import Driver
from driver.encryption import EncryptionState
from driver.errors import FreeFlowError, SettingError
from driver.kernel.fastpath import Stage
from driver.kernel.guard import Guarded
from driver.kernel.underlay import Underlay
from driver.model import Endpoint, Network
from driver.other_networks import OtherNetwork, RefusedNetwork
from driver.sync import NetworkState
from plugin import problems
from plugin.calls import CallStatistics
from plugin.deaths import Deaths
from plugin.encryption_status import encryption_status
from plugin.facts import KernelFacts, RouterFacts, SyncFacts
from plugin.paths import FAST, OVERLAY, PATHS, relabel
from plugin.services import service_status
from plugin.settings import HIDDEN, SETTINGS, Settings
from plugin.status import (
    EncryptionStatus,
    EndpointStatus,
    FastPathStatus,
    Finding,
    GuardStatus,
    HostStatus,
    NetworkStatus,
    OtherNetworkStatus,
    PeerStatus,
    RouterStatus,
    Status,
)
from plugin.totals import Counts, Totals
from plugin.version import VERSION

ROUTER_PATIENCE = 10.0
"""Seconds after the start; until then a router that doesn't answer is still being started."""


def _setting_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        host, port = value
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(secret: bool, value: object) -> str:
    return HIDDEN if secret and value else _setting_text(value)


def _counts(
    endpoint: Endpoint, links: dict[str, dict[str, int]], spoofed: dict[str, int]
) -> Counts | None:
    """Bytes received and sent, frames dropped; None if the endpoint has no link."""
    link = links.get(names.host_veth(endpoint.id))
    if link is None:
        return None
    # Counters of the host's end of the veth pair: it receives the bytes that the container sent.
    return link["tx_bytes"], link["rx_bytes"], spoofed.get(names.short(endpoint.id), 0)


def _endpoint(endpoint: Endpoint, container: str, counts: Counts | None) -> EndpointStatus:
    received, sent, dropped = counts or (0, 0, 0)
    return EndpointStatus(
        id=endpoint.id,
        container=container,
        ipv4=str(endpoint.ipv4 or ""),
        ipv6=str(endpoint.ipv6 or ""),
        mac=endpoint.mac,
        joined=endpoint.sandbox_key is not None,
        rx_bytes=received,
        tx_bytes=sent,
        spoofed=dropped,
    )


def _with_sums(network: NetworkStatus, sums: Counts) -> NetworkStatus:
    received, sent, dropped = sums
    return msgspec.structs.replace(network, rx_bytes=received, tx_bytes=sent, spoofed=dropped)


def _other(network: OtherNetwork | RefusedNetwork) -> OtherNetworkStatus:
    view = network.view
    common = OtherNetworkStatus(
        id=view.id,
        name=view.name,
        driver=view.driver,
        subnets=[str(subnet.pool) for subnet in view.subnets],
    )
    if isinstance(network, RefusedNetwork):
        return msgspec.structs.replace(common, reason=network.reason)
    return msgspec.structs.replace(
        common,
        between_hosts=network.crosses_hosts,
        containers={
            endpoint.container: [str(address) for address in endpoint.addresses]
            for endpoint in network.endpoints
        },
    )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Call it for a `Status`. `failures` are errors at start; `started` and `clock` in seconds."""

    driver: Driver
    kernel: KernelFacts
    syncer: SyncFacts
    router: RouterFacts
    statistics: CallStatistics
    settings: Settings
    bad_settings: tuple[SettingError, ...]
    failures: list[FreeFlowError]
    started: float
    clock: Callable[[], float]
    deaths: Deaths = field(default_factory=Deaths)
    totals: Totals = field(default_factory=lambda: Totals(3))
    others: Callable[[], Sequence[OtherNetwork | RefusedNetwork]] = tuple
    encryption: Callable[[], EncryptionState | None] = lambda: None

    def __call__(self) -> Status:
        now = self.clock()
        stage = self.kernel.stage()
        guarded = self.kernel.guarded()
        networks = self._networks(now, stage)
        others = [_other(network) for network in self.others()]
        findings = self._problems(networks, others, stage, guarded)
        router = self._router(now, findings, stage, networks)
        encryption = self._encryption(router)
        findings.extend(problems.encryption(encryption))
        counts = Counter(dict.fromkeys(PATHS, 0))
        for entry in router.paths:
            counts[entry.path] += entry.count
        return Status(
            version=VERSION,
            healthy=not findings,
            uptime=round(now - self.started, 1),
            host=self._host(),
            settings={
                setting.name: _shown(setting.secret, getattr(self.settings, setting.name.lower()))
                for setting in SETTINGS
            },
            networks=networks,
            problems=findings,
            calls=self.statistics.summaries(),
            path_counts=dict(counts),
            router=router,
            fastpath=FastPathStatus(stage.stage, stage.reason, list(stage.devices)),
            guard=GuardStatus(
                list(guarded.ports), guarded.reason, [str(sender) for sender in guarded.strangers]
            ),
            parts=self.deaths.all(),
            other_networks=others,
            encryption=encryption,
        )

    def _encryption(self, router: RouterStatus) -> EncryptionStatus | None:
        """What encrypts the packets to each host that shares an encrypted network."""
        state = self.encryption()
        if state is None:
            return None
        engine, _ = self.syncer.engine()
        known = {str(ip): name for ip, name in (engine.hostnames if engine else {}).items()}
        facts = router.rdma.hosts if router.rdma is not None else ()
        sessions = {host.address for host in facts if host.session}
        return encryption_status(state, known, sessions)

    def _networks(self, now: float, stage: Stage) -> list[NetworkStatus]:
        states = self.syncer.state()
        links = self.kernel.links()
        spoofed = self.kernel.spoofed()
        own = str(self.driver.self_address() or "")
        store = self.driver.store
        known = [
            (
                network,
                [(item, _counts(item, links, spoofed)) for item in store.endpoints(network.id)],
            )
            for network in store.networks()
        ]
        sums = self.totals.update(
            {
                network.id: {endpoint.id: counts for endpoint, counts in endpoints}
                for network, endpoints in known
            }
        )
        found = []
        for network, endpoints in known:
            state = states.get(network.id, NetworkState())
            status = self._network(network, endpoints, state, own, now, stage)
            found.append(_with_sums(status, sums[network.id]))
        return found

    def _router(
        self, now: float, findings: list[Finding], stage: Stage, networks: list[NetworkStatus]
    ) -> RouterStatus:
        """The router's own account; a finding is added if it doesn't answer."""
        try:
            statistics = self.router.statistics()
            counts = self.router.paths().paths
        except DataplaneError as error:
            if now - self.started > ROUTER_PATIENCE:
                what = "the router does not answer; new connections stay on the overlay"
                findings.append(Finding.of("warning", what, error))
            return RouterStatus(up=False)

        findings.extend(problems.bugs(statistics.bugs))
        encrypted = {network.id for network in networks if network.encrypted}

        def runs(network: str, elsewhere: bool) -> bool:
            """Whether the fast path runs on a network."""
            return names.short(network) in stage.networks and (
                not elsewhere or (stage.stage == "tunnel" and network not in encrypted)
            )

        facts = msgspec.structs.asdict(statistics) | {
            "uptime": round(statistics.uptime, 1),
            "containers": tuple(each for each in statistics.containers if each.container),
            "rdma": self._with_names(statistics.rdma),
        }
        paths = sorted(
            relabel(counts, runs), key=lambda each: (each.network, each.path, each.reason)
        )
        return RouterStatus(up=True, paths=tuple(paths), **facts)

    def _with_names(self, rdma: RdmaFacts) -> RdmaFacts:
        """The same with the names of hosts, where they are known."""
        engine, _ = self.syncer.engine()
        known = {str(ip): name for ip, name in (engine.hostnames if engine else {}).items()}
        hosts = tuple(
            msgspec.structs.replace(host, name=known.get(host.address, "")) for host in rdma.hosts
        )
        return msgspec.structs.replace(rdma, hosts=hosts)

    def _network(
        self,
        network: Network,
        endpoints: list[tuple[Endpoint, Counts | None]],
        state: NetworkState,
        own: str,
        now: float,
        stage: Stage,
    ) -> NetworkStatus:
        view = state.view
        engine, _ = self.syncer.engine()
        hostnames = engine.hostnames if engine else {}
        containers = {item.endpoint_id: item.name for item in view.containers} if view else {}
        clients = {
            containers.get(endpoint.id) or endpoint.id[:12]: self.syncer.leads(path)
            for endpoint, _ in endpoints
            if (path := self.syncer.sandbox(endpoint)) is not None
        }
        return NetworkStatus(
            id=network.id,
            name=view.name if view else "",
            vni=network.vni,
            port=network.port,
            mtu=network.mtu,
            prefix6=str(network.prefix6) if network.ipv6 else "",
            subnets=[str(subnet.pool) for subnet in network.subnets],
            internal=network.internal,
            ipv6=network.ipv6,
            path=FAST if names.short(network.id) in stage.networks else OVERLAY,
            acceleration=network.acceleration,
            encrypted=network.encrypted,
            verbs=network.acceleration and options.verbs(network.options),
            endpoints=[
                _endpoint(endpoint, containers.get(endpoint.id, ""), counts)
                for endpoint, counts in endpoints
            ],
            peers=[
                PeerStatus(
                    hostnames.get(peer.address, ""), str(peer.address), str(peer.address) == own
                )
                for peer in (view.peers if view else ())
            ],
            services=[
                service_status(service, state, clients)
                for service in (view.services if view else ())
            ],
            synced=None if state.seen is None else round(now - state.seen, 1),
            error=state.error or "",
        )

    def _host(self) -> HostStatus:
        engine, _ = self.syncer.engine()
        underlay = self._underlay()
        if isinstance(underlay, FreeFlowError):
            device, mtu, address, segments = "", 0, "", None
        else:
            device, mtu, address = underlay.device, underlay.mtu, str(underlay.address or "")
            segments = self.kernel.segments_tunnels()
        uname = os.uname()
        return HostStatus(
            hostname=engine.hostname if engine else uname.nodename,
            engine=engine.version if engine else "",
            swarm=bool(engine and engine.swarm),
            manager=bool(engine and engine.manager),
            node_id=engine.node_id if engine else "",
            address=address or str(self.driver.self_address() or ""),
            underlay=device,
            underlay_mtu=mtu,
            kernel=uname.release,
            tunnel_offload=segments,
        )

    def _problems(
        self,
        networks: list[NetworkStatus],
        others: list[OtherNetworkStatus],
        stage: Stage,
        guarded: Guarded,
    ) -> list[Finding]:
        _, engine_error = self.syncer.engine()
        return [
            *problems.dead_parts(self.deaths.all()),
            *problems.start(self.bad_settings, self.failures),
            *problems.underlay(self._underlay(), self.settings, networks),
            *problems.engine(engine_error),
            # A silent engine is one problem, however many networks can't be synced for it.
            *([] if engine_error else problems.stale_networks(networks)),
            *problems.other_networks(others),
            *problems.spoofed_frames(networks),
            *problems.vips(self.syncer.vip_errors(), self._sandboxes(networks)),
            *problems.scope(self.settings, networks),
            *problems.open_port(guarded),
            *problems.full_tables(stage),
            *problems.unannounced_addresses(self.settings, networks),
        ]

    def _underlay(self) -> Underlay | FreeFlowError:
        try:
            return self.kernel.underlay()
        except FreeFlowError as error:
            return error

    def _sandboxes(self, networks: list[NetworkStatus]) -> dict[Path, str]:
        """Whose sandbox it is; a container may have several endpoints."""
        names_of = {item.id: item.container for network in networks for item in network.endpoints}
        found = {}
        for endpoint in self.driver.store.endpoints():
            sandbox = self.syncer.sandbox(endpoint)
            if sandbox is not None:
                found[sandbox] = names_of.get(endpoint.id) or endpoint.id[:12]
        return found
