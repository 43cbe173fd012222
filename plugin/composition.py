"""The composition root: the one place where the real parts are made and put together."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from dataplane.control import Connections
from dataplane.router_client import RouterClient
from driver.accelerator import Accelerator, ThisHost
from driver.announcer import Announcer
from driver.driver import Driver, DriverConfig
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
from driver.recovery import Collector, Recovered, recover
from driver.resolver import EmbeddedDns
from driver.store import Store
from driver.sync import Syncer
from driver.vip import NftBalancer
from plugin import host_command, library
from plugin.admin import create_admin
from plugin.app import create_app
from plugin.calls import CallStatistics
from plugin.deaths import ROUTER, Deaths
from plugin.paths import PathLabels
from plugin.ping import Ping
from plugin.router import CONTROL, RouterProcess, router_command, router_settings
from plugin.server import Paths
from plugin.settings import Settings
from plugin.snapshot import Snapshot

if TYPE_CHECKING:
    from plugin.metrics import Exporter

log = structlog.get_logger()

PROGRAMS: Final = Path("/usr/lib/freeflow/overlay.bpf.o")
"""Where `plugin/image` puts the programs that the kernel runs."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(slots=True)
class Plugin:
    """The running plugin: two WSGI apps, and what works in the background."""

    app: Any
    admin: Any
    driver: Driver
    syncer: Syncer
    hints: Hints
    kernel_refresh: KernelRefresh
    exporter: Exporter | None
    accelerator: Accelerator
    router: RouterProcess | None
    recover: Callable[[], None]
    notes: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Recover, then work in the background. What fails here is said in the log and in status, and doesn't stop us."""
        self.recover()
        self.syncer.start()
        self.hints.start()
        self.kernel_refresh.start()
        if self.exporter is not None:
            self.exporter.start()
        if self.router is not None:
            self.accelerator.start()
            self.router.start()


def compose(
    paths: Paths,
    settings: Settings,
    bad_settings: tuple[SettingError, ...] = (),
    deaths: Deaths | None = None,
) -> Plugin:
    """Make all parts; nothing works yet. `deaths` of parts are noted there and shown in status."""
    deaths = deaths or Deaths()
    deaths.watch_threads()
    store = Store(paths.state)
    late: dict[str, Driver] = {}

    def self_address() -> IPAddress | None:
        return late["driver"].self_address()

    def listed() -> IPAddress | None:
        engine, _ = syncer.engine()
        return engine.node_address if engine is not None else None

    kernel = LinuxKernel(
        paths.host_run,
        settings.underlay,
        self_address,
        PROGRAMS if settings.ebpf == "on" else None,
        sessions=settings.session_port or settings.vxlan_port,
        listed=listed,
    )
    statistics = CallStatistics()
    driver = Driver(
        store,
        kernel,
        DriverConfig(settings.scope, settings.vxlan_port, settings.mtu),
        clock=time.time,
    )
    late["driver"] = driver
    directory = DockerDirectory(paths.engine_socket)
    collector = Collector(driver, directory, time.monotonic)
    installed = threading.Event()

    def engine_seen(view: EngineView) -> None:
        if view.node_address is not None and driver.self_address() is None:
            driver.discover_new(str(view.node_address), is_self=True)
        # Again when it is missing: that of a removed plugin removes itself, and somebody may have removed ours.
        if paths.host_bin is not None and (
            not installed.is_set() or not host_command.exists(paths.host_bin)
        ):
            installed.set()
            host_command.install(paths.host_bin, view.root)

    syncer = Syncer(
        driver,
        directory,
        EmbeddedDns(),
        NftBalancer(),
        sandboxes=paths.sandboxes,
        interval=settings.sync_interval,
        clock=time.monotonic,
        collect=collector.collect,
        engine_seen=engine_seen,
        changed=lambda: accelerator.wake(),
    )

    def own() -> ThisHost:
        engine, _ = syncer.engine()
        known = {self_address(), engine.node_address if engine else None} - {None}
        try:
            underlay = kernel.underlay().address
        except FreeFlowError:
            underlay = None
        return ThisHost(frozenset(each for each in known if each), underlay or self_address())

    accelerator = Accelerator(
        store,
        syncer,
        RouterClient(paths.host_run / CONTROL),
        router_settings(settings),
        own=own,
    )
    hints = Hints(kernel, directory, syncer.state, syncer.hint, time.monotonic)
    ipv6_override = Ipv6Override(exchange, syncer.sandbox)
    announcer = Announcer(kernel)

    def joined(endpoint: Endpoint) -> None:
        announcer.endpoint_joined(endpoint)
        syncer.endpoint_joined(endpoint)
        ipv6_override.endpoint_joined(endpoint)
        accelerator.wake()

    def wake() -> None:
        syncer.wake()
        accelerator.wake()

    driver.on_change(wake, joined)
    labels = PathLabels(driver, kernel, syncer)

    def sandboxes() -> Iterator[tuple[str, Path]]:
        for endpoint in store.endpoints():
            path = syncer.sandbox(endpoint)
            if path is not None and is_namespace(path):
                yield endpoint.id, path

    def connections() -> Connections:
        return labels.connections(accelerator.connections())

    recovered: list[Recovered] = []
    failures: list[str] = []

    def run_recovery() -> None:
        try:
            recovered.append(recover(driver, BOOT_ID.read_text().strip()))
            ipv6_override.resume(store.endpoints())
        except FreeFlowError as error:
            failures.append(str(error))
            log.error("recovery failed", reason=str(error))

    snapshot = Snapshot(
        driver=driver,
        kernel=kernel,
        syncer=syncer,
        router=accelerator,
        statistics=statistics,
        settings=settings,
        bad_settings=bad_settings,
        failures=failures,
        started=time.monotonic(),
        clock=time.monotonic,
        deaths=deaths,
    )
    return Plugin(
        app=create_app(
            driver,
            deadline=settings.request_deadline,
            statistics=statistics,
            bad_settings=bad_settings,
        ),
        admin=create_admin(snapshot, Ping(driver, kernel, syncer, router=accelerator), connections),
        driver=driver,
        syncer=syncer,
        hints=hints,
        kernel_refresh=KernelRefresh(kernel, sandboxes),
        exporter=_exporter(snapshot, settings),
        accelerator=accelerator,
        router=_router(paths, settings, accelerator, failures, deaths),
        recover=run_recovery,
    )


def _exporter(snapshot: Snapshot, settings: Settings) -> Exporter | None:
    if settings.metrics_addr is None:
        return None
    # Not at import: few have it on, and it takes a while.
    from plugin.metrics import Exporter

    return Exporter(snapshot, settings.metrics_addr)


def _router(
    paths: Paths,
    settings: Settings,
    accelerator: Accelerator,
    failures: list[str],
    deaths: Deaths,
) -> RouterProcess | None:
    """The router's process; None where there is no folder for it, which is said in the log and in status."""
    if not paths.host_run.is_dir():
        return None
    try:
        folder = shared_dir.make(paths.host_run)
    except FreeFlowError as error:
        failures.append(str(error))
        log.error("no connection can be accelerated", reason=str(error))
        return None
    library.place(folder)
    command = router_command(paths.host_run, folder, settings.log_level, paths.swarm)
    starts = itertools.count()

    def started() -> None:
        # Each but the first takes the place of one that ended.
        if next(starts):
            deaths.note(ROUTER)
        accelerator.router_started()

    client = RouterClient(paths.host_run / CONTROL, timeout=2)
    return RouterProcess(command, started, answers=client.answers)
