"""The sync loop with a fake engine, DNS and kernel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from driver.balance import LABEL, chosen, favourite
from driver.dns_tasks import REST_AFTER
from driver.errors import EngineError, KernelError, NotFound
from driver.flood_list import REPAIR_EVERY
from driver.model import (
    Choice,
    Choices,
    Endpoint,
    EngineView,
    IPAddress,
    LocalContainer,
    NetworkView,
    Peer,
    Service,
    Subnet,
    Task,
    VipTable,
)
from driver.ports import TaskAnswers
from driver.refresh_budget import INTERVAL
from driver.schedule import WRITE_BURST, WRITE_GAP
from driver.sync import Syncer
from driver.sync_state import START_PATIENCE
from testbed.patience import patience
from tests.unit.facts import engine_view
from tests.unit.steps import Machine

NET = "p3l8f1w0gk2c9d7h5m6n4b0aq"
NET2 = "q7x2r5v8sl3b6c1j9k4m0d8ez"
POOL = Subnet(IPv4Network("10.0.4.0/24"), IPv4Interface("10.0.4.1/24"))
POOL2 = Subnet(IPv4Network("10.0.5.0/24"), IPv4Interface("10.0.5.1/24"))
VIP, VIP2 = IPv4Address("10.0.4.2"), IPv4Address("10.0.5.2")
SELF, PEER, PEER2 = (IPv4Address(f"192.0.2.{n}") for n in (1, 2, 3))


def at(number: int, net: int = 4) -> IPv4Address:
    return IPv4Address(f"10.0.{net}.{number}")


def endpoint_id(number: int) -> str:
    return f"{number:012x}{'e' * 52}"


def service(name: str, vip: IPv4Address | None, *tasks: int, net: int = 4) -> Service:
    listed = (Task(f"{name}.{n}", at(n, net), endpoint_id(n)) for n in tasks)
    return Service(name, vip, tuple(listed))


class FakeEngine:
    """`ports.Directory` that lists services only on request, as the real one does."""

    def __init__(self) -> None:
        self.views: dict[str, NetworkView] = {}
        self.down = False
        self.asked: list[tuple[str, bool]] = []
        self.view = engine_view(node_address=None)
        self.wanted: dict[str, str] = {}
        """How services want to be balanced."""
        self.leader = True
        self.tells_labels = threading.Event()
        self.tells_labels.set()

    def engine(self) -> EngineView:
        if self.down:
            raise EngineError(
                "GET /info", cause="connection refused", remedy="systemctl status docker"
            )
        return self.view

    def networks(self) -> frozenset[str]:
        return frozenset(self.views)

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        self.asked.append((network_id, services))
        if self.down:
            raise EngineError("GET /networks: connection refused")
        found = self.views.get(network_id)
        if found is None or services:
            return found
        return replace(found, services=(), others=frozenset())

    def labels(self, key: str, *, manager: bool) -> dict[str, str]:
        if self.down:
            raise EngineError("GET /services: connection refused")
        if not self.leader:
            raise EngineError("GET /services: the swarm has no leader")
        assert self.tells_labels.wait(patience(20))
        assert manager == self.view.manager
        return self.wanted if key == LABEL else {}

    def changed_containers(self) -> Iterator[str]:
        return iter(())

    def sandbox_key(self, container_id: str) -> str | None:
        return None


class FakeDns:
    """`ports.TaskResolver` with `active` tasks by service. Only sandboxes in `knows`, if it is set,
    answer."""

    def __init__(self) -> None:
        self.active: dict[str, frozenset[IPv4Address]] = {}
        self.knows: set[Path] | None = None
        self.asked: list[tuple[Path, list[str]]] = []

    def tasks(
        self,
        sandbox: Path,
        network_name: str,
        services: Sequence[Service],
        *,
        patient: bool = False,
    ) -> TaskAnswers:
        self.asked.append((sandbox, [item.name for item in services]))
        if self.knows is not None and sandbox not in self.knows:
            return TaskAnswers({})
        names = {item.name for item in services}
        return TaskAnswers({name: found for name, found in self.active.items() if name in names})


class FakeBalancer:
    """A `ports.Balancer` with the `tables` and `choices` of sandboxes and the number of `writes`;
    only those in `there` are writable.
    """

    def __init__(self) -> None:
        self.there: set[Path] = set()
        self.tables: dict[Path, VipTable] = {}
        self.choices: dict[Path, Choices] = {}
        self.writes = 0
        self.broken: set[Path] = set()
        self.alive: set[Path] = set()

    def apply(
        self, sandbox: Path, table: VipTable, choices: Mapping[IPv4Address, Choice] | None = None
    ) -> bool:
        if sandbox in self.broken:
            raise KernelError("nftables: no such file")
        if sandbox not in self.there:
            return False
        if (self.tables.get(sandbox), self.choices.get(sandbox)) != (table, choices):
            self.writes += 1
            self.tables[sandbox] = dict(table)
            self.choices[sandbox] = dict(choices or {})
        return True

    def leads(self, sandbox: Path) -> VipTable:
        return chosen(self.tables.get(sandbox, {}), self.choices.get(sandbox, {}), {})

    def forget(self, alive: Iterable[Path]) -> None:
        self.alive = set(alive)


class Host:
    """A host with the network `backend` (10.0.4.0/24), its services, and a clock. `look` is one
    round of the loop."""

    def __init__(self, directory: Path) -> None:
        self.machine = Machine(directory / "state")
        self.driver = self.machine.driver
        self.kernel = self.machine.kernel
        self.flooded: list[tuple[str, frozenset[IPAddress]]] = []
        self.kernel.set_peers = self._set_peers  # type: ignore[method-assign]
        self.sandboxes = directory / "netns"
        self.sandboxes.mkdir()
        self.engine, self.dns, self.balancer = FakeEngine(), FakeDns(), FakeBalancer()
        self.now = 1000.0
        self.collected = 0
        self.seen: list[EngineView] = []
        self.driver.create_network(NET, {}, (POOL,))
        self.driver.discover_new(str(SELF), is_self=True)
        self.list(NET, service("web", VIP, 7, 8))
        self.dns.active["web"] = frozenset({at(7), at(8)})
        self.syncer: Syncer
        self.restart()

    def restart(self) -> None:
        """A new plugin process without any state."""
        self.syncer = Syncer(
            self.driver,
            self.engine,
            self.dns,
            self.balancer,
            sandboxes=self.sandboxes,
            interval=0.5,
            clock=lambda: self.now,
            collect=self._collect,
            engine_seen=self.seen.append,
        )
        self.driver.on_change(self.syncer.wake, self.syncer.endpoint_joined)

    def _collect(self) -> None:
        self.collected += 1

    def _set_peers(self, network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        wanted = frozenset(peers)
        before = next(
            (had for key, had in reversed(self.flooded) if key == network_id), frozenset()
        )
        self.flooded.append((network_id, wanted))
        return wanted - before

    def list(
        self, network: str, *services: Service, peers: Iterable[IPAddress] = (SELF, PEER)
    ) -> None:
        """The engine's view of a network from now on."""
        self.engine.views[network] = NetworkView(
            network,
            {NET: "backend", NET2: "front"}[network],
            "freeflow:latest",
            peers=tuple(Peer(str(peer), peer) for peer in peers),
            services=services,
        )

    def join(self, number: int, network: str = NET, *, there: bool = True) -> Path:
        """A container joins; returns its sandbox."""
        net = {NET: 4, NET2: 5}[network]
        sandbox = self.sandboxes / f"s{number}"
        if there:
            self.appear(sandbox)
        identifier = endpoint_id(number + net * 1000)
        self.driver.create_endpoint(
            network, identifier, ipv4=IPv4Interface(f"10.0.{net}.{number}/24")
        )
        self.driver.join(network, identifier, f"/var/run/docker/netns/s{number}")
        return sandbox

    def appear(self, sandbox: Path) -> None:
        sandbox.touch()
        self.balancer.there.add(sandbox)

    def look(self, after: float = 1.0) -> None:
        self.now += after
        self.syncer.once()

    def hint(self) -> None:
        self.syncer.hint(NET)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


BOTH = {VIP: (at(7), at(8))}


# --- VIPs


def test_vips_of_a_new_container(host: Host) -> None:
    """A container on a network gets the VIPs of its services."""
    sandbox = host.join(20)
    host.look()
    assert host.balancer.tables == {sandbox: BOTH}


def test_known_vips_are_there_inside_join(host: Host) -> None:
    """A second container gets the known VIPs before its Join is answered, without any query."""
    host.join(20)
    host.look()
    asked = len(host.engine.asked)
    second = host.join(21)
    assert host.balancer.tables[second] == BOTH
    assert len(host.engine.asked) == asked


def test_only_active_tasks_get_connections(host: Host) -> None:
    """A task that left DNS gets no new connections, though the engine still lists it."""
    sandbox = host.join(20)
    host.look()
    host.dns.active["web"] = frozenset({at(8)})
    host.look()
    assert host.balancer.tables[sandbox] == {VIP: (at(8),)}


def test_new_tasks_are_found_through_dns(host: Host) -> None:
    """A task that DNS names and the list doesn't have causes the list to be read again at once."""
    sandbox = host.join(20)
    for _ in range(10):
        host.look()
    host.list(NET, service("web", VIP, 7, 8, 9))
    host.dns.active["web"] = frozenset({at(7), at(8), at(9)})
    host.look()
    assert host.balancer.tables[sandbox] == {VIP: (at(7), at(8), at(9))}


def test_new_services_are_found_by_hints(host: Host) -> None:
    """A new service is found with the next hint, or after the interval without one."""
    sandbox = host.join(20)
    for _ in range(10):
        host.look()
    more = {**BOTH, at(3): (at(30),)}
    host.list(NET, service("web", VIP, 7, 8), service("api", at(3), 30))
    host.dns.active["api"] = frozenset({at(30)})
    host.look()
    assert host.balancer.tables[sandbox] == BOTH
    host.hint()
    host.look()
    assert host.balancer.tables[sandbox] == more
    host.list(NET, service("api", at(3), 30))
    host.look(INTERVAL)
    assert host.balancer.tables[sandbox] == {VIP: (), at(3): (at(30),)}


def test_services_are_not_listed_at_each_look(host: Host) -> None:
    """Listing services is expensive: without a hint a poll doesn't list them."""
    host.join(20)
    for _ in range(10):
        host.look()
    host.engine.asked.clear()
    for _ in range(20):
        host.look()
    assert host.engine.asked == [(NET, False)] * 20


def test_vips_of_all_networks_of_a_container(host: Host) -> None:
    """A container on two networks gets the VIPs of both, and loses those of a network that it
    leaves."""
    host.driver.create_network(NET2, {}, (POOL2,))
    host.list(NET2, service("db", VIP2, 9, net=5))
    host.dns.active["db"] = frozenset({at(9, 5)})
    sandbox = host.join(20)
    host.join(20, NET2)
    host.look()
    assert host.balancer.tables == {sandbox: {**BOTH, VIP2: (at(9, 5),)}}
    host.driver.leave(NET2, endpoint_id(5020))
    host.driver.delete_endpoint(NET2, endpoint_id(5020))
    host.look()
    assert host.balancer.tables == {sandbox: BOTH}


def test_one_container_s_trouble_is_its_own(host: Host) -> None:
    """A namespace whose rules can't be written is reported and tried again; others get their
    VIPs."""
    first, second = host.join(20), host.join(21)
    host.balancer.broken.add(first)
    host.look()
    assert host.balancer.tables == {second: BOTH}
    (error,) = host.syncer.vip_errors().items()
    assert (error[0], str(error[1])) == (first, "nftables: no such file")
    host.balancer.broken.clear()
    host.look()
    assert host.balancer.tables[first] == BOTH
    assert host.syncer.vip_errors() == {}


def test_trouble_goes_with_its_container(host: Host) -> None:
    """When a container leaves, errors about it are forgotten."""
    sandbox = host.join(20)
    host.balancer.broken.add(sandbox)
    host.look()
    host.driver.delete_endpoint(NET, endpoint_id(4020))
    host.look()
    host.look()
    assert host.syncer.vip_errors() == {}
    assert host.syncer.state() == {}
    assert sandbox not in host.balancer.alive


def test_old_sandboxes_keep_their_rules_until_all_is_known(host: Host) -> None:
    """After a restart, a container keeps its rules until all its networks are known, but not for
    ever."""
    host.driver.create_network(NET2, {}, (POOL2,))
    host.list(NET2, service("db", VIP2, 9, net=5))
    host.dns.active["db"] = frozenset({at(9, 5)})
    sandbox = host.join(20)
    host.join(20, NET2)
    host.look()
    both = host.balancer.tables[sandbox]
    host.restart()
    del host.engine.views[NET2]
    host.look()
    assert host.balancer.tables[sandbox] == both
    host.look(START_PATIENCE)
    assert host.balancer.tables[sandbox] == BOTH


# --- who is asked


def test_another_container_is_asked(host: Host) -> None:
    """If one container's DNS gives no answer, another's is queried, and is the first next time."""
    first, second = host.join(20), host.join(21)
    host.dns.knows = {second}
    host.dns.active["web"] = frozenset({at(8)})
    host.look()
    assert host.balancer.tables[first] == {VIP: (at(8),)}
    assert [path for path, _ in host.dns.asked] == [first, second]
    host.dns.asked.clear()
    host.look()
    assert [path for path, _ in host.dns.asked] == [second]


def test_few_are_asked(host: Host) -> None:
    """However many containers there are, three are queried at most."""
    for number in range(20, 30):
        host.join(number)
    host.dns.knows = set()
    host.look()
    host.dns.asked.clear()
    host.look()
    assert len(host.dns.asked) == 3


def test_the_list_is_read_often_for_large_services(host: Host) -> None:
    """A service that is too large for DNS follows the engine's list, which is then read every two
    seconds.
    """
    sandbox = host.join(20)
    many = tuple(Task("t", IPv4Address("10.0.4.0") + n, endpoint_id(n)) for n in range(1, 4000))
    host.list(NET, Service("web", VIP, many))
    for _ in range(20):
        host.look()
    host.engine.asked.clear()
    for _ in range(20):
        host.look()
    assert 9 <= sum(services for _, services in host.engine.asked) <= 11
    assert len(host.balancer.tables[sandbox][VIP]) == len(
        [task for task in many if task.address in POOL.pool]
    )


def test_idle_services_are_left_alone(host: Host) -> None:
    """A service without active tasks is not queried forever, and refuses."""
    sandbox = host.join(20)
    host.dns.active["web"] = frozenset()
    for _ in range(int(REST_AFTER) + 3):
        host.look()
    host.dns.asked.clear()
    host.look()
    assert host.dns.asked == []
    assert host.balancer.tables[sandbox] == {VIP: ()}
    host.list(NET, service("web", VIP, 7, 8, 9))
    host.dns.active["web"] = frozenset({at(9)})
    host.hint()
    host.look()
    assert host.balancer.tables[sandbox] == {VIP: (at(9),)}


# --- the engine's silence


def test_silence_changes_nothing(host: Host) -> None:
    """While the engine doesn't answer, VIPs and peers stay, and the reason is reported."""
    sandbox = host.join(20)
    host.look()
    writes, floods = host.balancer.writes, len(host.flooded)
    host.engine.down = True
    host.look(40.0)
    host.look()
    assert host.balancer.tables[sandbox] == BOTH
    assert (host.balancer.writes, len(host.flooded)) == (writes, floods)
    _, error = host.syncer.engine()
    assert error is not None
    assert host.syncer.state()[NET].error is not None
    host.engine.down = False
    host.look(1.0)
    assert host.syncer.engine()[1] is None
    assert host.syncer.state()[NET].error is None


def test_nothing_is_collected_in_silence(host: Host) -> None:
    """While Docker doesn't answer, nothing counts as removed."""
    host.engine.down = True
    host.look()
    host.look(60.0)
    assert host.collected == 0
    host.engine.down = False
    host.look()
    host.look(60.0)
    assert host.collected >= 1


def test_network_that_the_engine_does_not_know(host: Host) -> None:
    """A network that the engine does not know yet keeps its state, and reports why it is not
    newer.
    """
    host.join(20)
    host.look()
    known = host.syncer.state()[NET].view
    del host.engine.views[NET]
    host.look()
    state = host.syncer.state()[NET]
    assert state.view == known
    assert "the engine does not know" in (state.error or "")


def test_engine_is_told_of(host: Host) -> None:
    """The engine's view is passed on."""
    host.look()
    assert host.seen == [host.engine.view]


# --- peers


def test_peers_without_this_host(host: Host) -> None:
    """The flood list has the network's hosts without this one, and endpoints are announced to new
    peers.
    """
    host.join(20)
    host.kernel.announced.clear()
    host.look()
    assert host.flooded == [(NET, frozenset({PEER}))]
    assert host.kernel.announced == [endpoint_id(4020)]
    host.list(NET, service("web", VIP, 7, 8), peers=(SELF, PEER, PEER2))
    host.look()
    assert host.flooded[-1] == (NET, frozenset({PEER, PEER2}))


def test_unchanged_peers_are_written_seldom(host: Host) -> None:
    """Unchanged peers are written again only at the tick of repairs."""
    host.join(20)
    host.look()
    for _ in range(5):
        host.look()
    assert len(host.flooded) == 1
    host.look(REPAIR_EVERY)
    assert len(host.flooded) == 2


def test_new_endpoint_writes_peers_again(host: Host) -> None:
    """A new device for a new endpoint gets its peers at once."""
    host.join(20)
    host.look()
    host.join(21)
    host.look()
    assert [peers for _, peers in host.flooded] == [frozenset({PEER})] * 2


def test_departed_peers_are_removed(host: Host) -> None:
    """A host that no longer shares the network is removed from the list, and the log says so
    once."""
    host.join(20)
    host.look()
    host.list(NET, service("web", VIP, 7, 8), peers=(SELF,))
    with capture_logs() as logs:
        host.look()
        host.look(REPAIR_EVERY)
    assert host.flooded[-1] == (NET, frozenset())
    removed = [entry for entry in logs if entry["event"] == "peers removed"]
    assert [(entry["network"], entry["peers"]) for entry in removed] == [(NET, [str(PEER)])]


def test_gossip_that_has_not_begun(host: Host) -> None:
    """A list without this host is invalid: nothing is removed for it."""
    host.join(20)
    host.look()
    host.list(NET, service("web", VIP, 7, 8), peers=())
    host.look()
    assert host.flooded == [(NET, frozenset({PEER}))]


def test_own_address_from_the_engine(host: Host) -> None:
    """Before Docker has reported this host's address, the engine's view of it counts; without any,
    nothing is flooded."""
    host.driver.store.put_fact("self_address", "")
    host.join(20)
    host.look()
    assert host.flooded == []
    assert "own address" in (host.syncer.state()[NET].error or "")
    host.engine.view = engine_view(node_address=SELF)
    host.look(60.0)
    host.look()
    assert host.flooded[-1] == (NET, frozenset({PEER}))


# --- the loop itself


@pytest.fixture
def running(host: Host) -> Iterator[Host]:
    """The loop in its threads, on the real clock."""
    host.syncer = Syncer(
        host.driver,
        host.engine,
        host.dns,
        host.balancer,
        sandboxes=host.sandboxes,
        interval=0.1,
        clock=time.monotonic,
        collect=host._collect,
    )
    host.driver.on_change(host.syncer.wake, host.syncer.endpoint_joined)
    host.syncer.start()
    try:
        yield host
    finally:
        host.syncer.stop()
        soon(lambda: not any(t.name.startswith(("look", "write")) for t in threading.enumerate()))


def soon(promise: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience(seconds)
    while not promise():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_running_loop_follows(running: Host) -> None:
    """The running loop follows engine and DNS without notice."""
    sandbox = running.join(20)
    soon(lambda: running.balancer.tables.get(sandbox) == BOTH)
    running.dns.active["web"] = frozenset({at(8)})
    soon(lambda: running.balancer.tables[sandbox] == {VIP: (at(8),)})
    soon(lambda: running.collected > 0)


def test_a_rolling_update_is_written_together(running: Host) -> None:
    """When tasks change many times a second, a container's rules are written twice a second, and
    the last ones are right.
    """
    sandbox = running.join(20)
    soon(lambda: running.balancer.tables.get(sandbox) == BOTH)
    before, begin = running.balancer.writes, time.monotonic()
    for number in range(60):
        running.dns.active["web"] = frozenset({at(7 + number % 2)})
        time.sleep(0.05)
    running.dns.active["web"] = frozenset({at(8)})
    soon(lambda: running.balancer.tables[sandbox] == {VIP: (at(8),)})
    spent = time.monotonic() - begin
    assert running.balancer.writes - before <= WRITE_BURST + 2 + spent / WRITE_GAP


def test_running_loop_awaits_sandboxes(running: Host) -> None:
    """A sandbox that appears after its Join (engines up to 27) gets its VIPs then."""
    running.join(20)
    soon(lambda: NET in running.syncer.state())
    late = running.join(21, there=False)
    running.appear(late)
    soon(lambda: running.balancer.tables.get(late) == BOTH)


def test_running_loop_survives_bugs(running: Host) -> None:
    """An unexpected exception is logged, and the loop continues."""
    sandbox = running.join(20)
    soon(lambda: running.balancer.tables.get(sandbox) == BOTH)
    broken, tasks = threading.Event(), running.dns.tasks

    def fail(*arguments: object, patient: bool = False) -> TaskAnswers:
        broken.set()
        raise ZeroDivisionError

    running.dns.tasks = fail  # type: ignore[method-assign, assignment]
    assert broken.wait(patience(10))
    running.dns.tasks = tasks  # type: ignore[method-assign]
    running.dns.active["web"] = frozenset({at(7)})
    soon(lambda: running.balancer.tables[sandbox] == {VIP: (at(7),)})


def test_slow_network_does_not_delay_others(running: Host) -> None:
    """While the engine is slow for one network, others are polled."""
    running.driver.create_network(NET2, {}, (POOL2,))
    running.list(NET2, service("db", VIP2, 9, net=5))
    running.dns.active["db"] = frozenset({at(9, 5)})
    release, network = threading.Event(), running.engine.network

    def slow(network_id: str, *, services: bool = False) -> NetworkView | None:
        if network_id == NET:
            assert release.wait(patience(20))
        return network(network_id, services=services)

    running.engine.network = slow  # type: ignore[method-assign]
    try:
        running.join(20)
        other = running.join(21, NET2)
        soon(lambda: running.balancer.tables.get(other) == {VIP2: (at(9, 5),)})
        assert NET not in running.syncer.state()
    finally:
        release.set()
    soon(lambda: (NET, frozenset({PEER})) in running.flooded)


def test_stopped_loop_is_quiet(running: Host) -> None:
    """After stop there are no requests any more."""
    running.join(20)
    soon(lambda: NET in running.syncer.state())
    running.syncer.stop()
    time.sleep(0.3)
    asked = len(running.engine.asked)
    time.sleep(0.5)
    assert len(running.engine.asked) == asked


def test_endpoints_without_a_sandbox(host: Host) -> None:
    """An endpoint that has not joined has no namespace to write to."""
    host.driver.create_endpoint(NET, endpoint_id(1), ipv4=IPv4Interface("10.0.4.40/24"))
    host.look()
    assert host.balancer.tables == {}
    assert host.syncer.sandbox(Endpoint("e", NET, "m")) is None


def test_errors_of_one_network(host: Host) -> None:
    """An error of one network, other than the engine's silence, concerns that network only."""

    def fail(network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        raise NotFound("no device")

    host.kernel.set_peers = fail  # type: ignore[method-assign]
    sandbox = host.join(20)
    host.look()
    assert host.balancer.tables[sandbox] == BOTH
    assert host.syncer.state()[NET].error == "no device"
    assert host.syncer.engine()[1] is None


# --- balance


def here(host: Host, *numbers: int) -> None:
    """The engine lists the containers of these tasks on this host from now on."""
    view = host.engine.views[NET]
    containers = (
        LocalContainer(f"c{n}", f"web.{n}", endpoint_id(n), IPv4Interface(f"10.0.4.{n}/24"))
        for n in numbers
    )
    host.engine.views[NET] = replace(view, containers=tuple(containers))


def balanced(host: Host, balance: str) -> None:
    """The network has this option from now on."""
    (network,) = host.driver.store.networks()
    host.driver.store.put_network(replace(network, options={"balance": balance}))


def test_local_tasks_come_first(host: Host) -> None:
    """With balance=local, this host's tasks that take connections get them, else all: when they
    start, while they are starting, are lost, and come back."""
    balanced(host, "local")
    sandbox = host.join(20)
    host.look()
    assert host.balancer.leads(sandbox) == BOTH
    here(host, 8)
    host.dns.active["web"] = frozenset({at(7)})
    host.look()
    assert host.balancer.leads(sandbox) == {VIP: (at(7),)}
    host.dns.active["web"] = frozenset({at(7), at(8)})
    host.look()
    assert host.balancer.leads(sandbox) == {VIP: (at(8),)}
    assert host.balancer.tables[sandbox] == BOTH
    here(host)
    host.look()
    assert host.balancer.leads(sandbox) == BOTH
    here(host, 8)
    host.look()
    assert host.balancer.leads(sandbox) == {VIP: (at(8),)}


def test_labels_of_services_are_followed(host: Host) -> None:
    """A service's label takes precedence over the network's option, and a change of it is followed
    within 2 s; while the engine doesn't tell labels, they stay."""
    sandbox = host.join(20)
    here(host, 8)
    host.look()
    assert host.balancer.leads(sandbox) == BOTH
    host.engine.wanted = {"web": "Local"}
    host.look(2.0)
    assert host.balancer.leads(sandbox) == {VIP: (at(8),)}
    host.engine.down = True
    host.look(2.0)
    assert host.balancer.leads(sandbox) == {VIP: (at(8),)}
    host.engine.down = False
    host.engine.wanted = {}
    host.look(20.0)
    assert host.balancer.leads(sandbox) == BOTH
    balanced(host, "local")
    host.syncer.wake()
    host.look(2.0)
    assert host.balancer.leads(sandbox) == {VIP: (at(8),)}
    host.engine.wanted = {"web": "even"}
    host.look(2.0)
    assert host.balancer.leads(sandbox) == BOTH


def test_rules_of_an_earlier_process_wait_for_labels(
    host: Host, request: pytest.FixtureRequest
) -> None:
    """After a restart a container's rules stay as they are until the labels are known: a client
    that keeps its task because of a label would lose it."""
    host.engine.wanted = {"web": "source"}
    sandbox = host.join(20)
    host.look()
    choices = host.balancer.choices[sandbox]
    assert choices[VIP].client == at(20)
    host.engine.tells_labels.clear()
    host.dns.active["web"] = frozenset({at(8)})
    try:
        running: Host = request.getfixturevalue("running")
        soon(lambda: NET in running.syncer.state())
        soon(lambda: running.syncer.state()[NET].table == {VIP: (at(8),)})
        time.sleep(0.3)
        assert (host.balancer.tables[sandbox], host.balancer.choices[sandbox]) == (BOTH, choices)
    finally:
        host.engine.tells_labels.set()
    soon(lambda: host.balancer.tables[sandbox] == {VIP: (at(8),)})
    assert host.balancer.choices[sandbox] == choices


def test_a_swarm_without_a_leader_is_not_awaited(host: Host) -> None:
    """If the engine can't tell labels, rules are written without."""
    host.engine.leader = False
    balanced(host, "local")
    here(host, 8)
    sandbox = host.join(20)
    host.look()
    host.restart()
    host.dns.active["web"] = frozenset({at(8)})
    host.look()
    assert host.balancer.tables[sandbox] == {VIP: (at(8),)}


def test_a_client_has_one_task(host: Host) -> None:
    """With balance=source a container's connections go to one task, by the container's address."""
    balanced(host, "source")
    sandboxes = {number: host.join(number) for number in range(20, 40)}
    host.look()
    for number, sandbox in sandboxes.items():
        assert host.balancer.leads(sandbox) == {VIP: (favourite(at(number), BOTH[VIP]),)}
    assert {host.balancer.leads(sandbox)[VIP] for sandbox in sandboxes.values()} == {
        (at(7),),
        (at(8),),
    }


def test_unchanged_balance_is_not_written_again(host: Host) -> None:
    """Polls without a change write nothing, whatever the balance."""
    balanced(host, "local")
    host.join(20)
    here(host, 8)
    for _ in range(3):
        host.look()
    writes = host.balancer.writes
    for _ in range(3):
        host.look()
    assert host.balancer.writes == writes
