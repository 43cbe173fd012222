"""Taking stock: what driver, kernel and sync loop know becomes one status."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from dataplane.control import OWNED, PathCount
from driver.balance import Balance
from driver.driver import Driver
from driver.errors import KernelError, SettingError, StateError
from driver.kernel.fastpath import Stage
from driver.kernel.guard import Guarded
from driver.kernel.underlay import Underlay
from driver.model import LocalContainer, NetworkView, Peer, Service, Subnet, Task
from driver.other_networks import OtherEndpoint, OtherNetwork, RefusedNetwork
from driver.sync import NetworkState
from plugin.calls import CallStatistics
from plugin.deaths import ROUTER, THREAD, WORKER, Deaths
from plugin.problems import STALE
from plugin.settings import SETTINGS, Settings, read
from plugin.snapshot import Snapshot
from plugin.status import NetworkStatus, Status
from tests.unit.documented import is_documented
from tests.unit.facts import (
    SANDBOXES,
    FakeKernelFacts,
    FakeRouterFacts,
    FakeSyncFacts,
    engine_view,
    router_statistics,
)
from tests.unit.statuses import EP, NET
from tests.unit.steps import Machine

EP2 = "1a2b3c4d5e6f" + "e" * 52
POOL = Subnet(IPv4Network("10.0.4.0/24"), IPv4Interface("10.0.4.1/24"))
VIP = IPv4Address("10.0.4.2")
TASK = IPv4Address("10.0.4.7")

VIEW = NetworkView(
    id=NET,
    name="backend",
    driver="freeflow:latest",
    peers=(Peer("a", IPv4Address("192.0.2.1")), Peer("b", IPv4Address("192.0.2.2"))),
    services=(
        Service("web", VIP, (Task("web.1", TASK, EP), Task("web.2", TASK + 1, EP2))),
        Service("db", None, (Task("db.1", TASK + 2, EP2),)),
    ),
    containers=(LocalContainer("c1", "web.1.abc", EP, IPv4Interface("10.0.4.7/24")),),
)


class World:
    """A host with one network, `backend`, and one container on it."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine(directory)
        self.driver: Driver = self.machine.driver
        self.driver.create_network(NET, {"mtu": "1400", "vni": "77"}, (POOL,))
        self.driver.create_endpoint(NET, EP, ipv4=IPv4Interface("10.0.4.7/24"))
        self.driver.join(NET, EP, "/var/run/docker/netns/abc")
        self.driver.discover_new("192.0.2.1", is_self=True)
        self.kernel = FakeKernelFacts()
        self.kernel.count(EP, received=1000, sent=200)
        state = NetworkState(VIEW, {VIP: (TASK,)}, seen=95.0)
        self.sync = FakeSyncFacts({NET: state}, engine_view())
        self.statistics = CallStatistics()
        self.router = FakeRouterFacts(router_statistics())
        self.snapshot = self.with_settings({})

    def with_settings(self, environment: dict[str, str], *failures: str) -> Snapshot:
        settings, bad = read(environment)
        self.snapshot = Snapshot(
            driver=self.driver,
            kernel=self.kernel,
            syncer=self.sync,
            router=self.router,
            statistics=self.statistics,
            settings=settings,
            bad_settings=bad,
            failures=[StateError(failure) for failure in failures],
            started=40.0,
            clock=lambda: 100.0,
        )
        return self.snapshot

    def status(self) -> Status:
        return self.snapshot()

    def network(self) -> NetworkStatus:
        (found,) = self.status().networks
        return found

    def problem(self) -> str:
        """The one thing that is wrong."""
        status = self.status()
        (found,) = status.problems
        assert not status.healthy
        assert found.cause
        assert found.remedy
        assert is_documented(found.what)
        return f"{found.severity}: {found.what}; {found.cause}; {found.remedy}"

    def change_state(self, **fields: object) -> None:
        self.sync.states[NET] = replace(self.sync.states[NET], **fields)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_well(world: World) -> None:
    """A host without problems says so, and shows its uptime."""
    status = world.status()
    assert status.healthy
    assert status.problems == []
    assert status.uptime == 60.0
    assert status.host.hostname == "host1"
    assert (status.host.underlay, status.host.underlay_mtu) == ("eth0", 1500)
    assert status.host.address == "192.0.2.1"


@pytest.mark.parametrize("part", [WORKER, ROUTER])
def test_what_dies_is_said(world: World, part: str) -> None:
    """Recent deaths of worker or router are a problem, with count and time; many are an error."""
    world.snapshot.deaths.note(part)
    assert f"warning: the plugin's {part} died once in the last 10 minutes" in world.problem()
    for _ in range(2):
        world.snapshot.deaths.note(part)
    assert f"error: the plugin's {part} died 3 times" in world.problem()
    assert [(each.part, each.deaths) for each in world.status().parts] == [(part, 3)]


def test_what_died_long_ago(world: World) -> None:
    """An old death is shown, and is no problem any more; a thread that has ended stays one."""
    now = [0.0]
    deaths = Deaths(lambda: now[0])
    world.snapshot = replace(world.snapshot, deaths=deaths)
    deaths.note(WORKER)
    now[0] = 3600.0
    assert world.status().healthy
    assert [each.ago for each in world.status().parts] == [3600.0]
    deaths.note(THREAD, "sync")
    now[0] = 9000.0
    assert "error: the plugin's thread sync has ended by an error" in world.problem()


def test_service_that_is_too_large_for_dns(world: World) -> None:
    """A service whose tasks are known only from the engine's list is marked."""
    assert not any(each.by_list for each in world.network().services)
    world.change_state(by_list=frozenset({"web"}))
    assert [each.name for each in world.network().services if each.by_list] == ["web"]


def test_network(world: World) -> None:
    """A network shows its options, and its peers and services in Docker."""
    found = world.network()
    assert (found.name, found.vni, found.port, found.mtu) == ("backend", 77, 4799, 1400)
    assert found.subnets == ["10.0.4.0/24"]
    assert found.prefix6 == ""
    assert found.synced == 5.0
    assert [(peer.address, peer.own) for peer in found.peers] == [
        ("192.0.2.1", True),
        ("192.0.2.2", False),
    ]


def test_peers_have_the_names_that_managers_know(world: World) -> None:
    """A peer's name is the node's host name where the engine knows it."""
    world.sync.view = engine_view(hostnames={IPv4Address("192.0.2.2"): "host2"})
    assert [peer.name for peer in world.network().peers] == ["", "host2"]


def test_services(world: World) -> None:
    """A service with a VIP shows the tasks that take connections, one without all tasks."""
    web, db = world.network().services
    assert (web.vip, web.tasks) == ("10.0.4.2", ["10.0.4.7"])
    assert (db.vip, db.tasks) == ("", ["10.0.4.9"])


def test_tasks_that_a_client_gets(world: World) -> None:
    """A VIP shows its balance, and the tasks that this host's containers get: with `source` the
    task of each."""
    both = {VIP: (TASK, TASK + 1)}
    world.change_state(table=both)
    web, db = world.network().services
    assert (web.balance, web.here, web.clients) == ("even", ["10.0.4.7", "10.0.4.8"], {})
    assert db.here == []
    local = Balance("local", frozenset({TASK}), "on this host")
    world.change_state(balances={VIP: local})
    web, _ = world.network().services
    assert (web.balance, web.here, web.why) == ("local", ["10.0.4.7"], "on this host")
    assert web.tasks == ["10.0.4.7", "10.0.4.8"]
    world.change_state(balances={VIP: Balance("source")})
    web, _ = world.network().services
    assert (web.here, web.clients) == ([], {})
    world.sync.led[SANDBOXES / "abc"] = {VIP: (TASK + 1,)}
    web, _ = world.network().services
    assert (web.here, web.clients) == (["10.0.4.8"], {"web.1.abc": "10.0.4.8"})


def test_endpoint(world: World) -> None:
    """An endpoint shows its container, and bytes as the container sees them."""
    (found,) = world.network().endpoints
    assert (found.container, found.ipv4, found.joined) == ("web.1.abc", "10.0.4.7/24", True)
    assert (found.rx_bytes, found.tx_bytes) == (1000, 200)
    world.driver.leave(NET, EP)
    (found,) = world.network().endpoints
    assert not found.joined


def test_sums_outlive_containers(world: World) -> None:
    """A container's traffic stays in the network's sums after its end."""
    assert (world.network().rx_bytes, world.network().tx_bytes) == (1000, 200)
    world.driver.delete_endpoint(NET, EP)
    world.kernel.counters.clear()
    assert (world.network().rx_bytes, world.network().tx_bytes) == (1000, 200)


def test_not_synced_yet(world: World) -> None:
    """Before the engine has answered, a network is known only by its ID, and that is no problem."""
    world.sync.states.clear()
    found = world.network()
    assert (found.name, found.synced, found.peers, found.services) == ("", None, [], [])
    assert world.status().healthy


def test_settings_are_shown(world: World) -> None:
    """Every setting is shown in the form in which it is set."""
    environment = {"METRICS_ADDR": "127.0.0.1:9477", "MTU": "1400", "REQUEST_DEADLINE": "2.5"}
    world.with_settings(environment)
    shown = world.status().settings
    assert list(shown) == [setting.name for setting in SETTINGS]
    assert read(shown) == read(environment)
    world.with_settings({"METRICS_ADDR": "[::1]:9477"})
    assert read(world.status().settings)[1] == ()
    world.with_settings({"SESSION_KEY": "k" * 32})
    assert world.status().settings["SESSION_KEY"] == "(not shown)"


def test_calls(world: World) -> None:
    """Calls are counted, with percentiles in milliseconds."""
    for milliseconds in range(1, 101):
        world.statistics.record("Join", milliseconds / 1000, failed=milliseconds > 98)
    (call,) = world.status().calls
    assert (call.name, call.count, call.errors, call.p50_ms, call.p99_ms) == (
        "Join",
        100,
        2,
        50,
        99,
    )


# --- what can be wrong


def test_bad_setting(world: World) -> None:
    """A bad setting is a problem, with the command that corrects it."""
    world.with_settings({"MTU": "12"})
    problem = world.problem()
    assert problem.startswith("error: all changes are refused; setting MTU=12")
    assert "docker plugin set freeflow:latest MTU= &&" in problem


def test_failed_recovery(world: World) -> None:
    """An error at start stays in the status."""
    world.with_settings({}, "the store is broken")
    assert "could not recover at start; the store is broken" in world.problem()


@pytest.mark.parametrize(
    "error",
    [
        KernelError("no network interface is up", remedy="bring one up"),
        SettingError("setting UNDERLAY=x", cause="no such interface", remedy="docker plugin set x"),
    ],
)
def test_no_underlay(world: World, error: KernelError | SettingError) -> None:
    """A missing underlay is a problem with its cause, and the rest of the status is complete."""
    world.kernel.found = error
    assert world.problem() == f"error: there is no underlay; {error.reason}; {error.remedy}"
    assert world.status().host.underlay == ""
    assert world.network().name == "backend"


def test_mtu_of_a_host_alone(world: World) -> None:
    """With SCOPE=local no packet uses the underlay, so its MTU is no problem."""
    world.kernel.found = Underlay("eth0", 1440, IPv4Address("192.0.2.1"))
    world.change_state(view=replace(VIEW, peers=()))
    world.with_settings({"SCOPE": "local"})
    assert world.status().problems == []


def test_mtu_does_not_fit(world: World) -> None:
    """A network whose packets are too large for the underlay is named, with the MTU that fits."""
    world.kernel.found = Underlay("eth0", 1440, IPv4Address("192.0.2.1"))
    problem = world.problem()
    assert "network backend: its MTU of 1400 doesn't fit" in problem
    assert "-o mtu=1390" in problem
    world.driver.delete_endpoint(NET, EP)
    assert world.status().healthy


def test_silent_engine(world: World) -> None:
    """A silent engine is one problem, however many networks can't be synced for it."""
    world.sync.error = "GET /info: connection refused"
    world.change_state(error="GET /networks: connection refused", seen=0.0)
    assert world.problem().startswith("warning: the engine does not answer")


def test_network_that_cannot_be_synced(world: World) -> None:
    """A network that can't be synced for a while is a problem; a short failure isn't."""
    world.change_state(error="the engine does not know it", seen=100.0 - STALE)
    assert world.status().healthy
    world.change_state(seen=100.0 - STALE - 1)
    assert "network backend: peers and VIPs stay as they were" in world.problem()


def test_spoofed_frames(world: World) -> None:
    """Dropped frames are attributed to the container that sent them."""
    world.kernel.dropped[EP[:12]] = 3
    assert world.problem().startswith("warning: web.1.abc sent 3 frames that were dropped")
    assert world.network().spoofed == 3


def test_vips_that_could_not_be_written(world: World) -> None:
    """A container without its VIPs is named, with the kernel's reason, until it leaves."""
    error = KernelError("nftables: no such file", remedy="modprobe nft_nat")
    world.sync.vips_failed[SANDBOXES / "abc"] = error
    assert world.problem() == (
        "error: VIPs of web.1.abc could not be written; nftables: no such file; modprobe nft_nat"
    )
    world.driver.leave(NET, EP)
    assert world.status().healthy


def test_paths(world: World) -> None:
    """Connections by path and reason are the router's counts."""
    world.router.counts = (
        PathCount(NET, "shm", "", 2),
        PathCount(NET, "overlay", "remote", 3),
        PathCount(NET, "overlay", "short", 4),
    )
    found = world.status()
    assert found.path_counts == {
        "overlay": 7,
        "overlay+ebpf": 0,
        "shm": 2,
        "rdma": 0,
        "relay": 0,
    }
    assert found.router is not None
    assert (found.router.up, found.router.connections, found.router.processes) == (True, 2, 3)
    (share,) = found.router.containers
    assert (share.container, share.processes, share.memory) == ("web.1.abc", 3, 24576)
    assert [(each.path, each.reason, each.count) for each in found.router.paths] == [
        ("overlay", "remote", 3),
        ("overlay", "short", 4),
        ("shm", "", 2),
    ]


def test_router_with_bugs(world: World) -> None:
    """Bugs that the router has survived are a problem, with their number."""
    world.router.said = router_statistics(bugs=2)
    assert world.problem().startswith("warning: the router has survived 2 bugs")
    world.router.said = router_statistics(bugs=1)
    assert "survived one bug" in world.problem()


def test_router_that_does_not_answer(world: World) -> None:
    """A router that doesn't answer is a problem, except just after the start; the rest of the
    status is complete.
    """
    world.router.said = None
    assert world.problem().startswith("warning: the router does not answer")
    found = world.status()
    assert found.router is not None
    assert not found.router.up
    assert found.path_counts == dict.fromkeys(
        ("overlay", "overlay+ebpf", "shm", "rdma", "relay"), 0
    )
    world.snapshot = replace(world.snapshot, started=95.0)
    assert world.status().healthy


def test_local_scope_in_a_swarm(world: World) -> None:
    """SCOPE=local on a host of a Swarm is a problem."""
    world.with_settings({"SCOPE": "local"})
    assert world.problem().startswith("warning: SCOPE=local on a host of a Swarm")


def test_defaults() -> None:
    """A host without settings has the defaults of the code."""
    assert read({}) == (Settings(), ())


def test_an_open_port(world: World) -> None:
    """An overlay's port that anybody may speak with is a problem once it has been so for a while,
    with the reason; which ports are guarded, and who was turned away, is in the status."""
    world.kernel.guards = Guarded((), "nftables refused", STALE - 1)
    assert not world.status().problems
    world.kernel.guards = Guarded((), "nftables refused", STALE + 1)
    assert "takes frames from anybody" in world.problem()
    world.kernel.guards = Guarded((4799,), strangers=(IPv4Address("192.0.2.9"),))
    guarded = world.status().guard
    assert guarded is not None
    assert (guarded.ports, guarded.strangers) == ([4799], ["192.0.2.9"])
    assert not world.status().problems


def test_full_tables(world: World) -> None:
    """A full table of the fast path is a problem, with its name."""
    world.kernel.fastpath = Stage("tunnel", full=("peers: 3 peers of networks: map peers",))
    assert "is full" in world.problem()


def test_networks_of_other_drivers(world: World) -> None:
    """Status lists accelerated networks of other drivers with their containers, and finds one that
    asks for acceleration in vain.
    """
    app = OtherNetwork(
        NetworkView(id="b", name="app", driver="bridge", subnets=(POOL,)),
        "br-b",
        (OtherEndpoint("e", "web-1", (IPv4Address("10.0.4.2"),), Path("/netns/1")),),
    )
    apart = RefusedNetwork(NetworkView(id="c", name="apart", driver="bridge"), "they are apart")
    world.snapshot = replace(world.snapshot, others=lambda: (app, apart))
    one, other = world.status().other_networks
    assert (one.driver, one.containers, one.between_hosts) == (
        "bridge",
        {"web-1": ["10.0.4.2"]},
        False,
    )
    assert (other.name, other.reason) == ("apart", "they are apart")
    (finding,) = world.status().problems
    assert (finding.what, finding.cause) == (
        "network apart asks for acceleration in vain",
        "they are apart",
    )
    assert is_documented(finding.what)


def test_more_addresses_than_are_told(world: World) -> None:
    """More addresses than other hosts can be told are a problem, unless RDMA and TCP between relays
    are off.
    """
    known = world.driver.store.endpoint(EP)
    assert known is not None
    for number in range(OWNED):
        address = IPv4Interface((int(IPv4Address("10.0.8.0")) + number, 24))
        world.driver.store.put_endpoint(replace(known, id=f"{number:064x}"[::-1], ipv4=address))
    assert f"told of {OWNED} of this host's {OWNED + 1}" in world.problem()
    world.with_settings({"RDMA": "off"})
    assert world.status().problems
    world.with_settings({"RDMA": "off", "RELAY": "off"})
    assert not world.status().problems
