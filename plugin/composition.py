"""The composition root: the one place where the real parts are made and put together.

Parts don't know each other where they only need to hear of a change. `Changes` is made first and
passes each change on to the parts that listen.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from dataplane.router_client import RouterClient
from driver.accelerator import Accelerator, ThisHost
from driver.announcer import Announcer
from driver.driver import Driver, DriverConfig, self_address
from driver.encryption import Encryption
from driver.engine import DockerDirectory
from driver.errors import FreeFlowError, SettingError
from driver.hints import Hints
from driver.ipv6_override import Ipv6Override
from driver.kernel import shared_dir
from driver.kernel.addresses import exchange
from driver.kernel.linux import LinuxKernel
from driver.kernel.namespace import is_namespace
from driver.kernel_refresh import KernelRefresh
from driver.model import Endpoint, EngineView, IPAddress
from driver.other_networks import OtherNetworks, hosts_of
from driver.recovery import Collector, recover
from driver.resolver import EmbeddedDns
from driver.store import Store
from driver.sync import Syncer
from driver.vip import NftBalancer
from plugin import host_command, library_file
from plugin.admin import AdminAnswers, create_admin
from plugin.app import create_app
from plugin.calls import CallStatistics
from plugin.deaths import ROUTER, Deaths
from plugin.host_paths import HostPaths
from plugin.paths import PathLabels
from plugin.ping import Ping
from plugin.router_process import CONTROL, RouterProcess, router_command, router_settings
from plugin.runtime_networks import FILE, PATIENCE, RuntimeNetworks
from plugin.settings import Settings
from plugin.snapshot import Snapshot
from plugin.traffic_names import TrafficNames

log = structlog.get_logger()

PROGRAMS: Final = Path("/usr/lib/freeflow/overlay.bpf.o")
"""Where `plugin/image` puts the programs that the kernel runs."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Part(Protocol):
    """A part that works in the background."""

    def start(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plugin:
    """The plugin: two WSGI apps, and the parts that work in the background, in their order."""

    app: Any
    admin: Any
    recover: Callable[[], None]
    parts: tuple[Part, ...]

    def start(self) -> None:
        """Recover, then start the background work.

        Failures are in the log and in `freeflow status`; they don't stop the plugin.
        """
        self.recover()
        for part in self.parts:
            part.start()


@dataclass(slots=True)
class Changes:
    """Passes changes on to listeners. All of them are added before any part is started."""

    on_wake: list[Callable[[], None]] = field(default_factory=list)
    """Networks or endpoints have changed."""
    on_joined: list[Callable[[Endpoint], None]] = field(default_factory=list)
    """A container is about to get this endpoint."""
    on_synced: list[Callable[[], None]] = field(default_factory=list)
    """Peers, services or VIPs have changed."""

    on_encryption: list[Callable[[], None]] = field(default_factory=list)
    """Keys of this host or of peers have changed."""

    def wake(self) -> None:
        for listener in self.on_wake:
            listener()

    def encryption_changed(self) -> None:
        for listener in self.on_encryption:
            listener()

    def joined(self, endpoint: Endpoint) -> None:
        for listener in self.on_joined:
            listener(endpoint)

    def synced(self) -> None:
        for listener in self.on_synced:
            listener()


@dataclass(slots=True)
class HostState:
    """This host's addresses as Docker reports them, and its `freeflow` command."""

    store: Store
    command: Path | None
    listed: IPAddress | None = None
    """Address at which the engine lists this node."""
    _installed: bool = False

    def advertised(self) -> IPAddress | None:
        return self_address(self.store)

    def addresses(self) -> frozenset[IPAddress]:
        """Those by which other hosts know this one."""
        known = {self.advertised(), self.listed}
        return frozenset(address for address in known if address is not None)

    def own(self, kernel: LinuxKernel) -> ThisHost:
        try:
            underlay, segments = kernel.underlay().address, kernel.segments_tunnels()
        except FreeFlowError:
            underlay = segments = None
        return ThisHost(self.addresses(), underlay or self.advertised(), segments)

    def announce(self) -> None:
        """Put the command's place-holder on the host."""
        if self.command is not None:
            host_command.announce(self.command)

    def engine_seen(self, driver: Driver, view: EngineView) -> None:
        """The engine has answered; called by the sync loop."""
        self.listed = view.node_address
        if view.node_address is not None and self.advertised() is None:
            driver.discover_new(str(view.node_address), is_self=True)
        # Installed again when it is missing: a user may have removed it, or the command of another
        # plugin took its place and removed itself together with that plugin.
        command = self.command
        if command is not None and not (self._installed and host_command.exists(command)):
            self._installed = True
            host_command.install(command, view.root)


@dataclass(frozen=True, slots=True)
class Core:
    """The parts that most others need."""

    host: HostState
    kernel: LinuxKernel
    driver: Driver
    directory: DockerDirectory
    syncer: Syncer
    accelerator: Accelerator
    others: OtherNetworks
    router: RouterClient
    encryption: Encryption


def compose(
    paths: HostPaths,
    settings: Settings,
    bad_settings: tuple[SettingError, ...] = (),
    deaths: Deaths | None = None,
) -> Plugin:
    """Make all parts; nothing works yet. `deaths` of parts are noted there and shown in status."""
    deaths = deaths or Deaths()
    deaths.watch_threads()
    changes = Changes()
    core = _core(paths, settings, changes)
    ipv6_override = Ipv6Override(exchange, core.syncer.sandbox)
    _subscribe(changes, core, ipv6_override)
    failures: list[FreeFlowError] = []
    router = _router(paths, settings, core.accelerator, failures, deaths)
    statistics = CallStatistics()
    app = create_app(
        core.driver,
        deadline=settings.request_deadline,
        statistics=statistics,
        bad_settings=bad_settings,
    )
    snapshot = Snapshot(
        driver=core.driver,
        kernel=core.kernel,
        syncer=core.syncer,
        router=core.router,
        encryption=core.encryption.state,
        statistics=statistics,
        settings=settings,
        bad_settings=bad_settings,
        failures=failures,
        started=time.monotonic(),
        clock=time.monotonic,
        deaths=deaths,
        others=core.others.asking,
    )
    networks = _runtime_networks(paths, settings, core)
    changes.on_wake.append(networks.publish)
    changes.on_synced.append(networks.publish)

    def recover_all() -> None:
        # Docker gets its first answer afterwards.
        core.host.announce()
        _recover(core.driver, ipv6_override, failures)
        networks.publish()

    answers = _answers(core, snapshot, networks)
    return Plugin(
        app=app,
        admin=create_admin(answers),
        recover=recover_all,
        parts=tuple(_parts(core, settings, answers, router)),
    )


def _core(paths: HostPaths, settings: Settings, changes: Changes) -> Core:
    host = HostState(Store(paths.state), paths.host_bin)
    kernel = LinuxKernel(
        paths.host_run,
        settings.underlay,
        host.advertised,
        PROGRAMS if settings.ebpf == "on" else None,
        sessions=settings.session_port or settings.vxlan_port,
        listed=lambda: host.listed,
        encryption_port=settings.encryption_port,
    )
    config = DriverConfig(
        settings.scope, settings.vxlan_port, settings.mtu, settings.encrypted == "on"
    )
    driver = Driver(host.store, kernel, config, clock=time.time)
    directory = DockerDirectory(paths.engine_socket)
    client = RouterClient(paths.host_run / CONTROL)
    encryption = Encryption(
        host.store,
        kernel.encryption,
        client,
        states=lambda: syncer.state(),
        own=host.addresses,
        period=settings.encryption_rotation,
        changed=changes.encryption_changed,
    )
    kernel.outer = encryption.outer
    syncer = Syncer(
        driver,
        directory,
        EmbeddedDns(),
        NftBalancer(),
        sandboxes=paths.sandboxes,
        interval=settings.sync_interval,
        clock=time.monotonic,
        collect=Collector(driver, directory, time.monotonic).collect,
        engine_seen=lambda view: host.engine_seen(driver, view),
        changed=changes.synced,
        reach=encryption.reach,
    )
    others = OtherNetworks(
        directory,
        sandboxes=paths.sandboxes,
        on=settings.other_networks == "on",
        changed=changes.synced,
    )
    accelerator = Accelerator(
        host.store,
        syncer,
        client,
        router_settings(settings),
        own=lambda: host.own(kernel),
        others=others.known,
        expected=others.expected,
        encryption=encryption.keys,
        rdma_encrypted=settings.rdma_encrypted == "on",
    )
    return Core(host, kernel, driver, directory, syncer, accelerator, others, client, encryption)


def _subscribe(changes: Changes, core: Core, ipv6_override: Ipv6Override) -> None:
    core.driver.on_change(changes.wake, changes.joined)
    changes.on_wake += [core.syncer.wake, core.accelerator.wake, core.encryption.wake]
    changes.on_encryption += [core.accelerator.wake, core.syncer.wake]
    changes.on_synced += [core.accelerator.wake, lambda: _guard_routers(core)]
    changes.on_joined += [
        Announcer(core.kernel).endpoint_joined,
        core.syncer.endpoint_joined,
        ipv6_override.endpoint_joined,
        lambda _endpoint: core.accelerator.wake(),
    ]


def _guard_routers(core: Core) -> None:
    """Tell the kernel with which hosts the router has sessions because of other drivers."""
    hosts = hosts_of(core.others.known(), core.host.own(core.kernel).addresses)
    core.kernel.set_routers(hosts)


def _runtime_networks(paths: HostPaths, settings: Settings, core: Core) -> RuntimeNetworks:
    return RuntimeNetworks(
        core.host.store,
        core.syncer.state,
        # Its own: a request of freeflow-runc waits shortly, and changes nothing for the sync loop.
        DockerDirectory(paths.engine_socket, PATIENCE),
        paths.admin_socket.with_name(FILE),
        on=settings.acceleration == "on",
        swarm=settings.scope == "global",
        others=core.others.known,
        all_others=settings.other_networks == "on",
    )


def _answers(core: Core, snapshot: Snapshot, networks: RuntimeNetworks) -> AdminAnswers:
    ping = Ping(core.driver, core.kernel, core.syncer, router=core.router)
    labels = PathLabels(core.driver, core.kernel, core.syncer)
    named = TrafficNames(core.driver, core.kernel, core.syncer, core.others.known)
    return AdminAnswers(
        status=snapshot,
        ping=ping,
        connections=lambda: labels.connections(core.router.connections()),
        verbs=core.router.verbs,
        traffic=lambda: named.report(core.router.traffic()),
        addresses=named.addresses,
        runtime=networks.answer,
    )


def _parts(
    core: Core, settings: Settings, answers: AdminAnswers, router: RouterProcess | None
) -> Iterator[Part]:
    """What works in the background, in the order of its start."""
    syncer = core.syncer
    yield syncer
    yield Hints(core.kernel, core.directory, syncer.state, syncer.hint, time.monotonic)
    yield KernelRefresh(core.kernel, lambda: _sandboxes(core.host.store, syncer))
    if settings.metrics_addr is not None:
        yield _exporter(answers, settings, settings.metrics_addr)
    if router is not None:
        yield core.others
        yield core.accelerator
        yield router
        yield core.encryption


def _exporter(answers: AdminAnswers, settings: Settings, address: tuple[str, int]) -> Part:
    """Metrics and the page."""
    # Not imported at the top: few have it on, and the import takes a while.
    from plugin.metrics import Exporter
    from plugin.page_app import PageAccess, create_page, is_loopback
    from plugin.page_feed import PageFeed, PageSource

    source = PageSource(answers.status, answers.addresses, answers.traffic)
    access = PageAccess(settings.ui_token, is_loopback(address[0]))
    return Exporter(answers.status, address, create_page(PageFeed(source), access))


def _sandboxes(store: Store, syncer: Syncer) -> Iterator[tuple[str, Path]]:
    """IDs of endpoints and where the namespaces of their containers are."""
    for endpoint in store.endpoints():
        path = syncer.sandbox(endpoint)
        if path is not None and is_namespace(path):
            yield endpoint.id, path


def _recover(driver: Driver, ipv6_override: Ipv6Override, failures: list[FreeFlowError]) -> None:
    try:
        recover(driver, BOOT_ID.read_text().strip())
        ipv6_override.resume(driver.store.endpoints())
    except FreeFlowError as error:
        failures.append(error)
        log.error("recovery failed", reason=str(error))


def _router(
    paths: HostPaths,
    settings: Settings,
    accelerator: Accelerator,
    failures: list[FreeFlowError],
    deaths: Deaths,
) -> RouterProcess | None:
    """The router's process; None if there is no folder for it, which log and status report."""
    if not paths.host_run.is_dir():
        return None
    try:
        folder = shared_dir.make(paths.host_run)
    except FreeFlowError as error:
        failures.append(error)
        log.error("no connection can be accelerated", reason=str(error))
        return None
    library_file.place(folder)
    command = router_command(paths.host_run, folder, settings.log_level, paths.swarm)
    starts = itertools.count()

    def started() -> None:
        # Each start but the first replaces a router that ended.
        if next(starts):
            deaths.note(ROUTER)
        accelerator.router_started()

    client = RouterClient(paths.host_run / CONTROL, timeout=2)
    return RouterProcess(command, started, answers=client.answers)
